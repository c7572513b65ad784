"""An operator is ours by its body, and not by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.net import Net
from xopt.ir import canonicalize, load, ops, save
from xopt.ir.ops.meaning import is_own
from xopt.passes import MergeTokens
from xopt.pipeline.context import PassContext
from xopt.runtime.reference import ReferenceSession


def renamed(function: ir.Function) -> onnx.FunctionProto:
    """As a file has it, under other names inside."""
    proto = ir.to_proto(function)
    content = onnx.FunctionProto.FromString(proto.SerializeToString())
    names = {name: f"other {index}" for index, name in enumerate(n for node in proto.node for n in node.output)}
    for node in content.node:
        node.name = f"{node.name} other"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    content.output[:] = [names.get(name, name) for name in content.output]
    return content


@pytest.mark.parametrize("name", ops.MODULES)
def test_what_we_define_is_ours_under_any_names(name: str) -> None:
    assert is_own(ops.FUNCTIONS[name])
    assert is_own(ir.from_proto(renamed(ops.FUNCTIONS[name])))


def test_ours_are_still_ours_in_a_file(tmp_path: Path) -> None:
    model = builders.vit(image=32)
    assert MergeTokens(ratio=0.3).run(model, PassContext()).rewritten
    save(model, tmp_path / "model.onnx")
    read = load(tmp_path / "model.onnx")
    canonicalize(read)
    assert {node.op_type for node in read.graph if node.domain == ops.DOMAIN} == {"MergeTokens"}


@pytest.mark.parametrize("name", ops.MODULES)
def test_another_body_is_not(name: str) -> None:
    for change in ("operator", "input", "attribute", "missing", "default"):
        content = renamed(ops.FUNCTIONS[name])
        if change == "operator":
            next(node for node in content.node if node.op_type != "Constant").op_type = "Relu"
        elif change == "input":
            content.input[:] = list(content.input)[::-1]
        elif change == "attribute":
            node = next(
                node
                for node in content.node
                if any(a.HasField("i") or a.ints or a.HasField("t") for a in node.attribute)
            )
            found = next(a for a in node.attribute if a.HasField("i") or a.ints or a.HasField("t"))
            found.CopyFrom(onnx.helper.make_attribute(found.name, 77))
        elif change == "missing":
            content.output.pop()
        else:
            content.attribute_proto.append(onnx.helper.make_attribute("more", 1))
        assert not is_own(ir.from_proto(content)), change


def test_a_foreign_function_under_our_name_is_what_its_body_says() -> None:
    net = Net("foreign")
    x, mask = net.input("x", ["b", "s", 4]), net.input("mask", ["b", "s"], ir.DataType.BOOL)
    model = net_with_call(net, x, mask)
    feeds = {"x": np.ones((2, 3, 4), np.float32), "mask": np.ones((2, 3), bool)}
    expected = ReferenceSession(model).run(feeds)["y"]
    canonicalize(model)
    assert not any(node.domain == ops.DOMAIN for node in model.graph)
    np.testing.assert_array_equal(ReferenceSession(model).run(feeds)["y"], expected)
    assert expected.shape == (2, 3, 4) and (expected == -1).all()


def net_with_call(net: Net, x: ir.Value, mask: ir.Value) -> ir.Model:
    """``y = xopt::PackTokens(x, mask)`` where the file says that this negates."""
    y = net.op("Identity", x)
    net.output(y, "y")
    model = net.build()
    inner, unused = ir.Value(name="x"), ir.Value(name="mask")
    body = ir.Node("", "Neg", [inner])
    graph = ir.Graph([inner, unused], body.outputs, nodes=[body], opset_imports={"": 24})
    function = ir.Function(ops.DOMAIN, "PackTokens", graph=graph, attributes=[])
    model.functions[function.identifier()] = function
    model.graph.opset_imports[ops.DOMAIN] = 1
    (node,) = model.graph
    call = ir.Node(ops.DOMAIN, "PackTokens", [x, mask], name="call")
    model.graph.insert_before(node, call)
    node.replace_input_with(0, call.outputs[0])
    return model
