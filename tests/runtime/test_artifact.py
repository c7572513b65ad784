"""Files of an artifact: whatever is in them is refused or runs right, and what runs is the session's own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xopt.errors import InputError
from xopt.runtime.manifest import digest, manifest_path, weights_path
from xopt.runtime.session import Session

FEEDS = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), np.int64)}


def manifest(library: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(manifest_path(library).read_text())
    return content


def rewrite(library: Path, content: object) -> None:
    manifest_path(library).write_text(json.dumps(content))


def agree(library: Path) -> None:
    """Write the digests of the files as they are now into the manifest."""
    rewrite(library, manifest(library) | {"digests": {f.name: digest(f) for f in (library, weights_path(library))}})


def refused(library: Path) -> str:
    with pytest.raises(InputError) as caught:
        Session.load(library).run(FEEDS)
    assert caught.value.code in ("E-ARTIFACT", "E-CPU", "E-DATA"), caught.value
    return str(caught.value)


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"\0" * path.stat().st_size), lambda p: p.unlink()])
def test_a_session_owns_what_it_runs_on(copy: Path, change: Callable[[Path], object]) -> None:
    session = Session.load(copy)
    expected = session.run(FEEDS)["last_hidden_state"]
    for file in (copy, weights_path(copy), manifest_path(copy)):
        change(file)
    np.testing.assert_array_equal(session.run(FEEDS)["last_hidden_state"], expected)


def test_weights_that_shrink_do_not_end_the_process(copy: Path) -> None:
    script = f"""
import numpy as np
from xopt.runtime.session import Session
session = Session.load({str(copy)!r})
open({str(weights_path(copy))!r}, "w").close()
session.run({{"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), np.int64)}})
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_numbers_that_are_checked_are_those_that_are_used(artifact: Path) -> None:
    """Between the check of an index and its use, the caller's array may change."""
    session = Session.load(artifact)
    ids = np.array([[1, 2, 3]])
    taken = session._arguments(FEEDS | {"input_ids": ids})
    ids[...] = 1 << 40
    assert np.from_dlpack(taken[0]).max() == 3


@pytest.mark.parametrize("keep", [0, 10, 63, 64, 1000, 0.3, 0.7, 0.99])
def test_a_cut_library_is_refused_though_its_digest_is_right(copy: Path, keep: float) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content[: int(keep if keep > 1 or keep == 0 else keep * len(content))])
    agree(copy)
    assert "library" in refused(copy) or "cut off" in refused(copy)


def test_a_library_without_content_is_refused(copy: Path) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content[:64] + bytes(len(content) - 64))
    agree(copy)
    assert "cannot be loaded" in refused(copy)


def test_a_library_for_another_machine_is_refused(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[18:20] = (243).to_bytes(2, "little")  # RISC-V
    copy.write_bytes(content)
    agree(copy)
    assert "another kind of machine" in refused(copy)


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"\xff\xfe", b"[" * 100000, b'{"format": 2}', b'{"format": 1e400}'])
def test_what_is_no_manifest(copy: Path, text: bytes) -> None:
    manifest_path(copy).write_bytes(text)
    assert "manifest" in refused(copy) or "format" in refused(copy)


def test_a_manifest_of_any_size_is_refused(copy: Path) -> None:
    with manifest_path(copy).open("wb") as file:
        file.truncate(1 << 40)
    assert "MB" in refused(copy)


HOSTILE: list[object] = [
    None, -1, 999, 1 << 70, float("inf"), 1.5, True, "", "x", "\ud800", "float32",
    [], [1], {}, {"a": 1}, [[]], [{}], [None],
]  # fmt: skip


@pytest.mark.parametrize(
    "field", ["device", "features", "digests", "inputs", "outputs", "weights", "limits", "empty", "format"]
)
def test_fields_that_cannot_be(copy: Path, field: str) -> None:
    legal: dict[str, list[object]] = {"features": [[]], "limits": [{}], "empty": [[]]}
    content = manifest(copy)
    for value in HOSTILE:
        if value in legal.get(field, []):
            continue
        rewrite(copy, content | {field: value})
        if (field, value) == ("limits", {"a": 1}):  # an axis that no input has
            Session.load(copy).run(FEEDS)
        else:
            refused(copy)


