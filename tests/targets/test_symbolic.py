"""Shape arithmetic while lowering equals numpy once the dimensions are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import tirx

from xopt.targets.symbolic import Dimensions, Ints, UndecidedError, evaluate, known


def objects(*values: Any) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def substituted(dims: Dimensions, value: Any, size: int) -> int:
    if isinstance(value, int):
        return value
    fixed = Dimensions()
    fixed._analyzer.bind(dims.variable("n"), tirx.IntImm("int64", size))
    result = fixed.simplify(value)
    assert isinstance(result, int)
    return result


@given(st.integers(1, 50), st.lists(st.integers(-9, 9), min_size=1, max_size=3), st.data())
def test_arithmetic_equals_numpy(size: int, constants: list[int], data: st.DataObject) -> None:
    dims = Dimensions()
    symbolic, numeric = objects(dims.variable("n"), *constants), np.array([size, *constants])
    for _ in range(3):
        op = data.draw(st.sampled_from(["Add", "Sub", "Mul", "Min", "Max"]))
        other = data.draw(st.integers(-5, 5))
        symbolic = evaluate(op, [symbolic, objects(other)], {}, dims)
        function = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Min": np.minimum, "Max": np.maximum}[op]
        numeric = function(numeric, other)
    assert [substituted(dims, value, size) for value in symbolic] == numeric.tolist()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 40))
def test_quotient_of_a_reshape(others: list[int], place: int, size: int) -> None:
    dims = Dimensions()
    shape = list(others)
    shape.insert(min(place, len(shape)), dims.variable("n"))
    quotient = dims.quotient(shape, [others[0]])
    total = size * int(np.prod(others))
    assert substituted(dims, quotient, size) == total // others[0]


def test_dynamic_factor_cancels() -> None:
    dims = Dimensions()
    n = dims.variable("n")
    assert dims.quotient([n, 12, 64], [n, 12]) == 64


def test_a_dimension_is_never_minus_one() -> None:
    dims = Dimensions()
    n = dims.variable("n")
    equal = evaluate("Equal", [objects(n, -1), objects(-1)], {}, dims)
    chosen = evaluate("Where", [equal, objects(1, 1), objects(n, -1)], {}, dims)
    assert equal.tolist() == [False, True]
    assert chosen[0] is n and chosen[1] == 1


def test_what_depends_on_a_dimension_is_undecided() -> None:
    dims = Dimensions()
    with pytest.raises(UndecidedError):
        evaluate("Equal", [objects(dims.variable("n")), objects(5)], {}, dims)


def test_a_size_as_a_bool_is_a_size_no_more() -> None:
    dims = Dimensions()
    assert evaluate("Cast", [objects(3, 0)], {"to": 9}, dims).tolist() == [True, False]
    for content, kind in ((dims.variable("n"), 9), (dims.variable("n"), 3), (300, 2)):
        with pytest.raises(UndecidedError):
            evaluate("Cast", [objects(content)], {"to": kind}, dims)
    assert evaluate("Cast", [objects(dims.variable("n"))], {"to": 6}, dims)[0] is not None


def test_known_is_a_constant_only_without_dimensions() -> None:
    dims = Dimensions()
    assert isinstance(known(objects(dims.variable("n"), 1), "int64"), Ints)
    constant = known(objects(2, 1), "int32")
    assert isinstance(constant, np.ndarray) and constant.dtype == np.int32


def test_limits_sharpen_what_can_be_proved() -> None:
    dims = Dimensions()
    n = dims.variable("n")
    assert not dims.proves(n <= 64)
    dims.limit(n, 64)
    assert dims.proves(n <= 64)
    assert dims.limits == {"n": 64}


def test_dimensions_are_read_in_the_model_s_names() -> None:
    dims = Dimensions()
    dotted, underscored, number = (dims.variable(name) for name in ("a.b", "a_b", "1"))
    nameless = dims.unnamed("a_b")
    assert dims.variable("a.b").same_as(dotted)
    assert [dims.readable(dim) for dim in (dotted, underscored, number, nameless, 3)] == ["a.b", "a_b", "1", "a_b'", 3]
    assert dims.readable(dims.simplify(dotted * 2 + underscored)) in ("a.b * 2 + a_b", "a_b + a.b * 2")
    assert not dims.equal(dotted, underscored)
    assert not dims.related(underscored, nameless)
