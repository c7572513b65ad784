"""An ``ir.Model`` as a ``torch.fx.GraphModule``: one call per node, through the table of ops."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from xopt.errors import InputError
from xopt.ir.fx.elementwise import DTYPES
from xopt.ir.fx.table import CHECKS, TABLE
from xopt.ir.names import identifier

Environment = dict[ir.Value, fx.Node]
_SEVERAL = ("Split", "TopK")
"""Ops whose function gives a tuple, however many outputs are read."""


def to_fx(model: ir.Model, *, copy: bool = False) -> fx.GraphModule:
    """The model as a torch module whose forward takes the inputs in their order and gives a dict of outputs by name.

    Floating initializers become parameters, the others buffers. torch pastes the names of attributes, arguments and
    nodes into the source that it runs, so all of them are made here; ``gm.meta`` maps the model's names to them:
    ``"weights"`` each initializer to its attribute, ``"values"`` each value of the main graph to its fx node,
    ``"inputs"`` each input to its keyword.

    Args:
        model: canonical, or any graph of the ops in the table; calls of model-local functions are expanded.
        copy: own memory for the weights. Without it they share the model's memory, unless they come from an external
            file: read and differentiate them, but do not update them in place.

    Raises:
        InputError: ``E-UNSUPPORTED-OP`` names the node and op that has no torch function, here, or when the module is
            run by :func:`run_with_values` and the function does not take what it gets.
    """
    return _Converter(model, copy).convert()


def as_tensor(tensor: ir.TensorProtocol, *, copy: bool) -> Tensor:
    """A tensor of the model for torch, sharing its memory unless ``copy``."""
    if tensor.dtype not in DTYPES:
        raise InputError(
            "E-UNSUPPORTED-OP", f"element type {tensor.dtype.name} has no torch type", where=f"{tensor.name}"
        )
    array = tensor.numpy()
    bits = array.view(np.int16) if tensor.dtype == ir.DataType.BFLOAT16 else array
    with warnings.catch_warnings():
        # Weights mapped from a file are read-only; torch warns that writing to them is undefined (see ``copy``).
        warnings.simplefilter("ignore", UserWarning)
        shared = torch.from_numpy(np.ascontiguousarray(bits).reshape(bits.shape))
    shared = shared.view(torch.bfloat16) if tensor.dtype == ir.DataType.BFLOAT16 else shared
    # The memory map of an external file is closed when the model is saved.
    return shared.clone() if copy or isinstance(tensor, ir.ExternalTensor) else shared


class _Converter:
    """One conversion: the fx graph as it grows, and the tensors it reads."""

    def __init__(self, model: ir.Model, copy: bool) -> None:
        self.model = model
        self.copy = copy
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, str] = {}

    def convert(self) -> fx.GraphModule:
        graph = self.model.graph
        environment: Environment = {}
        inputs: dict[str, str] = {}
        for value in graph.inputs:
            if value.name not in graph.initializers:
                node = environment[value] = self.graph.placeholder(identifier("input", len(inputs), value.name))
                inputs[str(value.name)] = str(node.target)
                self._name(value, node)
        weights = {str(name): self._weight(value, environment) for name, value in graph.initializers.items()}
        for node in graph:
            self._node(node, environment, {}, "")
        self.graph.output({str(value.name): environment[value] for value in graph.outputs})
        module = fx.GraphModule(self.tensors, self.graph, class_name="Model")
        module.meta.update(inputs=inputs, weights=weights, values=self.values)
        return module.eval()

    def _name(self, value: ir.Value, node: fx.Node) -> None:
        self.values[str(value.name)] = node.name
        node.meta["value"] = str(value.name)

    def _weight(self, value: ir.Value, environment: Environment) -> str:
        assert value.name is not None and value.const_value is not None
        tensor = as_tensor(value.const_value, copy=self.copy)
        floating = tensor.is_floating_point()
        target, node = self._tensor(value.name, nn.Parameter(tensor) if floating else tensor)
        environment[value] = node
        self._name(value, node)
        return target

    def _tensor(self, name: str, tensor: Tensor) -> tuple[str, fx.Node]:
        """Register a parameter or buffer."""
        target = identifier("weight", len(self.tensors), name)
        self.tensors[target] = tensor
        return target, self.graph.create_node("get_attr", target, name=target)

    def _node(self, node: ir.Node, environment: Environment, outer: Mapping[str, ir.Attr], scope: str) -> None:
        attributes = _attributes(node, outer)
        function = self.model.functions.get(node.op_identifier())
        if function is not None:
            self._call(node, function, environment, attributes, scope)
            return
        if node.domain not in ("", "ai.onnx") or node.op_type not in TABLE:
            raise _unsupported(node, "has no torch function")
        target = TABLE[node.op_type]
        keywords = {name: self._attribute(node, attribute) for name, attribute in attributes.items()}
        parameters = _parameters(target)
        if "outputs" in parameters:
            keywords["outputs"] = len(node.outputs)
        self._check(node, keywords, parameters)
        arguments = tuple(environment[value] if value is not None else None for value in _inputs(node))
        result = self.graph.call_function(target, arguments, keywords)
        result.meta["node"] = (node.op_type, str(node.name))
        self._bind(node, result, environment, scope)

    def _bind(self, node: ir.Node, result: fx.Node, environment: Environment, scope: str) -> None:
        """Give each output of the ONNX node its fx node."""
        several = len(node.outputs) > 1 or node.op_type in _SEVERAL
        for index, value in enumerate(node.outputs):
            if several and not (value.uses() or value.is_graph_output()):
                continue
            made = self.graph.call_function(operator.getitem, (result, index)) if several else result
            environment[value] = made
            if not scope:
                self._name(value, made)

    def _call(
        self,
        node: ir.Node,
        function: ir.Function,
        environment: Environment,
        attributes: Mapping[str, ir.Attr],
        scope: str,
    ) -> None:
        """Expand a call: the body's nodes, with the call's operands and attributes (or the function's defaults)."""
        given = {**{a.name: a for a in function.attributes.values() if a.value is not None}, **attributes}
        inner: Environment = {}
        for parameter, argument in zip(function.inputs, node.inputs):
            if argument is not None:
                inner[parameter] = environment[argument]
        for body_node in function:
            self._node(body_node, inner, given, f"{scope}{node.name}/")
        for value, result in zip(node.outputs, function.outputs):
            environment[value] = inner[result]
            if not scope:
                self._name(value, inner[result])

    def _attribute(self, node: ir.Node, attribute: ir.Attr) -> Any:
        kind = attribute.type
        if kind == ir.AttributeType.TENSOR:
            tensor = as_tensor(attribute.as_tensor(), copy=self.copy)
            return self._tensor(f"{node.name}_{attribute.name}", tensor)[1]
        if kind in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            return attribute.value
        if kind in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            return list(attribute.value)
        raise _unsupported(node, f"has the attribute {attribute.name} of type {kind.name}")

    def _check(self, node: ir.Node, keywords: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
        for name in keywords:
            if name not in parameters:
                raise _unsupported(node, f"has the attribute {name}")
        read = [value.uses() or value.is_graph_output() for value in node.outputs]
        if any(read[1:]) and "outputs" not in parameters and node.op_type not in _SEVERAL:
            raise _unsupported(node, f"has {len(read)} outputs")
        check = CHECKS.get(node.op_type)
        reason = check(**keywords, inputs=len(_inputs(node))) if check is not None else None
        if reason is not None:
            raise _unsupported(node, f"is not supported in this form: {reason}")
        if isinstance(to := keywords.get("to"), int) and ir.DataType(to) not in DTYPES:
            raise _unsupported(node, f"converts to {ir.DataType(to).name}")


def _inputs(node: ir.Node) -> list[ir.Value | None]:
    """The inputs without absent ones at the end."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _attributes(node: ir.Node, outer: Mapping[str, ir.Attr]) -> dict[str, ir.Attr]:
    """The node's attributes, with references to those of the enclosing function resolved."""
    resolved = {}
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            referred = outer.get(str(attribute.ref_attr_name))
            if referred is not None:
                resolved[name] = referred
        else:
            resolved[name] = attribute
    return resolved


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of a table function; {} for torch's built-ins, which take no attributes."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def _unsupported(node: ir.Node, why: str) -> InputError:
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return InputError("E-UNSUPPORTED-OP", f"op {op} {why}", where=f"node {node.name}")
