"""Processes that start in no time: a server that has imported the scripts once forks them."""

import atexit
import contextlib
import multiprocessing
import os
import socket
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent


@cache
def server():
    """The context whose processes have all scripts imported, which takes seconds otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["codec", "compare", "datasets", "train"])
    one_thread = patch.dict(os.environ, OMP_NUM_THREADS="1")  # torch reads it when imported
    with one_thread, contextlib.chdir(ROOT):  # where the server finds the scripts
        forkserver.ensure_running()
    first = context.Process(target=int)  # the imports are no part of any test's time
    first.start()
    first.join()
    return context


class Fork:
    """A process, in a session of its own, that runs a script's text with further variables.

    It is one of multiprocessing that has `stdout` and `stderr`: readers of what it prints.
    """

    def __init__(self, script, **variables):
        pipes = [server().Pipe(duplex=False) for _ in range(2)]
        variables = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        writers = [writer for _, writer in pipes]
        arguments = (textwrap.dedent(script), variables, *writers)
        self._process = server().Process(target=_run, args=arguments)
        self._process.start()
        atexit.register(self._process.kill)  # if its test is interrupted: else it would be joined
        for writer in writers:
            writer.close()
        self.stdout, self.stderr = (
            os.fdopen(os.dup(reader.fileno()), encoding="utf-8") for reader, _ in pipes
        )

    def __getattr__(self, name):
        return getattr(self._process, name)

    def send_signal(self, number):
        os.kill(self.pid, number)


def _run(script, variables, stdout, stderr):
    """Run a script's text as `python -c` does, with these variables alone."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    # The server has its own for where it writes, which may be a file.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    exec(compile(script, "<script>", "exec"), vars(sys.modules["__main__"]))


def launch(script, rank, world, port):
    """A process as a plain launcher starts it: no one ends it when another fails."""
    return Fork(
        script, WORLD_SIZE=world, RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="localhost",
        MASTER_PORT=port,
    )  # fmt: skip


def ends_of(processes, timeout=60):
    """Exit code, stdout and stderr of each; none may last longer than so many seconds."""
    streams = [stream for process in processes for stream in (process.stdout, process.stderr)]
    with ThreadPoolExecutor(len(streams)) as readers:
        texts = readers.map(lambda stream: stream.read(), streams)
        try:
            for process in processes:
                process.join(timeout)
            assert all(process.exitcode is not None for process in processes), "one lasts too long"
        finally:
            for process in processes:
                process.kill()
        return [(process.exitcode, next(texts), next(texts)) for process in processes]


def free_port():
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]
