"""``MatMulNBits``: a weight of few bits, with a scale and a zero point for each block of its columns.

    y = x @ W        W [K, N] from B uint8 [N, blocks, bytes of a block]: numbers of ``bits`` bits, the low ones first
The standard operator for such a weight is DequantizeLinear with a block size. Numbers of 4 bits stay so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.site import Attributes, Site

Array = npt.NDArray[Any]


def _matmul(site: Site) -> Results:
    site.pass_over("accuracy_level")
    site.only(weight_prepacked=0)
    x, scales = site.value("A"), site.value("scales")
    rows, columns, block = (int(site.attr(name)) for name in ("K", "N", "block_size"))
    bits = int(site.attr("bits"))
    if bits not in (2, 4, 8) or block < 16 or rows < 1 or columns < 1:
        raise site.refused(f"{bits} bits in blocks of {block} of a matrix [{rows}, {columns}]")
    blocks = -(-rows // block)
    packed = site.constant(site.value("B"), "B")
    if packed.dtype != np.uint8 or packed.size != columns * blocks * block * bits // 8:
        raise site.refused(f"its weight has {packed.size} bytes")
    integers = unpacked(packed.reshape(columns, -1), bits)[:, :rows].T
    scale = _shaped(site, site.constant(scales, "scales"), (columns, blocks)).T
    zeros = _zeros(site, bits, columns, blocks)
    groups = site.given("g_idx")
    if groups is not None and bits == 2:
        raise site.refused("onnxruntime reads g_idx with numbers of 2 bits in a way of its own")
    weight = (
        _in_blocks(site, integers, scale, zeros, bits, block)
        if groups is None and zeros.dtype == np.uint8
        else _as_numbers(site, integers, scale, zeros, _group_of(site, groups, rows, block, blocks))
    )
    return [site.plus(site.op("MatMul", x, weight), site.given("bias"))]


def unpacked(packed: Array, bits: int) -> Array:
    """Numbers of few bits out of bytes along the last axis, the low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8).reshape(*packed.shape[:-1], -1)


def _shaped(site: Site, array: Array, shape: tuple[int, int]) -> Array:
    if array.size != shape[0] * shape[1]:
        raise site.refused(f"{array.size} scales or zero points for {shape[0]} columns of {shape[1]} blocks")
    return array.reshape(shape)


