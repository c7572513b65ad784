"""The manifest of a compiled artifact: what it computes, where it runs, and the digests of its files.

An artifact is a trio in one folder: ``model.so`` (code), ``model.weights`` (one blob of 64-byte aligned tensors,
packed for the kernels) and ``manifest.json``. The library may be called otherwise: ``NAME.so``, ``NAME.weights``
and, unless NAME is ``model``, ``NAME.manifest.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from xopt.errors import InputError

FORMAT = 3
ALIGNMENT = 64
LARGEST_MANIFEST = 1 << 26
"""Bytes."""
LARGEST_NUMBER = 1 << 48
HIGHEST_RANK = 32
DEVICES = (1, 2)
"""Kinds of memory as DLPack numbers them: the CPU's, a CUDA device's."""
DTYPES = frozenset(
    ["bool", "float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
)
BYTES = frozenset(
    (
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn"),
        *("float6_e2m3fn", "float6_e3m2fn", "int4", "uint4", "int2", "uint2"),
    )
)
"""Types of inputs and outputs that numpy has from ``ml_dtypes``, a byte for each number; bfloat16 is one of two."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, numpy dtype and shape of an input or output; a symbolic dimension is its name.

    Attributes:
        values: the closed range that an integer input's values must lie in (it indexes a table), or None.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    values: tuple[int, int] | None = None


@dataclass(frozen=True)
class WeightInfo:
    """One tensor in the weight file: ``bytes`` bytes from ``offset``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        target: name of the target, with its variant.
        device: kind of memory the code works on, as DLPack numbers it.
        features: CPU features that the code needs, as ``/proc/cpuinfo`` names them.
        versions: versions of the packages that compiled it.
        digests: SHA-256 of the library and of the weight file, by file name.
        pipeline: identifier of the compiler's passes.
        inputs, outputs: in the order of the model.
        weights: the tensors of the weight file, in the order in which the code takes them.
        segments: the weights that are ONNX models, each of a node that onnxruntime runs, and the node.
        limits: the largest size of a symbolic dimension, where a table in the model bounds it.
        empty: the symbolic dimensions that may be 0.
        format: version of this description.
    """

    target: str
    device: int
    features: tuple[str, ...]
    versions: Mapping[str, str]
    digests: Mapping[str, str]
    pipeline: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: tuple[WeightInfo, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    empty: tuple[str, ...] = ()
    segments: Mapping[str, str] = field(default_factory=dict)
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """The manifest as it is stored: indented JSON, keys in a fixed order."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse a stored manifest, and check that it can be one.

        Raises:
            InputError: E-ARTIFACT, not a manifest, or of another format version.
        """
        try:
            content = _parsed(text)
            if content["format"] == FORMAT:
                return cls(**{name: read(content[name]) for name, read in _FIELDS.items()})
            version = str(content["format"])[:40]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:200]
            what = f"the manifest cannot be read ({reason or type(error).__name__})"
            raise InputError("E-ARTIFACT", what, where=where, cure="compile the model again") from error
        what = f"the artifact has format {version}, this version reads {FORMAT}"
        raise InputError("E-ARTIFACT", what, where=where, cure="compile the model again")


def _parsed(text: str | bytes) -> Mapping[str, Any]:
    if len(text) > LARGEST_MANIFEST:
        raise ValueError(f"it has more than {LARGEST_MANIFEST >> 20} MB")
    content: Mapping[str, Any] = _of(json.loads(text), dict)
    return content


def _of(value: Any, kind: type) -> Any:
    """The value, which has exactly this type."""
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:60]!r} is no {kind.__name__}")
    return value


def _text(value: Any) -> str:
    return str(_of(value, str))


def _natural(value: Any) -> int:
    """A number of bytes, of elements, or a size of an axis."""
    if not 0 <= _of(value, int) <= LARGEST_NUMBER:
        raise ValueError(f"{str(value)[:60]} is out of range")
    return int(value)


def _device(value: Any) -> int:
    if _of(value, int) not in DEVICES:
        raise ValueError(f"device {str(value)[:60]} is unknown")
    return int(value)


def _dtype(value: Any) -> str:
    if _text(value) not in DTYPES | BYTES | {"bfloat16"}:
        raise ValueError(f"dtype {str(value)[:60]!r} is unknown")
    return str(value)


def _sizes(value: Any) -> list[Any]:
    """The sizes of the axes of a tensor."""
    if len(_of(value, list)) > HIGHEST_RANK:
        raise ValueError(f"a tensor has {len(value)} axes")
    return list(value)


def _axis(value: Any) -> int | str:
    return _text(value) if isinstance(value, str) else _natural(value)


def _range(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    low, high = (int(_of(one, int)) for one in _of(value, list))
    return low, high


def _tensors(items: Any) -> tuple[TensorInfo, ...]:
    found = tuple(
        TensorInfo(
            _text(item["name"]),
            _dtype(item["dtype"]),
            tuple(_axis(size) for size in _sizes(item["shape"])),
            _range(item.get("values")),
        )
        for item in _of(items, list)
    )
    if len({info.name for info in found}) < len(found):
        raise ValueError("two tensors have one name")
    return found


def _weights(items: Any) -> tuple[WeightInfo, ...]:
    return tuple(_weight(item) for item in _of(items, list))


def _weight(item: Any) -> WeightInfo:
    shape = tuple(_natural(size) for size in _sizes(item["shape"]))
    info = WeightInfo(
        _text(item["name"]), _dtype(item["dtype"]), shape, _natural(item["offset"]), _natural(item["bytes"])
    )
    if info.dtype not in DTYPES or prod(shape) * np.dtype(info.dtype).itemsize != info.bytes:
        raise ValueError(f"{info.bytes} bytes do not make weight {info.name[:60]}, {list(shape)} of {info.dtype}")
    if info.offset % ALIGNMENT:
        raise ValueError(f"weight {info.name[:60]} does not lie at a multiple of {ALIGNMENT} bytes")
    return info


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_text(name) for name in _of(value, list))


def _texts(value: Any) -> dict[str, str]:
    return {name: _text(text) for name, text in _of(value, dict).items()}


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "target": _text,
    "device": _device,
    "features": _names,
    "versions": _texts,
    "digests": _texts,
    "pipeline": _text,
    "inputs": _tensors,
    "outputs": _tensors,
    "weights": _weights,
    "segments": _texts,
    "limits": lambda value: {name: _natural(most) for name, most in _of(value, dict).items()},
    "empty": _names,
}


def array_type(name: str) -> np.dtype[Any]:
    """The numpy type of an input or output."""
    if name not in DTYPES:
        import ml_dtypes  # noqa: F401  numpy then knows it by its name
    return np.dtype(name)


def stored_type(name: str) -> str:
    """What the code takes an input or output for: the runtime has no types of less than a byte, nor bfloat16."""
    return "uint8" if name in BYTES else "uint16" if name == "bfloat16" else name


def read_segments(library: Path) -> list[str]:
    """The nodes of an artifact that onnxruntime runs."""
    manifest = Manifest.from_json(manifest_path(library).read_bytes(), str(library))
    return list(manifest.segments.values())


def weights_path(library: Path) -> Path:
    """The weight file that belongs to a library."""
    return library.with_suffix(".weights")


def manifest_path(library: Path) -> Path:
    """The manifest that belongs to a library."""
    return library.with_name("manifest.json" if library.stem == "model" else f"{library.stem}.manifest.json")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine_features() -> frozenset[str]:
    """The CPU features of this machine by their names in ``/proc/cpuinfo`` (empty where there is none)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
