"""Load and save ONNX files. A file is untrusted input, and an output file is whole or not there."""

from __future__ import annotations

import errno
import gc
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import google.protobuf.message  # type: ignore[import-untyped]
import numpy as np
import onnx
import onnx_ir as ir

from xopt import files
from xopt.errors import InputError
from xopt.ir import contrib
from xopt.ir.native import check_native
from xopt.ir.references import check_references
from xopt.ir.schema import STANDARD
from xopt.ir.shapes import LARGEST_CONSTANT, without_weights
from xopt.ir.untrusted import bounded_memory, check_grids, check_proto, check_weights, drop_value_info

LARGEST_MESSAGE = (1 << 31) - 1
"""Bytes of a protobuf message; a larger model needs external data."""
EMBEDDED_WEIGHTS = 1_800_000_000
"""Bytes of weights up to which they are written into the model file itself."""
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint?)",
    b"\x80": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x7fELF": "a compiled library",
    b"\x1f\x8b": "a gzip archive",
    b"<": "markup (an error page or a Git LFS pointer?)",
    b"version https://git-lfs": "a Git LFS pointer",
    b"{": "JSON",
}

OLDEST_IR = 3
"""Version of the file format from which on opsets exist."""

logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # its warnings about a bad file come back as errors here


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file of any opset that the installed onnx knows, with external data beside it.

    The model is its own: the files may change.
    The graph is as it was exported, except that the exporter's notes about intermediate values are dropped.

    Raises:
        InputError: ``E-FILE`` (not there, not readable), ``E-FORMAT`` (no ONNX, truncated, contradictory),
            ``E-EXTERNAL-DATA`` (missing, outside of the model's folder, wrong size), ``E-NAN-WEIGHTS``,
            ``E-UNSUPPORTED-OP`` (an op that neither ai.onnx nor ``xopt.ir.contrib`` has).
    """
    if not isinstance(path, (str, os.PathLike)):
        cure = "give the path of an ONNX file"
        raise InputError("E-FILE", f"a model cannot be loaded from {type(path).__name__}", cure=cure)
    path = Path(path)
    cure = "name an .onnx file, of at most 2 GB: larger models have external data"
    proto = _parse(files.read_bytes(path, "the model", LARGEST_MESSAGE, cure), path)
    folder = path.parent
    try:
        check_proto(proto, folder)
        drop_value_info(proto)
        model = _deserialize(proto, folder)
        contrib.adopt(model)
        _read_external(model)
        check_graph(model)
    except InputError as error:
        where = f"{error.where} of {path}" if error.where else f"file {path}"
        raise InputError(error.code, error.what, where=where, cure=error.cure) from error.__cause__
    return model


def check_graph(model: ir.Model) -> None:
    """Check a model whose tensors are known to be sound: its nodes by ONNX's own checker, its weights for NaN.

    Raises:
        InputError: ``E-FORMAT``, ``E-UNSUPPORTED-OP``, ``E-NAN-WEIGHTS``.
    """
    check_splits(model)
    check_nodes(model)
    check_grids(model)
    check_weights(model)


def check_nodes(model: ir.Model) -> None:
    """Check that every op has a meaning; nodes, attributes and names by ONNX's own checker, on a copy without weights.

    Raises:
        InputError: ``E-FORMAT``, ``E-UNSUPPORTED-OP``.
    """
    check_references(model)
    for node in model.graph.all_nodes():
        if node.domain not in STANDARD and node.op_identifier() not in model.functions:
            contrib.check_node(node)
    try:
        with bounded_memory():
            proto = without_weights(model)
            for value in [*proto.graph.input, *proto.graph.output]:
                value.type.tensor_type.shape.SetInParent()  # the checker wants a shape, which a model need not declare
            check_native(proto)
            onnx.checker.check_model(proto)
    except InputError:
        raise
    except Exception as error:
        raise _malformed(error) from error


def check_splits(model: ir.Model) -> None:
    """Refuse a Split that claims other outputs than it has.

    Raises:
        InputError: ``E-FORMAT``.
    """
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in (node for body in bodies for node in body.all_nodes()):
        claimed = node.attributes.get("num_outputs")
        if node.op_type != "Split" or claimed is None or claimed.is_ref() or claimed.value == len(node.outputs):
            continue
        what = f"num_outputs of Split is {claimed.value}, and it has {len(node.outputs)}"
        raise InputError("E-FORMAT", what, where=f"node {node.name!r}", cure="export the model again")


def _deserialize(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    try:
        with bounded_memory():
            model: ir.Model = ir.from_proto(proto)
            bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
            for body in bodies:
                if not _is_sorted(body):  # tools append what they add
                    body.sort()
            for graph in model.graphs():
                ir.external_data.set_base_dir(graph, folder)
    except Exception as error:
        raise _malformed(error) from error
    return model


def _is_sorted(body: ir.Graph | ir.Function) -> bool:
    """Whether every node stands behind those whose results it reads, also the nodes of subgraphs."""
    seen: set[ir.Node] = set()
    for node in body.all_nodes():
        producers = (value.producer() for value in node.inputs if value is not None)
        if any(producer is not None and producer not in seen for producer in producers):
            return False
        seen.add(node)
    return True


def _read_external(model: ir.Model) -> None:
    """Bring external data into this process's memory: a mapped file may change or end while it is used.

    Raises:
        InputError: ``E-EXTERNAL-DATA``: shorter than when it was checked, not readable; ``E-MEMORY``.
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    external = [value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor)]
    files.check_memory(sum(tensor.nbytes for tensor in external))
    read: dict[tuple[str, int], ir.TensorProtocol] = {}
    for value in values:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            place = str(tensor.path), tensor.offset or 0
            known = read.get(place)
            same = known is not None and known.dtype == tensor.dtype and known.shape == tensor.shape
            value.const_value = read[place] = known if known is not None and same else _own(tensor)
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _own(attribute.value))


