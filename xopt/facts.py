"""What is in a model: size, work, transformer blocks, and how two models differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from xopt.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.data.dataset import Dataset
    from xopt.ir.canonical import Refused


def checked_dims(model: ir.Model, dims: Mapping[str, int]) -> Mapping[str, int]:
    """``dims``, when each names a symbolic axis of the model; InputError E-OPTION otherwise."""
    from xopt.ir.shapes import symbolic_dims

    known = symbolic_dims(model)
    for name in dims:
        if name not in known:
            cure = f"it has {', '.join(known)}" if known else "all its axes are fixed"
            raise InputError("E-OPTION", f"the model has no symbolic axis {name!r}", where="--dim", cure=cure)
    return dims


def describe(model: ir.Model, dims: Mapping[str, int], refused: Iterable[Refused] = ()) -> dict[str, Any]:
    """The facts of a canonical model: the JSON of ``xopt inspect`` (docs/cli-json.md).

    Symbolic axes that ``dims`` leaves out are taken as one sample, and as 128 otherwise. ``refused`` is what
    canonicalizing the model left alone.
    """
    from xopt.ir.batch import batch_axes
    from xopt.ir.cost import cost
    from xopt.ir.structure import transformer_blocks

    price = cost(model, checked_dims(model, dims))
    return {
        "parameters": int(price.parameters),
        "bytes": int(price.bytes),
        "macs": int(price.macs),
        "blocks": [_block(block) for block in transformer_blocks(model)],
        "left_out": left_out(model, refused),
        "dims": dict(price.dims),
        "batch": batch_axes(model).size,
        "opset": model.opset_imports.get("", 0),
        "inputs": [_value(value) for value in model.graph.inputs if value.name not in model.graph.initializers],
        "outputs": [_value(value) for value in model.graph.outputs],
        "ops": dict(sorted(op_counts(model).items())),
    }


def left_out(model: ir.Model, refused: Iterable[Refused]) -> list[dict[str, str]]:
    """What looks like an attention, a rotary embedding or a feed-forward network but is in no block, and why; and
    what mixes tokens in other ways.

    Args:
        model: canonical.
        refused: of :class:`xopt.ir.canonical.CanonicalizeReport`.
    """
    from xopt.ir.mixers import mixers, nested_attention
    from xopt.ir.stacks import stacked
    from xopt.ir.structure import explain

    found = [(one.what, one.node, one.reason) for one in refused if one.what in ("attention", "rotary")]
    for item in explain(model):
        what = "attention" if item.node.op_type == "Attention" else "feed-forward"
        found.append((what, item.node.name or "?", item.reason))
    found += [("feed-forward", item.node.name or "?", item.reason) for item in stacked(model)]
    found += [("attention", item.node.name or "?", item.reason) for item in nested_attention(model)]
    found += [("token mixer", item.node.name or "?", item.reason) for item in mixers(model)]
    return [{"what": what, "node": node, "reason": reason} for what, node, reason in dict.fromkeys(found)]


def op_counts(model: ir.Model) -> Counter[str]:
    """How often each operator occurs, with its domain where it is not ONNX's own."""
    return Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        for node in model.graph.all_nodes()
    )


def differences(a: ir.Model, b: ir.Model, data: Dataset, dims: Mapping[str, int]) -> dict[str, Any]:
    """How canonical model ``b`` differs from ``a``: the JSON of ``xopt diff``.

    The numbers of ``outputs`` come from running both on the data.
    """
    from xopt.ir.cost import cost
    from xopt.pipeline.verify import attends, compare, outputs_of

    prices = [cost(model, dims) for model in (a, b)]
    counts = [op_counts(model) for model in (a, b)]
    changes = compare(outputs_of(a, data, len(data)), outputs_of(b, data, len(data)), attends=attends(a))
    return {
        "parameters": [int(price.parameters) for price in prices],
        "bytes": [int(price.bytes) for price in prices],
        "macs": [int(price.macs) for price in prices],
        "ops": {op: [count[op] for count in counts] for op in sorted(counts[0] | counts[1])},
        "outputs": {
            name: {"max_abs": c.largest, "scale": c.scale, "cosine": c.cosine, "mismatch": c.mismatch or None}
            for name, c in changes.items()
        },
        "samples": len(data),
        "data": data.name,
    }


def _block(block: Any) -> dict[str, Any]:
    site, ffn = block.attention, block.ffn
    return {
        "attention": None
        if site is None
        else {
            "heads": site.heads,
            "kv_heads": site.kv_heads,
            "head_dim": site.head_dim,
            "causal": bool(site.causal),
        },
        "ffn": None if ffn is None else {"width": ffn.width, "gated": bool(ffn.gated)},
    }


def _value(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return {"name": value.name, "dtype": str(value.dtype.numpy()) if value.dtype is not None else None, "shape": shape}
