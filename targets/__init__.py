"""Where a model runs: lowering and linking for each target.

``get("cpu")``, ``get("cpu:avx2")``, ``get("arm")``, ``get("cuda")`` name a machine; ``compile`` turns a canonical
model into an artifact for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from xopt.errors import InputError
from xopt.targets.base import Target

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["NAMES", "Target", "compile", "configured", "get", "variants"]

NAMES = ("cpu", "arm", "cuda")
"""The kinds of target; a variant may follow after a colon."""


def get(name: str) -> Target:
    """The target called ``name``, as in ``"cpu"``, ``"cpu:avx2"``, ``"arm:cortex-a76"``, ``"cuda:sm_80"``.

    Raises:
        InputError: E-TARGET, there is no such target or variant.
    """
    kind, _, variant = name.partition(":")
    if kind == "cpu":
        from xopt.targets.cpu import CpuTarget

        return CpuTarget(variant)
    if kind == "arm":
        from xopt.targets.arm import ArmTarget

        return ArmTarget(variant)
    if kind == "cuda":
        from xopt.targets.cuda import CudaTarget

        return CudaTarget(variant)
    raise InputError("E-TARGET", f"unknown target {name!r}", cure=f"use one of {', '.join(NAMES)}")


def variants() -> list[str]:
    """The names of targets that stand for machines other than this one too."""
    from xopt.targets.cpu import VARIANTS

    return [*(f"cpu:{variant}" for variant in VARIANTS), *NAMES[1:]]


def configured(
    target: Target | str,
    database: bool | str | Path = True,
    threads: int | None = None,
    precision: str = "fp32",
    fallback: bool = False,
) -> Target:
    """A target whose kernels are configured from a database: `xopt.targets.database.open_database`.

    Args:
        target: a target, of which this is a copy, or its name.
        database: True for what the user has tuned and what is shipped, a path to replace the former, False for none.
        threads: how many the compiled model will be run on.
        precision: of linear layers and attention: "fp32", or "bf16" (their operands; sums are float32).
        fallback: let onnxruntime run what cannot be compiled, inside the compiled model's run.

    Raises:
        InputError: E-OPTION, the precision is unknown, or it or the fallback is not to be had on the target.
    """
    from copy import copy

    _load_tvm()
    from xopt.targets.database import open_database
    from xopt.targets.formats import PRECISIONS

    if not isinstance(target, (str, Target)):
        raise InputError("E-TARGET", f"{type(target).__name__} is no target", cure=f"use one of {', '.join(NAMES)}")
    machine = get(target) if isinstance(target, str) else copy(target)
    if precision not in PRECISIONS:
        raise InputError("E-OPTION", f"unknown precision {precision!r}", cure=f"use one of {', '.join(PRECISIONS)}")
    if precision != "fp32" and machine.isa() is None:
        raise InputError("E-OPTION", f"no kernels at {precision} for the target {machine.name}", cure="use fp32")
    if fallback and not machine.runs_segments:
        raise InputError("E-OPTION", f"onnxruntime does not run beside code for {machine.name}", cure="omit fallback")
    machine.fallback = fallback
    machine.configs = open_database(database, threads)
    machine.precision = precision
    return machine


def compile(
    model: ir.Model,
    target: Target | str,
    path: Path,
    *,
    dims: Mapping[str, int] | None = None,
    check: Callable[[Path], None] = lambda library: None,
) -> Path:
    """Compile a canonical model into an artifact: ``path`` (a ``.so``), its weights and its manifest beside it.

    Args:
        model: canonical form; not changed.
        target: a target or its name.
        path: the library to write, such as ``out/model.so``.
        dims: symbolic dimensions to fix by name; the others stay dynamic.
        check: is given the finished library before it and its files take their places; see `build.compile_model`.

    Returns:
        ``path``.

    Raises:
        InputError: E-UNSUPPORTED-OP, E-TOOLCHAIN, E-TARGET, E-OUTPUT.
    """
    _load_tvm()
    from xopt.targets.build import compile_model

    return compile_model(model, get(target) if isinstance(target, str) else target, Path(path), dims, check)


def _load_tvm() -> None:
    """Before anything that imports it: without torch, which compiling does not need."""
    from xopt.runtime.lean import without_torch

    with without_torch():
        import_module("tvm")
    import tvm_ffi

    for kind in (KeyboardInterrupt, SystemExit, MemoryError):  # raised below TVM they would arrive as a RuntimeError
        tvm_ffi.register_error(kind)
