"""Recurrent cells over time: LSTM, GRU and the plain one, after the product of all inputs with their weights.

    X = inputs @ W^T + b                [T, B, G * P]     by the GEMM kernel: all steps at once
    for each row b:                     rows in parallel
        for t = 0 .. length_b - 1:      in order, or from the end
            gates = X[t, b] + h @ R     G gates, P wide each
            c, h = cell(gates, c, h)
            Y[t, b] = h
What is behind the length of a row is 0. The width P of a gate is the hidden size H rounded up to whole vectors.

Source: the operators LSTM, GRU and RNN of ONNX (opset 14; names of gates and equations are theirs). A step reads all of
R once: H * G * P * 4 bytes over the bandwidth of the cache that holds it is the least time it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tvm import tirx

from xopt.kernels import vector
from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    bind,
    dim,
    i64,
    keep,
    load,
    local,
    parallel,
    partial_store,
    prim_func,
    serial,
    splat,
    store,
    workspace,
)
from xopt.kernels.fixed import Config as Config
from xopt.kernels.fixed import heuristic as heuristic
from xopt.kernels.fixed import space as space
from xopt.kernels.isa import Isa

VERSION = 1

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""By cell."""
UNROLL = 4
"""Vectors of a gate that are summed up together: enough to hide the latency of a multiply-add."""


@dataclass(frozen=True)
class Activation:
    """One of ONNX's functions with its parameters."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class Workload:
    """One direction of one layer.

    Args:
        cell: "LSTM", "GRU" or "RNN".
        hidden: H.
        activations: f, g and h as far as the cell has them.
        backwards: from the last step to the first.
        lengths: rows have lengths of their own.
        peepholes: LSTM, gates see the cell state.
        reset_after: GRU, the reset gate is applied behind the product (linear_before_reset).
        coupled: LSTM, the forget gate is 1 - input gate.
        clip: bound of what goes into activations; 0 for none.
    """

    cell: str
    hidden: int
    activations: tuple[Activation, ...]
    backwards: bool = False
    lengths: bool = False
    peepholes: bool = False
    reset_after: bool = False
    coupled: bool = False
    clip: float = 0.0

    def padded(self, isa: Isa) -> int:
        """P: H in whole vectors."""
        return -(-self.hidden // isa.lanes) * isa.lanes


def name(workload: Workload, config: Config, isa: Isa) -> str:
    w = workload
    functions = "_".join(f"{a.name}{a.alpha:g}{a.beta:g}" for a in w.activations)
    flags = "".join(str(int(flag)) for flag in (w.backwards, w.lengths, w.peepholes, w.reset_after, w.coupled))
    text = f"recurrent_{w.cell}_{w.hidden}_{functions}_{flags}_{w.clip:g}_{isa.token}"
    return "".join(letter if letter.isalnum() or letter == "_" else "m" if letter == "-" else "p" for letter in text)


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (X [T, B, G * P], R [H, G * P], h0 [B, P], [c0 [B, P]], [bias [P]], [peepholes [3 * P]],
    [lengths int64 [B]], Y [T, B, H], h [B, H], [c [B, H]]).

    ``c0`` and ``c`` are an LSTM's, ``bias`` is that of the hidden state in a GRU whose reset gate comes after the
    product, ``peepholes`` are those of the gates i, o and f.
    """
    return prim_func(name(workload, config, isa), lambda: _Cell(workload, isa).emit())


