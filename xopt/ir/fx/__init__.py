"""The FX view: a canonical graph as a ``torch.fx.GraphModule`` to calibrate, differentiate and distill.

    gm = to_fx(model)                                   # parameters are the model's initializers
    outputs = gm(ids, mask)                             # dict of outputs by name
    run_with_values(gm, feeds, ["layers.0.attend_out"], intercept={"layers.0.act_out": lambda h: h * gate})
    write_back(gm, model)                               # the trained weights, into the model

Needs torch, which nothing else of ``xopt.ir`` does.
"""

from xopt.ir.fx.convert import to_fx
from xopt.ir.fx.run import as_tensors, run_node, run_with_values, write_back

__all__ = ["as_tensors", "run_node", "run_with_values", "to_fx", "write_back"]
