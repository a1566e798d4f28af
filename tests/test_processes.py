"""Real processes that a plain launcher starts: meeting, failing and stopping, together."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from forks import ROOT, ends_of, free_port, launch

from common.errors import InputError
from common.processes import Ranks, StopSignal, first_rank_does, join_ranks, processes_here

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
       "MASTER_PORT": "29500"}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets a launcher's variables, and none but these."""

    def set_only(**variables):
        for name in (*TWO, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_only


# --- meeting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is no number (1 or more)"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0 must be 1 or more"),
        ({"WORLD_SIZE": "-3"}, "WORLD_SIZE = -3 must be 1 or more"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE = '1.5' is no number"),
        ({"WORLD_SIZE": "--2"}, "WORLD_SIZE = '--2' is no number"),
        ({"RANK": None}, "WORLD_SIZE = 2 asks for 2 processes, but RANK is not set"),
        ({"RANK": "first"}, "RANK = 'first' is no number (0 to 1)"),
        ({"RANK": "2"}, "RANK = 2 must be 0 to 1"),
        ({"RANK": "-1"}, "RANK = -1 must be 0 to 1"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK = 5 must be 0 to 1"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR = 'nowhere.invalid' is no known host"),
        ({"MASTER_ADDR": "a..b"}, "MASTER_ADDR = 'a..b' is no known host"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http' is no number (1 to 65535)"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT = 70000 must be 1 to 65535"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE = 3 must be 1 to 2"),
        ({"RANK": None, "MASTER_PORT": "x"}, "RANK is not set, MASTER_PORT = 'x' is no number"),
    ],
)
def test_wrong_variables_of_a_launcher_are_one_line(environment, changed, wrong):
    environment(**{**TWO, **changed})
    with pytest.raises(InputError) as raised:
        join_ranks()
    line = str(raised.value)
    assert wrong in line
    assert "torchrun" in line
    assert "`unset WORLD_SIZE`" in line
    assert "\n" not in line


@pytest.mark.parametrize("world", [None, "", "1"])
def test_what_another_job_left_behind_moves_no_process_that_is_alone(environment, world):
    left = {"RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "x",
            "LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "3",
            "OMPI_COMM_WORLD_SIZE": "8"}  # fmt: skip
    environment(WORLD_SIZE=world, **left)
    assert join_ranks() == Ranks(rank=0, world=1, local=0)
    assert processes_here() == 1


def test_processes_of_this_machine_are_those_that_the_launcher_says(environment):
    environment(**TWO, LOCAL_WORLD_SIZE="2")
    assert processes_here() == 2
    environment(**TWO)
    assert processes_here() == 1
    for wrong in ("0", "3", "many"):
        environment(**TWO, LOCAL_WORLD_SIZE=wrong)
        with pytest.raises(InputError, match="LOCAL_WORLD_SIZE = "):
            processes_here()


def test_a_port_that_is_taken_is_one_line(environment):
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        environment(**{**TWO, "MASTER_PORT": port})
        with pytest.raises(InputError, match=f"^MASTER_PORT = {port} is taken by another program"):
            join_ranks()


def test_a_process_whose_others_never_come_says_so_and_ends():
    """Rank 0, where they should meet, rank 1, that finds no one, and one that a stranger heeds."""
    script = """
        import sys
        from common import processes
        from common.errors import exits_with_one_line
        sys.exit(exits_with_one_line(lambda argv: processes.join_ranks(patience=2))())
    """
    with socket.create_server(("", 0)) as stranger:  # it takes connections, and never answers
        ports = (free_port(), free_port(), stranger.getsockname()[1])
        alone = [launch(script, rank, 4, port) for rank, port in zip((0, 1, 1), ports, strict=True)]
        ends = ends_of(alone)
    for port, (code, _, error) in zip(ports, ends, strict=True):
        assert code == 2
        (line,) = error.splitlines()
        assert line.startswith("error: waited 2 s for the other 3 of WORLD_SIZE = 4 processes at ")
        assert f"MASTER_ADDR = localhost, MASTER_PORT = {port}, in vain" in line


def test_processes_of_torchrun_meet(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "from common.processes import gather, join_ranks, processes_here\n"
        "ranks = join_ranks()\n"
        "print(gather(ranks, (ranks.rank, ranks.local, processes_here())), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[(0, 0, 2), (1, 1, 2)]" in done.stdout


# --- failing --------------------------------------------------------------------------------------


def test_alone_the_action_s_own_error_is_raised():
    error = ValueError("mine")

    def fail():
        raise error

    with pytest.raises(ValueError, match="mine") as raised:
        first_rank_does(Ranks(0, 1, 0), fail)
    assert raised.value is error


def test_whatever_the_first_rank_raises_reaches_all():
    """Also what cannot be pickled, cannot be read again, or ends the first rank."""
    script = """
        import time
        from common.processes import first_rank_does, join_ranks
        from common.errors import InputError

        class Needs(Exception):
            def __init__(self, one, two):
                super().__init__(f"{one} {two}")

        class Holds(Exception):
            def __init__(self, text):
                super().__init__(text)
                self.held = lambda: None

        def fails(error):
            raise error

        ranks = join_ranks()
        errors = [InputError("a"), FileNotFoundError(2, "b", "c"), ZeroDivisionError("d"),
                  Needs("e", "f"), Holds("g"), KeyboardInterrupt(), SystemExit(3)]
        actions = [lambda error=error: fails(error) for error in errors]
        for action in [*actions, lambda: (lambda: None), lambda: [ranks.rank, InputError("h")]]:
            try:
                got = first_rank_does(ranks, action)
                print("got", got)
            except BaseException as error:
                print(type(error).__name__, error)
    """
    port = free_port()
    first, second = ends_of([launch(script, rank, 2, port) for rank in (0, 1)])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    ours, theirs = first[1].splitlines(), second[1].splitlines()
    same = ["InputError a", "FileNotFoundError [Errno 2] b: 'c'", "ZeroDivisionError d"]
    ends = ["KeyboardInterrupt ", "SystemExit 3"]
    value = "got [0, InputError('h')]"
    relayed = ["RuntimeError rank 0 failed, Needs: e f", "RuntimeError rank 0 failed, Holds: g"]
    assert ours[:7] == [*same, "Needs e f", "Holds g", *ends]
    assert theirs[:7] == [*same, *relayed, *ends]
    # A value that cannot travel is an error of all.
    assert re.match(r"(PicklingError|AttributeError) ", ours[7])
    assert theirs[7] == ours[7]
    assert ours[8] == theirs[8] == value


@pytest.mark.parametrize("waits_in", ["first_rank_does(ranks, int)", "stop.agreed()"])
def test_where_one_process_fails_alone_the_others_end_soon(waits_in):
    script = f"""
        import sys, time
        from common.processes import StopSignal, first_rank_does, gather, join_ranks
        from common.errors import exits_with_one_line

        @exits_with_one_line
        def main(argv):
            ranks = join_ranks()
            stop = StopSignal(ranks)
            gather(ranks, None)
            if ranks.rank == 0:
                time.sleep(0.5)
                raise SystemExit(3)
            while True:
                {waits_in}

        sys.exit(main())
    """
    port = free_port()
    (code, _, _), (waiting, _, error) = ends_of([launch(script, rank, 2, port) for rank in (0, 1)])
    assert (code, waiting) == (3, 2)
    assert error.startswith("error: rank 1 ends because another of the 2 processes has ended")
    assert len(error.splitlines()) == 1


# --- stopping -------------------------------------------------------------------------------------


def test_processes_agree_on_a_stop_about_once_a_second():
    """One rank alone is asked, at a quick step or at a slow one: both stop soon, at one step."""
    script = """
        import os, signal, time
        from torch import distributed
        from common.processes import StopSignal, join_ranks
        talks, all_reduce = [], distributed.all_reduce

        def counted(*args):
            talks.append(time.perf_counter())
            return all_reduce(*args)

        distributed.all_reduce = counted
        ranks = join_ranks()

        def steps_until_a_stop(seconds, asked_rank, asked_step):
            step = 0
            with StopSignal(ranks) as stop:
                while not stop.agreed():
                    step += 1
                    if (ranks.rank, step) == (asked_rank, asked_step):
                        os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(seconds)
            return step

        quick = steps_until_a_stop(0.002, 1, 1000)
        print(quick, len(talks), max(b - a for a, b in zip(talks, talks[1:])))
        print(steps_until_a_stop(1.1, 0, 2))
    """
    port = free_port()
    ends = ends_of([launch(script, rank, 2, port) for rank in (0, 1)])
    assert [code for code, *_ in ends] == [0, 0], ends
    (quick, slow), (others_quick, others_slow) = (out.splitlines() for _, out, _ in ends)
    steps, talks, widest = map(float, quick.split())
    assert quick.split()[:2] == others_quick.split()[:2]
    assert 1000 <= steps < 2000
    assert talks <= 20
    assert widest < 3
    assert slow == others_slow == "2"


def test_a_process_alone_stops_at_the_next_step():
    with StopSignal(Ranks(0, 1, 0)) as stop:
        assert not any(stop.agreed() for _ in range(100))
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed()
