"""Integers known as polynomials: dimensions, shape arithmetic and tensor indices.

A symbol is a name: an axis of the input model (``batch``, or a digest ``<1f0c...>`` where a model calls it ``2*seq``),
an index of a tensor under study (``@key``), or the canonical text of an operation that polynomials cannot say
(``floor((seq+1)/2)``). Equal polynomials are equal numbers; unequal ones may be.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

Monomial = tuple[str, ...]

MOST_TERMS = 64
MOST_FACTORS = 12
LONGEST_NAME = 200
COEFFICIENTS = range(-(1 << 63), 1 << 63)
"""A result beyond one of these is lost: products and quotients of sums double with every step."""

_fresh = itertools.count()
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")


@dataclass(frozen=True)
class Poly:
    """Sum of ``coefficient * symbol * symbol ...``; ``terms`` is sorted and free of zeros."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(value: int | str | Poly) -> Poly:
        """The polynomial of a number or of one symbol."""
        if isinstance(value, Poly):
            return value
        if isinstance(value, str):
            return _build({(value,): 1}) if len(value) <= LONGEST_NAME else Poly.lost()
        return _build({(): int(value)})

    @staticmethod
    def axis(name: str) -> Poly:
        """The size of the axis that a model calls ``name``, which may look like an operation or a symbol of ours."""
        if _PLAIN.fullmatch(name):
            return Poly.of(name)
        return Poly.of(f"<{sha256(name.encode(errors='surrogatepass')).hexdigest()[:32]}>")

    @staticmethod
    def unknown() -> Poly:
        """A number about which nothing is known, equal to no other."""
        return Poly.of(f"?{next(_fresh)}")

    @staticmethod
    def lost() -> Poly:
        """A number that is too long to write down: equal to no other, and of any sign."""
        return Poly((((f"!{next(_fresh)}",), 1),))

    @property
    def constant(self) -> int | None:
        """The number, when no symbol is left."""
        if not self.terms:
            return 0
        monomial, coefficient = self.terms[0]
        return coefficient if len(self.terms) == 1 and not monomial else None

    @property
    def symbols(self) -> frozenset[str]:
        """All symbols that occur."""
        return frozenset(symbol for monomial, _ in self.terms for symbol in monomial)

    @property
    def is_name(self) -> bool:
        """Whether this is one symbol that names something, and not the text of an operation."""
        return self.is_symbol and "(" not in self.terms[0][0][0]

    @property
    def is_of_axes(self) -> bool:
        """Whether this is computed from sizes of named axes by nothing but sums and products."""
        return not any(symbol[0] in "?!" or "(" in symbol for symbol in self.symbols)

    @property
    def is_symbol(self) -> bool:
        """Whether this is one symbol and nothing else."""
        return len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1

    def __add__(self, other: Poly | int) -> Poly:
        return _build(Counter(dict(self.terms)), Poly.of(other).terms)

    def __sub__(self, other: Poly | int) -> Poly:
        return self + Poly.of(other) * -1

    def __mul__(self, other: Poly | int) -> Poly:
        if len(self.terms) * len(Poly.of(other).terms) > MOST_TERMS**2:
            return Poly.lost()
        products = ((tuple(sorted(a + b)), m * n) for a, m in self.terms for b, n in Poly.of(other).terms)
        return _build({}, products)

    def __floordiv__(self, other: Poly | int) -> Poly:
        """Quotient rounded down; both sides are taken to be non-negative."""
        other = Poly.of(other)
        exact = self.exactly(other)
        if exact is not None:
            return exact
        a, b = self.constant, other.constant
        return Poly.of(a // b) if a is not None and b else Poly.of(f"floor(({self})/({other}))")

    def exactly(self, other: Poly | int) -> Poly | None:
        """``self / other`` when that is a polynomial, else None: long division by the term of highest degree."""
        other = Poly.of(other)
        if self == other:
            return ONE
        if not other.terms:
            return None
        rest, quotient = self, Poly.of(0)
        lead, scale = max(other.terms, key=_degree)
        for _ in range(MOST_TERMS):
            if not rest.terms:
                return quotient
            monomial, coefficient = max(rest.terms, key=_degree)
            left = Counter(monomial)
            left.subtract(lead)
            if coefficient % scale or min(left.values(), default=0) < 0:
                return None
            part = Poly(((tuple(sorted(left.elements())), coefficient // scale),))
            rest, quotient = rest - part * other, quotient + part
        return None

    def at_least(self, bound: int, symbols: int = 0) -> bool:
        """Whether this is surely ``>= bound`` when every symbol is ``>= symbols``: 0 for indices, 1 for dimensions."""
        if any(coefficient < 0 or monomial[0].startswith("!") for monomial, coefficient in self.terms if monomial):
            return False
        least = sum(coefficient * int(symbols > 0 or not monomial) for monomial, coefficient in self.terms)
        return least >= bound

    def replaced(self, symbols: Mapping[str, Poly]) -> Poly:
        """The polynomial with symbols put in their place."""
        total = Poly.of(0)
        for monomial, coefficient in self.terms:
            product = Poly.of(coefficient)
            for symbol in monomial:
                product = product * symbols.get(symbol, Poly.of(symbol))
            total = total + product
        return total

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        return "+".join("*".join([*([] if c == 1 and m else [str(c)]), *m]) for m, c in self.terms)


def _degree(term: tuple[Monomial, int]) -> tuple[int, Monomial]:
    """Order of terms that multiplying by a term keeps."""
    return len(term[0]), term[0]


def product(values: Iterable[Poly]) -> Poly:
    """Product of all; 1 for none."""
    total = ONE
    for value in values:
        total = total * value
    return total


def _build(start: Mapping[Monomial, int], more: Iterable[tuple[Monomial, int]] = ()) -> Poly:
    total = dict(start)
    for monomial, coefficient in more:
        total[monomial] = total.get(monomial, 0) + coefficient
    if len(total) > MOST_TERMS or any(len(m) > MOST_FACTORS or c not in COEFFICIENTS for m, c in total.items()):
        return Poly.lost()
    return Poly(tuple(sorted((m, c) for m, c in total.items() if c)))


ZERO, ONE = Poly.of(0), Poly.of(1)
