"""What passes ask of a model before they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xopt.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.base import Pass


def require_attention(model: ir.Model, one: Pass) -> None:
    """Refuse a model in which no attention is found; InputError E-NO-ATTENTION."""
    if not any(node.op_type == "Attention" for node in model.graph.all_nodes()):
        raise InputError(
            "E-NO-ATTENTION",
            "no attention is found in the model",
            where=f"pass {one.name}",
            cure="leave the pass out, or see xopt inspect",
        )
