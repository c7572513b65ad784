"""Linear layers with what follows them: which nodes are computed in a GEMM's epilogue, and the call of its kernel.

    MatMul(x, W) [-> Add(b)] [-> Gelu | Swish | Relu] [-> Mul(gate)] [-> Add(residual)]      one kernel

A node joins the chain when it is the only reader of the value before it. The chain is emitted where its last node
stands, when every tensor that it reads exists. A side tensor that turns out to need broadcasting ends the chain there:
the rest of its nodes are emitted one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from xopt.errors import InputError
from xopt.ir.schema import op_of
from xopt.targets.formats import BFLOAT16, FLOAT32, Format, Quantized, dequantized, quantized_operands
from xopt.targets.symbolic import Array, Dim

if TYPE_CHECKING:
    from xopt.kernels.gemm import Config
    from xopt.kernels.isa import Isa
    from xopt.targets.emitting import Emitting, Value


@dataclass
class Chain:
    """A MatMul with a constant weight, and the nodes of its epilogue in order.

    Attributes:
        quantized: its operands where it is computed on integers.
    """

    matmul: ir.Node
    quantized: Quantized | None = None
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


def plan_fusion(graph: ir.Graph, quantized: bool = False, apart: Collection[str] = ()) -> dict[ir.Node, Chain | None]:
    """Chains by their last node; the other nodes of a chain map to None: they are not emitted by themselves.

    Args:
        graph: a canonical graph.
        quantized: compute products of quantized operands on integers.
        apart: names of first outputs of nodes that are in no chain.
    """
    plan: dict[ir.Node, Chain | None] = {}
    alone = {node for node in graph if node.outputs[0].name in apart}
    for node in graph:
        if op_of(node) == "MatMul" and _weight(node) is not None and node not in alone:
            chain = _chain(Chain(node, quantized_operands(node) if quantized else None), {*plan, *alone})
            for absorbed in (node, *chain.nodes):
                plan[absorbed] = None
            plan[chain.last] = chain
    return plan


def _weight(matmul: ir.Node) -> tuple[int, ...] | None:
    """The shape [K, N] of a linear layer's matrix, a float32 constant or a dequantized one; else None."""
    weight = matmul.inputs[1]
    if weight is None:
        return None
    matrix, numbers = weight.const_value, weight.const_value
    if (node := dequantized(weight)) is not None:
        matrix, numbers = (given.const_value for given in node.inputs[:2] if given is not None)
    if matrix is None or numbers is None or numbers.dtype != ir.DataType.FLOAT or len(matrix.shape) != 2:
        return None
    return tuple(matrix.shape.numpy())


def _chain(chain: Chain, taken: Collection[ir.Node]) -> Chain:
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
    return node if op_of(node) else None


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
    matrix, constant = _weight(chain.matmul), value.const_value
    assert matrix is not None and constant is not None
    columns = matrix[1]
    shape = list(constant.shape)
    return bool(shape) and shape[-1] == columns and all(dim == 1 for dim in shape[:-1]) and len(shape) <= 3


def emit_chain(lowering: Emitting, chain: Chain) -> Value:
    """Call the GEMM kernel for as much of the chain as fits it; emit the rest node by node.

    Returns:
        The value of the chain's last node.
    """
    matrix, weight = _weight(chain.matmul), chain.matmul.inputs[1]
    source = chain.quantized.source if chain.quantized else chain.matmul.inputs[0]
    assert source is not None and weight is not None and matrix is not None
    if lowering.target.isa() is None or not lowering.is_float32(source):
        return _emit_rest(lowering, [chain.matmul, *chain.nodes])
    shape = [*lowering.shape(source)[:-1], matrix[1]]
    fused = _fitting(lowering, chain, shape)
    last = fused.nodes[-1] if fused.nodes else fused.matmul
    layer = Layer(weight, fused.bias, fused.activation, fused.gate, fused.residual, fused.quantized)
    result = linear(lowering, source, layer, lowering.formats(last.outputs[0], shape[-1]))
    if last is chain.last:
        return result
    lowering.values[last.outputs[0]] = result
    return _emit_rest(lowering, chain.nodes[len(fused.nodes) :])


def _emit_rest(lowering: Emitting, nodes: Sequence[ir.Node]) -> Value:
    lowering.inline(nodes)
    return lowering.value(nodes[-1].outputs[0])


def _fitting(lowering: Emitting, chain: Chain, shape: Sequence[Dim]) -> Chain:
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


def _same(lowering: Emitting, value: ir.Value, shape: Sequence[Dim]) -> bool:
    return lowering.is_float32(value) and lowering.dims.same_shape(lowering.shape(value), shape)


