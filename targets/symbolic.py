"""Integer tensors whose elements are known while lowering: numbers, or expressions in the symbolic dimensions.

Exporters compute shapes inside the graph (Shape, Gather, Concat, Reshape ...). Such tensors are held as numpy arrays of
Python numbers and ``tirx`` expressions, so that Reshape, Expand, Slice or Range take them directly and no shape
arithmetic is left to run time.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import tvm
from tvm import tirx
from tvm.sym import Analyzer
from tvm.tirx.analysis import undefined_vars
from tvm_ffi import StructuralKey

from xopt.errors import InputError
from xopt.ir.names import identifier
from xopt.ir.shape_rules import python_slice

Array = npt.NDArray[Any]

Dim: TypeAlias = Any
"""A dimension: a Python int, or a ``tirx`` int64 expression in the symbolic dimensions."""

_TYPED = re.compile(r"T\.int64\((-?\w+)\)")
_INTERNAL = re.compile(r"\bdim_\d+\w*")

MAX_ELEMENTS = 256
"""Larger integer tensors are data, not shapes."""


class UndecidedError(Exception):
    """The value cannot be told while lowering: compute it at run time instead."""


class ImpossibleError(InputError):
    """Sizes contradict each other whatever the inputs are: no other way to compile the node is of use."""


@dataclass(frozen=True)
class Ints:
    """A small tensor of known elements: an array of objects, and the numpy name of the type they stand for."""

    array: Array
    dtype: str


class Dimensions:
    """The symbolic dimensions of one model, and what is known about them.

    Each of an input is at least 1, unless it is said to be one that may be empty.

    The variables have names of our own: a model may call an axis ``a.b`` or ``past + 1``, which TVM would change, and
    two axes then be one.

    Attributes:
        empty: what the model calls those that may be 0.
        variables: by their own names.
        requirements: what must hold for the model to make sense and only the sizes of the inputs decide: conditions,
            by what is wrong when one does not hold.
        later: is given the conditions, and what is wrong without them, that depend on sizes which the data decide.
    """

    def __init__(self) -> None:
        self.empty: frozenset[str] = frozenset()
        self.variables: dict[str, tirx.Var] = {}
        self.requirements: dict[str, list[Any]] = {}
        self.later: Callable[[Any, str], None] | None = None
        self._decided: set[str] = set()
        self._called: dict[str, str] = {}
        self._by_name: dict[str, tirx.Var] = {}
        self._limits: dict[str, int] = {}
        self._analyzer = Analyzer()
        self._not_negative: set[StructuralKey] = set()

    def variable(self, name: str) -> tirx.Var:
        """The int64 variable shared by every dimension that the model calls ``name``."""
        if name not in self._by_name:
            self._by_name[name] = self._new(name)
        return self._by_name[name]

    def named(self, name: str) -> tirx.Var | None:
        """The variable of the dimension that the model calls ``name``, if there is one."""
        return self._by_name.get(name)

    def unnamed(self, description: str) -> tirx.Var:
        """An int64 variable for a dimension that has no name; for people it is called ``description``, or much so."""
        while description in self._called.values():
            description += "'"
        return self._new(description)

    def decided(self, description: str) -> tirx.Var:
        """An int64 variable for a size that the data decide: it may be 0, and is known while the model runs."""
        variable = self.unnamed(description)
        self._decided.add(variable.name)
        self._bind(variable.name, 1 << 31)
        return variable

    @contextmanager
    def apart(self, later: Callable[[Any, str], None]) -> Iterator[dict[str, list[Any]]]:
        """Meanwhile what is required goes into a dict of its own, which is given, or to ``later``."""
        before = self.requirements, self.later, set(self._not_negative)
        self.requirements, self.later = {}, later
        try:
            yield self.requirements
        finally:
            self.requirements, self.later, self._not_negative = before

    def _new(self, name: str) -> tirx.Var:
        internal = identifier("dim", len(self.variables), name)
        self.variables[internal] = tirx.Var(internal, "int64")
        self._called[internal] = name
        self._bind(internal, 1 << 31)
        return self.variables[internal]

    def _bind(self, internal: str, limit: int) -> None:
        least = 0 if internal in self._decided or self._called[internal] in self.empty else 1
        extent = tvm.ir.Range(tirx.IntImm("int64", least), tirx.IntImm("int64", limit + 1))
        self._analyzer.bind(self.variables[internal], extent, allow_override=True)

    def limit(self, dim: Dim, most: int) -> None:
        """Note that the model only makes sense for ``dim <= most``: a table of ``most`` rows is read up to there."""
        if isinstance(dim, tirx.Var) and most < self._limits.get(dim.name, 1 << 31):
            self._limits[dim.name] = most
            self._bind(dim.name, most)

    @property
    def limits(self) -> dict[str, int]:
        """The largest sizes noted, by what the model calls the dimensions."""
        return {self._called[internal]: most for internal, most in self._limits.items()}

    def readable(self, dim: Dim) -> int | str:
        """A dimension in the model's names."""
        if isinstance(dim, int):
            return dim
        if isinstance(dim, tirx.Var):
            return self._called[dim.name]
        return _INTERNAL.sub(lambda found: self._called.get(found[0], found[0]), _TYPED.sub(r"\1", str(dim)))

    def simplify(self, value: Dim) -> Dim:
        """The simplest form of ``value``; a Python int when it is constant."""
        if isinstance(value, (int, np.integer, bool)):
            return int(value)
        value = self._analyzer.simplify(value)
        return int(value.value) if isinstance(value, tirx.IntImm) else value

    def equal(self, a: Dim, b: Dim) -> bool:
        """Whether ``a`` and ``b`` are provably the same number."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(self._analyzer.can_prove_equal(_expression(a), _expression(b)))

    def related(self, a: Dim, b: Dim) -> bool:
        """Whether two dimensions depend on a common variable."""
        return bool(_variables(a) & _variables(b))

    def same_shape(self, a: Sequence[Dim], b: Sequence[Dim]) -> bool:
        """Whether two shapes are provably equal."""
        return len(a) == len(b) and all(self.equal(x, y) for x, y in zip(a, b))

    def proves(self, condition: Any) -> bool:
        """Whether a comparison holds for all values of the dimensions."""
        return condition if isinstance(condition, bool) else bool(self._analyzer.can_prove(condition))

    def require(self, condition: Any, otherwise: str) -> None:
        """Demand that a comparison holds: proved now, or checked when the model runs, before it computes anything.

        Args:
            condition: the comparison.
            otherwise: what is wrong when it does not hold.

        Raises:
            ImpossibleError: E-UNSUPPORTED-OP, it holds for no sizes of the dimensions.
        """
        if isinstance(condition, (bool, np.bool_)):
            holds = bool(condition)
        else:
            condition = self._analyzer.simplify(condition)
            holds = self.proves(condition)
            if not holds and not self.proves(tirx.Not(condition)):
                if self.later is not None and _variables(condition) & self._decided:
                    self.later(condition, otherwise)
                else:
                    self.requirements.setdefault(otherwise, []).append(condition)
                return
        if not holds:
            raise ImpossibleError("E-UNSUPPORTED-OP", otherwise, cure="correct the model")

    def require_sizes(self, shape: Sequence[Dim], what: str) -> None:
        """Demand that no dimension of a shape is negative."""
        for dim in shape:
            if isinstance(dim, tirx.Var):
                continue
            if not isinstance(dim, int):
                key = StructuralKey(dim)
                if key in self._not_negative:
                    continue
                self._not_negative.add(key)
            self.require(dim >= 0, f"{what} would have a negative size")

    def truth(self, condition: Any) -> bool:
        """The outcome of a comparison.

        Raises:
            UndecidedError: it depends on the dimensions.
        """
        if isinstance(condition, (bool, np.bool_)):
            return bool(condition)
        if self.proves(condition):
            return True
        if self.proves(tirx.Not(condition)):
            return False
        raise UndecidedError

    def same(self, a: Dim, b: Dim) -> Any:
        """Whether ``a`` and ``b`` are the same number: True, False, or the condition on the dimensions."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return self.equal(a, b) or tirx.EQ(_expression(a), _expression(b))

    def product(self, dims: Sequence[Dim]) -> Dim:
        """The number of elements of a shape."""
        result: Dim = 1
        for dim in dims:
            result = result * dim
        return self.simplify(result)

    def quotient(self, dims: Sequence[Dim], divisors: Sequence[Dim]) -> Dim:
        """``prod(dims) / prod(divisors)``, equal factors cancelled first so that symbolic quotients stay simple."""
        rest = list(dims)
        left: list[Dim] = []
        for divisor in divisors:
            match = next((i for i, dim in enumerate(rest) if self.equal(dim, divisor)), None)
            if match is None:
                left.append(divisor)
            else:
                del rest[match]
        total, divisor = self.product(rest), self.product(left)
        if isinstance(total, int) and isinstance(divisor, int):
            return total // divisor
        if not self.proves(divisor >= 1):
            divisor = tirx.max(_expression(divisor), _expression(1))  # sizes are computed before any is checked
        return self.simplify(tirx.floordiv(_expression(total), _expression(divisor)))

    def broadcast(self, *shapes: Sequence[Dim]) -> list[Dim]:
        """The broadcast of shapes; dimensions that cannot be told apart from 1 are taken as equal to the others."""
        rank = max(len(shape) for shape in shapes)
        aligned = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
        return [next((dim for dim in column if not self.equal(dim, 1)), 1) for column in zip(*aligned)]


