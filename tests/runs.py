"""Runs of the refinement script on the photos of conftest.py, and what they left behind."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from architectures.footprint import footprint_of
from conftest import WEIGHTS, read_jsonl
from fast.memory import MemoryBound
from models import load_checkpoint
from train_flexible_inference import main

# Of the fixture `photos`.
NAMES = ["a_chelsea.png", "b_coffee.png", "c_rocket.png"]


def run(config_path, *overrides):
    """The exit code of a refinement; each override is key.sub=value."""
    sets = [part for override in overrides for part in ("--set", override)]
    return main(["--config", str(config_path), *sets])


def results(config_values):
    """The folder of a run by the JSON values of its config."""
    return Path(config_values["output_dir"]) / config_values["save_name"]


def numbers(folder):
    """Every record less what a clock or the machine's load decides."""
    clock = ("seconds", "seconds_per_step", "peak_memory_mb", "clock")
    return [
        {key: value for key, value in record.items() if key not in clock}
        for record in read_jsonl(folder / "images.jsonl")
    ]


def decoded(network, y, z, size):
    """By CompressAI's own layers: x_hat [1, 3, *size] in floats, the bits of y [h, w], and bpp.

    Args:
        y, z: integers [M, h, w] and [N, h', w'], as latents/*.npz has them.
    """
    medians = network.entropy_bottleneck.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
    z_hat = torch.from_numpy(z)[None] + medians
    with torch.no_grad():
        parameters = network.h_s(z_hat)[:, :, : y.shape[1], : y.shape[2]]
        scales, means = parameters.chunk(2, 1)
        y_hat = torch.from_numpy(y)[None] + means
        _, p_y = network.gaussian_conditional(y_hat, scales, means)
        _, p_z = network.entropy_bottleneck(z_hat)
        x_hat = network.g_s(y_hat)[:, :, : size[0], : size[1]]
    bits_y = -p_y.double().log2().sum(1)[0].numpy()
    bits = bits_y.sum() - p_z.double().log2().sum().item()
    return x_hat, bits_y, bits / (size[0] * size[1])


def decoded_result(network, folder, record):
    """`decoded` of the latents that a run saved of an image."""
    with np.load(folder / "latents" / f"{record['name']}.npz") as saved:
        y, z = saved["y"], saved["z"]
    return decoded(network, y, z, (record["height"], record["width"]))


def leave_out_plots(monkeypatch):
    """Let runs draw nothing, which takes half of their time, where no test looks at it."""
    for plot in ("plot_trajectory", "plot_rate_distortion"):
        monkeypatch.setattr(f"reports.run_report.{plot}", lambda *_: Figure(figsize=(0.1, 0.1)))


def limit_for_tiles(monkeypatch, size, with_pictures=False):
    """GB in which a picture of size (H, W) does not fit whole, but in tiles of 3x3 positions."""
    monkeypatch.setattr("fast.memory.TILES", (3,))
    footprint = footprint_of(load_checkpoint(str(WEIGHTS)))
    footprint = footprint.with_pictures() if with_pictures else footprint
    bound = MemoryBound(footprint, limit=0, base=1.3e9)
    return (bound.needed(size) + bound.needed(size, tile=3)) / 2e9
