"""The processes of one job: how they meet, what they tell each other, how they stop together."""

import atexit
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed

from config import InputError


class Ranks(NamedTuple):
    """This process among those that torchrun started; (0, 1, 0) alone."""

    rank: int
    world: int
    local: int


def join_ranks(device: str = "cpu") -> Ranks:
    """Meet the other processes if torchrun started this one.

    Small objects travel through gloo; tensors on GPUs, if `device` may be one, through nccl.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(0, 1, 0)
    if not distributed.is_initialized():
        on_gpus = device != "cpu" and torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        # Ranks finish hours apart.
        distributed.init_process_group(backend, timeout=timedelta(days=7))
        # Left to the interpreter's end, its threads sometimes abort a process that has finished.
        atexit.register(distributed.destroy_process_group)
    return Ranks(distributed.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))


def first_rank_does(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, on every rank; the others wait for it.

    Raises:
        InputError, OSError: what `action` raised, on every rank.
    """
    outcome: list[Any] = [None]
    if ranks.rank == 0:
        try:
            outcome = [action()]
        except (InputError, OSError) as error:
            outcome = [error]
    if ranks.world > 1:
        distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def gather(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's value, on every rank, in the order of ranks."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    distributed.all_gather_object(values, value)
    return values


class StopSignal:
    """While it is open, SIGINT and SIGTERM only ask for a stop; a second one acts as usual."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._asked = False
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True
        self.__exit__()

    def agreed(self) -> bool:
        """Whether any rank was asked; the same answer on all, who must all ask this."""
        if self.ranks.world == 1:
            return self._asked
        asked = torch.tensor(int(self._asked))
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked)
