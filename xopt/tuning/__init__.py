"""Searches the configurations of a model's kernels by measurement.

sites.py     which kernels a model calls, on tensors of which shapes
search.py    which configurations to try, and which one has won
pool.py      worker processes: a candidate that crashes or hangs takes nothing with it
worker.py    what runs in them: build a kernel, time it, compute with it
run.py       the whole model, one kernel after the other, into the database
"""
