"""What a node carries and nothing has read is refused by name, whoever emits the node."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from xopt import targets
from xopt.errors import InputError
from xopt.targets import lowering
from xopt.targets.lowering import lower
from xopt.targets.ops.call import Call

HEAD = '<ir_version: 10, opset_import: ["" : 24]>'
WEIGHT = "<float[4, 4] w = {" + ", ".join(["1"] * 16) + "}>"
FUTURE = "temperature: int = 2"


def of(body: str, inputs: str = "float[2, 4] x, float[2, 4] z", shape: str = "a, b") -> ir.Model:
    return ir.from_onnx_text(f"{HEAD} g ({inputs}) => (float[{shape}] y) {WEIGHT} {{ {body} }}")


MODELS = {
    "our kernel": f"y = Softmax <{FUTURE}> (x)",
    "an emitter": f"y = Tanh <{FUTURE}> (x)",
    "an emitter of several inputs": f"y = Add <{FUTURE}> (x, z)",
    "TVM's converter": f"y = Softplus <{FUTURE}> (x)",
    "a linear layer": f"y = MatMul <{FUTURE}> (x, w)",
    "an activation behind one": f"m = MatMul (x, w) y = Gelu <{FUTURE}> (m)",
    "a gate behind one": f"m = MatMul (x, w) y = Mul <{FUTURE}> (m, z)",
    "arithmetic on sizes": f"s = Shape (x) t = Identity <{FUTURE}> (s) y = Reshape (x, t)",
    "the sizes themselves": f"s = Shape <{FUTURE}> (x) y = Reshape (x, s)",
}


@pytest.mark.parametrize("body", MODELS.values(), ids=MODELS)
def test_an_attribute_that_nothing_knows(body: str) -> None:
    lower(of(body.replace(f"<{FUTURE}>", "")), targets.get("cpu"))
    with pytest.raises(InputError, match=r"attribute temperature is not compiled|no operator") as caught:
        lower(of(body), targets.get("cpu"))
    assert caught.value.code == "E-UNSUPPORTED-OP"
    assert body.split(f" <{FUTURE}>")[0].split()[-1] in str(caught.value)


@pytest.mark.parametrize("body", ["y = Tanh (x, z)", "y = Softmax (x, z)", "y = Softplus (x, z)"])
def test_an_input_that_nothing_knows(body: str) -> None:
    with pytest.raises(InputError, match="input 1 is not compiled"):
        lower(of(body), targets.get("cpu"))


@pytest.mark.parametrize(
    "body",
    [
        "y = Softmax <axis: int = -1> (x)",
        "y = Gemm <alpha: float = 1.0, beta: float = 0.5> (x, w)",
        "y = ReduceSum <keepdims: int = 1, noop_with_empty_axes: int = 1> (x)",
        "r = Constant <value_float: float = 0.5> () y = Dropout <seed: int = 3> (x, r)",
        "s = Constant <value_ints: ints = [4, 2]> () y = Reshape <allowzero: int = 1> (x, s)",
    ],
)
def test_what_changes_nothing_is_taken(body: str) -> None:
    assert lower(of(body), targets.get("cpu")).outputs


def test_a_call_that_notes_nothing_lets_everything_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests would miss if the check were gone."""
    monkeypatch.setattr(Call, "require_read", lambda self: None)
    assert lower(of(MODELS["an emitter"]), targets.get("cpu")).outputs
    assert lowering.op_of(of(MODELS["an emitter"]).graph[0]) == ""
