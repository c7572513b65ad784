"""Each kernel against the machine's limit and against numpy, torch and onnxruntime, in interleaved runs.

    TVM_NUM_THREADS=2 python benchmarks/kernels.py docs/benchmarks/kernels.json [--threads 2] [--rounds 60]

The limit of a product is the multiply-add rate of a register-only loop, measured in the same rounds; that of a
row-wise kernel is the time of copying its operands.  Times are medians and minima over the rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TURN_SECONDS = 0.002
Runner = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Competitors by name ("limit" and "xopt" among them) and the floating-point work of one call (0: bytes count)."""

    name: str
    flops: int
    runners: dict[str, Runner]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(options.threads)

    import torch

    from xopt.measure import machine

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    results = []
    for case in cases(options.threads):
        if options.only in case.name:
            results.append(report(case, measure(case.runners, options.rounds)))
    record = {"machine": machine.describe(), "threads": options.threads, "rounds": options.rounds, "results": results}
    options.output.write_text(json.dumps(record, indent=1))


def measure(runners: dict[str, Runner], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each runner, one sample a round, the runners taking turns."""
    calls = {}
    for name, run in runners.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, int(TURN_SECONDS / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - start) / calls[name])
    return samples


def report(case: Case, samples: dict[str, list[float]]) -> dict[str, Any]:
    best = {name: min(times) for name, times in samples.items()}
    line = [f"{case.name:34s} {best['limit'] / best['xopt']:5.0%} of the limit"]
    for name, seconds in best.items():
        rate = f" {case.flops / seconds * 1e-9:4.0f} GFLOP/s" if case.flops else ""
        line.append(f"{name} {seconds * 1e6:.0f} us{rate}")
    print(" | ".join(line), flush=True)
    return {
        "name": case.name,
        "flops": case.flops,
        "best_us": {name: seconds * 1e6 for name, seconds in best.items()},
        "median_us": {name: statistics.median(times) * 1e6 for name, times in samples.items()},
        "samples_us": {name: [seconds * 1e6 for seconds in times] for name, times in samples.items()},
    }


def cases(threads: int) -> Iterator[Case]:
    linear = [
        ("deit-s up gelu", 197, 384, 1536, "gelu", False), ("deit-s down residual", 197, 1536, 384, "none", True),
        ("deit-s qkv", 197, 384, 1152, "none", False), ("deit-s proj residual", 197, 384, 384, "none", True),
        ("minilm up gelu", 128, 384, 1536, "gelu", False), ("bert-base up", 128, 768, 3072, "none", False),
        ("bert-base down residual", 128, 3072, 768, "none", True), ("one row", 1, 384, 1536, "none", False),
    ]  # fmt: skip
    for name, m, k, n, activation, residual in linear:
        yield gemm_case(f"gemm {name} {m}x{k}x{n}", m, k, n, activation, residual, threads)
    for name, length, heads, d in (("deit-s", 197, 6, 64), ("minilm", 128, 12, 32), ("bert-base", 128, 12, 64)):
        yield attention_case(f"attention {name} {length}x{heads}x{d}", length, heads, d, threads)
    yield norm_case("layer norm 197x384", 197, 384, threads)


def isa() -> Any:
    from xopt.kernels.isa import AVX2, AVX512
    from xopt.measure import machine

    return AVX512 if "avx512f" in machine.cpu_features() else AVX2


def compiled(family: Any, workload: Any, *arrays: np.ndarray, out: tuple[int, ...]) -> tuple[Runner, Any]:
    """A runner of the kernel with its heuristic configuration, and its output tensor."""
    import tvm

    from xopt.kernels import COMPILE_CONFIG

    vectors = isa()
    config = family.heuristic(workload, vectors)
    name = family.name(workload, config, vectors)
    with tvm.transform.PassContext(config=COMPILE_CONFIG):
        kernel = tvm.compile(family.build(workload, config, vectors), native())[name]
    tensors = [tvm.runtime.tensor(array) for array in (*arrays, np.zeros(out, np.float32))]
    return lambda: kernel(*tensors), tensors[-1]


def native() -> Any:
    import tvm

    return tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})


def fused_multiply_adds(flops: int, threads: int) -> Runner:
    """``flops`` spread over the threads in a loop that never leaves the registers."""
    import tvm

    from xopt.kernels import COMPILE_CONFIG, emit

    vectors = isa()
    lanes, rows = vectors.lanes, 12 if vectors.registers > 16 else 10
    depth = max(1, flops // (2 * rows * lanes * threads))

    def body() -> None:
        x, y = emit.argument("x", (2,)), emit.argument("y", (threads, rows, lanes))
        with emit.parallel(threads) as thread:
            operand = emit.keep(emit.splat(x[emit.i64(0)], lanes), lanes)
            emit.outer_product(
                rows,
                1,
                depth,
                lambda r, k: x[emit.i64(1)],
                lambda v, k: operand,
                lambda r, v, acc: emit.store(y, acc, thread, r, 0, lanes=lanes),
                lanes=lanes,
                chains=1,
            )

    with tvm.transform.PassContext(config=COMPILE_CONFIG):
        kernel = tvm.compile(emit.prim_func("peak", body), native())["peak"]
    x = tvm.runtime.tensor(np.full(2, 1e-3, np.float32))
    y = tvm.runtime.tensor(np.zeros((threads, rows, lanes), np.float32))
    return lambda: kernel(x, y)


def onnx_runner(nodes: list[Any], weights: dict[str, np.ndarray], feeds: dict[str, np.ndarray], threads: int) -> Runner:
    """The same computation as a small model in onnxruntime; the output is "y"."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in feeds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "case", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def gemm_case(name: str, m: int, k: int, n: int, activation: str, residual: bool, threads: int) -> Case:
    import torch
    from onnx import helper

    from xopt.kernels import gemm

    rng = np.random.default_rng(0)
    a, w, r = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n)))
    b = rng.standard_normal(n).astype(np.float32)
    workload = gemm.Workload((None,), k, n, bias=True, activation=activation, residual=residual)
    config = gemm.heuristic(workload, isa())
    inputs = [a, gemm.pack_weight(w, config, isa()), gemm.pack_columns(b, config, isa()), *([r] if residual else [])]
    xopt, result = compiled(gemm, workload, *inputs, out=(m, n))
    ta, tw, tb, tr = (torch.from_numpy(array) for array in (a, w.T.copy(), b, r))
    gelu = torch.nn.functional.gelu

    def in_torch() -> torch.Tensor:
        y = torch.nn.functional.linear(ta, tw, tb)
        return gelu(y) if activation == "gelu" else y + tr if residual else y

    nodes = [helper.make_node("MatMul", ["a", "w"], ["p"])]
    nodes.append(helper.make_node("Add", ["p", "b"], ["q" if activation == "gelu" or residual else "y"]))
    if activation == "gelu":
        nodes.append(helper.make_node("Gelu", ["q"], ["y"]))
    elif residual:
        nodes.append(helper.make_node("Add", ["q", "r"], ["y"]))
    feeds = {"a": a, "r": r} if residual else {"a": a}
    xopt()
    assert np.allclose(result.numpy(), in_torch().numpy(), rtol=1e-3, atol=1e-3 * math.sqrt(k))
    flops = 2 * m * k * n
    return Case(
        name,
        flops,
        {
            "limit": fused_multiply_adds(flops, threads),
            "xopt": xopt,
            "numpy (product alone)": lambda: a @ w,
            "torch": in_torch,
            "onnxruntime": onnx_runner(nodes, {"w": w, "b": b}, feeds, threads),
        },
    )


