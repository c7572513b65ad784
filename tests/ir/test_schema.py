"""What nodes carry, what rules read of it, and that ONNX's schemas have nothing that nobody has looked at."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from xopt.ir import edit, schema
from xopt.ir.canonical import layout
from xopt.ir.number_rules import NUMBER_RULES
from xopt.ir.symbolic import DIMENSIONS, Symbols
from xopt.ir.width import RULES

OLDEST = 13
NOT_READ = {
    "Attention": "past_key past_value nonpad_kv_seqlen left_window_size right_window_size softmax_precision"
    " present_key present_value qk_matmul_output",
    "BatchNormalization": "training_mode running_mean running_var mean var saved_mean saved_var",
    "Cast": "saturate round_mode",
    "CastLike": "saturate round_mode",
    "Constant": "sparse_value",
    "DequantizeLinear": "block_size output_dtype",
    "Dropout": "mask",
    "GroupNormalization": "stash_type",
    "LayerNormalization": "stash_type Mean InvStdDev",
    "Resize": "roi",
    "MaxPool": "Indices",
    "QuantizeLinear": "block_size output_dtype precision saturate",
    "RMSNormalization": "stash_type",
    "Range": "stash_type",
}
"""What rules take for an operator that they do not know: each of these has been looked at."""

TABLES = {*schema.READ, *DIMENSIONS, *NUMBER_RULES, *RULES, *layout._BEFORE}
OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional


def versions() -> list[onnx.defs.OpSchema]:
    newest = onnx.defs.onnx_opset_version()
    found = {
        (op, s.since_version): s
        for op in TABLES
        for version in range(OLDEST, newest + 1)
        if (s := _schema(op, version)) is not None
    }
    return [found[key] for key in sorted(found)]


def _schema(op: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, version)
    except onnx.defs.SchemaError:
        return None


def unseen(op: onnx.defs.OpSchema) -> set[str]:
    """What a version of an operator may carry, and nobody has looked at."""
    optional = [given.name for given in op.inputs if given.option == OPTIONAL]
    later = [given.name for given in op.outputs[1:]]
    return {*op.attributes, *optional, *later} - {*names(schema.READ, op.name), *names(NOT_READ, op.name)}


def names(table: dict[str, str], op: str) -> list[str]:
    return table.get(op, "").split()


@pytest.mark.parametrize("op", versions(), ids=lambda op: f"{op.name}-{op.since_version}")
def test_everything_in_every_schema_is_read_or_known_not_to_be(op: onnx.defs.OpSchema) -> None:
    assert not unseen(op)


@pytest.mark.parametrize("op", ["Attention", "Softmax", "Squeeze"])
def test_the_walk_finds_what_no_table_has(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schema.READ, op, "")
    assert any(unseen(version) for version in versions() if version.name == op)


def test_tables_name_nothing_that_no_schema_has() -> None:
    for table in (schema.READ, NOT_READ):
        for op in table:
            every = [s for s in onnx.defs.get_all_schemas_with_history() if s.name == op and s.domain == ""]
            known = {n for s in every for n in (*s.attributes, *(p.name for p in (*s.inputs, *s.outputs)))}
            assert set(names(table, op)) <= known, op


def node(op: str, inputs: int, outputs: int = 1, **attributes: object) -> ir.Node:
    values = [
        ir.Value(name=f"x{i}", shape=ir.Shape([2, 4]), type=ir.TensorType(ir.DataType.FLOAT)) for i in range(inputs)
    ]
    return ir.Node("", op, values, ir.convenience.convert_attributes(attributes), num_outputs=outputs)


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (node("Softmax", 1, axis=0), []),
        (node("Softmax", 1, axis=0, temperature=2.0), ["temperature"]),
        (node("Softmax", 2), ["input 1"]),
        (node("Attention", 4), []),
        (node("Attention", 6), ["past_key", "past_value"]),
        (node("Attention", 3, left_window_size=-1), []),
        (node("Attention", 3, left_window_size=2), ["left_window_size"]),
        (node("Attention", 3, softmax_precision=1), []),
        (node("Attention", 3, softmax_precision=11), ["softmax_precision"]),
        (node("BatchNormalization", 5, training_mode=0), []),
        (node("BatchNormalization", 5, training_mode=1), ["training_mode"]),
        (node("Concat", 5, axis=1), []),
    ],
)
def test_unread(found: ir.Node, what: list[str]) -> None:
    assert schema.unread(found) == what
    assert edit.is_op(found, found.op_type) == (not what)


def test_an_output_counts_when_it_is_read() -> None:
    norm = node("LayerNormalization", 2, outputs=3)
    assert edit.producer(norm.outputs[0], "LayerNormalization") is norm
    ir.Node("", "Identity", [norm.outputs[1]])
    assert schema.unread(norm) == ["Mean"]
    assert edit.producer(norm.outputs[0], "LayerNormalization") is None


def test_no_shape_is_concluded_for_a_node_that_carries_more() -> None:
    for more, known in (({}, True), ({"temperature": 2.0}, False)):
        made = node("Softmax", 1, **more)
        graph = ir.Graph([made.inputs[0]], [made.outputs[0]], nodes=[made])
        assert (Symbols(graph).dims(made.outputs[0]) is not None) == known
