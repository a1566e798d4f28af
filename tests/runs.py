"""Runs of the refinement script on the photos of conftest.py, and what they left behind."""

from pathlib import Path

from conftest import read_jsonl
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
