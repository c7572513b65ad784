"""Mutations of meaning: models that stay valid, and compute something else.

A rewrite that matches more than it may (an attention that is not one, a norm over another axis, a mask with another
value) gives wrong numbers on these, and nothing else shows it. New nodes go where the types fit, as ONNX infers them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz import insertions
from tests.fuzz.context import BOOL, FLOAT, INT, Context, types_of
from tests.fuzz.insertions import BINARY, NUMBERS, UNARY

SWAPS = (
    BINARY, UNARY, ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"), ("And", "Or", "Xor"),
    ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), ("Softmax", "LogSoftmax"),
    ("Sqrt", "Reciprocal", "Exp"),
)  # fmt: skip
COUNTS = (0, 1, -1, 2, -2, 3, 4, 5, 7, 8, 16, 1 << 31, (1 << 63) - 1, -(1 << 63))


def mutate(model: onnx.ModelProto, random: Random) -> list[str]:
    """One to three changes, in place; returns their names. ``model`` comes with inferred types."""
    context = Context(model, random, types_of(model))
    del model.graph.value_info[:]
    changes = random.choices(CHANGES, k=random.choice((1, 1, 2, 3)))
    for change in changes:
        change(context)
    return [change.__name__ for change in changes]


# -- attributes and constants ------------------------------------------------------------------------------------------


def attribute(context: Context) -> None:
    """Another axis, permutation, epsilon, flag, stride …"""
    random = context.random
    found = [a for node in context.graph.node for a in node.attribute if a.type in (1, 2, 3, 7)]
    if not found:
        return
    one = random.choice(found)
    if one.type == onnx.AttributeProto.FLOAT:
        one.f = random.choice((*NUMBERS, one.f * 2, one.f / 2))
    elif one.type == onnx.AttributeProto.INT:
        one.i = random.choice((0, 1, -1, -2, 2, one.i + 1, one.i - 1, 1 - one.i))
    elif one.type == onnx.AttributeProto.STRING:
        one.s = random.choice((b"none", b"tanh", b"NOTSET", b"SAME_UPPER", b"nearest", b"add", b""))
    else:
        ints = list(one.ints)
        random.shuffle(ints)
        one.ints[:] = ints if random.random() < 0.7 else [i + random.choice((-1, 0, 1)) for i in ints]


def tensors(context: Context) -> list[onnx.TensorProto]:
    found = list(context.graph.initializer)
    found += [a.t for node in context.graph.node for a in node.attribute if a.name == "value" and a.HasField("t")]
    return [t for t in found if t.data_type in (FLOAT, INT, BOOL) and t.data_location != TensorProto.EXTERNAL]


def constant(context: Context) -> None:
    """Another index, axis, size, mask value, scale …"""
    random = context.random
    found = tensors(context)
    small = [t for t in found if np.prod(t.dims) <= 8]
    if not found:
        return
    tensor = random.choice(small if small and random.random() < 0.8 else found)
    array = numpy_helper.to_array(tensor).copy()
    if not array.size:
        return
    changed = (_ints if array.dtype == np.int64 else _bools if array.dtype == np.bool_ else _floats)(array, random)
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), name))


def _bools(array: np.ndarray, random: Random) -> np.ndarray:
    array.flat[random.randrange(array.size)] ^= True
    return array if random.random() < 0.5 else ~array


def _ints(array: np.ndarray, random: Random) -> np.ndarray:
    kind = random.randrange(5)
    if kind == 0:
        array += random.choice((-1, 1))
    elif kind == 1:
        array = np.ascontiguousarray(array[::-1]) if array.ndim == 1 else array * -1
    else:
        place = random.randrange(array.size)
        beside = array.flat[place : place + 1] + random.choice((-1, 1))  # may wrap around
        array.flat[place] = random.choice((*COUNTS, beside[0]))
    return array


def _floats(array: np.ndarray, random: Random) -> np.ndarray:
    kind = random.randrange(7)
    generator = np.random.default_rng(random.randrange(1 << 30))
    if kind == 0:
        return np.full_like(array, random.choice(NUMBERS))
    if kind == 1:
        return array * np.float32(random.choice((2.0, -1.0, 0.5, 1e4, 1e-4, 1.01)))
    if kind == 2:
        return array + (0.1 * generator.standard_normal(array.shape)).astype(array.dtype)
    if kind == 3 and array.ndim < 2:
        return array[None]  # the same numbers, in one more axis
    if kind == 4 and array.size == 1:
        return array.reshape(random.choice(((), (1,), (1, 1, 1))))
    array.flat[random.randrange(array.size)] = random.choice((*NUMBERS, float(array.flat[0]) + 1))
    return array


def widen(context: Context) -> None:
    """A scalar becomes a row of different numbers: what held for one number need not hold for many."""
    random = context.random
    stored = {t.name: t for t in context.graph.initializer if t.data_type == FLOAT and np.prod(t.dims) == 1}
    sites = [
        (node, i)
        for node in context.graph.node
        if node.op_type in BINARY
        for i, n in enumerate(node.input)
        if n in stored
    ]
    if not sites:
        return
    node, position = random.choice(sites)
    other = context.shape(node.input[1 - position])
    if other and isinstance(other[-1], int):
        base = float(numpy_helper.to_array(stored[node.input[position]]).reshape(()))
        row = base * (1 + 0.2 * np.random.default_rng(random.randrange(1 << 30)).standard_normal(other[-1]))
        if len(other) > 2 and isinstance(other[-2], int) and random.random() < 0.4:
            row = np.repeat(row[:1], other[-2])[:, None] * np.linspace(1, 2, other[-2])[:, None]
        node.input[position] = context.constant(row.astype(np.float32), "row")


# -- operators ---------------------------------------------------------------------------------------------------------


def swap_op(context: Context) -> None:
    """Another operator of the same signature."""
    random = context.random
    sites = [(node, family) for node in context.graph.node for family in SWAPS if node.op_type in family]
    if sites:
        node, family = random.choice(sites)
        node.op_type = random.choice(family)


def swap_operands(context: Context) -> None:
    sites = [
        node
        for node in context.graph.node
        if len(node.input) >= 2 and node.op_type not in ("Reshape", "Slice", "Gather")
    ]
    if sites:
        node = context.random.choice(sites)
        first = 1 if node.op_type == "Where" else 0
        node.input[first], node.input[first + 1] = node.input[first + 1], node.input[first]


def rewire(context: Context) -> None:
    """Another value of the same type and shape, computed before."""
    random = context.random
    edges = context.edges(None)
    if not edges:
        return
    place, position = random.choice(edges)
    old = context.graph.node[place].input[position]
    before = {name for node in context.graph.node[:place] for name in node.output}
    before |= {value.name for value in context.graph.input} | {tensor.name for tensor in context.graph.initializer}
    fits = [name for name in sorted(before) if context.types.get(name) == context.types[old] and name != old]
    if fits:
        context.graph.node[place].input[position] = random.choice(fits)


def share_weights(context: Context) -> None:
    random = context.random
    stored = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in context.graph.initializer}
    sites = [(node, i) for node in context.graph.node for i, name in enumerate(node.input) if name in stored]
    if sites:
        node, position = random.choice(sites)
        same = [name for name, kind in stored.items() if kind == stored[node.input[position]]]
        node.input[position] = random.choice(same)


def twice(context: Context) -> None:
    """A copy of a node, read by one of the readers."""
    random = context.random
    nodes = list(context.graph.node)
    place = random.randrange(len(nodes))
    one = copy.deepcopy(nodes[place])
    old = one.output[0]
    one.output[:] = [context.fresh("copy") if name else "" for name in one.output]
    one.name = ""
    readers = [(later, i) for later in nodes[place + 1 :] for i, name in enumerate(later.input) if name == old]
    if readers:
        reader, position = random.choice(readers)
        reader.input[position] = one.output[0]
        context.graph.node.insert(place + 1, one)


# -- what is read ------------------------------------------------------------------------------------------------------


def read_inside(context: Context) -> None:
    """A value inside becomes an output of the model: what was private to a pattern no longer is."""
    random = context.random
    known = {value.name for value in context.graph.output}
    found = [name for node in context.graph.node for name in node.output if name in context.types and name not in known]
    if found:
        name = random.choice(found)
        context.graph.output.append(
            helper.make_tensor_value_info(name, context.types[name][0], list(context.types[name][1]))
        )


def branch(context: Context) -> None:
    """A value inside is read once more: its mean is added to one further on."""
    random = context.random
    edges = context.edges()
    if not edges:
        return
    place, position = random.choice(edges)
    before = {name for node in context.graph.node[:place] for name in node.output}
    sources = [name for name in sorted(before) if context.types.get(name, (0, ()))[0] == FLOAT]
    if not sources:
        return
    source = random.choice(sources)

    def make(name: str) -> tuple[list[onnx.NodeProto], str]:
        mean, new = context.fresh("mean"), context.fresh("sum")
        return [
            helper.make_node("ReduceMean", [source], [mean], keepdims=0),
            helper.make_node("Add", [name, mean], [new]),
        ], new

    context.splice((place, position), make)


# -- axes --------------------------------------------------------------------------------------------------------------


def axes(context: Context) -> None:
    """Symbolic axes renamed, merged, fixed, or fixed ones made symbolic."""
    random = context.random
    dims = [dim for value in context.graph.input for dim in value.type.tensor_type.shape.dim]
    symbols = [dim for dim in dims if dim.dim_param]
    if not symbols:
        return
    old, kind = random.choice(symbols).dim_param, random.randrange(4)
    new = random.choice((*{dim.dim_param for dim in symbols}, "a.b", "a_b", "seq len", "2x", ""))
    for value in [*context.graph.input, *context.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if kind < 2 and dim.dim_param == old:
                dim.dim_param = new
            elif kind == 2 and dim.dim_param == old:
                dim.dim_value = 2 if old == "batch" else 5
    if kind == 3:
        random.choice(dims).dim_param = random.choice(("free", old))


def default_input(context: Context) -> None:
    """A stored tensor that is an input too: the caller may override it, so that it is no constant."""
    random = context.random
    known = {value.name for value in context.graph.input}
    found = [t for t in context.graph.initializer if t.name not in known and np.prod(t.dims) <= 4096]
    if found:
        tensor = random.choice(found)
        context.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


CHANGES: tuple[Callable[[Context], None], ...] = (
    attribute, attribute, constant, constant, constant, widen, swap_op, swap_op, swap_operands, rewire, rewire,
    share_weights, twice, read_inside, branch, axes, default_input, *insertions.CHANGES,
)  # fmt: skip
