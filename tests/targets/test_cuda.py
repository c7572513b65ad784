"""CUDA artifacts are compiled to machine code without a GPU; where there is one they run and equal the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.ir import builders
from xopt import targets
from xopt.errors import InputError
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session
from xopt.targets import cuda_toolkit


@pytest.fixture(scope="module", autouse=True)
def _toolkit() -> None:
    try:
        cuda_toolkit.toolkit_folder()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("target", "arch"), [pytest.param("cuda", "sm_90", marks=pytest.mark.slow), ("cuda:sm_80", "sm_80")]
)
def test_artifact_holds_machine_code_of_the_architecture(target: str, arch: str, tmp_path: Path) -> None:
    library = targets.compile(builders.bert(layers=1), target, tmp_path / "model.so")
    assert set(cuda_toolkit.cubin_architectures(library)) == {arch}
    assert b"__global__" not in library.read_bytes(), "CUDA source text instead of machine code"


def test_cpu_code_holds_no_cubin(tmp_path: Path) -> None:
    library = targets.compile(builders.vit(layers=1), "cpu", tmp_path / "model.so")
    assert cuda_toolkit.cubin_architectures(library) == []


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(InputError, match=r"E-TARGET.*cuda:sm_90"):
        targets.get("cuda:hopper")


@pytest.mark.skipif(not cuda_toolkit.device_present(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("build", [builders.vit, builders.bert, builders.llama])
def test_run_on_the_device_equals_onnxruntime(build: object, tmp_path: Path) -> None:
    assert callable(build)
    model = build()
    session = Session.load(targets.compile(model, "cuda", tmp_path / "model.so"))
    feeds = builders.feeds(model)
    expected = ReferenceSession(model).run(feeds)
    for name, found in session.run(feeds).items():
        # Sums of float32 products in another order.
        assert np.abs(found - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max()
