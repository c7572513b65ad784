"""Variants of the x86 target: what their code may use, uses, and computes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.ir import builders
from xopt import targets
from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.passes import Quantize
from xopt.pipeline.context import PassContext
from xopt.runtime.session import Session

VARIANTS = {
    "cpu:avx2": ("ymm", "vpmaddwd"),
    "cpu:avx2-vnni": ("ymm", "vpdpbusd"),
    "cpu:avx512": ("zmm", "vpmaddwd"),
    "cpu:avx512-vnni": ("zmm", "vpdpbusd"),
    "cpu:avx512-bf16": ("zmm", "vpdpbusd"),
}
"""Registers, and the instruction that multiplies bytes."""


def instructions(path: Path) -> set[tuple[str, str]]:
    """Name and last operand's kind of every instruction of a library."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    lines = (line.partition("\t")[2].replace("{vex} ", "").split() for line in text.stdout.splitlines())
    return {(words[0], words[-1].rpartition("%")[2][:3]) for words in lines if len(words) > 1}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory):
    """A model with layers and attention at 8 bits, inputs, and what this machine's own code makes of them."""
    model = builders.vit(layers=1, width=32, heads=2, fused=True)
    feeds = builders.feeds(model, {"batch": 2})
    Quantize(attention=True).run(model, PassContext(calibration=Dataset(feeds)))
    path = targets.compile(model, "cpu", tmp_path_factory.mktemp("native") / "model.so")
    return model, feeds, Session.load(path).run(feeds)


QUICK = ("cpu:avx2", "cpu:avx512-vnni")
"""The others are slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_code_of_a_variant(quantized, name: str, tmp_path: Path) -> None:
    model, feeds, native = quantized
    path = targets.compile(model, name, tmp_path / "model.so")
    registers, product = VARIANTS[name]
    used = instructions(path)
    assert (product, registers) in used
    assert registers == "zmm" or not {kind for _, kind in used} & {"zmm", "k1"}
    assert ("vpdpbusd" in {word for word, _ in used}) == (product == "vpdpbusd")
    if not targets.get(name).can_run():
        pytest.skip(f"this machine cannot run {name}")
    for key, found in Session.load(path).run(feeds).items():
        # Sums of integers are exact everywhere; what follows is float32, in which a value may cross a step of a grid.
        assert np.abs(found - native[key]).max() < 0.02 * np.abs(native[key]).max()


@pytest.mark.parametrize("name", VARIANTS)
def test_features_are_those_of_the_instruction_set(name: str) -> None:
    target = targets.get(name)
    isa, features = target.isa(), set(target.features())
    assert isa is not None and f"cpu:{isa.name}" == name
    assert ("avx512f" in features) == (isa.lanes == 16)
    assert bool(features & {"avx_vnni", "avx512_vnni"}) == isa.vnni
    assert ("avx512_bf16" in features) == isa.bf16


def test_this_machine_takes_the_best_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIANTS:
        variant = targets.get(name)
        with monkeypatch.context() as patch:
            patch.setattr("xopt.targets.cpu.cpu_features", lambda: set(variant.features()))  # noqa: B023
            assert targets.get("cpu").isa() == variant.isa()


def test_a_machine_without_avx2_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xopt.targets.cpu.cpu_features", lambda: {"sse4_2"})
    with pytest.raises(InputError, match="no AVX2"):
        targets.get("cpu")
    assert not targets.get("cpu:avx2").can_run()


def test_unknown_variants_are_told_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        targets.get("cpu:avx512-amx")
    assert all(name in str(caught.value.cure) for name in VARIANTS)
