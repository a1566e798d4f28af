"""The processes of one job: they meet, exchange values, share work, and stop together."""

import atexit
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from common.errors import InputError

# Seconds that a process waits for the others. torchrun starts them all, but some may import slowly.
# Without torchrun, WORLD_SIZE may be left over from another job.
TORCHRUN_SECONDS, MEETING_SECONDS = 600, 30
# Later on, ranks may reach a collective hours apart.
COLLECTIVE_TIMEOUT = timedelta(days=7)
AGREEMENT_SECONDS = 1.0  # between two agreements of `StopSignal`
REMEDY = "start all with torchrun, or for one process alone `unset WORLD_SIZE`"

Item = TypeVar("Item")


class Ranks(NamedTuple):
    """This process's rank, the number of processes, the rank on this machine; alone (0, 1, 0)."""

    rank: int
    world: int
    local: int


# --- meeting --------------------------------------------------------------------------------------


def join_ranks(device: str = "cpu", patience: float | None = None) -> Ranks:
    """Meet the other processes if torchrun, or another launcher, started several.

    Objects are sent through gloo, tensors on GPUs through nccl.

    Args:
        device: the config's; "cpu" means that no GPU will be used.
        patience: seconds to wait for the others. None: ten minutes under torchrun, else 30 s.

    Raises:
        InputError: the launcher's environment variables are wrong, or the others do not start.
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
        # Without this its threads sometimes abort a process that is ending.
        atexit.register(distributed.destroy_process_group)
    return ranks


def ranks_from_environment() -> Ranks:
    """This process's ranks by torchrun's environment variables; alone without WORLD_SIZE, or at 1.

    Raises:
        InputError: a variable is missing, no number or out of range.
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
    """How many processes of this job run on this machine; 1 where torchrun does not say.

    Raises:
        InputError: WORLD_SIZE or LOCAL_WORLD_SIZE is no number, or out of range.
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
    """The number in an environment variable.

    Raises:
        ValueError: it is not set, no number or out of range.
    """
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
    except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be a host name
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{_asks_for(world)}, but MASTER_ADDR = {address!r} is no known host ({reason}); "
            f"{REMEDY}"
        ) from None


def _meet(ranks: Ranks, backend: str, patience: float) -> None:
    place = f"MASTER_ADDR = {os.environ['MASTER_ADDR']}, MASTER_PORT = {os.environ['MASTER_PORT']}"
    others = f"the other {ranks.world - 1} of WORLD_SIZE = {ranks.world} processes"
    # In a thread: torch does not keep its timeout everywhere, and uses it for collectives as well.
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
    """Run `action` in a thread that ends with the process; the future has its result or error."""
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome


# --- exchanging values ----------------------------------------------------------------------------


def first_rank_does(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 only; every rank waits for it and returns its result.

    Raises:
        Exception: what `action` raised, on every rank.
        RuntimeError: on the other ranks, where the error of `action` cannot be pickled; names it.
        ConnectionError: another process has ended.
    """
    if ranks.world == 1:
        return action()
    value, failure, message = None, None, b""
    if ranks.rank == 0:
        try:
            value = action()
            message = pickle.dumps((value, None))
        except BaseException as error:  # an interrupt too, or the others would wait for ever
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
    """(None, error) pickled; a RuntimeError with its text where the error cannot be pickled."""
    try:
        message = pickle.dumps((None, error))
        pickle.loads(message)  # some can be pickled but not unpickled
    except Exception:
        stand_in = RuntimeError(f"rank 0 failed, {type(error).__name__}: {error}")
        return pickle.dumps((None, stand_in))
    return message


def gather(ranks: Ranks, value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks; every rank must call this.

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
    """Around a collective: it fails if a process has ended; then raise ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"rank {ranks.rank} ends because another of the {ranks.world} processes has ended, "
            f"whose own last lines say why ({reason})"
        ) from error


# --- sharing work ---------------------------------------------------------------------------------


def shares(ranks: Ranks, items: Sequence[Item], at_once: int, key: str) -> Iterator[Sequence[Item]]:
    """Take runs of consecutive items from a list that all processes share.

    A process that asks for a run gets the next one that nobody has taken. So no process is idle
    while there is work, however long an item takes. A process alone takes the whole list at once.
    The first process may host the count, so no process must end before all are done (`gather`).

    Args:
        items: the list, the same on all ranks.
        at_once: the length of a run; less if there would be fewer runs than processes. Which items
            make up a run does not depend on who takes it.
        key: a name for this list, the same on all ranks, that no other list of the job has.

    Raises:
        ConnectionError: the process that counts the runs has ended.
    """
    if ranks.world == 1:
        yield items
        return
    length = min(at_once, -(-len(items) // ranks.world))
    store = _store()
    for _ in range(len(items)):
        with _while_all_live(ranks):
            start = length * (store.add(key, 1) - 1)
        if start >= len(items):
            return
        yield items[start : start + length]


def _store() -> distributed.Store:
    """The key-value store where the processes met; torchrun or the first process hosts it."""
    group = distributed.group.WORLD
    if group is None:
        raise ValueError("the processes have not met: see `join_ranks`")
    return group.get_group_store()


# --- stopping together ----------------------------------------------------------------------------


class StopSignal:
    """Inside its block SIGINT and SIGTERM only ask for a stop; a second signal acts as usual."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._asked = False
        self._previous_handlers: dict[int, Any] = {}
        # Calls of `agreed` from one agreement to the next, and how many of them are left.
        self._interval = self._calls_left = 1
        self._agreed_at = time.perf_counter()

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self._asked = True
        self.__exit__()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all ranks.

        Every rank must call this equally often. About once a second the ranks exchange values. At
        each exchange they agree on the number of calls until the next.

        Raises:
            ConnectionError: another process has ended.
        """
        if self.ranks.world == 1:
            return self._asked
        self._calls_left -= 1
        return self._calls_left == 0 and self._agree()

    def _agree(self) -> bool:
        seconds = max(time.perf_counter() - self._agreed_at, 1e-9)
        # At most twice as many calls as before, for one fast interval says little about the next.
        calls = min(int(self._interval * AGREEMENT_SECONDS / seconds), 2 * self._interval)
        # Clocks differ between ranks, so the smallest number of calls counts.
        message = torch.tensor([int(self._asked), -max(calls, 1)])
        with _while_all_live(self.ranks):
            distributed.all_reduce(message, distributed.ReduceOp.MAX)
        asked, calls = message.tolist()
        self._interval = self._calls_left = -calls
        self._agreed_at = time.perf_counter()
        return bool(asked)
