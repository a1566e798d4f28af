"""Build, load and save models, and prepare them for refinement or training.

A model is an `architectures.Architecture` around one of CompressAI's networks. `load_checkpoint`
recognises the family of a model by its weights.
"""

import io
import re
import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from architectures import ARCHITECTURES, Architecture, MeanScale
from architectures.base import names_of, restore_constants
from architectures.distributions import use_coder_scales
from architectures.own import find_family
from architectures.trial import WrongNamesError, build_own, load_own, tried
from common.compressai import GaussianConditional, rename_old_weights
from common.errors import InputError
from common.files import write_whole
from common.weights import find_state_dict, read_checkpoint
from config import Channels
from fast.freezing import freeze_layers, is_frozen, use_fast_layers

VARIABLE_RATE = ("QuantABCD.", "gayn2zqstep.")  # names of Vbr's weights


# --- building and loading -------------------------------------------------------------------------


def build_model(channels: Channels, architecture: str | None = None) -> Architecture:
    """An untrained model of a family, with N and M channels.

    Args:
        architecture: see `find_family`; None is the mean-scale hyperprior.

    Raises:
        InputError: there is no such family, it cannot have these channels, or a class of the user's
            has a fault.
    """
    family = MeanScale if architecture is None else find_family(architecture)
    if family.given_as:
        return build_own(family, channels.N, channels.M, channels.groups)
    return family.build(channels.N, channels.M, channels.groups)


def load_checkpoint(
    source: str, channels: Channels | None = None, architecture: str | None = None
) -> Architecture:
    """A trained model on the CPU, from a file or CompressAI's zoo.

    Args:
        source: a file of torch.save or safetensors, or `zoo:NAME:QUALITY[:METRIC]`. The file holds
            weights under CompressAI's names, old or new, at any depth.
        channels: the required N, M and groups; without it any are accepted.
        architecture: the required family, see `find_family`; None: the weights tell it.

    Raises:
        InputError: the file is missing, broken or of another architecture; the zoo cannot be
            reached; the weights have other channels than `channels`; a class of the user's has a
            fault.
    """
    family = None if architecture is None else find_family(architecture)
    load = _load_zoo if source.startswith("zoo:") else _load_file
    model = tried(load(source, family))
    if channels is not None:
        _check_channels(model, channels, source)
    return model


def _check_channels(model: Architecture, channels: Channels, source: str) -> None:
    if (model.N, model.M) != (channels.N, channels.M):
        raise InputError(
            f"pretrain {source}: has N = {model.N}, M = {model.M}, "
            f"but channels asks for N = {channels.N}, M = {channels.M}"
        )
    groups = getattr(model, "groups", None)
    if channels.groups is not None and channels.groups != groups:
        raise InputError(
            f"pretrain {source}: has {f'the groups {groups}' if groups else 'no groups'}, "
            f"but channels asks for the groups {channels.groups}"
        )


def _load_file(source: str, family: type[Architecture] | None) -> Architecture:
    weights = find_state_dict(read_checkpoint(source), source, "g_a")
    return model_from_state_dict(weights, source, family)


def model_from_state_dict(
    weights: dict[str, Tensor], source: str, family: type[Architecture] | None = None
) -> Architecture:
    """The model with these weights; their names and shapes tell its family, N and M.

    Args:
        source: where the weights come from, for error messages.
        family: the family that is wanted; None: any registered one.

    Raises:
        InputError: the weights fit no such family, or are not finite; or a class of the user's
            cannot load them.
    """
    weights = {
        key: value.float() if value.is_floating_point() else value
        for key, value in _newest_names(weights).items()
    }
    if family is not None and family.given_as:
        _check_finite(weights, source)
        return _own_model(family, weights, source)
    family = _family_of(weights, source, family)
    _check_finite(weights, source)
    wrong = f"pretrain {source}: not the weights of {family.name}"
    try:
        model = family.from_weights(weights)
        restore_constants(model.network)
        return model
    except KeyError as error:
        raise InputError(f"{wrong} (no {error.args[0]})") from None
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:160]
        raise InputError(f"{wrong} ({reason})") from None


def _check_finite(weights: dict[str, Tensor], source: str) -> None:
    for key, value in weights.items():
        try:
            finite = bool(value.isfinite().all())
        except RuntimeError:
            kind = f"a tensor {value.dtype}, {value.layout}"
            raise InputError(
                f"pretrain {source}: not the weights of a model here ({key} is {kind})"
            ) from None
        if not finite:
            raise InputError(f"pretrain {source}: {key} holds NaN or infinite weights")


