"""The report in a terminal, and the short form that the command line prints as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xopt import console
from xopt.measure.accuracy import ARTIFACT

FINAL_KEYS = ("quality", "judged", "drop", "onnx_quality")
STEP_KEYS = ("pass", "options", "kept", "reason", "quality", "latency_ms", "macs", "bytes")


def brief(report: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of ``xopt optimize`` (docs/cli-json.md): the report without its samples."""
    return {
        "steps": [{key: step[key] for key in STEP_KEYS} for step in report["steps"]],
        "output": report["output"],
        "metric": report["metric"],
        "target": report["target"]["name"],
        "precision": report.get("precision"),
        "final": {key: report["final"].get(key) for key in FINAL_KEYS},
        "runtimes": {
            name: {key: times[key] for key in ("median_ms", "p90_ms")} for name, times in report["runtimes"].items()
        },
        "skipped": report["skipped"],
        "missing": report.get("missing"),
        "segments": report.get("segments"),
    }


def print_report(report: Mapping[str, Any]) -> None:
    """The steps, the peers, and where everything is."""
    metric = report["metric"]
    rows: list[tuple[object, ...]] = []
    for step in report["steps"]:
        latency = step["latency_ms"]
        rows.append(
            (
                step["text"],
                verdict(step),
                step["reason"],
                quality(step["quality"]),
                console.milliseconds(latency and latency["median"]),
                console.size(step["macs"]),
                console.size(step["bytes"], "B"),
            )
        )
    data = f"{metric['data']}, {metric['samples']} samples"
    title = f"{metric['name']} of the original {quality(metric['baseline'])} ({data})"
    console.table(title, ["pass", "", "reason", metric["name"], "ms", "MACs", "size"], rows, left=3)
    for line in judgement(report):
        console.out(line)
    if report["runtimes"] and report["final"]["latency_ms"]:
        final = report["final"]["latency_ms"]["median"]
        others = [
            (name, f"{times['median_ms']:.3f}", f"{times['median_ms'] / final:.2f}x")
            for name, times in report["runtimes"].items()
        ]
        console.table("\nbeside, in turns", ["runtime", "ms", "of xopt's"], [("xopt", f"{final:.3f}", ""), *others])
    elif (reason := unmeasured(report)) is not None:
        console.out(f"latency not measured: {reason}")
    if report.get("missing"):
        console.say(f"there is no compiled model: {report['missing']}")
    for name, reason in report["skipped"].items():
        console.say(f"{name} is left out: {reason}")
    if report["output"]:
        console.out(f"\nreport: {report['output']}/report.html")


def quality(value: float | None) -> str:
    """A metric for the user: null in a report is a number that was not finite."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "not finite"


def judgement(report: Mapping[str, Any]) -> list[str]:
    """What quality was judged on, and what the precision of the compiled model costs by itself."""
    final, precision = report["final"], report.get("precision")
    if final.get("judged") is None:  # a report of an earlier version
        return []
    if final["judged"] != ARTIFACT:
        lines = [f"quality is that of model.onnx in onnxruntime: {unmeasured(report)}"]
        return lines + ([report["missing"]] if report.get("missing") else [])
    lines = ["quality is that of the compiled model"]
    if report.get("segments"):
        lines.append(f"in onnxruntime, inside of the compiled model: {', '.join(report['segments'])}")
    if final.get("onnx_quality") is not None:
        lines[0] += f"; model.onnx in onnxruntime has {final['onnx_quality']:.4f}"
    if precision is not None and precision["drop"] is not None and precision["quality"] is not None:
        lines.append(
            f"precision: compiled at {precision['name']}, before any lossy pass, it has {precision['quality']:.4f}, "
            f"drop {precision['drop']:.4f}"
        )
    return lines


def unmeasured(report: Mapping[str, Any]) -> str | None:
    """Why there is nothing of the compiled model to measure; None where there is."""
    if report.get("missing"):
        return "the model could not be compiled"
    return None if report["target"]["runs_here"] else f"{report['target']['name']} does not run on this machine"


def verdict(step: Mapping[str, Any]) -> str:
    """What became of a step, in a word."""
    if not step["rewritten"]:
        return "no change"
    return "kept" if step["kept"] else "left out"


def print_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """What ``--dry-run`` shows."""
    if as_json:
        console.emit({"plan": plan})
        return
    rows = [(step["effect"], step["text"]) for step in plan["passes"]]
    console.table(f"{plan['model']} for {plan['target']}", ["effect", "pass"], rows, left=2)
    evaluation, latency = plan["evaluation"], plan["latency"]
    limit = "no limit" if plan["max_drop"] is None else f"at most {plan['max_drop']:g} lost"
    console.out(f"\nquality: {plan['metric']} on {evaluation['samples']} samples of {evaluation['data']}, {limit}")
    timed = f"{latency['threads']} threads, feeds {latency['feeds']}" if latency["measured"] else "not measured"
    console.out(f"latency: {timed}")


def print_facts(facts: Mapping[str, Any]) -> None:
    """``xopt inspect``."""
    sizes = ", ".join(f"{name}={number}" for name, number in facts["dims"].items())
    console.out(f"parameters  {console.size(facts['parameters'])}   weights  {console.size(facts['bytes'], 'B')}")
    console.out(f"MACs        {console.size(facts['macs'])}{f'   at {sizes}' if sizes else ''}")
    for kind in ("inputs", "outputs"):
        for value in facts[kind]:
            console.out(f"{kind[:-1]:<11} {value['name']} {value['dtype']} {value['shape']}")
    if facts["batch"] is not None:
        console.out(
            f"batch       fixed at {facts['batch']}; --passes free-batch lets it be any, where the graph allows it"
        )
    rows = [_block_row(index, block) for index, block in enumerate(facts["blocks"])]
    console.out()
    if rows:
        console.table("", ["block", "heads", "kv heads", "head dim", "causal", "FFN width", "gated"], rows)
    else:
        console.out("no transformer block was found")
    if facts["left_out"]:
        console.out()
        rows = [(place["what"], place["reason"], place["node"]) for place in facts["left_out"]]
        console.table("in no block", ["what", "reason", "node"], rows, left=3)


def print_differences(found: Mapping[str, Any]) -> None:
    """``xopt diff``."""
    rows: list[tuple[object, ...]] = [
        (name, *(console.size(n) for n in found[key]))
        for name, key in (("parameters", "parameters"), ("bytes", "bytes"), ("MACs", "macs"))
    ]
    rows += [(op, *counts) for op, counts in found["ops"].items() if counts[0] != counts[1]]
    console.table("", ["", "before", "after"], rows)
    console.out()
    outputs = [
        (name, f"{o['max_abs']:.3g}", f"{o['scale']:.3g}", f"{o['cosine']:.6f}", o["mismatch"] or "")
        for name, o in found["outputs"].items()
    ]
    title = f"outputs on {found['samples']} samples of {found['data']}"
    console.table(title, ["output", "max difference", "largest", "cosine", ""], outputs)


def _block_row(index: int, block: Mapping[str, Any]) -> tuple[object, ...]:
    site, ffn = block["attention"], block["ffn"]
    attention: tuple[object, ...] = (None,) * 4
    if site is not None:
        attention = (site["heads"], site["kv_heads"], site["head_dim"], "yes" if site["causal"] else "no")
    return (index, *attention, ffn and ffn["width"], ffn and ("yes" if ffn["gated"] else "no"))