def _own(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """The tensor with its bytes in memory; numbers of less than a byte are unpacked by onnx_ir."""
    if tensor.dtype.bitwidth < 8:
        return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
    try:
        content = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset or 0)
    except OSError as error:
        content, reason = np.empty(0, np.uint8), str(error.strerror)
    else:
        reason = "the file has become shorter"
    if content.size != tensor.nbytes:
        cure = "leave the data as it is while the model is loaded"
        raise InputError("E-EXTERNAL-DATA", f"{tensor.path} cannot be read: {reason}", cure=cure)
    array = content.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
    return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)


def _malformed(error: Exception) -> InputError:
    """An error of onnx or onnx_ir about the content of a model, in our words."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split()).split(" ==> ")[0][:300] or type(cause).__name__
    if "No Op registered" in text or "No schema registered" in text or "Unrecognized" in text:
        return InputError("E-UNSUPPORTED-OP", text, cure="export the model with standard ONNX ops")
    return InputError("E-FORMAT", f"the graph is malformed: {text}", cure="export or download the model again")


def _parse(data: bytes, path: Path) -> onnx.ModelProto:
    for magic, kind in _FOREIGN.items():
        if data.startswith(magic):
            raise InputError(
                "E-FORMAT",
                f"this is {kind}, not an ONNX model",
                where=str(path),
                cure="export it with torch.onnx.export",
            )
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except (google.protobuf.message.DecodeError, RecursionError, MemoryError) as error:
        raise InputError(
            "E-FORMAT",
            "the file is truncated or not an ONNX model",
            where=str(path),
            cure="export or download it again",
        ) from error
    if not proto.HasField("graph") or not proto.graph.output or proto.ir_version < OLDEST_IR:
        raise InputError(
            "E-FORMAT", "the file holds no ONNX graph", where=str(path), cure="export or download it again"
        )
    return proto


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``path``: the same model gives the same bytes, and an interrupted run leaves the old file.

    Weights beyond 1.8 GB go to one file beside it, ``<stem>-<digest>.data``. Its name follows its content, so that a
    model file never meets the data of another.

    Raises:
        InputError: ``E-OUTPUT``: the folder is not there or not writable, the disk is full.
    """
    path = Path(path)
    with output_errors(path):
        if weight_bytes(model) > EMBEDDED_WEIGHTS:
            data = _with_external_data(model, path).SerializeToString(deterministic=True)
        else:
            data = to_bytes(model)
        with replacing(path) as file:
            file.write(data)


def to_bytes(model: ir.Model) -> bytes:
    """``model`` as one ONNX file with all weights in it; the same model gives the same bytes."""
    copy = model.clone()
    if any(isinstance(tensor, ir.ExternalTensor) for tensor in _weights(copy)):
        gc.collect()  # what waits for collection may point into mapped files, which are closed now
        ir.external_data.load_to_model(copy)
    data: bytes = ir.to_proto(copy).SerializeToString(deterministic=True)
    return data


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(tensor.nbytes for tensor in _weights(model))


def _weights(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


def _with_external_data(model: ir.Model, path: Path) -> onnx.ModelProto:
    """Write all large tensors to one file in the order of the graph; returns the model that refers to it."""
    copy = model.clone()
    values = [value for graph in copy.graphs() for value in graph.initializers.values()]
    digest, placed, offset = hashlib.sha256(), [], 0
    partial = path.with_name(f".{path.stem}.{os.getpid()}.data")
    try:
        with partial.open("wb") as file:
            for value in values:
                tensor = value.const_value
                if tensor is None or tensor.nbytes <= LARGEST_CONSTANT or tensor.dtype == ir.DataType.STRING:
                    continue
                data = tensor.tobytes()
                digest.update(data)
                file.write(data)
                placed.append((value, tensor, offset))
                offset += len(data)
            file.flush()
            os.fsync(file.fileno())
        location = f"{path.stem}-{digest.hexdigest()[:16]}.data"
        partial.replace(path.with_name(location))
    finally:
        partial.unlink(missing_ok=True)
    for value, tensor, start in placed:
        value.const_value = ir.ExternalTensor(
            location,
            start,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            base_dir=path.parent,
        )
    return ir.to_proto(copy)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    A link is followed, and stays. The file has no name until it is complete, where the file system can do that: a
    process that is killed leaves nothing. A device or a pipe is written to as it is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb", buffering=0) as device:
            yield device
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _unnamed(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not partial.exists():
                os.link(
                    f"/proc/self/fd/{file.fileno()}", partial, src_dir_fd=file.fileno()
                )  # follows with a folder only
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _unnamed(partial: Path) -> BinaryIO:
    """A new file in the folder of ``partial``, without a name or, where there is no such thing, called so."""
    try:
        descriptor = os.open(partial.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        return partial.open("wb")
    return os.fdopen(descriptor, "wb")


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into an ``E-OUTPUT`` that names ``path``."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise InputError(
            "E-OUTPUT",
            f"cannot write: {error.strerror or error}",
            where=str(path),
            cure="free some space" if full else "choose a folder that exists and is writable",
        ) from error
