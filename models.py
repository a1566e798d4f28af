"""Build, load and save models, and prepare them for refinement or training.

A model is an `architectures.Architecture` around one of CompressAI's networks. `load_checkpoint`
recognises the family of a model by its weights.
"""

import io
import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from architectures import ARCHITECTURES, Architecture, MeanScale
from architectures.distributions import use_coder_scales
from common.compressai import rename_old_weights
from common.errors import InputError
from common.files import write_whole
from common.weights import find_state_dict, read_checkpoint
from config import Channels
from fast.freezing import freeze_layers, is_frozen, use_fast_layers

CONSTANT_BUFFERS = (".bound", ".pedestal", ".target", ".scale_bound")


# --- building and loading -------------------------------------------------------------------------


def build_model(channels: Channels, architecture: str = MeanScale.name) -> Architecture:
    """An untrained model of a registered family, with N and M channels.

    Raises:
        KeyError: no family has this name.
    """
    return ARCHITECTURES[architecture].build(channels.N, channels.M)


def load_checkpoint(source: str, channels: Channels | None = None) -> Architecture:
    """A trained model on the CPU, from a file or CompressAI's zoo.

    Args:
        source: a file of torch.save or safetensors, or `zoo:NAME:QUALITY`. The file holds weights
            under CompressAI's names, old or new, at any depth.
        channels: the required N and M; without it any are accepted.

    Raises:
        InputError: the file is missing, broken or of another architecture; the zoo cannot be
            reached; the weights have other channels than `channels`.
    """
    model = _load_zoo(source) if source.startswith("zoo:") else _load_file(source)
    if channels is not None and (model.N, model.M) != (channels.N, channels.M):
        raise InputError(
            f"pretrain {source}: has N = {model.N}, M = {model.M}, "
            f"but channels asks for N = {channels.N}, M = {channels.M}"
        )
    return model


def _load_file(source: str) -> Architecture:
    weights = find_state_dict(read_checkpoint(source), source, "g_a")
    return model_from_state_dict(weights, source)


def model_from_state_dict(weights: dict[str, Tensor], source: str) -> Architecture:
    """The model with these weights; their names and shapes tell its family, N and M.

    Args:
        source: where the weights come from, for error messages.

    Raises:
        InputError: the weights fit no registered family, or are not finite.
    """
    mismatches = {name: family.mismatch(weights) for name, family in ARCHITECTURES.items()}
    name = next((name for name, found in mismatches.items() if not found), MeanScale.name)
    wrong = f"pretrain {source}: not the weights of a {name}"
    if mismatches[name]:
        raise InputError(f"{wrong} ({mismatches[name]})")
    weights = {
        key: value.float() if value.is_floating_point() else value
        for key, value in rename_old_weights(weights).items()
    }
    try:
        for key, value in weights.items():
            if not value.isfinite().all():
                raise InputError(f"pretrain {source}: {key} holds NaN or infinite weights")
        model = ARCHITECTURES[name].from_weights(weights)
        _restore_constants(model)
        return model
    except KeyError as error:
        raise InputError(f"{wrong} (no {error.args[0]})") from None
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:160]
        raise InputError(f"{wrong} ({reason})") from None


def _restore_constants(model: Architecture) -> None:
    """Reset the constant buffers to their exact values: half precision rounds 1e-9 to 0."""
    exact = dict(model.build(model.N, model.M).network.named_buffers())
    for name, value in model.network.named_buffers():
        if name.endswith(CONSTANT_BUFFERS):
            value.copy_(exact[name])


def _load_zoo(source: str) -> Architecture:
    _, name, quality, *rest = (*source.split(":"), "", "")
    families = {known: family for family in ARCHITECTURES.values() for known in family.zoo}
    if name not in families or any(rest) or quality not in tuple("12345678"):
        known = " or ".join(f"zoo:{known}:QUALITY" for known in families)
        raise InputError(f"pretrain {source}: must be {known}, QUALITY 1 to 8")
    family = families[name]
    try:
        return family(family.zoo[name](int(quality), pretrained=True, progress=False).eval())
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"pretrain {source}: cannot download CompressAI's weights ({error}); connect to the "
            f"network once, or put the file into {cache} by hand"
        ) from None


# --- saving ---------------------------------------------------------------------------------------


def save_checkpoint(path: Path, model: Architecture, state: dict[str, Any]) -> Path:
    """Write a checkpoint in the published layout, whole or not at all; `load_checkpoint` reads it.

    Args:
        state: the other entries of the checkpoint: `iter`, `optimizer_state_dict` and more.

    Raises:
        OSError: the file cannot be written.
    """
    return _save(path, {"model_state_dict": model.state(), **state})


def save_weights(path: Path, model: Architecture, step: int) -> Path:
    """Write only the weights, in half precision: a quarter of a checkpoint's size or less.

    The file also holds the coding tables of z and the table of scales of y. Another machine would
    compute tables with other last bits, and then could not decode the files of this one.

    Raises:
        OSError: the file cannot be written.
    """
    trained = dict(model.network.named_parameters())
    weights = {key: value.half() if key in trained else value
               for key, value in model.state().items()}  # fmt: skip
    reader = model_from_state_dict(weights, str(path))
    reader.prepare_tables()
    kept = ("entropy_bottleneck._", "gaussian_conditional.scale_table")
    tables = reader.network.state_dict().items()
    weights |= {key: value for key, value in tables if key.startswith(kept)}
    return _save(path, {"iter": step, "model_state_dict": weights, "optimizer_state_dict": {}})


def _save(path: Path, checkpoint: dict[str, Any]) -> Path:
    buffer = io.BytesIO()  # torch.save to a full disk raises a RuntimeError, not an OSError
    torch.save(checkpoint, buffer)
    return write_whole(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


# --- preparation ----------------------------------------------------------------------------------


def prepare_for_training(model: Architecture) -> Architecture:
    """Prepare a model for training, in place, and return it: fast layers, channels-last memory."""
    use_fast_layers(model.network)
    return model


def freeze(model: Architecture, coder_scales: bool = False) -> Architecture:
    """Prepare a model for refinement, in place, and return it: its weights become constants.

    Call it after moving the model to its device.

    Args:
        coder_scales: compute rates with the entropy coder's table of scales. They are a little
            above the rates of the continuous scales.

    Raises:
        ValueError: the model is frozen already, or a transposed convolution is not CompressAI's
            `deconv`.
    """
    if is_frozen(model.network):
        raise ValueError("the model is frozen already")
    if coder_scales:
        model.prepare_tables()
        use_coder_scales(model.network.gaussian_conditional)
    freeze_layers(model.network)
    return model
