"""From a canonical model to an artifact: lower, run the passes, link, write weights and manifest."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.errors import InputError, XoptError
from xopt.folder import resolved
from xopt.ir.io import output_errors
from xopt.runtime.device import CPU
from xopt.runtime.manifest import (
    ALIGNMENT,
    Manifest,
    WeightInfo,
    digest,
    manifest_path,
    weights_path,
)
from xopt.runtime.trio import replacing
from xopt.scratch import outer
from xopt.targets.base import Target
from xopt.targets.refusals import reason_of, uncompiled, unsupported

if TYPE_CHECKING:
    import tvm

    from xopt.targets.lowering import Lowered

Array: TypeAlias = npt.NDArray[Any]

PIPELINE = "relax-cpu-1"
CODE_SPACE = 1 << 24
"""Bytes of free disk that the object files and the library of a model are given."""
LINKER_SPACE = 1 << 20
"""The same for the linker's temporary files."""


def cpu_pipeline() -> Any:
    """Passes from Relax operators to VM code for CPUs.

    Pointwise operators are fused and scheduled by us; reshapes stay views; memory is planned at compile time.
    """
    import tvm
    from tvm import relax

    from xopt.targets.legalizing import legalize
    from xopt.targets.ordering import sizes_first
    from xopt.targets.schedule import schedule_leftovers

    transform = relax.transform
    return tvm.transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            tvm.transform.module_pass(legalize, opt_level=0, name="Legalize"),
            transform.AnnotateTIROpPattern(),
            transform.FoldConstant(),
            transform.DeadCodeElimination(["main"]),
            transform.FuseOps(),
            transform.FuseTIR(),
            tvm.transform.module_pass(sizes_first, opt_level=0, name="SizesFirst"),
            transform.DeadCodeElimination(["main"]),
            tvm.transform.module_pass(schedule_leftovers, opt_level=0, name="ScheduleLeftovers"),
            tvm.transform.module_pass(_views, opt_level=0, name="Views"),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )


def _views(module: Any, context: Any) -> Any:
    """Kernels that only reshape become views; where TVM's analysis of sizes such as ``2 n - 1`` fails, none does."""
    import tvm
    from tvm import relax

    try:
        return relax.transform.RewriteDataflowReshape()(module)
    except tvm.error.InternalError:
        return module


def compile_model(
    model: ir.Model,
    target: Target,
    path: Path,
    dims: Mapping[str, int] | None = None,
    check: Callable[[Path], None] = lambda library: None,
) -> Path:
    """Compile a canonical model into the artifact ``path`` (a ``.so``), its weights and its manifest.

    Args:
        model: canonical form; not changed.
        target: where the artifact will run.
        path: the library to write; weights and manifest go next to it.
        dims: symbolic dimensions to fix by name; the others stay dynamic.
        check: is given the library when all three files are written, before they take their places; what it raises
            leaves the places as they were.

    Raises:
        InputError: E-UNSUPPORTED-OP, E-TOOLCHAIN, E-OUTPUT.
    """
    from xopt.ir import bind_dims, canonicalize

    if dims:
        model = bind_dims(model, dims)
        if any(node.op_type == "If" for node in model.graph.all_nodes()):
            canonicalize(model)  # sizes decide which branches are left
    with output_errors(path), replacing(resolved(path)) as library:
        lowered, infos, executable = _built(model, target, weights_path(library))
        _check_space(library.parent)
        target.link(executable, library)
        files = [library, weights_path(library)]
        manifest = Manifest(
            target=target.name,
            device=target.device,
            features=target.features(),
            versions={name: _version(name) for name in ("xopt", "apache-tvm", "apache-tvm-ffi")},
            digests={file.name: digest(file) for file in files},
            pipeline=PIPELINE,
            inputs=lowered.inputs,
            outputs=lowered.outputs,
            weights=tuple(infos),
            limits=lowered.limits,
            empty=tuple(sorted(lowered.empty)),
            segments=lowered.segments,
        )
        manifest_path(library).write_text(manifest.to_json())
        check(library)
    return path


def _built(model: ir.Model, target: Target, path: Path) -> tuple[Lowered, list[WeightInfo], Any]:
    """The model as Relax, its weights in the file ``path``, and its code.

    What TVM finds out when the graph is lowered is refused in the name of the node that it is about, or that node runs
    in onnxruntime.
    """
    from xopt.targets.culprits import culprit
    from xopt.targets.lowering import lower

    apart: frozenset[str] = frozenset()
    while True:
        with WeightFile(path) as weights:
            lowered = lower(model, target, weights.store, apart)
        try:
            return lowered, weights.infos, _generated(lowered.module, target)
        except (XoptError, MemoryError):
            raise
        except Exception as error:
            if not len(model.graph):
                raise uncompiled(reason_of(error)) from error
            node = culprit(model, partial(_fails, target=target, apart=apart))
            name = node.outputs[0].name or ""
            if not target.fallback or name in apart:
                raise unsupported(node, reason_of(error), target) from error
            apart |= {name}


def _generated(module: tvm.IRModule, target: Target) -> Any:
    """Code for a lowered model, or whatever TVM raises."""
    import tvm
    from tvm import relax

    from xopt.kernels import COMPILE_OPTIONS
    from xopt.targets.reproducible import in_order

    tvm_target = target.tvm_target()
    with tvm_target, tvm.transform.PassContext(**COMPILE_OPTIONS if target.device == CPU else {}):
        return relax.build(in_order(target.pipeline()(module)), tvm_target, relax_pipeline=None)


def _fails(part: ir.Model, target: Target, apart: frozenset[str]) -> bool:
    """Whether TVM does not compile a part of a model; what is refused by us is no failure of TVM."""
    from xopt.targets.lowering import lower

    try:
        _generated(lower(part, target, apart=apart).module, target)
    except (XoptError, MemoryError):
        return False
    except Exception:
        return True
    return False


def _check_space(folder: Path) -> None:
    """Refuse a full disk, or a limit on files, before LLVM or the linker meets it and ends the process.

    Raises:
        InputError: E-OUTPUT, for the folder or for the one for temporary files.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < CODE_SPACE:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(folder))
    if shutil.disk_usage(folder).free < CODE_SPACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    if shutil.disk_usage(outer()).free < LINKER_SPACE:
        cure = "set TMPDIR to a folder with space"
        raise InputError("E-OUTPUT", "no space left for temporary files", where=str(outer()), cure=cure)


def _version(package: str) -> str:
    """The installed version; a source tree that is not installed has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


class WeightFile:
    """Tensors one after the other, each at a multiple of 64 bytes; written as they come, none is kept in memory.

    What goes wrong is raised at the end of the ``with``: a full disk is no fault of the model that is being lowered.

    Attributes:
        infos: where each of them lies.
    """

    def __init__(self, path: Path) -> None:
        self.infos: list[WeightInfo] = []
        self._path = path
        self._error: OSError | None = None

    def __enter__(self) -> WeightFile:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._file.close()
        if self._error is not None and kind is None:
            raise self._error

    def store(self, name: str, array: Array) -> Array:
        """Append a tensor; returns the same one in the file."""
        if self._error is None:
            try:
                return self._stored(name, array)
            except OSError as error:
                self._error = error
        return array

    def _stored(self, name: str, array: Array) -> Array:
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.write(b"\0" * (offset - self._file.tell()))
        self.infos.append(WeightInfo(name, str(array.dtype), tuple(array.shape), offset, array.nbytes))
        if not array.size:
            return array
        self._file.write(np.ascontiguousarray(array).data.cast("B"))
        self._file.flush()
        return np.memmap(self._path, array.dtype, "r", offset, array.shape)
