"""Mutations of a file's bytes: what a broken download, a bad disk or a fuzzer of protobuf does."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

EDGES = (0, 1, 0x7F, 0x80, 0xFF)


def mutate(data: bytes, random: Random) -> tuple[bytes, list[str]]:
    """``data`` after one to four changes anywhere, and their names."""
    changes = random.choices(CHANGES, k=random.choice((1, 1, 2, 4)))
    for change in changes:
        data = change(data, random)
    return data, [change.__name__ for change in changes]


def flip(data: bytes, random: Random) -> bytes:
    place = random.randrange(max(len(data), 1))
    return data[:place] + bytes([(data[place] if data else 0) ^ (1 << random.randrange(8))]) + data[place + 1 :]


def overwrite(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:start] + bytes(random.choice(EDGES) for _ in range(end - start)) + data[end:]


def cut(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:start] + data[end:]


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def insert(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data) + 1)
    return data[:place] + random.randbytes(random.randrange(1, 9)) + data[place:]


def repeat(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:end] + data[start:end] * random.choice((1, 2, 100)) + data[end:]


def varint(data: bytes, random: Random) -> bytes:
    """A length or a number becomes huge, or negative."""
    place = random.randrange(len(data) + 1)
    number = random.choice(
        (b"\xff" * 9 + b"\x01", b"\x80" * 9 + b"\x01", b"\xff\xff\xff\xff\x07", b"\xff\xff\xff\xff\x0f")
    )
    return data[:place] + number + data[place + random.choice((0, 1, 2)) :]


def swap_fields(data: bytes, random: Random) -> bytes:
    """Two fields of the outermost message, or of one inside it, change places."""
    spans = fields(data)
    inner = [(start, end) for start, body, end in spans if end - body > 8]
    if inner and random.random() < 0.8:
        start, end = random.choice(inner)
        body = next(middle for first, middle, last in spans if (first, last) == (start, end))
        return data[:body] + swap_fields(data[body:end], random) + data[end:]
    if len(spans) < 2:
        return flip(data, random)
    (a, _, b), (c, _, d) = sorted(random.sample(spans, 2))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def drop_field(data: bytes, random: Random) -> bytes:
    """A field of a message inside vanishes, so that all lengths around it lie."""
    spans = fields(data)
    if not spans:
        return flip(data, random)
    start, body, end = random.choice(spans)
    if end - body > 8 and random.random() < 0.8:
        return data[:body] + drop_field(data[body:end], random) + data[end:]
    return data[:start] + data[end:]


def fields(data: bytes) -> list[tuple[int, int, int]]:
    """(start, start of the content, end) of each field with a length in a message, as far as it can be read."""
    found, place = [], 0
    while place < len(data):
        start = place
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 2:
            length, place = _varint(data, place)
            found.append((start, place, place + length))
            place += length
        elif kind == 0:
            _, place = _varint(data, place)
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        else:
            break
    return [span for span in found if span[2] <= len(data)]


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            break
    return value, place


def _span(data: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 2, 4, 16, 256, 4096)))


CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    flip, flip, overwrite, cut, truncate, insert, repeat, varint, swap_fields, drop_field,
)  # fmt: skip
