from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.passes.exact import check_laws, ops, run
from xopt.ir.structure import transformer_blocks
from xopt.passes import FuseQKV


@pytest.mark.parametrize("kind", builders.ZOO)
def test_laws_on_each_kind_of_model(kind: str) -> None:
    model = builders.ZOO[kind]()
    before = ops(model)
    report = check_laws(FuseQKV(), model)
    after = ops(model)
    blocks = transformer_blocks(model)
    assert len(blocks) >= 2
    if report.rewritten:
        assert after["Split"] - before["Split"] == report.rewritten
        assert after["MatMul"] < before["MatMul"]
    else:
        assert set(report.reasons) == {"already-fused"}


def test_structure_after_fusion() -> None:
    model = builders.bert()
    report = run(FuseQKV(), model)
    assert str(report) == "fuse-qkv: 2 matched, 2 rewritten"
    for block in transformer_blocks(model):
        site = block.attention
        assert site is not None and site.q and site.k and site.v
        assert site.q.matmul is site.k.matmul is site.v.matmul
        assert [one.part for one in (site.q, site.k, site.v)] == [slice(0, 32), slice(32, 64), slice(64, 96)]


def test_grouped_queries_have_parts_of_their_own_width() -> None:
    model = builders.llama(heads=4, kv_heads=2)
    run(FuseQKV(), model)
    site = transformer_blocks(model)[0].attention
    assert site is not None and site.q and site.k and site.v
    assert [one.width for one in (site.q, site.k, site.v)] == [32, 16, 16]


def test_cross_attention_fuses_keys_and_values_of_the_memory() -> None:
    model = builders.cross(layers=1)
    report = run(FuseQKV(), model)
    assert report.rewritten == 2
    assert sorted(len(node.outputs) for node in model.graph if node.op_type == "Split") == [2, 3]


def test_a_bias_on_some_projections_only() -> None:
    model = builders.vit(layers=1)
    site = transformer_blocks(model)[0].attention
    assert site is not None and site.k and site.k.bias
    site.k.bias.outputs[0].replace_all_uses_with(site.k.matmul.outputs[0])
    model.graph.remove(site.k.bias, safe=True)
    assert check_laws(FuseQKV(), model).rewritten == 1
    (bias,) = (value for name, value in model.graph.initializers.items() if name.endswith("qkv.bias"))
    assert bias.const_value is not None
    assert not np.any(bias.const_value.numpy()[32:64])


def test_refusals() -> None:
    shared = builders.vit(layers=2)
    first, second = (block.attention for block in transformer_blocks(shared))
    assert first and second and first.q and second.q
    second.q.matmul.replace_input_with(1, first.q.weight)
    assert check_laws(FuseQKV(), shared).reasons == {"shared-weight": 2}

    read = builders.vit(layers=1)
    site = transformer_blocks(read)[0].attention
    assert site and site.k
    extra = ir.node("Neg", [site.k.matmul.outputs[0]])
    extra.outputs[0].name = "negated"
    extra.outputs[0].type, extra.outputs[0].shape = site.k.matmul.outputs[0].type, site.k.matmul.outputs[0].shape
    read.graph.insert_after(site.k.matmul, extra)
    read.graph.outputs.append(extra.outputs[0])
    report = run(FuseQKV(), read)
    assert (report.rewritten, report.reasons) == (0, {"read-before-bias": 1})

    assert run(FuseQKV(), builders.vit(fused=True)).reasons == {"already-fused": 2}


def test_minilm(minilm: ir.Model) -> None:
    before = ops(minilm)
    report = check_laws(FuseQKV(), minilm)
    assert str(report) == "fuse-qkv: 6 matched, 6 rewritten"
    assert before - ops(minilm) == {"MatMul": 12, "Add": 12}


def test_one_bias_for_several_projections_does_not_keep_them_apart() -> None:
    model = builders.vit(layers=2)
    sites = [block.attention for block in transformer_blocks(model)]
    projections = [one for site in sites if site is not None for one in (site.q, site.k, site.v) if one is not None]
    shared = projections[0].bias_value
    for one in projections:
        assert one.bias is not None
        one.bias.replace_input_with(list(one.bias.inputs).index(one.bias_value), shared)
    assert check_laws(FuseQKV(), model).rewritten == 2
