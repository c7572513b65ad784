"""Arrays in archives: written under any name that one can hold, and read only when they are what they say."""

from __future__ import annotations

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from xopt.data import npz
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
        npz.write(file, arrays)
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as read:
        assert read.files == list(arrays)
        for name, array in arrays.items():
            assert read[name].tobytes() == array.tobytes()
            assert read[name].shape == array.shape


@pytest.mark.parametrize("name", ["a\0b", "\udcff", "x" * 70_000, "..", "../a", "a/../../b", "..\\a"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with (tmp_path / "arrays.npz").open("wb") as file, pytest.raises(InputError) as caught:
        npz.write(file, {"fine": np.ones(1), name: np.ones(1)})
    assert caught.value.code == "E-OUTPUT" and caught.value.cure


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        npz.read(folder / "d.npz")
    return caught.value


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    """A member of an archive with this header, whatever it says."""
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode("latin1") + data


def header(shape: str = "(2,)", descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


MEMBERS = {
    "sound": ("x.npy", npy(header(), bytes(8)), None),
    "terabytes": ("x.npy", npy(header("(1099511627776,)")), "bytes do not make"),
    "overflow": ("x.npy", npy(header("(4294967296, 4294967296)")), "bytes do not make"),
    "negative": ("x.npy", npy(header("(-1,)")), "bytes do not make"),
    "too short": ("x.npy", npy(header("(3,)"), bytes(8)), "bytes do not make"),
    "too long": ("x.npy", npy(header("(1,)"), bytes(8)), "bytes do not make"),
    "objects": ("x.npy", npy(header(descr="'|O'"), b"cos\nsystem\n(S'true'\ntR."), "it holds object"),
    "text": ("x.npy", npy(header(descr="'<U2'"), bytes(16)), "it holds <U2"),
    "empty text": ("x.npy", npy(header("(1152921504606846976,)", "'<U0'")), "it holds <U0"),
    "nested header": ("x.npy", npy("(" * 9000), "no plain array"),
    "giant header": ("x.npy", npy(" " * 70_000, version=2), "no plain array"),
    "endless header": ("x.npy", npy(header(), version=2)[:8] + b"\xff\xff\xff\xff", "no plain array"),
    "no dict": ("x.npy", npy("[1]"), "no plain array"),
    "huge rank": ("x.npy", npy(header("(" + "1," * 100 + ")"), bytes(4)), "no plain array"),
    "no npy": ("readme.txt", b"hello", "'readme.txt'"),
    "a folder": ("folder/", b"", "'folder/'"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_member_is_what_it_says(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    name, content, says = MEMBERS[case]
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr(name, content)
    if says is None:
        assert npz.read(tmp_path / "d.npz")["x"].tolist() == [0, 0]
        return
    error = refusal(tmp_path)
    assert error.code == "E-DATA" and says in str(error) and "allow_pickle" not in str(error)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["x.npy", "x"])
def test_a_name_that_is_there_twice(second: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", npy(header(), bytes(8)))
        archive.writestr(second, npy(header(), bytes(8)))
    assert "there twice" in str(refusal(tmp_path))


def test_a_wrong_checksum(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.full(1000, 7.0, np.float32))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[content.index(np.float32(7).tobytes()) + 400] ^= 1
    (tmp_path / "d.npz").write_bytes(content)
    assert "CRC" in str(refusal(tmp_path))


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "_PLENTY", 1 << 20)
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros(1 << 20))
    assert "100 times its size" in str(refusal(tmp_path))
