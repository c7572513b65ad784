"""Operators on quantized tensors: dequantized, the standard operator, quantized again.

A product whose activation is quantized as it comes stays one of integers.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.attention import of_projection
from xopt.ir.canonical.contrib.norms import embedded
from xopt.ir.canonical.contrib.products import channels_last, channels_second, conv_attributes
from xopt.ir.canonical.contrib.site import Attributes, Site


def real(site: Site, name: str, scale: str, zero: str, axis: int = -1) -> ir.Value:
    """A quantized input as real numbers, by its scale and zero point: one each, or a vector along an axis."""
    return dequantized(site, site.value(name), site.value(scale), site.given(zero), axis)


def dequantized(site: Site, x: ir.Value, scale: ir.Value, zero: ir.Value | None, axis: int = -1) -> ir.Value:
    """Quantized numbers as real ones; a vector of scales belongs to an axis."""
    if _per_tensor(site, scale):
        return site.op("DequantizeLinear", x, _single(site, scale), _single(site, zero), dtype=scale.dtype)
    if site.rank(scale) != 1:
        raise site.refused(f"scales of rank {site.rank(scale)}")
    return site.op("DequantizeLinear", x, scale, zero, axis=axis % site.rank(x), dtype=scale.dtype)


def _per_tensor(site: Site, scale: ir.Value) -> bool:
    return all(dim.constant == 1 for dim in site.dims(scale))


def _single(site: Site, value: ir.Value | None) -> ir.Value | None:
    """A tensor of one number as a scalar."""
    return value if value is None or not site.rank(value) else site.op("Reshape", value, site.ints())


def quantized(site: Site, x: ir.Value, scale: str, zero: str, like: ir.Value) -> ir.Value:
    """Real numbers in the type of ``like``, by an output's scale and zero point, which may be absent: 0 then."""
    given = _single(site, site.given(zero))
    if given is None:
        given = site.number(0, like)
    return site.op("QuantizeLinear", x, _single(site, site.value(scale)), given, dtype=given.dtype)


def _elementwise(op_type: str) -> Any:
    def rule(site: Site) -> Results:
        operands = [real(site, name, f"{name}_scale", f"{name}_zero_point") for name in "AB"]
        return [quantized(site, site.op(op_type, *operands), "C_scale", "C_zero_point", site.value("A"))]

    return rule


def _sigmoid(site: Site) -> Results:
    x = real(site, "X", "X_scale", "X_zero_point")
    return [quantized(site, site.op("Sigmoid", x), "Y_scale", "Y_zero_point", site.value("X"))]


def _leaky_relu(site: Site) -> Results:
    x = real(site, "X", "X_scale", "X_zero_point")
    result = site.op("LeakyRelu", x, alpha=float(site.attr("alpha")))
    return [quantized(site, result, "Y_scale", "Y_zero_point", site.value("X"))]


def _softmax(site: Site) -> Results:
    """Before opset 13, all axes from the given one on were one."""
    x = real(site, "X", "X_scale", "x_zero_point")
    axis, rank = int(site.attr("axis")), site.rank(x)
    if not -rank <= axis < rank:
        raise site.refused(f"axis {axis} is not one of its {rank}")
    if int(site.attr("opset")) >= 13 or axis % rank == rank - 1:
        result = site.op("Softmax", x, axis=axis)
    else:
        rows = site.op("Softmax", site.op("Flatten", x, axis=axis % rank), axis=-1)
        result = site.op("Reshape", rows, site.op("Shape", x))
    return [quantized(site, result, "y_scale", "y_zero_point", site.value("X"))]


def _concat(site: Site) -> Results:
    given = site.variadic("inputs")
    if len(given) % 3:
        raise site.refused("its inputs are not tensors with a scale and a zero point each")
    parts = [
        given[place]
        if site.dtype(given[place]) == ir.DataType.FLOAT
        else dequantized(site, given[place], given[place + 1], given[place + 2])
        for place in range(0, len(given), 3)
    ]
    joined = site.op("Concat", *parts, axis=int(site.attr("axis")))
    return [quantized(site, joined, "Y_scale", "Y_zero_point", site.value("Y_zero_point"))]


