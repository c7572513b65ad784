"""YAML with nothing in it that grows when it is read: no aliases, deep nesting or giant numbers; and no key twice."""

from __future__ import annotations

from typing import Any

import yaml

DEEPEST = 8
"""Lists and mappings in each other; the deepest that has a meaning, an option that is a list, is four."""
_INTEGER_BITS = 1024
"""More than any option takes, and few enough to be printed: Python refuses thousands of digits."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader (no objects of any class), bounded."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases are not allowed", event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refusal("it is nested too deeply", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _refusal(f"{key.value[:50]!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        mapping: dict[object, object] = super().construct_mapping(node, deep=deep)
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = int(super().construct_yaml_int(node))
        if number.bit_length() > _INTEGER_BITS:
            raise _refusal("an integer of hundreds of digits", node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load(text: str) -> object:
    """The lists, mappings, words and numbers of a YAML text.

    Raises:
        ValueError: it is no YAML, or not so plain; the message says where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1} column {mark.column + 1}"
        raise ValueError(f"{error.problem or error.context}{place}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (OverflowError, TypeError, AttributeError, IndexError, KeyError) as error:  # a date or number that cannot be
        raise ValueError(f"a value cannot be read: {error}") from error


def _refusal(problem: str, mark: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
