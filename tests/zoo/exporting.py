"""Export a zoo model to ONNX, once a session for each way of exporting it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from .entry import Entry


@dataclass(frozen=True)
class Way:
    """How a model is exported: by which exporter, opset, attention implementation, and with dynamic axes (up to
    ``longest``) or not.
    """

    exporter: str = "dynamo"
    opset: int = 20
    attention: str = "sdpa"
    dynamic: bool = True
    longest: int = 64

    def __str__(self) -> str:
        axes = "dynamic" if self.dynamic else "static"
        return "-".join(part for part in (self.exporter, f"o{self.opset}", self.attention, axes) if part)


TRACED = (2, 7)
"""(batch, sequence) that models are traced at."""


@functools.cache
def exported(entry: Entry, way: Way) -> bytes:
    """The model's ONNX file."""
    module, feeds = entry.build(way.attention), entry.feeds(*TRACED)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        path = Path(folder) / "model.onnx"
        try:
            _export(module, feeds, entry, way, path)
        finally:
            logging.disable(logging.NOTSET)
        return path.read_bytes()


def _export(module: torch.nn.Module, feeds: tuple[torch.Tensor, ...], entry: Entry, way: Way, path: Path) -> None:
    names = {"input_names": list(entry.inputs), "output_names": ["output"], "opset_version": way.opset}
    if way.exporter == "torchscript":
        axes = dict(zip(entry.inputs, entry.axes)) if way.dynamic else None
        torch.onnx.export(module, feeds, str(path), dynamo=False, dynamic_axes=axes, **names)
        return
    shapes = None
    if way.dynamic:
        sizes = {name: feed.shape[axis] for axes, feed in zip(entry.axes, feeds) for axis, name in axes.items()}
        dims = {name: torch.export.Dim(name, max=max(way.longest, 2 * size)) for name, size in sizes.items()}
        axes_of = [{axis: dims[name] for axis, name in axes.items()} for axes in entry.axes]
        shapes = tuple(inspect.signature(module.forward).bind(*axes_of).arguments.values())  # *args are one of them
    program = torch.onnx.export(module, feeds, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    program.save(str(path), external_data=False)


def load(data: bytes) -> ir.Model:
    """The model of an ONNX file's bytes."""
    import onnx

    return ir.from_proto(onnx.load_from_string(data))