def _variables(value: Dim) -> set[str]:
    return set() if isinstance(value, int) else {variable.name for variable in undefined_vars(value)}


def _expression(value: Dim) -> Any:
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, bool, np.generic))


def known(array: Array, dtype: str) -> Array | Ints:
    """``array`` (of objects) as a plain constant when every element is a number, else as :class:`Ints`."""
    if all(_is_number(x) for x in array.reshape(-1)):
        return array.astype(dtype)
    return Ints(array, dtype)


def _elementwise(function: Callable[..., Any], *arrays: Array) -> Array:
    result = np.frompyfunc(function, len(arrays), 1)(*arrays)
    return np.asarray(result, dtype=object)


def _truncated_quotient(dims: Dimensions) -> Callable[[Any, Any], Any]:
    def divide(a: Any, b: Any) -> Any:
        if isinstance(a, float) or isinstance(b, float):
            return a / b
        if _is_number(a) and _is_number(b):
            return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        if not dims.proves(b > 0) or not dims.proves(a >= 0):
            raise UndecidedError
        return tirx.floordiv(_expression(a), _expression(b))

    return divide


def _choose(compare: Callable[[Any, Any], Any], dims: Dimensions) -> Callable[[Any, Any], Any]:
    """Minimum or maximum by ``compare``; an undecided one stays an expression."""
    build = tirx.min if compare is operator.le else tirx.max

    def choose(a: Any, b: Any) -> Any:
        try:
            return a if dims.truth(compare(a, b)) else b
        except UndecidedError:
            return build(_expression(a), _expression(b))

    return choose


