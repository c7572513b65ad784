"""Calls of our kernel templates; each returns None where the target has none or the node does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from xopt.ir.schema import unread
from xopt.targets.formats import BFLOAT16, FLOAT32
from xopt.targets.integer_attention import Part
from xopt.targets.ops.bounds import check_indices, valid
from xopt.targets.ops.call import Call
from xopt.targets.ops.fusion import Layer, leading, linear, panels_of, static, tied_config
from xopt.targets.ops.linear import require_inner
from xopt.targets.symbolic import Array, Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


def _norm(call: Call) -> Value | None:
    from xopt.kernels import norm

    isa = call.lowering.target.isa()
    shape = call.shape()
    constants = [call.const(index) for index in range(1, 3) if call.has(index)]
    if isa is None or call.axis(-1, len(shape)) != len(shape) - 1 or str(call.x().ty.dtype) != "float32":
        return None
    if (
        unread(call.node)
        or not isinstance(shape[-1], int)
        or any(c is None or c.shape != (shape[-1],) for c in constants)
    ):
        return None
    formats = call.lowering.formats(call.node.outputs[0], shape[-1])
    workload = norm.Workload(
        rows=leading(shape[:-1]),
        width=shape[-1],
        epsilon=float(call.attr("epsilon", 1e-5)),
        rms=call.node.op_type == "RMSNormalization",
        bias=call.has(2),
        results=tuple(form.name for form in formats),
    )
    config = call.lowering.config(norm, workload)
    vectors = [
        call.lowering.packed(call.input(index), ("vector", isa.lanes), lambda v: norm.pack_vector(v, isa))
        for index in range(1, 3)
        if call.has(index)
    ]
    name = norm.name(workload, config, isa)
    inputs = [call.x(), *vectors, *call.lowering.quantization(formats)]
    return call.lowering.call_formats(name, lambda: norm.build(workload, config, isa), inputs, shape, formats)


def _softmax(call: Call) -> Value | None:
    from xopt.kernels import softmax

    isa, shape = call.lowering.target.isa(), call.shape()
    if isa is None or call.axis(-1, len(shape)) != len(shape) - 1 or str(call.x().ty.dtype) != "float32":
        return None
    workload = softmax.Workload(leading(shape[:-1]), static(shape)[-1])
    config = call.lowering.config(softmax, workload)
    name = softmax.name(workload, config, isa)
    return call.lowering.call(name, lambda: softmax.build(workload, config, isa), [call.x()], shape)


def _rotary(call: Call) -> Value | None:
    """Rotary embedding of the 3-D form; tables by position are read where they lie."""
    from xopt.kernels import rotary

    isa, shape = call.lowering.target.isa(), call.shape()
    heads = int(call.attr("num_heads", 0))
    if isa is None or len(shape) != 3 or not heads or not isinstance(shape[2], int):
        return None
    inputs = call.xs()
    given, table = call.shape(3) if call.has(3) else call.shape(1)[:2], call.shape(1)
    if str(inputs[0].ty.dtype) != "float32" or not call.dims.same_shape(given, shape[:2]):
        return None
    if call.has(3):
        check_indices(call, 3, [table[0]])
    head_dim = shape[2] // heads
    batch, sequence, positions = static([*shape[:2], table[0] if call.has(3) else 0])
    workload = rotary.Workload(
        batch=batch,
        sequence=sequence,
        heads=heads,
        head_dim=head_dim,
        rotary=int(call.attr("rotary_embedding_dim", 0)) or head_dim,
        interleaved=bool(call.attr("interleaved", 0)),
        positions=positions,
    )
    config = call.lowering.config(rotary, workload)
    name = rotary.name(workload, config, isa)
    return call.lowering.call(name, lambda: rotary.build(workload, config, isa), inputs, shape)


def _matmul(call: Call) -> Value | None:
    """Product of two activations with equal batch dimensions, or of one with a shared matrix."""
    from xopt.kernels import batch_matmul

    isa, left, right = call.lowering.target.isa(), call.shape(0), call.shape(1)
    shared = len(right) == 2
    if isa is None or len(left) < 2 or len(right) < 2 or any(str(x.ty.dtype) != "float32" for x in call.xs()):
        return None
    if not shared and not call.dims.same_shape(left[:-2], right[:-2]):
        return None
    require_inner(call, left[-1], right[-2])
    # One kernel serves every shape: it tiles at run time, and compiles too slowly to have one for each.
    workload = batch_matmul.Workload((None,) * (len(left) - 2), None, None, None, shared and len(left) > 2)
    config = call.lowering.config(batch_matmul, workload)
    name = batch_matmul.name(workload, config, isa)
    shape = [*left[:-1], right[-1]]
    return call.lowering.call(name, lambda: batch_matmul.build(workload, config, isa), call.xs(), shape)


def _attention(call: Call) -> Value | None:
    """Fused attention; operands that are columns of one projection (Split) are read where they lie."""
    from xopt.kernels import attention

    isa = call.lowering.target.isa()
    if isa is None or unread(call.node):
        return None
    call.pass_over("softmax_precision", "q_num_heads", "kv_num_heads")
    if call.attr("qk_matmul_output_mode", 0) not in range(4):
        return None
    form = _heads_first(call) if len(call.lowering.shape(_values(call)[0])) == 4 else _merged(call)
    mask = _mask(call)
    if form is None or mask is None:
        return None
    inputs, shape, described = form
    formats = call.lowering.formats(call.node.outputs[0], shape[-1])
    # One kernel serves all lengths at the speed of a special one, also where merging gives each layer its own.
    workload = attention.Workload(
        batch=None,
        queries=None,
        keys=None,
        scale=float(call.attr("scale", described["head_dim"] ** -0.5)),
        causal=bool(call.attr("is_causal", 0)),
        softcap=float(call.attr("softcap", 0.0)),
        results=tuple(result.name for result in formats),
        **described,
        **mask,
    )
    if call.has(3):
        inputs.append(call.x(3))
    inputs += call.lowering.quantization(formats)
    config = call.lowering.config(attention, workload)
    name = attention.name(workload, config, isa)
    return call.lowering.call_formats(name, lambda: attention.build(workload, config, isa), inputs, shape, formats)


Form = tuple[list[relax.Expr], list[Dim], dict[str, Any]]
"""Inputs of the attention kernel, shape of its output, and the part of the workload that they give."""


def _merged(call: Call) -> Form | None:
    """The 3-D form [B, S, heads * d]."""
    read = merged_operands(call)
    if read is None:
        return None
    inputs, described = read
    shape = call.lowering.shape(_values(call)[0])
    return inputs, [*shape[:2], described["heads"] * described["v_head_dim"]], described


def merged_operands(call: Call) -> tuple[list[relax.Expr], dict[str, Any]] | None:
    """Operands [..., heads * d] where they lie, and the part of the workload that describes them."""
    from xopt.kernels.attention import Operand

    heads, kv_heads = int(call.attr("q_num_heads")), int(call.attr("kv_num_heads"))
    integers, values = call.lowering.attentions.get(call.node), _values(call)
    q, k, v = (call.lowering.shape(value) for value in values)
    sources = [_columns_of(call, value) for value in values]
    if not all(isinstance(shape[-1], int) for shape in (q, k, v)):
        return None
    buffers: list[ir.Value] = []
    operands = {}
    for part, (source, offset) in zip("qkv", sources):
        if source not in buffers:
            buffers.append(source)
        operands[part] = Operand(buffers.index(source), int(call.lowering.shape(source)[-1]), offset)
    d, dv = q[-1] // heads, v[-1] // kv_heads
    if integers is not None:
        inputs, precision = _integers(call, buffers, integers), "int8"
        described = {"heads": heads, "kv_heads": kv_heads, "operands": precision, **operands}
        return inputs, {**described, "head_dim": d, "v_head_dim": dv}
    read = _operands(call, buffers, d, *(operand.width for operand in operands.values()))
    if read is None:
        return None
    inputs, precision = read
    described = {"heads": heads, "kv_heads": kv_heads, "operands": precision, **operands}
    return inputs, {**described, "head_dim": d, "v_head_dim": dv}


def _values(call: Call) -> list[ir.Value]:
    """Q, K and V: the inputs, or what was quantized to them where the kernel takes integers."""
    parts = call.lowering.attentions.get(call.node)
    return [call.input(index) for index in range(3)] if parts is None else [part.source for part in parts]


def _integers(call: Call, sources: Sequence[ir.Value], parts: Sequence[Part]) -> list[relax.Expr]:
    """The integer tensors that attention reads, and the grids of its heads."""
    from xopt.kernels.attention import grids

    lowering = call.lowering
    stored = [next(form for form in lowering.wanted[source] if any(form.columns)) for source in sources]
    tensors = [lowering.formatted(source, form) for source, form in zip(sources, stored)]
    return [*tensors, lowering.constant(grids(*(part.by_head for part in parts)), "grids")]


def _heads_first(call: Call) -> Form | None:
    """The 4-D form [B, heads, S, d]."""
    from xopt.kernels.attention import separate

    q, k, v = (call.shape(index) for index in range(3))
    if not all(isinstance(dim, int) for dim in (q[1], k[1], q[3], v[3])):
        return None
    read = _operands(call, [call.input(index) for index in range(3)], q[3], v[3])
    if read is None:
        return None
    inputs, precision = read
    sizes = {"heads": q[1], "kv_heads": k[1], "head_dim": q[3], "v_head_dim": v[3]}
    return inputs, [*q[:3], v[3]], {"heads_first": True, "operands": precision, **sizes, **separate(**sizes)}


def _operands(call: Call, sources: Sequence[ir.Value], *widths: int) -> tuple[list[relax.Expr], str] | None:
    """The tensors that attention reads, and their precision; None when they are no floats."""
    if not all(call.lowering.is_float32(source) for source in sources):
        return None
    low = call.lowering.target.precision == "bf16" and all(width % 2 == 0 for width in widths)
    form = BFLOAT16 if low else FLOAT32
    return [call.lowering.formatted(source, form) for source in sources], form.name


def _columns_of(call: Call, value: ir.Value) -> tuple[ir.Value, int]:
    """The tensor that ``value`` is a range of columns of, and the first column; else the value itself."""
    split = value.producer()
    if split is None or split.op_type != "Split" or split.inputs[0] is None:
        return value, 0
    source = split.inputs[0]
    part = Call(call.lowering, split)
    sizes = part.known(1)
    rank = len(part.shape())
    if part.axis(0, rank) != rank - 1 or sizes is None:
        return value, 0
    position = list(split.outputs).index(value)
    return source, int(sum(sizes[:position]))


def _mask(call: Call) -> dict[str, Any] | None:
    """The mask's kind and which of its dimensions broadcast; None when the kernel does not take it."""
    if not call.has(3):
        return {}
    kinds = {"bool": "bool", "float32": "float"}
    shape, kind = call.shape(3), kinds.get(str(call.x(3).ty.dtype))
    keys = call.lowering.shape(_values(call)[1])[-2]
    if kind is None or len(shape) != 4 or _is_shorter(call, shape[3], keys):
        return None
    return {"mask": kind, "mask_shape": tuple(dim if isinstance(dim, int) else None for dim in shape)}


