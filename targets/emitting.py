"""Values while a graph is lowered, and the Relax that emitters make of them.

The emitters of operators (:mod:`xopt.targets.ops`) see the function being built through this class only; the walk
over the nodes is :mod:`xopt.targets.lowering`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, te, tirx
from tvm.tirx.analysis import undefined_vars

from xopt.errors import InputError
from xopt.runtime.device import CPU
from xopt.targets import checks
from xopt.targets.formats import FLOAT32, Format, Formatted, decoded, dequantize, dequantized
from xopt.targets.integer_attention import Part
from xopt.targets.symbolic import MAX_ELEMENTS, Array, Dim, Dimensions, Ints
from xopt.targets.weights import Weights

if TYPE_CHECKING:
    from xopt.targets.base import Target
    from xopt.targets.ops.packing import Layout

Value: TypeAlias = Any
"""An ONNX value while lowering: a run-time tensor (or several, in different formats), a constant, or a small integer
tensor known by its shapes."""


@dataclass
class Emitting(ABC):
    """The state of one lowering: values so far, weights so far, and the Relax function being built."""

    target: Target
    model: ir.Model
    wanted: dict[ir.Value, tuple[Format, ...]] = field(default_factory=dict)
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    dims: Dimensions = field(default_factory=Dimensions)
    values: dict[ir.Value, Value] = field(default_factory=dict)
    weights: Weights = field(default_factory=lambda: Weights(in_memory))
    ranges: dict[ir.Value, tuple[int, int]] = field(default_factory=dict)
    layouts: dict[ir.Value, Layout] = field(default_factory=dict)
    tokens_first: dict[relax.Var, relax.Var] = field(default_factory=dict)
    outside: list[tuple[relax.Var, str]] = field(default_factory=list)
    node: str = ""
    segments: dict[str, str] = field(default_factory=dict)
    within: bool = False
    tied: dict[ir.Value, ir.Value] = field(default_factory=dict)
    attentions: dict[ir.Node, tuple[Part, Part, Part]] = field(default_factory=dict)
    _bases: dict[relax.Var, relax.Var] = field(default_factory=dict)
    _views: dict[relax.Var, list[relax.Var]] = field(default_factory=dict)
    _kernels: dict[str, tvm.ir.GlobalVar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.within:
            self.dims.later = self.check_now

    @abstractmethod
    def walk(self, graph: ir.Graph) -> None:
        """Lower every node of a graph in order."""

    @abstractmethod
    def inline(self, nodes: Iterable[ir.Node]) -> None:
        """Lower nodes one by one, also those of a graph inside a node, as part of the graph around it."""

    def inside(self, builder: relax.BlockBuilder, values: dict[ir.Value, Value]) -> Self:
        """The state for a function of its own in the same module, whose graph sees ``values``."""
        return replace(
            self, builder=builder, values=values, within=True, wanted={}, ranges={}, layouts={}, tokens_first={},
            outside=[], tied={}, attentions={}, _bases={}, _views={},
        )  # fmt: skip

    # -- values ----------------------------------------------------------------------------------------------------
    def value(self, value: ir.Value) -> Value:
        """What ``value`` was lowered to; initializers, also dequantized ones, become constants."""
        if value not in self.values:
            if value.const_value is not None:
                self.values[value] = value.const_value.numpy()
            elif (node := dequantized(value)) is not None:
                self.values[value] = dequantize(node)
        return self.values[value]

    def tensor(self, value: ir.Value) -> relax.Expr:
        """``value`` as a run-time tensor of its own type."""
        content = self.value(value)
        if isinstance(content, Formatted):
            if FLOAT32 not in content.tensors:
                content.tensors[FLOAT32] = self._decoded(*next(iter(content.tensors.items())))
            return content.tensors[FLOAT32]
        if isinstance(content, np.ndarray):
            return self.constant(content, value.name or "", key=value)
        if isinstance(content, Ints):
            return self.materialized(content)
        return content

    def _decoded(self, form: Format, stored: relax.Expr) -> relax.Expr:
        shape = self.shape_of(stored)
        if not any(form.columns):
            return self.compute("from_" + form.name, shape, lambda x, *i: decoded(x(*i), form), stored)
        grid = self.constant(form.grid, "grid")
        column = len(shape) - 1

        def element(x: Any, g: Any, *i: Any) -> Any:
            return decoded(x(*i), form, [g(tirx.const(row, "int64"), i[column]) for row in range(2)])

        return self.compute("from_columns", shape, element, stored, grid)

    def constant(self, array: Array, name: str, key: Any = None) -> relax.Expr:
        """A constant as a tensor: in the code when it is one number, else an entry of the weights tuple.

        Args:
            array: the content.
            name: for the manifest.
            key: equal keys share one entry; None makes a new one.
        """
        if array.size == 1:
            return relax.const(array, str(array.dtype))
        return self.weights.variable(object() if key is None else key, name, lambda: array)

    def packed(self, value: ir.Value, layout: object, pack: Callable[[Array], Array]) -> relax.Expr:
        """A constant in a kernel's own layout, packed once for equal ``layout``."""

        def content() -> Array:
            array = self.value(value)
            assert isinstance(array, np.ndarray)
            return pack(array)

        return self.weights.variable((value, layout), value.name or "", content)

    def materialized(self, ints: Ints) -> relax.Expr:
        """A run-time tensor that holds known integers which depend on the dimensions."""
        elements = [int(item) if isinstance(item, (int, bool)) else item for item in ints.array.reshape(-1)]
        flat = self.compute("shape_values", [len(elements)], lambda index: pick(index, elements).astype(ints.dtype))
        return self.reshape(flat, list(ints.array.shape))

    def known(self, value: ir.Value | None) -> Array | None:
        """The elements of ``value`` when they are known now (object array), else None."""
        if value is None:
            return None
        content = self.value(value)
        if isinstance(content, Ints):
            return content.array
        if isinstance(content, np.ndarray) and content.size <= MAX_ELEMENTS:
            return content.astype(object)
        return None

    def shape(self, value: ir.Value) -> list[Dim]:
        """The shape of ``value``. Raises InputError E-UNSUPPORTED-OP when its rank is not known."""
        content = self.value(value)
        if isinstance(content, np.ndarray):
            return list(content.shape)
        if isinstance(content, Ints):
            return list(content.array.shape)
        return self.shape_of(content.any if isinstance(content, Formatted) else content)

    def is_float32(self, value: ir.Value) -> bool:
        """Whether ``value`` is a float32 tensor, in whatever format it lies in memory."""
        content = self.value(value)
        if isinstance(content, Formatted):
            return True
        if isinstance(content, Ints):
            return False
        return str(content.dtype if isinstance(content, np.ndarray) else content.ty.dtype) == "float32"

    def shape_of(self, expression: relax.Expr) -> list[Dim]:
        """The shape of a run-time tensor."""
        shape = expression.ty.shape if isinstance(expression.ty, relax.TensorType) else None
        if shape is None:
            raise InputError("E-UNSUPPORTED-OP", "a shape is not known before the model runs", where=str(expression))
        return [self.dims.simplify(dim) for dim in shape]

    # -- emitting --------------------------------------------------------------------------------------------------
    def emit(self, expression: relax.Expr) -> relax.Var:
        """Bind an expression to a new variable."""
        variable = self.builder.emit(expression)
        if isinstance(variable.ty, relax.TensorType) and variable.ty.shape is not None:
            self.dims.require_sizes(variable.ty.shape, f"{self.node}: a result")
        return variable

    def typed(self, results: relax.Expr, shapes: Sequence[list[Dim]], dtypes: Sequence[str]) -> list[relax.Expr]:
        """The elements of a tuple, of the shapes that they have, which the run checks."""
        kinds = [relax.TensorType(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
        parts = [self.builder.emit(relax.TupleGetItem(results, place)) for place in range(len(kinds))]
        return [self.builder.match_cast(part, kind) for part, kind in zip(parts, kinds)]

    def reshape(self, tensor: relax.Expr, shape: Sequence[Dim]) -> relax.Expr:
        """``tensor`` seen with another shape, without copying; views of one tensor are shared."""
        base = self.base(tensor)
        for view in [base, *self._views.get(base, [])]:
            if self.dims.same_shape(self.shape_of(view), shape):
                return view
        empty = any(isinstance(dim, int) and dim == 0 for dim in shape)  # for Relax a 0 is the size that was there
        view = self.emit(relax.op.reshape(base, self.emit(relax.ShapeExpr(list(shape))) if empty else list(shape)))
        self._bases[view] = base
        self._views.setdefault(base, []).append(view)
        return view

    def base(self, tensor: relax.Expr) -> relax.Expr:
        """The tensor that ``tensor`` is a view of."""
        return self._bases.get(tensor, tensor)

    def compute(self, name: str, shape: Sequence[Dim], element: Callable[..., Any], *inputs: relax.Expr) -> relax.Var:
        """A tensor given element by element: ``element(*inputs, *indices)`` over TE tensors and index variables."""
        shapes = [self.shape_of(tensor) for tensor in inputs]
        placeholders = [
            te.placeholder(_extents(dims), str(tensor.ty.dtype), f"x{position}")
            for position, (tensor, dims) in enumerate(zip(inputs, shapes))
        ]
        result = te.compute(_extents(shape), lambda *index: element(*placeholders, *index), name=name)
        # A variable that is no dimension of a tensor by itself reaches the function as a number.
        bound = {dim.name for dims in (*shapes, shape) for dim in dims if isinstance(dim, tirx.Var)}
        read = {variable.name for body in result.op.body for variable in undefined_vars(body)}
        read |= {
            variable.name for dims in (*shapes, shape) for dim in _extents(dims) for variable in undefined_vars(dim)
        }
        numbers = [self.dims.variables[name] for name in sorted(read - bound) if name in self.dims.variables]
        function = te.create_prim_func([*placeholders, *numbers, result])
        if numbers:  # TVM fuses a number and a size of one name into a function that defines it twice
            function = function.with_attr("op_pattern", _OPAQUE)
        variable = self.builder.add_func(function.without_attr("global_symbol"), name)
        out = relax.TensorType(list(shape), result.dtype)
        return self.emit(relax.call_tir(variable, [*inputs, *numbers], out_ty=out))

    def full(self, shape: Sequence[Dim], value: Any, dtype: str) -> relax.Var:
        """A tensor of one number everywhere, which may be infinite."""
        number = np.array(value, dtype).item()
        return self.compute("full", shape, lambda *index: tirx.const(number, dtype))

    def call(
        self,
        name: str,
        build: Callable[[], tirx.PrimFunc],
        inputs: Sequence[relax.Expr],
        shape: Sequence[Dim],
        dtype: str = "float32",
    ) -> relax.Var:
        """Call one of our kernels; ``build`` is asked once for each distinct ``name``."""
        out = relax.TensorType(list(shape), dtype)
        return self.emit(relax.call_tir(self._kernel(name, build), list(inputs), out_ty=out))

    def call_for_all(
        self,
        name: str,
        build: Callable[[], tirx.PrimFunc],
        inputs: Sequence[relax.Expr],
        shapes: Sequence[Sequence[Dim]],
        dtypes: Sequence[str] = (),
    ) -> list[relax.Var]:
        """Call one of our kernels that has several outputs, float32 unless ``dtypes`` says otherwise."""
        kinds = dtypes or ["float32"] * len(shapes)
        out = [relax.TensorType(list(shape), dtype) for shape, dtype in zip(shapes, kinds, strict=True)]
        results = self.emit(relax.call_tir(self._kernel(name, build), list(inputs), out_ty=out))
        return [self.emit(relax.TupleGetItem(results, index)) for index in range(len(shapes))]

    def call_formats(
        self,
        name: str,
        build: Callable[[], tirx.PrimFunc],
        inputs: Sequence[relax.Expr],
        shape: Sequence[Dim],
        formats: Sequence[Format],
    ) -> Value:
        """Call one of our kernels that writes its result in each of ``formats``."""
        from xopt.kernels.precision import STORAGE

        if tuple(formats) == (FLOAT32,):
            return self.call(name, build, inputs, shape)
        dtypes = [STORAGE[form.name] for form in formats]
        if len(formats) == 1:
            return Formatted({formats[0]: self.call(name, build, inputs, shape, dtypes[0])})
        results = self.call_for_all(name, build, inputs, [shape] * len(formats), dtypes)
        return Formatted(dict(zip(formats, results)))

    def formats(self, value: ir.Value, width: Dim) -> tuple[Format, ...]:
        """The formats that the kernel which computes ``value`` [..., width] is to write."""
        wanted = self.wanted.get(value, (FLOAT32,))
        if not isinstance(width, int) or width % 4:
            return (FLOAT32,)  # rows that do not fill whole lanes are padded when they are converted
        quantized = [form for form in wanted if form.quantized]
        return tuple(form for form in wanted if form not in quantized[1:])

    def quantization(self, formats: Sequence[Format]) -> list[relax.Expr]:
        """The kernel input that a quantized result needs."""
        from xopt.kernels.precision import pack_quantization

        return [
            self.constant(pack_quantization(*form.grid), "quantization", key=form) for form in formats if form.quantized
        ]

    def formatted(self, value: ir.Value, form: Format) -> relax.Expr:
        """``value`` [..., K] in a format, its rows padded to whole lanes of the product that reads them."""
        if form == FLOAT32:
            return self.tensor(value)
        content = self.value(value)
        if not isinstance(content, Formatted):
            content = self.values[value] = Formatted({FLOAT32: self.tensor(value)})
        if form not in content.tensors:
            content.tensors[form] = self.converted(self.tensor(value), form)
        return content.tensors[form]

    def converted(self, tensor: relax.Expr, form: Format) -> relax.Expr:
        """A float32 tensor in a format, by a kernel of its own unless it is float32."""
        if form == FLOAT32:
            return tensor
        from xopt.kernels import convert, precision
        from xopt.targets.ops.fusion import leading

        shape = self.shape_of(tensor)
        reader = precision.BFLOAT16 if form.name == "bfloat16" else precision.INT8
        workload = convert.Workload(leading(shape[:-1]), shape[-1], reader.padded(shape[-1]), form.name)
        config, isa = self.config(convert, workload), self.target.isa()
        assert isa is not None
        name = convert.name(workload, config, isa)
        inputs = [tensor, *self.quantization([form])]
        storage = precision.STORAGE[form.name]
        return self.call(
            name, lambda: convert.build(workload, config, isa), inputs, [*shape[:-1], workload.padded], storage
        )

    def config(self, family: Any, workload: Any) -> Any:
        """The configuration of a kernel family (a module of `xopt.kernels`) for a workload on the target."""
        isa = self.target.isa()
        assert isa is not None
        return self.target.configs.config(family, workload, isa)

    def _kernel(self, name: str, build: Callable[[], tirx.PrimFunc]) -> tvm.ir.GlobalVar:
        if name not in self._kernels:
            function = build().with_attr("op_pattern", _OPAQUE).with_attr("global_symbol", name)
            self._kernels[name] = self.builder.add_func(function.with_attr("xopt.kernel", True), name)
        return self._kernels[name]

    def decide(self, sizes: relax.Expr, count: int, result: ir.Value | None = None) -> list[Dim]:
        """Dimensions that the data decide: the numbers of a run-time tensor int64 [count], none of them negative.

        Those that shape inference found for the ``result`` that has them are these numbers, which is checked.
        """
        told = [None] * count if result is None or result.shape is None else list(result.shape)
        dims = [d if isinstance(d, int) else self.dims.decided(f"decided by {self.node}") for d in told]
        shape = relax.ShapeType([tirx.const(d, "int64") if isinstance(d, int) else d for d in dims])
        self.builder.match_cast(self.emit(relax.op.tensor_to_shape(sizes)), shape)
        return dims

    def check_now(self, condition: Any, otherwise: str) -> None:
        """Have a condition on sizes that the data decide checked before what is emitted next."""
        if self.target.device != CPU:
            raise InputError("E-UNSUPPORTED-OP", f"a size that the data decides cannot be checked: {otherwise}")
        names = sorted({variable.name for variable in undefined_vars(condition)})
        numbers = [self.dims.variables[name] for name in names]
        name = f"check_{len(self.outside)}"
        function = checks.check_now(name, numbers, (condition, otherwise)).with_attr("op_pattern", _OPAQUE)
        variable = self.builder.add_func(function.with_attr("xopt.kernel", True), name)
        done = self.emit(relax.call_tir(variable, numbers, relax.TensorType([1], "int64")))
        self.outside.append((done, otherwise))  # read at the end, so that nobody drops it

    def aligned(self, tensors: Sequence[relax.Expr]) -> list[relax.Expr]:
        """Tensors whose dimensions broadcast provably: a dimension that only must be equal is checked at run time."""
        shapes = [self.shape_of(tensor) for tensor in tensors]
        target = self.dims.broadcast(*shapes)
        result = []
        for tensor, shape in zip(tensors, shapes):
            wanted = target[len(target) - len(shape) :]
            if all(self.dims.equal(dim, 1) or self.dims.equal(dim, want) for dim, want in zip(shape, wanted)):
                result.append(tensor)
                continue
            merged = [dim if self.dims.equal(dim, 1) else want for dim, want in zip(shape, wanted)]
            result.append(self.recast(tensor, merged))
        return result

    def recast(self, tensor: relax.Expr, shape: Sequence[Dim]) -> relax.Expr:
        """``tensor`` with a shape that it must have, though that cannot be proved; checked at run time."""
        given = self.shape_of(tensor)
        differing = [(old, new) for old, new in zip(given, shape) if not self.dims.equal(old, new)]
        if not differing:
            return tensor
        for old, new in differing:
            self.dims.require(self.dims.same(old, new), f"{self.node}: two sizes differ")
        if any(self.dims.related(old, new) for old, new in differing):
            # TVM takes a match of an expression with a variable inside it for a definition, and recurses without end.
            return self.compute("resized", shape, lambda x, *i: x(*i), tensor)
        return self.builder.match_cast(tensor, relax.TensorType(list(shape), tensor.ty.dtype))


_OPAQUE = 8


def _extents(shape: Sequence[Dim]) -> list[Any]:
    return [tirx.IntImm("int64", dim) if isinstance(dim, int) else dim for dim in shape]


def pick(position: Any, items: Sequence[Any]) -> Any:
    """``items[position]``, of integers and expressions; 0 where there are none."""
    items = [tirx.const(item, "int64") if isinstance(item, int) else item for item in items]
    result = items[-1] if items else tirx.const(0, "int64")
    for place in reversed(range(len(items) - 1)):
        result = tirx.Select(position == place, items[place], result)
    return result


def in_memory(name: str, array: Array) -> Array:
    """Leave a weight where it is."""
    return array
