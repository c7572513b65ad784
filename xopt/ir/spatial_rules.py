"""Dimensions of what convolutions, pools, and other operators over the axes of images compute, as polynomials."""

from __future__ import annotations

import onnx_ir as ir

from xopt.ir.edit import constant, input_at
from xopt.ir.poly import ONE, Poly
from xopt.ir.shape_rules import Known, Rule, Shapes, integer


def _conv(s: Known, node: ir.Node) -> Shapes:
    x, w = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if x is None or w is None:
        return None
    spatial = len(x) - 2
    strides = _ints(node, "strides", [1] * spatial)
    dilations = _ints(node, "dilations", [1] * spatial)
    pads = _ints(node, "pads", [0] * 2 * spatial)
    if node.attributes.get("auto_pad") is not None and node.attributes["auto_pad"].as_string() not in (
        "NOTSET",
        "VALID",
    ):
        return None
    sizes = []
    for i in range(spatial):
        kernel = w[2 + i].constant
        if kernel is None:
            return None
        covered = x[2 + i] + (pads[i] + pads[spatial + i] - dilations[i] * (kernel - 1) - 1)
        sizes.append(covered // strides[i] + 1)
    return [(x[0], w[0], *sizes)]


def _pool(s: Known, node: ir.Node) -> Shapes:
    """Pooling over whole axes, or over axes of known sizes; the others are left open."""
    x = s.dims(node.inputs[0])
    if x is None:
        return None
    if node.op_type.startswith("Global"):
        return [(*x[:2], *(ONE for _ in x[2:]))]
    padded = node.attributes.get("auto_pad")
    plain = integer(node, "ceil_mode", 0) == 0 and (padded is None or padded.as_string() in ("NOTSET", "VALID"))
    kernel, count = _ints(node, "kernel_shape", []), len(x) - 2
    strides, dilations = _ints(node, "strides", [1] * count), _ints(node, "dilations", [1] * count)
    pads = _ints(node, "pads", [0] * 2 * count)
    sizes = []
    for i, size in enumerate(x[2:]):
        covered = size + (pads[i] + pads[count + i] - dilations[i] * (kernel[i] - 1) - 1)
        sizes.append(covered // strides[i] + 1 if plain and size.constant is not None else Poly.unknown())
    return [(*x[:2], *sizes)] * len(node.outputs)


def _pad(s: Known, node: ir.Node) -> Shapes:
    dims, pads = s.dims(node.inputs[0]), s.numbers(input_at(node, 1))
    if dims is None or pads is None or input_at(node, 3) is not None or len(pads) != 2 * len(dims):
        return None
    return [tuple(dim + low + high for dim, low, high in zip(dims, pads, pads[len(dims) :]))]


def _resize(s: Known, node: ir.Node) -> Shapes:
    """Sizes that are written, or scales by whole numbers; the other axes are left open."""
    dims, sizes, scales = s.dims(node.inputs[0]), s.numbers(input_at(node, 3)), constant(input_at(node, 2))
    policy = node.attributes.get("keep_aspect_ratio_policy")
    if dims is None or (policy is not None and policy.as_string() != "stretch"):
        return None
    named, result = _ints(node, "axes", list(range(len(dims)))), list(dims)
    if sizes is None and (scales is None or scales.size != len(named)):
        return None
    for place, axis in enumerate(named):
        if sizes is not None:
            result[axis] = sizes[place]
        elif scales is not None and scales[place] != 1:
            scale, size = float(scales[place]), dims[axis].constant
            known = Poly.of(int(size * scale)) if size is not None else Poly.unknown()
            result[axis] = dims[axis] * int(scale) if scale.is_integer() else known
    return [tuple(result)]


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attr = node.attributes.get(name)
    return default if attr is None else list(attr.as_ints())


def _grid_sample(s: Known, node: ir.Node) -> Shapes:
    x, grid = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    return None if x is None or grid is None else [(*x[:2], *grid[1:-1])]


SPATIAL_RULES: dict[str, Rule] = {
    "Conv": _conv,
    "GridSample": _grid_sample,
    "Pad": _pad,
    "Resize": _resize,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool),
}
