"""LSTM, GRU and RNN: one product for the inputs of all steps, then a kernel that goes through time.

X [T, B, I] ─▶ X @ W^T + b [T, B, gates] ─▶ kernel: h, c step by step ─▶ Y [T, directions, B, H], Y_h, Y_c
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from xopt.kernels import recurrent
from xopt.kernels.recurrent import GATES, Activation
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.fusion import Layer, linear
from xopt.targets.symbolic import Array, Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
FUNCTIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
"""The activations of a cell that names none."""
WITHOUT_PARAMETERS = frozenset(("Sigmoid", "Tanh", "Relu", "Softsign", "Softplus"))


def _activations(call: Call, cell: str, count: int) -> list[tuple[Activation, ...]]:
    """Of each direction. Parameters are listed for those functions that have some, in their order."""
    named = [str(name) for name in call.attr("activations") or FUNCTIONS[cell] * count]
    alphas, betas = list(call.attr("activation_alpha") or ()), list(call.attr("activation_beta") or ())
    if len(named) != len(FUNCTIONS[cell]) * count:
        raise call.unsupported(f"{len(named)} activations do not fit it")
    known = {name.lower(): name for name in (*recurrent.DEFAULTS, *WITHOUT_PARAMETERS)}
    result = []
    for name in named:
        function = known.get(name.lower())
        if function is None:
            raise call.unsupported(f"there is no activation {name}")
        alpha, beta = recurrent.DEFAULTS.get(function, (0.0, 0.0))
        if function not in WITHOUT_PARAMETERS:
            alpha = float(alphas.pop(0)) if alphas else alpha
            beta = float(betas.pop(0)) if betas and function in ("Affine", "ScaledTanh", "HardSigmoid") else beta
        result.append(Activation(function, alpha, beta))
    width = len(FUNCTIONS[cell])
    return [tuple(result[place : place + width]) for place in range(0, len(result), width)]


class _Layer:
    """One node: its sizes, and its inputs as the kernel wants them."""

    def __init__(self, call: Call, cell: str) -> None:
        self.call, self.cell = call, cell
        self.lowering = call.lowering
        isa = call.lowering.target.isa()
        if isa is None:
            raise call.unsupported("recurrent cells, on this target")
        self.isa = isa
        direction = str(call.attr("direction", "forward"))
        if direction not in DIRECTIONS:
            raise call.unsupported(f"there is no direction {direction}")
        self.directions = DIRECTIONS[direction]
        self.batch_first = bool(call.attr("layout", 0))
        hidden, declared = call.shape(2)[2], call.attr("hidden_size")
        if not isinstance(hidden, int) or declared not in (None, hidden):
            raise call.unsupported("its hidden size is not known, or not what its weights have")
        self.hidden, self.gates = hidden, GATES[cell]
        x = call.x(0)
        if str(x.ty.dtype) != "float32":
            raise call.unsupported(f"cells of {x.ty.dtype}")
        if self.batch_first:
            x = call.emit(relax.op.permute_dims(x, [1, 0, 2]))
        self.x = x
        self.steps, self.batch, self.features = self.lowering.shape_of(self.x)
        self._require_shapes()
        self.activations = _activations(call, cell, len(self.directions))
        self.coupled = cell == "LSTM" and bool(call.attr("input_forget", 0))
        self.after = cell == "GRU" and bool(call.attr("linear_before_reset", 0))
        self.clip = abs(float(call.attr("clip", 0.0)))
        self.width = self._workload(0).padded(isa)

    def _require_shapes(self) -> None:
        count, rows = len(self.directions), self.gates * self.hidden
        sizes: list[tuple[int, list[Dim]]] = [(1, [count, rows, self.features]), (2, [count, rows, self.hidden])]
        state = [self.batch, count, self.hidden] if self.batch_first else [count, self.batch, self.hidden]
        sizes += [(3, [count, 2 * rows]), (4, [self.batch]), (5, state)]
        if self.cell == "LSTM":
            sizes += [(6, state), (7, [count, 3 * self.hidden])]
        for index, shape in sizes:
            if self.call.has(index):
                given = self.call.shape(index)
                if len(given) != len(shape):
                    raise self.call.unsupported(f"input {index} is of rank {len(given)}")
                for mine, its in zip(shape, given):
                    self.call.require(self.call.dims.same(mine, its), f"input {index} does not fit the others")

    def _workload(self, direction: int) -> recurrent.Workload:
        return recurrent.Workload(
            cell=self.cell,
            hidden=self.hidden,
            activations=self.activations[direction],
            backwards=self.directions[direction],
            lengths=self.call.has(4),
            peepholes=self.cell == "LSTM" and self.call.has(7),
            reset_after=self.after,
            coupled=self.coupled,
            clip=self.clip,
        )

    # -- operands --------------------------------------------------------------------------------------------------
    def _made(
        self, index: int, key: str, shape: Sequence[Dim], place: Callable[..., Any], by: Callable[[Array], Array]
    ) -> relax.Expr:
        """A tensor made of input ``index``: now when that is constant, else by ``place`` from tensor and indices."""
        if self.call.const(index) is not None:
            return self.lowering.packed(self.call.input(index), (key, self.isa.lanes), by)
        return self.lowering.compute(key, shape, place, self.call.x(index))

    def _columns(self, direction: int, index: int) -> relax.Expr:
        """W or R [gates * H, K] of a direction as [K, gates * P]."""
        depth = self.call.shape(index)[2]
        hidden, width, gates = self.hidden, self.width, self.gates

        def place(x: Any, k: Any, column: Any) -> Any:
            gate, inner = tirx.floordiv(column, width), tirx.floormod(column, width)
            row = gate * hidden + tirx.min(inner, hidden - 1)
            return tirx.Select(inner < hidden, x(tirx.const(direction, "int64"), row, k), tirx.const(0.0, "float32"))

        name, shape = f"columns_{index}_{direction}", [depth, gates * width]
        return self._made(index, name, shape, place, lambda array: self._packed_columns(direction, array))

    def _packed_columns(self, direction: int, array: Array) -> Array:
        matrix = array[direction].astype(np.float32).reshape(self.gates, self.hidden, -1)
        padded = np.pad(matrix, ((0, 0), (0, self.width - self.hidden), (0, 0)))
        return np.ascontiguousarray(padded.reshape(self.gates * self.width, -1).T)

    def _packed_biases(self, direction: int, array: Array) -> Array:
        of_input, of_state = array[direction].astype(np.float32).reshape(2, self.gates, self.hidden)
        added = np.arange(self.gates) < (self.gates - 1 if self.after else self.gates)
        total = of_input + np.where(added[:, None], of_state, np.float32(0))
        return np.ascontiguousarray(np.pad(total, ((0, 0), (0, self.width - self.hidden))).reshape(-1))

    def _biases(self, direction: int) -> relax.Expr:
        """What is added to the products of the inputs, [gates * P]: both biases, but for the last gate's own."""
        hidden, width, gates = self.hidden, self.width, self.gates
        if not self.call.has(3):
            return self.lowering.constant(np.zeros(gates * width, np.float32), "no_bias")
        apart = gates - 1 if self.after else gates

        def place(x: Any, column: Any) -> Any:
            gate, inner = tirx.floordiv(column, width), tirx.floormod(column, width)
            row, here = gate * hidden + tirx.min(inner, hidden - 1), tirx.const(direction, "int64")
            state = tirx.Select(gate < apart, x(here, gates * hidden + row), tirx.const(0.0, "float32"))
            return tirx.Select(inner < hidden, x(here, row) + state, tirx.const(0.0, "float32"))

        shape = [gates * width]
        return self._made(3, f"bias_{direction}", shape, place, lambda array: self._packed_biases(direction, array))

    def _vector(self, index: int, direction: int, first: int, parts: int) -> relax.Expr:
        """Parts of H elements of a row of input ``index`` as [parts * P]; zeros when it is not given."""
        hidden, width = self.hidden, self.width
        if not self.call.has(index):
            return self.lowering.constant(np.zeros(parts * width, np.float32), "nothing")

        def packed(array: Array) -> Array:
            rows = array[direction].astype(np.float32)[first : first + parts * hidden].reshape(parts, hidden)
            return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, width - hidden))).reshape(-1))

        def place(x: Any, column: Any) -> Any:
            part, inner = tirx.floordiv(column, width), tirx.floormod(column, width)
            row = first + part * hidden + tirx.min(inner, hidden - 1)
            return tirx.Select(inner < hidden, x(tirx.const(direction, "int64"), row), tirx.const(0.0, "float32"))

        return self._made(index, f"vector_{index}_{direction}_{first}", [parts * width], place, packed)

    def _state(self, index: int, direction: int) -> relax.Expr:
        """An initial state as [B, P]."""
        hidden, zero = self.hidden, tirx.const(0.0, "float32")
        if not self.call.has(index):
            return self.lowering.compute("zeros", [self.batch, self.width], lambda *i: zero)
        here = tirx.const(direction, "int64")

        def place(x: Any, row: Any, column: Any) -> Any:
            inner = tirx.min(column, tirx.const(hidden - 1, "int64"))
            value = x(row, here, inner) if self.batch_first else x(here, row, inner)
            return tirx.Select(column < hidden, value, zero)

        return self.lowering.compute("state", [self.batch, self.width], place, self.call.x(index))

    def _products(self, direction: int) -> relax.Expr:
        """The gates that the inputs give, [T, B, gates * P]: of constant weights by the kernel of linear layers."""
        weight, bias = self.call.const(1), self.call.const(3)
        if weight is not None and (bias is not None or not self.call.has(3)):
            columns = self._packed_columns(direction, weight)
            biases = self._packed_biases(direction, bias) if bias is not None else None
            layer = Layer(_constant("weight", columns), None if biases is None else _constant("bias", biases))
            result: relax.Expr = linear(self.lowering, self.x, layer)
            return result
        product = self.call.emit(relax.op.matmul(self.x, self._columns(direction, 1)))
        return self.call.emit(relax.op.add(product, self._biases(direction)))

    # -- results ---------------------------------------------------------------------------------------------------
    def run(self) -> list[Value]:
        results = [self._direction(direction) for direction in range(len(self.directions))]
        states = 2 if self.cell == "LSTM" else 1
        steps = [self.lowering.reshape(y, [self.steps, 1, self.batch, self.hidden]) for y, *_ in results]
        joined = [steps[0] if len(steps) == 1 else self.call.emit(relax.op.concat(steps, 1))]
        for place in range(1, 1 + states):
            parts = [self.lowering.reshape(found[place], [1, self.batch, self.hidden]) for found in results]
            joined.append(parts[0] if len(parts) == 1 else self.call.emit(relax.op.concat(parts, 0)))
        if self.batch_first:
            orders = [[2, 0, 1, 3], *([[1, 0, 2]] * states)]
            joined = [self.call.emit(relax.op.permute_dims(x, order)) for x, order in zip(joined, orders)]
        return joined

    def _direction(self, direction: int) -> list[relax.Expr]:
        workload = self._workload(direction)
        inputs = [self._products(direction), self._columns(direction, 2), self._state(5, direction)]
        if self.cell == "LSTM":
            inputs.append(self._state(6, direction))
        if workload.reset_after:
            inputs.append(self._vector(3, direction, (2 * self.gates - 1) * self.hidden, 1))
        if workload.peepholes:
            inputs.append(self._vector(7, direction, 0, 3))
        if workload.lengths:
            inputs.append(self.call.emit(relax.op.astype(self.call.x(4), "int64")))
        config = self.lowering.config(recurrent, workload)
        rows: list[list[Dim]] = [[self.batch, self.hidden]] * (2 if self.cell == "LSTM" else 1)
        return list(
            self.lowering.call_for_all(
                recurrent.name(workload, config, self.isa),
                lambda: recurrent.build(workload, config, self.isa),
                inputs,
                [[self.steps, self.batch, self.hidden], *rows],
            )
        )


def _constant(name: str, array: Array) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(array, name=name))


def _emitter(cell: str) -> Emitter:
    return lambda call: _Layer(call, cell).run()


OPS: dict[str, Emitter] = {cell: _emitter(cell) for cell in GATES}
"""Emitters by operator type."""
