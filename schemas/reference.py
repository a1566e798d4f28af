"""Write docs/config.md from the schemas: every key of every config."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from schemas.base import Section
from schemas.compare import CompareConfig
from schemas.pretrain import PretrainConfig
from schemas.refine import RefineConfig

HEAD = """\
# Config reference

```
python config.py > docs/config.md     # writes this page, after a change in schemas/
```

Each script reads one JSON file with `--config`. `--set key=value` replaces the value of a key,
`--set section.key=value` that of a key inside an object. The value is JSON; anything else is taken
as a string. Unknown keys are errors. Paths are relative to the current folder, and `~` is the home
folder.

A key marked + is our own: the published repository does not have it. (It has no comparisons, so
their keys are not marked.) In the column "values", `{NAME: ...}` is an object with names that you
choose, and `[...]` is a list. "from" and "to" include the number; "above" and "below" do not.
"""

SCRIPTS: tuple[tuple[str, str, type[Section]], ...] = (
    ("Refinement", "train_flexible_inference.py", RefineConfig),
    ("Pre-training", "train.py", PretrainConfig),
    ("Comparison", "compare.py", CompareConfig),
)


class Key(NamedTuple):
    """One key: its dotted name, its values and its default in words, its description."""

    name: str
    values: str
    default: str
    description: str


def reference() -> str:
    """The whole page as Markdown."""
    return HEAD + "".join(_table(*script) for script in SCRIPTS)


def keys_of(schema: type[Section]) -> list[Key]:
    """Every key of a schema; the keys of a nested object follow the key of that object."""
    whole = schema.model_json_schema()
    return list(_keys(whole, whole["$defs"], ""))


def _table(title: str, script: str, schema: type[Section]) -> str:
    rows = [
        f"| {'+ ' * key.description.startswith('+ ')}`{key.name}` | {key.values} | {key.default} "
        f"| {key.description.removeprefix('+ ')} |\n"
        for key in keys_of(schema)
    ]
    head = "| key | values | default | what it does |\n|---|---|---|---|\n"
    return f"\n## {title}: `{script}`\n\n{head}{''.join(rows)}"


def _keys(section: dict[str, Any], sections: dict[str, Any], prefix: str) -> Iterator[Key]:
    """The keys of an object's JSON schema; `sections` are the schemas that its `$ref`s name."""
    required = section.get("required", ())
    for name, value in section["properties"].items():
        kinds = _kinds(value)
        inner = next((found for found in map(_section_in, kinds) if found), None)
        text = value.get("description", "")
        if inner:
            place, reference_to = inner
            inner_section = sections[reference_to.rpartition("/")[2]]
            text = text or inner_section["description"]
        default = "required" if name in required else _default_in_words(value["default"])
        description = " ".join(text.split()).replace("|", "\\|")
        yield Key(f"{prefix}{name}", _values_in_words(kinds), default, description)
        if inner:
            yield from _keys(inner_section, sections, f"{prefix}{name}{place}.")


def _section_in(kind: dict[str, Any]) -> tuple[str, str] | None:
    """The place of an object with fixed keys in a value ("", "[]" or ".NAME"), and its `$ref`."""
    named = kind.get("patternProperties", {}).values()
    for place, inner in (("", kind), ("[]", kind.get("items", {})), *((".NAME", n) for n in named)):
        if "$ref" in inner:
            return place, inner["$ref"]
    return None


def _default_in_words(default: Any) -> str:
    """A default as JSON; "of its keys" for an object with fixed keys."""
    return "of its keys" if isinstance(default, dict) and default else f"`{json.dumps(default)}`"


def _values_in_words(kinds: list[dict[str, Any]]) -> str:
    """The values of a key that takes any of these kinds."""
    if {"type": "number"} in kinds:  # it takes whole numbers too
        kinds = [kind for kind in kinds if kind != {"type": "integer"}]
    *first, last = (words for kind in kinds for words in _alternatives(kind))
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(kind: dict[str, Any]) -> list[str]:
    """The values of one kind: all values of an enumeration, or one phrase."""
    if "enum" in kind:
        return [f"`{value}`" for value in kind["enum"]]
    if "const" in kind:
        return [f"`{kind['const']}`"]
    if "$ref" in kind:
        return ["object"]
    if kind["type"] == "array":
        return [f"[{_values_in_words(_kinds(kind['items']))}]"]
    if kind["type"] == "object":
        inner = [*kind.get("patternProperties", {}).values(), kind.get("additionalProperties")][0]
        words = _values_in_words(_kinds(inner)) if isinstance(inner, dict) else "any value"
        return [f"{{NAME: {words}}}"]
    plain = {"boolean": "true or false", "string": kind.get("format", "text"), "null": "null",
             "integer": "whole number", "number": "number"}  # fmt: skip
    return [plain[kind["type"]] + _range_in_words(kind)]


def _kinds(value: dict[str, Any]) -> list[dict[str, Any]]:
    return value.get("anyOf", [value])


def _range_in_words(kind: dict[str, Any]) -> str:
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to",
              "exclusiveMaximum": "below", "multipleOf": "in multiples of"}  # fmt: skip
    return "".join(f" {word} {kind[key]:,.10g}" for key, word in limits.items() if key in kind)
