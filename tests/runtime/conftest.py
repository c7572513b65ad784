"""A compiled model that the tests of the runtime share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ir import builders
from xopt import targets
from xopt.runtime.manifest import manifest_path, weights_path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT, compiled."""
    model = builders.bert(layers=1, width=16, heads=2, pooled="none")
    return targets.compile(model, "cpu:avx2", tmp_path_factory.mktemp("artifact") / "model.so")


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own, to be spoiled."""
    for file in (artifact, weights_path(artifact), manifest_path(artifact)):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / artifact.name
