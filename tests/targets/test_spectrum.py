"""DFT in compiled artifacts, beside numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import xopt


@pytest.mark.parametrize(("length", "onesided", "inverse"), [(6, 0, 0), (5, 1, 0), (9, 1, 0), (6, 0, 1), (4, 0, 0)])
def test_transforms(tmp_path: Path, length: int, onesided: int, inverse: int) -> None:
    parts = 1 if onesided else 2
    x = np.random.default_rng(0).standard_normal((2, 6, 3, parts)).astype(np.float32)
    text = f"""<ir_version: 9, opset_import: ["" : 20]> g (float[b, 6, 3, {parts}] x) => (float[b, k, 3, 2] y) {{
        n = Constant <value = int64 {{{length}}}> ()
        axis = Constant <value = int64 {{1}}> ()
        y = DFT <onesided = {onesided}, inverse = {inverse}> (x, n, axis)
    }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    path = xopt.compile(tmp_path / "m.onnx", "cpu", tmp_path / "c", threads=1, database=False)
    values = x[..., 0].astype(np.float64) + (1j * x[..., 1] if parts == 2 else 0)
    want = (np.fft.ifft if inverse else np.fft.fft)(values, length, axis=1)
    want = want[:, : length // 2 + 1] if onesided else want
    got = xopt.Session.load(path, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(got, np.stack([want.real, want.imag], -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("reverse", "exclusive"), [(0, 0), (1, 1)])
def test_products_along_an_axis(tmp_path: Path, reverse: int, exclusive: int) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 26]> g (float[b, 5] x) => (float[b, 5] y) {{
        axis = Constant <value = int64 {{1}}> ()
        y = CumProd <reverse = {reverse}, exclusive = {exclusive}> (x, axis)
    }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    path = xopt.compile(tmp_path / "m.onnx", "cpu", tmp_path / "c", threads=1, database=False)
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    turned = x[:, ::-1] if reverse else x
    want = np.cumprod(np.concatenate([np.ones((3, 1), np.float32), turned[:, :-1]], 1) if exclusive else turned, 1)
    got = xopt.Session.load(path, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(got, want[:, ::-1] if reverse else want, rtol=1e-5)
