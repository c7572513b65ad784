"""What a model file claims, checked before anything is allocated or opened because of it.

Every tensor must carry exactly the bytes that its type and dimensions ask for; external data must lie in the model's
folder, or in the cache that it belongs to; weights must be numbers. Each failure is an ``InputError`` that names the
tensor.
"""

from __future__ import annotations

import math
import resource
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir.bounds import check_bounds, check_rank
from xopt.ir.references import GRAPH_OF_CALL

NATIVE_MEMORY = 1 << 30
"""Bytes that native code may allocate on the word of a model file (shape inference, constant folding)."""
LARGEST_DIMENSION = 1 << 40
OPSETS = range(1, onnx.defs.onnx_opset_version() + 1)
WEIGHT_OPS = frozenset(
    [
        "MatMul",
        "Gemm",
        "Conv",
        "ConvTranspose",
        "Einsum",
        "LayerNormalization",
        "RMSNormalization",
        "BatchNormalization",
    ]
)
_TYPED_FIELDS = {
    "float_data": (onnx.TensorProto.FLOAT, onnx.TensorProto.COMPLEX64),
    "double_data": (onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX128),
    "int64_data": (onnx.TensorProto.INT64,),
    "uint64_data": (onnx.TensorProto.UINT32, onnx.TensorProto.UINT64),
    "string_data": (onnx.TensorProto.STRING,),
}


