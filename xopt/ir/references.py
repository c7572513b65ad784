"""References to attributes: inside a function's body an attribute may stand for one of the call.

A reference that leads nowhere would be dropped by what reads the model, and the operator's default would be taken in
its place. Every reference is therefore looked up where the model is loaded: outside of functions there are none, inside
of them each names an attribute that the function declares, and each call gives those that have no default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from xopt.errors import InputError

GRAPH_OF_CALL = "refers to a graph of the call, which is not supported"


def check_references(model: ir.Model) -> None:
    """Look up every reference; InputError E-FORMAT for one that leads nowhere."""
    needed = {function.identifier(): _without_default(function) for function in model.functions.values()}
    _check(model.graph.all_nodes(), {}, needed)
    for function in model.functions.values():
        _check(function.all_nodes(), function.attributes, needed)


def _check(nodes: Iterable[ir.Node], declared: Iterable[str], needed: dict[ir.OperatorIdentifier, set[str]]) -> None:
    """Check the references and the calls among ``nodes``, where attributes ``declared`` may be referred to."""
    declared = set(declared)
    for node in nodes:
        for attribute, name in _references([node]):
            if name not in declared:
                what = f"attribute {attribute!r} refers to {name!r}, which no function around it declares"
                raise _nowhere(what, node)
        for name in sorted(needed.get(node.op_identifier(), set()) - set(node.attributes)):
            what = f"function {node.op_type} has no default for attribute {name!r}, and the call does not give it"
            raise _nowhere(what, node)


def _without_default(function: ir.Function) -> set[str]:
    """Declared attributes that the body refers to and that only a call can give."""
    used = {name for _, name in _references(function.all_nodes())}
    return {name for name, attribute in function.attributes.items() if attribute.value is None and name in used}


def _references(nodes: Iterable[ir.Node]) -> Iterator[tuple[str, str]]:
    """(attribute, what it refers to) of each reference; a graph that is none is found before it would be walked."""
    for node in nodes:
        for attribute in node.attributes.values():
            if attribute.ref_attr_name is not None:
                if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                    raise _nowhere(f"attribute {attribute.name!r} {GRAPH_OF_CALL}", node)
                yield attribute.name, attribute.ref_attr_name


def _nowhere(what: str, node: ir.Node) -> InputError:
    return InputError(
        "E-FORMAT", what, where=f"node {node.name!r} ({node.op_type})", cure="export or download the model again"
    )
