"""Each canonical op that common runtimes lack, in primitive ops.

Notation: B batch, S queries, T keys, H query heads, G key-value heads, R = H / G, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir import edit, walk
from xopt.ir.bodies import body
from xopt.ir.edit import AttributeValue, attribute, input_at, operand, replace_uses
from xopt.ir.schema import unread


class Expander:
    """Expands the ops of one graph or function body; shared parts (masks, unsqueezed tables) are made once."""

    def __init__(self, graph: ir.Graph | ir.Function) -> None:
        self._graph = graph
        self._shared: dict[tuple[object, ...], ir.Value] = {}

    def run(self) -> None:
        """Expand everything, in place."""
        expansions: dict[str, Callable[[ir.Node], ir.Value]] = {
            "Attention": self._attention,
            "RotaryEmbedding": self._rotary,
            "RMSNormalization": self._rms_norm,
            "Swish": self._swish,
            "Relu": self._integer_relu,
        }
        for node in list(self._graph):
            expand = expansions.get(node.op_type) if not node.domain else None
            if node.op_type == "Attention" and not node.domain and (unread(node) or walk.mask_ends_early(node)):
                self._by_body(node)
            elif expand is not None and (node.op_type != "Relu" or _is_integer(node.inputs[0])):
                result = expand(node)
                result.shape = result.shape or node.outputs[0].shape
                replace_uses(node.outputs[0], result)
                self._graph.remove(node, safe=True)

    # Building blocks

    def _op(
        self,
        site: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None = None,
        **attributes: AttributeValue,
    ) -> ir.Value:
        return edit.insert(site, op_type, inputs, attributes, dtype=dtype)

    def _ints(self, site: ir.Node, *values: int) -> ir.Value:
        return self._constant(site, "ints", np.asarray(values, np.int64))

    def _number(self, site: ir.Node, value: float, like: ir.Value) -> ir.Value:
        dtype = like.dtype.numpy() if like.dtype is not None else np.dtype(np.float32)
        return self._constant(site, "number", np.asarray(value, dtype))

    def _constant(self, site: ir.Node, stem: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """Constant shared by all that need the same; an initializer, or in a function body (which has none) a node."""
        key = (stem, array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            if isinstance(self._graph, ir.Graph):
                self._shared[key] = edit.initializer(self._graph, stem, array)
            else:
                first = self._graph[0]
                tensor = ir.tensor(array)
                self._shared[key] = edit.insert(first, "Constant", [], {"value": tensor}, name=stem, dtype=tensor.dtype)
        return self._shared[key]

    def _once(self, key: tuple[object, ...], build: Callable[[], ir.Value]) -> ir.Value:
        """``build()`` the first time, the same value afterwards (nodes come in order, so it is there already)."""
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

    def _by_body(self, node: ir.Node) -> None:
        """Put the operators in the place of a node that ONNX defines it by."""
        simpler = body(node, self._graph.opset_imports.get("", 0))
        if simpler is None or not isinstance(self._graph, ir.Graph):
            what = f"{node.op_type} cannot be expanded in this form: {', '.join(unread(node)) or 'a short mask'}"
            cure = "export the model without it"
            raise InputError("E-UNSUPPORTED-OP", what, where=f"node {node.name!r}", cure=cure)
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        given = {value.name: value for value in node.inputs if value is not None}
        values |= {value: given[value.name] for value in simpler.graph.inputs}
        for value in simpler.graph.initializers.values():
            own = given.get(value.name)
            values[value] = own or edit.initializer(self._graph, f"{node.name}/constant", value.const_value)  # type: ignore[arg-type]
        for inner in simpler.graph:
            attributes = {name: attribute.value for name, attribute in inner.attributes.items()}
            inputs = [values[value] for value in inner.inputs]
            outputs = edit.insert_many(node, inner.op_type, inputs, attributes, len(inner.outputs))
            for mine, its in zip(outputs, inner.outputs):
                mine.shape, mine.type = its.shape, its.type
                values[its] = mine
        for old in node.outputs:
            result = next((values[value] for value in simpler.graph.outputs if value.name == old.name), None)
            if result is not None:
                replace_uses(old, result)
        self._graph.remove(node, safe=True)

    # Norms and activations

    def _rms_norm(self, node: ir.Node) -> ir.Value:
        """The spelling that onnxruntime recognizes and fuses again."""
        x = operand(node, 0)
        axis = int(attribute(node, "axis", -1) or 0)
        rank = len(x.shape) if x.shape is not None else None
        axes = [axis] if axis == -1 or rank is None else list(range(axis % rank, rank))
        epsilon = float(attribute(node, "epsilon", 1e-5) or 0.0)
        square = self._op(node, "Pow", [x, self._number(node, 2.0, x)])
        mean = self._op(node, "ReduceMean", [square, self._ints(node, *axes)], keepdims=1)
        root = self._op(node, "Sqrt", [self._op(node, "Add", [mean, self._number(node, epsilon, x)])])
        return self._op(node, "Mul", [self._op(node, "Div", [x, root]), operand(node, 1)])

    def _swish(self, node: ir.Node) -> ir.Value:
        x = operand(node, 0)
        alpha = float(attribute(node, "alpha", 1.0) or 0.0)
        scaled = x if alpha == 1.0 else self._op(node, "Mul", [x, self._number(node, alpha, x)])
        return self._op(node, "Mul", [x, self._op(node, "Sigmoid", [scaled])])

    def _integer_relu(self, node: ir.Node) -> ir.Value:
        """Onnxruntime has none for integers."""
        x = operand(node, 0)
        return self._op(node, "Max", [x, self._number(node, 0, x)])

    # Rotary embedding

    def _rotary(self, node: ir.Node) -> ir.Value:
        """Rotate pairs of channels: halves of the rotated width, or neighbours when interleaved."""
        x = operand(node, 0)
        heads = int(attribute(node, "num_heads", 0) or 0)
        flat = heads > 0 and (x.shape is None or len(x.shape) == 3)
        rotated = int(attribute(node, "rotary_embedding_dim", 0) or 0)
        head_axis = 2 if flat else 1
        if flat:
            x = self._op(node, "Reshape", [x, self._ints(node, 0, 0, heads, -1)])
        cos, sin = (self._table(node, index, head_axis) for index in (1, 2))
        rest: list[ir.Value] = []
        if rotated and not self._rotates_all(node, rotated, heads, flat):
            end = np.iinfo(np.int64).max
            rest = [self._slice_last(node, x, rotated, end)]
            x = self._slice_last(node, x, 0, rotated)
        if attribute(node, "interleaved", 0):
            result = self._rotate_neighbours(node, x, cos, sin)
        else:
            left, right = edit.insert_many(node, "Split", [x], {"axis": -1, "num_outputs": 2}, 2)
            result = self._op(node, "Concat", self._rotate(node, left, right, cos, sin), axis=-1)
        if rest:
            result = self._op(node, "Concat", [result, *rest], axis=-1)
        return self._op(node, "Reshape", [result, self._ints(node, 0, 0, -1)]) if flat else result

    def _rotates_all(self, node: ir.Node, rotated: int, heads: int, flat: bool) -> bool:
        shape = operand(node, 0).shape
        width = shape[-1] if shape is not None else None
        return isinstance(width, int) and width == rotated * (heads if flat else 1)

    def _table(self, node: ir.Node, index: int, head_axis: int) -> ir.Value:
        """Cosines or sines for each position, with an axis for the heads: [B, S, 1, d/2] or [B, 1, S, d/2]."""
        table, positions = operand(node, index), input_at(node, 3)

        def build() -> ir.Value:
            rows = table if positions is None else self._op(node, "Gather", [table, positions], axis=0)
            return self._op(node, "Unsqueeze", [rows, self._ints(node, head_axis)])

        return self._once(("table", table, positions, head_axis), build)

    def _rotate(
        self, node: ir.Node, left: ir.Value, right: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        def product(a: ir.Value, b: ir.Value) -> ir.Value:
            return self._op(node, "Mul", [a, b])

        first = self._op(node, "Sub", [product(left, cos), product(right, sin)])
        return first, self._op(node, "Add", [product(left, sin), product(right, cos)])

    def _rotate_neighbours(self, node: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        pairs = self._op(node, "Reshape", [x, self._ints(node, 0, 0, 0, -1, 2)])
        left, right = edit.insert_many(node, "Split", [pairs], {"axis": -1, "num_outputs": 2}, 2)
        axis = self._ints(node, -1)
        left, right = (self._op(node, "Squeeze", [half, axis]) for half in (left, right))
        turned = self._rotate(node, left, right, cos, sin)
        stacked = self._op(node, "Concat", [self._op(node, "Unsqueeze", [t, axis]) for t in turned], axis=-1)
        return self._op(node, "Reshape", [stacked, self._ints(node, 0, 0, 0, -1)])

    def _slice_last(self, node: ir.Node, x: ir.Value, start: int, end: int) -> ir.Value:
        return self._op(node, "Slice", [x, self._ints(node, start), self._ints(node, end), self._ints(node, -1)])

    # Attention

    def _attention(self, node: ir.Node) -> ir.Value:
        """softmax(scale * Q @ K' + mask) @ V for every head; heads lie side by side in the last axis (3-D) or apart."""
        q, k, v = (operand(node, index) for index in range(3))
        heads, groups = self._head_counts(node)
        flat = bool(attribute(node, "q_num_heads", 0)) and (q.shape is None or len(q.shape) == 3)
        repeat = heads // groups if groups else 1
        scale = self._number(node, self._scale(node, heads, flat), q)
        if flat:
            queries, keys, values = self._split_heads(node, q, k, v, groups, repeat)
        else:
            queries, keys, values = self._spread_groups(node, q, k, v, groups, repeat)
        scores = self._op(node, "MatMul", [self._op(node, "Mul", [queries, scale]), keys])
        softcap = float(attribute(node, "softcap", 0.0) or 0.0)
        if softcap:
            cap = self._number(node, softcap, q)
            scores = self._op(node, "Mul", [self._op(node, "Tanh", [self._op(node, "Div", [scores, cap])]), cap])
        bias, visible = self._mask(node, groups, repeat)
        if bias is not None:
            scores = self._op(node, "Add", [scores, bias])
        result = self._op(node, "MatMul", [self._op(node, "Softmax", [scores], axis=-1), values])
        if visible is not None:
            result = self._op(node, "Mul", [result, visible])
        return self._join_heads(node, result, heads, repeat, flat)

    def _head_counts(self, node: ir.Node) -> tuple[int, int]:
        """H and G; G is 0 where they are equal but unknown (4-D without static shapes)."""
        heads, groups = (int(attribute(node, name, 0) or 0) for name in ("q_num_heads", "kv_num_heads"))
        if heads and groups:
            return heads, groups
        sizes = [value.shape[1] if (value := operand(node, i)).shape is not None else None for i in (0, 1)]
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
        return 0, 0

    def _scale(self, node: ir.Node, heads: int, flat: bool) -> float:
        written = attribute(node, "scale")
        if written is not None:
            return float(written)
        shape = operand(node, 0).shape
        width = shape[-1] if shape is not None else None
        if not isinstance(width, int):
            raise InputError(
                "E-UNSUPPORTED-OP",
                "the scale of an attention is unknown",
                where=f"node {node.name!r}",
                cure="fix the width of its queries",
            )
        return 1.0 / math.sqrt(width // heads if flat else width)

    def _split_heads(
        self, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, groups: int, repeat: int
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """[B,S,H*d] to [B,H,S,d] and [B,H,d,T]; grouped: [B,G,R,S,d], [B,G,1,d,T] and [B,G,1,T,d]."""
        if repeat == 1:
            shape = self._ints(node, 0, 0, groups, -1)
            orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
            shapes = (shape, shape, shape)
        else:
            shape = self._ints(node, 0, 0, groups, 1, -1)
            orders = ([0, 2, 3, 1, 4], [0, 2, 3, 4, 1], [0, 2, 3, 1, 4])
            shapes = (self._ints(node, 0, 0, groups, repeat, -1), shape, shape)
        split = [
            self._op(node, "Transpose", [self._op(node, "Reshape", [x, s])], perm=order)
            for x, s, order in zip((q, k, v), shapes, orders)
        ]
        return split[0], split[1], split[2]

    def _spread_groups(
        self, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, groups: int, repeat: int
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The same from [B,H,S,d] and [B,G,T,d]."""
        if repeat == 1:
            return q, self._op(node, "Transpose", [k], perm=[0, 1, 3, 2]), v
        end = np.iinfo(np.int64).max
        shape = self._op(node, "Shape", [q], dtype=ir.DataType.INT64)
        first, last = (
            self._op(node, "Slice", [shape, self._ints(node, a), self._ints(node, b)]) for a, b in ((0, 1), (2, end))
        )
        grouped = self._op(node, "Concat", [first, self._ints(node, groups, repeat), last], axis=0)
        axis = self._ints(node, 2)
        keys = self._op(node, "Unsqueeze", [self._op(node, "Transpose", [k], perm=[0, 1, 3, 2]), axis])
        return self._op(node, "Reshape", [q, grouped]), keys, self._op(node, "Unsqueeze", [v, axis])

    def _join_heads(self, node: ir.Node, result: ir.Value, heads: int, repeat: int, flat: bool) -> ir.Value:
        if flat:
            order = [0, 2, 1, 3] if repeat == 1 else [0, 3, 1, 2, 4]
            return self._op(
                node, "Reshape", [self._op(node, "Transpose", [result], perm=order), self._ints(node, 0, 0, -1)]
            )
        if repeat == 1:
            return result
        end = np.iinfo(np.int64).max
        shape = self._op(node, "Shape", [result], dtype=ir.DataType.INT64)
        first, last = (
            self._op(node, "Slice", [shape, self._ints(node, a), self._ints(node, b)]) for a, b in ((0, 1), (3, end))
        )
        joined = self._op(node, "Concat", [first, self._ints(node, heads), last], axis=0)
        return self._op(node, "Reshape", [result, joined])

    # Masks

    def _mask(self, node: ir.Node, groups: int, repeat: int) -> tuple[ir.Value | None, ir.Value | None]:
        """What is added to the scores, and per row 1 where anything is attended (None: every row attends something)."""
        mask, causal = input_at(node, 3), bool(attribute(node, "is_causal", 0))
        dtype = operand(node, 0).dtype or ir.DataType.FLOAT
        triangle = self._triangle(node) if causal else None
        bias: ir.Value | None = None
        visible: ir.Value | None = None
        if mask is None or mask.dtype == ir.DataType.BOOL:
            allowed = mask if triangle is None else self._both(node, "And", mask, triangle)
            if allowed is not None:
                allowed = self._grouped(node, allowed, groups, repeat)
                bias = self._additive(node, allowed, dtype)
                visible = None if mask is None else self._visible(node, allowed, dtype)
            return bias, visible
        if not _may_hide(mask, _lowest(dtype) if causal else -np.inf):
            bias = mask if triangle is None else self._both(node, "Add", self._additive(node, triangle, dtype), mask)
            return self._grouped(node, bias, groups, repeat), None
        bias = mask
        if triangle is not None:
            hidden = self._constant(node, "number", np.asarray(-np.inf, dtype.numpy()))
            bias = self._shared_op(node, "Where", [triangle, mask, hidden], _broadcast(triangle, mask), dtype)
        return self._hiding(node, self._grouped(node, bias, groups, repeat), dtype)

    def _hiding(self, node: ir.Node, bias: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """The same of a mask of numbers that may hide keys by infinity, or weigh less than what ``_additive`` hides by:
        a row in which all is hidden gets zeros instead, and counts for nothing.
        """
        zero, hidden = (self._constant(node, "number", np.asarray(n, dtype.numpy())) for n in (0.0, -np.inf))
        row = [*bias.shape[:-1], 1] if bias.shape is not None else None
        most = self._shared_op(node, "ReduceMax", [bias, self._ints(node, -1)], row, dtype, keepdims=1)
        seen = self._shared_op(node, "Greater", [most, hidden], row, ir.DataType.BOOL)
        finite = self._shared_op(node, "Where", [seen, bias, zero], bias.shape, dtype)
        return finite, self._shared_op(node, "Cast", [seen], row, dtype, to=int(dtype))

    def _shared_op(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Iterable[int | ir.SymbolicDim] | None,
        dtype: ir.DataType | None = None,
        **attributes: AttributeValue,
    ) -> ir.Value:
        """A node that all layers with the same inputs share."""
        key = (op_type, *inputs, dtype, *attributes.items())
        return self._once(key, lambda: edit.insert(node, op_type, inputs, attributes, dtype=dtype, shape=shape))

    def _both(self, node: ir.Node, op_type: str, a: ir.Value | None, b: ir.Value) -> ir.Value:
        """``b``, or elementwise ``a op b``, with its shape as far as the operands tell."""
        if a is None:
            return b
        return self._shared_op(node, op_type, [a, b], _broadcast(a, b))

    def _additive(self, node: ir.Node, allowed: ir.Value, dtype: ir.DataType) -> ir.Value:
        """0 where attended; elsewhere what wins over any score and yet leaves a row that is all masked finite."""

        def build() -> ir.Value:
            numbers = [self._constant(node, "number", np.asarray(n, dtype.numpy())) for n in (0.0, _lowest(dtype))]
            return edit.insert(node, "Where", [allowed, *numbers], dtype=dtype, shape=allowed.shape)

        return self._once(("additive", allowed, dtype), build)

    def _visible(self, node: ir.Node, allowed: ir.Value, dtype: ir.DataType) -> ir.Value:
        """[..., S or 1, 1]: 1 for rows that attend anything, else 0."""

        def build() -> ir.Value:
            number = self._op(node, "Cast", [allowed], dtype=dtype, to=int(dtype))
            shape = [*allowed.shape[:-1], 1] if allowed.shape is not None else None
            return edit.insert(node, "ReduceMax", [number, self._ints(node, -1)], {"keepdims": 1}, shape=shape)

        return self._once(("visible", allowed, dtype), build)

    def _triangle(self, node: ir.Node) -> ir.Value:
        """[S, T] bool: query i attends keys up to i. Shared by all layers whose lengths are known to be the same."""
        queries, keys = self._length(node, 0), self._length(node, 1)

        def build() -> ir.Value:
            zero, one = (self._constant(node, "index", np.asarray(n, np.int64)) for n in (0, 1))
            rows, columns = (
                self._op(node, "Range", [zero, self._size(node, index), one], dtype=ir.DataType.INT64)
                for index in (0, 1)
            )
            column = self._op(node, "Unsqueeze", [rows, self._ints(node, 1)])
            sizes = [length if isinstance(length, (int, str)) else None for length in (queries, keys)]
            return edit.insert(node, "GreaterOrEqual", [column, columns], dtype=ir.DataType.BOOL, shape=sizes)

        if isinstance(queries, int) and isinstance(keys, int):
            return self._constant(node, "causal", np.tri(queries, keys, dtype=np.bool_))
        return self._once(("causal", queries, keys), build)

    def _length(self, node: ir.Node, index: int) -> int | str | ir.Value:
        """Number of queries (0) or keys (1): a size, the name of a dimension, or the value where it has no name."""
        value = operand(node, index)
        dim = value.shape[-2] if value.shape is not None else None
        if isinstance(dim, int):
            return dim
        return dim.value if dim is not None and dim.value else value

    def _size(self, node: ir.Node, index: int) -> ir.Value:
        value = operand(node, index)
        axis = 1 if value.shape is None and attribute(node, "q_num_heads", 0) else -2
        shape = self._op(node, "Shape", [value], dtype=ir.DataType.INT64)
        at = self._constant(node, "index", np.asarray(axis, np.int64))
        return self._op(node, "Gather", [shape, at], axis=0)

    def _grouped(self, node: ir.Node, value: ir.Value, groups: int, repeat: int) -> ir.Value:
        """[b, 1 or H, s, t] as [b, 1 or G, 1 or R, s, t]; fewer axes broadcast as they are."""
        rank = len(value.shape) if value.shape is not None else 4
        if rank < 3 or repeat <= 1:
            return value
        heads = value.shape[rank - 3] if value.shape is not None else None

        def build() -> ir.Value:
            if heads == 1:
                return self._op(node, "Unsqueeze", [value, self._ints(node, rank - 2)])
            full = value
            if not isinstance(heads, int):
                full = self._op(node, "Expand", [value, self._ints(node, groups * repeat, 1, 1)])
            shape = self._op(node, "Shape", [full], dtype=ir.DataType.INT64)
            end = np.iinfo(np.int64).max
            last = self._op(node, "Slice", [shape, self._ints(node, rank - 2), self._ints(node, end)])
            sizes = [self._ints(node, groups, repeat), last]
            if rank == 4:
                sizes.insert(0, self._op(node, "Slice", [shape, self._ints(node, 0), self._ints(node, 1)]))
            return self._op(node, "Reshape", [full, self._op(node, "Concat", sizes, axis=0)])

        return self._once(("grouped", value, groups, repeat), build)


def _is_integer(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_integer()


_MOVING = ("Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def _lowest(dtype: ir.DataType) -> float:
    """What hides a key by number: it wins over any score."""
    return -6e4 if dtype == ir.DataType.FLOAT16 else -1e30


def _may_hide(mask: ir.Value, below: float) -> bool:
    """Whether a mask of numbers may have some that are not above ``below``: those of a caller, or constants."""
    pending, seen = [mask], {mask}
    while pending:
        value = pending.pop()
        node, array = value.producer(), edit.constant(value)
        if array is not None:
            if edit.kind_of(array) == "f" and array.size and float(array.min()) <= below:
                return True
        elif node is None:
            return True
        else:
            parts = {"Where": node.inputs[1:], "Add": node.inputs}.get(node.op_type, ())
            for part in parts or (node.inputs[:1] if node.op_type in _MOVING else ()):
                if part is not None and part not in seen:
                    seen.add(part)
                    pending.append(part)
    return False


def _broadcast(a: ir.Value, b: ir.Value) -> list[int | ir.SymbolicDim] | None:
    """The shape of two operands together, as far as they tell."""
    if a.shape is None or b.shape is None:
        return None
    pairs = list(zip_longest(reversed(list(a.shape)), reversed(list(b.shape)), fillvalue=1))
    return [y if x == 1 else x for x, y in reversed(pairs)]
