"""The runtimes that people use today, as factories of runners for processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.data.dataset import symbol_sizes
from xopt.errors import InputError
from xopt.measure.isolated import Factory
from xopt.measure.latency import Runner

if TYPE_CHECKING:
    import onnx_ir as ir
    import openvino
    import torch

_EXTERNAL_DATA = "session.model_external_initializers_file_folder_path"
NAMES = ("onnxruntime", "openvino", "torch", "torch-compile")


def factories(
    path: Path,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int,
    names: Sequence[str] = NAMES,
    precision: str = "fp32",
) -> dict[str, Factory]:
    """How to load the model into each runtime.

    Args:
        path: the original ONNX file.
        feeds: the arrays that will be timed.
        threads: threads that each runtime may use.
        names: which runtimes.
        precision: of products: "fp32" or "bf16", which onnxruntime does not have on CPUs.

    Raises:
        InputError: E-OPTION, a name is not known.
    """
    hint, floats = {"fp32": ("f32", "float32"), "bf16": ("bf16", "bfloat16")}[precision]
    in_torch = partial(torch_runner, path, dict(feeds), threads, dtype=floats)
    known: dict[str, Factory] = {
        "onnxruntime": partial(onnxruntime_runner if precision == "fp32" else no_bfloat16, path, threads),
        "openvino": partial(openvino_runner, path, threads, hint),
        "torch": in_torch,
        "torch-compile": partial(in_torch, compiled=True),
    }
    return chosen(known, names)


def chosen(known: Mapping[str, Factory], names: Sequence[str]) -> dict[str, Factory]:
    """The factories that are named; InputError E-OPTION for a name that is not known."""
    for name in names:
        if name not in known:
            raise InputError(
                "E-OPTION", f"unknown runtime {name!r}", where="--peer", cure=f"known are {', '.join(known)}"
            )
    return {name: known[name] for name in names}


def no_bfloat16(path: Path, threads: int) -> Runner:
    """Say why ONNX Runtime is left out."""
    raise InputError("E-OPTION", "it has no bfloat16 on CPUs", where="onnxruntime")


def onnxruntime_runner(path: Path, threads: int) -> Runner:
    """ONNX Runtime's CPU provider, all graph optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(str(path).encode().decode(), options, providers=providers)
    except UnicodeEncodeError:  # it takes no such path; the folder, for external data, has another one
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            options.add_session_config_entry(_EXTERNAL_DATA, f"/proc/self/fd/{folder}")
            session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
        finally:
            os.close(folder)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds))))


def openvino_runner(model: Path | openvino.Model, threads: int, precision: str = "f32") -> Runner:
    """OpenVINO's CPU plugin on a file or a model of its own, tuned for latency.

    Left to itself it picks bfloat16 where the CPU has it; ``precision`` ("f32" or "bf16") says what floats are.
    """
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    source = str(model) if isinstance(model, Path) else model
    request = openvino.Core().compile_model(source, "CPU", options).create_infer_request()
    names = [output.get_any_name() for output in request.model_outputs]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = request.infer(dict(feeds), share_inputs=True)
        return dict(zip(names, results.values()))

    return run


def torch_runner(
    path: Path,
    feeds: Mapping[str, np.ndarray],
    threads: int,
    *,
    compiled: bool = False,
    dtype: str = "float32",
) -> Runner:
    """The model as ATen operators in eager torch, or through ``torch.compile``, for the shapes of ``feeds`` only.

    Shapes are fixed and constants folded first, so that torch gets one graph without breaks. ``dtype`` is that of all
    floating-point numbers inside; inputs and outputs are float32.
    """
    import torch

    from xopt.ir.fx import to_fx

    floats, model = getattr(torch, dtype), fixed(path, feeds)
    module = to_fx(model).eval().to(floats)
    if floats is torch.float32:
        return module_runner(module, model, feeds, threads, compiled=compiled)
    return module_runner(_converting(module, floats), model, feeds, threads, compiled=compiled)


def _converting(module: torch.nn.Module, floats: torch.dtype) -> Callable[..., list[torch.Tensor]]:
    """``module`` between conversions of its floating-point inputs to ``floats``, and of its outputs to float32."""

    def forward(*arrays: torch.Tensor) -> list[torch.Tensor]:
        results = module(*(x.to(floats) if x.is_floating_point() else x for x in arrays))
        values = list(results.values() if isinstance(results, Mapping) else results)
        return [x.float() if x.is_floating_point() else x for x in values]

    return forward


def module_runner(
    module: Callable[..., Any],
    model: ir.Model,
    feeds: Mapping[str, np.ndarray],
    threads: int,
    *,
    compiled: bool = False,
) -> Runner:
    """A torch module or function that takes and gives what ``model`` does, in order, for shapes of ``feeds`` only."""
    import torch

    torch.set_num_threads(threads)
    names = [str(value.name) for value in model.graph.inputs if value.name not in model.graph.initializers]
    outputs = [str(output.name) for output in model.graph.outputs]

    def forward(*arrays: Any) -> list[Any]:
        results = module(*arrays)
        return list(results.values() if isinstance(results, Mapping) else results)

    traced = _traced(forward, [torch.from_numpy(feeds[name]) for name in names])
    function = torch.compile(traced) if compiled else traced

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            results = function(*(torch.from_numpy(feeds[name]) for name in names))
        return {name: tensor.numpy() for name, tensor in zip(outputs, results)}

    return run


def _traced(forward: Callable[..., list[Any]], arrays: list[Any]) -> Callable[..., list[Any]]:
    """The ATen operators that ``forward`` runs on ``arrays``; itself where what it runs depends on numbers in them."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with torch.no_grad():
            traced: Callable[..., list[Any]] = make_fx(forward)(*arrays)
    except Exception:  # torch has several errors for what it cannot trace, and the module still runs
        return forward
    return traced


def fixed(path: Path, feeds: Mapping[str, np.ndarray]) -> ir.Model:
    """The model in canonical form for the shapes of ``feeds`` only, with what these decide folded."""
    from xopt.ir.canonical import canonicalize
    from xopt.ir.io import load
    from xopt.ir.shapes import bind_dims
    from xopt.pipeline.context import PassContext
    from xopt.pipeline.manager import PassManager
    from xopt.pipeline.registry import create

    model = load(path)
    canonicalize(model)
    bound = bind_dims(model, symbol_sizes(model, feeds))
    PassManager([create("fold-constants", {})], instruments=()).run(bound, PassContext())
    return bound
