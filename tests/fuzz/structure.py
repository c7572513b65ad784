"""Mutations of a graph's structure: files that parse, but whose names, edges, types or scopes are wrong, or odd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import onnx
from onnx import helper

NAMES = (
    "", " ", "a.b", "a_b", "x\ny", "\r\nimport os", "'\"", "../../up", "/etc/passwd", "ü" * 40, "n" * 5000, "0", "None",
    "self", "def", "\x1b[31m", "weights", "main", "batch", "%s{}", "a b",
)  # fmt: skip
SIZES = (-1, 0, 1, 2, 3, 7, 64, 4096, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 62), -(1 << 62))
OPS = ("Add", "MatMul", "Softmax", "Split", "Loop", "If", "Scan", "Identity", "Cast", "Attention", "Sparkle", "Gather")


def mutate(model: onnx.ModelProto, random: Random) -> list[str]:
    """One to four changes, in place; returns their names."""
    changes = random.choices(CHANGES, k=random.choice((1, 1, 2, 4)))
    for change in changes:
        change(model, random)
    return [change.__name__ for change in changes]


def scope(model: onnx.ModelProto, random: Random) -> Any:
    """The main graph, or now and then a subgraph or the body of a function."""
    inner: list[Any] = [
        attribute.g for node in model.graph.node for attribute in node.attribute if attribute.HasField("g")
    ]
    inner += list(model.functions)
    return random.choice(inner) if inner and random.random() < 0.2 else model.graph


def node(model: onnx.ModelProto, random: Random) -> onnx.NodeProto:
    nodes = scope(model, random).node or model.graph.node
    return random.choice(nodes) if nodes else model.graph.node.add(op_type="Identity", input=["x"], output=["y"])


def names(model: onnx.ModelProto) -> list[str]:
    """All names of values in the main graph."""
    graph = model.graph
    found = [value.name for value in [*graph.input, *graph.initializer]]
    return [*found, *(name for one in graph.node for name in one.output)] or ["x"]


def rename_value(model: onnx.ModelProto, random: Random) -> None:
    """Everywhere, so that the graph stays whole."""
    old, new = random.choice(names(model)), random.choice((*NAMES, *names(model)[:3]))
    graph = model.graph
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.name = new if value.name == old else value.name
    for one in graph.node:
        for side in (one.input, one.output):
            side[:] = [new if name == old else name for name in side]


def rename_node(model: onnx.ModelProto, random: Random) -> None:
    node(model, random).name = random.choice(NAMES)


def duplicate_node(model: onnx.ModelProto, random: Random) -> None:
    inside = scope(model, random)
    if inside.node:
        inside.node.append(copy.deepcopy(random.choice(inside.node)))


def drop_node(model: onnx.ModelProto, random: Random) -> None:
    inside = scope(model, random)
    if inside.node:
        del inside.node[random.randrange(len(inside.node))]


def swap_nodes(model: onnx.ModelProto, random: Random) -> None:
    nodes = scope(model, random).node
    if len(nodes) > 1:
        a, b = random.sample(range(len(nodes)), 2)
        first = copy.deepcopy(nodes[a])
        nodes[a].CopyFrom(nodes[b])
        nodes[b].CopyFrom(first)


def rewire_input(model: onnx.ModelProto, random: Random) -> None:
    """Any value of the graph, a later one (a cycle), an absent one, or none at all."""
    one = node(model, random)
    if one.input:
        one.input[random.randrange(len(one.input))] = random.choice((*names(model), "absent", ""))


def change_arity(model: onnx.ModelProto, random: Random) -> None:
    side = getattr(node(model, random), random.choice(("input", "output")))
    if side and random.random() < 0.5:
        del side[random.randrange(len(side))]
    else:
        side.append(random.choice((*names(model), "new", "", "")))


def rename_output(model: onnx.ModelProto, random: Random) -> None:
    one = node(model, random)
    if one.output:
        one.output[random.randrange(len(one.output))] = random.choice((*names(model), *NAMES))


def change_op(model: onnx.ModelProto, random: Random) -> None:
    one = node(model, random)
    if random.random() < 0.7:
        one.op_type = random.choice((*OPS, node(model, random).op_type))
    else:
        one.domain = random.choice(("", "ai.onnx", "xopt", "com.microsoft", "pkg", "ai.onnx.ml", "\n"))


def change_attribute(model: onnx.ModelProto, random: Random) -> None:
    """Dropped, doubled, of another type, a reference, or moved to another node."""
    one = node(model, random)
    if not one.attribute or random.random() < 0.2:
        one.attribute.append(
            helper.make_attribute(
                random.choice(("axis", "perm", "to", "body", "zz")), random.choice((1, 1.5, "x", [1, 0]))
            )
        )
        return
    attribute = random.choice(one.attribute)
    kind = random.randrange(6)
    if kind == 0:
        one.attribute.remove(attribute)
    elif kind == 1:
        one.attribute.append(copy.deepcopy(attribute))
    elif kind == 2:
        attribute.type = random.choice(onnx.AttributeProto.AttributeType.values())
    elif kind == 3:
        attribute.ref_attr_name = random.choice(("axis", "by", "alpha"))
    elif kind == 4:
        node(model, random).attribute.append(copy.deepcopy(attribute))
    else:
        attribute.CopyFrom(
            helper.make_attribute(attribute.name or "a", random.choice((*SIZES, -1.5, "text", [5, 5, 5])))
        )


def change_ends(model: onnx.ModelProto, random: Random) -> None:
    """Graph inputs and outputs: doubled, dropped, another value, out of nothing."""
    side = random.choice((model.graph.input, model.graph.output))
    kind = random.randrange(5)
    if kind == 0 and side:
        side.append(copy.deepcopy(random.choice(side)))
    elif kind == 1 and side:
        del side[random.randrange(len(side))]
    elif kind == 2 and side:
        random.choice(side).name = random.choice((*names(model), "absent"))
    else:
        side.append(helper.make_tensor_value_info(random.choice(names(model)), random.randrange(1, 12), ["batch", 2]))


def change_shape(model: onnx.ModelProto, random: Random) -> None:
    """The declared type of an input or an output."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not values:
        return
    tensor = random.choice(values).type.tensor_type
    kind = random.randrange(5)
    if kind == 0:
        tensor.elem_type = random.randrange(24)
    elif kind == 1 or not tensor.shape.dim:
        tensor.shape.dim.add(dim_value=random.choice(SIZES))
    elif kind == 2:
        random.choice(tensor.shape.dim).dim_value = random.choice(SIZES)
    elif kind == 3:
        random.choice(tensor.shape.dim).dim_param = random.choice(NAMES)
    else:
        del tensor.shape.dim[random.randrange(len(tensor.shape.dim))]


