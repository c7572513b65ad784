"""Nothing is computed before the sizes that it needs are known.

    before   y = fused(x, n);  n = match_cast(count)        after   n = match_cast(count);  y = fused(x, n)
TVM's fusion puts a group of operators where its tensors are there, and does not look at the sizes that the data decide.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.tirx.analysis import undefined_vars


def sizes_first(module: tvm.IRModule, _: Any) -> tvm.IRModule:
    """Bindings of ``main`` in an order in which every size is bound before it is used; else as they are."""
    main = module["main"]
    blocks = [_in_order(block) for block in main.body.blocks]
    if all(new is old for new, old in zip(blocks, main.body.blocks)):
        return module
    body = relax.SeqExpr(blocks, main.body.body)
    module.update_func(
        module.get_global_var("main"), relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
    )
    return module


def _in_order(block: relax.BindingBlock) -> relax.BindingBlock:
    late = {name: k for k, binding in enumerate(block.bindings) for name in _decided(binding)}
    if not late:
        return block
    ordered: list[relax.Binding] = []
    waiting: list[relax.Binding] = []
    known: set[str] = set()
    missing: set[relax.Var] = set()
    for binding in block.bindings:
        ordered_now = [binding]
        if isinstance(binding, relax.MatchCast):
            known |= _decided(binding)
            ordered_now += waiting
            waiting, missing = [], set()
        for candidate in ordered_now:
            sizes, tensors = _read(candidate)
            if ((sizes & late.keys()) - known) - _decided(candidate) or tensors & missing:
                waiting.append(candidate)
                missing.add(candidate.var)
            else:
                ordered.append(candidate)
    ordered += waiting
    if all(a.same_as(b) for a, b in zip(ordered, block.bindings)):
        return block
    return type(block)(ordered)


def _decided(binding: relax.Binding) -> set[str]:
    """Names of the sizes that a binding defines."""
    if not isinstance(binding, relax.MatchCast) or not isinstance(binding.ty, relax.ShapeType):
        return set()
    return {dim.name for dim in binding.ty.values or () if isinstance(dim, tirx.Var)}


def _read(binding: relax.Binding) -> tuple[set[str], set[relax.Var]]:
    """Names of the sizes, and the variables, that a binding reads."""
    sizes: set[str] = set()
    variables: set[relax.Var] = set()

    def visit(node: Any) -> None:
        if isinstance(node, relax.Var):
            variables.add(node)
        elif isinstance(node, relax.ShapeExpr):
            for dim in node.values:
                sizes.update(variable.name for variable in undefined_vars(dim))
        elif isinstance(node, tirx.Var):
            sizes.add(node.name)

    relax.analysis.post_order_visit(binding.value, visit)
    shape = binding.var.ty.shape if isinstance(binding.var.ty, relax.TensorType) else None
    for dim in shape or ():
        if not isinstance(dim, int):
            sizes.update(variable.name for variable in undefined_vars(dim))
    return sizes, variables
