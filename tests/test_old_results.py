"""Folders, checkpoints and files that an earlier version made keep working.

train.py made tests/old_results before the decoding walk was written once (20 steps of N = 4,
M = 6 on the sample photos), and train_flexible_inference.py (4 steps on one sample photo).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import train_flexible_inference
from coding.coder import build_coder, decode_latents, decode_picture
from conftest import ROOT, read_jsonl
from models import load_checkpoint

OLD = Path(__file__).parent / "old_results"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of an old folder; paths in its config begin at the repository's root."""
    monkeypatch.chdir(ROOT)

    def copy(name):
        return Path(shutil.copytree(OLD / name, tmp_path / name))

    return copy


def test_an_old_run_is_resumed_and_keeps_its_image(old):
    folder = old("refinement")
    (before,) = read_jsonl(folder / "images.jsonl")
    arguments = ["--set", f"output_dir={folder.parent}", "--set", "resume=true"]
    config = str(folder / "config.json")
    code = train_flexible_inference.main(["--config", config, *arguments, "--set", "images=2"])
    assert code == 0
    first, second = read_jsonl(folder / "images.jsonl")
    assert first == before
    assert second["name"] == "chelsea.png"
    assert second["refined"]["true_loss"] <= second["base"]["true_loss"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == 2


def test_an_old_run_done_again_gives_the_same_numbers(old):
    folder = old("refinement")
    (before,) = read_jsonl(folder / "images.jsonl")
    config = str(folder / "config.json")
    arguments = ["--set", f"output_dir={folder.parent}", "--set", "save_name=again"]
    assert train_flexible_inference.main(["--config", config, *arguments]) == 0
    (again,) = read_jsonl(folder.parent / "again" / "images.jsonl")
    for side in ("base", "refined"):
        numbers = {key: again[side][key] for key in before[side]}
        assert numbers == pytest.approx(before[side], rel=1e-3), side


def test_an_old_file_decodes_to_its_latents():
    coder = build_coder(load_checkpoint(str(OLD / "training" / "weights.pth.tar")))
    data = (OLD / "refinement" / "bitstreams" / "astronaut.png.olc").read_bytes()
    symbols, size = decode_latents(coder, data)
    assert size == (512, 512)
    with np.load(OLD / "refinement" / "latents" / "astronaut.png.npz") as arrays:
        assert symbols.keys() == {"y", "z"} == {*arrays}
        for name, v in symbols.items():
            assert np.array_equal(v[0].numpy(), arrays[name])
    assert decode_picture(coder, data).shape == (1, 3, 512, 512)


def test_an_old_training_goes_on(old):
    folder = old("training")
    before = torch.load(folder / "iter_20.pth.tar", weights_only=True)
    config = str(folder / "config.json")
    changes = [f"output_dir={folder.parent}", "resume=true", "tot_iterations=21"]
    sets = [part for change in changes for part in ("--set", change)]
    assert train.main(["--config", config, *sets]) == 0
    after = torch.load(folder / "iter_21.pth.tar", weights_only=True)
    assert after["iter"] == 21
    assert after["data_position"] == [before["data_position"][0] + 2]
    # One step of Adam moves no weight by more than a little over its learning rate.
    network = load_checkpoint(str(folder / "iter_21.pth.tar")).network
    for name, _ in network.named_parameters():
        moved = after["model_state_dict"][name] - before["model_state_dict"][name]
        assert 0 < moved.abs().max() < 2e-2, name