def change_tensor(model: onnx.ModelProto, random: Random) -> None:
    """A stored tensor's type, dimensions, bytes, or the place of its data."""
    tensors = list(model.graph.initializer)
    tensors += [attribute.t for one in model.graph.node for attribute in one.attribute if attribute.HasField("t")]
    if not tensors:
        return
    tensor = random.choice(tensors)
    kind = random.randrange(6)
    if kind == 0:
        tensor.data_type = random.randrange(26)
    elif kind == 1:
        tensor.dims.append(random.choice(SIZES))
    elif kind == 2 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(SIZES)
    elif kind == 3:
        tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]
    elif kind == 4:
        tensor.name = random.choice((*NAMES, *names(model)))
    else:
        move_data(tensor, random)


def move_data(tensor: onnx.TensorProto, random: Random) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    if not tensor.external_data or random.random() < 0.5:
        tensor.external_data.add(
            key="location", value=random.choice(("weights.bin", "../weights.bin", "/dev/zero", ".", ""))
        )
    key = random.choice(("offset", "length", "location", "checksum", "zz"))
    value = random.choice((*map(str, SIZES), "x", "1e3", "weights.bin", "a/../weights.bin", "model.onnx", "\0"))
    tensor.external_data.add(key=key, value=value)


def initializer_as_input(model: onnx.ModelProto, random: Random) -> None:
    """As files of IR version 3 have it: a default that the caller may override."""
    if model.graph.initializer:
        tensor = random.choice(model.graph.initializer)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def drop_initializer(model: onnx.ModelProto, random: Random) -> None:
    if model.graph.initializer:
        del model.graph.initializer[random.randrange(len(model.graph.initializer))]