def _is_shorter(call: Call, known: Dim, keys: Dim) -> bool:
    """Whether a mask ends before the keys do: those beyond are hidden, which kernels do not know."""
    if isinstance(known, int):
        return not call.dims.equal(known, keys) if known == 1 else isinstance(keys, int) and known != keys
    return call.dims.proves(known < keys)


def _patches(call: Call) -> Value | None:
    """Convolution whose stride is its kernel, as a linear layer over the patches.

    The layer's rows are kept: the transpose to tokens first, which follows in vision transformers, is then free.
    """
    isa = call.lowering.target.isa()
    call.pass_over("kernel_shape")
    shape, weight = call.shape(0), call.const(1)
    if isa is None or weight is None or weight.dtype != np.float32 or not _is_patches(call, shape, weight):
        return None
    batch, channels = shape[0], weight.shape[1]
    sizes = weight.shape[2:]
    rank = len(sizes)
    grid = [shape[2 + axis] // size for axis, size in enumerate(sizes)]
    split = [batch, channels, *(extent for pair in zip(grid, sizes) for extent in pair)]
    # [batch, channels, grid and kernel axes in turn] -> [batch, grid axes, channels, kernel axes]
    order = [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)]
    patches = call.emit(relax.op.permute_dims(call.lowering.reshape(call.x(), split), order))
    tokens, width = math.prod(grid), math.prod(weight.shape[1:])
    rows = call.lowering.reshape(patches, [batch, tokens, width])
    result = linear(call.lowering, rows, Layer(call.input(1), call.input(2) if call.has(2) else None, patches=True))
    columns = call.emit(relax.op.permute_dims(result, [0, 2, 1]))
    call.lowering.tokens_first[columns] = result
    return call.lowering.reshape(columns, [batch, weight.shape[0], *grid])


