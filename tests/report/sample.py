"""A report as an optimization of the digits model writes it, with one kept and one refused lossy pass."""

from __future__ import annotations

from typing import Any


def _step(name: str, effect: str, kept: bool, reason: str, **more: Any) -> dict[str, Any]:
    return {
        "pass": name,
        "options": {},
        "text": name,
        "kept": kept,
        "reason": reason,
        "effect": effect,
        "quality": 0.9889,
        "drop": 0.0,
        "macs": 112e6,
        "bytes": 809000,
        "parameters": 202000,
        "latency_ms": {"median": 1.0, "p90": 1.2},
        "samples_ms": [1.0, 1.0, 1.2],
        "decision_samples_ms": None,
        "matched": 1,
        "rewritten": 1,
        "refused": [],
        "numbers": {},
        "trials": [],
        "seconds": 0.1,
        **more,
    }


def _facts(heads: int, macs: float) -> dict[str, Any]:
    block = {
        "attention": {"heads": heads, "kv_heads": heads, "head_dim": 16, "causal": False},
        "ffn": {"width": 256, "gated": False},
    }
    return {"parameters": 202000, "bytes": 809000, "macs": macs, "blocks": [block], "ops": {"MatMul": 10 + heads}}


def report() -> dict[str, Any]:
    """A fresh copy."""
    trials = [
        {"options": {"keep": 0.5}, "quality": 0.95, "drop": 0.04, "verdict": "drop 0.0389 > 0.0100"},
        {"options": {"keep": 0.75}, "quality": 0.9833, "drop": 0.0056, "verdict": "within budget"},
    ]
    pruned = {"quality": 0.9833, "macs": 84e6, "latency_ms": {"median": 0.8, "p90": 0.9}, "trials": trials}
    merged = {"quality": 0.9722, "macs": 70e6, "latency_ms": {"median": 0.82, "p90": 0.95}}
    return {
        "schema": 1,
        "kind": "xopt-report",
        "created": "2026-01-01T00:00:00+00:00",
        "command": "xopt optimize digits_vit.onnx --passes 'prune-heads{keep=0.5}' --max-drop 0.01",
        "model": "digits_vit.onnx",
        "target": {"name": "cpu", "runs_here": True, "features": ["avx2"]},
        "machine": {
            "cpu": "Some CPU",
            "features": ["avx2"],
            "cores": 2,
            "logical_cores": 2,
            "usable_cores": 2,
            "memory": 8 << 30,
            "system": "Linux 6",
            "python": "3.11.7",
            "load": 0.1,
            "versions": {"xopt": "0.1.0"},
        },
        "threads": 2,
        "seed": 0,
        "feeds": {"pixel_values": [32, 1, 8, 8]},
        "metric": {
            "name": "top-1",
            "higher_is_better": True,
            "baseline": 0.9889,
            "max_drop": 0.01,
            "samples": 360,
            "data": "test.npz",
            "synthetic": False,
            "calibration": {"data": "calibration.npz", "samples": 400},
        },
        "steps": [
            _step("canonicalize", "exact", True, "exact"),
            _step("fuse-qkv", "exact", False, "nothing to rewrite: already-fused (4)", rewritten=0),
            _step("prune-heads", "lossy", True, "weakened, drop 0.0056, 1.25x faster", **pruned),
            _step("merge-tokens", "lossy", False, "drop 0.0167 > 0.0100", **merged),
        ],
        "final": {
            "quality": 0.9833,
            "judged": "artifact",
            "compiled_quality": 0.9833,
            "onnx_quality": 0.9861,
            "drop": 0.0056,
            "macs": 84e6,
            "bytes": 600000,
            "parameters": 150000,
            "latency_ms": {"median": 0.8, "p90": 0.9},
        },
        "precision": {"name": "bf16", "quality": 0.9861, "drop": 0.0028},
        "agreement": {"samples": 360, "bound": None, "cosine": 0.99, "outputs": {}},
        "runtimes": {
            "onnxruntime": {"median_ms": 1.1, "p90_ms": 1.3, "samples_ms": [1.1, 1.1, 1.3]},
            "openvino": {"median_ms": 0.9, "p90_ms": 1.0, "samples_ms": [0.9, 0.9, 1.0]},
            "onnxruntime-optimized": {"median_ms": 0.95, "p90_ms": 1.0, "samples_ms": [0.95, 0.95, 1.0]},
        },
        "skipped": {"torch": "not installed (torch)"},
        "structure": {"before": _facts(4, 112e6), "after": _facts(3, 84e6)},
        "verification": {
            "compared": True,
            "bound": 1e-5,
            "outputs": {"logits": {"max_abs": 1e-6, "scale": 9.0, "cosine": 1.0}},
        },
        "output": "out",
    }
