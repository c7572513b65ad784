"""Quantized attention: the form that is written, what it computes, and the integer kernels that it is compiled to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.ir import builders
from tests.passes.exact import ops
from tests.passes.exact import run as run_exact
from tests.passes.quantizing import run, samples
from tests.targets.running import kernel_names
from xopt import targets
from xopt.ir import canonicalize, edit, export, load, save
from xopt.passes import FuseQKV, Quantize
from xopt.passes.quantize.scales import scales_by_head
from xopt.pipeline import text
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session
from xopt.targets.base import cpu_features
from xopt.targets.integer_attention import parts
from xopt.targets.lowering import lower

SERVED = ("bert", "vit", "gpt", "gpt-parallel")
"""Models whose projections are read as they are: integers all the way."""


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def quantized(kind: str, **options: object) -> ir.Model:
    model = builders.ZOO[kind]()
    run_exact(FuseQKV(), model)
    run(model, attention=True, **options)
    return model


@pytest.mark.parametrize("kind", builders.ZOO)
def test_each_kind_of_model(kind: str) -> None:
    """All of Q, K, V get a pair, on the grids that were agreed; random weights keep their direction."""
    model = builders.ZOO[kind]()
    data = samples(model)
    original = ReferenceSession(model).run(data.inputs)
    report = run(model, data, attention=True)
    three_dimensional = [node for node in attentions(model) if node.attributes.get_int("q_num_heads", 0)]
    assert sum(parts(node) is not None for node in three_dimensional) == len(three_dimensional)
    assert report.reasons.get("four-dimensional", 0) == len(attentions(model)) - len(three_dimensional)
    for name, wanted in original.items():
        got = ReferenceSession(model).run(data.inputs)[name]
        assert np.vdot(got, wanted) / np.linalg.norm(got) / np.linalg.norm(wanted) > 0.99
    again = run(model, data, attention=True)
    assert again.rewritten == 0 and set(again.reasons) <= {"already-quantized", "four-dimensional"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("bert", "gpt") else pytest.mark.slow) for kind in SERVED]
)
def test_integers_from_projection_to_projection(kind: str, tmp_path: Path) -> None:
    model = quantized(kind)
    names = kernel_names(lower(model, targets.get("cpu")))
    fused = [name for name in names if name.startswith("attention_")]
    assert len(fused) == len(attentions(model)) and all("_int8_" in name for name in fused)
    assert sum("uint8_columns" in name or "uint8-columns" in name for name in names) == len(fused)
    assert not any("quantize" in name or "from_" in name for name in names)
    data = samples(model)
    ours = Session.load(targets.compile(model, "cpu", tmp_path / "model.so")).run(data.inputs)
    for name, wanted in ReferenceSession(model).run(data.inputs).items():
        # Weights of 8 bits are off by at most a 510th, and numbers on the border of two steps go to either.
        scale = np.abs(wanted).max()
        assert np.median(np.abs(ours[name] - wanted)) < 0.006 * scale
        assert np.abs(ours[name] - wanted).max() < 0.03 * scale


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_the_written_file_reaches_the_same_kernels(kind: str, fused: bool, tmp_path: Path) -> None:
    """Also when the projections are joined only after the file was read."""
    model = quantized(kind) if fused else builders.ZOO[kind]()
    if not fused:
        run(model, attention=True)
    save(export(model), tmp_path / "model.onnx")
    again = load(tmp_path / "model.onnx")
    canonicalize(again)
    run_exact(FuseQKV(), again)
    names = kernel_names(lower(again, targets.get("cpu")))
    assert sum(name.startswith("attention_") and "_int8_" in name for name in names) == len(attentions(model))
    assert not any("quantize" in name or "from_" in name for name in names)


WITH_AVX512 = pytest.mark.skipif("avx512bw" not in cpu_features(), reason="this CPU has no AVX-512")


@pytest.mark.parametrize("target", [pytest.param("cpu:avx512", marks=WITH_AVX512), "cpu:avx2"])
def test_other_instruction_sets_round_alike(target: str, tmp_path: Path) -> None:
    model = quantized("bert")
    data = samples(model)
    results = [
        Session.load(targets.compile(model, machine, tmp_path / "model.so")).run(data.inputs)["embedding"]
        for machine in ("cpu", target)
    ]
    assert np.median(np.abs(results[0] - results[1])) < 1e-5 * np.abs(results[0]).max()


@pytest.mark.parametrize("kind", ["cross", pytest.param("llama", marks=pytest.mark.slow)])
def test_what_integers_do_not_reach_is_computed_as_the_graph_says(kind: str, tmp_path: Path) -> None:
    """Rotated queries, and keys of another tensor: the operands are rounded, and attention is float."""
    model = quantized(kind)
    data = samples(model)
    ours = Session.load(targets.compile(model, "cpu", tmp_path / "model.so")).run(data.inputs)
    for name, wanted in ReferenceSession(model).run(data.inputs).items():
        difference = np.abs(ours[name] - wanted) / np.abs(wanted).max()
        assert np.median(difference) < 0.006 and difference.max() < 0.03


def test_reasons() -> None:
    model = builders.bert()
    names = [str(node.name) for node in attentions(model)]
    assert run(model, attention=True, skip=(names[0],)).reasons == {"skipped": 1}
    assert [parts(node) is None for node in attentions(model)] == [True, False]


def test_it_is_an_option() -> None:
    model = builders.bert()
    run(model)
    assert not any(parts(node) for node in attentions(model))
    one = Quantize(attention=True, skip=("first",))
    assert text.parse(text.render([one])) == [one]
    assert text.from_yaml(text.to_yaml([one])) == [one]


def test_golden_summary() -> None:
    model = quantized("bert")
    assert {name: ops(model)[name] for name in ("Attention", "QuantizeLinear", "DequantizeLinear", "Split")} == {
        "Attention": 2,
        "QuantizeLinear": 14,  # four inputs of linear layers and three operands of attention in each block
        "DequantizeLinear": 22,
        "Split": 2,
    }
    [q, k, v] = parts(attentions(model)[0]) or ()
    assert set(q.zero_point) == {128} and len(set(q.scale)) == q.heads == 4
    assert len(set(k.scale)) == len(set(v.scale)) == 4


@given(
    arrays(np.float32, 12, elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    arrays(np.float32, 12, elements=st.floats(0, 2.0**99, width=32)),
    st.booleans(),
)
def test_a_head_s_range_fits_its_grid(lows: np.ndarray, widths: np.ndarray, symmetric: bool) -> None:
    """To half a step beyond either end, the zero point being rounded; and zero is one of the numbers."""
    lows, highs = np.minimum(lows, 0), np.maximum(lows + widths, 0)
    grid = scales_by_head(lows, highs, 3, symmetric)
    scale, zero = np.asarray(grid.scale, np.float64), np.asarray(grid.zero, np.float64)
    assert (np.ptp(scale.reshape(3, -1), axis=1) == 0).all() and (np.ptp(zero.reshape(3, -1), axis=1) == 0).all()
    assert ((0 - zero) * scale <= lows + (0.5 + 1e-4) * scale).all()
    assert ((255 - zero) * scale >= highs - (0.5 + 1e-4) * scale).all()
    assert not symmetric or (zero == 128).all()


@pytest.mark.parametrize("change", ["cache", "mask"])
def test_what_the_kernel_does_not_take_stays_float(change: str) -> None:
    node = attentions(quantized("bert"))[0]
    assert parts(node) is not None
    inputs = list(node.inputs[:4])
    if change == "cache":
        inputs += [ir.Value(name="keys"), ir.Value(name="values")]
    else:
        shape, dtype = ir.Shape(["sequence", "sequence"]), ir.TensorType(ir.DataType.BOOL)
        inputs[3] = ir.Value(name="mask", shape=shape, type=dtype)
    other = ir.Node("", "Attention", inputs, node.attributes.values(), num_outputs=1)
    assert parts(other) is None


def test_a_vector_of_other_grids_is_no_attention_of_ours() -> None:
    """Scales that differ within a head cannot leave its sums."""
    model = quantized("bert")
    node = attentions(model)[0]
    dequantizer = edit.producer(node.inputs[1], "DequantizeLinear")
    assert dequantizer is not None and dequantizer.inputs[1] is not None
    scale = np.array(edit.constant(dequantizer.inputs[1]))
    scale[0] *= 2
    dequantizer.inputs[1].const_value = ir.tensor(scale)
    assert parts(node) is None