def _where(site: Site) -> Results:
    x, y = (real(site, name.upper(), f"{name}_scale", f"{name}_zero_point") for name in "xy")
    chosen = site.op("Where", site.value("condition"), x, y)
    return [quantized(site, chosen, "z_scale", "z_zero_point", site.value("X"))]


def _average_pool(site: Site) -> Results:
    kept = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
    attributes = {name: site.attr(name) for name in kept if site.attr(name) is not None}
    return [_pooled(site, "AveragePool", attributes)]


def _global_average_pool(site: Site) -> Results:
    return [_pooled(site, "GlobalAveragePool", {})]


def _pooled(site: Site, op_type: str, attributes: dict[str, Any]) -> ir.Value:
    x = real(site, "X", "x_scale", "x_zero_point")
    rank, last = site.rank(x), bool(site.attr("channels_last"))
    pooled = site.op(op_type, channels_second(site, x, rank) if last else x, **attributes)
    pooled = channels_last(site, pooled, rank) if last else pooled
    return quantized(site, pooled, "y_scale", "y_zero_point", site.value("X"))


def _max_pool(site: Site) -> Results:
    """Maxima need no scale."""
    x, rank = site.value("x"), site.rank(site.value("x"))
    kept = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    attributes = {name: site.attr(name) for name in kept if site.attr(name) is not None}
    return [channels_last(site, site.op("MaxPool", channels_second(site, x, rank), **attributes), rank)]


def _reduce_mean(site: Site) -> Results:
    x = real(site, "data", "data_scale", "data_zero_point")
    mean = site.op("ReduceMean", x, site.ints(*site.attr("axes")), keepdims=int(site.attr("keepdims")))
    return [quantized(site, mean, "reduced_scale", "reduced_zero_point", site.value("data"))]


def _conv(site: Site) -> Results:
    """The standard operator, between transposes where the channels are the last axis."""
    x, rank, last = site.value("x"), site.rank(site.value("x")), bool(site.attr("channels_last"))
    names = ("x_scale", "x_zero_point", "w", "w_scale", "w_zero_point", "y_scale", "y_zero_point")
    inputs = [channels_second(site, x, rank) if last else x, *map(site.value, names), site.given("B")]
    result = site.op("QLinearConv", *inputs, **conv_attributes(site))
    return [channels_last(site, result, rank) if last else result]


def _gemm(site: Site) -> Results:
    """A product of matrices, plus integers in the unit of the product; real numbers where no scale is given."""
    alpha, columns = float(site.attr("alpha")), 0 if site.attr("transB") else 1
    a = real(site, "A", "a_scale", "a_zero_point")
    b = real(site, "B", "b_scale", "b_zero_point", columns)
    turned: Attributes = {name: int(site.attr(name)) for name in ("transA", "transB")}
    result = site.op("Gemm", a, b, alpha=alpha, **turned)
    if (bias := site.given("C")) is not None:
        unit = site.op("Mul", _row(site, site.value("a_scale")), _row(site, site.value("b_scale")))
        unit = site.op("Mul", unit, site.number(alpha, unit))
        result = site.op("Add", result, site.op("Mul", site.cast(bias, site.dtype(unit)), unit))
    if site.given("y_scale") is None:
        return [result]
    return [quantized(site, result, "y_scale", "y_zero_point", site.value("A"))]


def _row(site: Site, scale: ir.Value) -> ir.Value:
    return site.op("Reshape", scale, site.ints(-1))


def _quantize(site: Site) -> Results:
    axis, scale, zero = _axis(site, "y_scale"), site.value("y_scale"), site.given("y_zero_point")
    attributes: Attributes = {} if axis is None else {"axis": axis}
    if axis is None:
        scale, zero = _scalar(site, scale), _single(site, zero)
    dtype = zero.dtype if zero is not None else ir.DataType.UINT8
    return [site.op("QuantizeLinear", site.value("x"), scale, zero, dtype=dtype, **attributes)]


def _dequantize(site: Site) -> Results:
    return [real(site, "x", "x_scale", "x_zero_point", _axis(site, "x_scale") or 0)]


def _axis(site: Site, scale: str) -> int | None:
    """The axis that a vector of scales belongs to; None for one scale."""
    axis, value = site.attr("axis"), site.value(scale)
    if _per_tensor(site, value):
        return None
    if axis is None or site.rank(value) != 1:
        raise site.refused("its scales are neither one number nor a vector along a given axis")
    return int(axis)


