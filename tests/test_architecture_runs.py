"""Every architecture from training to decoded files, at toy size, by the scripts themselves."""

import numpy as np
import pytest
import torch
from PIL import Image
from toys import CODED, M, N, groups_of

import codec
from architectures import ARCHITECTURES
from config import Channels
from conftest import read_jsonl
from models import load_checkpoint
from runs import results, run
from trainings import assert_same, checkpoint_of, folder_of

pytestmark = pytest.mark.usefixtures("without_run_plots")


@pytest.mark.parametrize("name", CODED)
def test_train_resume_refine_code_and_decode(
    name, train_on, train_values, config_values, write_config, tmp_path
):
    channels = {"N": N, "M": M, "groups": groups_of(name)}
    train_values |= {
        "architecture": name, "channels": channels, "path_test_data": "", "print_freq": 1,
        "save_model_freq": 2, "tot_iterations": 4, "quantization": "mixed",
    }  # fmt: skip
    assert train_on(train_values, save_name="unbroken") == 0
    assert train_on(train_values, tot_iterations=2) == 0
    assert train_on(train_values, resume=True) == 0
    unbroken = checkpoint_of(train_values, 4, save_name="unbroken")
    assert_same(unbroken, checkpoint_of(train_values, 4))
    rows = read_jsonl(folder_of(train_values) / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) for row in rows)

    weights = folder_of(train_values) / "weights.pth.tar"
    model = load_checkpoint(str(weights), Channels(**channels))
    assert type(model) is ARCHITECTURES[name]
    config_values |= {
        "pretrain": str(weights), "architecture": name, "save_bitstreams": True,
        "polish_passes": 2, "tot_batches": 2, "optimizer": {"lr": 0.05},
    }  # fmt: skip
    assert run(write_config(config_values)) == 0
    folder = results(config_values)
    records = read_jsonl(folder / "images.jsonl")
    assert len(records) == 2
    for record in records:
        assert record["refined"]["true_loss"] < record["base"]["true_loss"]

    decoded = tmp_path / "decoded"
    command = ["decompress", str(folder / "bitstreams"), "--checkpoint", str(weights)]
    assert codec.main([*command, "-o", str(decoded)]) == 0
    for record in records:
        with np.load(folder / "latents" / f"{record['name']}.npz") as stored:
            symbols = {key: torch.from_numpy(v)[None] for key, v in stored.items()}
        with Image.open(decoded / record["name"]) as picture:
            pixels = np.asarray(picture)
        x_hat = model.reconstruct(symbols, pixels.shape[:2])[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(pixels - x_hat).max() < 0.51
