"""Files of onnxruntime's quantizers, compiled, against the arithmetic that they write.

A number that lies between two levels is rounded to either of them, by the order of the sums before: results may be a
few levels apart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import xopt
from tests.ir import builders
from tests.ir.written import as_written
from xopt.ir import export, load
from xopt.ir.io import to_bytes

U8, I8, U16, I16 = QuantType.QUInt8, QuantType.QInt8, QuantType.QUInt16, QuantType.QInt16
QDQ, OPERATORS = QuantFormat.QDQ, QuantFormat.QOperator
STEPS = 2
"""How many levels of an output results may be apart, of 256."""
CASES: dict[str, tuple[QuantFormat | None, QuantType, QuantType, dict[str, Any]]] = {
    "qdq-u8s8": (QDQ, U8, I8, {}),
    "qdq-u8u8": (QDQ, U8, U8, {}),
    "qdq-s8s8-columns": (QDQ, I8, I8, {"per_channel": True}),
    "qdq-s8s8-symmetric": (QDQ, I8, I8, {"extra_options": {"ActivationSymmetric": True}}),
    "qdq-u16s8-columns": (QDQ, U16, I8, {"per_channel": True}),
    "qdq-s16s8": (QDQ, I16, I8, {}),
    "qdq-own-pairs": (QDQ, U8, I8, {"extra_options": {"DedicatedQDQPair": True, "AddQDQPairToWeight": True}}),
    "operators-u8s8-columns": (OPERATORS, U8, I8, {"per_channel": True}),
    "operators-u8u8": (OPERATORS, U8, U8, {}),
    "operators-s8s8": (OPERATORS, I8, I8, {}),
    "dynamic-s8": (None, U8, I8, {}),
    "dynamic-u8": (None, U8, U8, {}),
}
QUICK = ("operators-u8s8-columns", "dynamic-s8")


class Samples(CalibrationDataReader):
    """Random inputs."""

    def __init__(self, model: ir.Model) -> None:
        self._left: Iterator[dict[str, np.ndarray]] = iter([builders.feeds(model, seed=seed) for seed in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def quantized(model: ir.Model, case: str, folder: Path) -> Path:
    """A file as onnxruntime's tools leave it; a few columns of every weight stand out, as they do in trained models."""
    form, activations, weights, options = CASES[case]
    for value in model.graph.initializers.values():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)
        if array.ndim == 2 and array.dtype == np.float32:
            value.const_value = ir.tensor(np.where(np.arange(array.shape[1]) % 7 == 3, 4 * array, array))
    source, target = folder / "source.onnx", folder / "target.onnx"
    source.write_bytes(to_bytes(export(model)))
    logging.disable(logging.WARNING)
    try:
        if form is None:
            quantize_dynamic(source, target, weight_type=weights, **options)
        else:
            quantize_static(
                source, target, Samples(model), form, activation_type=activations, weight_type=weights, **options
            )
    finally:
        logging.disable(logging.NOTSET)
    return target


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_compiled_as_it_is_written(case: str, tmp_path: Path) -> None:
    model = builders.vit(layers=1, width=16, heads=2, image=8)
    path = quantized(model, case, tmp_path)
    feeds = builders.feeds(model, seed=9)
    (want,) = as_written(onnx.load(path), feeds)
    got = xopt.Session.load(xopt.compile(load(path), output=tmp_path / "model.so", threads=1)).run(feeds)["logits"]
    level = np.ptp(want) / 255
    assert np.abs(got - want).max() <= STEPS * level
    assert np.abs(got - want).mean() <= 0.1 * level
