"""Sessions of onnxruntime beside compiled code: silent, and idle while they wait."""

from __future__ import annotations

from typing import Any


def started(source: bytes | str, threads: int, optimized: bool = True) -> Any:
    """A session of onnxruntime on the CPU that computes a graph as it is written.

    Args:
        source: the ONNX model, or the path of its file.
        threads: that one operator may use.
        optimized: whether onnxruntime may rewrite the graph.

    Raises:
        ImportError: onnxruntime is not installed.
        Exception: of onnxruntime's own kinds, it does not take the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it is not timed, and others are
    options.log_severity_level = 4
    # As the graph says: onnxruntime's own integer kernels saturate sums of products on CPUs without VNNI.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def brief(error: Exception, most: int = 300) -> str:
    """What onnxruntime says, in a line."""
    return " ".join(str(error).split())[:most] or type(error).__name__
