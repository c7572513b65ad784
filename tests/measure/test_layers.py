"""Kernels of a run: all of them, with the work that the model has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from xopt import targets
from xopt.ir import canonicalize
from xopt.measure.layers import Call, calls, layers, products
from xopt.measure.peak import Peak
from xopt.runtime.session import Session

ROWS, K, N = 5, 32, 48


def linear() -> ir.Model:
    """A linear layer and a norm."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, ROWS, n]) for name, n in (("x", K), ("y", N)))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("LayerNormalization", ["h", "s"], ["y"])]
    arrays = {"w": np.ones((K, N), np.float32), "s": np.ones(N, np.float32)}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "linear", [x], [y], constants)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    canonicalize(model)
    return model


def test_every_kernel_is_timed_once_a_run(tmp_path: Path) -> None:
    session = Session.load(targets.compile(linear(), "cpu", tmp_path / "model.so"), threads=1)
    feeds = {"x": np.ones((1, ROWS, K), np.float32)}
    found = calls(session, feeds, rounds=3)
    products = [call for call in found if call.flops]
    assert [call.flops for call in products] == [2 * ROWS * K * N]
    assert products[0].weight_bytes >= 4 * K * N
    assert any(call.name.startswith("layer_norm") for call in found)
    assert all(call.ms > 0 for call in found)
    assert len(calls(session, feeds, rounds=1)) == len(found)


def test_attention_counts_both_products() -> None:
    fused = Call("attention_anyxanyxany_6x64_6x64_0at0of1152_0at384of1152_0at768of1152_scale", 1.0,
                 ((1, 197, 1152), (1, 197, 384)), (0, 0))  # fmt: skip
    assert fused.flops == 2 * 6 * 197 * 197 * (64 + 64)
    apart = Call("attention_anyxanyxany_12x64_12x64_bhsd_scale", 1.0,
                 ((1, 12, 1, 64), (1, 12, 129, 64), (1, 12, 129, 64), (1, 12, 1, 64)), (0, 0, 0, 0))  # fmt: skip
    assert apart.flops == 2 * 12 * 1 * 129 * (64 + 64)


def test_layers_add_up_beside_the_limits() -> None:
    product = Call("gemm_any_10x10_avx512", 2.0, ((100, 10), (1, 10, 1, 16), (100, 10)), (4000, 640, 4000))
    copy = Call("transpose", 1.0, ((10, 10), (10, 10)), (400, 400))
    peak = Peak(gflops=0.02, gb_per_s=0.64)
    first, second = layers([product, copy, product], {"float32": peak})
    assert (first.calls, first.ms, first.flops) == (2, 4.0, 2 * 20000)
    assert first.limit_ms == 2 * max(20000 / 0.02e6, 640 / 0.64e6)
    assert (second.kernel, second.limit_ms, second.bytes) == ("transpose", 0.0, 800)


def test_each_product_is_held_against_the_peak_of_its_precision() -> None:
    names = {
        "gemm_any_10x10_bias_to_bfloat16_avx512_bf16_6x4": "float32",
        "gemm_any_10x10_bias_bfloat16_to_uint8_avx512_bf16_6x4": "bfloat16",
        "gemm_any_10x10_int8_avx512_vnni_6x4": "int8",
    }
    found = [Call(name, 1.0, ((100, 10), (1, 10, 1, 16), (100, 10)), (0, 0, 0)) for name in names]
    assert [call.precision for call in found] == list(names.values())
    assert products(found) == ["bfloat16", "float32", "int8"]
    peaks = {precision: Peak(gflops, 1.0) for precision, gflops in (("float32", 1.0), ("bfloat16", 2.0), ("int8", 4.0))}
    limits = {layer.kernel: layer.limit_ms for layer in layers(found, peaks)}
    assert limits == {name: 20000 / peaks[precision].gflops * 1e-6 for name, precision in names.items()}
