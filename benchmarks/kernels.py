"""Kernels alone, at each precision, beside the machine's limit and torch, in turns.

    python benchmarks/kernels.py gemm docs/benchmarks/gemm.json              linear layers of DeiT-S and BERT-base
    python benchmarks/kernels.py attention docs/benchmarks/attention.json    49 to 4096 tokens, heads of 32 to 128
    python benchmarks/kernels.py norm docs/benchmarks/norm.json

The limit of a product is a loop of as many multiply-adds that stays in registers, that of a normalization copying its
operands; it takes turns with the others.  Torch has a process of its own, stopped but for its turns.  Its results are
compared with xopt's before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch_kernels

if TYPE_CHECKING:
    from xopt.measure.isolated import Factory, Process
    from xopt.measure.latency import Contender, Latency

Array = np.ndarray
Runner = Callable[[], object]

PRECISIONS = ("float32", "bfloat16", "int8")
IN_TORCH = ("float32", "bfloat16")
"""Torch has no layer at 8 bits to compare with; the others have its names."""
RUNS, FULL_SPEED = 4, 0.95
RESULTS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "uint8"}
"""What a kernel writes where the next one reads the same precision."""


@dataclass(frozen=True)
class Case:
    """A kernel and what it is compared with.

    Attributes:
        work: operations of a call (0: bytes count).
        xopt: a call of the kernel.
        result: what that has written, as float32.
        limit: what the machine takes at least; None: as many multiply-adds.
        in_torch: loads the same into torch, if that has it.
    """

    name: str
    precision: str
    work: int
    xopt: Runner
    result: Callable[[], Array]
    limit: Runner | None = None
    in_torch: Factory | None = None


def main() -> None:
    options = _options()
    os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(options.threads)

    import tvm  # noqa: F401, whose threads the kernels run on

    from xopt.measure import latency, machine
    from xopt.measure.isolated import Process

    results, rates = [], dict.fromkeys(PRECISIONS, 0.0)
    with closing(Process("torch")) as torch, latency.pinned(options.threads):
        for case in CASES[options.kernel](options.threads):
            if options.only not in f"{case.name} {case.precision}":
                continue
            results.append(_entry(case, _measured(case, _contenders(case, torch, options.threads), rates, options)))
            print(_line(results[-1]), flush=True)
    record = {"machine": machine.describe(), "threads": options.threads, "results": results}
    options.output.write_text(json.dumps(record) + "\n")


def _contenders(case: Case, torch: Process, threads: int) -> dict[str, Contender]:
    """Xopt and the limit in this process, torch in its own, after their results were compared."""
    from xopt.measure.latency import Local
    from xopt.measure.peak import fused_multiply_adds

    limit = case.limit or fused_multiply_adds(case.work, threads, case.precision)
    found: dict[str, Contender] = {"xopt": Local(_call(case.xopt, threads), {})}
    if case.in_torch is not None:
        if (problem := torch.load(case.in_torch, {}, threads)) is not None:
            raise SystemExit(f"torch: {problem}")
        case.xopt()
        agree(case.result(), torch.outputs()["y"], case.precision)
        found["torch"] = torch
    return found | {"limit": Local(_call(limit, threads), {})}


def _measured(
    case: Case, contenders: dict[str, Contender], rates: dict[str, float], options: argparse.Namespace
) -> dict[str, Latency]:
    """The run in which the machine was fastest, of some until it is about as fast as ever, and nothing disturbs it.

    Args:
        case: what is measured.
        contenders: by name, "limit" among them.
        rates: operations in a millisecond of the fastest limit so far, by precision; kept up to date.
        options: how long.
    """
    from xopt.measure.latency import in_turns

    found: list[dict[str, Latency]] = []
    while len(found) < RUNS:
        found.append(in_turns(contenders, rounds=options.rounds, seconds=options.seconds))
        rate = case.work / found[-1]["limit"].median
        rates[case.precision] = max(rates[case.precision], rate)
        if rate >= FULL_SPEED * rates[case.precision] and not any(time.disturbed for time in found[-1].values()):
            return found[-1]
    return min(found, key=lambda times: times["limit"].median)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=sorted(CASES))
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20, help="undisturbed samples of each competitor")
    parser.add_argument("--seconds", type=float, default=6.0, help="for a case, or as long as five rounds take")
    parser.add_argument("--only", default="", help="cases whose name and precision contain this")
    return parser.parse_args()


def _call(run: Runner, threads: int) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """A runner, whose operands are its own, as `latency.Local` calls it; on TVM's threads."""
    from xopt.runtime.threads import configure_tvm

    def call(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        configure_tvm(threads)
        run()
        return feeds

    return call


def _entry(case: Case, times: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": case.name,
        "precision": case.precision,
        "work": case.work,
        "of_limit": times["limit"].median / times["xopt"].median,
        "disturbed": any(time.disturbed for time in times.values()),
        "median_us": {name: time.median * 1e3 for name, time in times.items()},
        "samples_us": {name: [round(ms * 1e3, 3) for ms in time.samples_ms] for name, time in times.items()},
        "waits": {name: [round(wait, 4) for wait in time.waits] for name, time in times.items()},
    }


def _line(entry: Mapping[str, Any]) -> str:
    mine, *others = entry["median_us"].items()
    parts = [f"{entry['name']:32s} {entry['precision']:9s} {mine[1]:9.1f} us {entry['of_limit']:5.0%} of the limit"]
    parts += [f"{name} {time / mine[1]:.2f}x" for name, time in others if name != "limit"]
    return " | ".join(parts) + (" (disturbed)" if entry["disturbed"] else "")


# -- kernels -----------------------------------------------------------------------------------------------------------
@cache
def isa() -> Any:
    from xopt.measure import peak

    return peak.isa()


def compiled(family: Any, workload: Any, arrays: list[Array], result: Array) -> tuple[Runner, Callable[[], Array]]:
    """A runner of the kernel with its heuristic configuration, and its output as float32."""
    import tvm

    from xopt.kernels import emit
    from xopt.measure import peak

    kernel = emit.compiled(family.build(workload, family.heuristic(workload, isa()), isa()), peak.native())
    tensors = [tvm.runtime.tensor(array) for array in (*arrays, result)]
    return lambda: kernel(*tensors), lambda: values(tensors[-1].numpy())


def stored(array: Array, precision: str) -> Array:
    """Float32 values as a kernel reads them."""
    from xopt.kernels.precision import to_bfloat16

    return to_bfloat16(array) if precision == "bfloat16" else array


def values(array: Array) -> Array:
    """What a kernel has written, as float32."""
    from xopt.kernels.precision import from_bfloat16

    return from_bfloat16(array) if array.dtype == np.uint16 else array


def agree(ours: Array, theirs: Array, precision: str) -> None:
    """Stop when two results differ by more than the precision explains, relative to the largest."""
    error = float(np.abs(ours.reshape(theirs.shape) - theirs).max() / np.abs(theirs).max())
    if not error < {"float32": 1e-5, "bfloat16": 2e-2}[precision]:
        raise SystemExit(f"xopt and torch differ by {error:.2g}")


# -- linear layers -----------------------------------------------------------------------------------------------------
LAYERS = [
    ("deit-s qkv", 197, 384, 1152, "none"), ("deit-s proj", 197, 384, 384, "none"),
    ("deit-s up", 197, 384, 1536, "none"), ("deit-s down", 197, 1536, 384, "none"),
    ("deit-s proj", 197, 384, 384, "residual"), ("deit-s up", 197, 384, 1536, "gelu"),
    ("deit-s down", 197, 1536, 384, "residual"),
    ("bert-base qkv", 128, 768, 2304, "none"), ("bert-base proj", 128, 768, 768, "none"),
    ("bert-base up", 128, 768, 3072, "none"), ("bert-base down", 128, 3072, 768, "none"),
    ("bert-base proj", 128, 768, 768, "residual"), ("bert-base up", 128, 768, 3072, "gelu"),
    ("bert-base down", 128, 3072, 768, "residual"),
]  # fmt: skip
ROWS = (1, 2, 3, 5, 8, 13, 16, 29, 61, 127, 509)
"""Of "deit-s qkv" again: few rows, and numbers that no tile divides."""


def gemm_cases(threads: int) -> Iterator[Case]:
    for precision in PRECISIONS:
        for name, *shape, after in LAYERS:
            yield gemm_case(name, *shape, after, precision, threads)
        for rows in ROWS:
            yield gemm_case("rows", rows, 384, 1152, "none", precision, threads)


def gemm_case(name: str, m: int, k: int, n: int, after: str, precision: str, threads: int) -> Case:
    """A layer with a bias, and GELU or the sum with a residual (float32, as in whole models) after it."""
    from xopt.kernels import gemm
    from xopt.kernels.precision import STORAGE

    residual = after == "residual"
    form = "float32" if residual else RESULTS[precision]
    workload = gemm.Workload(
        (None,), k, n, bias=True, activation="gelu" if after == "gelu" else "none", residual=residual,
        operands=precision, results=(form,),
    )  # fmt: skip
    config, operands = gemm.heuristic(workload, isa()), torch_kernels.linear_operands(m, k, n)
    columns = partial(gemm.pack_columns, config=config, isa=isa())
    if precision == "int8":
        rng = np.random.default_rng(0)
        a, w = rng.integers(0, 256, (m, k)).astype(np.uint8), rng.integers(-127, 128, (k, n)).astype(np.int8)
        scale = columns(np.full(n, 1e-4, np.float32))
        inputs = [a, gemm.pack_weight(w, config, isa(), "int8"), scale, columns(gemm.offset(w, 128))]
    else:
        inputs = [stored(operands["a"], precision), gemm.pack_weight(operands["w"], config, isa(), precision)]
    inputs += [columns(operands["bias"]), *([operands["side"]] if residual else [])]
    inputs += [np.array([10, 128], np.float32)] if form == "uint8" else []
    xopt, result = compiled(gemm, workload, inputs, np.zeros((m, n), STORAGE[form]))
    in_torch = partial(torch_kernels.linear, m, k, n, after, precision, threads) if precision in IN_TORCH else None
    return Case(f"{name} {m}x{k}x{n} {after}", precision, 2 * m * k * n, xopt, result, in_torch=in_torch)


# -- attention ---------------------------------------------------------------------------------------------------------
TOKENS = (49, 64, 128, 197, 256, 512, 1024, 2048, 4096)
CAUSAL_TOKENS = (64, 256, 1024)
HEADS = ((12, 32), (12, 64), (8, 128))


def attention_cases(threads: int) -> Iterator[Case]:
    for precision in IN_TORCH:
        for heads, d in HEADS:
            for tokens in TOKENS:
                yield attention_case(tokens, heads, d, precision, threads)
            for tokens in CAUSAL_TOKENS:
                yield attention_case(tokens, heads, d, precision, threads, causal=True)


def attention_case(tokens: int, heads: int, d: int, precision: str, threads: int, causal: bool = False) -> Case:
    """Xopt reads the fused projection; torch gets heads already split, which costs it nothing here."""
    from xopt.kernels import attention
    from xopt.kernels.precision import STORAGE

    x = torch_kernels.projection(tokens, heads, d)
    operands = attention.fused(heads, heads, d, d)
    workload = attention.Workload(
        None, None, None, heads, heads, d, d, 1 / math.sqrt(d), causal=causal, operands=precision,
        results=(RESULTS[precision],), **operands,
    )  # fmt: skip
    out = np.zeros((1, tokens, heads * d), STORAGE[RESULTS[precision]])
    xopt, result = compiled(attention, workload, [stored(x, precision)], out)
    seen = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    return Case(
        f"{tokens} tokens {heads}x{d}{' causal' if causal else ''}",
        precision,
        4 * seen * heads * d,
        xopt,
        lambda: result().reshape(tokens, heads, d).transpose(1, 0, 2),
        in_torch=partial(torch_kernels.attention, tokens, heads, d, precision, causal, threads),
    )


# -- normalization -----------------------------------------------------------------------------------------------------
def norm_cases(threads: int) -> Iterator[Case]:
    for rows, width in ((197, 384), (128, 768), (1, 768)):
        yield norm_case(rows, width, threads)


def norm_case(rows: int, width: int, threads: int) -> Case:
    from xopt.kernels import norm

    x, *vectors = torch_kernels.norm_operands(rows, width)
    packed = [norm.pack_vector(vector, isa()) for vector in vectors]
    xopt, result = compiled(norm, norm.Workload((None,), width, 1e-5), [x, *packed], np.zeros_like(x))
    copy, in_torch = np.empty_like(x), partial(torch_kernels.norm, rows, width, threads)
    return Case(f"layer norm {rows}x{width}", "float32", 0, xopt, result, lambda: np.copyto(copy, x), in_torch)


CASES: dict[str, Callable[[int], Iterator[Case]]] = {
    "gemm": gemm_cases,
    "attention": attention_cases,
    "norm": norm_cases,
}


if __name__ == "__main__":
    main()
