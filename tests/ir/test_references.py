"""References to attributes that lead nowhere are refused where the model is loaded, whatever holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xopt.errors import InputError
from xopt.ir import canonicalize, load
from xopt.ir.references import check_references
from xopt.runtime.reference import ReferenceSession

HEAD = '<ir_version: 10, opset_import: ["" : 20, "pkg" : 1]> g (float[2] x) => (float[2] y) '
LEAK = "LeakyRelu <alpha: float = @by> (a)"
INNER = f'<domain: "pkg", opset_import: ["" : 20]> Inner <by> (a) => (r) {{ r = {LEAK} }} '
DEFAULT = f'<domain: "pkg", opset_import: ["" : 20]> Inner <by: float = 0.25> (a) => (r) {{ r = {LEAK} }} '
OUTER = (
    '<domain: "pkg", opset_import: ["" : 20, "pkg" : 1]> '
    "Outer <rate> (a) => (r) { r = pkg.Inner <by: float = @{}> (a) } "
)
BRANCH = (
    "t = Cast <to: int = 9> (s) "
    "r = If (t) <then_branch = yes () => (u) {{ u = {} }}, else_branch = no () => (v) {{ v = {} }}>"
)


def written(text: str, folder: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), folder / "m.onnx")
    return folder / "m.onnx"


RESOLVED = {
    "given by the call": (HEAD + "{ y = pkg.Inner <by: float = 0.5> (x) } " + INNER, 0.5),
    "a default": (HEAD + "{ y = pkg.Inner (x) } " + DEFAULT, 0.25),
    "over a default": (HEAD + "{ y = pkg.Inner <by: float = 0.5> (x) } " + DEFAULT, 0.5),
    "handed on": (HEAD + "{ y = pkg.Outer <rate: float = 0.5> (x) } " + INNER + OUTER.replace("@{}", "@rate"), 0.5),
}
NOWHERE = {
    "outside of functions": (HEAD + f"{{ a = Identity(x) y = {LEAK} }}", "'by', which no function around it declares"),
    "in a branch": (
        HEAD.replace("float[2] x", "float[2] x, float s")
        + "{ a = Identity(x) " + BRANCH.format("Neg(a)", LEAK) + " y = Identity(r) }",
        "'by', which no function around it declares",
    ),
    "not declared": (HEAD + "{ y = pkg.Inner (x) } " + INNER.replace("<by>", ""), "'by', which no function"),
    "not declared, and not called": (HEAD + "{ y = Neg(x) } " + INNER.replace("<by>", ""), "'by', which no function"),
    "not given": (HEAD + "{ y = pkg.Inner (x) } " + INNER, "function Inner has no default for attribute 'by'"),
    "not given by a function": (
        HEAD + "{ y = pkg.Outer <rate: float = 0.5> (x) } " + INNER + OUTER.replace(" <by: float = @{}>", ""),
        "function Inner has no default for attribute 'by'",
    ),
    "handed on from nowhere": (
        HEAD + "{ y = pkg.Outer <rate: float = 0.5> (x) } " + INNER + OUTER.replace("@{}", "@speed"),
        "'speed', which no function around it declares",
    ),
}  # fmt: skip

GRAPHS = {
    "in the graph": HEAD + "{ s = Greater(x, x) y = If <then_branch: graph = @by, else_branch: graph = @by> (s) }",
    "in a function": HEAD
    + "{ y = pkg.Inner <by = yes () => (u) { u = Neg(x) }> (x) } "
    + '<domain: "pkg", opset_import: ["" : 20]> '
    + "Inner <by> (a) => (r) { s = Greater(a, a) r = If <then_branch: graph = @by, else_branch: graph = @by> (s) }",
    "in a function that nobody calls": HEAD
    + '{ y = Neg(x) } <domain: "pkg", opset_import: ["" : 20]> '
    + "Inner <by> (a) => (r) { r = Scan <num_scan_inputs = 1, body: graph = @by> (a) }",
    "many": HEAD + "{ y = Relu <alpha: graphs = @by> (x) }",
}


@pytest.mark.parametrize("case", RESOLVED)
def test_what_leads_somewhere_means_what_it_says(case: str, tmp_path: Path) -> None:
    text, slope = RESOLVED[case]
    model = load(written(text, tmp_path))
    x = np.array([-1.0, 2.0], np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(ReferenceSession(model).run({"x": x})["y"], np.where(x < 0, slope * x, x))
        canonicalize(model)


@pytest.mark.parametrize("case", NOWHERE)
def test_what_leads_nowhere_is_refused(case: str, tmp_path: Path) -> None:
    text, says = NOWHERE[case]
    with pytest.raises(InputError) as caught:
        load(written(text, tmp_path))
    assert caught.value.code == "E-FORMAT"
    assert says in caught.value.what


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_is_not_handed_to_a_function(case: str, tmp_path: Path) -> None:
    path = written(GRAPHS[case], tmp_path)
    with pytest.raises(InputError, match="refers to a graph of the call") as caught:
        load(path)
    assert caught.value.code == "E-FORMAT"
    with pytest.raises(InputError, match="refers to a graph of the call"):
        check_references(ir.from_proto(onnx.load(path)))


def test_a_default_that_is_a_reference(tmp_path: Path) -> None:
    path = written(RESOLVED["a default"][0], tmp_path)
    model = onnx.load(path)
    default = model.functions[0].attribute_proto[0]
    default.ref_attr_name = "other"
    default.ClearField("f")
    onnx.save(model, path)
    with pytest.raises(InputError, match="no default for attribute 'by'"):
        load(path)