@pytest.mark.parametrize("part", ["inputs", "outputs", "weights"])
@pytest.mark.parametrize("key", ["name", "dtype", "shape", "offset", "bytes", "values"])
def test_tensors_that_cannot_be(copy: Path, part: str, key: str) -> None:
    only_told = key == "name" or part == "outputs" or (key == "values" and part == "inputs")
    for value in HOSTILE:
        content = manifest(copy)
        before = content[part][0].get(key)
        content[part][0][key] = value
        rewrite(copy, content)
        try:
            session = Session.load(copy)
            session.run(dict(zip([info.name for info in session.inputs], FEEDS.values())))
        except InputError as error:
            found = error.code
        else:
            found = ""
        assert found in ("E-ARTIFACT", "E-DATA") or only_told or value == before or before is None, (value, found)
        content[part][0][key] = before
        rewrite(copy, content)


@pytest.mark.parametrize("offset", [1, 32, 63])
def test_weights_that_are_not_aligned_are_refused(copy: Path, offset: int) -> None:
    content = manifest(copy)
    content["weights"][0]["offset"] += offset
    rewrite(copy, content)
    assert "multiple of 64" in refused(copy)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("inputs", lambda items: items[:-1]),
        ("inputs", lambda items: [*items, {**items[0], "name": "more"}]),
        ("outputs", lambda items: items[:-1]),
        ("outputs", lambda items: [*items, {**items[0], "name": "more"}]),
        ("weights", lambda items: items[:-1]),
    ],
)
def test_more_or_fewer_tensors_than_the_code_has(copy: Path, part: str, change: Callable[[Any], Any]) -> None:
    content = manifest(copy)
    content[part] = change(content[part])
    rewrite(copy, content)
    feeds = FEEDS | {"more": FEEDS["input_ids"]}
    with pytest.raises(InputError) as caught:
        Session.load(copy).run({info["name"]: feeds[info["name"]] for info in content["inputs"]})
    assert caught.value.code in ("E-ARTIFACT", "E-DATA")


@pytest.mark.parametrize("axes", [33, 65, 500_000])
def test_a_tensor_of_many_axes_is_refused_at_once(copy: Path, axes: int) -> None:
    for part in ("inputs", "weights"):
        for size in (1, 1 << 48):
            content = manifest(copy)
            info = content[part][0]
            content[part][0] = info | {"shape": [*info["shape"], *[size] * (axes - len(info["shape"]))]}
            rewrite(copy, content)
            start = time.process_time()
            assert f"{axes} axes" in refused(copy)
            assert time.process_time() - start < 5


@pytest.mark.parametrize("size", [-64, 64, 1 << 40])
def test_weights_of_another_size_are_refused_before_they_are_read(copy: Path, size: int) -> None:
    with weights_path(copy).open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    assert "the manifest describes" in refused(copy)


def test_weights_that_no_memory_has_a_place_for(copy: Path) -> None:
    content = manifest(copy)
    content["weights"].append({"name": "w", "dtype": "int8", "shape": [1 << 43], "offset": 1 << 20, "bytes": 1 << 43})
    rewrite(copy, content)
    with weights_path(copy).open("r+b") as file:
        file.truncate((1 << 43) + (1 << 20))
    with pytest.raises(InputError, match="E-MEMORY"):
        Session.load(copy)


@pytest.mark.parametrize("name", [lambda path: path, weights_path, manifest_path])
def test_a_file_that_cannot_be_read(copy: Path, name: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def denied(path: Path, *given: Any, **named: Any) -> Any:
        if path == name(copy):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *given, **named)

    monkeypatch.setattr(Path, "open", denied)
    assert f"{name(copy).name} cannot be read (Permission denied)" in refused(copy)


def test_weights_of_other_shapes_are_refused(copy: Path) -> None:
    content = manifest(copy)
    for info in content["weights"]:
        info["shape"] = [*info["shape"][::-1], 1]
    rewrite(copy, content)
    refused(copy)


@pytest.mark.parametrize("path", [3, None, "\0", "x" * 5000, b"model.so", object()])
def test_what_is_no_path(path: object) -> None:
    with pytest.raises(InputError) as caught:
        Session.load(path)  # type: ignore[arg-type]
    assert caught.value.code == "E-ARTIFACT"


@pytest.mark.parametrize("feeds", [None, 3, [], "input_ids", {}, {3: 4}, {None: None}])
def test_what_are_no_inputs(artifact: Path, feeds: object) -> None:
    with pytest.raises(InputError) as caught:
        Session.load(artifact).run(feeds)  # type: ignore[arg-type]
    assert caught.value.code == "E-DATA"
