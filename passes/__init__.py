"""What changes the model: one file a pass. The classes are imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xopt.pipeline.registry import BUILT_IN

if TYPE_CHECKING:
    from xopt.passes.canonicalize import Canonicalize
    from xopt.passes.deduplicate import Deduplicate
    from xopt.passes.eliminate_dead import EliminateDead
    from xopt.passes.fold_constants import FoldConstants
    from xopt.passes.free_batch import FreeBatch
    from xopt.passes.fuse_qkv import FuseQKV
    from xopt.passes.merge_tokens import MergeTokens
    from xopt.passes.prune_heads import PruneHeads
    from xopt.passes.quantize import Quantize
    from xopt.passes.remove_padding import RemovePadding

__all__ = [
    "Canonicalize",
    "Deduplicate",
    "EliminateDead",
    "FoldConstants",
    "FreeBatch",
    "FuseQKV",
    "MergeTokens",
    "PruneHeads",
    "Quantize",
    "RemovePadding",
]

_MODULES = {attribute: module for module, _, attribute in (path.partition(":") for path in BUILT_IN.values())}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