@dataclass(frozen=True)
class Layer:
    """What the GEMM kernel computes: ``act(x @ W + b) * gate + residual``.

    Attributes:
        weight: constant [K, N], or with ``patches`` a convolution's [N, channels, *kernel].
        bias: constant of N elements.
        quantized: the operands, where they are integers.
    """

    weight: ir.Value
    bias: ir.Value | None = None
    activation: ir.Node | None = None
    gate: ir.Value | None = None
    residual: ir.Value | None = None
    quantized: Quantized | None = None
    patches: bool = False

    def matrix(self, array: Array) -> Array:
        """The weight's content as [K, N]."""
        if self.quantized is not None:
            return self.quantized.matrix(array)
        return array.reshape(len(array), -1).T if self.patches else array


def _depth(size: Dim, layer: Layer) -> int:
    """The number of input features; InputError E-UNSUPPORTED-OP where it depends on an axis of unknown size."""
    try:
        return int(size)
    except TypeError as error:
        what = f"a linear layer reads [..., {size}], and kernels need a fixed width"
        cure = "fix the axes that it depends on with --dim"
        raise InputError("E-UNSUPPORTED-OP", what, where=f"weight {layer.weight.name!r}", cure=cure) from error


def linear(
    lowering: Emitting, x: ir.Value | relax.Expr, layer: Layer, results: tuple[Format, ...] = (FLOAT32,)
) -> Value:
    """Call the GEMM kernel for a layer over x [*rows, K], which is a value of the graph or a float32 tensor."""
    from xopt.kernels import gemm

    isa = lowering.target.isa()
    assert isa is not None
    shape = lowering.shape(x) if isinstance(x, ir.Value) else lowering.shape_of(x)
    form, operands = _operands(lowering, layer)
    weight = layer.quantized.weight if layer.quantized else layer.weight
    columns = int(lowering.value(weight).shape[0 if layer.patches else 1])
    sides = [lowering.tensor(value) for value in (layer.gate, layer.residual) if value is not None]
    workload = gemm.Workload(
        rows=leading(shape[:-1]),
        k=_depth(shape[-1], layer),
        n=columns,
        bias=layer.bias is not None,
        gate=layer.gate is not None,
        residual=layer.residual is not None,
        operands=operands,
        results=tuple(result.name for result in results),
        **_activation(layer.activation),
    )
    config = tied_config(lowering, weight) if _is_tied(lowering, weight) else lowering.config(gemm, workload)
    panels = panels_of(operands, config, isa)

    def columns_of(value: ir.Value, key: object, content: Callable[[Array], Array]) -> relax.Expr:
        return lowering.packed(value, (panels, key), lambda array: gemm.pack_columns(content(array), config, isa))

    inputs = [
        lowering.packed(weight, panels, lambda array: gemm.pack_weight(layer.matrix(array), config, isa, operands))
    ]
    if (quantized := layer.quantized) is not None:
        factor, zero = np.float32(form.scale), form.zero_point
        inputs.append(columns_of(quantized.scale, factor, lambda s: np.resize(factor * s, columns)))
        inputs.append(columns_of(weight, zero, lambda array: gemm.offset(quantized.matrix(array), zero)))
    if layer.bias is not None:
        inputs.append(columns_of(layer.bias, "bias", lambda array: array.reshape(-1).astype(np.float32)))
    inputs += [*sides, *lowering.quantization(results)]
    name = gemm.name(workload, config, isa)
    # Read last, so that a conversion stands right before the product.
    a = lowering.formatted(x, form) if isinstance(x, ir.Value) else lowering.converted(x, form)
    shape = [*shape[:-1], columns]
    return lowering.call_formats(name, lambda: gemm.build(workload, config, isa), [a, *inputs], shape, results)


def panels_of(operands: str, config: Config, isa: Isa) -> object:
    """What a packed matrix depends on: equal ones are packed once."""
    return operands, config.vectors, isa.lanes


def _is_tied(lowering: Emitting, weight: ir.Value) -> bool:
    return any(matrix is weight for matrix in lowering.tied.values())


def tied_config(lowering: Emitting, matrix: ir.Value) -> Config:
    """For a matrix that is read as a table of tokens as well: one packing for all of its readers."""
    from xopt.kernels import gemm

    isa = lowering.target.isa()
    assert isa is not None
    k, n = lowering.value(matrix).shape
    return gemm.heuristic(gemm.Workload((None,), int(k), int(n)), isa)


def _operands(lowering: Emitting, layer: Layer) -> tuple[Format, str]:
    """The format of a layer's activations, and the precision of both operands in the words of the workload."""
    if layer.quantized is not None:
        return layer.quantized.format, "int8"
    return (BFLOAT16, "bfloat16") if lowering.target.precision == "bf16" else (FLOAT32, "float32")


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
