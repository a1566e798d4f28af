"""Read the weights of one network from a file, as a flat dictionary of tensors.

Files of torch.save, old and new, and of safetensors can be read. Other objects beside the weights
(the arguments of a run, a numpy loss) are not built: see `inert_pickle`.
"""

import logging
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import InputError

# isort: split
import safetensors.torch
import torch
from torch import Tensor

from common import inert_pickle
from common.inert_pickle import Inert

log = logging.getLogger("refine")

SAVE_ALONE = "save its weights alone: torch.save(model.state_dict(), FILE)"

Table = tuple[tuple[str, ...], dict]  # the keys that lead to a dictionary, and the dictionary

# Modules that wrap another: torch.compile, DataParallel, DistributedDataParallel, FSDP,
# activation checkpoints, DeepSpeed.
WRAPPERS = frozenset((
    "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
))  # fmt: skip

# Names of weights that are averages over the steps of a training.
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow|teacher)(?![a-z])", re.IGNORECASE)

HEAD = 32  # the bytes by which kinds of files are recognised
LEGACY_MARK = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # of torch.save before 1.6
SAFETENSORS_HEADER_MAX = 100_000_000  # bytes, the limit of safetensors
OTHER_FILES = {
    b"version https://git-lfs": "only Git LFS's pointer to the file; git lfs pull fetches it",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\x89HDF": "an HDF5 file; one of torch.save or safetensors is wanted",
    b"<": "a web page or XML; download the file itself",
}


# --- the file -------------------------------------------------------------------------------------


def read_checkpoint(source: str | Path) -> Any:
    """Read a file of torch.save or safetensors to the CPU; no code in it is run.

    Tensors and plain values are as saved. Objects of other classes become `Inert`.

    Raises:
        InputError: there is no such file, it is damaged, or it is of another kind.
    """
    path = Path(source)
    if not path.is_file():
        problem = "is a folder; a checkpoint file is wanted" if path.is_dir() else "no such file"
        raise _refusal(source, f"{problem} (looked from {Path.cwd()})")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise _refusal(source, f"cannot be read ({error.strerror})") from None
    try:
        return _read_safetensors(path) if _is_safetensors(path, head) else _read_torch(path)
    except Exception as error:  # broken bytes make the readers raise any kind
        raise _refusal(source, _why_unreadable(path, head, error)) from None


def _refusal(source: str | Path, problem: str) -> InputError:
    """The error in one line, also where names in the file hold line ends."""
    return InputError(f"pretrain {source}: {' '.join(problem.split())}")


def _is_safetensors(path: Path, head: bytes) -> bool:
    """By content: the length of a JSON object, then its bracket; a cut-off file by its suffix."""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= SAFETENSORS_HEADER_MAX:
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path, device="cpu")


def _read_torch(path: Path) -> Any:
    """By torch's own safe reader; by `inert_pickle` if that meets a class it does not know."""
    # As an open file, for torch derives the format from a path's suffix.
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            file.seek(0)
            # With `weights_only` torch would use its own reader; `inert_pickle` is as safe.
            return torch.load(
                file, map_location="cpu", weights_only=False, pickle_module=inert_pickle
            )


def _why_unreadable(path: Path, head: bytes, error: Exception) -> str:
    """The reason why a file could not be read, in one line."""
    if not head:
        return "is empty (0 bytes)"
    for start, kind in OTHER_FILES.items():
        if head.startswith(start):
            return f"is {kind}"
    if kind := _kind_of_archive(path):
        return f"is {kind}"
    if head.startswith(b"\x80") and len(head) == HEAD and LEGACY_MARK not in head:
        return f"is a plain pickle, not written by torch.save; {SAVE_ALONE}"
    format_ = "safetensors" if isinstance(error, safetensors.SafetensorError) else "torch.save"
    reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
    return f"truncated or damaged, or no file of {format_} ({reason})"


def _kind_of_archive(path: Path) -> str:
    """The kind of an archive that torch.save did not write; "" for torch.save's, or no archive."""
    if tarfile.is_tarfile(path):
        return "a tar archive; unpack it first, or save the weights again by a newer torch"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # no archive, or a damaged one
        return ""
    if any(name.endswith("/constants.pkl") for name in names):
        return f"a TorchScript archive, which holds code; {SAVE_ALONE}"
    if not any(name.endswith("data.pkl") for name in names):
        return f"a zip archive, but not torch.save's (it holds {', '.join(names[:3])})"
    return ""


# --- the weights in it ----------------------------------------------------------------------------


