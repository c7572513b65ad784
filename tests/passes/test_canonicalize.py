from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import xopt.ir
from tests.ir import builders
from tests.passes.exact import check_laws, fingerprint, ops
from xopt.passes import Canonicalize


@pytest.mark.parametrize("kind", builders.ZOO)
def test_a_canonical_model_keeps_its_computation(kind: str) -> None:
    model = builders.ZOO[kind]()
    expected = ops(model)["Attention"]
    report = check_laws(Canonicalize(), model)
    assert ops(model)["Attention"] == expected == report.numbers["attention-sites"]


def test_minilm_from_the_exporter(minilm_file: Path) -> None:
    model = xopt.ir.load(minilm_file)
    report = check_laws(Canonicalize(), model)
    assert report.numbers["attention-sites"] == 6
    assert {name: ops(model)[name] for name in ("Attention", "LayerNormalization", "Gelu", "Softmax", "Erf")} == {
        "Attention": 6,
        "LayerNormalization": 13,
        "Gelu": 6,
        "Softmax": 0,
        "Erf": 0,
    }


def test_the_fixture_is_canonical(minilm: ir.Model) -> None:
    before = fingerprint(minilm)
    xopt.ir.canonicalize(minilm)
    assert fingerprint(minilm) == before