def _zeros(site: Site, bits: int, columns: int, blocks: int) -> Array:
    """Zero points [blocks, N]: packed like the weight, or numbers in the type of the scales."""
    given = site.given("zero_points")
    if given is None:
        return np.full((blocks, columns), 1 << (bits - 1), np.uint8)
    array = site.constant(given, "zero_points")
    if array.dtype == np.uint8:
        width = -(-blocks * bits // 8)
        return unpacked(_shaped(site, array, (columns, width)), bits)[:, :blocks].T
    return _shaped(site, array, (columns, blocks)).T


def _in_blocks(site: Site, integers: Array, scale: Array, zeros: Array, bits: int, block: int) -> ir.Value:
    """The weight [K, N] as a DequantizeLinear of integers."""
    operands = [site.array(stem, stored(array, bits)) for stem, array in (("weight", integers), ("zero_points", zeros))]
    scales = site.array("scales", np.ascontiguousarray(scale))
    inputs = (operands[0], scales, operands[1])
    form: Attributes = {"dtype": scales.dtype, "shape": integers.shape}
    return site.op("DequantizeLinear", *inputs, axis=0, block_size=block, **form)


def stored(array: Array, bits: int) -> ir.TensorProtocol:
    """Numbers in the type that ONNX has for as many bits, or in their own."""
    if bits != 4:
        return ir.tensor(np.ascontiguousarray(array))
    return ir.Tensor(np.ascontiguousarray(array).astype(ir.DataType.UINT4.numpy()), dtype=ir.DataType.UINT4)


def _group_of(site: Site, groups: ir.Value | None, rows: int, block: int, blocks: int) -> Array:
    """The block of each row of the weight."""
    if groups is None:
        return np.arange(rows) // block
    array = site.constant(groups, "g_idx").reshape(-1)
    if array.size < rows or np.any(array[:rows] < 0) or np.any(array[:rows] >= blocks):
        raise site.refused(f"g_idx names blocks that are not among its {blocks}")
    return array[:rows]


def _as_numbers(site: Site, integers: Array, scale: Array, zeros: Array, group: Array) -> ir.Value:
    """The weight [K, N] as numbers: ONNX has no zero points between integers, and no blocks in another order."""
    wide = (integers.astype(np.float32) - zeros[group].astype(np.float32)) * scale[group].astype(np.float32)
    return site.array("weight", wide.astype(scale.dtype))


def _gather(site: Site) -> Results:
    """Rows of a table whose numbers are scaled in blocks."""
    data, scales, given = site.value("data"), site.value("scales"), site.given("zero_points")
    rank, block = site.rank(data), int(site.attr("block_size"))
    axis, rows = int(site.attr("quantize_axis")) % rank, int(site.attr("gather_axis")) % rank
    zeros, extent = given, site.size(scales, axis)
    if block < 1 or site.rank(scales) != rank:
        raise site.refused(f"scales of rank {site.rank(scales)} in blocks of {block}")
    if site.dtype(data) == ir.DataType.UINT8:
        data, zeros = _bytes(site, data, scales, given, axis)
    elif site.dtype(data) not in (ir.DataType.INT4, ir.DataType.UINT4):
        raise site.refused(f"its table is of {site.dtype(data).name.lower()}")
    else:
        site.pass_over("bits")
    if extent != -(-site.size(data, axis) // block):
        raise site.refused(f"{extent} scales for {site.size(data, axis)} numbers in blocks of {block}")
    form: Attributes = {"dtype": scales.dtype, "shape": data.shape}
    table = site.op("DequantizeLinear", data, scales, zeros, axis=axis, block_size=block, **form)
    return [site.op("Gather", table, site.value("indices"), axis=rows)]


def _bytes(
    site: Site, data: ir.Value, scales: ir.Value, given: ir.Value | None, axis: int
) -> tuple[ir.Value, ir.Value]:
    """Numbers that are packed along the last axis, and their zero points: the middle where none are given."""
    bits, rank = int(site.attr("bits")), site.rank(data)
    if bits not in (2, 4, 8) or (bits < 8 and axis != rank - 1):
        raise site.refused(f"{bits} bits in blocks along axis {axis} of {rank}")
    packed, shape = site.constant(data, "data"), site.constant(scales, "scales").shape
    zeros = np.full(shape, 1 << (bits - 1), np.uint8)
    if given is not None:
        zeros = unpacked(site.constant(given, "zero_points"), bits)[..., : shape[-1]].reshape(shape)
    return site.array("table", stored(unpacked(packed, bits), bits)), site.array("zero_points", stored(zeros, bits))


_FP4 = np.asarray([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
_LEVELS = {0: np.concatenate([_FP4, -_FP4]), 1: np.asarray(_NF4, np.float32)}
"""What 4 bits stand for, in parts of the largest number of a block: bitsandbytes' FP4 (0) and NF4 (1)."""


def _of_levels(site: Site) -> Results:
    """A weight [N,K] whose numbers are places in a table, the high bits first, scaled in blocks of the flat matrix."""
    site.only(training_mode=0)
    rows, columns, block, kind = (int(site.attr(name)) for name in ("N", "K", "block_size", "quant_type"))
    if kind not in _LEVELS or block < 1 or rows < 1 or columns < 1:
        raise site.refused(f"quant_type {kind} in blocks of {block} of a matrix [{rows}, {columns}]")
    packed, most = site.constant(site.value("B"), "B").reshape(-1), site.constant(site.value("absmax"), "absmax")
    size = rows * columns
    if packed.size != -(-size // 2) or most.size != -(-size // block) or packed.dtype != np.uint8:
        raise site.refused(f"its weight has {packed.size} bytes and {most.size} scales")
    places = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:size]
    scale = most.reshape(-1).astype(np.float32)[np.arange(size) // block]
    weight = (_LEVELS[kind][places] * scale).reshape(rows, columns).astype(most.dtype)
    matrix = site.array("weight", np.ascontiguousarray(weight.T) if site.attr("transB") else weight)
    return [site.op("MatMul", site.value("A"), matrix)]


RULES = {"GatherBlockQuantized": _gather, "MatMulBnb4": _of_levels, "MatMulNBits": _matmul}