def _remainder(dims: Dimensions, truncated: bool) -> Callable[[Any, Any], Any]:
    def rest(a: Any, b: Any) -> Any:
        if truncated:
            raise UndecidedError
        if _is_number(a) and _is_number(b):
            return a % b
        if not dims.proves(b > 0):
            raise UndecidedError
        return tirx.floormod(_expression(a), _expression(b))

    return rest


def evaluate(op: str, inputs: Sequence[Any], attributes: dict[str, Any], dims: Dimensions) -> Array:
    """Apply the ONNX operator ``op`` to known integer tensors.

    Args:
        op: operator type; the ones in :data:`EVALUATED`.
        inputs: object arrays, optional inputs that are missing as None.
        attributes: the node's attributes.
        dims: the symbolic dimensions of the model.

    Raises:
        UndecidedError: the result depends on the dimensions in a way that only run time can tell.
    """
    arithmetic: dict[str, Callable[..., Any]] = {
        "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": _truncated_quotient(dims),
        "Mod": _remainder(dims, bool(attributes.get("fmod", 0))), "Neg": operator.neg,
        "Min": _choose(operator.le, dims), "Max": _choose(operator.ge, dims),
    }  # fmt: skip
    comparison: dict[str, Callable[..., Any]] = {
        "Equal": lambda a, b: dims.truth(a == b) if _is_number(a) and _is_number(b) else _same(a, b, dims),
        "Less": lambda a, b: dims.truth(a < b), "Greater": lambda a, b: dims.truth(a > b),
        "LessOrEqual": lambda a, b: dims.truth(a <= b), "GreaterOrEqual": lambda a, b: dims.truth(a >= b),
        "And": lambda a, b: bool(a) and bool(b), "Or": lambda a, b: bool(a) or bool(b), "Not": lambda a: not a,
    }  # fmt: skip
    if op in arithmetic:
        function = arithmetic[op]
        if len(inputs) == 1:
            return _elementwise(lambda x: _simplified(function(x), dims), inputs[0])
        return reduce(lambda a, b: _elementwise(lambda x, y: _simplified(function(x, y), dims), a, b), inputs)
    if op in comparison:
        return _elementwise(comparison[op], *inputs)
    return STRUCTURAL[op](list(inputs), attributes)


