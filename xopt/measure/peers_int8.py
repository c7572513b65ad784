"""The runtimes that people use today, at 8 bits, each by the way that its makers recommend for transformers.

onnxruntime-qdq       the file that the pass ``quantize`` wrote
onnxruntime-dynamic   the float file through ``quantize_dynamic``: int8 weights, activations quantized as it runs
openvino-qdq          the file that the pass ``quantize`` wrote
openvino-nncf         the float file through ``nncf.quantize`` for transformers, calibrated on samples
openvino-nncf-bf16    the same, with bfloat16 where it is not int8
torch-dynamic         the linear layers of the torch module through ``quantize_dynamic``
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.measure import peers
from xopt.measure.isolated import Factory
from xopt.measure.latency import Runner

if TYPE_CHECKING:
    import openvino

    from xopt.data.dataset import Dataset

NAMES = (
    "onnxruntime-qdq",
    "onnxruntime-dynamic",
    "openvino-qdq",
    "openvino-nncf",
    "openvino-nncf-bf16",
    "torch-dynamic",
)


def factories(
    path: Path,
    quantized: Path,
    feeds: Mapping[str, np.ndarray],
    samples: Dataset,
    *,
    threads: int,
    names: Sequence[str] = NAMES,
) -> dict[str, Factory]:
    """How to quantize the model for each runtime and load it.

    Args:
        path: the float ONNX file.
        quantized: the same in the QDQ form.
        feeds: the arrays that will be timed.
        samples: what NNCF calibrates on; in batches of the size of ``feeds``.
        threads: threads that each runtime may use.
        names: which of :data:`NAMES`.
    """
    by_nncf = partial(openvino_nncf, path, dict(feeds), samples, threads)
    known: dict[str, Factory] = {
        "onnxruntime-qdq": partial(peers.onnxruntime_runner, quantized, threads),
        "onnxruntime-dynamic": partial(onnxruntime_dynamic, path, threads),
        "openvino-qdq": partial(peers.openvino_runner, quantized, threads),
        "openvino-nncf": by_nncf,
        "openvino-nncf-bf16": partial(by_nncf, "bf16"),
        "torch-dynamic": partial(torch_dynamic, path, dict(feeds), threads),
    }
    return peers.chosen(known, names)


def write_quantized(path: Path, samples: Dataset, output: Path, attention: bool = False) -> None:
    """The float file ``path`` through the pass ``quantize``, in standard ONNX, as ``output``."""
    import xopt.ir
    from xopt.pipeline.context import PassContext
    from xopt.pipeline.manager import PassManager
    from xopt.pipeline.registry import create

    model = xopt.ir.load(path)
    xopt.ir.canonicalize(model)
    chosen = create("quantize", {"attention": attention})
    PassManager([chosen], instruments=()).run(model, PassContext(calibration=samples))
    xopt.ir.save(xopt.ir.export(model), output)


def onnxruntime_dynamic(path: Path, threads: int) -> Runner:
    """ONNX Runtime on the float file with int8 weights; each product quantizes its input by the range of that input."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="xopt-") as folder:
        written = Path(folder) / "int8.onnx"
        model = onnx.load(path)
        del model.graph.value_info[:]  # it turns weights around, and then stumbles over their old shapes
        quantize_dynamic(model, written, weight_type=QuantType.QInt8)
        return peers.onnxruntime_runner(written, threads)


def openvino_nncf(
    path: Path, feeds: Mapping[str, np.ndarray], samples: Dataset, threads: int, precision: str = "f32"
) -> Runner:
    """OpenVINO on what NNCF makes of the float file, the rest in ``precision``."""
    return peers.openvino_runner(nncf_model(path, feeds, samples), threads, precision)


def nncf_model(path: Path, feeds: Mapping[str, np.ndarray], samples: Dataset) -> openvino.Model:
    """What NNCF makes of the float file by its defaults for transformers: SmoothQuant and fast bias correction.

    Args:
        path: the float file.
        feeds: their first axis is the size of a batch.
        samples: what is calibrated on.
    """
    import nncf
    import openvino

    size = len(next(iter(feeds.values())))
    batches = [batch for batch in samples.batches(size) if len(next(iter(batch.values()))) == size]
    return nncf.quantize(
        openvino.Core().read_model(path),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )


def torch_dynamic(path: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Runner:
    """Eager torch with int8 weights in linear layers; each quantizes its input by the range of that input."""
    import torch

    from xopt.ir.fx import to_fx

    model = peers.fixed(path, feeds)
    view = to_fx(model).eval()
    _modules_for_products(view)
    layers = torch.ao.quantization.quantize_dynamic(view, {torch.nn.Linear}, dtype=torch.qint8)
    return peers.module_runner(layers, model, feeds, threads)


def _modules_for_products(view: Any) -> None:
    """Put an ``nn.Linear`` in the place of each product with a matrix, with the bias that alone reads it."""
    import torch

    products = [node for node in view.graph.nodes if node.target is torch.matmul and node.args[1].op == "get_attr"]
    for index, node in enumerate(products):
        weight = view.get_parameter(node.args[1].target)
        if weight.ndim != 2:
            continue
        add, bias = _bias_after(view, node, weight.shape[1])
        layer = torch.nn.Linear(*weight.shape, bias=bias is not None)
        layer.weight = torch.nn.Parameter(weight.detach().t().contiguous())
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach())
        view.add_submodule(f"linear_{index}", layer)
        with view.graph.inserting_after(add):
            call = view.graph.call_module(f"linear_{index}", (node.args[0],))
        add.replace_all_uses_with(call)
    view.graph.eliminate_dead_code()
    view.recompile()


def _bias_after(view: Any, product: Any, width: int) -> tuple[Any, Any]:
    """The node that computes the layer's output, and its bias; the product itself and None without one."""
    import torch

    readers = list(product.users)
    if len(readers) == 1 and readers[0].target is torch.add and readers[0].args[0] is product:
        other = readers[0].args[1]
        bias = view.get_parameter(other.target) if getattr(other, "op", "") == "get_attr" else None
        if bias is not None and tuple(bias.shape) == (width,):
            return readers[0], bias
    return product, None
