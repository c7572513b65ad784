"""Batches without padding: calls of the kernels that pack tokens, unpack them, and attend over packed sequences.

The number of tokens that a mask shows is known only when the model runs: it becomes a dimension of what is packed. What
a mask says about the layout is computed once, however many nodes use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from tvm import relax, tirx

from xopt.targets.ops.call import Call
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Emitting, Value


@dataclass(frozen=True)
class Layout:
    """Where the tokens that a mask shows lie: see `xopt.kernels.padding`.

    Attributes:
        starts, place: tensors of that kernel.
        tokens: their number.
        padded: batch and length of the padded batch.
    """

    starts: relax.Var
    place: relax.Var
    tokens: tirx.Var
    padded: tuple[Dim, Dim]


def _layout(call: Call, mask: ir.Value) -> Layout:
    lowering = call.lowering
    if mask not in lowering.layouts:
        batch, length = lowering.shape(mask)
        dims = lowering.dims
        shapes: list[list[Dim]] = [[dims.simplify(batch + 2)], [dims.product([batch, length])], [1]]
        name, build = _kernel(lowering, "layout")
        starts, place, total = lowering.call_for_all(name, build, [lowering.tensor(mask)], shapes, ["int64"] * 3)
        tokens = lowering.dims.unnamed("tokens")
        shape = lowering.emit(relax.op.tensor_to_shape(total))
        lowering.builder.match_cast(shape, relax.ShapeType([tokens]))
        lowering.layouts[mask] = Layout(starts, place, tokens, (batch, length))
    return lowering.layouts[mask]


def _kernel(lowering: Emitting, step: str, width: int = 0) -> tuple[str, Callable[[], tirx.PrimFunc]]:
    from xopt.kernels import padding

    isa = lowering.target.isa()
    assert isa is not None
    workload = padding.Workload(step, width)
    config = lowering.config(padding, workload)
    return padding.name(workload, config, isa), lambda: padding.build(workload, config, isa)


def _pack(call: Call) -> Value:
    layout, width = _layout(call, call.input(1)), int(call.shape(0)[-1])
    name, build = _kernel(call.lowering, "pack", width)
    return call.lowering.call(name, build, [call.x(0), layout.place], [layout.tokens, width])


def _unpack(call: Call) -> Value:
    layout, width = _layout(call, call.input(1)), int(call.shape(0)[-1])
    name, build = _kernel(call.lowering, "unpack", width)
    return call.lowering.call(name, build, [call.x(0), layout.place], [*layout.padded, width])


def _attention(call: Call) -> Value:
    from xopt.kernels import attention
    from xopt.targets.ops.templates import merged_operands

    isa = call.lowering.target.isa()
    assert isa is not None
    read = merged_operands(call)
    if read is None:
        raise call.unsupported("its operands are no float32 tensors of known width")
    inputs, described = read
    layout = _layout(call, call.input(3))
    width = described["heads"] * described["v_head_dim"]
    formats = call.lowering.formats(call.node.outputs[0], width)
    workload = attention.Workload(
        batch=None,
        queries=None,
        keys=None,
        scale=float(call.attr("scale")),
        causal=bool(call.attr("is_causal", 0)),
        packed=True,
        results=tuple(result.name for result in formats),
        **described,
    )
    config = call.lowering.config(attention, workload)
    name = attention.name(workload, config, isa)
    inputs = [*inputs, layout.starts, *call.lowering.quantization(formats)]
    return call.lowering.call_formats(
        name, lambda: attention.build(workload, config, isa), inputs, [layout.tokens, width], formats
    )


KERNELS: dict[tuple[str, str], Callable[[Call], Value | None]] = {
    ("xopt", "PackTokens"): _pack,
    ("xopt", "UnpackTokens"): _unpack,
    ("xopt", "PackedAttention"): _attention,
}
"""Emitters by (domain, operator type)."""
