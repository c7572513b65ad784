"""DFT in compiled artifacts, beside numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import xopt
from tests.targets.running import execute, reference
from xopt import targets
from xopt.ir import canonicalize
from xopt.targets.lowering import lower


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


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


@pytest.mark.parametrize(("length", "onesided", "inverse"), [(1536, 0, 0), (1031, 1, 0), (2062, 0, 1)])
def test_long_transforms(length: int, onesided: int, inverse: int) -> None:
    """Lengths of small factors, a prime, and twice a prime. (onnxruntime is off by 1 in 2,000 at these.)"""
    parts = 1 if onesided else 2
    x = np.random.default_rng(length).standard_normal((2, length - 3, parts)).astype(np.float32)
    values = x[..., 0].astype(np.float64) + (1j * x[..., 1] if parts == 2 else 0)
    want = (np.fft.ifft if inverse else np.fft.rfft if onesided else np.fft.fft)(values, length, axis=1)
    got = _transformed(x, length, onesided, inverse)
    exact = np.stack([want.real, want.imag], -1)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-6 * abs(exact).max())


def test_a_long_spectrum_of_real_numbers_comes_back() -> None:
    wave = np.random.default_rng(0).standard_normal((2, 1500)).astype(np.float32)
    half = np.fft.rfft(wave.astype(np.float64), axis=1)
    got = _transformed(np.stack([half.real, half.imag], -1).astype(np.float32), 1500, 1, 1)
    np.testing.assert_allclose(got[..., 0], wave, rtol=1e-5, atol=1e-5)


def _transformed(x: np.ndarray, length: int, onesided: int, inverse: int) -> np.ndarray:
    text = f"""<ir_version: 9, opset_import: ["" : 20]> g (float[b, {x.shape[1]}, {x.shape[2]}] x)
               => (float[b, k, r] y) {{
        n = Constant <value = int64 {{{length}}}> ()
        axis = Constant <value = int64 {{1}}> ()
        y = DFT <onesided = {onesided}, inverse = {inverse}> (x, n, axis)
    }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    canonicalize(model)
    return execute(lower(model, targets.get("cpu")), {"x": x})[0]


@pytest.mark.parametrize(("onesided", "window", "length"), [(1, True, 23), (0, False, 60)])
def test_frames_of_a_signal(tmp_path: Path, onesided: int, window: bool, length: int) -> None:
    shape = "" if window else "n = Constant <value = int64 {8}> ()"
    given = "x, step, w" if window else "x, step, , n"
    text = f"""<ir_version: 9, opset_import: ["" : 20]> g (float[b, l, 1] x, float[8] w) => (float[b, f, k, 2] y) {{
        step = Constant <value = int64 {{3}}> ()
        {shape}
        y = STFT <onesided = {onesided}> ({given})
    }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    path = xopt.compile(tmp_path / "m.onnx", "cpu", tmp_path / "c", threads=1, database=False)
    x = np.random.default_rng(0).standard_normal((2, length, 1)).astype(np.float32)
    w = np.hanning(8).astype(np.float32) if window else np.ones(8, np.float32)
    got = xopt.Session.load(path, threads=1).run({"x": x, "w": w})["y"]
    frames = np.lib.stride_tricks.sliding_window_view(x[..., 0], 8, axis=1)[:, ::3] * w.astype(np.float64)
    want = (np.fft.rfft if onesided else np.fft.fft)(frames)
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


DATA = {
    "axis": (
        "(float[2, 5, 6, 1] x, int64 axis) => (float[a, b, c, 2] y) { y = DFT <onesided = 1> (x, , axis) }",
        {"x": normal(2, 5, 6, 1), "axis": np.array(-3)},
    ),
    "back": (
        "(float[4, 3, 2] x, int64 axis) => (float[a, b, c] y) { y = DFT <inverse = 1> (x, , axis) }",
        {"x": normal(4, 3, 2), "axis": np.array(0)},
    ),
    "frames": (
        "(float[2, 30, 1] x, int64 step, int64 n) => (float[a, f, k, 2] y) { y = STFT (x, step, , n) }",
        {"x": normal(2, 30, 1), "step": np.array(4), "n": np.array(9)},
    ),
    "windows": (
        "(float[2, 30] x, int64 step, float[8] w) => (float[a, f, k, 2] y) { y = STFT <onesided = 0> (x, step, w) }",
        {"x": normal(2, 30), "step": np.array(5), "w": np.hanning(8).astype(np.float32)},
    ),
    "mel": (
        """(int64 bins, int64 n, int64 rate, float low, float high) => (float[k, m] y) {
            y = MelWeightMatrix (bins, n, rate, low, high) }""",
        {"bins": np.array(6), "n": np.array(64), "rate": np.array(8000), "low": np.array(100, np.float32),
         "high": np.array(3500, np.float32)},
    ),
}  # fmt: skip


def _of_data(name: str, **other: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What we compute, and what ONNX's reference does (of a signal with its axis of parts)."""
    text, feeds = DATA[name]
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> g {text}'))
    feeds = {**feeds, **other}
    lowered = lower(model, targets.get("cpu"))
    got = execute(lowered, feeds)
    if name == "windows":
        feeds = {**feeds, "x": feeds["x"][..., None]}
    return got, reference(model, feeds)


@pytest.mark.parametrize("name", DATA)
def test_what_the_data_tell(name: str) -> None:
    for got, want in zip(*_of_data(name), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "wrong"), [("axis", {"axis": 3}), ("frames", {"step": 0}), ("frames", {"n": 31})])
def test_what_cannot_be_ends_the_run(name: str, wrong: dict[str, int]) -> None:
    with pytest.raises(Exception, match=r"axis|below 1|cannot be"):
        _of_data(name, **{key: np.array(value) for key, value in wrong.items()})
