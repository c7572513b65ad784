"""The pass at work: judge the layers, calibrate, leave out the sensitive ones, rewrite the rest."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from xopt.ir import edit
from xopt.ir.fx import to_fx
from xopt.passes.quantize import Quantize, attention
from xopt.passes.quantize.attention import Operands, operands_of_attention, quantize_operands
from xopt.passes.quantize.layers import Layer, linear_layers, named, quantize_layers
from xopt.passes.quantize.ranges import Range, ranges
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
    attentions = operands_of_attention(model.graph) if options.attention else []
    problems = {one: "skipped" if attention.named(one, options.skip) else one.problem() for one in attentions}
    sound = [operands for operands in attentions if problems[operands] is None]
    scales, seen = _calibrate(options, model, context, open_, reasons, sound)
    for operands in sound:
        if not all(seen[str(value.name)].finite for value in operands.values):
            problems[operands] = "input-not-finite"
    chosen = [layer for layer in layers if report.accepts(layer, reasons[layer])]
    quantize_layers(model.graph, chosen, scales)
    report.rewrote(count=len(chosen))
    for operands in attentions:
        if report.accepts(operands, problems[operands]):
            quantize_operands(operands, seen)
            report.rewrote(operands)
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
    attentions: list[Operands],
) -> tuple[Mapping[ir.Value, Scale], Mapping[str, Range]]:
    """Scales of the layers' inputs, and the ranges of all that is to be quantized.

    Notes in ``reasons`` which layers must not be quantized after all.
    """
    if not layers and not attentions:
        return {}, {}
    view = to_fx(model)
    data = batches(model, view, context.samples)
    inputs = {str(layer.input.name): layer.input for layer in layers}
    operands = [str(value.name) for one in attentions for value in one.values]
    seen = ranges(view, data, [*dict.fromkeys([*inputs, *operands])])
    reasons |= {layer: "input-not-finite" for layer in layers if not seen[str(layer.input.name)].finite}
    finite = [layer for layer in layers if reasons[layer] is None]
    scales = {name: activation_scale(seen[name].low, seen[name].high) for name in inputs if seen[name].finite}
    if options.share < 1 and finite:
        errors = disturbances(view, data[len(data) // 2], finite, scales)
        reasons |= dict.fromkeys(most_sensitive(finite, errors, options.share), "sensitive")
    return {value: scales[name] for name, value in inputs.items() if name in scales}, seen
