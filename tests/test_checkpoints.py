"""Checkpoints of every kind, as real files: loaded whole, or refused in one true line."""

import argparse
import collections
import copy
import functools
import gzip
import io
import logging
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
import safetensors.torch
import torch
from compressai.models import (
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperpriorVbr,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from common.errors import InputError
from common.weights import find_state_dict, read_checkpoint
from config import Channels
from conftest import TORCH_FORMATS, WEIGHTS, assert_loads, refusal_of
from models import build_model, load_checkpoint


def _prefixed(weights, prefix):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def _named(weights, names):
    """The weights with parts of their names replaced."""
    renamed = {}
    for key, value in weights.items():
        for new, old in names.items():
            key = key.replace(new, old)
        renamed[key] = value
    return renamed


ENTROPY_PARAMETERS = ("matrices", "biases", "factors")


def _oldest_names(weights):
    """The parameter names of CompressAI before 1.2: _matrix0 for matrices.0."""
    bottleneck = "entropy_bottleneck."
    return _named(weights, {
        f"{bottleneck}matrices.": f"{bottleneck}_matrix",
        f"{bottleneck}biases.": f"{bottleneck}_bias",
        f"{bottleneck}factors.": f"{bottleneck}_factor",
    })  # fmt: skip


def _old_names(weights):
    """The parameter names of CompressAI 1.2: _matrices.0 for matrices.0."""
    return _named(weights, {f"k.{name}.": f"k._{name}." for name in ENTROPY_PARAMETERS})


def _other(weights):
    """Weights of the same shapes that are not these."""
    return {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}


# --- layouts --------------------------------------------------------------------------------------

LAYOUTS = {
    "published": lambda w: {
        "iter": 7,
        "model_state_dict": w,
        "optimizer_state_dict": {"state": {}},
    },
    "published, several GPUs": lambda w: {
        "iter": 7,
        "model_state_dict": _prefixed(w, "module."),
    },
    "bare": lambda w: w,
    "1.2 names": _old_names,
    "1.2 names, several GPUs": lambda w: _prefixed(_old_names(w), "module."),
    "oldest names": _oldest_names,
    "network": lambda w: {"network": w, "epoch": 3},
    "model": lambda w: {"model": _prefixed(w, "net."), "epoch": 3},
    "net": lambda w: {"net": _prefixed(w, "_orig_mod.")},
    "model_state": lambda w: {"model_state": w},
    "params": lambda w: {"params": w},
    "nested": lambda w: {"model": {"state_dict": _prefixed(w, "network.")}},
    "in a list": lambda w: [w, {"lr": 0.1}],
    "among plain values": lambda w: {"epoch": 3, "loss": torch.tensor(1.0), **w, "note": None},
    "compiled networks": lambda w: _named(w, {"g_a.": "g_a._orig_mod.", "h_s.": "h_s.module."}),
    "an average alone": lambda w: {"n_averaged": torch.tensor(3), **_prefixed(w, "module.")},
    "saved twice": lambda w: {"net": _prefixed(w, "compiled._orig_mod."), "best": dict(w)},
    "beside other networks": lambda w: {
        "state_dict": {
            **_prefixed(w, "model."),
            "loss_fn.weight": torch.ones(3),
            "lpips.g.0.weight": torch.ones(2),
        }
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_loads(network, saved, layout):
    assert_loads(saved(layout(network.state_dict())), network)


def test_half_precision_loads_as_float32(network, saved):
    half = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    loaded = load_checkpoint(saved(half)).network.state_dict()
    for name, value in network.state_dict().items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_with_coding_tables_loads(small, saved):
    net = build_model(Channels(N=8, M=12)).network
    net.load_state_dict(small.network.state_dict())
    net.update(force=True)
    assert net.entropy_bottleneck._quantized_cdf.numel() > 0
    assert load_checkpoint(saved(net.state_dict())).weights_hash == small.weights_hash


def test_weights_hash_tells_weights_apart(small):
    """By the last bit of one of them; equal ones have one hash, whichever object holds them."""
    same, other = copy.deepcopy(small), copy.deepcopy(small)
    bias = other.network.h_s[4].bias
    with torch.no_grad():
        bias[-1] = bias[-1].nextafter(torch.tensor(torch.inf))
    assert same.weights_hash == small.weights_hash != other.weights_hash


PREFIXES = st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "network."]))
KEYS = st.lists(
    st.sampled_from(["model_state_dict", "state_dict", "network", "model", "net", "weights"])
)


