"""The kernels of a model with their operands, as the tuner sees them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from tests.ir import builders
from xopt import targets
from xopt.ir import canonicalize
from xopt.kernels import gemm
from xopt.tuning.sites import FEW, Site, Sites, few_rows


@pytest.fixture(scope="module")
def model() -> ir.Model:
    model = builders.vit(layers=2)
    canonicalize(model)
    return model


def sites(model: ir.Model, batch: int) -> Sites:
    shapes = {
        str(value.name): tuple(dim if isinstance(dim, int) else batch for dim in value.shape or ())
        for value in model.graph.inputs
    }
    return Sites(model, targets.get("cpu"), shapes)


def of_family(counts: dict[Site, int], family: str) -> dict[Site, int]:
    return {site: count for site, count in counts.items() if site.family == family}


def test_kernels_are_counted_on_concrete_shapes(model: ir.Model) -> None:
    counts = sites(model, 3).counts()
    assert sum(of_family(counts, "attention").values()) == 2
    assert all(shape[0] == 3 for site in of_family(counts, "attention") for shape in site.shapes)
    for site in of_family(counts, "gemm"):
        assert site.inputs[0].shape[-1] == site.workload.k
        assert site.outputs[0].shape == (*site.inputs[0].shape[:-1], site.workload.n)
        assert [tensor.constant for tensor in site.inputs[:2]] == [False, True]


def test_another_batch_is_the_same_workload_on_other_shapes(model: ir.Model) -> None:
    small, large = sites(model, 1).counts(), sites(model, 8).counts()
    assert [site.workload for site in small] == [site.workload for site in large]
    assert not set(small) & set(large)


def test_constants_are_packed_for_the_configuration(model: ir.Model) -> None:
    found = sites(model, 1)
    isa = targets.get("cpu").isa()
    site = next(site for site in of_family(found.counts(), "gemm") if site.workload.n > 16)
    config = next(c for c in gemm.space(site.workload, isa) if c.vectors == 1)
    weight = found.constants(site, config)[1]
    assert weight.shape == (-(-site.workload.n // isa.lanes), site.workload.k, 1, isa.lanes)


def test_few_rows_of_a_layer_that_takes_any() -> None:
    model = builders.vit(layers=1)
    canonicalize(model)
    layers = [site for site in sites(model, 3).counts() if site.family == "gemm"]
    open_ = [site for site in layers if site.workload.m is None]
    assert open_
    for site in open_:
        few = few_rows(site)
        assert few is not None and few.workload == site.workload
        assert few.inputs[0].shape == (*[1] * (len(site.inputs[0].shape) - 2), FEW, site.workload.k)
        assert few.outputs[0].shape[-2:] == (FEW, site.workload.n)
        assert [t for t in few.inputs if t.constant] == [t for t in site.inputs if t.constant]
        assert few_rows(few) is None
    assert all(few_rows(site) is None for site in layers if site.workload.m is not None)
