"""If, Loop and Scan in compiled artifacts, beside onnxruntime."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import xopt
from xopt.errors import InputError


def _session(text: str, folder: Path) -> tuple[xopt.Session, onnx.ModelProto]:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    onnx.save(model, folder / "m.onnx")
    return xopt.Session.load(xopt.compile(folder / "m.onnx", "cpu", folder / "c", threads=1, database=False)), model


def _check(text: str, folder: Path, *feeds: dict[str, Any]) -> None:
    session, model = _session(text, folder)
    reference = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for feed in feeds:
        got = session.run(feed)
        for output, want in zip(reference.get_outputs(), reference.run(None, feed)):
            assert got[output.name].dtype == want.dtype and len(got[output.name]) == len(want)
            if not want.size:
                continue  # onnxruntime gives no iteration's results other sizes than those of an iteration
            np.testing.assert_allclose(got[output.name], want, rtol=1e-5, atol=1e-6)


X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)

CHOICE = """g (float[n, 4] x) => (float[m, 4] y) {
    zero = Constant <value = float {0.0}> ()
    total = ReduceSum <keepdims = 0> (x)
    positive = Greater (total, zero)
    w = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
    double = Mul (x, w)
    y = If (positive) <
        then_branch = a () => (float[k, 4] p) { p = Concat <axis = 0> (double, x) },
        else_branch = b () => (float[l, 4] q) { q = Sub (x, w) }
    >
}"""

NESTED = """g (float[n, 4] x, int64 trips) => (float[n, 4] last, float[t, n, 4] all) {
    yes = Constant <value = bool {1}> ()
    last, all = Loop (trips, yes, x) <
        body = loop (int64 i, bool c, float[n, 4] s) => (bool go, float[n, 4] out, float[n, 4] seen) {
        two = Constant <value = int64 {2}> ()
        zero = Constant <value = int64 {0}> ()
        rest = Mod (i, two)
        even = Equal (rest, zero)
        out = If (even) <
            then_branch = a () => (float[n, 4] p) { p = Add (s, x) },
            else_branch = b () => (float[n, 4] q) { h = Constant <value = float {0.5}> () q = Mul (s, h) }
        >
        bound = Constant <value = float {50.0}> ()
        sum = ReduceSum <keepdims = 0> (out)
        go = Less (sum, bound)
        seen = Identity (out)
    }>
}"""

GROWING = """g (float[1, 4] x, int64 trips) => (float[m, 4] y) {
    y = Loop (trips, , x) <body = loop (int64 i, bool c, float[k, 4] s) => (bool go, float[j, 4] out) {
        go = Identity (c)
        out = Concat <axis = 0> (s, x)
    }>
}"""

SCAN = """g (float[n, 4] x, float[4] h0) => (float[4] h, float[4, n] y) {
    h, y = Scan <num_scan_inputs = 1, scan_input_directions = [1], scan_output_axes = [1], scan_output_directions = [1],
        body = step (float[4] s, float[4] e) => (float[4] o, float[4] z) {
            half = Constant <value = float {0.5}> ()
            d = Mul (s, half)
            o = Add (d, e)
            z = Identity (o)
        }> (h0, x)
}"""

CHECKED = """g (float[n, 4] x, int64[1] where, bool use) => (float[1, 4] y) {
    y = If (use) <
        then_branch = a () => (float[1, 4] p) { p = Gather <axis = 0> (x, where) },
        else_branch = b () => (float[1, 4] q) { q = ReduceMax <keepdims = 1> (x, axis) }
    >
}""".replace("=> (float[1, 4] y) {", "=> (float[1, 4] y) { axis = Constant <value = int64[1] {0}> ()")


def test_branches_of_different_sizes_and_what_they_capture(tmp_path: Path) -> None:
    _check(CHOICE, tmp_path, {"x": np.abs(X)}, {"x": -np.abs(X[:2])})


def test_a_loop_with_a_condition_of_the_data_and_a_branch_inside(tmp_path: Path) -> None:
    feeds = [{"x": x, "trips": np.array(t)} for x, t in ((X, 5), (np.abs(X), 1000), (X[:1], 0), (X[:2], 1))]
    _check(NESTED, tmp_path, *feeds)


def test_a_state_that_grows(tmp_path: Path) -> None:
    _check(GROWING, tmp_path, *({"x": X[:1], "trips": np.array(t)} for t in (0, 1, 7)))


def test_a_scan_backwards_onto_another_axis(tmp_path: Path) -> None:
    _check(SCAN, tmp_path, *({"x": X[:n], "h0": X[0]} for n in (1, 3)))


def test_only_the_branch_that_runs_refuses_an_index(tmp_path: Path) -> None:
    session, _ = _session(CHECKED, tmp_path)
    feed = {"x": X, "where": np.array([7]), "use": np.array(False)}
    np.testing.assert_array_equal(session.run(feed)["y"], X.max(axis=0, keepdims=True))
    with pytest.raises(InputError, match="an index is outside"):
        session.run(feed | {"use": np.array(True)})
    np.testing.assert_array_equal(session.run(feed | {"use": np.array(True), "where": np.array([1])})["y"], X[1:2])


COUNTING = """g (float[4] x, int64 trips) => (float[4] y) {
    y = Loop (trips, , x) <body = loop (int64 i, bool c, float[4] s) => (bool go, float[4] out) {
        go = Identity (c)
        one = Constant <value = float {1.0}> ()
        out = Add (s, one)
    }>
}"""


def test_many_iterations_and_an_interrupt(tmp_path: Path) -> None:
    session, _ = _session(COUNTING, tmp_path)
    result = session.run({"x": np.zeros(4, np.float32), "trips": np.array(100_000)})["y"]
    np.testing.assert_array_equal(result, np.full(4, 100_000, np.float32))
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        session.run({"x": np.zeros(4, np.float32), "trips": np.array(1 << 60)})
    assert session.run({"x": X[0], "trips": np.array(0)})["y"].tolist() == X[0].tolist()
