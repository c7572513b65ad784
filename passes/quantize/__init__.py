"""Quantize: linear layers in 8 bits, weights and activations (W8A8), by static calibration without training.

    before   x ─▶ MatMul(W) ─▶ Add(b)        after   x ─▶ Q ─▶ DQ ─▶ MatMul(DQ(W int8)) ─▶ Add(b)

The result is standard ONNX in the QDQ form, which every runtime reads: QuantizeLinear and DequantizeLinear say what is
rounded, and a runtime with integer kernels multiplies integers. Activations are uint8, asymmetric, one scale a tensor,
over the range that they take on the calibration samples; weights int8, symmetric, one scale a column. Layers that read
one value share its pair. Norms and the residual stream stay float32; so does attention, unless ``attention`` asks
for its Q, K and V as well: uint8, one scale a head, Q around 128. xopt's kernel then multiplies integers there too,
for which it rounds the weights that softmax gives to 8 bits; other runtimes keep those.

Refuses  "already-quantized": the weight is dequantized from integers, or the operands of attention are.
         "not-float32", "weight-not-finite": the layer cannot be rounded to 8 bits.
         "input-not-finite": its input is NaN or infinite on a calibration sample.
         "four-dimensional": attention whose operands are no tensors of tokens by columns.
         "skipped": by option. "sensitive": it disturbs the outputs most, and ``share`` asks for that much in float.
Source   Jacob et al., CVPR 2018 (affine integer inference); Krishnamoorthi, arXiv 1806.08342 (per-channel weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from xopt.errors import InputError
from xopt.pipeline.base import Between, Effect, Pass, PassReport, Strength

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.context import PassContext

__all__ = ["Quantize"]


@dataclass(frozen=True)
class Quantize(Pass):
    """Multiply in 8-bit integers in linear layers: weights int8, activations uint8 by calibrated ranges.

    Attributes:
        bits: of weights and activations.
        share: share of the weights of all linear layers that are quantized. Below 1, the layers that disturb the
            outputs most for their size stay in float; it is measured for each layer on a batch of the samples.
        skip: layers to leave in float: ``first``, ``last``, or names of MatMuls, weights or attentions, with wildcards.
        attention: also Q, K and V of attention.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY

    bits: Annotated[int, Between(8, 8)] = 8
    share: Annotated[float, Between(0.0, 1.0), Strength(0.0)] = 1.0
    skip: tuple[str, ...] = ()
    attention: bool = False

    def requires(self, model: ir.Model, context: PassContext) -> None:
        if context.samples.synthetic:
            raise InputError(
                "E-DATA",
                "activations are calibrated on real samples, and there are none",
                where=f"pass {self.name}",
                cure="give some with --data (unlabelled inputs are enough)",
            )

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        from xopt.passes.quantize.work import quantize  # torch is loaded when a pass runs, not when it is named

        return quantize(self, model, context)
