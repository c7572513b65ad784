"""A node of ``com.microsoft`` as its rule sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir import edit
from xopt.ir.canonical.contrib.typed import Typed
from xopt.ir.contrib import DOMAIN, form_of
from xopt.ir.edit import AttributeValue
from xopt.ir.schema import Form, carried
from xopt.ir.shape_rules import Dims

Attributes: TypeAlias = dict[str, Any]
"""Of a node to be written, by name."""

MOST_ELEMENTS = 1 << 24
"""Of tables that are written for an operator that has none."""


class Unknown(Exception):  # noqa: N818 - no error yet: more may be known after the next round
    """What a rule would have to know of an operand."""

    def __init__(self, node: ir.Node, what: str) -> None:
        super().__init__(what)
        self.node = node


def refused(node: ir.Node, reason: str) -> InputError:
    """The error for a node that cannot be rewritten."""
    what = f"{DOMAIN}::{node.op_type} is not supported in this form: {reason}"
    cure = "optimize the model without the fusion that makes this operator, or take the model as it was exported"
    return InputError("E-UNSUPPORTED-OP", what, where=f"node {node.name!r}", cure=cure)


@dataclass
class Site:
    """A node, the place before which standard operators are written, and a note of what its rule has asked for.

    Inputs, outputs and attributes go by onnxruntime's names (:mod:`xopt.ir.contrib`).
    """

    node: ir.Node
    typed: Typed
    read: set[str] = field(default_factory=set)

    @property
    def form(self) -> Form:
        """What the operator may carry."""
        form = form_of(self.node.op_type)
        assert form is not None
        return form

    # What the node is

    def given(self, name: str) -> ir.Value | None:
        """An input, or None where it is absent."""
        self.read.add(name)
        return edit.input_at(self.node, self.form.inputs.index(name))

    def value(self, name: str) -> ir.Value:
        """An input that the operator requires."""
        value = self.given(name)
        if value is None:
            raise self.refused(f"input {name} is missing")
        return value

    def variadic(self, name: str) -> list[ir.Value]:
        """All inputs from the one of this name on."""
        first = self.form.inputs.index(name)
        self.read.update((name, *(f"input {place}" for place in range(first, len(self.node.inputs)))))
        return [edit.operand(self.node, place) for place in range(first, len(self.node.inputs))]

    def attr(self, name: str) -> Any:
        """An attribute, or its default."""
        self.read.add(name)
        given = self.node.attributes.get(name)
        return given.value if given is not None else self.form.defaults[name]

    def only(self, **values: Any) -> None:
        """Refuse attributes that are not what is said here."""
        for name, value in values.items():
            if self.attr(name) != value:
                raise self.refused(f"attribute {name} is {self.attr(name)}")

    def wants(self, name: str) -> bool:
        """Whether anybody reads an output."""
        place = self.form.outputs.index(name)
        value = self.node.outputs[place] if place < len(self.node.outputs) else None
        return value is not None and bool(value.uses() or value.is_graph_output())

    def pass_over(self, *names: str) -> None:
        """Take attributes or inputs for read: whatever they are, the result is the same."""
        self.read.update(names)

    def require_read(self, results: Sequence[ir.Value | None]) -> None:
        """Refuse what the node carries and its rule has not read or written. Raises InputError E-UNSUPPORTED-OP."""
        for item in carried(self.node, self.form):
            kind = "attribute" if item.input is None else "input"
            if item.output is not None:
                if item.output >= len(results) or results[item.output] is None:
                    raise self.refused(f"output {item.name} is read")
            elif item.name not in self.read:
                raise self.refused(f"{kind} {item.name} is given")

    def refused(self, reason: str) -> InputError:
        """The error for this node."""
        return refused(self.node, reason)

    # What is known

    def dims(self, value: ir.Value) -> Dims:
        """Dimensions of a value. Raises Unknown where not even its rank is known."""
        dims = self.typed.dims(value)
        if dims is None:
            raise Unknown(self.node, f"the rank of {value.name!r} is not known")
        return dims

    def rank(self, value: ir.Value) -> int:
        """Number of axes of a value."""
        return len(self.dims(value))

    def size(self, value: ir.Value, axis: int) -> int:
        """A fixed size of a value. Raises Unknown where it is not."""
        dims = self.dims(value)
        size = dims[axis].constant if -len(dims) <= axis < len(dims) else None
        if size is None:
            raise Unknown(self.node, f"the size of axis {axis} of {value.name!r} is not fixed")
        return size

    def dtype(self, value: ir.Value) -> ir.DataType:
        """Element type of a value."""
        if value.dtype is None:
            raise Unknown(self.node, f"the element type of {value.name!r} is not known")
        return value.dtype

    def constant(self, value: ir.Value, name: str) -> npt.NDArray[Any]:
        """The content of an input, which has to be a constant."""
        array = edit.constant(value)
        if array is None:
            raise self.refused(f"input {name} is not a constant")
        return array

    def few(self, count: int) -> int:
        """How many elements a table has that a rule writes: what a file asks for is bounded."""
        if count > MOST_ELEMENTS:
            raise self.refused(f"it asks for a table of {count} elements")
        return count

    # What is written

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: Sequence[int] | None = None,
        **attributes: AttributeValue,
    ) -> ir.Value:
        """Write a node of one output; its type and shape follow from its operator unless given."""
        return self.several(op_type, 1, *inputs, dtype=dtype, shape=shape, **attributes)[0]

    def several(
        self,
        op_type: str,
        outputs: int,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: Sequence[int] | None = None,
        **attributes: AttributeValue,
    ) -> tuple[ir.Value, ...]:
        """Write a node of several outputs."""
        made = edit.insert_many(self.node, op_type, inputs, attributes, outputs, dtype=dtype, shape=shape)
        node = made[0].producer()
        assert node is not None
        if dtype is None:  # of the first input, which need not be that of the result
            for value in made:
                value.type = None
        self.typed.visit(node)
        return made

    def array(self, stem: str, array: npt.ArrayLike | ir.TensorProtocol) -> ir.Value:
        """A constant."""
        assert isinstance(self.node.graph, ir.Graph)
        return edit.initializer(self.node.graph, f"{self.node.name}/{stem}", array)

    def ints(self, *numbers: int) -> ir.Value:
        """A vector int64."""
        return self.array("ints", np.asarray(numbers, np.int64))

    def index(self, number: int) -> ir.Value:
        """A scalar int64."""
        return self.array("index", np.asarray(number, np.int64))

    def number(self, number: float, like: ir.Value) -> ir.Value:
        """A scalar in the type of another value."""
        return self.array("number", np.asarray(number, self.dtype(like).numpy()))

    def lowest(self, like: ir.Value) -> ir.Value:
        """The least finite number of the type of another value: a score that no weight comes of."""
        return self.number(float(np.finfo(self.dtype(like).numpy()).min), like)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in another type, itself where it has that already."""
        return value if self.dtype(value) == dtype else self.op("Cast", value, to=int(dtype))

    def length(self, value: ir.Value, axis: int) -> ir.Value:
        """A size of a value, int64 [1]."""
        ends: Attributes = {} if axis == -1 else {"end": axis + 1}
        return self.op("Shape", value, start=axis, **ends)

    def plus(self, value: ir.Value, bias: ir.Value | None) -> ir.Value:
        """A sum, or the value alone."""
        return value if bias is None else self.op("Add", value, bias)

    def parts(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """A value cut along its last axis; a constant into constants."""
        array = edit.constant(value)
        if array is None:
            return list(self.several("Split", len(sizes), value, self.ints(*sizes), axis=-1))
        ends = np.cumsum(sizes)
        if array.ndim == 0 or array.shape[-1] != ends[-1]:
            raise self.refused(
                f"{value.name!r} of shape {list(array.shape)} is not parts of {', '.join(map(str, sizes))}"
            )
        return [self.array("part", array[..., end - size : end]) for size, end in zip(sizes, ends)]
