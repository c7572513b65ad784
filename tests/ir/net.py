"""A graph under construction, for tests: each call appends a node and gives its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

OPSET = 24


class Net:
    """A graph under construction: ``net.op("Add", x, y)`` appends a node and returns its output."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self.random = np.random.default_rng(seed)
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.counts: dict[str, int] = {}

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def constant(self, name: str, array: np.ndarray | Sequence[int] | float) -> ir.Value:
        """An initializer; a name that is taken gives the value that has it."""
        if name not in self.initializers:
            data = np.asarray(array)
            tensor = ir.tensor(data, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def ints(self, *values: int) -> ir.Value:
        return self.constant("ints_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def scalar(self, value: int) -> ir.Value:
        return self.constant(f"int_{value}".replace("-", "m"), np.array(value, np.int64))

    def weight(self, name: str, *shape: int, scale: float | None = None) -> ir.Value:
        """Float32 normal weights; by default a matmul's output has the variance of its input."""
        spread = scale if scale is not None else shape[0] ** -0.5
        return self.constant(name, (self.random.standard_normal(shape) * spread).astype(np.float32))

    def op(self, op_type: str, *inputs: ir.Value | None, n: int = 1, name: str = "", **attributes: Any) -> Any:
        count = self.counts[op_type] = self.counts.get(op_type, -1) + 1
        node = ir.Node(
            "",
            op_type,
            inputs=inputs,
            attributes=ir.convenience.convert_attributes(attributes),
            num_outputs=n,
            name=self.unique(name) if name else f"{op_type}_{count}",
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_out" + (f"_{index}" if n > 1 else "")
        self.nodes.append(node)
        return node.outputs[0] if n == 1 else node.outputs

    def unique(self, name: str) -> str:
        """The name, with a number when a node has it (layers that share weights have the same names)."""
        count = self.counts[name] = self.counts.get(name, -1) + 1
        return f"{name}_{count}" if count else name

    def linear(self, x: ir.Value, name: str, width_in: int, width_out: int, bias: bool = True) -> ir.Value:
        product = self.op("MatMul", x, self.weight(f"{name}.weight", width_in, width_out), name=f"{name}.matmul")
        if not bias:
            return product
        return self.op("Add", product, self.weight(f"{name}.bias", width_out, scale=0.1), name=f"{name}.add")

    def layer_norm(self, x: ir.Value, name: str, width: int, epsilon: float = 1e-5) -> ir.Value:
        scale = self.constant(f"{name}.weight", 1 + 0.1 * self.random.standard_normal(width).astype(np.float32))
        bias = self.weight(f"{name}.bias", width, scale=0.1)
        return self.op("LayerNormalization", x, scale, bias, name=name, axis=-1, epsilon=epsilon)

    def rms_norm(self, x: ir.Value, name: str, width: int, epsilon: float = 1e-5) -> ir.Value:
        scale = self.constant(f"{name}.weight", 1 + 0.1 * self.random.standard_normal(width).astype(np.float32))
        return self.op("RMSNormalization", x, scale, name=name, axis=-1, epsilon=epsilon)

    def attention(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        mask: ir.Value | None = None,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int,
        name: str,
        causal: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> ir.Value:
        inputs = (q, k, v) if mask is None else (q, k, v, mask)
        return self.op(
            "Attention",
            *inputs,
            name=name,
            q_num_heads=heads,
            kv_num_heads=kv_heads or heads,
            scale=head_dim**-0.5 if scale is None else scale,
            is_causal=int(causal),
            softcap=softcap,
        )

    def self_attention(
        self,
        x: ir.Value,
        name: str,
        width: int,
        heads: int,
        mask: ir.Value | None = None,
        *,
        fused: bool = False,
        bias: bool = True,
        **options: Any,
    ) -> ir.Value:
        """Projections, attention and output projection; ``fused``: one QKV matmul and a Split."""
        head_dim = width // heads
        if fused:
            joined = self.linear(x, f"{name}.qkv", width, 3 * width, bias)
            sizes = self.constant(f"{name}.sizes", np.array([width] * 3, np.int64))
            q, k, v = self.op("Split", joined, sizes, n=3, axis=-1, name=f"{name}.split")
        else:
            q, k, v = (self.linear(x, f"{name}.{part}", width, width, bias) for part in "qkv")
        y = self.attention(q, k, v, mask, heads=heads, head_dim=head_dim, name=f"{name}.attend", **options)
        return self.linear(y, f"{name}.out", width, width, bias)

    def feed_forward(self, x: ir.Value, name: str, width: int, hidden: int, approximate: str = "none") -> ir.Value:
        up = self.linear(x, f"{name}.up", width, hidden)
        active = self.op("Gelu", up, approximate=approximate, name=f"{name}.act")
        return self.linear(active, f"{name}.down", hidden, width)

    def gated_feed_forward(self, x: ir.Value, name: str, width: int, hidden: int) -> ir.Value:
        gate = self.linear(x, f"{name}.gate", width, hidden, bias=False)
        up = self.linear(x, f"{name}.up", width, hidden, bias=False)
        active = self.op("Swish", gate, alpha=1.0, name=f"{name}.act")
        product = self.op("Mul", active, up, name=f"{name}.mul")
        return self.linear(product, f"{name}.down", hidden, width, bias=False)

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.op("Add", x, y)

    def dimension(self, x: ir.Value, axis: int) -> ir.Value:
        """The size of an axis as an int64 tensor [1]."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def output(self, value: ir.Value, name: str) -> None:
        value.name = name
        self.outputs.append(value)

    def build(self) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=tuple(self.initializers.values()),
            opset_imports={"": OPSET},
            name=self.name,
        )
        model = ir.Model(graph, ir_version=11, producer_name="xopt-tests")
        ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
        return model
