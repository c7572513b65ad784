"""One node as its emitter sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from xopt.errors import InputError
from xopt.ir.schema import carried
from xopt.targets.refusals import unsupported
from xopt.targets.symbolic import Array, Dim, Dimensions

if TYPE_CHECKING:
    from xopt.targets.emitting import Emitting, Value


@dataclass(frozen=True)
class Call:
    """A node to emit, with its inputs in the forms that emitters ask for.

    It notes what has been asked for: what a node carries and no emitter has looked at is refused by name
    (:meth:`require_read`), so that nothing is compiled as if it were not there.

    Attributes:
        read: names of attributes and places of inputs that have been asked for.
    """

    lowering: Emitting
    node: ir.Node
    read: set[str | int] = field(default_factory=set)

    @property
    def dims(self) -> Dimensions:
        """The symbolic dimensions of the model."""
        return self.lowering.dims

    def has(self, index: int) -> bool:
        """Whether the optional input ``index`` is given."""
        self.read.add(index)
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def input(self, index: int) -> ir.Value:
        """The ONNX value of an input. Raises InputError E-FORMAT when it is missing."""
        self.read.add(index)
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise self.unsupported(f"input {index} is missing")
        return value

    def x(self, index: int = 0) -> relax.Expr:
        """Input ``index`` as a run-time tensor."""
        return self.lowering.tensor(self.input(index))

    def xs(self) -> list[relax.Expr]:
        """All given inputs as run-time tensors."""
        self.read.update(range(len(self.node.inputs)))
        return [self.lowering.tensor(value) for value in self.node.inputs if value is not None]

    def shape(self, index: int = 0) -> list[Dim]:
        """The shape of input ``index``."""
        return self.lowering.shape(self.input(index))

    def const(self, index: int) -> Array | None:
        """Input ``index`` when it is a constant, else None."""
        if not self.has(index):
            return None
        value = self.lowering.value(self.input(index))
        return value if isinstance(value, np.ndarray) else None

    def known(self, index: int) -> Array | None:
        """Input ``index`` as an object array when its elements are known, else None; missing is None too."""
        return self.lowering.known(self.node.inputs[index]) if self.has(index) else None

    def ints(self, index: int, attribute: str | None = None) -> list[Dim] | None:
        """Known integers of input ``index``, or of the attribute that older opsets had; None when neither is given.

        Raises:
            InputError: E-UNSUPPORTED-OP, the input is given but depends on the data.
        """
        if self.has(index):
            array = self.known(index)
            if array is None:
                raise self.unsupported(f"input {index} depends on the data")
            return list(array.reshape(-1))
        given = self.attr(attribute) if attribute else None
        return None if given is None else [int(x) for x in given]

    def numbers(self, index: int, attribute: str | None = None) -> list[int] | None:
        """Like :meth:`ints`, for plain numbers only."""
        values = self.ints(index, attribute)
        if values is not None and not all(isinstance(x, (int, float)) for x in values):
            raise self.unsupported(f"input {index} depends on a dynamic dimension")
        return None if values is None else [int(x) for x in values]

    def attr(self, name: str, default: Any = None) -> Any:
        """Attribute ``name``."""
        self.read.add(name)
        return self.node.attributes[name].value if name in self.node.attributes else default

    def pass_over(self, *what: str | int) -> None:
        """Take attributes or inputs for read: whatever they are, the result is the same."""
        self.read.update(what)

    def require_read(self) -> None:
        """Refuse what the node carries and its emitter has not read. Raises InputError E-UNSUPPORTED-OP."""
        for item in carried(self.node):
            if item.output is None and (item.name if item.input is None else item.input) not in self.read:
                kind = "attribute" if item.input is None else "input"
                raise self.unsupported(f"{kind} {item.name} is not compiled")

    def axis(self, default: int, rank: int) -> int:
        """Attribute ``axis``, not negative. Raises InputError E-UNSUPPORTED-OP when there is no such axis."""
        return self.axes([int(self.attr("axis", default))], max(rank, 1))[0]

    def axes(self, given: Iterable[int], rank: int) -> list[int]:
        """Axes of a tensor of ``rank`` dimensions, not negative.

        Raises:
            InputError: E-UNSUPPORTED-OP, there is no such axis, or one is given twice.
        """
        axes = [axis + rank if axis < 0 else axis for axis in given]
        if wrong := [axis for axis in axes if not 0 <= axis < rank]:
            raise self.unsupported(f"axis {wrong[0]} is not one of its {rank}")
        if len(set(axes)) != len(axes):
            raise self.unsupported("an axis is given twice")
        return axes

    def require(self, condition: Any, otherwise: str) -> None:
        """Demand that a comparison of sizes holds: `Dimensions.require` in the name of the node."""
        self.dims.require(condition, f"{label(self.node)}: {otherwise}")

    def emit(self, expression: relax.Expr) -> relax.Var:
        """Bind a Relax expression."""
        return self.lowering.emit(expression)

    def aligned(self, *tensors: relax.Expr) -> list[relax.Expr]:
        """Tensors that broadcast against each other."""
        return self.lowering.aligned(tensors)

    def unsupported(self, reason: str) -> InputError:
        """The error for a node that cannot be compiled."""
        return unsupported(self.node, reason, self.lowering.target)


def label(node: ir.Node) -> str:
    """A node as messages of compiled code name it: its operator, and its name."""
    name = harmless(node.name or node.outputs[0].name or "")
    return f"{harmless(node.op_type)} ({name})" if name else harmless(node.op_type)


def harmless(text: str) -> str:
    """What a file calls something, in letters that are safe in generated code and on a terminal."""
    return re.sub(r"[^A-Za-z0-9_./:+*-]", "_", text)[:80]


Emitter = Callable[[Call], "Value | Sequence[Value]"]