@contextmanager
def bounded_memory(extra: int = NATIVE_MEMORY) -> Iterator[None]:
    """Let the heap grow by at most ``extra`` bytes inside the block, so that a hostile size is a ``MemoryError``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    wanted = pages * resource.getpagesize() + extra
    if soft != resource.RLIM_INFINITY and soft <= wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def check_proto(proto: onnx.ModelProto, folder: Path) -> None:
    """Check all tensors, inputs and outputs of ``proto``; external data is looked for under ``folder``.

    Raises:
        InputError: ``E-FORMAT``, ``E-EXTERNAL-DATA`` or ``E-UNSUPPORTED-OP`` (sparse tensors).
    """
    check_bounds(proto)
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx"):
            check_opset(opset.version)
    for value in [*proto.graph.input, *proto.graph.output]:
        _check_value(value)
    for nodes, graphs in _scopes(proto):
        for graph in graphs:
            if graph.sparse_initializer:
                raise InputError(
                    "E-UNSUPPORTED-OP", "the model has sparse initializers", cure="export it with dense weights"
                )
            for tensor in graph.initializer:
                check_tensor(tensor, folder)
        for node in nodes:
            for attr in node.attribute:
                if attr.ref_attr_name and attr.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                    what = f"attribute {attr.name!r} {GRAPH_OF_CALL}"
                    cure = "export the model without functions"
                    raise InputError("E-FORMAT", what, where=f"node {node.name or node.op_type!r}", cure=cure)
                for tensor in [attr.t, *attr.tensors] if attr.HasField("t") else attr.tensors:
                    check_tensor(tensor, folder, where=f"constant of node {node.name or node.op_type!r}")


def check_opset(version: int) -> None:
    """Refuse versions of ai.onnx that cannot be brought to the canonical one."""
    if version not in OPSETS:
        raise InputError(
            "E-UNSUPPORTED-OP",
            f"the model uses opset {version} of ai.onnx",
            cure=f"export it with an opset from {OPSETS[0]} to {OPSETS[-1]}",
        )


def drop_value_info(proto: onnx.ModelProto) -> None:
    """Forget what the exporter noted about intermediate values: it is often stale, and is inferred afresh.

    Axes of inputs and outputs that are named by an empty text have no name.
    """
    for value in [*proto.graph.input, *proto.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param") and not dim.dim_param:
                dim.ClearField("dim_param")
    for _, graphs in _scopes(proto):
        for graph in graphs:
            del graph.value_info[:]
    for function in proto.functions:
        del function.value_info[:]


def _scopes(proto: onnx.ModelProto) -> Iterator[tuple[Iterable[onnx.NodeProto], list[onnx.GraphProto]]]:
    """All lists of nodes, each with the graph that holds it (none for a function's body), subgraphs included."""
    pending: list[tuple[Iterable[onnx.NodeProto], list[onnx.GraphProto]]] = [(proto.graph.node, [proto.graph])]
    pending += [(function.node, []) for function in proto.functions]
    while pending:
        scope = pending.pop()
        yield scope
        for node in scope[0]:
            for attr in node.attribute:
                inner = [attr.g, *attr.graphs] if attr.HasField("g") else list(attr.graphs)
                pending += [(graph.node, [graph]) for graph in inner]


def _check_value(value: onnx.ValueInfoProto) -> None:
    """An input or output of the model: a tensor of numbers, with dimensions that can be."""
    where = f"value {value.name!r}"
    kind = value.type.WhichOneof("value")
    if kind is None:
        what = "inputs and outputs must have a declared type"
        raise InputError("E-FORMAT", what, where=where, cure="export the model again")
    if kind != "tensor_type":
        raise _no_numbers(f"a value of type {kind.removesuffix('_type').replace('_', ' ')}", where)
    if (name := _UNCOUNTED.get(value.type.tensor_type.elem_type)) is not None:
        raise _no_numbers(f"a tensor of {name}", where)
    check_rank(len(value.type.tensor_type.shape.dim), where)
    for dim in value.type.tensor_type.shape.dim:
        if dim.HasField("dim_value") and not 0 <= dim.dim_value <= LARGEST_DIMENSION:
            raise InputError(
                "E-FORMAT", f"dimension {dim.dim_value} cannot be", where=where, cure="name dynamic dimensions instead"
            )


_UNCOUNTED = {
    onnx.TensorProto.STRING: "texts",
    onnx.TensorProto.COMPLEX64: "complex numbers",
    onnx.TensorProto.COMPLEX128: "complex numbers",
}


def _no_numbers(what: str, where: str) -> InputError:
    cure = "leave what prepares the data out of the model: its inputs and outputs are tensors of numbers"
    return InputError("E-UNSUPPORTED-OP", f"the model takes or gives {what}", where=where, cure=cure)


def check_tensor(tensor: onnx.TensorProto, folder: Path, where: str = "") -> None:
    """Compare the size that ``tensor`` declares with the data that it has."""
    where = where or f"tensor {tensor.name!r}"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise _bad_tensor(f"element type {tensor.data_type} is unknown", where)
    check_rank(len(tensor.dims), where)
    if any(not 0 <= dim <= LARGEST_DIMENSION for dim in tensor.dims):
        raise _bad_tensor(f"dimensions {list(tensor.dims)} cannot be", where)
    count = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise _bad_tensor("strings cannot be external data", where)
        _check_external(tensor, math.ceil(count * dtype.bitwidth / 8), folder, where)
    elif tensor.HasField("raw_data"):
        if dtype == ir.DataType.STRING or len(tensor.raw_data) != math.ceil(count * dtype.bitwidth / 8):
            raise _bad_tensor(f"{len(tensor.raw_data)} bytes do not make {list(tensor.dims)} of {dtype.name}", where)
    else:
        field = next((name for name, types in _TYPED_FIELDS.items() if tensor.data_type in types), "int32_data")
        if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            per_value = 2.0
        else:
            per_value = 1.0 if dtype == ir.DataType.STRING else min(1, dtype.bitwidth / 8)  # strings have no width
        if len(getattr(tensor, field)) != math.ceil(count * per_value):
            found = len(getattr(tensor, field))
            raise _bad_tensor(f"{found} values do not make {list(tensor.dims)} of {dtype.name}", where)


def _bad_tensor(what: str, where: str) -> InputError:
    return InputError("E-FORMAT", what, where=where, cure="the file is damaged: export or download it again")


def _check_external(tensor: onnx.TensorProto, size: int, folder: Path, where: str) -> None:
    """External data must be a regular file of ``folder``, or of its cache, that holds ``size`` bytes at the offset."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = folder / location
    if not location or "\0" in location or Path(location).is_absolute():
        raise _bad_external(f"external data at {location!r} is not a path in the model's folder", where)
    try:
        roots, real = _roots(folder), path.resolve()
    except (OSError, RuntimeError) as error:
        raise _bad_external(f"external data at {location!r} cannot be reached: {error}", where) from error
    if ".." in Path(location).parts:  # onnx refuses it as well, wherever it leads
        raise _bad_external(f"external data at {location!r} goes through a folder above", where)
    if not any(root in real.parents for root in roots):
        raise _bad_external(f"external data at {location!r} lies outside of the model's folder", where)
    try:
        status = real.stat()
    except OSError as error:
        raise InputError(
            "E-EXTERNAL-DATA",
            f"external data {location[:200]!r} cannot be read: {error.strerror}",
            where=where,
            cure="put the data file beside the model file",
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise _bad_external(f"{path} is not a file", where)
    if status.st_nlink > 1:
        raise _bad_external(f"{path} has several hard links", where)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except ValueError:
        raise _bad_external("offset and length of external data are not numbers", where) from None
    if offset < 0 or length != size:
        raise _bad_external(f"{length} bytes at {offset} do not make {list(tensor.dims)} ({size} bytes)", where)
    if offset + length > status.st_size:
        raise InputError(
            "E-EXTERNAL-DATA",
            f"{path} ends at byte {status.st_size}, data to byte {offset + length} is needed",
            where=where,
            cure="the file is truncated: copy it again",
        )


def _roots(folder: Path) -> list[Path]:
    """Where a link may lead: into the model's folder, or to the files of the cache that the folder is a snapshot of.

    The cache of the Hugging Face hub keeps every file once, as ``blobs/DIGEST``; ``snapshots/REVISION`` are links.
    """
    root = folder.resolve()
    places = [above.parent.parent / "blobs" for above in (root, *root.parents) if above.parent.name == "snapshots"]
    return [root, *(place.resolve() for place in places[:1] if place.is_dir() and not place.is_symlink())]


def _bad_external(what: str, where: str) -> InputError:
    return InputError("E-EXTERNAL-DATA", what, where=where, cure="keep the data as plain files beside the model file")


def check_grids(model: ir.Model) -> None:
    """The scales and zero points of stored integers must be as many as what they are for.

    Raises:
        InputError: ``E-FORMAT``.
    """
    for node in model.graph.all_nodes():
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 2:
            continue
        x, scale, *zero = [None if given is None else given.const_value for given in node.inputs]
        if x is None or scale is None:
            continue
        axis, block = (
            int(node.attributes[name].as_int()) if name in node.attributes else default
            for name, default in (("axis", 1), ("block_size", 0))
        )
        shape, sizes = tuple(x.shape.numpy()), tuple(scale.shape.numpy())
        if not _scales(shape, sizes, axis, block) or any(one is not None and one.size != scale.size for one in zero):
            raise InputError(
                "E-FORMAT",
                f"scales of shape {list(sizes)} do not fit axis {axis} of {list(shape)}",
                where=f"node {node.name!r}",
                cure="quantize the model again",
            )


def _scales(shape: tuple[int, ...], sizes: tuple[int, ...], axis: int, block: int) -> bool:
    """Whether ``sizes`` is one scale, one for each place on an axis, or one for each block of places on it."""
    if not block and sizes in ((), (1,)):
        return True
    if not -len(shape) <= axis < len(shape) or block < 0:
        return False
    if not block:
        return sizes == (shape[axis],)
    blocks = [size if place != axis % len(shape) else -(-size // block) for place, size in enumerate(shape)]
    return list(sizes) == blocks


def check_weights(model: ir.Model) -> None:
    """Refuse weights that are not finite; constants that mask with infinities are no weights.

    Raises:
        InputError: ``E-NAN-WEIGHTS``: NaN anywhere, or an infinity in a linear layer, convolution or norm.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or tensor.size == 0:
                continue
            low, high = _extremes(tensor)
            weight = any(use.node.op_type in WEIGHT_OPS for use in value.uses())
            if math.isnan(low) or (weight and (math.isinf(low) or math.isinf(high))):
                raise InputError(
                    "E-NAN-WEIGHTS",
                    "the model holds weights that are not finite numbers",
                    where=f"tensor {value.name!r}",
                    cure="check the checkpoint it was exported from",
                )


def _extremes(tensor: ir.TensorProtocol) -> tuple[float, float]:
    """Least and greatest element, NaN when any is; without a temporary of the tensor's size."""
    array = tensor.numpy()
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    return float(array.min()), float(array.max())
