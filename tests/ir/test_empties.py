"""Which axes of inputs may be empty."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from xopt.ir.empties import may_be_empty
from xopt.ir.shapes import infer_shapes

PAST = "float[b, 2, p, 8] past, float[b, 2, s, 8] x"


def empties(inputs: str, body: str) -> set[str]:
    text = f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}) => (y) {{ k = Softmax <axis: int = 2> (x) {body} }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    return set(may_be_empty(model))


@pytest.mark.parametrize(
    "body",
    [
        "y = Concat <axis: int = 2> (past, k)",
        "y = Concat <axis: int = -2> (k, past)",
        "n = Shape (past) t = Transpose <perm: ints = [0, 1, 3, 2]> (past)"
        " u = Transpose <perm: ints = [0, 1, 3, 2]> (k) y = Concat <axis: int = 3> (t, u)",
        "h = Neg (past) y = Concat <axis: int = 2> (h, k)",
    ],
)
def test_a_past_that_is_joined(body: str) -> None:
    assert empties(PAST, body) == {"p"}


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        (PAST, "r = ReduceMax (past) y = Add (r, k)"),
        (PAST, "j = Concat <axis: int = 2> (past, k) m = ReduceMean (past) y = Add (j, m)"),
        ("float[b, 2, p, 8] past, float[b, 2, p, 8] x", "y = Concat <axis: int = 2> (past, k)"),
        (
            "float[b, 2, p, 8] past, float[b, 2, q, 8] x, float[b, 2, r, 8] other",
            "z = Concat <axis: int = 2> (past, other) y = Add (z, k)",
        ),
        ("float[b, p, p] past, float[b, s, p] x", "y = Concat <axis: int = 1> (past, k)"),
        (PAST, "h = Softmax <axis: int = 2> (past) y = Concat <axis: int = 2> (h, k)"),
    ],
    ids=["reduced", "also-reduced", "both", "two-pasts", "twice", "softmax"],
)
def test_what_needs_elements(inputs: str, body: str) -> None:
    found = empties(inputs, body)
    assert "p" not in found and "b" not in found


def test_values_that_are_read_twice_are_followed_once() -> None:
    """Each of sixty sums doubles the ways to the end."""
    sums = " ".join(f"v{n + 1} = Add (v{n}, v{n})" for n in range(60))
    assert empties(PAST, f"v0 = Neg (past) {sums} y = Concat <axis: int = 2> (v60, k)") == {"p"}
