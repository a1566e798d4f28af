"""Read and check JSON configs: those of the published repository, with some keys of our own.

`load_config(path, RefineConfig)` returns a frozen object whose attributes are the JSON's keys. One
`InputError` names all unknown keys, wrong types and impossible values. The schemas are in
`schemas/`; import them, and `InputError`, from here.

python config.py > docs/config.md     # write the reference of all keys
"""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from common.command_line import Option, script_parser
from common.errors import InputError
from common.files import user_path
from schemas.base import (
    Channels,
    ModelOfLambda,
    Positive,
    ScriptConfig,
    Section,
    channels_of_lambda,
)
from schemas.compare import CompareConfig, ComparedMethod, ComparedModel, folder_name
from schemas.pretrain import LearningRate, PretrainConfig
from schemas.refine import (
    DATA_SETS,
    CustomLr,
    DevOptions,
    EarlyStop,
    Optimizer,
    RefineConfig,
    Target,
    no_polish,
)

__all__ = [
    "DATA_SETS",
    "Channels",
    "CompareConfig",
    "ComparedMethod",
    "ComparedModel",
    "CustomLr",
    "DevOptions",
    "EarlyStop",
    "InputError",
    "LearningRate",
    "ModelOfLambda",
    "Optimizer",
    "Positive",
    "PretrainConfig",
    "RefineConfig",
    "Section",
    "Target",
    "channels_of_lambda",
    "folder_name",
    "load_config",
    "no_polish",
    "parse_command_line",
    "read_json_object",
    "resolved",
]

Schema = TypeVar("Schema", bound=BaseModel)
OfScript = TypeVar("OfScript", bound=ScriptConfig)


def load_config(
    path: str | Path,
    schema: type[Schema],
    overrides: Sequence[str] = (),
    source: str | None = None,
) -> Schema:
    """Read and check a JSON config.

    Args:
        overrides: `key.sub=value` strings, applied before the check.
        source: messages begin with it; None: the path and the overrides.

    Raises:
        InputError: there is no such file, it is not JSON, or it does not follow `schema`.
    """
    values = read_json_object(path)
    for override in overrides:
        _apply_override(values, override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem, schema) for problem in error.errors())
        if source is None:
            source = f"{path} with --set {' '.join(overrides)}" if overrides else str(path)
        raise InputError(f"{source}: {problems}") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The one JSON object in a file.

    Raises:
        InputError: there is no such file, it is not JSON or no object, or a key occurs twice.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror}") from None
    try:
        # From bytes it detects the Unicode encoding, with or without a byte order mark.
        values = json.loads(data, object_pairs_hook=_refuse_duplicates)
    except UnicodeDecodeError:
        raise InputError(f"config {path}: not a text file; a JSON object is wanted") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"config {path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"config {path}: holds no JSON object ({{...}})")
    return values


def resolved(config: BaseModel) -> dict[str, Any]:
    """The config with every default filled in, as JSON values that `load_config` reads back."""
    return config.model_dump(mode="json", by_alias=True)


def parse_command_line(
    schema: type[OfScript],
    docstring: str,
    argv: Sequence[str] | None = None,
    options: dict[str, Option] | None = None,
) -> OfScript:
    """The checked config of `--config JSON [--images PATH] [--roi PATH] [--set key.sub=value ...]`.

    `--roi` is only for schemas with `keys_for_regions`; it comes after all others.

    Args:
        docstring: the script's, with examples, see `common.command_line`.
        options: the script's own options, by the names of the config's keys that they set.

    Raises:
        InputError: see `load_config`; or nothing is at a PATH.
        SystemExit: the command line is wrong (code 2), or it asks for `--help` (code 0).
    """
    parser = _config_parser(schema, docstring, options or {})
    arguments = parser.parse_args(argv)
    source = [arguments.config]
    overrides = []
    if arguments.images is not None:
        source.append(f"--images {arguments.images}")
        overrides += _overrides_for_images(schema, arguments.images, arguments.config)
    values = {name: value for name in options or {} if (value := getattr(arguments, name))}
    given = [*arguments.set, *(f"{name}={json.dumps(value)}" for name, value in values.items())]
    if given:
        source.append(f"--set {' '.join(given)}")
    config = load_config(arguments.config, schema, [*overrides, *given], " with ".join(source))
    roi = getattr(arguments, "roi", None)
    if roi is None:
        return config
    source.append(f"--roi {roi}")
    overrides = [*overrides, *given, *_overrides_for_regions(config, roi)]
    return load_config(arguments.config, schema, overrides, " with ".join(source))


