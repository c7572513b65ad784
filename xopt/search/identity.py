"""What a step of an optimization depends on, as one digest: equal only where the step would come out the same.

That is the model with everything in it, the samples, the options, the configurations of the kernels, the machine whose
latency decides, the packages, and the code: that of xopt, of third parties' passes and of the caller's metric.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import sys
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xopt.measure import machine
from xopt.targets.database import cpu_model

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.data.dataset import Dataset
    from xopt.search.job import Job
    from xopt.targets.base import Target


def of_job(job: Job) -> str:
    """Digest of everything that all steps of a job depend on."""
    return _hashed(
        {
            "model": of_model(job.model),
            "calibration": _of_data(job.calibration),
            "evaluation": _of_data(job.evaluation),
            "metric": [job.metric.name, of_code(type(job.metric)), of_code(getattr(job.metric, "function", None))],
            "max_drop": job.max_drop,
            "target": _of_target(job.target),
            "seed": job.seed,
            "threads": job.threads,
            "feeds": {name: _of_array(array) for name, array in job.feeds.items()},
            "dims": dict(job.dims),
            "optional": job.optional,
            "verify": job.verify,
            "machine": [cpu_model(), len(machine.usable_cpus()), sys.version],
            "versions": machine.versions(),
            "xopt": [_of_package(name) for name in ("xopt", "xopt.passes", "xopt.kernels", "xopt.targets")],
        }
    )


def of_model(model: ir.Model) -> str:
    """SHA-256 over the graph and all weights in their order, in whatever files they lie."""
    import onnx_ir as ir

    state = hashlib.sha256()
    bare = model.clone()
    for label, tensor in _tensors(bare):
        state.update(f"{label!r} {tensor.dtype} {list(tensor.shape.numpy())} ".encode())
        strings = tensor.dtype == ir.DataType.STRING
        state.update(repr(tensor.numpy().tolist()).encode() if strings else tensor.tobytes())
    for graph in bare.graphs():
        for name, value in list(graph.initializers.items()):
            if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
                value.const_value = ir.tensor([0], dtype=ir.DataType.INT64, name=name)  # small, whatever the weight is
    state.update(ir.to_proto(bare).SerializeToString(deterministic=True))
    return state.hexdigest()


def _tensors(model: ir.Model) -> Iterator[tuple[str, Any]]:
    """Every tensor of a model with its name: weights, and those in attributes."""
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield str(value.name), value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.name, attribute.value
                elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                    yield from ((attribute.name, tensor) for tensor in attribute.value)


def of_code(thing: Any) -> str:
    """Digest of the code of a class or a function, with the whole package or file that it is from.

    What cannot be told (a closure, a bound method, something typed at a prompt) is equal to nothing.
    """
    if thing is None:
        return ""
    module = sys.modules.get(thing.__module__)
    if isinstance(thing, types.FunctionType) and thing.__closure__ is None:
        file = thing.__code__.co_filename
    else:
        file = getattr(module, "__file__", None) or "" if isinstance(thing, type) else ""
    if not os.path.isfile(file):
        return uuid.uuid4().hex
    top = sys.modules.get(thing.__module__.partition(".")[0])
    whole = _of_package(top.__name__) if top is not None and hasattr(top, "__path__") else ""
    return f"{thing.__module__}.{thing.__qualname__} {hashlib.sha256(Path(file).read_bytes()).hexdigest()} {whole}"


@functools.cache
def _of_package(name: str) -> str:
    """Digest of all Python files of a package; links to folders, as a checkout of xopt has them, are not followed."""
    state = hashlib.sha256()
    spec = importlib.util.find_spec(name)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).rglob("*.py")):
            state.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            state.update(path.read_bytes())
    return state.hexdigest()


def _of_target(target: Target) -> list[str]:
    """The target, and the configurations that its kernels may be given."""
    records = [repr(record) for record in getattr(target.configs, "records", ())]
    configs = [type(target.configs).__name__, str(getattr(target.configs, "threads", "")), _hashed(records)]
    return [target.name, target.precision, str(target.fallback), *target.features(), *configs]


def _of_data(data: Dataset) -> list[Any]:
    arrays = {name: _of_array(array) for name, array in data.inputs.items()}
    return [data.name, data.synthetic, arrays, None if data.labels is None else _of_array(data.labels)]


def _of_array(array: Any) -> list[Any]:
    import numpy as np

    plain = np.ascontiguousarray(array)
    return [str(plain.dtype), list(array.shape), hashlib.sha256(plain.reshape(-1).view(np.uint8).data).hexdigest()]


def _hashed(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