def _simplified(value: Any, dims: Dimensions) -> Any:
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise UndecidedError  # it wraps around when the model runs
    return value if _is_number(value) else dims.simplify(value)


def _same(a: Any, b: Any, dims: Dimensions) -> bool:
    if dims.equal(a, b):
        return True
    difference = dims.simplify(a - b)
    if dims.proves(_expression(difference) > 0) or dims.proves(_expression(difference) < 0):
        return False
    raise UndecidedError


def _where(inputs: list[Array], _: dict[str, Any]) -> Array:
    return _elementwise(lambda c, x, y: x if c else y, *inputs)


def _gather(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    return np.asarray(np.take(inputs[0], inputs[1].astype(np.int64), axis=attributes.get("axis", 0)), dtype=object)


def _concat(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    return np.concatenate(inputs, axis=attributes["axis"])


def _axes(inputs: list[Array], attributes: dict[str, Any]) -> list[int] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        return [int(x) for x in inputs[1].reshape(-1)]
    axes = attributes.get("axes")
    return None if axes is None else [int(x) for x in axes]


def _unsqueeze(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    return np.expand_dims(inputs[0], tuple(_axes(inputs, attributes) or ()))


def _squeeze(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    axes = _axes(inputs, attributes)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


def _numbers(array: Array) -> list[int]:
    if not all(_is_number(x) for x in array.reshape(-1)):
        raise UndecidedError
    return [int(x) for x in array.reshape(-1)]


def _slice(inputs: list[Array], _: dict[str, Any]) -> Array:
    starts, ends = _numbers(inputs[1]), _numbers(inputs[2])
    axes = _numbers(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = _numbers(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    index = [slice(None)] * inputs[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = python_slice(start, end, step, inputs[0].shape[axis])
    return inputs[0][tuple(index)]


def _range(inputs: list[Array], _: dict[str, Any]) -> Array:
    start, limit, delta = (_numbers(x)[0] for x in inputs)
    if any(isinstance(x.reshape(-1)[0], float) for x in inputs) or abs((limit - start) // delta) > MAX_ELEMENTS:
        raise UndecidedError
    return np.arange(start, limit, delta).astype(object)


def _reshape(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    shape = _numbers(inputs[1])
    if not attributes.get("allowzero", 0):
        shape = [dim or inputs[0].shape[axis] for axis, dim in enumerate(shape)]
    return inputs[0].reshape(shape)


def _constant_of_shape(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    shape, value = _numbers(inputs[0]), attributes.get("value")
    if prod(shape) > MAX_ELEMENTS:
        raise UndecidedError
    return np.full(shape, 0.0 if value is None else value.numpy().reshape(-1)[0].item(), dtype=object)


def _expand(inputs: list[Array], _: dict[str, Any]) -> Array:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(_numbers(inputs[1])))
    if prod(shape) > MAX_ELEMENTS:
        raise UndecidedError
    return np.broadcast_to(inputs[0], shape)


def _product(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    axes = _axes(inputs, attributes)
    if not axes and attributes.get("noop_with_empty_axes", 0):
        return inputs[0]
    keep = bool(attributes.get("keepdims", 1))
    return np.asarray(np.prod(inputs[0], axis=tuple(axes) if axes else None, keepdims=keep), dtype=object)


def _cast(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    """Sizes as another type: a bool, or an integer too narrow for one, holds something else."""
    kind = ir.DataType(int(attributes["to"]))
    if kind == ir.DataType.BOOL:
        return np.asarray([bool(x) for x in _numbers(inputs[0])], dtype=object).reshape(inputs[0].shape)
    if kind.bitwidth < 32 and any(abs(x) >= 1 << (kind.bitwidth - 1) for x in _numbers(inputs[0])):
        raise UndecidedError
    if kind.is_integer():
        return _elementwise(lambda x: int(x) if isinstance(x, float) else x, inputs[0])
    return inputs[0]


def _first(inputs: list[Array], _: dict[str, Any]) -> Array:
    return inputs[0]


STRUCTURAL: dict[str, Callable[[list[Array], dict[str, Any]], Array]] = {
    "Where": _where, "Gather": _gather, "Concat": _concat, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze,
    "Slice": _slice, "Range": _range, "Reshape": _reshape, "ConstantOfShape": _constant_of_shape,
    "Expand": _expand, "ReduceProd": _product, "Cast": _cast, "Identity": _first,
}  # fmt: skip

EVALUATED = frozenset(STRUCTURAL) | {
    "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max",
    "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not",
}  # fmt: skip
"""Operators that are evaluated while lowering when all their inputs are known."""
