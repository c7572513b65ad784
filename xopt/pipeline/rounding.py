"""How far rounding moves the outputs of a model: by its structure, or as noise shows where it magnifies rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from xopt.ir.edit import constant, input_at
from xopt.ir.walk import shape_of

SAFETY = 8.0
"""How far above the expected rounding error an exact pass may go: a maximum over many elements against an RMS."""
UNITS = 4
"""Of the last place, that noise moves a weight by at most."""
MOST = 0.02
"""Relative difference beyond which nothing is called rounding."""
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


def rounding_bound(model: ir.Model) -> float:
    """How far rounding alone may move an output when a graph is computed in another order, relative to its scale.

    A sum of K rounded terms has a relative RMS error of about ``eps * sqrt(K)``, and the errors of the nodes in a
    row are independent, so they add in quadrature: ``SAFETY * eps * sqrt(sum of K over all nodes)``, with K the
    depth of a contraction and 1 for any other node.
    """
    terms = sum(_terms(node) for node in model.graph.all_nodes())
    values = [*model.graph.initializers.values(), *model.graph.inputs]
    values += [output for node in model.graph.all_nodes() for output in node.outputs]
    eps = max([ir_eps(value.dtype) for value in values if value.dtype is not None], default=0.0)
    return SAFETY * max(eps, float(np.finfo(np.float32).eps)) * float(np.sqrt(max(terms, 1)))


class Magnified:
    """What rounding explains of each output's difference where the bound by structure does not, found on demand.

    A model that divides by numbers near zero, or subtracts what is nearly equal, magnifies rounding; noise in the last
    places of its weights as well, which tells by how much. (Stochastic arithmetic: Vignes, "A stochastic arithmetic
    for reliable scientific computation", 1993.)

    Args:
        model: the one whose outputs are expected.
        differences: relative difference of each output of another model from those.
    """

    def __init__(self, model: ir.Model, differences: Callable[[ir.Model], Mapping[str, float]]) -> None:
        self.model, self.differences = model, differences
        self._found: dict[str, float] | None = None

    def explains(self, output: str, relative: float) -> bool:
        """Whether rounding may move ``output`` by ``relative`` of its largest magnitude."""
        if relative > MOST:
            return False
        if self._found is None:
            runs = [self.differences(with_noise(self.model, seed)) for seed in range(2)]
            self._found = {name: SAFETY * max(run.get(name, 0.0) for run in runs) for name in runs[0]}
        return relative <= self._found.get(output, 0.0)


def with_noise(model: ir.Model, seed: int = 0) -> ir.Model:
    """New model whose floating-point weights are off by up to ``UNITS`` in the last place."""
    random, noisy = np.random.default_rng(seed), model.clone()
    for value in noisy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in FLOATS:
            array = tensor.numpy()
            noise = 1 + random.uniform(-UNITS, UNITS, array.shape) * float(ir_eps(tensor.dtype))
            value.const_value = ir.tensor((array * noise).astype(array.dtype), dtype=tensor.dtype, name=value.name)
    return noisy


def ir_eps(dtype: ir.DataType) -> float:
    """Distance from 1 to the next number of a floating type; 0 for the others."""
    return {
        ir.DataType.BFLOAT16: 2.0**-7,
        ir.DataType.FLOAT16: 2.0**-10,
        ir.DataType.FLOAT: 2.0**-23,
        ir.DataType.DOUBLE: 2.0**-52,
    }.get(dtype, 0.0)


def _terms(node: ir.Node) -> int:
    """Depth of the sum that each output element of ``node`` is; as much for what else loses digits.

    A Fourier transform of n values may turn by n circles in all (onnxruntime's does, for lengths that are no powers of
    two), which loses as much as n roundings in a row: n^2 at random.
    """
    if node.op_type in ("DFT", "STFT") and node.inputs[0] is not None:
        return 4 * _transformed(node) ** 2
    if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
        return 1
    weight = node.inputs[1]
    shape = weight.shape.numpy() if weight is not None and weight.shape is not None and weight.shape.is_static() else ()
    if len(shape) < 2:
        return 1
    return int(shape[-2]) if node.op_type != "Conv" else int(np.prod(shape[1:]))


def _transformed(node: ir.Node) -> int:
    """How many values a Fourier transform is of, as far as that is known; 1 otherwise."""
    if node.op_type == "STFT":
        length, window = constant(input_at(node, 3)), shape_of(input_at(node, 2))
        return int(length.reshape(-1)[0]) if length is not None and length.size else (window or [1])[0] or 1
    shape = shape_of(node.inputs[0])
    return max([size or 1 for size in shape or ()][:-1], default=1)
