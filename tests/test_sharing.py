"""Work that processes share: four real ones, unequal items, one killed, one on another machine."""

import json
import signal
import socket

import pytest
import torch
from forks import free_port, server

import sharers
from common.finding import find_images
from common.images import ImageFiles, LoadedImage
from common.machines import log_file
from common.processes import Ranks, shares
from common.records import merge_records
from conftest import read_jsonl
from train_flexible_inference import batches

ALONE = Ranks(0, 1, 0)


def codes_of_four(work, *arguments):
    """The exit codes of four processes, each of which does work(rank, port, *arguments)."""
    port = free_port()
    processes = [server().Process(target=work, args=(rank, port, *arguments)) for rank in range(4)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


# --- the queue ------------------------------------------------------------------------------------


def test_one_long_item_leaves_nobody_idle(tmp_path):
    """With a fixed split the process with item 0 would wait for ever."""
    (tmp_path / "done").mkdir()
    assert codes_of_four(sharers.wait_for_all_others, tmp_path) == [0, 0, 0, 0]
    taken = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert sorted(item for mine, _ in taken for item in mine) == list(range(20))
    assert [0] in [mine for mine, _ in taken]
    lists = zip(*(runs for _, runs in taken), strict=True)
    assert [sorted(run for mine in ranks for run in mine) for ranks in lists] == [
        [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]],
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]],
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]],  # fewer at once, so that all four get some
        [[0], [1], [2]],
        [],
    ]


def test_a_process_alone_takes_all():
    assert list(shares(ALONE, ["a", "b", "c"], 1, "any")) == [["a", "b", "c"]]


@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_process_loses_its_own_item_alone(tmp_path, victim):
    """Its others say so and end, what they did is kept, and a resumed run does what is undone.

    If the first process is killed, which hosts the store here, no one gets another item.
    """
    codes = codes_of_four(sharers.be_killed, tmp_path, victim)
    assert codes == [-signal.SIGKILL if rank == victim else 0 for rank in range(4)]
    for rank in {0, 1, 2, 3} - {victim}:
        error = (tmp_path / f"{rank}.txt").read_text()
        assert error.startswith(f"rank {rank} ends because another of the 4 processes has ended")
    records = [record for file in tmp_path.glob("*.jsonl") for record in read_jsonl(file)]
    done = [record["name"] for record in records]
    found = merge_records(tmp_path, sharers.NAMES)
    undone = [name for name in sharers.NAMES if name not in found]
    assert sorted(done + undone) == sharers.NAMES
    assert (tmp_path / "killed").read_text() in undone
    assert len(undone) == 1 or victim == 0
    assert list(shares(ALONE, undone, 1, "rest")) == [undone]


# --- reading the shared images --------------------------------------------------------------------


class Claimed:
    """Iterates over names, and remembers which were asked for."""

    def __init__(self, shares):
        self.left, self.asked = list(shares), []

    def __iter__(self):
        while self.left:
            self.asked.append(self.left.pop(0))
            yield self.asked[-1]


class Squares:
    """Images of given sides, by name."""

    passed_over = ""
    maps, map_messages = None, ()

    def __init__(self, sides):
        self.sides = dict(zip("abcdefghij", sides, strict=False))
        self.names = list(self.sides)

    def load(self, names, num_workers):
        for name in names:
            yield LoadedImage(name, torch.zeros(3, self.sides[name], self.sides[name]))


def test_a_batch_has_images_of_one_share_and_the_next_share_is_asked_for_after_it():
    images = Squares([8, 8, 9, 9, 9, 9, 8, 8])
    claimed = Claimed([["a", "b", "c"], ["d", "e", "f"], ["g"], ["h"]])
    seen = [
        ("".join(image.name for image in batch), len(claimed.asked))
        for batch in batches(images, claimed, 0, lambda size: 2)
    ]
    assert seen == [("ab", 1), ("c", 1), ("de", 2), ("f", 2), ("g", 3), ("h", 4)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_asked_for_when_they_are_read(photos, num_workers):
    for index in range(5):
        (photos / f"d_{index}.png").write_bytes((photos / "a_chelsea.png").read_bytes())
    images = ImageFiles(find_images(photos))
    claimed = Claimed([[name] for name in images.names])
    for number, (image,) in enumerate(batches(images, claimed, num_workers, lambda size: 1)):
        assert image.name == images.names[number]
        assert len(claimed.asked) == min(number + 1 + num_workers, 8)


# --- several machines -----------------------------------------------------------------------------


def wrong_for_each(folders, inputs):
    assert codes_of_four(sharers.compare, folders, inputs) == [0, 0, 0, 0]
    assert sorted(file.name for file in folders[0].iterdir()) == [f"{n}.json" for n in range(4)]
    return [json.loads((folders[0] / f"{rank}.json").read_text()) for rank in range(4)]


def test_machines_with_the_same_input_and_folder_may_go_on(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "results")
    (tmp_path / "results").mkdir()
    folders = [tmp_path / name for name in ("results", "link", "results", "link")]
    assert wrong_for_each(folders, [{"config": {"a": 1}}] * 4) == [[]] * 4


def test_a_machine_with_other_input_or_another_folder_is_named_by_all(tmp_path):
    for name in ("results", "other"):
        (tmp_path / name).mkdir()
    folders = [tmp_path / name for name in ("results", "results", "other", "missing")]
    same = {"config": "a", "list of images": ["\udce9.png"], "weights": "b"}
    inputs = [same, same, same, same | {"list of images": ["f.png"], "weights": "c"}]
    here = socket.gethostname()
    assert wrong_for_each(folders, inputs) == 4 * [
        [
            f"rank 3 ({here}) has another list of images and weights than rank 0 ({here}); "
            "all processes need the same",
            f"{folders[2]} on rank 2 ({here}) is not the folder of rank 0 ({here}); "
            "all machines need one common folder for results (output_dir)",
        ]
    ]


def test_each_machine_has_a_log(tmp_path):
    hosts = ["a", "a", "b"]
    names = [log_file(tmp_path, Ranks(rank, 3, 0), hosts).name for rank in range(3)]
    assert names == ["log.txt", "log.txt", "log.b.txt"]
