"""Checks before a run is resumed in a folder that has results already."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import InputError
from common.records import Record

ANOTHER_RUN = "choose another save_name, or delete the folder"


@contextmanager
def config_file_of(folder: Path) -> Iterator[Path]:
    """The config.json that results in a folder were made with; what it raises says what to do.

    Raises:
        InputError: there is no such file, or reading it raises one.
    """
    stored = folder / "config.json"
    if not stored.is_file():
        raise InputError(f"{folder}: has results but no config.json; {ANOTHER_RUN}")
    try:
        yield stored
    except InputError as error:
        raise InputError(f"{error}; {ANOTHER_RUN}") from None


def refuse_another_config(
    folder: Path, before: Record, now: Record, free_keys: frozenset[str]
) -> None:
    """Refuse to resume a run with another config than the one that made its results.

    Args:
        before, now: both configs as JSON values with every default filled in.
        free_keys: the keys that may differ.

    Raises:
        InputError: another key differs.
    """
    changed = differences(before, now, free_keys)
    if changed:
        raise InputError(
            f"{folder}: cannot resume, its config differs in {', '.join(changed)}; {ANOTHER_RUN}"
        )


def differences(
    before: Record, now: Record, free_keys: frozenset[str], prefix: str = ""
) -> list[str]:
    """The keys whose values differ, with both values; also keys of nested objects.

    Args:
        free_keys: the keys that may differ, dotted if nested.
    """
    found = []
    for key in sorted(before.keys() | now.keys()):
        if f"{prefix}{key}" in free_keys:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, free_keys, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} ({old!r} then, {new!r} now)")
    return found


def stored_precision(folder: Path, results: str) -> str | None:
    """The precision that the results in a folder were computed in; None if there are none.

    Args:
        results: the pattern of the results' files.
    """
    if not any(file.stat().st_size for file in folder.glob(results)):
        return None
    with suppress(OSError, ValueError):  # whoever reads the file next says what is wrong
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("precision")
        return stored if stored in ("float32", "bfloat16") else None
    return None


def remove_leftovers(folder: Path, patterns: Sequence[str] = ("*",)) -> None:
    """Delete temporary files that a killed `write_whole` left behind.

    Args:
        patterns: where to look, relative to `folder`, as `Path.glob` takes them.

    Raises:
        OSError: a file cannot be deleted.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.name.startswith(".") and ".tmp" in path.suffixes:
                path.unlink()
