"""Small files that ask for much: refused by name at once, or done in a time that grows with the graph alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from xopt import facts
from xopt.errors import InputError
from xopt.ir import canonicalize, load
from xopt.ir.bounds import DEEPEST, HIGHEST_RANK, MOST_NODES, MOST_OPERANDS
from xopt.ir.poly import MOST_TERMS, Poly

HANG = 120
"""Seconds of a slow machine for what takes two on a quick one; what is refused here, or was quadratic, took hours."""


def tensor(name: str, shape: Sequence[int | str] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, content: object, kind: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(content, kind), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: Iterable[onnx.TensorProto] = (),
    shape: Sequence[int | str] = (1, 4),
    functions: Sequence[onnx.FunctionProto] = (),
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", [tensor("x", shape)], [tensor("y", None, kind)], list(constants))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("pkg", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def chain(count: int, op: str = "Relu", *more: str, domain: str = "") -> list[onnx.NodeProto]:
    names = ["x", *(f"v{i}" for i in range(1, count)), "y"]
    return [helper.make_node(op, [a, *more], [b], domain=domain) for a, b in pairwise(names)]


def doubling(depth: int) -> onnx.ModelProto:
    """Function i calls function i - 1 twice."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("pkg", 1)]
    functions = []
    for level in range(depth):
        inner, domain = (f"F{level - 1}", "pkg") if level else ("Relu", "")
        nodes = [helper.make_node(inner, [a], [b], domain=domain) for a, b in (("a", "t"), ("t", "b"))]
        functions.append(helper.make_function("pkg", f"F{level}", ["a"], ["b"], nodes, opsets))
    return model(chain(1, f"F{depth - 1}", domain="pkg"), functions=functions)


def deep_calls(depth: int) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("pkg", 1)]
    functions = [
        helper.make_function("pkg", f"F{i}", ["a"], ["b"], [helper.make_node(f"F{i - 1}" if i else "Relu", ["a"], ["b"],
                             domain="pkg" if i else "")], opsets)
        for i in range(depth)
    ]  # fmt: skip
    return model(chain(1, f"F{depth - 1}", domain="pkg"), functions=functions)


def with_itself() -> onnx.ModelProto:
    opsets = [helper.make_opsetid("pkg", 1)]
    body = [helper.make_node("F", ["a"], ["b"], domain="pkg")]
    return model(chain(1, "F", domain="pkg"), functions=[helper.make_function("pkg", "F", ["a"], ["b"], body, opsets)])


def split(parts: int) -> onnx.ModelProto:
    outputs = [f"s{i}" for i in range(parts)]
    nodes = [helper.make_node("Split", ["x"], outputs, num_outputs=parts, axis=1)]
    return model([*nodes, helper.make_node("Relu", ["s0"], ["y"])], shape=(1, parts))


def wide(op: str, count: int, **attributes: object) -> onnx.ModelProto:
    return model([helper.make_node(op, ["x"] * count, ["y"], **attributes)])


def ranked(rank: int) -> onnx.TensorProto:
    found = constant("w", [0.0])
    found.dims[:] = [1] * rank
    return found


