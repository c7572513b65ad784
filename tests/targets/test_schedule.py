"""Schedules of generated loop nests: parallel, vectorized, and computing the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi

from xopt import targets
from xopt.targets.schedule import scheduled


def pointwise() -> Any:
    a = te.placeholder((tirx.Var("n", "int64"), 50, 64), name="a")
    return te.create_prim_func([a, topi.add(topi.multiply(a, a), a)])


def narrow() -> Any:
    a = te.placeholder((tirx.Var("n", "int64"), 7), name="a")
    return te.create_prim_func([a, topi.tanh(a)])


def column_sums() -> Any:
    a = te.placeholder((tirx.Var("n", "int64"), 50, 64), name="a")
    return te.create_prim_func([a, topi.sum(a, axis=1)])


def row_sums() -> Any:
    a = te.placeholder((tirx.Var("n", "int64"), 50, 64), name="a")
    return te.create_prim_func([a, topi.sum(a, axis=2)])


REFERENCE = {
    pointwise: lambda a: a * a + a,
    narrow: np.tanh,
    column_sums: lambda a: a.sum(1),
    row_sums: lambda a: a.sum(2),
}


@pytest.mark.parametrize("build", REFERENCE)
def test_scheduled_function_computes_the_same(build: Any) -> None:
    function = build()
    extents = (3, 7) if build is narrow else (3, 50, 64)
    a = np.random.default_rng(0).standard_normal(extents).astype(np.float32)
    expected = REFERENCE[build](a)
    result = tvm.runtime.tensor(np.zeros_like(expected))
    tvm.compile(scheduled(function), targets.get("cpu").tvm_target())(tvm.runtime.tensor(a), result)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_forms() -> None:
    assert "T.vectorized" in scheduled(pointwise()).script()
    assert "T.vectorized" in scheduled(column_sums()).script()
    for build in REFERENCE:
        assert "T.parallel" in scheduled(build()).script()


def test_short_loops_stay_on_one_thread() -> None:
    a = te.placeholder((4, 64), name="a")
    assert "T.parallel" not in scheduled(te.create_prim_func([a, topi.abs(a)])).script()


def test_other_forms_are_left_alone() -> None:
    a = te.placeholder((16,), name="a")
    function = te.create_prim_func([a, topi.cumsum(a, 0)])
    assert scheduled(function).script() == function.script()


STEPS = {
    "tanh": (topi.tanh, np.tanh),
    "sign": (topi.sign, np.sign),
    "square": (lambda x: topi.multiply(x, x), np.square),
    "maximum": (lambda x: topi.maximum(x, topi.negative(x)), np.abs),
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_that_read_their_operand_often_are_not_all_inlined(step: str) -> None:
    """Each doubles the expression at least: 40 inlined would be one of 2**40 terms, which never ends."""
    a = te.placeholder((tirx.Var("n", "int64"), 16), name="a")
    array = np.linspace(-1, 1, 48, dtype=np.float32).reshape(3, 16)
    last, expected = a, array.astype(np.float64)
    for _ in range(40):
        last, expected = STEPS[step][0](last), STEPS[step][1](expected)
    function = scheduled(te.create_prim_func([a, last]))
    result = tvm.runtime.tensor(np.zeros_like(array))
    tvm.compile(function, targets.get("cpu").tvm_target())(tvm.runtime.tensor(array), result)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5)
