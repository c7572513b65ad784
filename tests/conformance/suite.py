"""ONNX's own backend tests: models of one or a few operators, each with inputs and the outputs that ONNX wants.

They come with the onnx package. Those of operators are written in one module an operator (``Group``), the others lie
on disk by kind.
"""

from __future__ import annotations

import importlib
import pkgutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""A runtime that has read a model: the outputs by name for the inputs by name."""

KINDS = ("simple", "pytorch-converted", "pytorch-operator")
"""The tests that lie on disk."""
ABSOLUTE = 1e-5
RELATIVE = 1e-3
"""Tolerances: a test may name a wider relative one. Sums of another order differ by less than ONNX's own 1e-3."""
TWO_STEPS = {"float16": 2**-9, "bfloat16": 2**-6}
"""Relative tolerances of types of few digits: what ONNX wants was rounded after every operator, and lies up to two of
their numbers beside what comes of the inputs in float64 (in the tests of causal attention)."""


@dataclass(frozen=True, eq=False)
class Case:
    """One backend test.

    Attributes:
        name: kind and name, such as ``node/test_relu``.
        model: what is to be run.
        sets: inputs and wanted outputs in the order of the graph's; arrays, or anything that ONNX has beside tensors.
        rtol: relative tolerance.
    """

    name: str
    model: onnx.ModelProto
    sets: tuple[tuple[Sequence[Any], Sequence[Any]], ...]
    rtol: float

    @property
    def operator(self) -> str:
        """The operator that it tests, or all that it has."""
        operators = sorted({node.op_type for node in self.model.graph.node})
        return operators[0] if len(operators) == 1 else "+".join(operators)


def groups() -> list[str]:
    """Modules of operators' tests, then kinds of tests on disk."""
    import onnx.backend.test.case.node as node

    prefix = f"{node.__name__}."
    modules = [module.name for module in pkgutil.walk_packages(node.__path__, prefix) if not module.ispkg]
    return [*sorted(module.removeprefix(prefix) for module in modules), *KINDS]


def cases(group: str) -> Iterator[Case]:
    """The tests of a group."""
    if group in KINDS:
        from onnx.backend.test.loader import load_model_tests

        data = Path(onnx.__file__).parent / "backend" / "test" / "data"
        tests, kind = load_model_tests(data_dir=str(data), kind=group), group
    else:
        tests, kind = _of_operator(group), "node"
    for test in tests:
        model, sets = (test.model, test.data_sets) if test.data_sets is not None else _on_disk(Path(test.model_dir))
        yield Case(f"{kind}/{test.name}", model, tuple((tuple(i), tuple(o)) for i, o in sets), test.rtol)


def _of_operator(module: str) -> list[Any]:
    """What the import of a module adds to ONNX's list. A module is run once in a process."""
    import onnx.backend.test.case.node as node

    if module not in _LISTED:
        before = len(node._NodeTestCases)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            importlib.import_module(f"{node.__name__}.{module}")
        _LISTED[module] = node._NodeTestCases[before:]
    return _LISTED[module]


_LISTED: dict[str, list[Any]] = {}


def _on_disk(folder: Path) -> tuple[onnx.ModelProto, list[tuple[list[Array], list[Array]]]]:
    def read(path: Path, what: str) -> list[Array]:
        files = sorted(path.glob(f"{what}_*.pb"), key=lambda file: int(file.stem.rpartition("_")[2]))
        return [numpy_helper.to_array(onnx.load_tensor(str(file))) for file in files]

    sets = [(read(path, "input"), read(path, "output")) for path in sorted(folder.glob("test_data_set_*"))]
    return onnx.load(str(folder / "model.onnx")), sets


def out_of_scope(case: Case) -> str:
    """Why a test asks for what a compiled model does not do, in a word; "" when it is to be right."""
    model = case.model
    operators = {node.op_type for node in model.graph.node}
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if any(not value.type.HasField("tensor_type") for value in values):
        return "sequences"
    strings = any(value.type.tensor_type.elem_type == onnx.TensorProto.STRING for value in values)
    if strings or any(tensor.data_type == onnx.TensorProto.STRING for tensor in _constants(model)):
        return "strings"
    complexes = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
    if any(value.type.tensor_type.elem_type in complexes for value in values):
        return "complex numbers"
    for opset in model.opset_import:
        if opset.domain in DOMAINS:
            return DOMAINS[opset.domain]
    for word, found in OUT_OF_SCOPE.items():
        if operators & found:
            return word
    if any(_trains(node, case) for node in model.graph.node):
        return "training"
    return ""


DOMAINS = {"ai.onnx.ml": "trees and tables", "ai.onnx.preview.training": "training"}
OUT_OF_SCOPE = {
    "sequences": {"SequenceConstruct", "SequenceEmpty", "SequenceAt", "SequenceInsert", "SplitToSequence",
                  "ConcatFromSequence", "SequenceLength", "SequenceErase", "SequenceMap", "OptionalHasElement",
                  "Optional", "OptionalGetElement"},
    "random draws": {"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
                     "Multinomial"},
    "image decoding": {"ImageDecoder"},
    "strings": {"StringNormalizer", "TfIdfVectorizer", "StringConcat", "StringSplit", "RegexFullMatch"},
    "training": {"Momentum", "Adagrad", "Adam"},
}  # fmt: skip
"""Operators of what a compiled model does not do, by its word."""


def _constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _trains(node: onnx.NodeProto, case: Case) -> bool:
    """Whether a node is in its mode for training, in which it draws or updates."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "BatchNormalization":
        return "training_mode" in attributes and attributes["training_mode"].i == 1
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        names = [value.name for value in case.model.graph.input]
        given = dict(zip(names, case.sets[0][0])) if case.sets else {}
        return bool(np.any(given.get(node.input[2], True)))
    return False


def compiled(model: onnx.ModelProto) -> Run:
    """Compile with xopt and load what comes of it, for one thread. Raises what xopt raises."""
    import xopt

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        library = xopt.compile(path, "cpu", Path(folder) / "out", threads=1, database=False, verify=False)
        return xopt.Session.load(library, threads=1).run


def disagreement(case: Case, run: Run) -> str:
    """What is wrong with the outputs of a runtime, or ""."""
    constants = {tensor.name for tensor in case.model.graph.initializer}
    names = [value.name for value in case.model.graph.input if value.name not in constants]
    for inputs, outputs in case.sets:
        got = run({name: _array(content) for name, content in zip(names, inputs) if name})
        for value, want in zip(case.model.graph.output, outputs):
            if wrong := _difference(np.asarray(got[value.name]), _array(want), case.rtol):
                return wrong
    return ""


def _array(content: Any) -> Array:
    """An input or output of a test, which is a tensor of ONNX where numpy has no such type."""
    return numpy_helper.to_array(content) if isinstance(content, onnx.TensorProto) else np.asarray(content)


def _difference(got: Array, want: Array, rtol: float) -> str:
    if got.shape != want.shape:
        return f"shape {got.shape} for {want.shape}"
    if got.dtype != want.dtype:
        return f"type {got.dtype} for {want.dtype}"
    if want.dtype.kind in "biu" or want.dtype.kind in "OSU":
        return "" if np.array_equal(got, want) else "values (integers)"
    numbers, wanted = got.astype(np.float64), want.astype(np.float64)
    rtol = max(rtol, RELATIVE, TWO_STEPS.get(want.dtype.name, 0))
    if np.allclose(numbers, wanted, rtol=rtol, atol=ABSOLUTE, equal_nan=True):
        return ""
    with np.errstate(all="ignore"):
        return f"values, by {np.nanmax(np.abs(numbers - wanted)):.2g}"
