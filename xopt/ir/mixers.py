"""What mixes tokens in other ways than by a softmax over keys: named, so that nobody takes it for overlooked.

linear-attention    Q @ (K^T @ V): a product of a product, nothing but moves and numbers between
no-softmax          f(Q @ K^T) @ V with another f than a softmax: a sigmoid, a power, a decay
additive-attention  sum(softmax(X @ w) * X): tokens weighed by a projection of their own
mixed-heads         a matrix over the heads between Q @ K^T and its softmax (talking heads)
fourier             a Fourier transform
Attention in a branch or a body, which no pass looks into, is named after the operator: inside-if, inside-loop,
inside-scan.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import onnx_ir as ir

from xopt.ir import edit, walk
from xopt.ir.edit import is_op
from xopt.ir.projection import projection_into
from xopt.ir.stacks import MOVES, PRODUCTS, is_chosen
from xopt.ir.structure import Unrecognized

WEIGHS = frozenset("Relu Sigmoid Pow Where Clip Exp Softplus Mul Div Add Sub".split())  # noqa: SIM905
FAR = 10
"""Steps from one product back to the other."""


def mixers(model: ir.Model) -> list[Unrecognized]:
    """The nodes of a canonical model that are one of these, with the name as the reason."""
    return [Unrecognized(node, reason) for node in model.graph for reason in _reasons(node)]


def _reasons(node: ir.Node) -> Iterator[str]:
    if node.op_type in ("DFT", "STFT") and not node.domain:
        yield "fourier"
    elif is_op(node, *PRODUCTS) and _computed(node):
        crossed = set[frozenset[str]]().union(*(_products(value) for value in node.inputs))
        if frozenset() in crossed:
            yield "linear-attention"
        elif any("weighed" in way and "softmax" not in way for way in crossed):
            yield "no-softmax"
    elif is_op(node, "ReduceSum", "ReduceMean") and _weighs_itself(edit.producer(node.inputs[0], "Mul")):
        yield "additive-attention"
    elif is_op(node, "Softmax") and any("heads" in way for way in _products(node.inputs[0])):
        yield "mixed-heads"


def _computed(node: ir.Node) -> bool:
    """Whether all factors are computed, none a matrix of weights, fixed or chosen (of experts)."""
    return all(value is not None and value.const_value is None and not is_chosen(value) for value in node.inputs)


def _weighs_itself(product: ir.Node | None) -> bool:
    """Whether one factor of a Mul is a softmax of a projection of the other."""
    for weights, tokens in (product.inputs, product.inputs[::-1]) if product is not None else ():
        softmax = edit.producer(_before_moves(weights), "Softmax")
        scores = projection_into(_before_moves(softmax.inputs[0])) if softmax is not None else None
        if scores is not None and _before_moves(scores.input) is _before_moves(tokens):
            return True
    return False


def _before_moves(value: ir.Value | None) -> ir.Value | None:
    """What a value is but for its layout and for numbers that it is multiplied by."""
    while (node := value.producer() if value is not None else None) is not None and not node.domain:
        if node.op_type not in MOVES and not _scales(node):
            break
        value = node.inputs[0]
    return value


def nested_attention(model: ir.Model) -> list[Unrecognized]:
    """Each softmax between two products in a graph inside a node, with the operator around as the reason."""
    found = list[Unrecognized]()
    for node in model.graph:
        inner = (one for graph in walk.graphs(node) for one in graph.all_nodes())
        found += [Unrecognized(one, f"inside-{node.op_type.lower()}") for one in inner if _attends(one)]
    return found


def _attends(node: ir.Node) -> bool:
    """Whether a node is a softmax of a product of two computed tensors, and is read by one; or an Attention."""
    if is_op(node, "Softmax"):
        products = any("heads" not in way for way in _products(node.inputs[0]))
        return products and _is_multiplied(node)
    return is_op(node, "Attention")


def _is_multiplied(node: ir.Node) -> bool:
    """Whether a product reads what a node computes, behind moves and numbers."""
    seen, pending = {node}, [node]
    while pending:
        readers = {*edit.consumers(pending.pop().outputs[0])} - seen
        if any(is_op(reader, *PRODUCTS) and _computed(reader) for reader in readers):
            return True
        pending += [reader for reader in readers if reader.op_type in MOVES | WEIGHS or reader.op_type == "Dropout"]
        seen |= readers
    return False


Way: TypeAlias = tuple[ir.Value | None, frozenset[str]]
"""A value, and what lies between it and where the search began."""


def _products(value: ir.Value | None) -> set[frozenset[str]]:
    """What lies between a value and each product of two computed tensors up to `FAR` steps behind it."""
    found, level = set[frozenset[str]](), {(value, frozenset[str]())}
    for _ in range(FAR):
        level = {way for one, crossed in level for way in _behind(one, crossed, found)}
    return found


def _behind(value: ir.Value | None, crossed: frozenset[str], found: set[frozenset[str]]) -> Iterator[Way]:
    """The ways a step on; one that ends at a product is added to ``found``."""
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return
    if is_op(node, *PRODUCTS):
        if _computed(node):
            found.add(crossed)
        elif node.op_type == "MatMul" and "heads" not in crossed:
            yield node.inputs[0], crossed | {"heads"}
    elif node.op_type in MOVES or _scales(node):
        yield node.inputs[0], crossed
    elif node.op_type == "Softmax":
        yield node.inputs[0], crossed | {"softmax"}
    elif node.op_type in WEIGHS:
        for source in node.inputs:
            yield source, crossed | {"weighed"}


def _scales(node: ir.Node) -> bool:
    """Whether a node multiplies by a constant."""
    return node.op_type in ("Mul", "Div") and any(
        value is not None and value.const_value is not None for value in node.inputs
    )
