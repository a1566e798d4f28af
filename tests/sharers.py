"""What each of four processes does in test_sharing.py; it imports no more than that needs."""

import json
import os
import signal
import time

from common.errors import InputError
from common.machines import host_names, refuse_other_folder, refuse_other_input
from common.processes import gather, join_ranks, shares
from common.records import RECORD_KEYS, SIDE_KEYS, append_record, rank_file

NAMES = list("abcdefghijkl")
SIDE = dict.fromkeys(SIDE_KEYS, 0)
RECORD = dict.fromkeys(RECORD_KEYS, 0) | {"base": SIDE, "refined": SIDE}
# Numbers of items, and how many are taken at once.
LISTS = ((10, 2), (10, 3), (10, 8), (3, 8), (0, 8))


def meet(rank, port):
    os.environ |= {"WORLD_SIZE": "4", "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    return join_ranks()


def wait_for_all_others(rank, port, folder):
    """Share 20 items; who has item 0 is not done with it before the others are all done."""
    ranks, done, mine = meet(rank, port), folder / "done", []
    for (item,) in shares(ranks, range(20), 1, "long"):
        mine.append(item)
        while item == 0 and len(list(done.iterdir())) < 19:
            time.sleep(0.01)
        (done / str(item)).touch(exist_ok=False)  # an item that is given out twice is an error
    runs = [
        [list(run) for run in shares(ranks, range(count), at_once, f"{count} by {at_once}")]
        for count, at_once in LISTS
    ]
    (folder / f"{rank}.json").write_text(json.dumps([mine, runs]))
    gather(ranks, None)


def be_killed(rank, port, folder, victim):
    """Share the names; a process is killed when each has its first name, of a to d."""
    ranks = meet(rank, port)
    try:
        for (name,) in shares(ranks, NAMES, 1, "some"):
            if name in "abcd":
                gather(ranks, None)
            if rank == victim:
                (folder / "killed").write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02 * (NAMES.index(name) % 3))
            append_record(rank_file(folder, rank), RECORD | {"name": name})
        gather(ranks, None)
    except ConnectionError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def compare(rank, port, folders, inputs):
    """Compare the folders and inputs; each rank writes into the first folder what is wrong."""
    ranks, wrong = meet(rank, port), []
    hosts = host_names(ranks)
    for check in (
        lambda: refuse_other_input(ranks, hosts, inputs[rank]),
        lambda: refuse_other_folder(ranks, hosts, folders[rank]),
    ):
        try:
            check()
        except InputError as error:
            wrong.append(str(error))
    (folders[0] / f"{rank}.json").write_text(json.dumps(wrong))
    gather(ranks, None)
