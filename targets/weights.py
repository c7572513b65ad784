"""The constants of a model while it is lowered: each stored once in the layout of the kernel that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm import relax, tirx

from xopt.targets.symbolic import Array


@dataclass
class Weights:
    """A tuple of tensors that ``main`` takes behind the inputs.

    Attributes:
        store: is given every weight by name, as soon as it is packed, and returns where it lies from then on.
        entries: name and content of each element.
    """

    store: Callable[[str, Array], Array]
    entries: list[tuple[str, Array]] = field(default_factory=list)
    _variables: dict[Any, relax.Var] = field(default_factory=dict)

    def variable(self, key: Any, name: str, content: Callable[[], Array]) -> relax.Var:
        """The variable of the element ``key``, which is made when it is asked for first.

        Args:
            key: equal keys share one element.
            name: for the manifest.
            content: makes it.
        """
        if key not in self._variables:
            self.entries.append((name, self.store(name, content())))
            stored = self.entries[-1][1]
            self._variables[key] = relax.Var(
                f"weight_{len(self.entries) - 1}", relax.TensorType(stored.shape, str(stored.dtype))
            )
        return self._variables[key]

    def bindings(self, bundle: relax.Var) -> relax.BindingBlock:
        """The elements taken out of the tuple, unchecked: the loader made them from the artifact's own manifest."""
        found = []
        for index, variable in enumerate(self._variables.values()):
            fetch = relax.op.call_pure_packed(
                "vm.builtin.tuple_getitem", bundle, tirx.IntImm("int64", index), ty_args=variable.ty
            )
            found.append(relax.VarBinding(variable, fetch))
        return relax.BindingBlock(found)