def attention_case(name: str, length: int, heads: int, d: int, threads: int) -> Case:
    """Xopt reads the fused projection; torch gets heads already split, which costs it nothing here."""
    import torch

    from xopt.kernels import attention

    x = np.random.default_rng(0).standard_normal((1, length, 3 * heads * d)).astype(np.float32)
    workload = attention.Workload(
        None, None, None, heads, heads, d, d, 1 / math.sqrt(d), **attention.fused(heads, heads, d, d)
    )
    xopt, result = compiled(attention, workload, x, out=(1, length, heads * d))
    parts = np.split(x.reshape(length, 3, heads, d).transpose(1, 2, 0, 3), 3)
    q, k, v = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)

    def in_torch() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    xopt()
    assert np.allclose(result.numpy()[0].reshape(length, heads, d).transpose(1, 0, 2), in_torch().numpy()[0], atol=1e-4)
    flops = 4 * length * length * heads * d
    return Case(name, flops, {"limit": fused_multiply_adds(flops, threads), "xopt": xopt, "torch": in_torch})


def norm_case(name: str, rows: int, width: int, threads: int) -> Case:
    import torch
    from onnx import helper

    from xopt.kernels import norm

    rng = np.random.default_rng(0)
    x, scale, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, width), width, width))
    packed = [norm.pack_vector(values, isa()) for values in (scale, bias)]
    xopt, result = compiled(norm, norm.Workload((None,), width, 1e-5), x, *packed, out=(rows, width))
    tx, ts, tb = (torch.from_numpy(array) for array in (x, scale, bias))

    def in_torch() -> torch.Tensor:
        return torch.nn.functional.layer_norm(tx, (width,), ts, tb)

    xopt()
    assert np.allclose(result.numpy(), in_torch().numpy(), atol=1e-4)
    node = helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"], epsilon=1e-5)
    copy = np.empty_like(x)
    runners = {
        "limit": lambda: np.copyto(copy, x),
        "xopt": xopt,
        "torch": in_torch,
        "onnxruntime": onnx_runner([node], {"s": scale, "b": bias}, {"x": x}, threads),
    }
    return Case(name, 0, runners)


if __name__ == "__main__":
    main()
