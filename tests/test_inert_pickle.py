"""Files that act when they are read carelessly: read here, they do nothing."""

import contextlib
import io
import os
import pathlib
import pickle

import pytest
import torch

from common.inert_pickle import Inert
from conftest import TORCH_FORMATS, assert_loads, refusal_of


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Restored:
    """Pickled as a state that a method of a class in this file would take."""

    def __setstate__(self, state):
        pathlib.Path(state["mark"]).touch()


def _state_that_acts(mark):
    thing = Restored()
    thing.mark = mark
    return thing


HARMFUL = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({mark!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({mark!r}, 'w')"),
    "open": lambda mark: Calls(open, mark, "w"),
    "a method": lambda mark: Calls(pathlib.Path.touch, pathlib.Path(mark)),
    "a state": _state_that_acts,
    "a part of a tensor": lambda mark: Calls(
        torch._utils._rebuild_tensor_v2, Calls(eval, f"open({mark!r}, 'w')"), 0, (1,), (1,), 0, {}
    ),
}


def _runs_when_read_carelessly(source, mark):
    """Whether a reader that trusts a file does what it says: else a test of it can't fail."""
    with contextlib.suppress(Exception):
        torch.load(source, weights_only=False)
    return mark.exists()


@pytest.mark.parametrize("options", TORCH_FORMATS.values(), ids=TORCH_FORMATS.keys())
@pytest.mark.parametrize("harm", HARMFUL.values(), ids=HARMFUL.keys())
def test_nothing_in_a_file_is_run(network, saved, tmp_path, harm, options):
    mark = tmp_path / "it_ran"
    source = saved({"state_dict": network.state_dict(), "x": harm(str(mark))}, **options)
    if harm is HARMFUL["a part of a tensor"]:
        assert "truncated or damaged" in refusal_of(source)
    else:
        assert_loads(source, network)
    assert not mark.exists()
    assert _runs_when_read_carelessly(source, mark)


def _before_torch_1_6(opcodes):
    """A file of torch.save's old format around a pickle of these opcodes, without storages."""
    buffer = io.BytesIO()
    torch.save(1, buffer, _use_new_zipfile_serialization=False)
    head = buffer.getvalue()[: buffer.getvalue().rindex(b"K\x01.")]
    return head + opcodes + b"." + pickle.dumps([], protocol=2)


CALLS_BY_HAND = {
    "INST": b"(S'touch MARK'\nios\nsystem\n",
    "OBJ": b"(cos\nsystem\nS'touch MARK'\no",
    "REDUCE": b"cos\nsystem\nS'touch MARK'\n\x85R",
}


@pytest.mark.parametrize("opcodes", CALLS_BY_HAND.values(), ids=CALLS_BY_HAND.keys())
def test_nothing_is_run_by_opcodes_that_are_written_by_hand(tmp_path, written, opcodes):
    mark = tmp_path / "it_ran"
    opcodes = opcodes.replace(b"MARK", bytes(mark))
    source = written("by_hand.pth", _before_torch_1_6(opcodes))
    assert "no tensors, but objects that are not loaded (os.system)" in refusal_of(source)
    assert not mark.exists()
    assert _runs_when_read_carelessly(source, mark)


def test_a_file_sets_no_attribute_of_a_class(written):
    """BUILD with (None, {"append": None}) on our own class."""
    before = Inert.append
    opcodes = b"ccommon.inert_pickle\nInert\n(N}S'append'\nNstb"
    refusal_of(written("by_hand.pth", _before_torch_1_6(opcodes)))
    assert Inert.append is before
