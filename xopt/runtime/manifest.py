"""The manifest of a compiled artifact: what it computes, where it runs, and the digests of its files.

An artifact is a trio in one folder: ``model.so`` (code), ``model.weights`` (one blob of 64-byte aligned tensors,
packed for the kernels) and ``manifest.json``. The library may be called otherwise: ``NAME.so``, ``NAME.weights``
and, unless NAME is ``model``, ``NAME.manifest.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xopt.errors import InputError

FORMAT = 1
ALIGNMENT = 64


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
        limits: the largest size of a symbolic dimension, where a table in the model bounds it.
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
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """The manifest as it is stored: indented JSON, keys in a fixed order."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse a stored manifest.

        Raises:
            InputError: E-ARTIFACT, not a manifest, or of another format version.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise InputError(
                    "E-ARTIFACT",
                    f"the artifact has format {content['format']}, this version reads {FORMAT}",
                    where=where,
                    cure="compile the model again",
                )
            return cls(
                target=str(content["target"]),
                device=int(content["device"]),
                features=tuple(content["features"]),
                versions=dict(content["versions"]),
                digests=dict(content["digests"]),
                pipeline=str(content["pipeline"]),
                inputs=tuple(_tensor(item) for item in content["inputs"]),
                outputs=tuple(_tensor(item) for item in content["outputs"]),
                weights=tuple(_weight(item) for item in content["weights"]),
                limits={str(name): int(most) for name, most in content["limits"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "E-ARTIFACT", "the manifest cannot be read", where=where, cure="compile the model again"
            ) from error


def _tensor(item: Mapping[str, Any]) -> TensorInfo:
    values = item.get("values")
    return TensorInfo(
        str(item["name"]), str(item["dtype"]), tuple(item["shape"]), None if values is None else (values[0], values[1])
    )


def _weight(item: Mapping[str, Any]) -> WeightInfo:
    return WeightInfo(
        str(item["name"]), str(item["dtype"]), tuple(item["shape"]), int(item["offset"]), int(item["bytes"])
    )


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
