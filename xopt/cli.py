"""The ``xopt`` command: one function a subcommand, and nothing heavy imported before it is needed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from xopt import console

F = TypeVar("F", bound=Callable[..., Any])


class _Finite(click.FloatRange):
    """A number from 0 on that is one: neither infinite nor NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


MODEL = click.argument("model", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output (docs/cli-json.md).")
TARGET = click.option("--target", default="cpu", show_default=True, help="cpu, arm or cuda, or a variant: cpu:avx2.")
THREADS = click.option("--threads", type=click.IntRange(1), help="CPU threads of all that is timed. [default: cores]")
SEED = click.option(
    "--seed", type=click.IntRange(0, (1 << 32) - 1), default=0, show_default=True, help="Seed of everything random."
)
DATA = click.option("--data", help="Samples: an .npz file with an array for each input, or module:function.")
EVAL = click.option("--eval-data", help="Samples that quality is measured on. [default: those of --data]")
METRIC = click.option("--metric", help="top-1, spearman, perplexity, agreement, cosine, or module:function.")
BATCH = click.option(
    "--batch", type=click.IntRange(1, (1 << 32) - 1), default=1, show_default=True, help="Samples of a timed run."
)
PASSES = click.option("--passes", help="Passes in their order: 'prune-heads{keep=0.75},merge-tokens{ratio=0.3}'.")
RECIPE = click.option("--recipe", type=click.Path(path_type=Path), help="A YAML file with the passes.")
VERIFY = click.option("--verify-each/--no-verify-each", default=True, show_default=True, help="Check each pass.")
DATABASE = click.option(
    "--database",
    type=click.Path(path_type=Path),
    help="Results of xopt tune, instead of those in the user's cache.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of linear layers and attention; sums stay fp32. For int8 see the pass quantize.",
)
FALLBACK = click.option(
    "--fallback", is_flag=True, help="Let onnxruntime run the nodes that cannot be compiled, inside the model's run."
)
NO_DATABASE = click.option("--no-database", is_flag=True, help="Configure kernels by heuristics alone.")
DIMS = click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a symbolic axis.")


class _Command(click.Command):
    """A command whose help ends with examples, as they are written in the docstring after ``Examples:``."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        text, _, self.examples = (self.help or "").partition("Examples:")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text.strip())

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples.strip().splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


class _Group(click.Group):
    """Lists the subcommands in the order they are defined in: as they are used."""

    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="xopt")
def cli() -> None:
    """Optimizing compiler for trained transformer models.

    Rewrites a model with passes, keeps what pays in accuracy and latency measured on the target, and compiles it.
    """


@cli.command()
@MODEL
@TARGET
@PASSES
@RECIPE
@DATA
@EVAL
@METRIC
@click.option("--max-drop", type=_Finite(0), help="How much of the metric may be lost; costlier passes are weakened.")
@BATCH
@THREADS
@SEED
@DIMS
@VERIFY
@click.option("--dump-ir", type=click.Path(path_type=Path), help="Folder for the model after each pass.")
@click.option("--time-passes", is_flag=True, help="Print how long each pass took.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Time other runtimes beside.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run of the same command stopped.")
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@PRECISION
@FALLBACK
@DATABASE
@NO_DATABASE
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@JSON
def optimize(model: Path, passes: str | None, recipe: Path | None, output: Path, as_json: bool, **options: Any) -> None:
    """Rewrite a model, keep what pays, compile it, and report.

    Examples:
        xopt optimize model.onnx
        xopt optimize model.onnx --target cuda -o out/
        xopt optimize vit.onnx --passes 'prune-heads{keep=0.75}' --data calib.npz --max-drop 0.01
        xopt optimize bert.onnx --recipe out/pipeline.yaml --data pairs.npz --metric spearman --json
    """
    from xopt import commands

    listed = commands.pipeline(passes, recipe)
    commands.optimize(model, listed, output, as_json=as_json, command=_command_line(), **options)


@cli.command("compile")
@MODEL
@TARGET
@DIMS
@PRECISION
@FALLBACK
@DATABASE
@NO_DATABASE
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare the result with the model in onnxruntime, before it is put in place.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("model.so"), show_default=True)
@JSON
def compile_(model: Path, target: str, dims: tuple[str, ...], output: Path, as_json: bool, **options: Any) -> None:
    """Compile a model as it is: exact passes only.

    Examples:
        xopt compile model.onnx -o model.so
        xopt compile model.onnx --target arm --dim batch=1 -o arm/model.so
        xopt compile model.onnx --precision bf16
        xopt compile model.onnx --database tuned.jsonl
    """
    from xopt import commands

    commands.compile_model(model, target, dims, output, as_json, **options)


@cli.command()
@MODEL
@TARGET
@DIMS
@BATCH
@THREADS
@click.option("--trials", type=click.IntRange(1), default=32, show_default=True, help="Candidates for each kernel.")
@click.option("--timeout", type=_Finite(0), default=600, show_default=True, help="Seconds for everything.")
@PRECISION
@click.option("--database", type=click.Path(path_type=Path), help="File for the results. [default: the user's cache]")
@click.option("--again", is_flag=True, help="Also tune what the file knows.")
@JSON
def tune(model: Path, as_json: bool, **options: Any) -> None:
    """Find the fastest configuration of each kernel of a model, by measurement on this machine.

    What compile, optimize and bench build afterwards uses the results. An interrupted run goes on where it stopped.

    Examples:
        xopt tune model.onnx
        xopt tune model.onnx --dim sequence=128 --threads 1 --timeout 120
        xopt tune model.onnx --database tuned.jsonl --json
    """
    from xopt import commands

    commands.tune(model, as_json=as_json, **options)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@DATA
@BATCH
@THREADS
@SEED
@DIMS
@click.option("-o", "--output", type=click.Path(path_type=Path), help="An .npz file for the outputs.")
@JSON
def run(artifact: Path, as_json: bool, **options: Any) -> None:
    """Run a compiled model (model.so or its folder), or the reproducer that a failed pass has left.

    Examples:
        xopt run out/ --data test.npz -o outputs.npz
        xopt run model.so --batch 8 --dim sequence=128 --json
        xopt run /tmp/xopt-003-prune-heads-k2x1
    """
    from xopt import commands

    commands.run(artifact, as_json=as_json, **options)


@cli.command()
@MODEL
@click.option("--peers", is_flag=True, help="Also onnxruntime, openvino, torch and torch-compile, where installed.")
@click.option("--peer", "chosen", multiple=True, help="One more runtime to time beside; may be repeated.")
@DATA
@BATCH
@THREADS
@SEED
@DIMS
@click.option("--rounds", type=click.IntRange(5), default=30, show_default=True, help="Samples of each runtime.")
@PRECISION
@click.option("--layers", is_flag=True, help="Also the time of each kernel, beside the machine's limits.")
@JSON
def bench(model: Path, as_json: bool, **options: Any) -> None:
    """Time a model (ONNX, or a compiled one) against other runtimes, in turns on the same input.

    Examples:
        xopt bench model.onnx --peers
        xopt bench model.onnx --peer onnxruntime --batch 8 --threads 2 --json
        xopt bench model.onnx --layers --dim sequence=128
        xopt bench out/model.so --data test.npz
    """
    from xopt import commands

    commands.bench(model, as_json=as_json, **options)


@cli.command()
@MODEL
@DIMS
@JSON
def inspect(model: Path, dims: tuple[str, ...], as_json: bool) -> None:
    """Show size, work and transformer blocks of a model.

    Examples:
        xopt inspect model.onnx
        xopt inspect model.onnx --dim sequence=512 --json
    """
    from xopt import commands

    commands.inspect(model, dims, as_json)


@cli.command()
@click.argument("name", required=False)
@JSON
def passes(name: str | None, as_json: bool) -> None:
    """List the passes, or the options of one.

    Examples:
        xopt passes
        xopt passes prune-heads
    """
    from xopt import commands

    commands.passes(name, as_json)


@cli.command()
@JSON
def targets(as_json: bool) -> None:
    """List the targets, and whether they run here.

    Examples:
        xopt targets --json
    """
    from xopt import commands

    commands.targets(as_json)


@cli.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@DATA
@SEED
@DIMS
@JSON
def diff(before: Path, after: Path, as_json: bool, **options: Any) -> None:
    """Compare two models: operators, size, work, and what they compute.

    Examples:
        xopt diff model.onnx out/model.onnx
        xopt diff model.onnx out/model.onnx --data test.npz --json
    """
    from xopt import commands

    commands.diff(before, after, as_json=as_json, **options)


@cli.command()
@MODEL
@PASSES
@RECIPE
@DATA
@click.option("--check", help="module:function(model) that returns what is wrong, or None. [default: outputs]")
@SEED
@DIMS
@JSON
def bisect(model: Path, passes: str | None, recipe: Path | None, as_json: bool, **options: Any) -> None:
    """Find the pass, and the place in the model, that breaks a check; exit status 3 when there is one.

    Examples:
        xopt bisect model.onnx --recipe out/pipeline.yaml
        xopt bisect model.onnx --passes fuse-qkv,my-pass --check checks.py:top1_is_kept --data test.npz
    """
    from xopt import commands

    commands.bisect(model, commands.pipeline(passes, recipe), as_json=as_json, **options)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page. [default: report.html in FOLDER]")
@JSON
def report(folder: Path, output: Path | None, as_json: bool) -> None:
    """Print the table of an optimization, and write its page again from report.json.

    Examples:
        xopt report out/
        xopt report out/report.json -o page.html
    """
    from xopt import commands

    commands.report(folder, output, as_json)


@cli.command()
@JSON
def doctor(as_json: bool) -> None:
    """Check versions, compilers, emulator and GPU.

    Examples:
        xopt doctor
    """
    from xopt import commands

    commands.doctor(as_json)


def _command_line() -> str:
    import shlex

    return shlex.join(["xopt", *sys.argv[1:]])


def main() -> None:
    """Entry point: errors become one line and an exit status (docs/guide.md)."""
    sys.exit(console.run_guarded(lambda: cli(standalone_mode=False)))
