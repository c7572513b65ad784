"""ARM artifacts: cross-compiled, run under emulation, and equal to onnxruntime within float32 rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from xopt import targets
from xopt.errors import InputError
from xopt.passes.merge_tokens import MergeTokens
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.runtime.manifest import Manifest, manifest_path
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session
from xopt.targets import arm_runtime


def merged_vit() -> ir.Model:
    """A vision transformer with a merge by MCTF, which has no kernel: its top-k needs the runtime's sort."""
    model = builders.vit()
    (step,) = PassManager([MergeTokens(ratio=0.3, score="mctf")]).run(model, PassContext())
    assert step.report.rewritten == 1
    return model


MODELS: dict[str, Callable[[], ir.Model]] = {"merged": merged_vit, "bert": builders.bert, "llama": builders.llama}


@pytest.fixture(scope="module", autouse=True)
def _emulator() -> None:
    lack = arm_runtime.missing()
    if lack:
        pytest.skip(lack)


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("merged", "llama"))]
)
def test_emulated_run_equals_onnxruntime(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    library = targets.compile(model, "arm", tmp_path / "model.so")
    manifest = Manifest.from_json(manifest_path(library).read_text(), str(library))
    assert library.read_bytes()[18:20] == (183).to_bytes(2, "little")  # EM_AARCH64
    reference = ReferenceSession(model)
    for seed in (0, 1):
        feeds = builders.feeds(model, seed=seed)
        outputs, times = arm_runtime.run(library, manifest, feeds, repeat=2)
        assert len(times) == 2
        expected = reference.run(feeds)
        assert len(outputs) == len(expected)
        for found, (output, wanted) in zip(outputs, expected.items(), strict=True):
            # A few layers of float32 sums in another order: some tens of units in the last place of the largest value.
            assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max(), output


def test_an_x86_session_refuses_arm_code(tmp_path: Path) -> None:
    library = targets.compile(builders.vit(layers=1), "arm", tmp_path / "model.so")
    with pytest.raises(InputError, match=r"E-CPU.*arm.*asimd"):
        Session.load(library)


def test_unknown_variant_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"E-TARGET.*arm:cortex-a76"):
        targets.get("arm:z80")


def test_a_missing_runtime_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XOPT_AARCH64_RUNTIME", str(tmp_path))
    assert "python -m xopt.targets.arm_runtime" in arm_runtime.missing()
