"""Helpers of the target tests: one-node models, and running them without linking an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from xopt import targets
from xopt.targets.lowering import Lowered, lower


def node_model(
    op: str,
    inputs: Mapping[str, np.ndarray | Sequence[int | str]],
    *,
    outputs: int = 1,
    dtypes: Mapping[str, ir.DataType] | None = None,
    output_type: ir.DataType = ir.DataType.FLOAT,
    **attributes: Any,
) -> ir.Model:
    """A model of one node: arrays become initializers, lists of dimensions inputs (float32 unless in dtypes)."""
    values, graph_inputs, initializers = [], [], []
    for name, content in inputs.items():
        if isinstance(content, np.ndarray):
            value = ir.Value(name=name, const_value=ir.tensor(content, name=name))
            value.shape, value.type = ir.Shape(content.shape), ir.TensorType(ir.DataType.from_numpy(content.dtype))
            initializers.append(value)
        else:
            kind = (dtypes or {}).get(name, ir.DataType.FLOAT)
            value = ir.Value(name=name, shape=ir.Shape(list(content)), type=ir.TensorType(kind))
            graph_inputs.append(value)
        values.append(value)
    node = ir.node(op, values, attributes=attributes, num_outputs=outputs, name="tested")
    for index, output in enumerate(node.outputs):
        output.name, output.type = f"y{index}", ir.TensorType(output_type)
    graph = ir.Graph(
        graph_inputs, node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 24}, name="one"
    )
    return ir.Model(graph, ir_version=10)


def built(lowered: Lowered, target: str = "cpu") -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """Build a lowered model in memory: a function from feeds to outputs."""
    import tvm
    from tvm import relax

    from xopt.kernels import COMPILE_OPTIONS

    machine = targets.get(target)
    with machine.tvm_target(), tvm.transform.PassContext(**COMPILE_OPTIONS):
        module = machine.pipeline()(lowered.module)
        executable = relax.build(module, machine.tvm_target(), relax_pipeline=None)
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    weights = [tvm.runtime.tensor(array) for _, array in lowered.weights]

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        arrays = [tvm.runtime.tensor(np.asarray(feeds[info.name], order="C")) for info in lowered.inputs]
        return [result.numpy() for result in main(*arrays, weights)]

    return run


def execute(lowered: Lowered, feeds: Mapping[str, np.ndarray], target: str = "cpu") -> list[np.ndarray]:
    """Build a lowered model in memory and run it."""
    return built(lowered, target)(feeds)


def run_node(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Compile and run a model for this machine's CPU."""
    return execute(lower(model, targets.get("cpu")), feeds)


def reference(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The model in the ONNX project's reference evaluator, which has every operator of the standard."""
    from onnx.reference import ReferenceEvaluator

    return [np.asarray(y) for y in ReferenceEvaluator(ir.to_proto(model)).run(None, dict(feeds))]


def onnxruntime(model: ir.Model) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """The model in onnxruntime: a function from feeds to outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: [np.asarray(y) for y in session.run(None, dict(feeds))]


def kernel_names(lowered: Lowered) -> list[str]:
    """The functions that ``main`` calls, in order, after fusion."""
    import tvm
    from tvm import relax

    machine = targets.get("cpu")
    with machine.tvm_target():
        passes = machine.pipeline().passes
        module = lowered.module
        for transform in passes:
            if transform.info.name == "Views":
                break
            module = transform(module)
    names: list[str] = []

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.Call) and expression.op == tvm.ir.Op.get("relax.call_tir"):
            names.append(expression.args[0].name_hint)

    relax.analysis.post_order_visit(module["main"], visit)
    return names
