"""Operators on images, sequences and regions whose sizes may be data, equal to onnxruntime or ONNX's reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.targets.running import built, onnxruntime, reference
from xopt import targets
from xopt.errors import InputError
from xopt.ir import canonicalize
from xopt.targets.lowering import lower

RANDOM = np.random.default_rng(0)
Feed = Mapping[str, np.ndarray]


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model_of(inputs: str, body: str, output: str = "float y", opset: int = 24) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({output}) {{ {body} }}'
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def compiled(model: ir.Model) -> Callable[[Feed], list[np.ndarray]]:
    model = model.clone()
    canonicalize(model)
    return built(lower(model, targets.get("cpu")))


def check(model: ir.Model, *feeds: Feed, theirs: Callable[[Feed], list[np.ndarray]] | None = None) -> None:
    ours = compiled(model)
    for feed in feeds:
        want = theirs(feed) if theirs else reference(model, feed)
        for got, one in zip(ours(feed), want):
            assert (got.dtype, got.shape) == (one.dtype, one.shape)
            np.testing.assert_allclose(got, one, rtol=1e-4, atol=1e-5)


def refused(model: ir.Model, feed: Feed, message: str) -> None:
    run = compiled(model)
    with pytest.raises(ValueError, match=message):
        run(feed)


# -- convolutions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [
    "output_shape: ints = [10, 8], strides: ints = [3, 2]", "output_shape: ints = [9, 7], strides: ints = [3, 2]",
    'auto_pad: string = "SAME_UPPER", strides: ints = [2, 3], group: int = 2',
    'auto_pad: string = "SAME_LOWER", strides: ints = [2, 1]',
    'auto_pad: string = "VALID", strides: ints = [2, 1], dilations: ints = [1, 2], output_padding: ints = [1, 0]',
])  # fmt: skip
def test_transposed(form: str) -> None:
    model = model_of("float[2, 4, 3, 3] x, float[4, 2, 3, 3] w", f"y = ConvTranspose <{form}> (x, w)", opset=21)
    check(model, {"x": floats(2, 4, 3, 3), "w": floats(4, 2, 3, 3)}, theirs=onnxruntime(model))


def test_same_padding_of_dynamic_images() -> None:
    body = 'y = Conv <auto_pad: string = "SAME_LOWER", strides: ints = [2, 3]> (x, w)'
    model = model_of("float[n, 2, h, w] x, float[3, 2, 3, 4] w", body, "float[n, 3, p, q] y", 21)
    w = floats(3, 2, 3, 4)
    check(model, *({"x": floats(2, 2, *size), "w": w} for size in ((7, 9), (8, 8))), theirs=onnxruntime(model))


@pytest.mark.parametrize("zeros", ["", ", a", ", a, b", ", , b"])
def test_integers(zeros: str) -> None:
    inputs = "uint8[1, 4, 5, 5] x, uint8[2, 2, 3, 3] w, uint8 a, uint8[2] b"
    model = model_of(inputs, f"y = ConvInteger <group: int = 2, pads: ints = [1, 0, 1, 1]> (x, w{zeros})", "int32 y")
    x, w = (RANDOM.integers(0, 256, shape).astype(np.uint8) for shape in ((1, 4, 5, 5), (2, 2, 3, 3)))
    a, b = np.array(7, np.uint8), np.array([3, 250], np.uint8)
    wide = [x.astype(np.float64) - (7 if "a" in zeros else 0), w.astype(np.float64)]
    wide[1] -= b.reshape(2, 1, 1, 1) if "b" in zeros else 0
    padded = np.pad(wide[0], ((0, 0), (0, 0), (1, 1), (0, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3)).reshape(1, 2, 2, 5, 4, 3, 3)
    want = np.einsum("ngcijkl,gckl->ngij", windows, wide[1]).astype(np.int32)
    np.testing.assert_array_equal(compiled(model)({"x": x, "w": w, "a": a, "b": b})[0], want)


@pytest.mark.parametrize("form", [
    "pads: ints = [1, 1, 1, 1]",
    "strides: ints = [2, 1], dilations: ints = [1, 2], offset_group: int = 2, group: int = 2",
])  # fmt: skip
def test_deformed(form: str) -> None:
    groups = 2 if "group" in form else 1
    counts = (2, 3) if groups == 2 else (5, 5)
    shapes = {"x": (2, 4, 5, 5), "w": (2, 4 // groups, 3, 2 if groups == 2 else 3)}
    taps = shapes["w"][2] * shapes["w"][3]
    shapes |= {"o": (2, 2 * groups * taps, *counts), "b": (2,), "m": (2, groups * taps, *counts)}
    if groups == 2:
        shapes["o"], shapes["m"] = (2, 2 * groups * taps, 2, 3), (2, groups * taps, 2, 3)
    inputs = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    model = model_of(inputs, f"y = DeformConv <{form}> (x, w, o, b, m)")
    check(model, {name: floats(*shape) for name, shape in shapes.items()})


def test_columns_add_up() -> None:
    body = "y = Col2Im <strides: ints = [2, 1], pads: ints = [1, 0, 0, 1], dilations: ints = [1, 2]> (x, s, b)"
    x = floats(2, 3 * 6, 3 * 3)
    known = "s = Constant <value_ints: ints = [6, 6]> () b = Constant <value_ints: ints = [2, 3]> () "
    check(model_of("float[2, 18, 9] x", known + body), {"x": x})
    data = model_of("float[2, 18, 9] x, int64[2] s, int64[2] b", body)
    check(data, {"x": x, "s": np.array([6, 6]), "b": np.array([2, 3])})
    refused(data, {"x": x, "s": np.array([6, 5]), "b": np.array([2, 3])}, "one column for each window")


# -- regions and boxes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 1, 3, 4, 5)])
def test_grids(corners: int, size: tuple[int, ...]) -> None:
    rank = len(size) - 2
    body = f"y = AffineGrid <align_corners: int = {corners}> (t, s)"
    model = model_of(f"float[n, {rank}, {rank + 1}] t, int64[{rank + 2}] s", body)
    check(model, {"t": floats(size[0], rank, rank + 1), "s": np.array(size)})


@pytest.mark.parametrize("ratio", [2, 0])
def test_largest_of_regions(ratio: int) -> None:
    """Of as many samples as are asked for, or as a region has elements."""
    form = f'mode: string = "max", output_height: int = 3, output_width: int = 2, sampling_ratio: int = {ratio}'
    model = model_of("float[2, 3, 8, 8] x, float[r, 4] b, int64[r] i", f"y = RoiAlign <{form}> (x, b, i)", opset=16)
    corner = RANDOM.uniform(-1, 5, (4, 2))
    boxes = np.concatenate([corner, corner + RANDOM.uniform(0, 5, (4, 2))], 1).astype(np.float32)
    check(model, {"x": floats(2, 3, 8, 8), "b": boxes, "i": np.array([0, 1, 1, 0])})


def test_regions_larger_than_the_image_are_refused() -> None:
    form = 'mode: string = "max", output_height: int = 3, output_width: int = 2'
    model = model_of("float[1, 3, 8, 8] x, float[r, 4] b, int64[r] i", f"y = RoiAlign <{form}> (x, b, i)", opset=16)
    feeds = {"x": floats(1, 3, 8, 8), "b": np.float32([[0, 0, 8, 90]]), "i": np.array([0])}
    refused(model, feeds, "larger than the image")


def test_largest_elements_of_regions() -> None:
    """Regions in and around an image, and parts that hold nothing of it."""
    body = "y = MaxRoiPool <pooled_shape: ints = [3, 2], spatial_scale: float = 0.5> (x, b)"
    model = model_of("float[2, 3, 8, 7] x, float[r, 5] b", body, opset=16)
    boxes = np.float32([[0, 0, 0, 13, 15], [1, 3, 5, 4, 6], [1, -6, -9, 5, 40], [0, 20, 30, 29, 31], [1, 9, 9, 2, 3]])
    check(model, {"x": floats(2, 3, 8, 7), "b": boxes}, theirs=onnxruntime(model))
    refused(model, {"x": floats(2, 3, 8, 7), "b": np.float32([[2, 0, 0, 3, 3]])}, "outside")


@pytest.mark.parametrize("centred", [0, 1])
@pytest.mark.parametrize("given", ["", ", m", ", m, o", ", m, o, l"])
def test_boxes_that_hide_each_other(centred: int, given: str) -> None:
    body = f"y = NonMaxSuppression <center_point_box: int = {centred}> (b, s{given})"
    inputs = "float[2, n, 4] b, float[2, 3, n] s, int64[1] m, float[1] o, float[1] l"
    model = model_of(inputs, body, "int64[k, 3] y", 21)
    rest = {"m": np.array([4]), "o": np.array([0.3], np.float32), "l": np.array([0.2], np.float32)}
    feeds = []
    for count in (20, 1):
        boxes = RANDOM.uniform(0, 3, (2, count, 4)).astype(np.float32)
        boxes[..., 2:] += 0.0 if centred else -1.5  # corners in any order
        feeds.append({"b": boxes, "s": RANDOM.uniform(0, 1, (2, 3, count)).astype(np.float32), **rest})
    check(model, *feeds, theirs=onnxruntime(model))


# -- sequences -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("batch", "time"), [(1, 0), (0, 1)])
def test_sequences_turned_round(batch: int, time: int) -> None:
    body = f"y = ReverseSequence <batch_axis: int = {batch}, time_axis: int = {time}> (x, l)"
    model = model_of("float[a, b, 2] x, int64[c] l", body)
    shape = (4, 3) if batch else (3, 4)
    check(model, {"x": floats(*shape, 2), "l": np.array([4, 1, 2])})
    more = model_of("float[4, 3, 2] x, int64[3] l, int64[3] k", f"m = Add (l, k) {body.replace('(x, l)', '(x, m)')}")
    if batch:
        feed = {"x": floats(4, 3, 2), "l": np.array([4, 1, 2]), "k": np.array([1, 0, 0])}
        refused(more, feed, "a length is negative, or more")


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_caches_scattered_into(mode: str) -> None:
    body = f'j = Add (i, z) y = TensorScatter <mode: string = "{mode}", axis: int = 2> (c, u, j)'
    model = model_of("float[2, 3, 5, 4] c, float[2, 3, 2, 4] u, int64[2] i, int64[2] z", body)
    feed: dict[str, Any] = {"c": floats(2, 3, 5, 4), "u": floats(2, 3, 2, 4), "z": np.zeros(2, np.int64)}
    places = np.array([3, 0]) if mode == "linear" else np.array([4, 1])
    check(model, {**feed, "i": places})
    refused(model, {**feed, "i": np.array([5, 0])}, "its update leaves its cache")


def test_depth_of_the_data() -> None:
    model = model_of("int64[2, 3] x, int64 d, float[2] v", "y = OneHot <axis: int = 1> (x, d, v)")
    feed = {"x": np.array([[0, 1, -1], [7, 3, 2]]), "v": np.array([1, 4], np.float32)}
    check(model, *({**feed, "d": np.array(depth)} for depth in (4, 9)))


# -- sums ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("equation", "shapes"), [
    ("ij,jk", [(3, 4), (4, 5)]), ("ba,cb", [(2, 3), (4, 2)]), ("ii", [(4, 4)]), ("ii->i", [(4, 4)]),
    ("...ii->...i", [(2, 3, 3)]), ("...ij,...jk", [(2, 1, 3, 4), (1, 5, 4, 2)]), ("i,j->ji", [(3,), (4,)]),
    ("bij,bjk,bkl->bil", [(2, 3, 4), (2, 4, 2), (2, 2, 3)]), ("i...->...", [(3, 2, 4)]), ("ij->", [(3, 4)]),
    ("iji,jj->ij", [(3, 2, 3), (2, 2)]), ("ij,ij->i", [(3, 1), (3, 4)]),
])  # fmt: skip
def test_equations(equation: str, shapes: list[tuple[int, ...]]) -> None:
    names = "abc"[: len(shapes)]
    inputs = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in zip(names, shapes))
    model = model_of(inputs, f'y = Einsum <equation: string = "{equation}"> ({", ".join(names)})')
    feed = {name: floats(*shape) for name, shape in zip(names, shapes)}
    check(model, feed, theirs=lambda given: [np.einsum(equation, *given.values())])


@pytest.mark.parametrize("equation", ["ij->ik", "ij->ii", "ij->ji->i"])
def test_equations_that_make_no_sense(equation: str) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2, 2] x) => (float[a, b] y) '
        f'{{ y = Einsum <equation: string = "{equation}"> (x) }}'
    )
    with pytest.raises(InputError):
        compiled(ir.from_proto(proto))


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_any_and_all(op: str) -> None:
    model = model_of("bool[3, n] x, int64[1] a", f"y = {op} <keepdims: int = 0> (x, a)", "bool[p] y")
    check(model, {"x": RANDOM.integers(0, 2, (3, 4)).astype(bool), "a": np.array([1])})


@pytest.mark.parametrize("shape", [(3, 3), (2, 5, 4, 4), (1, 1)])
def test_determinants(shape: tuple[int, ...]) -> None:
    x = floats(*shape)
    x[..., 0, 0] = 0  # another row comes to the top
    names = ", ".join("abcd"[: len(shape)])
    check(model_of(f"float[{names}] x", "y = Det (x)"), {"x": x}, theirs=lambda feed: [np.linalg.det(feed["x"])])


@pytest.mark.parametrize("dtype", ["uint64", "uint16", "int16", "uint32", "uint8", "int8"])
def test_the_first_of_every_type(dtype: str) -> None:
    outputs = f"{dtype}[3, n] v, int64[3, n] y"
    model = model_of(f"{dtype}[3, 6] x, int64[1] k", "v, y = TopK <axis: int = 1> (x, k)", outputs)
    limits = np.iinfo(dtype)
    step = (int(limits.max) - int(limits.min)) // 17
    x = RANDOM.permuted(np.array([int(limits.min) + k * step for k in range(18)], dtype)).reshape(3, 6)
    places = np.argsort(x, 1)[:, ::-1][:, :4]
    values, found = compiled(model)({"x": x, "k": np.array([4])})
    np.testing.assert_array_equal(values, np.take_along_axis(x, places, 1))
    np.testing.assert_array_equal(found, places)
