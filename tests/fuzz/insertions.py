"""Mutations of meaning that put nodes between two others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.fuzz.context import BOOL, FLOAT, INT, Context

UNARY = ("Relu", "Neg", "Abs", "Sigmoid", "Tanh", "Erf", "Identity", "Softplus", "Sign", "Floor", "Sin", "Cos")
BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max")
NUMBERS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.0, 1e-5, 1e-12, 1e-30, 1e5, 1e10, 1e30, -1e9, -10000.0,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


def _insert(context: Context, edges: list[tuple[int, int]], make: Callable[[str, str], list[onnx.NodeProto]]) -> None:
    if not edges:
        return

    def splice(name: str) -> tuple[list[onnx.NodeProto], str]:
        new = context.fresh(name[:20])
        return make(name, new), new

    context.splice(context.random.choice(edges), splice)


def unary(context: Context) -> None:
    op = context.random.choice(UNARY)
    _insert(context, context.edges(), lambda old, new: [helper.make_node(op, [old], [new])])


def softmax(context: Context) -> None:
    axis = context.random.choice((-1, -1, 0, 1, -2))
    _insert(
        context,
        context.edges(ranks=range(2, 9)),
        lambda old, new: [helper.make_node("Softmax", [old], [new], axis=axis)],
    )


def binary(context: Context) -> None:
    """With a number, or a row of them."""
    op, random = context.random.choice(BINARY), context.random

    def make(old: str, new: str) -> list[onnx.NodeProto]:
        last = context.shape(old)[-1]
        if isinstance(last, int) and random.random() < 0.5:
            array = np.random.default_rng(random.randrange(1 << 30)).standard_normal(last)
        else:
            array = np.array(random.choice(NUMBERS))
        operands = [old, context.constant(array.astype(np.float32))]
        return [helper.make_node(op, operands if random.random() < 0.7 else operands[::-1], [new])]

    _insert(context, context.edges(), make)


def cast(context: Context) -> None:
    """To another type and back, which rounds."""
    through = context.random.choice(
        (TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64, BOOL, TensorProto.BFLOAT16)
    )

    def make(old: str, new: str) -> list[onnx.NodeProto]:
        middle = context.fresh("cast")
        kind = context.types[old][0]
        return [
            helper.make_node("Cast", [old], [middle], to=through),
            helper.make_node("Cast", [middle], [new], to=kind),
        ]

    _insert(context, context.edges(context.random.choice((FLOAT, FLOAT, INT, BOOL))), make)


def turn(context: Context) -> None:
    """A transpose: of two axes of one size where there are such, else there and back with a nonlinearity between."""
    random = context.random

    def make(old: str, new: str) -> list[onnx.NodeProto]:
        shape = context.shape(old)
        perm = list(range(len(shape)))
        equal = [(a, b) for a in perm for b in perm if a < b and shape[a] == shape[b]]
        if equal and random.random() < 0.7:
            a, b = random.choice(equal)
            perm[a], perm[b] = b, a
            return [helper.make_node("Transpose", [old], [new], perm=perm)]
        random.shuffle(perm)
        there, middle = context.fresh("there"), context.fresh("middle")
        back = [perm.index(axis) for axis in range(len(perm))]
        return [
            helper.make_node("Transpose", [old], [there], perm=perm),
            helper.make_node(random.choice(UNARY), [there], [middle]),
            helper.make_node("Transpose", [middle], [new], perm=back),
        ]

    _insert(context, context.edges(None, range(2, 9)), make)


def reverse(context: Context) -> None:
    """Rows in the other order, by a slice with a negative step, or a part by a gather of negative indices."""
    random = context.random

    def make(old: str, new: str) -> list[onnx.NodeProto]:
        shape = context.shape(old)
        axis = random.randrange(len(shape))
        size = shape[axis]
        if isinstance(size, int) and 0 < size <= 4096 and random.random() < 0.5:
            order = np.roll(np.arange(size), random.choice((0, 1, -1))) - random.choice((0, size))
            return [helper.make_node("Gather", [old, context.constant(order)], [new], axis=axis)]
        numbers = (
            [[-1], [-(1 << 62)], [axis], [-1]] if random.random() < 0.7 else [[0], [1 << 62], [axis - len(shape)], [1]]
        )
        return [helper.make_node("Slice", [old, *(context.constant(np.array(n)) for n in numbers)], [new])]

    _insert(context, context.edges(None), make)


def shift(context: Context) -> None:
    """Minus its own mean, or times the root of its own mean square: half of a norm, over some axis."""
    axis = context.random.choice((-1, -1, 0, 1))

    def make(old: str, new: str) -> list[onnx.NodeProto]:
        mean, square = context.fresh("mean"), context.fresh("square")
        if context.random.random() < 0.5:
            return [
                helper.make_node("ReduceL2", [old, context.constant(np.array([axis]))], [square], keepdims=1),
                helper.make_node("Div", [old, square], [new]),
            ]
        return [
            helper.make_node("ReduceMax", [old, context.constant(np.array([axis]))], [mean], keepdims=1),
            helper.make_node("Sub", [old, mean], [new]),
        ]

    if _opset(context.model) >= 18:
        _insert(context, context.edges(ranks=range(2, 9)), make)


def reshape(context: Context) -> None:
    """Into one axis less and back, by -1 and 0."""

    def make(old: str, new: str) -> list[onnx.NodeProto]:
        shape = context.shape(old)
        flat, size = context.fresh("flat"), context.fresh("size")
        return [
            helper.make_node("Shape", [old], [size]),
            helper.make_node("Reshape", [old, context.constant(np.array([0] * (len(shape) - 2) + [-1]))], [flat]),
            helper.make_node("Reshape", [flat, size], [new]),
        ]

    _insert(context, context.edges(None, range(2, 9)), make)


def whole(context: Context) -> None:
    """Integers: ids and sizes that something is added to, that are clipped, negated, narrowed."""
    random = context.random
    op = random.choice(("Add", "Sub", "Mul", "Max", "Min", "Mod", "Div"))
    number = random.choice((0, 1, 2, -1, 3, 50))
    _insert(
        context,
        context.edges(INT, range(9)),
        lambda old, new: [helper.make_node(op, [old, context.constant(np.int64(number))], [new])],
    )


def negate(context: Context) -> None:
    """Masks: the other way round."""
    _insert(context, context.edges(BOOL, range(9)), lambda old, new: [helper.make_node("Not", [old], [new])])


def nan_guard(context: Context) -> None:
    """Where(IsNaN(x), 0, x), and its like."""
    number = context.random.choice((0.0, 1.0, -1.0))

    def make(old: str, new: str) -> list[onnx.NodeProto]:
        bad = context.fresh("bad")
        op = context.random.choice(("IsNaN", "IsInf"))
        fill = context.constant(np.float32(number))
        return [helper.make_node(op, [old], [bad]), helper.make_node("Where", [bad, fill, old], [new])]

    _insert(context, context.edges(), make)


def poison(context: Context) -> None:
    """A NaN or an infinity where a value passes a threshold."""
    number = np.float32(context.random.choice((np.nan, np.inf, -np.inf, 3e38)))

    def make(old: str, new: str) -> list[onnx.NodeProto]:
        high = context.fresh("high")
        limit, fill = context.constant(np.float32(context.random.choice((0.5, 1, 2)))), context.constant(number)
        return [helper.make_node("Greater", [old, limit], [high]), helper.make_node("Where", [high, fill, old], [new])]

    _insert(context, context.edges(), make)


def _opset(model: onnx.ModelProto) -> int:
    return max((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), default=0)


CHANGES: tuple[Callable[[Context], None], ...] = (
    unary, unary, softmax, binary, binary, cast, turn, turn, reverse, shift, reshape, whole, negate, nan_guard, poison,
)  # fmt: skip
