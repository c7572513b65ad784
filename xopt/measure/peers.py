"""The runtimes that people use today, as runners for the same feeds; each is skipped with a reason if it cannot run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.data.dataset import symbol_sizes
from xopt.errors import InputError
from xopt.measure.latency import Runner

if TYPE_CHECKING:
    import onnx_ir as ir
    import openvino
    import torch

NAMES = ("onnxruntime", "openvino", "torch", "torch-compile")


@dataclass(frozen=True)
class Peers:
    """Runners by name, and why the others are not among them."""

    runners: dict[str, Runner]
    skipped: dict[str, str]


def prepare(
    path: Path,
    canonical: Callable[[], ir.Model],
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int,
    names: tuple[str, ...] = NAMES,
    precision: str = "fp32",
) -> Peers:
    """Load the model into each runtime and run it once.

    Args:
        path: the original ONNX file.
        canonical: makes the model in canonical form, for the runtimes that take a torch module.
        feeds: the arrays that will be timed.
        threads: threads that each runtime may use.
        names: which runtimes.
        precision: of products: "fp32" or "bf16", which onnxruntime does not have on CPUs.
    """
    hint, floats = {"fp32": ("f32", "float32"), "bf16": ("bf16", "bfloat16")}[precision]
    makers: dict[str, Callable[[], Runner]] = {
        "onnxruntime": lambda: onnxruntime_runner(path, threads),
        "openvino": lambda: openvino_runner(path, threads, hint),
        "torch": lambda: torch_runner(canonical(), feeds, threads, dtype=floats),
        "torch-compile": lambda: torch_runner(canonical(), feeds, threads, compiled=True, dtype=floats),
    }
    if precision == "bf16":
        found = load(makers, feeds, tuple(name for name in names if name != "onnxruntime"))
        found.skipped.update({name: "it has no bfloat16 on CPUs" for name in names if name == "onnxruntime"})
        return found
    return load(makers, feeds, names)


def load(makers: Mapping[str, Callable[[], Runner]], feeds: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Peers:
    """Make the named runners and run each once; InputError E-OPTION for a name that has no maker."""
    found = Peers({}, {})
    for name in names:
        if name not in makers:
            raise InputError(
                "E-OPTION", f"unknown runtime {name!r}", where="--peer", cure=f"known are {', '.join(makers)}"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runner = makers[name]()
                runner(feeds)
        except ImportError as error:
            found.skipped[name] = f"not installed ({error.name or error})"
        except Exception as error:  # each runtime has its own errors; a peer that fails is left out of the comparison
            found.skipped[name] = _first_line(error)
        else:
            found.runners[name] = runner
    return found


def onnxruntime_runner(path: Path, threads: int) -> Runner:
    """ONNX Runtime's CPU provider, all graph optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
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
    model: ir.Model,
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

    floats = getattr(torch, dtype)
    module = to_fx(fixed(model, feeds)).eval().to(floats)
    if floats is torch.float32:
        return module_runner(module, model, feeds, threads, compiled=compiled)
    return module_runner(_converting(module, floats), model, feeds, threads, compiled=compiled)


def _converting(module: torch.nn.Module, floats: torch.dtype) -> Callable[..., list[torch.Tensor]]:
    """``module`` between conversions of its floating-point inputs to ``floats``, and of its outputs to float32."""

    def forward(**arrays: torch.Tensor) -> list[torch.Tensor]:
        results = module(**{name: x.to(floats) if x.is_floating_point() else x for name, x in arrays.items()})
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
    """A torch module or function that takes and gives what ``model`` does, by name, for shapes of ``feeds`` only."""
    import torch

    torch.set_num_threads(threads)
    names = list(feeds)
    outputs = [str(output.name) for output in model.graph.outputs]

    def forward(*arrays: Any) -> list[Any]:
        results = module(**dict(zip(names, arrays)))
        return list(results.values() if isinstance(results, Mapping) else results)

    traced = _traced(forward, [torch.from_numpy(array) for array in feeds.values()])
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


def fixed(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> ir.Model:
    """The model for the shapes of ``feeds`` only, with what these decide folded."""
    from xopt.ir.shapes import bind_dims
    from xopt.pipeline.context import PassContext
    from xopt.pipeline.manager import PassManager
    from xopt.pipeline.registry import create

    bound = bind_dims(model, symbol_sizes(model, feeds))
    PassManager([create("fold-constants", {})], instruments=()).run(bound, PassContext())
    return bound


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]
