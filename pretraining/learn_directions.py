"""Learn the directions of a model's last layer from the results of a refinement of many photos.

python train_flexible_inference.py --config example_files/fast.json --images PHOTOS \
--set pretrain=WEIGHTS --set train_lambda=LAMBDA --set tot_inference_iterations=60 \
--set polish_passes=0 --set save_name=photos
python -m pretraining.learn_directions results/photos

The file is written beside the weights, unless -o says where. Refinement uses it if
`adapt.directions` is set. Some hundred photos are enough; 320x320 pixels of each do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError, exits_with_one_line
from common.files import user_path
from config import RefineConfig, load_config

# isort: split
import torch

from adaptation.learn import Photos
from adaptation.least_squares import from_columns, quadratic_of
from architectures import Architecture, Latents
from architectures.directions import MOST, directions_beside, save_directions
from coding.payload import Adaptation
from common.command_line import script_parser
from common.records import read_records
from datasets import open_images
from fast.last_layer import last_layer_of
from models import freeze, load_checkpoint
from objectives import Problem, objective_of
from refinement.told import stored_symbols, told_of

COUNT = 128


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = script_parser(__doc__)
    parser.add_argument("run", type=user_path, metavar="FOLDER", help="of a finished refinement")
    parser.add_argument("-o", "--output", type=user_path, metavar="FILE", help="of the directions")
    parser.add_argument(
        "--count", type=int, default=COUNT, metavar="N", help="how many: %(default)s"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that is there already"
    )
    return parser


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Learn the directions from a run's folder, and write them."""
    arguments = command_line().parse_args(argv)
    if not 1 <= arguments.count <= MOST:
        raise InputError(f"--count {arguments.count}: from 1 to {MOST}")
    folder = Path(arguments.run)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no folder of a refinement (it has no config.json)")
    config = load_config(folder / "config.json", RefineConfig)
    output = Path(arguments.output or directions_beside(config.pretrain))
    # Files that were written with the old directions need them.
    if output.exists() and not arguments.overwrite:
        raise InputError(f"{output} is there already: see --overwrite")
    model = load_checkpoint(config.pretrain, config.channels, config.architecture)
    if last_layer_of(getattr(model.network, "g_s", None)) is None:
        raise InputError(
            f"{config.pretrain}: the decoder of {model.name} does not end with a deconv"
        )
    weights, photos = model.weights_hash, photos_of(folder, config, model)
    try:
        directions = photos.directions(arguments.count)
        parts = [from_columns(direction) for direction in directions]
        weight, bias = (torch.stack(part) for part in zip(*parts, strict=True))
        save_directions(output, weight, bias, weights)
    except ValueError as error:
        raise InputError(f"{folder}: its photos give no directions: {error}") from None
    print(f"{output}: {len(directions)} directions of {len(photos.slopes)} photos")
    return 0


def photos_of(folder: Path, config: RefineConfig, model: Architecture) -> Photos:
    """The refined photos of a finished run; freezes the model in place.

    Raises:
        InputError: there is none, or its files are missing or wrong.
    """
    model, images = freeze(model, config.coder_scales), open_images(config)
    records, photos = read_records(folder / "images.jsonl"), Photos()
    done = [name for name in images.names if name in records]
    for image in images.load(done, config.num_workers):
        x = image.pixels()[None]  # [1, 3, H, W]
        problem = Problem(model, x, objective_of(config, config.lmbda))
        symbols, told = stored_symbols(folder, image.name), told_of(records[image.name])
        add_photo(photos, problem, symbols, told)
        if len(photos.slopes) % 50 == 0:
            print(f"{len(photos.slopes)} photos", file=sys.stderr)
    if not photos.slopes:
        raise InputError(f"{folder}: has no refined image")
    return photos


def add_photo(photos: Photos, problem: Problem, symbols: Latents, told: Adaptation) -> None:
    """Add a photo with the integers that its refinement found.

    Args:
        problem: of the photo, with the model as it is.
        told: what the decoder is told of the integers. Only their lattice counts here.
    """
    model = problem.model.with_lattice(told.lattice_step)
    photos.add(quadratic_of(problem, model.place(symbols, problem.size).y_hat), problem.pixels)


if __name__ == "__main__":
    sys.exit(main())
