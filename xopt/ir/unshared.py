"""What the copies of a model share, and what becomes of it when one of them is changed.

``Model.clone`` copies graphs, nodes and values, and shares the rest: arrays, which may be gigabytes, and small things
such as types and attributes. A pass may change whatever it finds in its model, so it is given one whose small things
are its own, and whose arrays are read-only: to write into one is an error at the place where it happens. What writes
past that (torch takes no notice of it) is found by comparing checksums.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.generic]


def unshare(model: ir.Model) -> None:
    """Give ``model`` types, attributes and tensors of its own, in place; tensors keep their memory, read-only."""
    tensors: dict[int, ir.TensorProtocol] = {}
    for value in values_of(model):
        value.type = _own_type(value.type)
        if value.const_value is not None:
            value.const_value = _own_tensor(value.const_value, tensors)
    for node in _nodes(model):
        for name, attribute in list(node.attributes.items()):
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                node.attributes[name] = _own_attribute(attribute, tensors)


def read_only(array: Array) -> Array:
    """The same memory as an array that cannot be made writeable again."""
    plain = array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
    shown = np.asarray(plain.data.toreadonly())
    return shown if plain is array else shown.view(array.dtype)


def checksums(model: ir.Model) -> dict[str, int]:
    """A checksum of each array of ``model`` that some copy of it could change, by the name of its value or node."""
    found = {}
    for value in values_of(model):
        if isinstance(value.const_value, ir.Tensor | ir.PackedTensor):
            found[f"value {value.name!r}"] = checksum(_memory(value.const_value))
    for node in _nodes(model):
        for attribute in node.attributes.values():
            for index, tensor in enumerate(_tensors(attribute)):
                if isinstance(tensor, ir.Tensor | ir.PackedTensor):
                    name = f"attribute {attribute.name!r} of node {node.name!r} ({index})"
                    found[name] = checksum(_memory(tensor))
    return found


def checksum(array: Array) -> int:
    """CRC-32 of the bytes of an array: some gigabytes a second."""
    if array.dtype.hasobject:
        return hash(tuple(array.reshape(-1).tolist()))
    plain = np.ascontiguousarray(array)
    return zlib.crc32(plain.reshape(-1).view(np.uint8).data if plain.size else b"")


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of all graphs and functions."""
    for graph in model.graphs():
        yield from dict.fromkeys([*graph.inputs, *graph.initializers.values()])
    for function in model.functions.values():
        yield from function.inputs
    for node in _nodes(model):
        yield from node.outputs


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _own_type(kind: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    if isinstance(kind, ir.TensorType | ir.SparseTensorType):
        return type(kind)(kind.dtype, denotation=kind.denotation)
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_own_type(kind.elem_type), denotation=kind.denotation)  # type: ignore[arg-type]
    return kind


def _own_attribute(attribute: ir.Attr, tensors: dict[int, ir.TensorProtocol]) -> ir.Attr:
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR and value is not None:
        value = _own_tensor(value, tensors)
    elif attribute.type == ir.AttributeType.TENSORS and value is not None:
        value = tuple(_own_tensor(tensor, tensors) for tensor in value)
    return ir.Attr(attribute.name, attribute.type, value, attribute.ref_attr_name, doc_string=attribute.doc_string)


def _tensors(attribute: ir.Attr) -> list[ir.TensorProtocol]:
    if attribute.value is None:
        return []
    if attribute.type == ir.AttributeType.TENSOR:
        return [attribute.value]
    return list(attribute.value) if attribute.type == ir.AttributeType.TENSORS else []


def _own_tensor(tensor: ir.TensorProtocol, known: dict[int, ir.TensorProtocol]) -> ir.TensorProtocol:
    """A tensor over the same memory; those that give new or mapped arrays (of files and protobufs) stay themselves."""
    if id(tensor) not in known:
        known[id(tensor)] = _wrapped(tensor)
    return known[id(tensor)]


def _memory(tensor: ir.Tensor[Any] | ir.PackedTensor[Any]) -> Array:
    return tensor.numpy_packed() if isinstance(tensor, ir.PackedTensor) else tensor.numpy()


def _wrapped(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.Tensor | ir.PackedTensor):
        return tensor
    array = _memory(tensor)
    if array.dtype.hasobject:
        return tensor
    kind = ir.PackedTensor if isinstance(tensor, ir.PackedTensor) else ir.Tensor
    return kind(
        read_only(array),
        tensor.dtype,
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )
