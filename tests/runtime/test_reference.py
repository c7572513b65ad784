"""The reference session runs what it is given, and says plainly what it cannot run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.net import Net
from tests.ir.test_canonical_ranks import Ranked, layer_norm
from tests.targets.running import node_model
from xopt.errors import InputError
from xopt.ir import io
from xopt.runtime.reference import ReferenceSession


@pytest.fixture(scope="module")
def session() -> ReferenceSession:
    return ReferenceSession(builders.bert(), threads=1)


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    return builders.feeds(builders.bert())


def refused(session: ReferenceSession, feeds: dict[str, np.ndarray]) -> str:
    with pytest.raises(InputError) as caught:
        session.run(feeds)
    assert caught.value.code == "E-DATA"
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_outputs_by_name(session: ReferenceSession, feeds: dict[str, np.ndarray]) -> None:
    results = session.run(feeds)
    assert list(results) == session.outputs == [value.name for value in builders.bert().graph.outputs]
    for array in results.values():
        assert array.shape[0] == 2
        assert np.isfinite(array).all()


def test_other_widths_of_numbers_are_converted(session: ReferenceSession, feeds: dict[str, np.ndarray]) -> None:
    narrow = {name: array.astype(np.int32) for name, array in feeds.items()}
    for name, array in session.run(narrow).items():
        np.testing.assert_array_equal(array, session.run(feeds)[name])


def test_names(session: ReferenceSession, feeds: dict[str, np.ndarray]) -> None:
    missing = dict(feeds)
    name, _ = missing.popitem()
    assert f"{name!r} is missing" in refused(session, missing)
    assert "'extra' is unknown" in refused(session, feeds | {"extra": np.ones(3)})


def test_kinds_and_shapes(session: ReferenceSession, feeds: dict[str, np.ndarray]) -> None:
    name = next(iter(feeds))
    assert "float64 given, int64 needed" in refused(session, feeds | {name: feeds[name].astype(np.float64)})
    assert "is empty" in refused(session, {key: array[:0] for key, array in feeds.items()})
    assert "needed" in refused(session, feeds | {name: feeds[name][None]})


def test_dimensions_of_one_name_must_agree(session: ReferenceSession, feeds: dict[str, np.ndarray]) -> None:
    name = next(iter(feeds))
    assert "seq=" in refused(session, feeds | {name: feeds[name][:, 1:]})
    assert "batch=" in refused(session, feeds | {name: feeds[name][1:]})


def test_fixed_dimensions(feeds: dict[str, np.ndarray]) -> None:
    model = builders.vit()
    pixels = builders.feeds(model)["pixel_values"]
    assert "shape [2, 3, 16, 15] given, [batch, 3, 16, 16] needed" in refused(
        ReferenceSession(model), {"pixel_values": pixels[..., :-1]}
    )


def test_data_that_breaks_the_model(session: ReferenceSession, feeds: dict[str, np.ndarray]) -> None:
    """Token ids beyond the vocabulary pass the checks of shape and type."""
    assert "does not run" in refused(session, feeds | {"input_ids": feeds["input_ids"] + 10**6})


def test_op_without_kernel() -> None:
    net = Net("strange")
    net.output(net.op("ImageDecoder", net.input("x", [9], ir.DataType.UINT8)), "y")
    with pytest.raises(InputError, match="E-UNSUPPORTED-OP"):
        ReferenceSession(net.build())


def test_beyond_two_gigabytes(monkeypatch: pytest.MonkeyPatch, feeds: dict[str, np.ndarray]) -> None:
    """Large weights reach onnxruntime as external data (the limit is lowered for the test)."""
    want = ReferenceSession(builders.bert()).run(feeds)
    monkeypatch.setattr(io, "EMBEDDED_WEIGHTS", 1000)
    for name, array in ReferenceSession(builders.bert()).run(feeds).items():
        np.testing.assert_array_equal(array, want[name])


def test_an_input_with_a_default_may_be_left_out() -> None:
    net = Net("overridable")
    x, shift = net.input("x", [2]), net.constant("shift", np.array([1.0, 2.0], np.float32))
    y = net.op("Add", x, shift)
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    net.inputs.append(shift)
    net.outputs.append(y)
    session = ReferenceSession(net.build(), threads=1)
    zeros = np.zeros(2, np.float32)
    (left_out,) = session.run({"x": zeros}).values()
    (given,) = session.run({"x": zeros, "shift": zeros + 5}).values()
    np.testing.assert_array_equal(left_out, [1, 2])
    np.testing.assert_array_equal(given, [5, 5])


def test_graphs_that_the_optimizer_of_onnxruntime_breaks_run_as_they_are() -> None:
    """A normalization of one axis, its statistics scalars that keep it: fused, its quotient is lost."""
    net = Ranked([0, 0, 0, 1, 0, 0])
    net.output(layer_norm(net, net.input("x", [4])), "y")
    x = np.random.default_rng(0).standard_normal(4)
    row = np.arange(1, 5)
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * row + row
    found = ReferenceSession(net.build()).run({"x": x.astype(np.float32)})["y"]
    np.testing.assert_allclose(found, expected[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_sums_of_integers_do_not_saturate(constant: bool, zeros: bool) -> None:
    """On CPUs without VNNI, onnxruntime's products of uint8 and int8 do."""
    a, b = np.full((1, 4, 8), 255, np.uint8), np.full((8, 3), 127, np.int8)
    inputs: dict[str, np.ndarray | list[int]] = {"a": [1, 4, 8], "b": b if constant else [8, 3]}
    inputs |= {"az": np.array(3, np.uint8), "bz": np.array(-5, np.int8)} if zeros else {}
    kinds = {"a": ir.DataType.UINT8, "b": ir.DataType.INT8}
    model = node_model("MatMulInteger", inputs, dtypes=kinds, output_type=ir.DataType.INT32)
    feeds = {"a": a} if constant else {"a": a, "b": b}
    want = 8 * (255 - 3 * zeros) * (127 + 5 * zeros)
    assert (ReferenceSession(model).run(feeds)["y0"] == want).all()