def _own_model(family: type[Architecture], weights: dict[str, Tensor], source: str) -> Architecture:
    """The model of a class of the user's, which must itself find out whether weights fit it."""
    try:
        return load_own(family, weights, f"pretrain {source}")
    except WrongNamesError:
        if not (fitting := _fitting(weights)):
            raise
        found = f"they are of {fitting[0]}"
        raise InputError(f"pretrain {source}: not the weights of {family.name} ({found})") from None


def _newest_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of CompressAI 1.2.8, which renamed the bottleneck's twice."""
    lists = {"matrix": "matrices", "bias": "biases", "factor": "factors"}
    old = re.compile(r"(^|\.)_(matrix|bias|factor)(\d+)$")
    return {
        old.sub(lambda match: f"{match[1]}{lists[match[2]]}.{match[3]}", key): value
        for key, value in rename_old_weights(weights).items()
    }


def _family_of(
    weights: dict[str, Tensor], source: str, wanted: type[Architecture] | None
) -> type[Architecture]:
    """The family that weights fit, which must be the wanted one if there is one."""
    if wanted is not None and not (problem := wanted.mismatch(weights)):
        return wanted
    fitting = _fitting(weights)
    if wanted is not None:
        found = f"they are of {fitting[0]}" if fitting else problem
        raise InputError(f"pretrain {source}: not the weights of {wanted.name} ({found})")
    if fitting:
        return ARCHITECTURES[fitting[0]]
    if any(key.startswith(VARIABLE_RATE) for key in weights):
        raise InputError(f"pretrain {source}: a variable-rate model (Vbr), which is not known here")
    closest = max(ARCHITECTURES.values(), key=lambda family: _shared_names(family, weights))
    raise InputError(
        f"pretrain {source}: not the weights of a known architecture; the closest is "
        f"{closest.name} ({closest.mismatch(weights)}); a class of your own needs "
        "architecture = FILE.py:CLASS"
    )


def _fitting(weights: dict[str, Tensor]) -> list[str]:
    """The names of the registered families that have such weights."""
    return [name for name, family in ARCHITECTURES.items() if not family.mismatch(weights)]


def _shared_names(family: type[Architecture], weights: dict[str, Tensor]) -> float:
    """How many names weights share with a family, as a fraction of all names of either."""
    names = names_of(family, 1)[1]
    return len(names & weights.keys()) / len(names | weights.keys())


def _load_zoo(source: str, family: type[Architecture] | None) -> Architecture:
    _, name, quality, metric, *rest = (*source.split(":"), "", "", "")
    families = {known: other for other in ARCHITECTURES.values() for known in other.zoo}
    metric = metric or "mse"
    if name not in families or any(rest) or metric not in ("mse", "ms-ssim"):
        raise InputError(
            f"pretrain {source}: must be zoo:NAME:QUALITY, or zoo:NAME:QUALITY:ms-ssim; NAME is "
            f"one of {', '.join(families)}"
        )
    load, best = families[name].zoo[name]
    if quality not in map(str, range(1, best + 1)):
        raise InputError(f"pretrain {source}: {name} has the qualities 1 to {best}")
    if family is not None and family is not families[name]:
        raise InputError(f"pretrain {source}: not the weights of {family.name}")
    try:
        network = load(int(quality), metric, pretrained=True, progress=False)
        return families[name](network.eval())
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
    weights = {key: value.half() if key in trained else _smallest(value)
               for key, value in model.state().items()}  # fmt: skip
    reader = model_from_state_dict(weights, str(path), type(model))
    reader.prepare_tables()
    kept = re.compile(r"(^|\.)(entropy_bottleneck\._\w+|gaussian_conditional\.scale_table)$")
    tables = reader.network.state_dict().items()
    weights |= {key: value for key, value in tables if kept.search(key)}
    return _save(path, {"iter": step, "model_state_dict": weights, "optimizer_state_dict": {}})


def _smallest(v: Tensor) -> Tensor:
    """v itself, or a view of a small storage if all its channels are the same, as in a mask."""
    if v.dim() < 4 or not v.numel():
        return v
    one = v[:1, :1].clone().expand_as(v)
    return one if torch.equal(one, v) else v


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
        ValueError: the model is frozen already.
    """
    if is_frozen(model.network):
        raise ValueError("the model is frozen already")
    if coder_scales:
        model.prepare_tables()
        for entropy_model in model.table_models:
            if isinstance(entropy_model, GaussianConditional):
                use_coder_scales(entropy_model)
    freeze_layers(model.network)
    return model
