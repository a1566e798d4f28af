"""The processes of one job: how they meet, what they tell each other, how they stop together."""

import atexit
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import distributed

from common.errors import InputError

# How long a process waits for the others to start. torchrun has started them all: some may only be
# slow to import. Without it WORLD_SIZE may be what another job left behind.
TORCHRUN_SECONDS, MEETING_SECONDS = 600, 30
# Afterwards ranks finish hours apart.
COLLECTIVE_TIMEOUT = timedelta(days=7)
AGREEMENT_SECONDS = 1.0
REMEDY = "start all with torchrun, or for one process alone `unset WORLD_SIZE`"


class Ranks(NamedTuple):
    """This process among those that torchrun started; (0, 1, 0) alone."""

    rank: int
    world: int
    local: int


# --- meeting --------------------------------------------------------------------------------------


def join_ranks(device: str = "cpu", patience: float | None = None) -> Ranks:
    """Meet the other processes if torchrun, or another launcher, started several.

    Small objects travel through gloo; tensors on GPUs, if `device` may be one, through nccl.

    Args:
        patience: seconds to wait for the others; None is ten minutes under torchrun, else 30 s.

    Raises:
        InputError: the launcher's environment variables are wrong, or the others do not come.
    """
    ranks = ranks_from_environment()
    if ranks.world > 1 and not distributed.is_initialized():
        on_gpus = device != "cpu" and torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        _refuse_unknown_host(ranks.world)
        if patience is None:
            patience = (
                TORCHRUN_SECONDS if distributed.is_torchelastic_launched() else MEETING_SECONDS
            )
        _meet(ranks, backend, patience)
        # Left to the interpreter's end, its threads sometimes abort a process that has finished.
        atexit.register(distributed.destroy_process_group)
    return ranks


def ranks_from_environment() -> Ranks:
    """Who this process is, by torchrun's variables; without WORLD_SIZE, or at 1, no other counts.

    Raises:
        InputError: one of them is missing, no number or out of range.
    """
    world = _world_size()
    if world == 1:
        return Ranks(0, 1, 0)
    numbers, problems = {}, []
    limits = {"RANK": (0, world - 1), "LOCAL_RANK": (0, world - 1), "MASTER_PORT": (1, 2**16 - 1)}
    if "LOCAL_WORLD_SIZE" in os.environ:
        limits["LOCAL_WORLD_SIZE"] = (1, world)
    for name, (least, most) in limits.items():
        try:
            numbers[name] = _number(name, least, most)
        except ValueError as problem:
            problems.append(str(problem))
    if not os.environ.get("MASTER_ADDR"):
        problems.append("MASTER_ADDR is not set")
    if problems:
        raise InputError(f"{_asks_for(world)}, but {', '.join(problems)}; {REMEDY}")
    return Ranks(numbers["RANK"], world, numbers["LOCAL_RANK"])


def processes_here() -> int:
    """How many processes of this job torchrun started on this machine; 1 where it did not say.

    Raises:
        InputError: WORLD_SIZE is wrong, or LOCAL_WORLD_SIZE beside it.
    """
    world = _world_size()
    if world == 1 or "LOCAL_WORLD_SIZE" not in os.environ:
        return 1
    try:
        return _number("LOCAL_WORLD_SIZE", 1, world)
    except ValueError as problem:
        raise InputError(f"{_asks_for(world)}, but {problem}; {REMEDY}") from None


def _world_size() -> int:
    if not os.environ.get("WORLD_SIZE"):
        return 1
    try:
        return _number("WORLD_SIZE", 1, None)
    except ValueError as problem:
        raise InputError(f"{problem}; {REMEDY}") from None


def _asks_for(world: int) -> str:
    return f"WORLD_SIZE = {world} asks for {world} processes"


def _number(name: str, least: int, most: int | None) -> int:
    """An environment variable's value; a ValueError says what is wrong with it."""
    text = os.environ.get(name)
    if not text:
        raise ValueError(f"{name} is not set")
    right = f"{least} or more" if most is None else f"{least} to {most}"
    if not re.fullmatch(r"\s*[+-]?\d+\s*", text):
        raise ValueError(f"{name} = {text!r} is no number ({right})")
    if int(text) < least or (most is not None and int(text) > most):
        raise ValueError(f"{name} = {text.strip()} must be {right}")
    return int(text)


