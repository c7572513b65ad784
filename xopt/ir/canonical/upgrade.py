"""Operators of opsets 1 to 17 in their form of opset 18.

    before   Slice(x, starts=[1], ends=[3])   after   Slice(x, [1], [3])
             Softmax-11(x, axis=1)                    Reshape(Softmax(Flatten(x, axis=1)), Shape(x))

Over the years attributes became inputs (one table), defaults changed (ONNX's schemas tell), and a few operators changed
what they mean (one function each). An attribute that the operator does not have any more is refused by name.

(ONNX's own converter does not look into graphs without inputs, forgets how Resize places its samples, and refuses
Split, Pad, Cast and initializers of the first opsets.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from xopt.errors import InputError
from xopt.ir.edit import (
    attribute,
    constant,
    initializer,
    input_at,
    insert,
    names_remembered,
    operand,
    replace_uses,
    set_attributes,
    sweep,
)
from xopt.ir.shapes import infer_shapes

OPSET = 18
_ARITHMETIC = "Add Sub Mul Div Pow And Or Xor Equal Greater Less"
_REDUCTIONS = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare"

MOVED: dict[str, tuple[int, tuple[str, ...]]] = {
    "Reshape": (5, ("shape",)),
    "Upsample": (9, ("scales",)),
    "Slice": (10, ("starts", "ends", "axes")),
    "TopK": (10, ("k",)),
    "Clip": (11, ("min", "max")),
    "Pad": (11, ("pads", "value")),
    **dict.fromkeys(("Squeeze", "Unsqueeze", "ReduceSum"), (13, ("axes",))),
    "Split": (13, ("split",)),
    **dict.fromkeys(_REDUCTIONS.split(), (18, ("axes",))),
}
"""The opset from which on attributes are the inputs behind the first, in this order."""

IGNORED: dict[str, tuple[str, ...]] = {
    "Dropout": ("ratio", "is_test"),
    "Gemm": ("broadcast",),
    **dict.fromkeys(("RNN", "GRU", "LSTM"), ("output_sequence",)),
}
"""Attributes of earlier opsets that change nothing when a model runs; ``consumed_inputs`` is one of every operator."""


def upgrade(model: ir.Model, version: int) -> None:
    """Bring every node from opset ``version``, below 18, to opset 18, in place.

    Raises:
        InputError: ``E-UNSUPPORTED-OP`` names a node that has no counterpart there.
    """
    RemoveInitializersFromInputsPass()(model)
    infer_shapes(model, names=False)
    with names_remembered():
        for node in [node for node in model.graph.all_nodes() if not node.domain]:
            _upgrade(node, version, model.graph)
    model.opset_imports[""] = OPSET
    if version < 13:
        infer_shapes(model, names=False)  # shapes that are computed are known from what is an input today
        sweep(model, ("Softmax", "LogSoftmax", "Hardmax"), _by_row)


def _upgrade(node: ir.Node, version: int, graph: ir.Graph) -> None:
    for name in (*IGNORED.get(node.op_type, ()), "consumed_inputs"):
        node.attributes.pop(name, None)
    _write_defaults(node, version)
    moved, names = MOVED.get(node.op_type, (0, ()))
    if version < moved:
        _move(node, names, graph)
    changed, change = CHANGED.get(node.op_type, (0, None))
    if change is not None and version < changed:
        change(node, version, graph)
    if onnx.defs.has(node.op_type, OPSET, ""):
        known = onnx.defs.get_schema(node.op_type, OPSET, "").attributes
        if unknown := [name for name in node.attributes if name not in known]:
            raise _refused(node, version, f"attribute {unknown[0]!r} has no counterpart in later opsets")


def _refused(node: ir.Node, version: int, reason: str) -> InputError:
    what = f"{node.op_type} of opset {version} cannot be brought to opset {OPSET}: {reason}"
    cure = "export the model with opset 18 or newer"
    return InputError("E-UNSUPPORTED-OP", what, where=f"node {node.name!r}", cure=cure)


def _write_defaults(node: ir.Node, version: int) -> None:
    """Write an attribute down whose default is another one today."""
    if not all(onnx.defs.has(node.op_type, opset, "") for opset in (version, OPSET)):
        return
    old, new = (onnx.defs.get_schema(node.op_type, opset, "").attributes for opset in (version, OPSET))
    for name in old.keys() & new.keys() - node.attributes.keys():
        was, is_now = (description[name].default_value for description in (old, new))
        if was.type and _written(was) not in (_written(is_now), _MISSPELT):
            set_attributes(node, **{name: _written(was)})


_MISSPELT = "foward"
"""The default direction of a GRU in the schema of opset 1."""


def _written(attribute: onnx.AttributeProto) -> Any:
    """The value of an attribute, None where it has none."""
    value = onnx.helper.get_attribute_value(attribute) if attribute.type else None
    return value.decode() if isinstance(value, bytes) else value


def _move(node: ir.Node, names: tuple[str, ...], graph: ir.Graph) -> None:
    """Make inputs of attributes: whole numbers as int64, lists of floats as float32, a float as the first input is."""
    if node.op_type == "Pad" and "paddings" in node.attributes:
        set_attributes(node, pads=list(node.attributes.pop("paddings").value))
    given = [node.attributes.pop(name, None) for name in names]
    for place, (name, found) in enumerate(zip(names, given), start=1):
        if found is None:
            continue
        array = np.asarray(found.value)
        dtype: Any = np.int64 if array.dtype.kind == "i" else np.float32
        if array.ndim == 0 and array.dtype.kind == "f":
            dtype = (operand(node, 0).dtype or ir.DataType.FLOAT).numpy()
        array = array.reshape(-1) if array.dtype.kind == "i" else array
        _set_input(node, place, initializer(graph, f"{node.name}/{name}", array.astype(dtype)))


def _set_input(node: ir.Node, place: int, value: ir.Value) -> None:
    node.resize_inputs(max(place + 1, len(node.inputs)))
    node.replace_input_with(place, value)


def _ints(graph: ir.Graph, node: ir.Node, *values: int) -> ir.Value:
    return initializer(graph, f"{node.name}/ints", np.asarray(values, np.int64))


def _rank(node: ir.Node, place: int, version: int) -> int:
    shape = operand(node, place).shape
    if shape is None:
        raise _refused(node, version, "the rank of its input is not known")
    return len(shape)


def _broadcast(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """Arithmetic before opset 7: the second operand lies at ``axis``, by default at the end."""
    node.attributes.pop("broadcast", None)
    axis = node.attributes.pop("axis", None)
    if axis is None:
        return
    left, right = (_rank(node, place, version) for place in range(2))
    behind = left - (axis.as_int() % max(left, 1)) - right
    _append_axes(node, 1, behind, graph)


def _append_axes(node: ir.Node, place: int, count: int, graph: ir.Graph) -> None:
    """Give an input ``count`` axes of one place behind its own."""
    if count > 0:
        axes = _ints(graph, node, *range(-count, 0))
        node.replace_input_with(place, insert(node, "Unsqueeze", [operand(node, place), axes]))


def _prelu(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """Slopes were one for each channel, which is axis 1."""
    slopes = operand(node, 1).shape
    if slopes is not None and len(slopes) == 1 and slopes[0] != 1:
        _append_axes(node, 1, _rank(node, 0, version) - 2, graph)


def _cast(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """The type was a word."""
    set_attributes(node, to=int(ir.DataType[str(attribute(node, "to"))]))


def _concat(node: ir.Node, version: int, graph: ir.Graph) -> None:
    if "axis" not in node.attributes:
        set_attributes(node, axis=1)


def _tile(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """The second input was how often, the third along which axis."""
    times, axis = (constant(input_at(node, place)) for place in (1, 2))
    if times is None or axis is None or times.size != 1 or axis.size != 1:
        raise _refused(node, version, "its repeats depend on the data")
    repeats = [1] * _rank(node, 0, version)
    repeats[int(axis.reshape(-1)[0])] = int(times.reshape(-1)[0])
    node.resize_inputs(2)
    node.replace_input_with(1, _ints(graph, node, *repeats))


def _norm_order(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """The order of the norm was a float."""
    order = float(attribute(node, "p", 2.0) or 0)
    if order != int(order):
        raise _refused(node, version, f"p is {order}")
    set_attributes(node, p=int(order))


def _batch_norm(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """Whether it trains was told by the number of outputs; without ``spatial`` each place had numbers of its own."""
    test = node.attributes.pop("is_test", None)
    if any(output.name for output in node.outputs[1:]) and not (test is not None and test.value):
        raise _refused(node, version, "it is in training mode")
    if attribute(node, "spatial", 1) or _rank(node, 0, version) == 2:
        node.attributes.pop("spatial", None)


def _by_row(node: ir.Node) -> bool:
    """Softmax before opset 13: all axes from ``axis`` on were one."""
    axis, x, result = int(attribute(node, "axis", 1) or 0), operand(node, 0), node.outputs[0]
    if axis == -1 or (x.shape is not None and axis == len(x.shape) - 1):
        set_attributes(node, axis=-1)
        return False
    shape = insert(node, "Shape", [x], dtype=ir.DataType.INT64)
    rows = insert(node, "Flatten", [x], {"axis": axis})
    found = insert(node, node.op_type, [rows], {"axis": -1})
    replace_uses(result, insert(node, "Reshape", [found, shape], shape=result.shape))
    return True


def _split(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """Without sizes the parts are equal, and their number is an attribute."""
    if input_at(node, 1) is None:
        set_attributes(node, num_outputs=len(node.outputs))
    elif version < 2:
        node.replace_input_with(1, insert(node, "Cast", [node.inputs[1]], {"to": int(ir.DataType.INT64)}))


def _scatter(node: ir.Node, version: int, graph: ir.Graph) -> None:
    node.op_type = "ScatterElements"


def _roi_align(node: ir.Node, version: int, graph: ir.Graph) -> None:
    set_attributes(node, coordinate_transformation_mode="output_half_pixel")


def _upsample(node: ir.Node, version: int, graph: ir.Graph) -> None:
    sizes = [float(node.attributes.pop(name).value) for name in ("height_scale", "width_scale") if version == 1]
    if sizes:
        _set_input(node, 1, initializer(graph, f"{node.name}/scales", np.asarray([1, 1, *sizes], np.float32)))
    if attribute(node, "mode") == "bilinear":
        set_attributes(node, mode="linear")
    node.op_type = "Resize"
    _resized(node, operand(node, 1), "floor")


def _resize(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """Places were asymmetric; the nearest was the one before where it grows, and the one behind where it shrinks."""
    if version >= 11:
        _resize_half_pixel(node, version)
        return
    scales = operand(node, 1)
    found = constant(scales)
    known = None if found is None else found.astype(np.float64)
    if attribute(node, "mode", "nearest") != "nearest" or (known is not None and (known >= 1).all()):
        _resized(node, scales, "floor")
        return
    if known is None or not (known <= 1).all():
        one = initializer(graph, f"{node.name}/one", np.ones(1, np.float32))
        grown = insert(node, "Resize", [operand(node, 0), None, insert(node, "Max", [scales, one])], _PLACES)
        node.replace_input_with(0, grown)
        scales = insert(node, "Min", [scales, one])
    _resized(node, scales, "ceil")


_PLACES = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def _resized(node: ir.Node, scales: ir.Value, nearest: str) -> None:
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    set_attributes(node, coordinate_transformation_mode="asymmetric", nearest_mode=nearest)


def _resize_half_pixel(node: ir.Node, version: int) -> None:
    """``floor((x + 0.5) / scale)`` is the nearest of ``(x + 0.5) / scale - 0.5``, halves rounded up."""
    if attribute(node, "coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        if attribute(node, "mode", "nearest") != "nearest" or attribute(node, "nearest_mode") != "floor":
            raise _refused(node, version, "coordinates 'tf_half_pixel_for_nn' need nearest_mode 'floor'")
        set_attributes(node, coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_ceil")


def _scan(node: ir.Node, version: int, graph: ir.Graph) -> None:
    """Every operand had a batch axis, and the first told lengths; only a batch of one has a counterpart."""
    values = [value for value in node.inputs[1:] if value is not None]
    if input_at(node, 0) is not None or any(value.shape is None or value.shape[0] != 1 for value in values):
        raise _refused(node, version, "it loops over a batch")
    if "directions" in node.attributes:
        set_attributes(node, scan_input_directions=list(node.attributes.pop("directions").value))
    first = _ints(graph, node, 0)
    inner = [insert(node, "Squeeze", [value, first]) for value in values]
    names = [f"{node.name}/{place}" for place in range(len(node.outputs))]
    scan = ir.Node("", "Scan", inner, node.attributes.values(), num_outputs=len(names), name=f"{node.name}/9")
    for output, name in zip(scan.outputs, names):
        output.name = name
    assert node.graph is not None
    node.graph.insert_before(node, scan)
    for old, new in zip(node.outputs, scan.outputs):
        if old.uses() or old.is_graph_output():
            replace_uses(old, insert(node, "Unsqueeze", [new, first], dtype=old.dtype, shape=old.shape))
    node.graph.remove(node)


Change = Callable[[ir.Node, int, ir.Graph], None]
CHANGED: dict[str, tuple[int, Change]] = {
    **dict.fromkeys(_ARITHMETIC.split(), (7, _broadcast)),
    **dict.fromkeys(("LpPool", "GlobalLpPool"), (2, _norm_order)),
    "Concat": (4, _concat),
    "Cast": (6, _cast),
    "Tile": (6, _tile),
    "PRelu": (7, _prelu),
    "Scan": (9, _scan),
    "Upsample": (10, _upsample),
    "Resize": (13, _resize),
    "Scatter": (18, _scatter),
    "BatchNormalization": (14, _batch_norm),
    "RoiAlign": (16, _roi_align),
    "Split": (18, _split),
}
"""Operators that meant something else before an opset."""
