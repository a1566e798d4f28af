"""What a run tells the decoder beside the latents: before the run, in its facts, in its records."""

from pathlib import Path

import numpy as np
import torch

from adaptation.least_squares import COLUMNS
from architectures import Architecture, Latents
from architectures.directions import directions_beside, use_directions
from coding.bitstream import BitstreamError
from coding.payload import Adaptation, from_bytes, lattice_code
from common.errors import InputError
from common.records import Record, result_file
from config import RefineConfig
from fast.last_layer import last_layer_of
from objectives import objective_of

# Of a fit, at most: copies of the gram matrix, and strips of the last layer's input.
MATRICES, STRIPS = 5, 3


# --- before a run ---------------------------------------------------------------------------------


def check_adapt(config: RefineConfig, model: Architecture) -> None:
    """Refuse what the model's decoder cannot be told.

    Raises:
        InputError: there is no such lattice, or no fit of the last layer.
    """
    options = config.adapt
    if options is None:
        return
    try:
        model.with_lattice(_first_told(config).lattice_step)
    except InputError as error:
        raise InputError(f"adapt.{error}") from None
    if not options.fits_the_decoder:
        return
    key = "directions" if options.directions is not None else "last_layer"
    if not objective_of(config, config.lmbda).distortion.is_mse:
        raise InputError(
            f'adapt.{key}: fits are for the objective "mse"; with "{config.objective}" set '
            "adapt.directions to null and adapt.last_layer to false"
        )
    # A family with its own `synthesize` does not decode by g_s alone.
    by_g_s = type(model).synthesize is Architecture.synthesize
    if not by_g_s or last_layer_of(getattr(model.network, "g_s", None)) is None:
        raise InputError(
            f"adapt.{key}: the decoder of {model.name} does not end with a deconv, a transposed "
            "5x5 convolution of stride 2; set adapt.directions to null and adapt.last_layer to "
            "false"
        )


def _first_told(config: RefineConfig) -> Adaptation:
    """What the decoder is told before any fit, for the config's lambda.

    Raises:
        InputError: files cannot have such a lattice.
    """
    if config.adapt is None:
        return Adaptation()
    try:
        return Adaptation(lattice_code(config.adapt.step_at(config.lmbda, config.usual_lambda)))
    except ValueError as error:
        raise InputError(f"lattice = {config.adapt.lattice}: {error}") from None


def use_directions_of(config: RefineConfig, model: Architecture) -> None:
    """Read the directions that a config asks for, unless the model has those of that file.

    Raises:
        InputError: see `load_directions`.
        ValueError: see `use_directions`.
    """
    wanted = config.adapt.directions if config.adapt else None
    if wanted is None:
        return
    if wanted == "auto" and config.pretrain.startswith("zoo:"):
        raise InputError(
            "adapt.directions = auto: there is no file beside a model of the zoo: give its path"
        )
    use_directions(model, directions_beside(config.pretrain) if wanted == "auto" else Path(wanted))
    if model.find_directions is not None:
        model.find_directions()  # now, to refuse a wrong file before any work


def bytes_of_fits(config: RefineConfig, model: Architecture) -> int:
    """About how much memory the fits of the last layer take beside the picture.

    The matrices are on the CPU; a device has the strips. The larger sum counts for both.
    """
    last = last_layer_of(getattr(model.network, "g_s", None))
    if config.adapt is None or not config.adapt.fits_the_decoder or last is None:
        return 0
    channels = last.weight.size(0)
    matrix, strip = 8 * (25 * channels + 1) ** 2, 4 * (9 * channels + 1) * COLUMNS
    return MATRICES * matrix + STRIPS * strip


# --- facts ----------------------------------------------------------------------------------------


def adapt_facts(config: RefineConfig, model: Architecture) -> Record:
    """What a run's facts say of `adapt`: `adapt` in words, and `directions`, which file it is.

    Args:
        model: with the directions of the config; see `use_directions_of`.
    """
    options, facts = config.adapt, {}
    if options is None:
        return {}
    searched = config.target is not None and options.lattice == "auto"
    words = [f"lattice {'auto' if searched else format(_first_told(config).lattice_step, '.4g')}"]
    if options.directions is not None and model.find_directions is not None:
        directions = model.find_directions()
        words.append(f"{len(directions.bias)} directions")
        facts["directions"] = directions.mark.hex()
    if options.last_layer:
        words.append("last layer")
    return {"adapt": ", ".join(words), **facts}


# --- records --------------------------------------------------------------------------------------


def told_of(record: Record) -> Adaptation:
    """What the decoder is told of an image, from its record.

    Raises:
        InputError: the record is damaged.
    """
    try:
        return from_bytes(bytes.fromhex(record.get("told", "")))
    except (ValueError, TypeError, BitstreamError) as error:
        raise InputError(f"{record['name']}: its record has a wrong `told`: {error}") from None


def stored_symbols(folder: Path, name: str) -> Latents:
    """The refined integers of an image, [1, C, h, w] of each latent, from a run's folder.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = result_file(folder, "latents", name, ".npz")
    try:
        with np.load(path) as arrays:
            return {latent: torch.from_numpy(v)[None] for latent, v in arrays.items()}
    except Exception as error:  # readers of damaged files raise dozens of types
        raise InputError(f"{path}: cannot be read ({error}); refine this image again") from None
