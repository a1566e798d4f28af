"""The model's steps against CompressAI's own forward and float64 autograd, and its weights."""

import copy
import re
import urllib.error

import numpy as np
import pytest
import skimage
import torch
from compressai.layers import GDN
from compressai.models import (
    Cheng2020Anchor,
    Cheng2020AnchorCheckerboard,
    Cheng2020Attention,
    Elic2022Chandelier,
    Elic2022Official,
    FactorizedPrior,
    FactorizedPriorReLU,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)

from architectures import ARCHITECTURES, Group
from architectures.distributions import FactorizedPrior as Prior
from architectures.walk import rounded
from common.device import pick_device
from common.errors import InputError
from config import Channels
from conftest import WEIGHTS, assert_loads, to_x
from fast.freezing import FrozenGDN
from models import build_model, freeze, load_checkpoint
from passes import LMBDA, problem_of, to_optimise, true_terms


def test_true_pass_is_compressais_forward(model):
    """Same rate and picture as the stock model in eval mode, on a size it takes (64s)."""
    x = to_x(skimage.data.astronaut()[128:320, 128:256])
    ours = true_terms(model, x, model.analyze(x))
    with torch.no_grad():
        stock = load_checkpoint(str(WEIGHTS)).network(x)
    bpps = {name: -p.log2().sum() / (192 * 128) for name, p in stock["likelihoods"].items()}
    bpp = sum(bpps.values())
    mse = (stock["x_hat"] - x).square().mean()
    torch.testing.assert_close(ours.x_hat, stock["x_hat"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.bpp[0], bpp, atol=0, rtol=1e-5)
    torch.testing.assert_close(ours.mse[0], mse, atol=0, rtol=1e-5)
    torch.testing.assert_close(ours.loss[0], bpp + LMBDA * 255**2 * mse, atol=0, rtol=1e-5)
    assert ours.rates.keys() == bpps.keys()
    for name, rate in ours.rates.items():
        torch.testing.assert_close(rate[0], bpps[name], atol=0, rtol=1e-5)


def test_the_encoder_continues_odd_sizes_by_their_border(model):
    """On a photo of odd size this start beats the encoder's own, zero-padded inside a block."""
    x = to_x(skimage.data.chelsea()[:289, :449])
    y = model.network.g_a(x)
    plain = {"y": y, "z": model.network.h_a(y)}
    ours = model.analyze(x)
    assert {name: v.shape for name, v in ours.items()} == {k: v.shape for k, v in plain.items()}
    losses = [true_terms(model, x, latents).loss.item() for latents in (ours, plain)]
    assert losses[0] < 0.9 * losses[1]


def test_the_border_of_z_costs_no_more_than_the_rest(model):
    """z comes from y continued to multiples of 4, as in training; else zeros would lie within."""
    losses = []
    for right in (16, 32, 48):
        x = to_x(skimage.data.astronaut()[: 320 + right, : 256 + right])
        ours = model.analyze(x)
        y = ours["y"]
        wider, higher = (-side % 4 for side in (y.size(3), y.size(2)))
        last = torch.cat([y, *[y[..., -1:]] * wider], dim=3)
        whole = torch.cat([last, *[last[:, :, -1:]] * higher], dim=2)
        torch.testing.assert_close(ours["z"], model.network.h_a(whole), atol=1e-4, rtol=1e-4)
        plain = {"y": y, "z": model.network.h_a(y)}
        losses.append([true_terms(model, x, latents).bpp.item() for latents in (ours, plain)])
    with_care, without = np.mean(losses, axis=0)
    assert with_care < 0.995 * without


def test_a_batch_is_its_images(model):
    x = to_x(skimage.data.astronaut()[:64, :192])
    pair = torch.cat(x.split(96, dim=3))
    together = true_terms(model, pair, model.analyze(pair)).loss
    alone = [true_terms(model, one, model.analyze(one)).loss for one in pair.split(1)]
    assert alone[0] != alone[1]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (17, 16), (63, 65), (100, 37)])
