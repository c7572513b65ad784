"""Calibration and evaluation data, and metrics on them."""

from xopt.data.dataset import Dataset

__all__ = ["Dataset"]
