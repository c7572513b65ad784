"""Indices that the data gives: as onnxruntime where they are valid, an error where they are not, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.targets.running import built, node_model, onnxruntime, reference
from xopt import targets
from xopt.errors import InputError
from xopt.runtime.session import REFUSAL
from xopt.targets.lowering import lower

FLOAT, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
TRIALS = 12
SEEDS = np.random.default_rng(7)


@dataclass(frozen=True)
class Case:
    """One operator with computed indices.

    Attributes:
        op, attributes: the node.
        shapes: of its inputs; the second is the indices. Names are dynamic dimensions.
        extents: what each index (or each component of a row of them) chooses from, by the sizes of the dimensions.
        kind: type of the indices.
        dtype: of the data.
        silent: onnxruntime does not refuse indices outside; the specification calls them an error.
    """

    op: str
    shapes: tuple[tuple[int | str, ...], ...]
    extents: tuple[int | str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    kind: ir.DataType = INT64
    dtype: ir.DataType = FLOAT
    silent: bool = False

    def model(self) -> ir.Model:
        inputs = {f"x{position}": list(shape) for position, shape in enumerate(self.shapes)}
        dtypes = {name: self.kind if name == "x1" else self.dtype for name in inputs}
        model = node_model(self.op, inputs, dtypes=dtypes, output_type=self.dtype, **dict(self.attributes))
        node, content = model.graph.node(0), ir.tensor(np.zeros((), self.kind.numpy()), name="zero")
        zero = ir.Value(name="zero", const_value=content, shape=ir.Shape([]), type=ir.TensorType(self.kind))
        model.graph.initializers["zero"] = zero
        computed = ir.node("Add", [node.inputs[1], zero], name="indices")  # no input of the model, which is checked
        computed.outputs[0].shape, computed.outputs[0].type = node.inputs[1].shape, ir.TensorType(self.kind)
        model.graph.insert_before(node, computed)
        node.replace_input_with(1, computed.outputs[0])
        return model

    def feeds(self, random: np.random.Generator) -> tuple[dict[str, np.ndarray], list[int]]:
        """Random data with valid indices, negative ones among them, and the extents that they choose from."""
        sizes = {name: int(random.integers(1, 6)) for shape in self.shapes for name in shape if isinstance(name, str)}
        real = [[sizes[dim] if isinstance(dim, str) else dim for dim in shape] for shape in self.shapes]
        extents = [sizes[extent] if isinstance(extent, str) else extent for extent in self.extents]
        feeds = {
            f"x{i}": (random.standard_normal(shape) * 9).astype(self.dtype.numpy()) for i, shape in enumerate(real)
        }
        low, high = -np.array(extents), np.array(extents)
        feeds["x1"] = random.integers(
            low if len(extents) > 1 else low[0], high if len(extents) > 1 else high[0], real[1]
        )
        if dict(self.attributes).get("reduction", "none") == "none" and self.op.startswith("Scatter"):
            _distinct(feeds["x1"], extents, self, random)
        feeds["x1"] = feeds["x1"].astype(self.kind.numpy())
        return feeds, extents


def _distinct(indices: np.ndarray, extents: list[int], case: Case, random: np.random.Generator) -> None:
    """No two updates of one place: ONNX leaves open which of them counts."""
    axis = dict(case.attributes).get("axis", 0)
    if case.op == "ScatterElements":
        lines = np.moveaxis(indices, axis, -1)
        for line in np.ndindex(lines.shape[:-1]):
            lines[line] = random.permutation(extents[0])[: lines.shape[-1]] - extents[0] * random.integers(0, 2)
        return
    rows = indices.reshape(-1, len(extents))
    places = random.permutation(int(np.prod(extents)))[: len(rows)]
    rows[...] = np.stack(np.unravel_index(places, extents), axis=1) - np.array(extents) * random.integers(0, 2)


ADD, MAX = (("reduction", "add"),), (("reduction", "max"),)
CASES = [
    Case("Gather", (("b", 4, 6), ("i", 3)), (6,), (("axis", -1),)),
    Case("Gather", (("b", 4), ("i",)), ("b",), kind=INT32),
    Case("Gather", ((7,), ()), (7,)),
    Case("GatherElements", (("b", 5, 3), ("b", 2, 3)), (5,), (("axis", 1),)),
    Case("GatherElements", (("b", 5), ("b", 7)), (5,), (("axis", -1),), INT32),
    Case("GatherND", (("b", 4, 6), ("i", 2)), ("b", 4)),
    Case("GatherND", (("b", 4, 6), ("b", 3, 1)), (4,), (("batch_dims", 1),)),
    Case("GatherND", ((3, 4), ("i", 5, 2)), (3, 4), dtype=INT64),
    Case("ScatterElements", (("b", 5, 3), ("b", 2, 3), ("b", 2, 3)), (5,), (("axis", 1),)),
    Case("ScatterElements", (("b", 5), ("b", 9), ("b", 9)), (5,), (("axis", 1), *ADD)),
    Case("ScatterElements", ((6,), ("i",), ("i",)), (6,), (*MAX, ("axis", 0)), INT32),
    Case("ScatterElements", ((6,), ("i",), ("i",)), (6,), (("reduction", "mul"),), dtype=INT32),
    Case("ScatterND", (("b", 7, 6), (4, 1), (4, 7, 6)), ("b",), ADD),
    Case("ScatterND", ((5, 7, "c"), ("i", 2), ("i", "c")), (5, 7)),
    Case("ScatterND", ((5, 4), ("i", 3, 2), ("i", 3)), (5, 4), (("reduction", "min"),)),
    Case("ScatterND", ((5, 4), ("i", 3, 2), ("i", 3)), (5, 4), MAX, dtype=INT64),
]  # fmt: skip


def outside(extent: int, kind: ir.DataType) -> list[int]:
    """Indices that leave ``extent``, by one and by far."""
    limits = np.iinfo(kind.numpy())
    far = [2**31 - 1, -(2**31), 2**31, -(2**31) - 1, 2**40, 2**62, int(limits.max), int(limits.min)]
    return [extent, -extent - 1, *(value for value in far if limits.min <= value <= limits.max)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{CASES.index(case)}")
def test_computed_indices(case: Case) -> None:
    model = case.model()
    ours, theirs = built(lower(model, targets.get("cpu"))), onnxruntime(model)
    random = np.random.default_rng(CASES.index(case))
    for _ in range(TRIALS):
        feeds, extents = case.feeds(random)
        compare(ours, theirs, feeds)
        place = tuple(int(random.integers(size)) for size in feeds["x1"].shape)
        extent = extents[place[-1] if len(extents) > 1 else 0]
        wrong = dict(feeds, x1=feeds["x1"].copy())
        wrong["x1"][place] = random.choice(outside(extent, case.kind))
        with pytest.raises(ValueError, match=f"{REFUSAL}{case.op} .*outside"):
            ours(wrong)
        if not case.silent:
            with pytest.raises(Exception, match=r"(?i)ind(ex|ice)"):
                theirs(wrong)
        compare(ours, theirs, feeds)  # an error leaves nothing behind


def compare(ours: Callable[..., Any], theirs: Callable[..., Any], feeds: dict[str, np.ndarray]) -> None:
    for mine, wanted in zip(ours(feeds), theirs(feeds), strict=True):
        assert mine.dtype == wanted.dtype
        np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-5)  # sums of a few floats, in the same order


@pytest.mark.parametrize(("op", "fmod"), [("Div", 0), ("Mod", 0), ("Mod", 1)])
@pytest.mark.parametrize("kind", [INT32, INT64, ir.DataType.UINT8], ids=str)
def test_integers_divided_by_zero_or_minus_one(op: str, fmod: int, kind: ir.DataType) -> None:
    attributes = {"fmod": fmod} if op == "Mod" else {}
    model = node_model(op, {"x": ["n"], "y": ["n"]}, dtypes={"x": kind, "y": kind}, output_type=kind, **attributes)
    ours, theirs = built(lower(model, targets.get("cpu"))), onnxruntime(model)
    random, dtype = np.random.default_rng(3), kind.numpy()
    limits = np.iinfo(dtype)
    most = min(int(limits.max), 2**40)  # onnxruntime takes remainders in float64
    x, y = (random.integers(max(int(limits.min), -most), most, 200).astype(dtype) for _ in range(2))
    y = np.where(random.random(200) < 0.5, random.integers(1, 9, 200).astype(dtype), np.where(y == 0, 1, y))
    compare(ours, theirs, {"x": x, "y": y.astype(dtype)})
    with pytest.raises(ValueError, match="divides integers by 0"):
        ours({"x": x, "y": np.zeros(200, dtype)})
    if limits.min:
        least = np.full(3, limits.min, dtype)
        assert ours({"x": least, "y": np.full(3, -1, dtype)})[0].tolist() == [0 if op == "Mod" else limits.min] * 3


def test_regions_of_images_that_do_not_exist() -> None:
    shapes: dict[str, Any] = {"x": ["b", 3, 8, 8], "r": [4, 4], "i": [4]}
    options = {"output_height": 2, "output_width": 2, "sampling_ratio": 2, "mode": "avg"}
    model = node_model("RoiAlign", shapes, dtypes={"i": INT64}, **options)
    ours = built(lower(model, targets.get("cpu")))
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    regions = np.float32([[0, 0, 7, 7], [1, 2, 5, 6], [2, 2, 3, 7], [0, 1, 4, 4]])
    feeds = {"x": x, "r": regions, "i": np.array([0, 1, 1, 0])}
    compare(ours, lambda given: reference(model, given), feeds)
    for wrong in (2, 2**40, -3):
        with pytest.raises(ValueError, match=f"{REFUSAL}RoiAlign .*outside"):
            ours(dict(feeds, i=np.array([0, 1, wrong, 0])))


@pytest.mark.parametrize("op", ["NonZero", "Compress", "MaxUnpool", "NonMaxSuppression", "Unique", "ReverseSequence"])
def test_operators_that_the_data_would_lead_astray_are_refused(op: str) -> None:
    inputs: dict[str, Any] = {"x": [4, 6], "y": [4, 6], "z": [4, 6]}
    with pytest.raises(InputError, match=rf"E-UNSUPPORTED-OP.*{op}"):
        lower(node_model(op, inputs), targets.get("cpu"))
