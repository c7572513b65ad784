"""How much each layer alone disturbs the outputs when it is quantized, and which layers to leave in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from xopt.ir.fx import run_with_values
from xopt.passes.quantize.layers import Layer, array
from xopt.passes.quantize.scales import LEVELS, Scale, quantized_weight
from xopt.recover.samples import Batch


def most_sensitive(layers: Sequence[Layer], disturbance: Sequence[float], share: float) -> list[Layer]:
    """The layers that disturb most for their size, until the others hold at most ``share`` of all weights."""
    order = sorted(zip(layers, disturbance), key=lambda pair: pair[1] / pair[0].size, reverse=True)
    left = sum(layer.size for layer in layers)
    allowed = share * left
    chosen = []
    for layer, _ in order:
        if left <= allowed:
            break
        chosen.append(layer)
        left -= layer.size
    return chosen


def disturbances(
    view: fx.GraphModule, batch: Batch, layers: Sequence[Layer], scales: Mapping[str, Scale]
) -> list[float]:
    """For each layer: squared change of the outputs relative to their squares, summed over outputs, on one batch."""
    with torch.no_grad():
        expected = run_with_values(view, batch.feeds)
        return [_disturbance(view, batch, expected, one, scales[str(one.input.name)]) for one in layers]


def _disturbance(
    view: fx.GraphModule, batch: Batch, expected: Mapping[str, Tensor], layer: Layer, scale: Scale
) -> float:
    integers, columns = quantized_weight(array(layer.weight))
    weight = torch.from_numpy(integers).float() * torch.from_numpy(columns)
    seen: dict[str, Tensor] = {}

    def remember(value: Tensor) -> Tensor:
        seen["x"] = value
        return value

    hooks = {
        str(layer.input.name): remember,
        str(layer.node.outputs[0].name): lambda _: rounded(seen["x"], scale) @ weight,
    }
    actual = run_with_values(view, batch.feeds, None, hooks)
    return sum(_relative(batch, name, actual[name], wanted) for name, wanted in expected.items())


def rounded(x: Tensor, scale: Scale) -> Tensor:
    """``x`` after QuantizeLinear and DequantizeLinear."""
    step, zero = float(scale.scale), float(scale.zero)
    return ((x / step).round() + zero).clamp(0, LEVELS).sub(zero) * step


def _relative(batch: Batch, name: str, actual: Tensor, wanted: Tensor) -> float:
    if not wanted.is_floating_point():
        return 0.0
    before, after = batch.rows(name, wanted), batch.rows(name, actual)
    return float((after - before).square().sum() / before.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