def _scalar(site: Site, value: ir.Value) -> ir.Value:
    single = _single(site, value)
    assert single is not None
    return single


def _dynamic_matmul(site: Site) -> Results:
    """The activation gets a scale and a zero point of its own in each run."""
    return [_integer_product(site, *site.several("DynamicQuantizeLinear", 3, site.value("A")))]


def _matmul_to_float(site: Site) -> Results:
    return [_integer_product(site, site.value("A"), site.value("a_scale"), site.given("a_zero_point"))]


def _integer_product(site: Site, a: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
    """``a`` times B in integers, in the unit of both scales, plus a bias."""
    b_scale, b_zero = site.value("b_scale"), site.given("b_zero_point")
    product = site.op("MatMulInteger", a, site.value("B"), _single(site, zero), _row_or_single(site, b_zero))
    unit = site.op("Mul", scale, b_scale)
    return site.plus(site.op("Mul", site.cast(product, site.dtype(unit)), unit), site.given("bias"))


def _row_or_single(site: Site, zero: ir.Value | None) -> ir.Value | None:
    if zero is None or any(dim.constant != 1 for dim in site.dims(zero)):
        return zero
    return _single(site, zero)


def _attention(site: Site) -> Results:
    x = real(site, "input", "input_scale", "input_zero_point")
    w = real(site, "weight", "weight_scale", "weight_zero_point", 1)
    projected = site.plus(site.op("MatMul", x, w), site.value("bias"))
    return of_projection(site, projected, site.size(w, -1), None)


def _embed_layer_norm(site: Site) -> Results:
    tables = {
        name: _table(site, name, given)
        for name, given in (
            ("word_embedding", "word_embedding_quant"), ("position_embedding", "position_embedding_quant"),
            ("segment_embedding", "segment_embedding"), ("gamma", "gamma_quant"), ("beta", "beta_quant"),
        )
    }  # fmt: skip
    return embedded(site, tables)[:2]


def _table(site: Site, name: str, given: str) -> ir.Value | None:
    x = site.given(given)
    if x is None:
        site.pass_over(f"{name}_scale", f"{name}_zero_point")
        return None
    return dequantized(site, x, site.value(f"{name}_scale"), site.given(f"{name}_zero_point"))


def _wide_product(site: Site) -> Results:
    return [site.op("MatMul", *(site.cast(site.value(name), ir.DataType.INT32) for name in "AB"))]


def _integer_multiplication(site: Site) -> Results:
    return [site.op("Mul", *(_above_zero(site, name) for name in "AB"))]


def _wide_sum(site: Site) -> Results:
    data = site.cast(site.value("data"), ir.DataType.INT32)
    return [site.op("ReduceSum", data, site.ints(*site.attr("axes")), keepdims=int(site.attr("keepdims")))]


def _above_zero(site: Site, name: str) -> ir.Value:
    """An operand int32, without its zero point."""
    x, zero = site.cast(site.value(name), ir.DataType.INT32), site.given(f"{name}_zero_point")
    return x if zero is None else site.op("Sub", x, site.cast(zero, ir.DataType.INT32))


RULES = {
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulInteger16": _wide_product,
    "MatMulIntegerToFloat": _matmul_to_float,
    "MulInteger": _integer_multiplication,
    "NhwcMaxPool": _max_pool,
    "QAttention": _attention,
    "QEmbedLayerNormalization": _embed_layer_norm,
    "QGemm": _gemm,
    "QLinearAdd": _elementwise("Add"),
    "QLinearAveragePool": _average_pool,
    "QLinearConcat": _concat,
    "QLinearConv": _conv,
    "QLinearGlobalAveragePool": _global_average_pool,
    "QLinearLeakyRelu": _leaky_relu,
    "QLinearMul": _elementwise("Mul"),
    "QLinearReduceMean": _reduce_mean,
    "QLinearSigmoid": _sigmoid,
    "QLinearSoftmax": _softmax,
    "QLinearWhere": _where,
    "QuantizeLinear": _quantize,
    "ReduceSumInteger": _wide_sum,
}
