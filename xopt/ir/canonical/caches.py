"""Cosines and sines of rotary embeddings as [1|B, S, d/2], whatever shape they were computed in."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from xopt.ir.edit import constant, initializer, insert, is_op, producer, scalar
from xopt.ir.poly import ONE, Poly
from xopt.ir.schema import op_of
from xopt.ir.shape_rules import axes_of, integer
from xopt.ir.symbolic import Symbols


class RotaryRefusedError(Exception):
    """The rotation cannot be written as a ``RotaryEmbedding``; the message is the reason."""


@dataclass
class Caches:
    """Tables of one graph, shared by the rotations that use the same."""

    symbols: Symbols
    made: dict[object, ir.Value] = field(default_factory=dict)

    def head_axis(self, value: ir.Value, x: ir.Value) -> int:
        """Axis of x [B,H,S,d] or [B,S,H,d] that ``value`` is the same for: 1 or 2.

        Raises:
            RotaryRefusedError: it differs from head to head, or its shape is unknown.
        """
        dims, whole = self.symbols.dims(value), self.symbols.dims(x)
        if dims is None or whole is None or not 2 <= len(dims) <= 4:
            raise RotaryRefusedError("cos-axes")
        padded = (ONE,) * (4 - len(dims)) + dims
        free = [place for place in (1, 2) if padded[place] == ONE]
        if not free:
            raise RotaryRefusedError("cos-axes")
        if len(free) == 2:  # one position only: heads come from a transpose, or are in place
            return 1 if producer(x, "Transpose") is not None else 2
        return free[0]

    def table(
        self, site: ir.Node, value: ir.Value, place: int, interleaved: bool, width: int, repeated: bool
    ) -> ir.Value:
        """``value`` without its head axis ``place``, and every number once."""
        key = (value, place, interleaved, width, repeated)
        if key not in self.made:
            if repeated and not self._repeats(value, interleaved):
                raise RotaryRefusedError("cos-repeats")
            array = constant(value)
            self.made[key] = (
                self._computed(site, value, place, interleaved, width, repeated)
                if array is None
                else self._constant(site, value, array, place, interleaved, width, repeated)
            )
        return self.made[key]

    def _constant(
        self,
        site: ir.Node,
        value: ir.Value,
        array: np.ndarray,
        place: int,
        interleaved: bool,
        width: int,
        repeated: bool,
    ) -> ir.Value:
        graph = site.graph
        assert isinstance(graph, ir.Graph)
        once = array.reshape((1,) * (4 - array.ndim) + array.shape).squeeze(place)
        if repeated:
            once = once[..., ::2] if interleaved else once[..., :width]
        return initializer(graph, f"{value.name}/table", np.ascontiguousarray(once))

    def _computed(
        self, site: ir.Node, value: ir.Value, place: int, interleaved: bool, width: int, repeated: bool
    ) -> ir.Value:
        dims = self.symbols.dims(value)
        assert dims is not None
        if len(dims) < 4:
            value = self._insert(site, "Unsqueeze", value, list(range(4 - len(dims))))
        value = self._insert(site, "Squeeze", value, [place])
        if not repeated:
            return value
        graph = site.graph
        assert isinstance(graph, ir.Graph)
        numbers = [0, 2 * width, -1, 2] if interleaved else [0, width, -1, 1]
        bounds = [initializer(graph, "half", np.asarray([number], np.int64)) for number in numbers]
        return self.symbols.learn(insert(site, "Slice", [value, *bounds]))

    def _insert(self, site: ir.Node, op: str, value: ir.Value, axes: list[int]) -> ir.Value:
        graph = site.graph
        assert isinstance(graph, ir.Graph)
        return self.symbols.learn(insert(site, op, [value, initializer(graph, "axes", np.asarray(axes, np.int64))]))

    def _repeats(self, value: ir.Value | None, interleaved: bool) -> bool:
        """Whether the two halves of the last axis (or each pair of neighbours) are surely equal."""
        array = constant(value)
        if array is not None:
            n = array.shape[-1] // 2 if array.ndim else 0
            pairs = (array[..., ::2], array[..., 1::2]) if interleaved else (array[..., :n], array[..., n:])
            return n > 0 and np.array_equal(*pairs)
        node = value.producer() if value is not None else None
        if value is None or node is None or not op_of(node) or not node.inputs:
            return False
        source = node.inputs[0]
        if node.op_type in ("Cos", "Sin", "Cast", "Neg", "Identity"):
            return self._repeats(source, interleaved)
        if node.op_type in ("Mul", "Div") and scalar(node.inputs[1]) is not None:
            return self._repeats(source, interleaved)
        if node.op_type == "GatherElements":  # every number by an index of its own, which repeat as they do
            last = integer(node, "axis", 0) in (-1, (self.symbols.rank(value) or 0) - 1)
            return not last and all(self._repeats(given, interleaved) for given in node.inputs)
        if node.op_type in ("Expand", "Tile") and (self.symbols.dims(source) or (None,))[-1] == ONE:
            return True
        if node.op_type in ("Unsqueeze", "Squeeze", "Slice", "Expand", "Tile", "Gather", "Reshape"):
            return (self._keeps_last(node) and self._repeats(source, interleaved)) or self._is_repeat(node, interleaved)
        return self._is_repeat(node, interleaved)

    def _keeps_last(self, node: ir.Node) -> bool:
        """Whether the last axis of the result is that of the source, untouched."""
        dims, result = self.symbols.dims(node.inputs[0]), self.symbols.dims(node.outputs[0])
        if dims is None or result is None or not dims or dims[-1] != result[-1] or dims[-1] == ONE:
            return False
        if node.op_type in ("Unsqueeze", "Squeeze", "Slice"):
            try:
                axes = axes_of(self.symbols, node) or []
            except ValueError:
                return False
            rank = len(result) if node.op_type == "Unsqueeze" else len(dims)
            return rank - 1 not in axes and -1 not in axes
        return node.op_type != "Gather" or integer(node, "axis", 0) not in (-1, len(dims) - 1)

    def _is_repeat(self, node: ir.Node, interleaved: bool) -> bool:
        """``concat(f, f)``, or ``stack(f, f, -1)`` or an expansion by 2, flattened."""
        if not interleaved:
            return self._doubles_last(node)
        source = producer(node.inputs[0], "Concat", "Expand", "Tile") if node.op_type == "Reshape" else None
        dims = self.symbols.dims(source.outputs[0]) if source is not None else None
        flat = self.symbols.dims(node.outputs[0])
        if (
            source is None
            or dims is None
            or len(dims) < 2
            or not flat
            or dims[-1] != Poly.of(2)
            or flat[-1] != dims[-2] * 2
        ):
            return False
        inner = self.symbols.dims(source.inputs[0])
        return inner is not None and inner[-1] == ONE and (source.op_type != "Concat" or self._doubles_last(source))

    def _doubles_last(self, node: ir.Node) -> bool:
        rank = self.symbols.rank(node.outputs[0])
        last = rank is not None and integer(node, "axis", 0) in (-1, rank - 1)
        return is_op(node, "Concat") and len(node.inputs) == 2 and last and node.inputs[0] is node.inputs[1]