def test_every_size_works(small, size):
    x = torch.rand(1, 3, *size)
    latents = to_optimise(small.analyze(x))
    assert {name: tuple(v.shape) for name, v in latents.items()} == {
        "y": (1, 12, -(-size[0] // 16), -(-size[1] // 16)),
        "z": (1, 8, -(-size[0] // 64), -(-size[1] // 64)),
    }
    terms = problem_of(small, x).relaxed(latents, lambda v: v)
    assert terms.x_hat.shape == x.shape
    terms.loss.sum().backward()
    assert latents["y"].grad.isfinite().all()
    assert latents["z"].grad.abs().sum() > 0


def test_frozen_networks_collect_no_gradients(small):
    """Neither by their parameters nor by the buffers that most weights of a frozen one are."""
    trainable = copy.deepcopy(small)
    trainable.network.train().requires_grad_(True)
    frozen = freeze(trainable)
    x = torch.rand(1, 3, 64, 64)
    latents = to_optimise(frozen.analyze(x))
    problem_of(frozen, x).relaxed(latents, lambda v: v).loss.sum().backward()
    assert all(v.grad.abs().sum() > 0 for v in latents.values())
    network = frozen.network
    weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert {"g_a.0.weight", "h_a.0.weight", "h_s.0.weight"} < weights.keys()
    assert {"g_s.layers.0.weight", "g_s.layers.1.gamma"} < weights.keys()
    assert {"g_s.to_picture.upsampling.weight", "g_s.to_picture.gamma"} < weights.keys()
    assert {"entropy_bottleneck.matrix_0", "entropy_bottleneck.quantiles"} < weights.keys()
    for name, v in weights.items():
        assert not v.requires_grad and v.grad is None, name
    assert not any(part.training for part in network.modules())


@pytest.mark.parametrize("inverse", [False, True])
def test_frozen_gdn_is_compressais(inverse):
    """Value and gradient in float64, with weights at and above their lower bounds."""
    torch.manual_seed(0)
    gdn = GDN(6, inverse=inverse).double()
    with torch.no_grad():
        gdn.gamma += torch.rand(6, 6) * 0.2 - 0.05
        gdn.beta += torch.rand(6) - 0.5
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    ours, theirs = FrozenGDN(gdn)(x), gdn(x)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(x)
    (our_grad,) = torch.autograd.grad(ours, x, weight, retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs, x, weight)
    torch.testing.assert_close(our_grad, their_grad)


def test_latents_lie_on_the_lattice_that_a_coder_codes(small):
    """CompressAI's own quantisation gives the same values and the same symbols."""
    x = torch.rand(1, 3, 80, 70)
    latents = {name: 3 * v for name, v in small.analyze(x).items()}
    terms, symbols = true_terms(small, x, latents), small.symbols(latents, (80, 70))
    bottleneck = small.network.entropy_bottleneck
    conditional = small.network.gaussian_conditional
    z_hat, _ = bottleneck(latents["z"])
    torch.testing.assert_close(terms.walk.values["z"], z_hat)
    _, means = small.network.h_s(z_hat)[:, :, :5, :5].chunk(2, 1)
    y_hat = conditional.quantize(latents["y"], "dequantize", means)
    torch.testing.assert_close(terms.walk.values["y"], y_hat)
    medians = bottleneck.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
    coded = {
        "z": bottleneck.quantize(latents["z"], "symbols", medians),
        "y": conditional.quantize(latents["y"], "symbols", means),
    }
    assert symbols.keys() == coded.keys()
    for name, integers in coded.items():
        assert integers.unique().numel() > 2
        assert symbols[name].dtype == torch.int32
        assert torch.equal(symbols[name], integers)


def test_rounding_around_a_centre_moves_the_lattice():
    v, centre = torch.tensor([0.9, -2.2]), torch.tensor([0.25, 0.25])
    value = rounded({"y": v}, torch.round)(Group("y", centre, None))
    torch.testing.assert_close(value, torch.tensor([1.25, -1.75]))


def _prior_of(model):
    return Prior(model.network.entropy_bottleneck)


def test_likelihood_of_z_is_compressais_where_float64_resolves_it(small):
    model = copy.deepcopy(small)
    model.network.double()
    z_hat = torch.linspace(-12, 12, 49, dtype=torch.float64).reshape(1, 1, 7, 7).repeat(1, 8, 1, 1)
    ours = _prior_of(model).likelihood(z_hat)
    flat = z_hat.transpose(0, 1).reshape(8, 1, -1)
    theirs = model.network.entropy_bottleneck._likelihood(flat)[0]
    theirs = theirs.reshape(8, 1, 7, 7).transpose(0, 1)
    torch.testing.assert_close(ours, theirs.clamp_min(1e-9), rtol=1e-6, atol=1e-15)


def test_likelihood_of_z_has_a_correct_gradient():
    model = build_model(Channels(N=2, M=3))
    model.network.double()
    z_hat = torch.tensor([-2.0, -0.4, 0.3, 3.0], dtype=torch.float64).reshape(1, 2, 1, 2)
    assert torch.autograd.gradcheck(_prior_of(model).likelihood, z_hat.requires_grad_())


@pytest.mark.parametrize("far", [-60.0, 60.0])
def test_a_latent_far_out_finds_its_way_back(small, far):
    """Both tails must pull inwards, where CompressAI's upper tail has gradient 0 in float32."""
    z_hat = torch.full((1, 8, 1, 1), far, requires_grad=True)
    (-_prior_of(small).likelihood(z_hat).log2()).sum().backward()
    assert (z_hat.grad.sign() == torch.sign(torch.tensor(far))).all()


def test_the_centre_of_the_prior_is_likely():
    """At the point where both sigmoids mirror each other the likelihood must not vanish."""
    model = build_model(Channels(N=4, M=4))
    with torch.no_grad():
        for bias in model.network.entropy_bottleneck.biases:
            bias.zero_()
    assert (_prior_of(model).likelihood(torch.zeros(1, 4, 1, 1)) > 1e-3).all()


# --- weights of every architecture ----------------------------------------------------------------


def _older(weights, **names):
    """The weights under older names of the bottleneck's parameters, by the newest ones."""
    for new, old in names.items():
        weights = {k.replace(f"k.{new}.", f"k.{old}"): v for k, v in weights.items()}
    return weights


def _before_1_2_8(weights):
    return _older(weights, matrices="_matrix", biases="_bias", factors="_factor")


def _before_1_0(weights):
    return _older(weights, matrices="_matrices.", biases="_biases.", factors="_factors.")


STOCK = {
    "bmshj2018-factorized": lambda: FactorizedPrior(8, 12),
    "bmshj2018-factorized-relu": lambda: FactorizedPriorReLU(8, 12),
    "bmshj2018-hyperprior": lambda: ScaleHyperprior(8, 12),
    "mbt2018-mean": lambda: MeanScaleHyperprior(8, 12),
    "mbt2018": lambda: JointAutoregressiveHierarchicalPriors(8, 12),
    "cheng2020-anchor": lambda: Cheng2020Anchor(8),
    "cheng2020-attn": lambda: Cheng2020Attention(8),
    "cheng2020-anchor-checkerboard": lambda: Cheng2020AnchorCheckerboard(8),
    "elic2022-official": lambda: Elic2022Official(8, 12, [3, 5, 4]),
    "elic2022-chandelier": lambda: Elic2022Chandelier(8, 12, [3, 5, 4]),
}


@pytest.mark.parametrize("name", STOCK)
def test_every_architecture_is_known_by_its_weights(saved, name):
    """CompressAI's own classes, which no other name than theirs accepts."""
    assert STOCK.keys() == ARCHITECTURES.keys()
    stock = STOCK[name]()
    weights = stock.state_dict()
    source = saved({"state_dict": {f"module.{k}": v for k, v in weights.items()}})
    assert load_checkpoint(source).name == name
    assert type(load_checkpoint(source, architecture=name).network) is type(stock)
    assert_loads(source, stock)
    assert_loads(saved(_before_1_2_8(weights)), stock)
    if "entropy_bottleneck.quantiles" in weights:  # latent codecs are younger than the old names
        assert_loads(saved(_before_1_0(weights)), stock)
    for other in STOCK.keys() - {name}:
        reason = re.escape(f"not the weights of {other} (they are of {name})")
        with pytest.raises(InputError, match=reason):
            load_checkpoint(source, architecture=other)


def test_groups_that_the_weights_do_not_have_are_refused(saved, small):
    source = saved(STOCK["elic2022-official"]().state_dict())
    assert load_checkpoint(source, Channels(N=8, M=12, groups=[3, 5, 4])).groups == [3, 5, 4]
    message = r"has the groups \[3, 5, 4\], but channels asks for the groups \[3, 4, 5\]"
    with pytest.raises(InputError, match=message):
        load_checkpoint(source, Channels(N=8, M=12, groups=[3, 4, 5]))
    with pytest.raises(InputError, match="has no groups, but channels asks for the groups"):
        load_checkpoint(saved(small.network.state_dict()), Channels(N=8, M=12, groups=[12]))


# --- CompressAI's zoo -----------------------------------------------------------------------------


def test_the_zoo_says_what_to_do_without_a_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("compressai.zoo.image.load_state_dict_from_url", unreachable)
    with pytest.raises(InputError, match=r"cannot download .* connect to the network once"):
        load_checkpoint("zoo:mbt2018-mean:4")


# Each model's class, and its N and M at quality 3. CompressAI has no weights of
# bmshj2018-factorized-relu: its function of this name loads those of the model with GDN.
ZOO = {
    "bmshj2018-factorized": (FactorizedPrior, 128, 192),
    "bmshj2018-hyperprior": (ScaleHyperprior, 128, 192),
    "mbt2018-mean": (MeanScaleHyperprior, 128, 192),
    "mbt2018": (JointAutoregressiveHierarchicalPriors, 192, 192),
    "cheng2020-anchor": (Cheng2020Anchor, 128, 128),
    "cheng2020-attn": (Cheng2020Attention, 128, 128),
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("metric", ["", ":mse", ":ms-ssim"])
def test_the_zoo_loads_by_name(monkeypatch, name, metric):
    """CompressAI's own loading, with a download that gives random weights of the zoo's size."""
    (network_class, N, M), asked = ZOO[name], []

    def download(url, progress):
        asked.append(url)
        channels = (N,) if N == M == 128 else (N, M)
        return _before_1_2_8(network_class(*channels).state_dict())

    monkeypatch.setattr("compressai.zoo.image.load_state_dict_from_url", download)
    loaded = load_checkpoint(f"zoo:{name}:3{metric}")
    assert (loaded.name, loaded.N, loaded.M) == (name, N, M)
    assert type(loaded.network) is network_class
    (url,) = asked
    file = url.rpartition("/")[2].replace("_", "-")
    assert file.startswith(f"{name}-")
    assert ("-ms-ssim-" in file) == (metric == ":ms-ssim")
    assert re.search(r"-3-\w+\.pth\.tar$", file)


@pytest.mark.parametrize(
    "name",
    [
        "zoo:",
        "zoo:a:1:b",
        "zoo:elic2022-official:1",
        "zoo:bmshj2018-factorized-relu:1",
        "zoo:mbt2018:3:psnr",
        "zoo:mbt2018:3:mse:x",
    ],
)
def test_other_zoo_names_are_refused(monkeypatch, name):
    monkeypatch.setattr("compressai.zoo.image.load_state_dict_from_url", None)  # nothing is loaded
    message = r"must be zoo:NAME:QUALITY, or zoo:NAME:QUALITY:ms-ssim; NAME is one of (.*)"
    with pytest.raises(InputError, match=message) as refused:
        load_checkpoint(name)
    assert {*re.search(message, str(refused.value))[1].split(", ")} == ZOO.keys()


@pytest.mark.parametrize(
    ("name", "best"),
    [("mbt2018-mean", 8), ("mbt2018-mean:9", 8), ("mbt2018:0", 8), ("cheng2020-anchor:7", 6)],
)
def test_other_qualities_of_the_zoo_are_refused(name, best):
    with pytest.raises(InputError, match=f"{name.partition(':')[0]} has the qualities 1 to {best}"):
        load_checkpoint(f"zoo:{name}")


def test_a_model_of_the_zoo_that_is_of_another_architecture_is_refused(monkeypatch):
    monkeypatch.setattr("compressai.zoo.image.load_state_dict_from_url", None)  # nothing is loaded
    with pytest.raises(InputError, match="zoo:mbt2018:3: not the weights of mbt2018-mean"):
        load_checkpoint("zoo:mbt2018:3", architecture="mbt2018-mean")


# --- devices --------------------------------------------------------------------------------------


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="device = 'gpu': must be auto, cpu, cuda"):
        pick_device("gpu")
