"""Linear layers with what follows them: which nodes are computed in a GEMM's epilogue, and the call of its kernel.

    MatMul(x, W) [-> Add(b)] [-> Gelu | Swish | Relu] [-> Mul(gate)] [-> Add(residual)]      one kernel

A node joins the chain when it is the only reader of the value before it. The chain is emitted where its last node
stands, when every tensor that it reads exists. A side tensor that turns out to need broadcasting ends the chain there:
the rest of its nodes are emitted one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from tvm import relax

from xopt.targets.symbolic import Array, Dim

if TYPE_CHECKING:
    from xopt.targets.lowering import Lowering


@dataclass
class Chain:
    """A MatMul with a constant weight, and the nodes of its epilogue in order."""

    matmul: ir.Node
    bias: ir.Value | None = None
    activation: ir.Node | None = None
    gate: ir.Value | None = None
    residual: ir.Value | None = None
    nodes: list[ir.Node] = field(default_factory=list)
    sides: dict[ir.Node, str] = field(default_factory=dict)

    @property
    def last(self) -> ir.Node:
        """The node whose output the kernel writes."""
        return self.nodes[-1] if self.nodes else self.matmul


def plan_fusion(graph: ir.Graph) -> dict[ir.Node, Chain | None]:
    """Chains by their last node; the other nodes of a chain map to None: they are not emitted by themselves."""
    plan: dict[ir.Node, Chain | None] = {}
    for node in graph:
        if node.op_type == "MatMul" and node.domain in ("", "ai.onnx") and _weight(node) is not None:
            chain = _chain(node, plan)
            for absorbed in (node, *chain.nodes):
                plan[absorbed] = None
            plan[chain.last] = chain
    return plan


def _weight(matmul: ir.Node) -> ir.Value | None:
    """The constant matrix of a linear layer, float32 [K, N]."""
    weight = matmul.inputs[1]
    if weight is None or weight.const_value is None or weight.const_value.dtype != ir.DataType.FLOAT:
        return None
    return weight if len(weight.const_value.shape) == 2 else None


def _chain(matmul: ir.Node, taken: dict[ir.Node, Chain | None]) -> Chain:
    chain = Chain(matmul)
    while (reader := _only_reader(chain.last.outputs[0])) is not None and reader not in taken:
        if not _joins(chain, reader):
            break
        chain.nodes.append(reader)
    return chain


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = next(iter(uses)).node
    return node if node.domain in ("", "ai.onnx") else None


def _joins(chain: Chain, node: ir.Node) -> bool:
    """Whether ``node`` can be the next stage of the epilogue; notes it in the chain."""
    before = chain.last.outputs[0]
    if node.op_type in ("Gelu", "Swish", "Relu"):
        if chain.activation is not None or chain.gate is not None or chain.residual is not None:
            return False
        chain.activation = node
        return True
    if node.op_type not in ("Add", "Mul") or len(node.inputs) != 2:
        return False
    other = node.inputs[1] if node.inputs[0] is before else node.inputs[0]
    if other is None or other is before:
        return False
    if node.op_type == "Add" and not (chain.nodes or other.const_value is None):
        chain.bias = other if _is_bias(other, chain) else None
        return chain.bias is not None
    if other.const_value is not None or chain.residual is not None:
        return False
    if node.op_type == "Mul" and chain.gate is None:
        chain.gate = other
    elif node.op_type == "Add":
        chain.residual = other
    else:
        return False
    return True


def _is_bias(value: ir.Value, chain: Chain) -> bool:
    """Whether a constant is one number per output feature."""
    weight = _weight(chain.matmul)
    constant = value.const_value
    assert weight is not None and weight.const_value is not None and constant is not None
    columns = weight.const_value.shape[1]
    shape = list(constant.shape)
    return bool(shape) and shape[-1] == columns and all(dim == 1 for dim in shape[:-1]) and len(shape) <= 3


def emit_chain(lowering: Lowering, chain: Chain) -> relax.Expr | None:
    """Call the GEMM kernel for as much of the chain as fits it; emit the rest node by node.

    Returns:
        The value of the chain's last node; None where the target has no templates.
    """
    isa = lowering.target.isa()
    source, weight = chain.matmul.inputs[0], chain.matmul.inputs[1]
    assert source is not None and weight is not None
    x = lowering.tensor(source)
    if isa is None or str(x.ty.dtype) != "float32":
        return _emit_rest(lowering, [chain.matmul, *chain.nodes])
    shape = [*lowering.shape_of(x)[:-1], lowering.value(weight).shape[1]]
    fused = _fitting(lowering, chain, shape)
    result = linear(lowering, x, Layer(weight, fused.bias, fused.activation, fused.gate, fused.residual))
    done = len(fused.nodes)
    last = fused.nodes[-1] if fused.nodes else fused.matmul
    if done == len(chain.nodes):
        return result
    lowering.values[last.outputs[0]] = result
    return _emit_rest(lowering, chain.nodes[done:])


def _emit_rest(lowering: Lowering, nodes: Sequence[ir.Node]) -> relax.Expr:
    from xopt.targets.ops import emit_node

    for node in nodes:
        lowering.values.update(zip(node.outputs, emit_node(lowering, node)))
    return lowering.tensor(nodes[-1].outputs[0])


def _fitting(lowering: Lowering, chain: Chain, shape: Sequence[Dim]) -> Chain:
    """The chain up to the first side tensor that is not shaped like the output."""
    fused = replace(chain, nodes=[], gate=None, residual=None, activation=None)
    for node in chain.nodes:
        for side in ("gate", "residual"):
            value = getattr(chain, side)
            if value is not None and value in node.inputs and not _same(lowering, value, shape):
                return fused
            if value is not None and value in node.inputs:
                setattr(fused, side, value)
        if node is chain.activation:
            fused.activation = node
        fused.nodes.append(node)
    return fused


def _same(lowering: Lowering, value: ir.Value, shape: Sequence[Dim]) -> bool:
    tensor = lowering.tensor(value)
    return str(tensor.ty.dtype) == "float32" and lowering.dims.same_shape(lowering.shape_of(tensor), shape)


@dataclass(frozen=True)
class Layer:
    """What the GEMM kernel computes: ``act(x @ W + b) * gate + residual``.

    Attributes:
        weight: constant [K, N], or with ``patches`` a convolution's [N, channels, *kernel].
        bias: constant of N elements.
    """

    weight: ir.Value
    bias: ir.Value | None = None
    activation: ir.Node | None = None
    gate: ir.Value | None = None
    residual: ir.Value | None = None
    patches: bool = False

    def matrix(self, array: Array) -> Array:
        """The weight's content as [K, N]."""
        return array.reshape(len(array), -1).T if self.patches else array


