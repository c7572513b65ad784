"""What makes an operator fast: one file a kernel family.

A template keeps vectors and indices in local arrays, hundreds of them in an unrolled tile.  With TVM's storage rewrite
each becomes a call of the workspace allocator; without it they are stack slots, which LLVM turns into registers.  Hence
modules that hold these kernels are to be built under ``tvm.transform.PassContext(**COMPILE_OPTIONS)``: attention is
several times faster so, and compiles faster.  Nor are buffers compacted: they are as small as they can be, and looking
for more takes a fifth of the compile time.
"""

from typing import Any

COMPILE_OPTIONS: dict[str, Any] = {
    "config": {"tirx.disable_storage_rewrite": True},
    "disabled_pass": ["s_tir.CompactBufferAllocation"],
}
