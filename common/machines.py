"""Processes on several machines must have the same input and see the same folder."""

import hashlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from common.errors import InputError
from common.processes import Ranks, first_rank_does, gather


def host_names(ranks: Ranks) -> list[str]:
    """The name of each rank's machine; every rank must call this.

    Raises:
        ConnectionError: another process has ended.
    """
    return gather(ranks, socket.gethostname())


def log_file(folder: Path, ranks: Ranks, hosts: Sequence[str]) -> Path:
    """The file in which a rank logs: log.txt, or log.MACHINE.txt if it is not on rank 0's machine.

    Several processes of a machine append whole lines to a file, but several machines may not.
    """
    host = hosts[ranks.rank]
    return folder / ("log.txt" if host == hosts[0] else f"log.{host}.txt")


def refuse_other_input(ranks: Ranks, hosts: Sequence[str], inputs: Mapping[str, object]) -> None:
    """Refuse to go on if a process does not have the input of the first; every rank must call this.

    Args:
        hosts: of `host_names`.
        inputs: what must be equal, by its name for messages. `repr` of equal values is equal.

    Raises:
        InputError: the input of a process differs. All ranks raise it.
        ConnectionError: another process has ended.
    """
    first, *others = gather(ranks, {name: _digest(value) for name, value in inputs.items()})
    for rank, digests in enumerate(others, start=1):
        different = [name for name in inputs if digests[name] != first[name]]
        if different:
            raise InputError(
                f"{_place(rank, hosts)} has another {' and '.join(different)} than "
                f"{_place(0, hosts)}; all processes need the same"
            )


def refuse_other_folder(ranks: Ranks, hosts: Sequence[str], folder: Path) -> None:
    """Refuse to go on if `folder` is not one folder for all processes; every rank must call this.

    Args:
        hosts: of `host_names`.
        folder: it exists on the first rank, which writes a file there and deletes it.

    Raises:
        InputError: a process does not see that file. All ranks raise it.
        OSError: the file cannot be written.
        ConnectionError: another process has ended.
    """
    if ranks.world == 1:
        return
    # A new name: a network file system may remember that an old one was not there.
    probe = folder / first_rank_does(ranks, lambda: _touch(folder / f".{uuid4().hex}.tmp"))
    seen = gather(ranks, (_is_there(probe), str(folder)))
    if ranks.rank == 0:
        probe.unlink()
    for rank, (is_there, path) in enumerate(seen):
        if not is_there:
            raise InputError(
                f"{path} on {_place(rank, hosts)} is not the folder of {_place(0, hosts)}; all "
                "machines need one common folder for results (output_dir)"
            )


def _place(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} ({hosts[rank]})"


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode(errors="surrogateescape")).hexdigest()


def _touch(path: Path) -> str:
    path.touch()
    return path.name


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True
