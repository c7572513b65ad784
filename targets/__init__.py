"""Where a model runs: lowering and linking for each target."""
