"""Pipelines as text and as YAML, each exactly back and forth.

Text, for a command line (options that have their default value are left out)::

    prune-heads{keep=0.75, ffn=true},merge-tokens{schedule=[13, 13]}

YAML, for a file to keep (every option is written, so that it means the same after a default has changed)::

    - prune-heads: {keep: 0.75, ffn: true, score: fisher}
    - deduplicate

Grammar of a value: ``true``, ``false``, ``none``, a number, a word, a string in double quotes, a list in
brackets.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

from xopt import files
from xopt.errors import InputError
from xopt.pipeline import registry
from xopt.pipeline.base import OptionValue, Pass

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")
          | (?P<word>[^\W\d][\w./-]*)
          | (?P<number>[+-]?(?:inf\b|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?))
          | (?P<mark>[{}\[\],=])
          | (?P<end>$))""",
    re.VERBOSE,
)
_WORD = re.compile(r"[^\W\d][\w./-]*")
LARGEST_TEXT = 1 << 18
"""Characters of a pipeline; one with every option of thirty passes has three thousand."""
_DEEPEST = 8
"""Lists in each other; no option takes more than one."""
_CONSTANTS: dict[str, OptionValue] = {"true": True, "false": False, "none": None, "inf": float("inf")}


class _Parser:
    """Recursive descent over the tokens of one pipeline."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.advance()

    def advance(self) -> tuple[str, str]:
        """Return the current token as (kind, text) and step to the next one."""
        current = getattr(self, "token", ("", ""))
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            raise self.error("a character that has no meaning here")
        kind = match.lastgroup or "end"
        self.start, self.position = match.start(kind), match.end()
        self.token = (kind, match.group(kind))
        return current

    def error(self, what: str) -> InputError:
        at = self.text[self.position :].strip() if not hasattr(self, "token") else self.text[self.start :]
        return InputError(
            "E-PASS",
            what,
            where=f"in the pipeline at {at[:30]!r}" if at else "at the end of the pipeline",
            cure="write it like prune-heads{keep=0.75, ffn=true},merge-tokens{ratio=0.3}",
        )

    def mark(self, mark: str) -> bool:
        """Step over ``mark`` if it is next."""
        if self.token != ("mark", mark):
            return False
        self.advance()
        return True

    def expect(self, kind: str, what: str) -> str:
        if self.token[0] != kind:
            raise self.error(f"{what} is expected")
        return self.advance()[1]

    def pipeline(self) -> list[Pass]:
        passes = [] if self.token[0] == "end" else [self.one_pass()]
        while self.mark(","):
            passes.append(self.one_pass())
        self.expect("end", "a comma between two passes")
        return passes

    def one_pass(self) -> Pass:
        name = self.expect("word", "the name of a pass")
        options: dict[str, OptionValue] = {}
        if self.mark("{") and not self.mark("}"):
            self.option(options)
            while self.mark(","):
                self.option(options)
            if not self.mark("}"):
                raise self.error("a closing brace is expected")
        return registry.create(name, options)

    def option(self, options: dict[str, OptionValue]) -> None:
        key = self.expect("word", "the name of an option")
        if key in options:
            raise self.error(f"option {key} is given twice")
        if not self.mark("="):
            raise self.error(f"= is expected after option {key}")
        options[key] = self.value()

    def value(self) -> OptionValue:
        if self.mark("["):
            return self.list()
        kind, text = self.token
        if kind not in ("string", "word", "number"):
            raise self.error("a value is expected")
        self.advance()
        if kind == "word":
            return _CONSTANTS.get(text, text)
        return _string(text) if kind == "string" else _number(text)

    def list(self) -> tuple[OptionValue, ...]:
        if self.mark("]"):
            return ()
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.error("lists are nested too deeply")
        items = [self.value()]
        while self.mark(","):
            items.append(self.value())
        if not self.mark("]"):
            raise self.error("a closing bracket is expected")
        self.depth -= 1
        return tuple(items)


def _string(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError as error:
        raise InputError("E-PASS", f"{text} is not a string", cure="escape it as in JSON") from error


def _number(text: str) -> int | float:
    if not re.fullmatch(r"[+-]?\d+", text):
        return float(text)
    try:
        return int(text)
    except ValueError as error:  # Python refuses to read thousands of digits
        raise InputError(
            "E-PASS", f"a number of {len(text)} digits", where=f"{text[:20]}...", cure="give fewer"
        ) from error


def parse(text: str) -> list[Pass]:
    """Passes of a textual pipeline; InputError E-PASS or E-OPTION."""
    _check_length(text)
    return _Parser(text).pipeline()


def _check_length(text: str) -> None:
    if len(text) > LARGEST_TEXT:
        raise InputError(
            "E-PASS", f"the pipeline has {len(text)} characters", cure=f"at most {LARGEST_TEXT} make sense"
        )


def render(passes: Iterable[Pass]) -> str:
    """Textual pipeline of ``passes``: ``parse(render(passes)) == passes``."""
    return ",".join(_render_pass(one) for one in passes)


def _render_pass(one: Pass) -> str:
    options = ", ".join(f"{name}={_render_value(value)}" for name, value in one.values(all_options=False).items())
    return f"{one.name}{{{options}}}" if options else one.name


def _render_value(value: OptionValue) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return value if _WORD.fullmatch(value) and value not in _CONSTANTS else json.dumps(value)
        case _:
            return "[" + ", ".join(_render_value(item) for item in value) + "]"


def to_yaml(passes: Iterable[Pass]) -> str:
    """YAML of ``passes`` with every option: ``from_yaml(to_yaml(passes)) == passes``."""
    import yaml

    steps = [{one.name: _plain(one.values())} if one.options() else one.name for one in passes]
    return str(yaml.safe_dump(steps, sort_keys=False, default_flow_style=None, width=10_000))


def _plain(values: dict[str, OptionValue]) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def load(path: str | Path) -> list[Pass]:
    """Passes of a YAML file; InputError E-FILE, E-PASS or E-OPTION."""
    return from_yaml(files.read_text(path, "the recipe", LARGEST_TEXT, "name a YAML file with passes"))


def from_yaml(text: str) -> list[Pass]:
    """Passes of a YAML pipeline; InputError E-PASS or E-OPTION."""
    from xopt.pipeline import plain_yaml

    cure = "write one pass a line, with - before it"
    _check_length(text)
    try:
        steps = plain_yaml.load(text)
    except ValueError as error:
        raise InputError("E-PASS", f"the pipeline is not plain YAML ({error})", cure=cure) from error
    if steps is not None and not isinstance(steps, list):
        raise InputError("E-PASS", "the pipeline is not a list of passes", cure=cure)
    return [_from_step(step) for step in steps or ()]


def _from_step(step: object) -> Pass:
    match step:
        case str():
            return registry.create(step, {})
        case dict() if len(step) == 1:
            ((name, options),) = step.items()
            if isinstance(name, str) and isinstance(options or {}, dict):
                return registry.create(name, {str(key): value for key, value in (options or {}).items()})
    cure = "write - name or - name: {option: value}"
    raise InputError("E-PASS", f"{reprlib.repr(step)} is not a pass", cure=cure)
