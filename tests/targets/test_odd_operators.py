"""Valid ONNX that exporters seldom write: compiled it gives what onnxruntime gives, or an error that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tvm

from tests.fuzz import reference
from tests.targets.running import built
from xopt import api, targets
from xopt.errors import InputError
from xopt.ir import canonicalize
from xopt.targets.lowering import lower

RANDOM = np.random.default_rng(0)
NAN = {
    "x": np.array([np.nan, -np.inf, np.inf, 1, 2], np.float32),
    "z": np.array([1, np.nan, 3, np.nan, 2], np.float32),
}
BOTH = "float[5] x, float[5] z"
IMAGE, WINDOW = "float[1, 2, 4, 3] x", "float[1, 2, 7, 7] x"
INTS = "int64[2] x, int64[2] z"


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def parsed(inputs: str, body: str) -> onnx.ModelProto:
    """A model from text; what it computes last is the output ``y``."""
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}) => (y) {{ {body} }}')


def of(inputs: str, body: str, *feeds: dict[str, Any]) -> Any:
    return pytest.param(inputs, body, feeds, id=body.split("y = ")[-1])


def image(attributes: str, sizes: Sequence[int] = (1, 2, 7, 5)) -> Any:
    body = f"s = Constant <value_ints: ints = {list(sizes)}> () y = Resize <{attributes}> (x, , , s)"
    return pytest.param(IMAGE, body, [{"x": floats(1, 2, 4, 3)}], id=f"Resize-{attributes}-{sizes}")


LINEAR = 'mode: string = "linear"'
RESIZED = [
    image(f"antialias: int = 1, {LINEAR}", (1, 2, 2, 2)), image("axes: ints = [2, 3]", (2, 2)),
    image(f'keep_aspect_ratio_policy: string = "not_larger", {LINEAR}'),
    *(image(f'{mode}, coordinate_transformation_mode: string = "{how}"', sizes)
      for mode in (LINEAR, 'mode: string = "cubic"', 'mode: string = "nearest"')
      for how in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
      for sizes in ((1, 2, 7, 5), (1, 2, 2, 1))),
    of(IMAGE, f"s = Constant <value_floats: floats = [1.0, 1.0, 0.6, 2.3]> () y = Resize <{LINEAR}> (x, , s)",
       {"x": floats(1, 2, 4, 3)}),
    of("float[1, 2, h, w] x",
       f"s = Constant <value_floats: floats = [1.0, 1.0, 1.5, 2.0]> () y = Resize <{LINEAR}> (x, , s)",
       {"x": floats(1, 2, 4, 3)}, {"x": floats(1, 2, 5, 1)}),
]  # fmt: skip
COUNT = "s = Shape (x) q = Squeeze (s) f = Cast <to: int = 1> (q) z = Constant <value_float: float = 0.0> ()"
POOL = "kernel_shape: ints = [2, 2], strides: ints = [2, 2]"
NOOP = "noop_with_empty_axes: int = 1"
EQUAL = [
    *(of("float[2, 3] x", f"y = {op} <{NOOP}> (x)", {"x": floats(2, 3) + 3})
      for op in ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceMax")),
    of("float[2, 3] x", f"y = ReduceL1 <{NOOP}> (x)", {"x": floats(2, 3)}),
    of("float[a, 1, b] x", "y = Squeeze (x)", {"x": floats(2, 1, 3)}),
    of("float[2, 3] x, float[3] z", "v, m, d = LayerNormalization (x, z) s = Add (v, m) y = Mul (s, d)",
       {"x": floats(2, 3), "z": floats(3)}),
    of("float[a, 4] x, float[4] z", "y = MatMul (x, z)", {"x": floats(3, 4), "z": floats(4)}),
    of("float[4] x, float[4] z", "y = MatMul (x, z)", {"x": floats(4), "z": floats(4)}),
    of("float[a, 4] x, float[b, c, 4, 5] z", "y = MatMul (x, z)", {"x": floats(3, 4), "z": floats(2, 2, 4, 5)}),
    of("float[a, 2, 4] x, float[b, a, 4, 5] z", "y = MatMul (x, z)", {"x": floats(3, 2, 4), "z": floats(2, 3, 4, 5)}),
    of("float[6] x, float[6] z", "y = Mod <fmod: int = 1> (x, z)",
       {"x": np.float32([7.5, -7.5, 7.5, 1e8, 1, 1e20]), "z": np.float32([3, 3, -3, 0.3, np.inf, 7])}),
    of("float[5] x", "y = Celu <alpha: float = 2.0> (x)", {"x": floats(5)}),
    of("int64[4] x", "e = Constant <value_int: int = 3> () y = Pow (x, e)", {"x": np.array([3, -2, 0, 9])}),
    of(INTS, "y = Pow (x, z)", {"x": np.array([3, -2]), "z": np.array([7, 13])},
       {"x": np.array([1, -1]), "z": np.array([63, 63])}, {"x": np.array([0, 7]), "z": np.array([0, 22])}),
    of("int32[3] x, float[3] z", "y = Pow (x, z)", {"x": np.array([2, 9, 5], np.int32),
       "z": np.array([3, 0.5, 2], np.float32)}),
    of("float[8] x, float[8] z", "y = Mod <fmod: int = 1> (x, z)",
       {"x": np.array([3, -3, 5.5, -5.5, 0, 7, 1, 2], np.float32),
        "z": np.array([2, 2, -2, -2, 3, 7, 9, -9], np.float32)}),
    of("float[5] x", "l = Constant <value_float: float = -1.0> () h = Constant <value_float: float = 1.0> () "
       "y = Clip (x, l, h)", {"x": NAN["x"]}),
    *(of(BOTH, f"y = {body}", NAN) for body in
      ("Min (x, z)", "Max (x, z)", "Max (x, z, x)", "Relu (x)", "Sign (x)", "IsNaN (x)", "Equal (x, z)", "Equal (x, x)",
       "Less (x, z)", "Cast <to: int = 9> (x)")),
    of(BOTH, "l = Less (x, z) y = Not (l)", NAN), of(BOTH, "e = Equal (x, z) y = Not (e)", NAN),
    of(BOTH, "e = Equal (x, x) y = Not (e)", NAN), of(BOTH, "l = Less (x, z) n = Not (l) y = Where (n, x, z)", NAN),
    *(of(BOTH, f"l = Less (x, z) g = Less (z, x) t = Constant <value: tensor = bool {{{truth}}}> () {body}", NAN)
      for truth in (0, 1) for body in ("y = Equal (l, t)", "y = Equal (t, l)", "e = Equal (l, g) y = Equal (e, t)")),
    of("float[2, 3, 4] x, float[4] z", "y = LayerNormalization <axis: int = 1> (x, z)",
       {"x": floats(2, 3, 4), "z": floats(4)}),
    of("float[2, a] x, float[b] z", "y = PRelu (x, z)", {"x": floats(2, 3), "z": floats(3)}),
    of("float[a] x", f"{COUNT} o = Constant <value_float: float = 1.0> () y = Range (z, f, o)",
       {"x": floats(3)}, {"x": floats(1)}),
    of("float[a] x", f"{COUNT} o = Constant <value_float: float = 0.3> () y = Range (z, f, o)",
       {"x": floats(4)}, {"x": floats(1)}),
    of("float[2, 3, a] x", "s = Shape (x) b = Constant <value_ints: ints = [-100]> () "
       "e = Constant <value_ints: ints = [-4]> () t = Constant <value_ints: ints = [0]> () "
       "m = Constant <value_ints: ints = [-1]> () y = Slice (s, b, e, t, m)", {"x": floats(2, 3, 4)}),
    of("float[a] x", "i = Constant <value_int: int = 4611686018427387904> () j = Constant <value_int: int = 4> () "
       "y = Mul (i, j)", {"x": floats(3)}),
    *(of("float[a, b] x", "s = Shape (x) f = Cast <to: int = 1> (s) h = Constant <value_float: float = 2.0> () "
         f"z = Constant <value_ints: ints = [0]> () q = Gather (f, z) {body}", {"x": floats(3, 5)}, {"x": floats(1, 2)})
      for body in ("y = Div (f, h)", "y = Div (f, q)", "d = Div (f, h) y = Cast <to: int = 7> (d)", "y = Mul (f, h)")),
    of("float[3] x", "d = Constant <value_float: float = 4.0> () v = Constant <value_floats: floats = [0.5, 2.0]> () "
       "y = OneHot (x, d, v)", {"x": np.float32([1, -1, 7])}),
    of("float[3] x", "y = Constant <value_ints: ints = [1, 2]> ()", {"x": floats(3)}),
    of("float[1, 8, 2, 2] x", "y = DepthToSpace <blocksize: int = 2, mode: string = \"CRD\"> (x)",
       {"x": floats(1, 8, 2, 2)}),
    of(WINDOW, f"y = MaxPool <{POOL}, auto_pad: string = \"SAME_UPPER\"> (x)", {"x": floats(1, 2, 7, 7)}),
    *(image(f'mode: string = "{mode}", coordinate_transformation_mode: string = "{corners}"') for mode in
      ("nearest", "linear", "cubic") for corners in ("half_pixel", "align_corners", "asymmetric")),
    image('mode: string = "nearest", nearest_mode: string = "ceil"', (1, 2, 2, 2)),
    *(of("float[5] x", f"n = NonZero (x) f = Cast <to: int = 1> (n) y = {op} <keepdims: int = 0> (f{axes})",
         {"x": np.zeros(5, np.float32)}, {"x": floats(5)})
      for op, axes in (("ReduceSum", ""), ("ReduceL2", ""), ("ReduceProd", ""), ("ReduceLogSumExp", ""))),
    of("float[a, b] x", "s = Shape (x) y = ConstantOfShape <value: tensor = float[1] {-inf}> (s)", {"x": floats(2, 3)}),
    *(of("float[a, b] x", f"k = Shape <start: int = {axis}, end: int = {axis + 1}> (x) "
         f"v, y = TopK <axis: int = {axis}, largest: int = 0> (x, k)", {"x": floats(3, 5)}, {"x": floats(4, 1)})
      for axis in (0, 1)),
    of("float[a, b] x, float[c] z", "k = Shape (z) y, i = TopK <axis: int = 1> (x, k)",
       {"x": floats(3, 5), "z": floats(2)}, {"x": floats(1, 4), "z": floats(4)}),
    of("float[5] x", "a = Constant <value_ints: ints = [1]> () n = NonZero (x) y = ReduceSum (n, a)",
       {"x": np.zeros(5, np.float32)}, {"x": floats(5)}),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "body", "feeds"), [*EQUAL, *RESIZED])
def test_equal(inputs: str, body: str, feeds: Sequence[dict[str, np.ndarray]]) -> None:
    proto = parsed(inputs, body)
    theirs, ours = reference.session(proto.SerializeToString()), compiled(proto)
    for given in feeds:
        want = reference.run(theirs, given)["y"]
        got = ours({"z": np.zeros(0), **given})[0]
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def compiled(proto: onnx.ModelProto) -> Any:
    model = ir.from_proto(proto)
    canonicalize(model)
    return built(lower(model, targets.get("cpu")))


REFUSED = [
    of("int32[2, 3] x", "y = ReduceMean (x)"),
    of("float[2, 0] x, float[0, 3] z", "y = MatMul (x, z)"),
    of("float[3, 4] x", "p = Constant <value_ints: ints = [0, -1, 0, 3]> () y = Pad <mode: string = \"wrap\"> (x, p)"),
    image('coordinate_transformation_mode: string = "tf_crop_and_resize"'),
    of("uint8[3, 3] x, uint8[b] q", "y = MatMulInteger (x, x, q)"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "body", "feeds"), REFUSED)
def test_refused(inputs: str, body: str, feeds: object) -> None:
    model = ir.from_proto(parsed(inputs, body))
    canonicalize(model)
    with pytest.raises(InputError, match="E-UNSUPPORTED-OP") as caught:
        lower(model, targets.get("cpu"))
    assert "ir.Op" not in str(caught.value)


DEPENDS = [
    of("float[a, 1, b] x", "y = Squeeze (x)", {"x": floats(1, 1, 3)}),
    of("float[a] x, float[b] z", "y = Add (x, z)", {"x": floats(1), "z": floats(3)}),
    of("float[a] x, float[b] z", "q = Add (x, z) s = Shape (q) y = Expand (x, s)", {"x": floats(1), "z": floats(3)}),
    of("float[3, a] x, float[2, b, 4] z", "y = MatMul (x, z)", {"x": floats(3, 3), "z": floats(2, 30, 4)}),
    of("float[a] x, float[b] z", "y = MatMul (x, z)", {"x": floats(3), "z": floats(30)}),
    of("float[1, a, 9] x, float[3, 2, 3] z", "y = Conv (x, z)", {"x": floats(1, 1, 9), "z": floats(3, 2, 3)}),
    of("float[1, 2, a] x, float[3, 2, 3] z", "y = Conv (x, z)", {"x": floats(1, 2, 2), "z": floats(3, 2, 3)}),
    of("float[1, a, 9] x, float[2, 3, 3] z", "y = ConvTranspose (x, z)", {"x": floats(1, 1, 9), "z": floats(2, 3, 3)}),
    of("float[a, b] x, float[c, d] z", "y = Einsum <equation: string = \"ij,jk->ik\"> (x, z)",
       {"x": floats(2, 3), "z": floats(30, 4)}),
    of("float[a, b] x", "y = Einsum <equation: string = \"ii->i\"> (x)", {"x": floats(30, 3)}),
    of("float[a, 2, 3] x, float[b, 3, 2] z", "y = Einsum <equation: string = \"...ij,...jk->...ik\"> (x, z)",
       {"x": floats(2, 2, 3), "z": floats(20, 3, 2)}),
    of("float[2, a] x, float[3] z", "y = QuantizeLinear <axis: int = 1> (x, z)", {"x": floats(2, 30), "z": floats(3)}),
    of("uint8[2, a] x, int8[b, 2] z", "y = MatMulInteger (x, z)",
       {"x": np.ones((2, 3), np.uint8), "z": np.ones((30, 2), np.int8)}),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "body", "feeds"), DEPENDS)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_read(
    inputs: str, body: str, feeds: Sequence[dict[str, np.ndarray]]
) -> None:
    """By the entry of the compiled function, where axes that must be equal have become one, or by the operator."""
    ours = compiled(parsed(inputs, body))
    for given in feeds:
        with pytest.raises((ValueError, RuntimeError), match=r"xopt refuses|match_cast error"):
            ours(given)


def test_what_tvm_finds_out_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any, **options: Any) -> None:
        raise tvm.error.InternalError("Check failed: (value_ty.MatchesCode(kDLInt)) is false")

    proto = parsed("float[3] x", "y = Relu (x)")
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3]))
    onnx.save_model(proto, tmp_path / "model.onnx")
    monkeypatch.setattr(tvm.relax, "build", build)
    with pytest.raises(InputError, match="Relu cannot be compiled: a check of TVM's failed, node"):
        api.compile(tmp_path / "model.onnx", "cpu", tmp_path / "model.so", threads=1, database=False)