def _config_parser(
    schema: type[ScriptConfig], docstring: str, options: dict[str, Option]
) -> argparse.ArgumentParser:
    parser = script_parser(docstring)
    images_help = "your own images, a folder or a file, instead of the config's"
    if "images" in schema.model_fields:
        images_help += "; all are taken, unless the config or a --set has the key images"
    parser.add_argument(
        "--config", required=True, type=user_path, metavar="JSON", help="the config file"
    )
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--images",
        type=user_path,
        metavar="PATH",
        help=images_help,
    )
    if schema.keys_for_regions is not ScriptConfig.keys_for_regions:
        parser.add_argument(
            "--roi",
            type=user_path,
            metavar="PATH",
            help="maps that say where distortion counts more: a folder of grey pictures named as "
            "the images, one for all, or auto: faces, or else what stands out",
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="override one key of the config; VALUE is JSON, or else a string "
        "(a number that is meant as a string needs JSON's quotes)",
    )
    parser.add_argument(
        "--load_json",
        choices=("true", "True"),
        help="accepted for the published command lines; the config is always read",
    )
    for name, (purpose, metavar, excludes_images) in options.items():
        group = exclusive if excludes_images else parser
        if metavar is None:
            group.add_argument(f"--{name}", action="store_true", help=purpose)
        else:
            group.add_argument(f"--{name}", action="append", metavar=metavar, help=purpose)
    return parser


def _overrides_for_images(schema: type[ScriptConfig], images: str, config: str) -> list[str]:
    """The overrides that `--images` stands for.

    Raises:
        InputError: nothing is at that path.
    """
    if not Path(images).exists():
        raise InputError(f"--images {images}: no such file or folder")
    # In a config "sample" means the sample photos; here it is a folder of that name.
    path = f"./{images}" if images == "sample" else images
    values = schema.keys_for_images(path)
    if "images" in schema.model_fields and read_json_object(config).get("images") is None:
        values["images"] = 0
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _overrides_for_regions(config: ScriptConfig, roi: str) -> list[str]:
    """The overrides that `--roi` stands for.

    Raises:
        InputError: nothing is at that path.
    """
    if roi != "auto" and not (roi and Path(roi).exists()):
        raise InputError(
            f"--roi {roi}: no such file or folder; give a folder of maps, one map, or auto"
        )
    values = config.keys_for_regions(roi) or {}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: must read key.sub=value")
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override}: {'.'.join(path[: depth + 1])} holds no keys")
    try:
        values[last] = json.loads(text)
    except ValueError:
        values[last] = text


def _describe(problem: Any, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys(_section(schema, problem["loc"][:-1]))
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if problem["type"] == "model_type":
        keys = ", ".join(_keys(_section(schema, problem["loc"])))
        message = f"should be an object {{...}} with keys of {keys}"
    if problem["type"] == "bool_type":
        message = "should be true or false"
    if problem["type"] == "string_type":
        message = "should be a string (after --set: '\"...\"' with both quotes)"
    if problem["loc"] == ("save_name",) and problem["type"] == "string_pattern_mismatch":
        message = "should be a name, or names joined by /, of letters, digits, blank, . _ and -"
    return f"{key} = {json.dumps(problem['input'], default=str)}: {message}"


def _section(schema: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel]:
    """The schema of the JSON object at `loc`, a path of keys."""
    for part in loc:
        fields = {field.alias or name: field for name, field in schema.model_fields.items()}
        if part in fields:
            annotation = fields[part].annotation
            kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
            schema = next((kind for kind in kinds if issubclass(kind, BaseModel)), schema)
    return schema


def _keys(schema: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in schema.model_fields.items()]


if __name__ == "__main__":
    from schemas.reference import reference

    sys.stdout.write(reference())