def find_state_dict(checkpoint: object, source: str, module: str) -> dict[str, Tensor]:
    """Find the weights of the network that has a submodule `module` in a checkpoint.

    They may lie in nested dictionaries and lists. Any prefix of their names (`model.`,
    `module._orig_mod.`) is cut off, and wrappers inside the names are cut out. Weights of other
    networks are left out. Averaged weights are taken only if there are no others.

    Args:
        source: where the checkpoint is from; messages begin with it.
        module: the first part of the wanted names, `g_a` for `g_a.0.weight`.

    Returns:
        Tensors by name. Without such a network: the largest dictionary of tensors, as it is.

    Raises:
        InputError: there are no tensors, or there are several such networks that differ.
    """
    tables = list(_dictionaries_in(checkpoint))
    networks = _networks_in(tables, module)
    if not networks:
        return _other_weights(checkpoint, tables, source)
    weights = _choose(networks, source)
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, Inert):
            raise _refusal(source, f"{name} is no tensor, but of {value.name}; {SAVE_ALONE}")
        tensors[name] = value
    return tensors


def _dictionaries_in(checkpoint: object) -> Iterator[Table]:
    """Every dictionary and the keys that lead to it, outer ones first; not inside optimizers."""
    seen = set()  # a dictionary can be saved twice, or inside itself
    queue: deque[tuple[tuple[str, ...], object]] = deque([((), checkpoint)])
    while queue:
        place, value = queue.popleft()
        if id(value) in seen or not isinstance(value, dict | list | tuple):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            yield place, value
            if "param_groups" in value:
                continue
        children = value.items() if isinstance(value, dict) else enumerate(value)
        queue.extend(((*place, str(key)), child) for key, child in children)


def _networks_in(tables: list[Table], module: str) -> dict[str, dict[str, Tensor | Inert]]:
    """The weights of every network with this submodule, by their place in the checkpoint."""
    networks = {}
    for place, table in tables:
        prefixes = _prefixes_of(table, module)
        for prefix in sorted(prefixes):
            name = " > ".join((*place, f"{prefix}*"))
            networks[name] = _weights_below(table, prefix, prefixes - {prefix})
    return networks


def _prefixes_of(table: dict, module: str) -> set[str]:
    """What stands before `module` in the names of a dictionary's weights."""
    prefixes = set()
    for key, value in table.items():
        if isinstance(key, str) and isinstance(value, Tensor | Inert):
            before, found, _ = f".{key}".partition(f".{module}.")
            if found:
                prefixes.add(f"{before}."[1:])
    return prefixes


def _weights_below(table: dict, prefix: str, other_networks: set[str]) -> dict[str, Tensor | Inert]:
    """The weights whose names begin with `prefix`, without it and without wrappers.

    A name without a dot is left out: it is a loss or a count, not a weight of a submodule.
    """
    inner = tuple(other for other in other_networks if other.startswith(prefix))
    found = {}
    for key, value in table.items():
        if not isinstance(key, str) or not isinstance(value, Tensor | Inert):
            continue
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and not key.startswith(inner) and "." in name:
            found[".".join(part for part in name.split(".") if part not in WRAPPERS)] = value
    return found


def _choose(networks: dict[str, dict], source: str) -> dict[str, Tensor | Inert]:
    """The only network; of several, the one whose weights are not averaged.

    Raises:
        InputError: several are not averaged, and they differ.
    """
    kept = [place for place in networks if not AVERAGED.search(place)] or list(networks)
    chosen = networks[kept[0]]
    if not all(_same(chosen, networks[place]) for place in kept[1:]):
        places = " and ".join(kept)
        raise _refusal(source, f"holds {len(kept)} models, {places}; of one, {SAVE_ALONE}")
    averaged = [place for place in networks if place not in kept]
    if averaged:
        log.warning(
            "pretrain %s: holds several models; takes the weights %s, not the averaged %s",
            source, kept[0], " and ".join(averaged),
        )  # fmt: skip
    return chosen


def _same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        value is second[name]
        or (
            isinstance(value, Tensor)
            and isinstance(second[name], Tensor)
            and value.layout == second[name].layout == torch.strided
            and value.dtype == second[name].dtype
            and torch.equal(value, second[name])
        )
        for name, value in first.items()
    )


def _other_weights(checkpoint: object, tables: list[Table], source: str) -> dict[str, Tensor]:
    """The largest dictionary of tensors.

    Raises:
        InputError: there is none; says what the checkpoint holds instead.
    """
    others = [
        {str(key): value for key, value in table.items() if isinstance(value, Tensor)}
        for _, table in tables
    ]
    largest = max(others, key=len, default={})
    objects = [table for _, table in tables if isinstance(table, Inert)]
    pickled = [thing.name for thing in objects if thing.is_network]
    if pickled and not any("." in name for name in largest):
        problem = f"holds a whole pickled model ({pickled[0]}), not weights; {SAVE_ALONE}"
    elif largest:
        return largest
    elif any("param_groups" in table for _, table in tables):
        problem = "holds an optimizer's state, but no weights of a model"
    elif objects:
        names = ", ".join(sorted({thing.name for thing in objects})[:4])
        problem = f"holds no tensors, but objects that are not loaded ({names}); {SAVE_ALONE}"
    elif isinstance(checkpoint, dict):
        names = ", ".join(str(key) for key in list(checkpoint)[:4])
        problem = f"holds no state dict of a model ({names or 'it is empty'})"
    else:
        problem = f"holds no state dict of a model, but a {type(checkpoint).__name__}"
    raise _refusal(source, problem)