def change_version(model: onnx.ModelProto, random: Random) -> None:
    kind = random.randrange(4)
    if kind == 0:
        model.ir_version = random.choice((0, 3, 7, 10, 13, 99, -1, 1 << 60))
    elif kind == 1 and model.opset_import:
        random.choice(model.opset_import).version = random.choice((*range(12, 27), 0, -1, 1 << 60))
    elif kind == 2 and model.opset_import:
        del model.opset_import[random.randrange(len(model.opset_import))]
    else:
        model.opset_import.append(helper.make_opsetid(random.choice(("", "ai.onnx", "pkg")), random.randrange(13, 26)))


def into_branch(model: onnx.ModelProto, random: Random) -> None:
    """A node moves into both branches of an If, which capture its inputs."""
    inside = model.graph.node
    places = [
        place
        for place, one in enumerate(inside)
        if len(one.output) == 1 and not any(a.HasField("g") for a in one.attribute)
    ]
    if not places:
        return
    place = random.choice(places)
    moved = copy.deepcopy(inside[place])
    result = moved.output[0]
    branches = {}
    for branch in ("then_branch", "else_branch"):
        body = copy.deepcopy(moved)
        body.output[0] = random.choice((f"{result}_{branch}", result))
        end = onnx.ValueInfoProto(name=body.output[0])
        branches[branch] = helper.make_graph([body], random.choice((branch, "")), [], [end])
    model.graph.initializer.append(helper.make_tensor("condition", onnx.TensorProto.BOOL, [], [random.random() < 0.5]))
    inside[place].CopyFrom(helper.make_node("If", ["condition"], [result], name=f"if_{place}", **branches))


def into_function(model: onnx.ModelProto, random: Random) -> None:
    """A node becomes a call of a local function, which may call itself."""
    inside = model.graph.node
    if not inside:
        return
    place = random.randrange(len(inside))
    one = copy.deepcopy(inside[place])
    name = random.choice(("Local", one.op_type, "Add"))
    inputs, outputs = [f"i{n}" for n in range(len(one.input))], [f"o{n}" for n in range(len(one.output))]
    body = copy.deepcopy(one)
    body.input[:], body.output[:] = inputs, outputs
    if random.random() < 0.1:
        body.op_type, body.domain = name, "local"
    opsets = [copy.deepcopy(opset) for opset in model.opset_import]
    model.functions.append(helper.make_function("local", name, inputs, outputs, [body], opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    inside[place].CopyFrom(helper.make_node(name, list(one.input), list(one.output), domain="local"))


def bulk(model: onnx.ModelProto, random: Random) -> None:
    """A long chain, or a wide fan."""
    start = random.choice(names(model))
    count = random.choice((50, 400))
    if random.random() < 0.5:
        for step in range(count):
            model.graph.node.append(helper.make_node("Neg", [f"chain{step}" if step else start], [f"chain{step + 1}"]))
    else:
        model.graph.node.append(helper.make_node("Concat", [start] * count, ["wide"], axis=0))


CHANGES: tuple[Callable[[onnx.ModelProto, Random], None], ...] = (
    rename_value, rename_node, duplicate_node, drop_node, swap_nodes, rewire_input, rewire_input, change_arity,
    rename_output, change_op, change_attribute, change_attribute, change_ends, change_shape, change_shape,
    change_tensor, change_tensor, initializer_as_input, drop_initializer, change_version, into_branch, into_function,
    bulk,
)  # fmt: skip