def _refuse_unknown_host(world: int) -> None:
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:  # the latter: no name can be so
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{_asks_for(world)}, but MASTER_ADDR = {address!r} is no known host ({reason}); "
            f"{REMEDY}"
        ) from None


def _meet(ranks: Ranks, backend: str, patience: float) -> None:
    place = f"MASTER_ADDR = {os.environ['MASTER_ADDR']}, MASTER_PORT = {os.environ['MASTER_PORT']}"
    others = f"the other {ranks.world - 1} of WORLD_SIZE = {ranks.world} processes"
    # In a thread, for torch's own timeout is not kept everywhere, nor is there another for later.
    meeting = _in_background(
        partial(distributed.init_process_group, backend, timeout=COLLECTIVE_TIMEOUT)
    )
    try:
        meeting.result(patience)
    except TimeoutError:
        raise InputError(
            f"waited {patience:g} s for {others} at {place}, in vain; {REMEDY}"
        ) from None
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise InputError(
                f"MASTER_PORT = {os.environ['MASTER_PORT']} is taken by another program; choose "
                f"another port, or {REMEDY}"
            ) from None
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot meet {others} at {place} ({reason}); {REMEDY}") from None


def _in_background(action: Callable[[], Any]) -> Future:
    """What `action` gives or raises, in a thread that ends with the process."""
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome


# --- telling each other ---------------------------------------------------------------------------


def first_rank_does(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, on every rank; the others wait for it.

    Raises:
        Whatever `action` raised, on every rank; a RuntimeError that names it, on the others, where
        it cannot travel. ConnectionError: another process has ended.
    """
    if ranks.world == 1:
        return action()
    value, failure, message = None, None, b""
    if ranks.rank == 0:
        try:
            value = action()
            message = pickle.dumps((value, None))
        except BaseException as error:  # an interrupt too: nobody may wait for what never comes
            failure, message = error, _pickled(error)
    outcome = [message]
    with _while_all_live(ranks):
        distributed.broadcast_object_list(outcome)
    if ranks.rank:
        value, failure = pickle.loads(outcome[0])
    if failure is not None:
        raise failure
    return value


def _pickled(error: BaseException) -> bytes:
    """(None, error), or in its place a RuntimeError with its type and text."""
    try:
        message = pickle.dumps((None, error))
        pickle.loads(message)  # some can be written and not read
    except Exception:
        stand_in = RuntimeError(f"rank 0 failed, {type(error).__name__}: {error}")
        return pickle.dumps((None, stand_in))
    return message


def gather(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's value, on every rank, in the order of ranks.

    Raises:
        ConnectionError: another process has ended.
    """
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    with _while_all_live(ranks):
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def _while_all_live(ranks: Ranks) -> Iterator[None]:
    """Around a collective, which fails where a process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"rank {ranks.rank} ends because another of the {ranks.world} processes has ended, "
            f"whose own last lines say why ({reason})"
        ) from error


# --- stopping together ----------------------------------------------------------------------------


class StopSignal:
    """While it is open, SIGINT and SIGTERM only ask for a stop; a second one acts as usual."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._asked = False
        self._usual: dict[int, Any] = {}
        # Calls of `agreed` between the last agreement and the next, and how many are left.
        self._stretch = self._left = 1
        self._since = time.perf_counter()

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
        """Whether any rank was asked; the same answer on all, who must all call this as often.

        The ranks talk about once a second, at calls that they have agreed on before.

        Raises:
            ConnectionError: another process has ended.
        """
        if self.ranks.world == 1:
            return self._asked
        self._left -= 1
        return self._left == 0 and self._agree()

    def _agree(self) -> bool:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        # At most twice as many calls as before: one quick stretch says little of the next.
        calls = min(int(self._stretch * AGREEMENT_SECONDS / seconds), 2 * self._stretch)
        # Clocks differ between ranks: the fewest calls count.
        message = torch.tensor([int(self._asked), -max(calls, 1)])
        with _while_all_live(self.ranks):
            distributed.all_reduce(message, distributed.ReduceOp.MAX)
        asked, calls = message.tolist()
        self._stretch = self._left = -calls
        self._since = time.perf_counter()
        return bool(asked)
