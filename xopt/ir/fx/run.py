"""Running an FX view with a hand on its named values, and taking its weights back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from xopt.errors import InputError

Intercept = Mapping[str, Callable[[Tensor], Tensor]]


def as_tensors(feeds: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays (numpy or torch) as tensors, without copying: they are to be read, not written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return {
            name: value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
            for name, value in feeds.items()
        }


def run_with_values(
    gm: fx.GraphModule,
    feeds: Mapping[str, Any],
    names: Iterable[str] | None = None,
    intercept: Intercept | None = None,
) -> dict[str, Tensor]:
    """Run the view and give values by their ONNX name; gradients flow as usual.

    Args:
        gm: from :func:`xopt.ir.fx.to_fx`.
        feeds: inputs by name, numpy or torch.
        names: values wanted (inputs, initializers, or computed in the main graph); the graph's outputs when None.
            Nothing that they do not need is computed.
        intercept: replaces a named value by what the function makes of it, for all its readers and in the result.

    Raises:
        InputError: ``E-OPTION`` for a name that the graph does not have, ``E-DATA`` for a missing input.
    """
    values = gm.meta["values"]
    hooks = {_find(values, name): hook for name, hook in (intercept or {}).items()}
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    results: dict[str, fx.Node] = output.args[0]
    nodes = {node.name: node for node in gm.graph.nodes}
    wanted = dict(results) if names is None else {name: nodes[_find(values, name)] for name in names}
    missing = [name for name in gm.meta["inputs"] if name not in feeds]
    if missing:
        raise InputError("E-DATA", f"the input {missing[0]} has no data", cure="give an array for each input")
    arguments = {
        gm.meta["inputs"][name]: tensor for name, tensor in as_tensors(feeds).items() if name in gm.meta["inputs"]
    }
    return _compute(gm, arguments, hooks, wanted)


def write_back(gm: fx.GraphModule, model: ir.Model) -> None:
    """Put the view's weights into the model it was made from; those that still share its memory are left alone.

    Raises:
        InputError: ``E-FORMAT`` when an initializer of the view is no longer in the model, or has another shape.
    """
    for name, target in gm.meta["weights"].items():
        value = model.graph.initializers.get(name)
        tensor = _attribute(gm, target).detach().cpu()
        if value is None or value.const_value is None or tuple(tensor.shape) != value.const_value.shape.numpy():
            raise InputError("E-FORMAT", "the model is not the one the view was made from", where=f"initializer {name}")
        array = (
            tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            if tensor.dtype == torch.bfloat16
            else tensor.numpy()
        )
        if not np.shares_memory(array, value.const_value.numpy()):
            value.const_value = ir.tensor(array.copy(), dtype=value.const_value.dtype, name=name)


def _compute(
    gm: fx.GraphModule,
    arguments: Mapping[str, Tensor],
    hooks: Mapping[str, Callable[[Tensor], Tensor]],
    wanted: Mapping[str, fx.Node],
) -> dict[str, Tensor]:
    """Compute wanted nodes and what they need; a value is freed after its last reader."""
    needed = _ancestors(wanted.values())
    readers = {node: sum(user in needed for user in node.users) for node in needed}
    keep = set(wanted.values())
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    for node in gm.graph.nodes:
        if node not in needed:
            continue
        value = arguments[node.target] if node.op == "placeholder" else run_node(interpreter, node)
        interpreter.env[node] = hooks[node.name](value) if node.name in hooks else value
        for source in node.all_input_nodes:
            readers[source] -= 1
            if not readers[source] and source not in keep:
                del interpreter.env[source]
    return {name: interpreter.env[node] for name, node in wanted.items()}


def run_node(interpreter: fx.Interpreter, node: fx.Node) -> Any:
    """One node; what torch says about a form or a type that it does not compute names the node of the model."""
    try:
        return interpreter.run_node(node)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        op, name = node.meta.get("node", (node.target, node.name))
        reason = " ".join(str(error).split("\n")[0].split())[:200]
        what = f"op {op} is not supported in this form: {reason or type(error).__name__}"
        raise InputError("E-UNSUPPORTED-OP", what, where=f"node {name}") from error


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen


def _attribute(gm: fx.GraphModule, target: str) -> Tensor:
    owner: Any = gm
    for part in target.split("."):
        owner = getattr(owner, part)
    assert isinstance(owner, Tensor)
    return owner


def _find(values: Mapping[str, str], name: str) -> str:
    if name not in values:
        raise InputError("E-OPTION", f"the graph has no value named {name}")
    return values[name]