def folded(op: str, constants: Sequence[onnx.TensorProto], **attributes: object) -> onnx.ModelProto:
    """A constant expression that asks for much, added to the input."""
    nodes = [helper.make_node(op, [c.name for c in constants], ["folded"], **attributes)]
    nodes += [
        helper.make_node("ReduceSum", ["folded"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return model(nodes, [one for one in constants if one.name])


def growing_product(steps: int) -> onnx.ModelProto:
    """``(a + b) ** 2 ** steps``, in integers that the shape of the input makes."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["a"]),
        helper.make_node("Gather", ["shape", "one"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["p0"]),
        *(helper.make_node("Mul", [f"p{i}", f"p{i}"], [f"p{i + 1}"]) for i in range(steps)),
        helper.make_node("Identity", [f"p{steps}"], ["y"]),
    ]
    numbers = [constant("zero", 0, np.int64), constant("one", 1, np.int64)]
    return model(nodes, numbers, ("rows", "columns"), kind=TensorProto.INT64)


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "a million calls": (lambda: doubling(20), "nodes once its functions are written out"),
    "more calls than atoms": (lambda: doubling(60), "nodes once its functions are written out"),
    "a function of itself": (with_itself, ""),
    "a thousand functions deep": (lambda: deep_calls(1000), f"more than {DEEPEST}"),
    "100,000 nodes": (lambda: model(chain(100_000)), f"100000 nodes, more than {MOST_NODES}"),
    "100,000 identities": (lambda: model(chain(100_000, "Identity")), f"more than {MOST_NODES}"),
    "Split into 20,000": (lambda: split(20_000), f"20000 operands, more than {MOST_OPERANDS}"),
    "Concat of 50,000": (lambda: wide("Concat", 50_000, axis=0), f"50000 operands, more than {MOST_OPERANDS}"),
    "Einsum of 20,000": (lambda: wide("Einsum", 20_000, equation=",".join(["ab"] * 20_000)), "operands"),
    "1,000 dimensions": (lambda: model(chain(1), shape=[1] * 1000), f"1000 dimensions, more than {HIGHEST_RANK}"),
    "a weight of 1,000": (lambda: model(chain(1, "Add", "w"), [ranked(1000)]), f"more than {HIGHEST_RANK}"),
    "Unsqueeze to 102": (
        lambda: model(chain(1, "Unsqueeze", "axes"), [constant("axes", range(100), np.int64)]),
        f"more than {HIGHEST_RANK}",
    ),
}  # fmt: skip


@pytest.mark.timeout(HANG)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_too_large_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, says = REFUSED[case]
    (tmp_path / "m.onnx").write_bytes(make().SerializeToString())
    with pytest.raises(InputError) as caught:
        canonicalize(load(tmp_path / "m.onnx"))
    assert caught.value.code == "E-FORMAT" and says in caught.value.what and caught.value.cure


def trained(*names: str) -> list[onnx.TensorProto]:
    return [constant(name, [0.5, 1.5, 2.5, 3.5]) for name in names]


DONE: dict[str, Callable[[], onnx.ModelProto]] = {
    "2,000 nodes": lambda: model(chain(2000, "Add", "w"), trained("w")),
    "2,000 linear layers": lambda: model(chain(2000, "Gemm", "m"), [constant("m", np.eye(4))]),
    "2,000 constants": lambda: model(
        [*(helper.make_node("Add", ["w" if i == 0 else f"c{i}", "w"], [f"c{i + 1}"]) for i in range(2000)),
         helper.make_node("Add", ["x", "c2000"], ["y"])], trained("w")),
    "1,000 calls": lambda: doubling(10),
    "Split into 1,000": lambda: split(1000),
    "Concat of 2,000": lambda: wide("Concat", 2000, axis=0),
    "a convolution of constants": lambda: folded(
        "Conv", [constant("i", np.ones((1, 1, 64, 64))), constant("k", np.ones((1, 1, 64, 64)))], pads=[950] * 4),
    "a picture of gigabytes": lambda: folded(
        "Resize", [constant("i", np.ones((1, 1, 4, 4))), constant("", []), constant("s", [1, 1, 1e6, 1e6])]),
    "a pad of terabytes": lambda: folded("Pad", [constant("i", [1.0]), constant("p", [1 << 40] * 2, np.int64)]),
    "a range of terabytes": lambda: folded("Range", [constant(n, v, np.float32) for n, v in zip("abc", (0, 1e12, 1))]),
}  # fmt: skip


@pytest.mark.timeout(HANG)
@pytest.mark.parametrize("case", DONE)
def test_what_is_not_is_done_in_linear_time(case: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(DONE[case]().SerializeToString())
    found = load(tmp_path / "m.onnx")
    canonicalize(found)
    facts.describe(found, {})


@pytest.mark.timeout(HANG)
def test_a_product_that_doubles(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(growing_product(40).SerializeToString())
    canonicalize(load(tmp_path / "m.onnx"))


def test_a_polynomial_does_not_grow_without_end() -> None:
    total = Poly.of("a") + Poly.of("b")
    for _ in range(40):
        total = total * total
        assert len(total.terms) <= MOST_TERMS
    assert not total.at_least(0)
    quotient = Poly.of("a")
    for _ in range(40):
        quotient = (quotient + 1) // (quotient + 2)
    assert len(str(quotient)) < 1000
