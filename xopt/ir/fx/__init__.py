"""The graph as a torch.fx.GraphModule."""
