"""The pass at work: judge the layers, calibrate, leave out the sensitive ones, rewrite the rest."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from xopt.ir import edit
from xopt.ir.fx import to_fx
from xopt.passes.quantize import Quantize
from xopt.passes.quantize.layers import Layer, linear_layers, named, quantize_layers
from xopt.passes.quantize.ranges import ranges
from xopt.passes.quantize.scales import Scale, activation_scale
from xopt.passes.quantize.sensitivity import disturbances, most_sensitive
from xopt.pipeline.base import PassReport
from xopt.pipeline.context import PassContext
from xopt.recover.samples import batches


def quantize(options: Quantize, model: ir.Model, context: PassContext) -> PassReport:
    """Rewrite the linear layers of ``model`` in place."""
    report = PassReport(options)
    layers = linear_layers(model.graph)
    reasons = {layer: layer.problem() for layer in layers}
    reasons |= dict.fromkeys(named(layers, options.skip), "skipped")
    open_ = [layer for layer in layers if reasons[layer] is None]
    scales = _calibrate(options, model, context, open_, reasons)
    chosen = [layer for layer in layers if report.accepts(layer, reasons[layer])]
    quantize_layers(model.graph, chosen, scales)
    report.rewrote(count=len(chosen))
    edit.remove_dead(model)
    report.numbers = {
        "values": len({layer.input for layer in chosen}),
        "weights": len({layer.weight for layer in chosen}),
    }
    return report


def _calibrate(
    options: Quantize,
    model: ir.Model,
    context: PassContext,
    layers: list[Layer],
    reasons: dict[Layer, str | None],
) -> Mapping[ir.Value, Scale]:
    """Scales of the layers' inputs; notes in ``reasons`` which layers must not be quantized after all."""
    if not layers:
        return {}
    view = to_fx(model)
    data = batches(model, view, context.samples)
    inputs = {str(layer.input.name): layer.input for layer in layers}
    seen = ranges(view, data, list(inputs))
    reasons |= {layer: "input-not-finite" for layer in layers if not seen[str(layer.input.name)].finite}
    finite = [layer for layer in layers if reasons[layer] is None]
    scales = {name: activation_scale(seen[name].low, seen[name].high) for name in inputs if seen[name].finite}
    if options.share < 1 and finite:
        errors = disturbances(view, data[len(data) // 2], finite, scales)
        reasons |= dict.fromkeys(most_sensitive(finite, errors, options.share), "sensitive")
    return {value: scales[name] for name, value in inputs.items() if name in scales}