@given(prefixes=PREFIXES, keys=KEYS, inside=st.sampled_from(["", "_orig_mod.", "module."]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mixture_of_prefixes_and_keys_is_taken_off(network, prefixes, keys, inside):
    weights = network.state_dict()
    checkpoint = _prefixed(_named(weights, {"g_s.": f"g_s.{inside}"}), "".join(prefixes))
    if prefixes:
        checkpoint["criterion.weight"] = torch.ones(2)
    for key in keys:
        checkpoint = {"epoch": 1, key: checkpoint}
    found = find_state_dict(checkpoint, "file", "g_a")
    assert found.keys() == weights.keys()
    assert all(found[name] is value for name, value in weights.items())


def test_compiled_and_parallel_models_load_as_torch_names_them(network, saved):
    parallel = nn.DataParallel(torch.compile(network)).state_dict()
    assert "module._orig_mod.g_a.0.weight" in parallel
    assert_loads(saved(parallel), network)
    average = torch.optim.swa_utils.AveragedModel(network).state_dict()
    assert "n_averaged" in average
    assert_loads(saved(average), network)


AVERAGES = {
    "a key": lambda w: {"ema": _other(w), "model": w},
    "a prefix": lambda w: {**_prefixed(_other(w), "ema_model."), **_prefixed(w, "model.")},
    "a prefix of one": lambda w: {**w, **_prefixed(_other(w), "model_ema.module.")},
    "BasicSR": lambda w: {"params_ema": _other(w), "params": w},
}


@pytest.mark.parametrize("layout", AVERAGES.values(), ids=AVERAGES.keys())
def test_averages_are_left_with_a_word(network, saved, caplog, layout):
    with caplog.at_level(logging.WARNING, logger="refine"):
        assert_loads(saved(layout(network.state_dict())), network)
    assert "several models; takes the weights" in caplog.text
    assert "ema" in caplog.text


def test_two_models_are_refused_by_their_places(network, saved):
    weights = network.state_dict()
    message = refusal_of(saved({"best": _other(weights), "state_dict": _prefixed(weights, "net.")}))
    assert "holds 2 models, best > * and state_dict > net.*; " in message


# --- what lies beside the weights -----------------------------------------------------------------


class Settings(dict):
    """A dictionary of a run's settings, as trainers define them."""


class Window(list):
    """The last losses of a run."""


def _objects():
    """All that people save beside weights, and torch's safe reader refuses."""
    return argparse.Namespace(
        lr=1e-4,
        data=pathlib.Path("/data"),
        loss=np.float64(0.5),
        dtype=np.dtype("float32"),
        curve=np.arange(5),
        seeds=np.random.default_rng(1),
        losses=collections.deque([1.0, 2.0], maxlen=9),
        by_name=collections.defaultdict(list, {"a": [1]}),
        kinds=frozenset(["a"]),
        activation=nn.ReLU(),
        schedule=functools.partial(print, 1),
        settings=Settings(a=1),
        window=Window([1, 2]),
        by_path={pathlib.Path("a"): 1},
    )


@pytest.fixture
def trained():
    """Adam after a step of another network than `network`."""
    net = build_model(Channels(N=8, M=12)).network
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(1, 3, 64, 64))["x_hat"].mean().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", TORCH_FORMATS.values(), ids=TORCH_FORMATS.keys())
def test_a_lightning_checkpoint_loads(network, saved, trained, options):
    checkpoint = {
        "epoch": 1,
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": _objects(),
        "optimizer_states": [trained.state_dict()],
        "callbacks": {"best": torch.tensor(1.0), "file": pathlib.Path("x")},
        "state_dict": {
            **_prefixed(network.state_dict(), "model."),
            "loss_fn.weight": torch.ones(3),
        },
    }
    assert_loads(saved(checkpoint, **options), network)


def test_a_checkpoint_of_compressais_training_loads(network, saved, trained):
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(trained, "min")
    checkpoint = {
        "epoch": 3,
        "state_dict": _prefixed(network.state_dict(), "module._orig_mod."),
        "loss": np.float64(1.25),
        "optimizer": trained.state_dict(),
        "aux_optimizer": trained.state_dict(),
        "lr_scheduler": schedule.state_dict(),
    }
    assert_loads(saved(checkpoint), network)


def test_tensors_of_other_kinds_beside_the_weights_are_passed_over(network, saved):
    beside = {"args": argparse.Namespace(), "counts": torch.ones(2, dtype=torch.uint16)}
    assert_loads(saved({"net": network.state_dict(), **beside}), network)


def test_weights_in_classes_of_their_own_load(network, saved):
    parameters = {name: nn.Parameter(v) if v.is_floating_point() else v
                  for name, v in network.state_dict().items()}  # fmt: skip
    assert_loads(saved({"settings": Settings(net=parameters), "loss": np.float32(1)}), network)


def test_plain_values_beside_objects_stay_as_they_were(saved):
    plain = {"iter": 7, "rate": 0.1, "names": ["a", ("b", None)], "on": True, "to": {"x": {}}}
    read = read_checkpoint(saved({**plain, "args": argparse.Namespace(a=1)}))
    assert read.pop("args").name == "argparse.Namespace"
    assert read == plain


def test_whole_pickled_models_are_called_that(network, saved):
    name = "compressai.models.google.MeanScaleHyperprior"
    for options in TORCH_FORMATS.values():
        for checkpoint in (network, {"model": network, "epoch": 3}):
            message = refusal_of(saved(checkpoint, **options))
            assert f"a whole pickled model ({name}), not weights; save its weights alone" in message
    assert_loads(saved({"model": network, "state_dict": network.state_dict()}), network)


def test_objects_alone_are_named(saved):
    message = refusal_of(saved({"model": Settings(a=1), "args": argparse.Namespace()}))
    assert "no tensors, but objects that are not loaded (argparse.Namespace, " in message
    assert "Settings); save its weights alone: torch.save(model.state_dict(), FILE)" in message


def test_weights_as_numpy_arrays_are_refused_by_name(network, saved):
    message = refusal_of(saved({k: v.numpy() for k, v in network.state_dict().items()}))
    assert "is no tensor, but of numpy." in message


# --- safetensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_safetensors_load_by_their_content(network, tmp_path, name):
    path = tmp_path / name
    weights = _prefixed(network.state_dict(), "_orig_mod.module.")
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    assert_loads(str(path), network)


def test_a_file_of_torch_called_safetensors_loads(network, tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save(network.state_dict(), path)
    assert_loads(str(path), network)


@pytest.mark.parametrize("keep", [4, 9, 100, 5000, -1])
def test_torn_safetensors_are_refused(network, written, keep):
    content = safetensors.torch.save(dict(network.state_dict()))[:keep]
    assert "truncated or damaged, or no file of safetensors" in refusal_of(
        written("model.safetensors", content)
    )


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [10, 1000, 2_000_000])
def test_a_truncated_file_is_refused(written, keep):
    assert "truncated" in refusal_of(written("damaged.pth.tar", WEIGHTS.read_bytes()[:keep]))


@pytest.mark.parametrize("keep", [5, 100, 5000, -100])
def test_a_truncated_old_file_is_refused(network, saved, written, keep):
    source = saved(network.state_dict(), _use_new_zipfile_serialization=False)
    content = pathlib.Path(source).read_bytes()[:keep]
    assert "truncated" in refusal_of(written("damaged.pth", content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in refusal_of(str(tmp_path / "nowhere.pth"))
    assert "is a folder" in refusal_of(str(tmp_path))


def _tar(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("weights.pth")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _numpy_archive():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


def _torchscript():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


OTHER_FILES = {
    "is empty (0 bytes)": lambda: b"",
    "truncated or damaged, or no file of torch.save": lambda: b"not weights",
    "is a web page": lambda: b"<!DOCTYPE html><html></html>",
    "Git LFS's pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "by gzip; unpack it": lambda: gzip.compress(b"weights"),
    "is a tar archive; unpack it": lambda: _tar(b"weights"),
    "not torch.save's (it holds a.npy)": _numpy_archive,
    "is a TorchScript archive, which holds code": _torchscript,
    "is a plain pickle, not": lambda: pickle.dumps({"g_a.0.weight": torch.ones(2)}),
    "is a plain pickle, not written": lambda: pickle.dumps([0.1] * 9, protocol=2),
}


@pytest.mark.parametrize("reason", OTHER_FILES)
@pytest.mark.filterwarnings("ignore")
def test_other_files_are_refused_by_what_they_are(written, reason):
    assert reason in refusal_of(written("weights.pth", OTHER_FILES[reason]()))


def test_contents_without_weights_are_refused_by_what_they_are(saved, trained):
    cases = {
        "holds no state dict of a model (it is empty)": {},
        "holds no state dict of a model (iter)": {"iter": 3},
        "holds no state dict of a model, but a list": [1, 2],
        "holds no state dict of a model, but a Tensor": torch.ones(3),
        "an optimizer's state, but no weights": trained.state_dict(),
        "an optimizer's state, but no weights of a": {"optimizer": trained.state_dict()},
    }
    for reason, content in cases.items():
        assert reason in refusal_of(saved(content))


def test_unknown_weights_are_refused_with_what_they_are_closest_to(saved, network):
    weights = network.state_dict()
    autoregressive = JointAutoregressiveHierarchicalPriors(8, 12).state_dict()
    cases = {
        "mbt2018-mean (no h_s.0.weight)": {
            k: v for k, v in weights.items() if not k.startswith("h_s")
        },
        "mbt2018-mean (it has no Gain.weight)": {**weights, "Gain.weight": torch.ones(2)},
        "mbt2018 (no context_prediction.weight)": {
            k: v for k, v in autoregressive.items() if k != "context_prediction.weight"
        },
        "(no ": {"a": torch.ones(1)},
    }
    for reason, content in cases.items():
        message = refusal_of(saved(content))
        assert "not the weights of a known architecture; the closest is " in message
        assert reason in message
        assert "; a class of your own needs architecture = FILE.py:CLASS" in message
    variable_rate = refusal_of(saved(MeanScaleHyperpriorVbr(8, 12).state_dict()))
    assert "a variable-rate model (Vbr), which is not known here" in variable_rate


def test_weights_whose_tensors_do_not_fit_their_architecture_are_refused(saved, network):
    weights = network.state_dict()
    cases = {
        "(no entropy_bottleneck._offset)": {k: v for k, v in weights.items() if "_offset" not in k},
        "(size mismatch for g_s.0.weight": {**weights, "g_s.0.weight": torch.ones(3, 3, 5, 5)},
        "(size mismatch for ": {**weights, "g_a.0.weight": torch.ones(3)},
        "(": {**weights, "g_a.6.weight": torch.tensor(1.0)},
    }
    for reason, content in cases.items():
        message = refusal_of(saved(content))
        assert "not the weights of mbt2018-mean (" in message
        assert reason in message


def test_sparse_weights_are_refused(saved, network):
    sparse = {k: v.to_sparse() for k, v in network.state_dict().items()}
    assert "not the weights of " in refusal_of(saved(sparse))


def test_an_architecture_that_does_not_exist_is_refused_by_those_that_do():
    with pytest.raises(InputError, match=r"architecture mbt: did you mean mbt2018\? It must be"):
        load_checkpoint(str(WEIGHTS), architecture="mbt")


def test_weights_that_are_not_finite_are_refused(saved, network):
    broken = network.state_dict()
    broken["g_s.0.bias"] = torch.full_like(broken["g_s.0.bias"], float("nan"))
    assert "g_s.0.bias holds NaN" in refusal_of(saved(broken))


def test_channels_that_the_weights_do_not_have_are_refused():
    with pytest.raises(InputError, match="has N = 64, M = 192, but channels asks for N = 192"):
        load_checkpoint(str(WEIGHTS), Channels(N=192, M=192))
