"""Arrays are written under any name that an archive can hold, and read back by it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from xopt.data.archive import write_arrays
from xopt.errors import InputError

NAMES = [
    "file",
    "args",
    "kwds",
    "allow_pickle",
    "self",
    "a/b",
    "/a",
    "..a",
    "",
    " ",
    "\r\x1b'\"",
    "\U0001f600",
    "x" * 10_000,
]


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    arrays = {name: np.arange(index + 2) * 0.5 for index, name in enumerate(NAMES)}
    arrays["half"] = np.ones((2, 0, 3), ml_dtypes.bfloat16)
    with (tmp_path / "arrays.npz").open("wb") as file:
        write_arrays(file, arrays)
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as read:
        assert read.files == list(arrays)
        for name, array in arrays.items():
            assert read[name].tobytes() == array.tobytes()
            assert read[name].shape == array.shape


@pytest.mark.parametrize("name", ["a\0b", "\udcff", "x" * 70_000, "..", "../a", "a/../../b", "..\\a"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with (tmp_path / "arrays.npz").open("wb") as file, pytest.raises(InputError) as caught:
        write_arrays(file, {"fine": np.ones(1), name: np.ones(1)})
    assert caught.value.code == "E-OUTPUT" and caught.value.cure
