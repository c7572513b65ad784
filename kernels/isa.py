"""What a template must know of the vector unit: width, registers, latency; one template then serves every CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Isa:
    """A vector instruction set as seen by a register-tiled kernel.

    Args:
        name: identifier, part of kernel names and of database keys.
        lanes: float32 values in one vector register.
        registers: architectural vector registers.
        chains: independent multiply-adds in flight that hide the latency (pipes times latency).
        pairs: has VPMADDWD (two products of 16-bit integers a lane).
        vnni: has VPDPBUSD (four products of bytes a lane).
        bf16: has VDPBF16PS (two products of bfloat16 a lane).
    """

    name: str
    lanes: int
    registers: int
    chains: int
    pairs: bool = False
    vnni: bool = False
    bf16: bool = False

    @property
    def token(self) -> str:
        """The name as part of an identifier."""
        return self.name.replace("-", "_")

    def tile_rows(self, vectors: int) -> int:
        """Rows of an outer-product tile ``vectors`` wide: accumulators, one row of operands and a broadcast fit."""
        return max(1, (self.registers - 1 - vectors) // vectors)


AVX512 = Isa("avx512", lanes=16, registers=32, chains=8, pairs=True)
AVX512_VNNI = replace(AVX512, name="avx512-vnni", vnni=True)
AVX512_BF16 = replace(AVX512_VNNI, name="avx512-bf16", bf16=True)
AVX2 = Isa("avx2", lanes=8, registers=16, chains=8, pairs=True)
AVX2_VNNI = replace(AVX2, name="avx2-vnni", vnni=True)
NEON = Isa("neon", lanes=4, registers=32, chains=8)

BY_NAME = {isa.name: isa for isa in (AVX512, AVX512_VNNI, AVX512_BF16, AVX2, AVX2_VNNI, NEON)}