class _Cell:
    """The body of one kernel: arguments, states, and what happens in a step."""

    def __init__(self, workload: Workload, isa: Isa) -> None:
        self.w, self.lanes, self.width = workload, isa.lanes, workload.padded(isa)
        self.columns = GATES[workload.cell] * self.width

    def emit(self) -> None:
        w, width = self.w, self.width
        steps, batch = dim(None, "steps"), dim(None, "batch")
        self.x = argument("x", (steps, batch, self.columns))
        self.r = argument("r", (w.hidden, self.columns))
        first = [argument("h0", (batch, width))]
        if w.cell == "LSTM":
            first.append(argument("c0", (batch, width)))
        self.bias = argument("bias", (width,)) if w.reset_after else None
        self.peepholes = argument("peepholes", (3 * width,)) if w.peepholes else None
        lengths = argument("lengths", (batch,), "int64") if w.lengths else None
        self.y = argument("y", (steps, batch, w.hidden))
        last = [argument("h", (batch, w.hidden))]
        if w.cell == "LSTM":
            last.append(argument("c", (batch, w.hidden)))
        with parallel(batch) as row:
            states = [workspace((width,)) for _ in first]
            self.gates = workspace((self.columns,))
            for state, start in zip(states, first):
                self._each(partial(self._copy, start, row, state))
            length = steps if lengths is None else bind(tirx.max(tirx.min(lengths[row], steps), i64(0)))
            with serial(length) as step:
                t = bind(length - 1 - step if w.backwards else step)
                {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[w.cell](t, row, states)
            with serial(steps - length) as rest:
                self._write(self.y, lambda j: splat(0.0, self.lanes), length + rest, row)
            for state, result in zip(states, last):
                self._write(result, partial(self._at, state), row)

    # -- cells -----------------------------------------------------------------------------------------------------
    def _lstm(self, t: Expr, row: Expr, states: list[Buffer]) -> None:
        h, c = states
        f, g, out = (self._function(place) for place in range(3))
        self._product(h, 0, self.columns, lambda j: load(self.x, t, row, j, lanes=self.lanes))

        def cell(j: Expr) -> None:
            old = self._keep(load(c, j, lanes=self.lanes))
            entered = self._keep(f(self._gate(0, j, old)))
            kept = splat(1.0, self.lanes) - entered if self.w.coupled else self._keep(f(self._gate(2, j, old)))
            new = self._keep(kept * old + entered * self._keep(g(self._gate(3, j))))
            self._put(c, new, j)
            shown = self._keep(f(self._gate(1, j, new)))
            self._put(h, shown * self._keep(out(new)), j)

        self._each(cell)
        self._write(self.y, lambda j: load(h, j, lanes=self.lanes), t, row)

    def _gru(self, t: Expr, row: Expr, states: list[Buffer]) -> None:
        (h,) = states
        f, g = self._function(0), self._function(1)
        last = 2 * self.width

        def start(j: Expr) -> Expr:
            return load(self.x, t, row, j, lanes=self.lanes)

        self._product(h, 0, last, start)
        if self.w.reset_after:
            assert self.bias is not None
            self._product(h, last, self.columns, lambda j: load(self.bias, j - last, lanes=self.lanes))
        else:
            reset = workspace((self.width,))
            self._each(lambda j: self._put(reset, self._keep(f(self._gate(1, j))) * load(h, j, lanes=self.lanes), j))
            self._product(reset, last, self.columns, start)

        def cell(j: Expr) -> None:
            update = self._keep(f(self._gate(0, j)))
            proposal = self._gate(2, j)
            if self.w.reset_after:
                proposal = start(last + j) + self._keep(f(self._gate(1, j))) * load(
                    self.gates, last + j, lanes=self.lanes
                )
                proposal = self._clipped(self._keep(proposal))
            new = self._keep(g(proposal))
            old = load(h, j, lanes=self.lanes)
            self._put(h, self._keep((splat(1.0, self.lanes) - update) * new + update * old), j)

        self._each(cell)
        self._write(self.y, lambda j: load(h, j, lanes=self.lanes), t, row)

    def _rnn(self, t: Expr, row: Expr, states: list[Buffer]) -> None:
        (h,) = states
        f = self._function(0)
        self._product(h, 0, self.columns, lambda j: load(self.x, t, row, j, lanes=self.lanes))
        self._each(lambda j: self._put(h, f(self._gate(0, j)), j))
        self._write(self.y, lambda j: load(h, j, lanes=self.lanes), t, row)

    # -- parts -----------------------------------------------------------------------------------------------------
    def _product(self, state: Buffer, first: int, end: int, start: Callable[[Expr], Expr]) -> None:
        """Sets gates[first:end] to start + state @ R[:, first:end], some vectors at a time in registers."""
        vectors = (end - first) // self.lanes
        for at, count, together in _blocks(vectors):
            with serial(count) as block:
                base = bind(first + (at + block * together) * self.lanes)
                sums = [local((self.lanes,)) for _ in range(together)]
                for place, total in enumerate(sums):
                    store(total, start(base + place * self.lanes), 0, lanes=self.lanes)
                with serial(self.w.hidden) as k:
                    factor = self._keep(splat(state[k], self.lanes))
                    for place, total in enumerate(sums):
                        weight = load(self.r, k, base + place * self.lanes, lanes=self.lanes)
                        store(total, load(total, 0, lanes=self.lanes) + factor * weight, 0, lanes=self.lanes)
                for place, total in enumerate(sums):
                    store(self.gates, load(total, 0, lanes=self.lanes), base + place * self.lanes, lanes=self.lanes)

    def _gate(self, place: int, j: Expr, seen: Expr | None = None) -> Expr:
        """What goes into the activation of a gate; ``seen`` is the cell state that a peephole shows."""
        value = load(self.gates, place * self.width + j, lanes=self.lanes)
        if seen is not None and self.peepholes is not None:
            value = value + load(self.peepholes, place * self.width + j, lanes=self.lanes) * seen
        return self._clipped(self._keep(value))

    def _clipped(self, value: Expr) -> Expr:
        if not self.w.clip:
            return value
        low = self._keep(vector.at_least(value, -self.w.clip, self.lanes))
        return self._keep(vector.at_most(low, self.w.clip, self.lanes))

    def _function(self, place: int) -> Callable[[Expr], Expr]:
        activation = self.w.activations[place]
        return lambda x: activated(activation, x, self.lanes)

    def _each(self, emit: Callable[[Expr], None]) -> None:
        with serial(self.width // self.lanes) as v:
            emit(bind(v * self.lanes))

    def _keep(self, value: Expr) -> Expr:
        return keep(value, self.lanes)

    def _put(self, buffer: Buffer, value: Expr, j: Expr) -> None:
        store(buffer, value, j, lanes=self.lanes)

    def _at(self, state: Buffer, j: Expr) -> Expr:
        return load(state, j, lanes=self.lanes)

    def _copy(self, start: Buffer, row: Expr, state: Buffer, j: Expr) -> None:
        self._put(state, load(start, row, j, lanes=self.lanes), j)

    def _write(self, buffer: Buffer, value: Callable[[Expr], Expr], *row: Expr) -> None:
        """A row of H elements from vectors of P."""
        whole, tail = divmod(self.w.hidden, self.lanes)
        with serial(whole) as v:
            store(buffer, value(v * self.lanes), *row, v * self.lanes, lanes=self.lanes)
        if tail:
            partial_store(
                buffer, value(i64(whole * self.lanes)), *row, whole * self.lanes, count=tail, lanes=self.lanes
            )


def _blocks(vectors: int) -> list[tuple[int, int, int]]:
    """(first vector, how many blocks, vectors of a block): blocks of `UNROLL`, then single ones."""
    blocks, rest = divmod(vectors, UNROLL)
    found = [(0, blocks, UNROLL)] if blocks else []
    return [*found, (blocks * UNROLL, rest, 1)] if rest else found


DEFAULTS = {
    "Affine": (1.0, 0.0), "LeakyRelu": (0.01, 0.0), "ThresholdedRelu": (1.0, 0.0), "ScaledTanh": (1.0, 1.0),
    "HardSigmoid": (0.2, 0.5), "Elu": (1.0, 0.0),
}  # fmt: skip
"""Parameters of activations where a model names none, as the operators of these names have them."""


def activated(activation: Activation, x: Expr, lanes: int) -> Expr:
    """An activation of a vector. Raises ValueError for a name that ONNX does not have."""
    a, b = splat(activation.alpha, lanes), splat(activation.beta, lanes)
    zero, one = splat(0.0, lanes), splat(1.0, lanes)
    functions: dict[str, Callable[[], Expr]] = {
        "Sigmoid": lambda: vector.sigmoid(x, lanes),
        "Tanh": lambda: vector.tanh(x, lanes),
        "Relu": lambda: vector.relu(x, lanes),
        "Affine": lambda: a * x + b,
        "LeakyRelu": lambda: tirx.Select(x < zero, a * x, x),
        "ThresholdedRelu": lambda: tirx.Select(x < a, zero, x),
        "ScaledTanh": lambda: a * vector.tanh(keep(b * x, lanes), lanes),
        "HardSigmoid": lambda: vector.at_most(keep(vector.at_least(a * x + b, 0.0, lanes), lanes), 1.0, lanes),
        "Elu": lambda: tirx.Select(x < zero, a * (vector.exp(x, lanes) - one), x),
        "Softsign": lambda: x / (one + tirx.abs(x)),
        "Softplus": lambda: tirx.log(one + vector.exp(x, lanes)),
    }
    if activation.name not in functions:
        raise ValueError(f"there is no activation {activation.name}")
    return functions[activation.name]()