def linear(lowering: Lowering, x: relax.Expr, layer: Layer) -> relax.Expr:
    """Call the GEMM kernel for a layer over x [*rows, K]."""
    from xopt.kernels import gemm

    isa = lowering.target.isa()
    assert isa is not None
    shape = lowering.shape_of(x)
    columns = lowering.value(layer.weight).shape[0 if layer.patches else 1]
    sides = [lowering.tensor(value) for value in (layer.gate, layer.residual) if value is not None]
    workload = gemm.Workload(
        rows=leading(shape[:-1]),
        k=int(shape[-1]),
        n=columns,
        bias=layer.bias is not None,
        gate=layer.gate is not None,
        residual=layer.residual is not None,
        **_activation(layer.activation),
    )
    config = lowering.config(gemm, workload)
    panels = (config.vectors, isa.lanes)
    inputs = [
        x,
        lowering.packed(layer.weight, panels, lambda array: gemm.pack_weight(layer.matrix(array), config, isa)),
    ]
    if layer.bias is not None:
        inputs.append(lowering.packed(layer.bias, panels, lambda array: gemm.pack_columns(array.reshape(-1), config, isa)))
    name = gemm.name(workload, config, isa)
    return lowering.call(name, lambda: gemm.build(workload, config, isa), [*inputs, *sides], [*shape[:-1], columns])


def static(shape: Sequence[Dim]) -> tuple[int | None, ...]:
    """A shape as kernels' workloads have it: None where dynamic."""
    return tuple(dim if isinstance(dim, int) else None for dim in shape)


def leading(shape: Sequence[Dim]) -> tuple[int | None, ...]:
    """Leading dimensions for a workload: all of them static, or none.

    One dynamic dimension makes the number of rows dynamic; to know the others gains nothing, and would make a kernel of
    its own for every token count of a model whose tokens are merged.
    """
    known = static(shape)
    return known if None not in known else (None,) * len(known)


def _activation(node: ir.Node | None) -> dict[str, Any]:
    """The activation of a chain in the words of the workload."""
    if node is None:
        return {}
    if node.op_type == "Gelu":
        tanh = "approximate" in node.attributes and node.attributes["approximate"].value == "tanh"
        return {"activation": "gelu-tanh" if tanh else "gelu"}
    if node.op_type == "Swish":
        alpha = float(node.attributes["alpha"].value) if "alpha" in node.attributes else 1.0
        return {"activation": "swish", "alpha": alpha}
    return {"activation": "relu"}
