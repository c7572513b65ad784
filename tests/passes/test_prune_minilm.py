"""Pruning a real model on real sentences: MiniLM-L6 on STS Benchmark, without labels or training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.acceptance import stsb
from tests.passes.pruning import kept, run
from xopt.data.dataset import Dataset
from xopt.ir.cost import cost
from xopt.ir.fx import to_fx
from xopt.ir.structure import transformer_blocks
from xopt.passes.prune_heads.optin import optin
from xopt.passes.prune_heads.replay import Replay
from xopt.passes.prune_heads.scores import fisher, gate_gradients
from xopt.passes.prune_heads.sites import Site, find_sites
from xopt.recover.samples import batches
from xopt.runtime.reference import ReferenceSession

#: Spearman on the test split after keeping 90, 75, 60 and 50 % of the heads and neurons of each layer: the better of a
#: second-order score with ridge compensation and of magnitude without. The keys are the multiply-accumulates that
#: these cuts (11, 9, 7, 6 heads; 1382, 1152, 922, 768 neurons) leave of all heads and neurons at 128 tokens.
BASELINE = {0.9059: 0.8252, 0.75: 0.8178, 0.594: 0.8037, 0.5: 0.7790}


def sentences(shared_data: Path, minilm_folder: Path, count: int) -> Dataset:
    """Unlabelled sentences of the training split, drawn at random."""
    pairs, _ = stsb.read(shared_data, "train")
    texts = [sentence for pair in pairs for sentence in pair]
    chosen = [texts[index] for index in np.random.default_rng(0).permutation(len(texts))[:count]]
    tokens = stsb.tokenizer(minilm_folder)(chosen, padding=True, truncation=True, max_length=128)
    return Dataset({name: np.array(tokens[name], dtype=np.int64) for name in ("input_ids", "attention_mask")})


@pytest.fixture(scope="module")
def few(shared_data: Path, minilm_folder: Path) -> Dataset:
    return sentences(shared_data, minilm_folder, 64)


def test_summary(minilm: ir.Model, few: Dataset) -> None:
    before = cost(minilm).macs
    report = run(minilm, few, keep=0.5, ffn=True)
    heads, neurons = kept(report, "heads"), kept(report, "neurons")
    assert report.matched == 12
    assert not report.refused
    assert len(heads) == len(neurons) == 6
    # The last block makes the output: it keeps its heads and most neurons; the blocks in the middle lose most.
    assert heads[5] == 12
    assert max(heads[1:5]) <= 8
    assert neurons[5] == max(neurons) > 1200
    assert max(neurons[1:4]) < 768
    assert 0.495 < report.numbers["kept_share"] <= 0.5
    assert report.numbers["error_compensated"] < 0.5 * report.numbers["error_plain"]
    # Heads and neurons are all of this model but the pooler: 384^2 for one token.
    assert report.numbers["macs_after"] <= 0.5 * (before - 384**2) + 384**2


@pytest.mark.slow
def test_scores_agree_on_what_matters(minilm: ir.Model, few: Dataset) -> None:
    from scipy.stats import spearmanr

    view = to_fx(minilm)
    data = batches(minilm, view, few.take(16))
    sites = [site for site, _ in find_sites(minilm, ffn=False, tile=8, dims={}) if isinstance(site, Site)]
    outputs, features = ["last_hidden_state"], [str(block.output.name) for block in transformer_blocks(minilm)]
    by_fisher = fisher(gate_gradients(view, data, sites, outputs, ridge=None, seed=0))
    by_optin = optin(view, data[0], sites, features, outputs, seed=0)
    assert all((scores >= 0).all() for scores in by_optin)
    assert spearmanr(np.concatenate(by_fisher), np.concatenate(by_optin)).statistic > 0.5


def test_replay_is_the_model(minilm: ir.Model, few: Dataset) -> None:
    view = to_fx(minilm)
    data = batches(minilm, view, few.take(40))
    replay = Replay(view, [batch.feeds for batch in data])
    last = minilm.graph.outputs[0]
    replay.complete(last)
    values = replay.values(last)
    assert values is not None
    session = ReferenceSession(minilm)
    for batch, value in zip(data, values):
        wanted = session.run({name: feed.numpy() for name, feed in batch.feeds.items()})[str(last.name)]
        assert batch.valid is not None
        np.testing.assert_allclose(value.detach()[batch.valid], wanted[batch.valid.numpy()], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", list(BASELINE))
def test_pruned_beats_the_baseline_at_equal_cost(
    keep: float, minilm: ir.Model, shared_data: Path, minilm_folder: Path
) -> None:
    report = run(minilm, sentences(shared_data, minilm_folder, 400), keep=keep, ffn=True)
    assert report.numbers["kept_share"] <= keep
    pairs, scores = stsb.read(shared_data, "test")
    found = stsb.spearman(ReferenceSession(minilm).run, stsb.tokenizer(minilm_folder), pairs, scores)
    print(f"{keep:g}: {found:.4f}, {report.numbers}")
    assert found > BASELINE[keep]
