"""What a run of the training script left behind, by the JSON values of its config."""

from pathlib import Path

import torch


def folder_of(values, **changed):
    values = {**values, **changed}
    return Path(values["output_dir"]) / values["save_name"]


def checkpoint_of(values, step, **changed):
    path = folder_of(values, **changed) / f"iter_{step}.pth.tar"
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    """Two checkpoints, to the last bit, less the config."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"config"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
