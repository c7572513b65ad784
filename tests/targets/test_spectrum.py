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
