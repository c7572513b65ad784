"""Calibration and evaluation data, and metrics."""
