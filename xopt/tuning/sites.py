"""The kernels that a model calls: what they compute, and on tensors of which shapes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import relax, tirx
from tvm.ir import Constant
from tvm.sym import Analyzer

from xopt.targets.base import Target
from xopt.targets.database import family_name
from xopt.targets.lowering import Lowered, lower

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """An operand or result of a kernel.

    Attributes:
        shape: its extents; of a constant, as packed for the heuristic's configuration.
        dtype: numpy's name.
        constant: a weight, packed when the model is compiled.
    """

    shape: tuple[int, ...]
    dtype: str
    constant: bool = False


@dataclass(frozen=True)
class Site:
    """A kernel as a model calls it.

    Attributes:
        family: name of its module in `xopt.kernels`.
        workload: what it computes.
        inputs, outputs: the tensors of a call, in the order of the kernel's parameters.
    """

    family: str
    workload: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def shapes(self) -> list[list[int]]:
        """Shapes of the tensors that are not constant."""
        return [list(tensor.shape) for tensor in self.inputs if not tensor.constant]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.outputs[0].shape))
        return f"{self.family} {'x'.join(map(str, self.inputs[0].shape))} -> {shape}"


FEW = 8
"""Rows of a linear layer that is called for one short sentence, or to write a few tokens."""


def few_rows(site: Site) -> Site | None:
    """The same linear layer on few rows; None where the kernel is made for a known number of them."""
    if site.family != "gemm" or site.workload.m is not None:
        return None
    rows = site.outputs[0].shape[:-1]

    def with_few(tensor: Tensor) -> Tensor:
        if tensor.constant or tensor.shape[:-1] != rows:
            return tensor
        return replace(tensor, shape=(*[1] * (len(rows) - 1), FEW, tensor.shape[-1]))

    few = replace(site, inputs=tuple(map(with_few, site.inputs)), outputs=tuple(map(with_few, site.outputs)))
    return few if few != site else None


@dataclass
class _Noted:
    """Configures the kernels by heuristic, or as told, and remembers what was asked, by the name of the kernel."""

    told: Mapping[tuple[str, Any], Any]
    asked: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def config(self, family: Any, workload: Any, isa: Any) -> Any:
        kernel = (family_name(family), workload)
        config = self.told.get(kernel) or family.heuristic(workload, isa)
        self.asked[family.name(workload, config, isa)] = kernel
        return config


@dataclass
class Sites:
    """The kernels of a canonical model on a target, with their operands for inputs of the given shapes.

    Args:
        model: canonical form.
        target: where the kernels run.
        feeds: shape of each input of the model, by name.
    """

    model: ir.Model
    target: Target
    feeds: Mapping[str, tuple[int, ...]]

    def counts(self) -> dict[Site, int]:
        """How often each kernel is called in one run."""
        counts: dict[Site, int] = {}
        for site, _ in self._calls({}):
            counts[site] = counts.get(site, 0) + 1
        return counts

    def constants(self, wanted: Site, config: Any) -> dict[int, Array]:
        """The constant inputs of the first call of a kernel by position, packed for a configuration."""
        told = {(wanted.family, wanted.workload): config}
        for site, constants in self._calls(told):
            if (site.family, site.workload, site.shapes) == (wanted.family, wanted.workload, wanted.shapes):
                return constants
        raise LookupError(f"no call of {wanted}")

    def _calls(self, told: Mapping[tuple[str, Any], Any]) -> list[tuple[Site, dict[int, Array]]]:
        target = copy(self.target)
        target.configs = noted = _Noted(told)
        lowered = lower(self.model, target)
        main = lowered.module["main"]
        analyzer = self._sizes(lowered)
        weights: dict[Any, Array] = {}
        calls = []
        for binding in (binding for block in main.body.blocks for binding in block.bindings):
            value = getattr(binding, "value", None)
            if not isinstance(value, relax.Call):
                continue
            operator = getattr(value.op, "name", "")
            if operator == "relax.call_pure_packed" and value.args[0].global_symbol == "vm.builtin.tuple_getitem":
                weights[binding.var] = lowered.weights[int(value.args[2].value)][1]
            elif operator == "relax.call_tir" and value.args[0].name_hint in noted.asked:
                site = _site(noted.asked[value.args[0].name_hint], value, weights, analyzer)
                if site is not None:
                    calls.append(site)
        return calls

    def _sizes(self, lowered: Lowered) -> Analyzer:
        """Knows the symbolic dimensions of the inputs."""
        analyzer = Analyzer()
        for info, parameter in zip(lowered.inputs, lowered.module["main"].params):
            for dim, size in zip(parameter.ty.shape, self.feeds[info.name]):
                if isinstance(dim, tirx.Var):
                    analyzer.bind(dim, tirx.IntImm("int64", size), allow_override=True)
        return analyzer


def _site(
    kernel: tuple[str, Any], call: Any, weights: Mapping[Any, Array], analyzer: Analyzer
) -> tuple[Site, dict[int, Array]] | None:
    """The site of a ``call_tir`` and its constants; None when a shape depends on the data."""
    operands = list(call.args[1].fields)
    constants = {
        position: np.asarray(operand.value.numpy()) if isinstance(operand, Constant) else weights[operand]
        for position, operand in enumerate(operands)
        if isinstance(operand, Constant) or operand in weights
    }
    inputs = [_tensor(operand.ty, analyzer, position in constants) for position, operand in enumerate(operands)]
    results = call.ty_args[0]
    listed = results.fields if isinstance(results, relax.TupleType) else [results]
    outputs = [_tensor(result, analyzer) for result in listed]
    if any(tensor is None for tensor in (*inputs, *outputs)):
        return None
    return Site(*kernel, tuple(filter(None, inputs)), tuple(filter(None, outputs))), constants


def _tensor(kind: Any, analyzer: Analyzer, constant: bool = False) -> Tensor | None:
    extents = [analyzer.simplify(dim) for dim in kind.shape or ()]
    if kind.shape is None or not all(isinstance(extent, tirx.IntImm) for extent in extents):
        return None
    return Tensor(tuple(int(extent.value) for extent in extents), str(kind.dtype), constant)
