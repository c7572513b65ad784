"""What is made of a name is safe, whatever the name is."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from xopt.ir.names import file_stem, identifier


@given(st.text(st.characters()), st.integers(0, 10**6))
def test_identifiers(name: str, number: int) -> None:
    made = identifier("weight", number, name)
    assert re.fullmatch(r"weight_\d+(_[A-Za-z0-9_]{1,40})?", made)
    assert made.isascii() and made.isidentifier()
    assert made != identifier("weight", number + 1, name)


def test_they_resemble_the_name() -> None:
    assert identifier("weight", 3, "layers.0.ffn/up") == "weight_3_layers_0_ffn_up"
    assert identifier("input", 0, None) == identifier("input", 0, "\u0660\u00e9\r'") == "input_0"
    assert len(identifier("input", 0, "x" * 10_000)) < 60


@given(st.text(st.characters()))
def test_parts_of_file_names(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{0,40}", file_stem(name))


def test_a_plain_part_stays() -> None:
    assert file_stem("prune-heads_2") == "prune-heads_2"
    assert file_stem("../../etc/passwd\0") == "_etc_passwd_"
