"""What makes an operator fast: one file a kernel family.

A template keeps vectors and indices in local arrays, hundreds of them in an unrolled tile.  With TVM's storage rewrite
each becomes a call of the workspace allocator; without it they are stack slots, which LLVM turns into registers.  Hence
modules that hold these kernels are to be built under ``tvm.transform.PassContext(config=COMPILE_CONFIG)``: attention is
several times faster so, and compiles faster.
"""

COMPILE_CONFIG = {"tirx.disable_storage_rewrite": True}
