"""Selective scans and other recurrences over time are one kernel, exact beside float64; what is none stays a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.targets.running import execute
from xopt import targets
from xopt.ir import canonicalize
from xopt.targets.lowering import Lowered, lower

Feeds = Mapping[str, np.ndarray]
STEPS, BATCH, CHANNELS, STATE = 7, 2, 6, 16


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


SELECTIVE = """g (float[T, B, 6] d, float[T, B, 6] x, float[T, B, 16] b, float[T, B, 16] c, float[6, 16] a,
                   float[B, 6, 16] h0) => (float[B, 6, 16] h, float[T, B, 6] y) {
    h, y = Scan <num_scan_inputs = 4, body = step (float[B, 6, 16] old, float[B, 6] dt, float[B, 6] xt,
                 float[B, 16] bt, float[B, 16] ct) => (float[B, 6, 16] new, float[B, 6] yt) {
        last = Constant <value = int64[1] {-1}> ()
        one = Constant <value = int64[1] {1}> ()
        dt3 = Unsqueeze(dt, last)
        rate = Mul(dt3, a)
        decay = Exp(rate)
        xt3 = Unsqueeze(xt, last)
        bt3 = Unsqueeze(bt, one)
        dx = Mul(dt3, xt3)
        entering = Mul(dx, bt3)
        kept = Mul(old, decay)
        new = Add(kept, entering)
        ct3 = Unsqueeze(ct, last)
        y3 = MatMul(new, ct3)
        read = Squeeze(y3, last)
        gate = Sigmoid(xt)
        yt = Mul(read, gate)
    }> (h0, d, x, b, c)
}"""
RETAINED = """g (float[B, 3, T, 4] q, float[B, 3, T, 4] k, float[B, 3, T, 8] v, float[3, 1, 1] decay,
                  float[B, 3, 4, 8] s0) => (float[B, 3, 4, 8] s, float[B, 3, T, 8] y) {
    s, y = Scan <num_scan_inputs = 3, scan_input_axes = [2, 2, 2], scan_output_axes = [2],
                 scan_input_directions = [1, 1, 1], scan_output_directions = [1], body = step (float[B, 3, 4, 8] old,
                 float[B, 3, 4] qt, float[B, 3, 4] kt, float[B, 3, 8] vt)
                 => (float[B, 3, 4, 8] new, float[B, 3, 8] yt) {
        kept = Mul(old, decay)
        outer = Einsum <equation = "bhk,bhv->bhkv"> (kt, vt)
        new = Add(kept, outer)
        yt = Einsum <equation = "bhk,bhkv->bhv"> (qt, new)
    }> (s0, q, k, v)
}"""
GATED = """g (float[B, T, 8] x, float[B, T, 8] gates, float[8] rate, float[B, 8] h0)
          => (float[B, 8] h, float[T, B, 8] y) {
    length = Shape <start = 1, end = 2> (x)
    steps = Squeeze(length)
    go = Constant <value = bool {1}> ()
    h, y = Loop <body = step (int64 i, bool going, float[B, 8] old) => (bool on, float[B, 8] new, float[B, 8] yt) {
        xt = Gather <axis = 1> (x, i)
        gt = Gather <axis = 1> (gates, i)
        opened = Sigmoid(gt)
        log = Mul(rate, opened)
        decay = Exp(log)
        square = Mul(decay, decay)
        one = Constant <value = float {1.0}> ()
        rest = Sub(one, square)
        root = Sqrt(rest)
        entering = Mul(root, xt)
        kept = Mul(decay, old)
        new = Add(kept, entering)
        yt = Identity(new)
        on = Identity(going)
    }> (steps, go, h0)
}"""
MIXING = """g (float[T, B, 8] x, float[8, 8] w, float[B, 8] h0) => (float[B, 8] h, float[T, B, 8] y) {
    h, y = Scan <num_scan_inputs = 1, body = step (float[B, 8] old, float[B, 8] xt)
                 => (float[B, 8] new, float[B, 8] yt) {
        mixed = MatMul(old, w)
        both = Add(mixed, xt)
        new = Tanh(both)
        yt = Identity(new)
    }> (h0, x)
}"""


def _selective(f: Feeds) -> list[np.ndarray]:
    h, ys = f["h0"], []
    for d, x, b, c in zip(f["d"], f["x"], f["b"], f["c"]):
        h = h * np.exp(d[..., None] * f["a"]) + (d * x)[..., None] * b[:, None]
        ys.append((h @ c[..., None])[..., 0] / (1 + np.exp(-x)))
    return [h, np.stack(ys)]


def _retained(f: Feeds) -> list[np.ndarray]:
    s, ys = f["s0"], []
    for t in reversed(range(STEPS)):
        s = s * f["decay"] + f["k"][:, :, t, :, None] * f["v"][:, :, t, None]
        ys.insert(0, np.einsum("bhk,bhkv->bhv", f["q"][:, :, t], s))
    return [s, np.stack(ys, 2)]


def _gated(f: Feeds) -> list[np.ndarray]:
    h, ys = f["h0"], []
    for t in range(STEPS):
        decay = np.exp(f["rate"] / (1 + np.exp(-f["gates"][:, t])))
        h = decay * h + np.sqrt(1 - decay**2) * f["x"][:, t]
        ys.append(h)
    return [h, np.stack(ys)]


B, T = BATCH, STEPS
CASES: dict[str, tuple[str, Callable[[Feeds], list[np.ndarray]], Feeds]] = {
    "selective": (
        SELECTIVE, _selective,
        {"d": abs(normal(T, B, 6)), "x": normal(T, B, 6), "b": normal(T, B, 16), "c": normal(T, B, 16) + 1,
         "a": -abs(normal(6, 16)), "h0": normal(B, 6, 16)},
    ),
    "retained": (
        RETAINED, _retained,
        {"q": normal(B, 3, T, 4), "k": normal(B, 3, T, 4) + 1, "v": normal(B, 3, T, 8),
         "decay": np.array([0.5, 0.9, 1], np.float32).reshape(3, 1, 1), "s0": normal(B, 3, 4, 8)},
    ),
    "gated": (
        GATED, _gated,
        {"x": normal(B, T, 8), "gates": normal(B, T, 8) - 1, "rate": -abs(normal(8)), "h0": normal(B, 8)},
    ),
}  # fmt: skip


def _lowered(text: str) -> Lowered:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> {text}'))
    canonicalize(model)
    return lower(model, targets.get("cpu"))


def _scans(lowered: Lowered) -> bool:
    return any(str(variable.name_hint).startswith("scan_") for variable in lowered.module.get_global_vars())


@pytest.mark.parametrize(("text", "exact", "feeds"), CASES.values(), ids=CASES)
def test_recurrence(text: str, exact: Callable[[Feeds], list[np.ndarray]], feeds: Feeds) -> None:
    lowered = _lowered(text)
    assert _scans(lowered)
    wanted = exact({name: array.astype(np.float64) for name, array in feeds.items()})
    for got, want in zip(execute(lowered, feeds), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)


DOUBLING = """g (float[T, B, 8] x, float[B, 8] h0) => (float[B, 8] h, float[T, B, 8] y) {
    h, y = Scan <num_scan_inputs = 1, body = step (float[B, 8] old, float[B, 8] v0) => (float[B, 8] new, float[B, 8] yt)
    { %s new = Mul(old, v60)  yt = Identity(new) }> (h0, x)
}""" % " ".join(f"v{n + 1} = Add(v{n}, v{n}) " for n in range(60))  # noqa: UP031
"""Written out, a step of it has 2^60 terms."""


@pytest.mark.parametrize(
    "text", [MIXING, GATED.replace("8]", "7]"), DOUBLING], ids=["the state is mixed", "odd width", "too large"]
)
def test_what_stays_a_loop(text: str) -> None:
    assert not _scans(_lowered(text))
