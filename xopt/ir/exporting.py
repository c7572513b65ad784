"""The graph for runtimes that know plain ONNX only: what they lack is written out in primitive ops.

``Attention``, ``RotaryEmbedding``, ``RMSNormalization`` and ``Swish`` are expanded into forms that onnxruntime and
OpenVINO run fast: keys are transposed once, masks that layers share are computed once, grouped queries broadcast
instead of repeating keys. xopt's own ops keep their function bodies in the file, or are inlined.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, NameFixPass

from xopt.ir.canonical.opset import NEWEST_IR
from xopt.ir.contrib import give_back
from xopt.ir.edit import remove_dead
from xopt.ir.expand import Expander
from xopt.ir.shapes import infer_shapes
from xopt.ir.tied import tied_tables


def export(model: ir.Model, *, inline: bool = False) -> ir.Model:
    """New model with the meaning of ``model`` in ops that common runtimes have; weights are shared.

    Args:
        model: in canonical form (other models pass through where they use nothing unusual).
        inline: put the bodies of xopt's ops into the graph, for runtimes without model-local functions.

    Raises:
        InputError: ``E-UNSUPPORTED-OP``: an ``Attention`` that has no function body, or one whose scale is neither
            written nor known from its shapes.
    """
    plain = model.clone()
    plain.ir_version = min(plain.ir_version, NEWEST_IR)  # runtimes refuse a file format newer than they are
    if inline:
        InlinePass()(plain)
    infer_shapes(plain)
    Expander(plain.graph).run()
    for function in plain.functions.values():
        Expander(function).run()
    _store_tied_once(plain.graph)
    remove_dead(plain)
    NameFixPass()(plain)
    infer_shapes(plain, names=False)
    give_back(plain)
    return plain


def _store_tied_once(graph: ir.Graph) -> None:
    """MatMul(x, T') -> MatMul(x, Transpose(T)) where T is stored as a table; runtimes turn it when they load it."""
    for table, matrix in tied_tables(graph).items():
        turned = ir.node("Transpose", [table], attributes={"perm": [1, 0]}, name=f"{matrix.name}_turned")
        turned.outputs[0].name = f"{matrix.name}_turned"
        turned.outputs[0].shape = matrix.shape
        if matrix.dtype is not None:
            turned.outputs[0].dtype = matrix.dtype
        graph.insert_before(graph[0], turned)
        matrix.replace_all_uses_with(turned.outputs[0])
        del graph.initializers[matrix.name or ""]