def _is_patches(call: Call, shape: list[Dim], weight: Array) -> bool:
    sizes = list(weight.shape[2:])
    rank = len(sizes)
    return (
        list(call.attr("strides", [1] * rank)) == sizes
        and list(call.attr("dilations", [1] * rank)) == [1] * rank
        and int(call.attr("group", 1)) == 1
        and call.attr("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and not any(call.attr("pads", ()))
        and all(isinstance(dim, int) and dim % size == 0 for dim, size in zip(shape[2:], sizes))
    )


def _tied_embedding(call: Call) -> Value | None:
    """Rows of a table that is stored once, as the packed matrix of a linear layer, whose columns they are."""
    from xopt.kernels import gemm

    isa, matrix = call.lowering.target.isa(), call.lowering.tied.get(call.input(0))
    if isa is None or matrix is None:
        return None
    vocabulary, width = call.shape()
    check_indices(call, 1, [vocabulary])
    config = tied_config(call.lowering, matrix)
    packed = call.lowering.packed(
        matrix, panels_of("float32", config, isa), lambda array: gemm.pack_weight(array, config, isa)
    )
    panel, lanes = config.panel(isa), isa.lanes

    def element(data: Any, where: Any, *index: Any) -> Any:
        row = valid(where(*index[:-1]), vocabulary)
        return data(row // panel, index[-1], row % panel // lanes, row % lanes)

    return call.lowering.compute("tied_embedding", [*call.shape(1), width], element, packed, call.x(1))


def _merge_tokens(call: Call) -> list[Value]:
    """Token merging; its body is not inlined where this is used, so it takes everything that the operator means."""
    from xopt.kernels import merge_tokens

    isa = call.lowering.target.isa()
    assert isa is not None
    (batch, tokens, width), metric = call.shape(0), call.shape(1)
    r = int(call.attr("r")[0])
    if isinstance(tokens, int) and not 0 <= r <= (tokens + 1) // 2:
        raise call.unsupported(f"{r} of {tokens} tokens cannot be merged: only every second one is given away")
    call.require(r * 2 <= tokens + 1, f"{r} tokens cannot be merged of fewer than {2 * r - 1}")
    # One kernel serves every layer: token counts are read at run time.
    sizes = dict(zip(("width", "metric"), static([width, metric[-1]])))
    protected = int(call.attr("protected", 0))
    workload = merge_tokens.Workload(batch=None, tokens=None, kept=None, **sizes, protected=protected)
    config = call.lowering.config(merge_tokens, workload)
    name = merge_tokens.name(workload, config, isa)
    kept = tokens - r
    shapes = [[batch, kept, width], [batch, kept, 1]]
    return call.lowering.call_for_all(name, lambda: merge_tokens.build(workload, config, isa), call.xs(), shapes)


KERNELS: dict[tuple[str, str], Callable[[Call], Value | None]] = {
    ("", "LayerNormalization"): _norm,
    ("", "RMSNormalization"): _norm,
    ("", "Attention"): _attention,
    ("", "Softmax"): _softmax,
    ("", "RotaryEmbedding"): _rotary,
    ("", "MatMul"): _matmul,
    ("", "Conv"): _patches,
    ("", "Gather"): _tied_embedding,
    ("xopt", "MergeTokens"): _merge_tokens,
}
"""Emitters by (domain, operator type)."""
