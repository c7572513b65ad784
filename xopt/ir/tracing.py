"""From an ``nn.Module`` to the graph, through ``torch.export`` and torch's ONNX exporter, all in memory."""

from __future__ import annotations

import contextlib
import inspect
import io as streams
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from xopt.errors import InputError
from xopt.ir.edit import consumers, initializer, is_op, producer, scalar, unique_name
from xopt.ir.io import check_graph
from xopt.ir.shapes import clear_inferred

if TYPE_CHECKING:
    import torch

Inputs = Sequence[Any] | Mapping[str, Any]
OPSET = 20
"""Opset that torch's exporter writes best; ``canonicalize`` converts it."""


def trace(
    module: torch.nn.Module,
    example_inputs: Inputs,
    *,
    dynamic: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ir.Model:
    """Record what ``module`` computes in evaluation mode. Weights are copied: later training does not change the model.

    Args:
        module: left in the mode it was in.
        example_inputs: positional arguments as a tuple, or keyword arguments as a dict; tensors (None leaves one out).
        dynamic: keep axis 0 ("batch"), and axis 1 ("sequence") of token inputs (rank 2 or 3), symbolic where the module
            allows it (torch does not for what ``**kwargs`` takes); otherwise dimensions are fixed to the example's.
        input_names: of the graph; the parameters of ``forward`` when not given.
        output_names: of the graph; the exporter's when not given.

    Raises:
        InputError: ``E-TRACE``: torch cannot export the module; ``E-NAN-WEIGHTS``.
    """
    import torch

    named = isinstance(example_inputs, Mapping)
    arguments = _by_parameter(module, example_inputs)
    dims = _dimensions(arguments) if dynamic else {}
    if dims:
        arguments = {name: _two_samples(value) for name, value in arguments.items()}
    automatic = {name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in dims.items()}
    with _evaluating(module), _quiet():
        model = _first_success(partial(_export, module, arguments, named), (dims, automatic, {}), type(module).__name__)
    _name_values(model, input_names or [name for name, value in arguments.items() if value is not None], output_names)
    _name_dimensions(model)
    _own_weights(model)
    _hide_rows(model)
    clear_inferred(model)
    ClearMetadataAndDocStringPass()(model)
    check_graph(model)
    return model


def _by_parameter(module: torch.nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Arguments by the name of the parameter of ``forward`` that takes them, in the order given."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    names += [f"input_{index}" for index in range(len(names), len(given))]
    return dict(zip(names, given))


def _dimensions(arguments: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Symbolic axes of each tensor: one batch for all, and one sequence per length that occurs."""
    import torch

    batch = torch.export.Dim("batch")
    lengths: dict[int, Any] = {}
    dims: dict[str, dict[int, Any]] = {}
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        dims[name] = {0: batch}
        if value.dim() in (2, 3) and value.shape[1] > 1:
            length = int(value.shape[1])
            suffix = f"_{len(lengths)}" if lengths else ""
            dims[name][1] = lengths.setdefault(length, torch.export.Dim(f"sequence{suffix}"))
    return dims


def _two_samples(value: Any) -> Any:
    """A batch of one doubled: torch takes a dimension of 1 for fixed."""
    import torch

    single = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == 1
    return torch.cat([value, value]) if single else value


def _export(module: torch.nn.Module, arguments: Mapping[str, Any], named: bool, dims: Mapping[str, Any]) -> ir.Model:
    """Run torch's exporter; ``dims`` names the symbolic axes per argument."""
    import torch

    program = torch.onnx.export(
        module,
        () if named else tuple(arguments.values()),
        kwargs=dict(arguments) if named else None,
        dynamic_shapes=_arranged(module, arguments, named, dims) if dims else None,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    model: ir.Model = program.model
    return model


def _arranged(module: torch.nn.Module, arguments: Mapping[str, Any], named: bool, dims: Mapping[str, Any]) -> Any:
    """``dims`` in the form of the arguments: what ``*args`` takes is one level deeper."""
    if named:
        return {name: dims.get(name) for name in arguments}
    parameters = inspect.signature(module.forward).parameters
    own = {name: dims.get(name) for name in arguments if name in parameters}
    rest = {name: dims.get(name) for name in arguments if name not in parameters}
    return (*own.values(), tuple(rest.values())) if rest else tuple(own.values())


def _first_success(attempt: Callable[[Any], ir.Model], wishes: Sequence[Any], what: str) -> ir.Model:
    """``attempt`` with the first of ``wishes`` that can be had; else the error of the last, most modest one."""
    problem: Exception | None = None
    for wish in wishes:
        try:
            return attempt(wish)
        except Exception as error:
            problem = error
    cause: BaseException | None = problem
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    raise InputError(
        "E-TRACE",
        f"torch cannot export {what}: {' '.join(str(cause).split())[:300]}",
        cure="make forward free of control flow that depends on data, or export to ONNX yourself",
    ) from problem


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put ``module`` into evaluation mode, and every part of it back into its own mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, logs and warnings to itself."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(streams.StringIO()),
            contextlib.redirect_stderr(streams.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str] | None) -> None:
    """Give inputs and outputs the names that callers will use; a value that has such a name already gives way."""
    graph = model.graph
    wanted = list(zip(graph.inputs, inputs)) if len(inputs) == len(graph.inputs) else []
    if outputs is not None:
        if len(outputs) != len(graph.outputs):
            raise InputError(
                "E-OPTION", f"{len(outputs)} output names for {len(graph.outputs)} outputs", cure="name every output"
            )
        wanted += list(zip(graph.outputs, outputs))
    values = {value.name: value for node in graph.all_nodes() for value in node.outputs}
    values |= {value.name: value for value in [*graph.inputs, *graph.initializers.values()]}
    for value, name in wanted:
        other = values.get(name)
        if other is not None and other is not value:
            other.name = unique_name(graph, f"{name}/inner")
        value.name = name


def _name_dimensions(model: ir.Model) -> None:
    """Names that torch made up (``s27``) become ``batch`` and ``sequence``, by the axis where they first occur."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value and dim.value not in names:
                stem = {0: "batch", 1: "sequence"}.get(axis, f"{value.name}_{axis}")
                made_up = not dim.value.startswith(("batch", "sequence"))
                count = sum(name.split(".")[0] == stem for name in names.values())
                names[dim.value] = (f"{stem}.{count}" if count else stem) if made_up else dim.value
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [names.get(d.value or "", d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            )


def _hide_rows(model: ir.Model) -> None:
    """Fill hidden scores by -inf where NaN among the weights counts as 0: a query without any key then gets nothing.

    That is what torch's scaled_dot_product_attention does under a boolean mask. Its exporter guards against NaN and
    yet fills by the lowest number, of which no NaN comes.
    """
    for softmax in [node for node in model.graph if is_op(node, "Softmax")]:
        readers = consumers(softmax.outputs[0])
        add = producer(softmax.inputs[0], "Add")
        if add is None or not any(is_op(reader, "IsNaN") for reader in readers):
            continue
        for fill in [where for value in add.inputs if (where := producer(value, "Where")) is not None]:
            hidden, dtype = scalar(fill.inputs[2]), fill.outputs[0].dtype
            if hidden is not None and dtype is not None and hidden == float(dtype.min):
                lowest = np.asarray(-np.inf, dtype.numpy())
                fill.replace_input_with(2, initializer(model.graph, f"{fill.outputs[0].name}/hidden", lowest))


def _own_weights(model: ir.Model) -> None:
    """Copy weights out of torch's memory; tied weights stay one array."""
    copies: dict[int, ir.Tensor[Any]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        array = tensor.numpy()
        key = array.__array_interface__["data"][0] if array.size else id(array)
        copy = copies.get(key)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = copies[key] = ir.Tensor(np.array(array), dtype=tensor.dtype, name=value.name)
        value.const_value = copy
