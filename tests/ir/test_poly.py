"""Polynomials obey arithmetic: what they say of symbols holds for every number put in their place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xopt.ir.poly import ONE, ZERO, Poly, product


def _combined(parts: tuple[Poly, Poly, str]) -> Poly:
    a, b, operation = parts
    return a + b if operation == "+" else a - b if operation == "-" else a * b


NAMES = ("batch", "seq", "heads")
VALUES = st.fixed_dictionaries({name: st.integers(1, 9) for name in NAMES})
SINGLE = st.one_of(st.integers(-9, 9).map(Poly.of), st.sampled_from(NAMES).map(Poly.of))
POLYS = st.recursive(SINGLE, lambda inner: st.tuples(inner, inner, st.sampled_from("+-*")).map(_combined), max_leaves=5)


def at(poly: Poly, values: dict[str, int]) -> int:
    number = poly.replaced({name: Poly.of(value) for name, value in values.items()}).constant
    assert number is not None
    return number


@given(POLYS, POLYS, VALUES)
def test_arithmetic(a: Poly, b: Poly, values: dict[str, int]) -> None:
    assert at(a + b, values) == at(a, values) + at(b, values)
    assert at(a - b, values) == at(a, values) - at(b, values)
    assert at(a * b, values) == at(a, values) * at(b, values)


@given(POLYS, POLYS)
def test_equal_however_written(a: Poly, b: Poly) -> None:
    assert (a + b) * (a - b) == a * a - b * b
    assert a - a == ZERO
    assert product([a, b, ONE]) == b * a


@given(POLYS, SINGLE.filter(lambda poly: poly != ZERO))
def test_exact_quotient(a: Poly, b: Poly) -> None:
    assert (a * b).exactly(b) == a
    quotient = a.exactly(b)
    assert quotient is None or quotient * b == a


@given(POLYS, st.integers(-20, 20), st.integers(0, 1), VALUES)
def test_bounds_hold(a: Poly, bound: int, least: int, values: dict[str, int]) -> None:
    assert not a.at_least(bound, least) or at(a, {name: value - 1 + least for name, value in values.items()}) >= bound


@given(st.text(), st.text())
def test_an_axis_is_itself_whatever_it_is_called(a: str, b: str) -> None:
    assert Poly.axis(a).is_name
    assert (Poly.axis(a) == Poly.axis(b)) == (a == b)


def test_an_axis_is_no_operation_and_no_symbol_of_ours() -> None:
    half = (Poly.axis("a") + 1) // 2
    for made in (half, Poly.unknown(), Poly.axis("a") * 2, Poly.of("@key"), Poly.axis("2*seq"), Poly.of(7)):
        assert Poly.axis(str(made)) != made
        assert Poly.axis(str(made)).is_name
    assert (Poly.axis("a+b") + 1) // 2 != (Poly.axis("a") + Poly.axis("b") + 1) // 2


def test_what_polynomials_cannot_say() -> None:
    half = (Poly.of("seq") + 1) // 2
    assert half == (Poly.of("seq") + 1) // 2
    assert half.is_symbol and not half.is_name and half.constant is None
    assert (Poly.of("seq") * 4) // 2 == Poly.of("seq") * 2
    assert Poly.of(7) // 2 == Poly.of(3)
    assert Poly.unknown() != Poly.unknown()


def test_a_product_of_sums_is_divided_by_one_of_them() -> None:
    batch, half = Poly.of("batch"), Poly.of("floor((length)/(2))")
    divisor = batch * 8 + batch * half * 8
    assert (divisor * 4).exactly(divisor) == Poly.of(4)
    assert (divisor * half + divisor * batch).exactly(divisor) == half + batch
    assert (divisor * 4 + 1).exactly(divisor) is None
    assert (batch * batch + half).exactly(batch + half) is None
