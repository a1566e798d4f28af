"""The walk through a model's groups; and a family of the user's own, which is one class more."""

import copy
import json
import re

import numpy as np
import pytest
import skimage
import torch

import codec
from architectures import ARCHITECTURES
from architectures.own import find_family
from coding.bitstream import read_bitstream
from coding.coder import build_coder, decode_latents, decode_picture, encode_latents
from common.errors import InputError
from config import Channels, RefineConfig, load_config
from conftest import read_jsonl, refusal_of, to_x
from models import build_model, freeze, load_checkpoint, save_weights
from objectives import RateDistortion
from passes import problem_of, refined, true_terms
from pretraining.training_pass import TrainingPass
from runs import NAMES, results, run
from trainings import assert_same, checkpoint_of, folder_of

pytestmark = pytest.mark.usefixtures("without_run_plots")

SIZE = (100, 70)


@pytest.fixture
def latents():
    """Latents of `small` for a picture of `SIZE`, far from zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"y": (2, 12, 7, 5), "z": (2, 8, 2, 2)}
    return {name: 4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_walk_asks_for_z_and_then_for_y(small, latents):
    """What is asked first decides what y is coded with, as CompressAI's own parts have it."""
    asked = []

    def value_of(group):
        asked.append(group.name)
        return latents[group.name]

    walk = small.visit(SIZE, value_of)
    assert asked == [group.name for group in walk.groups] == ["z", "y"]
    network = small.network
    bottleneck, conditional = network.entropy_bottleneck, network.gaussian_conditional
    scales, means = network.h_s(latents["z"])[:, :, :7, :5].chunk(2, 1)
    of_z, of_y = walk.groups
    assert torch.equal(of_z.centre.flatten(), bottleneck.quantiles[:, 0, 1])
    assert torch.equal(of_y.centre, means)
    assert walk.y_hat is walk.values["y"] is latents["y"]
    likelihoods = walk.likelihoods
    assert list(likelihoods) == ["z", "y"]
    flat = latents["z"].transpose(0, 1).flatten(1)[:, None]  # [N, 1, B h' w']
    p_z = bottleneck.double()._likelihood(flat.double())[0].reshape(8, 2, 2, 2).transpose(0, 1)
    bottleneck.float()
    p_y = conditional._likelihood(latents["y"], scales, means)
    for name, p in (("z", p_z.float()), ("y", p_y)):
        torch.testing.assert_close(likelihoods[name], p.clamp_min(1e-9), rtol=1e-4, atol=1e-8)


def test_known_symbols_and_hard_rounding_walk_alike(small, latents):
    rounded = small.round(latents, torch.round, SIZE)
    placed = small.place(small.symbols(latents, SIZE), SIZE)
    for name, value in rounded.values.items():
        torch.testing.assert_close(placed.values[name], value)
        torch.testing.assert_close(placed.likelihoods[name], rounded.likelihoods[name])
        assert (value - latents[name]).abs().max() <= 0.5 + 1e-5
        assert (value - latents[name]).abs().max() > 0.4
    assert placed.values.keys() == rounded.values.keys() == latents.keys()
    torch.testing.assert_close(placed.y_hat, rounded.y_hat)


# --- a family of one's own ------------------------------------------------------------------------

# The network has CompressAI's forward, as its author writes it. The family knows the walk alone.
OWN = '''
import torch
from compressai.models import MeanScaleHyperprior
from torch import nn

from architectures import Architecture, Group, Part
from architectures.distributions import FactorizedPrior, Gaussians


class HalvesNetwork(MeanScaleHyperprior):
    """The first half of y's channels also tells where the second half lies."""

    def __init__(self, N, M):
        super().__init__(N, M)
        self.to_means = nn.Conv2d(M // 2, M - M // 2, 3, padding=1)

    @classmethod
    def from_state_dict(cls, weights):
        network = cls(len(weights["g_a.0.weight"]), len(weights["g_a.6.weight"]))
        network.load_state_dict(weights)
        return network

    def forward(self, x):
        y = self.g_a(x)
        z_hat, p_z = self.entropy_bottleneck(self.h_a(y))
        scales, means = self.h_s(z_hat).chunk(2, 1)
        half = self.M // 2
        first, p_first = self.gaussian_conditional(y[:, :half], scales[:, :half], means[:, :half])
        means = means[:, half:] + self.to_means(first)
        second, p_second = self.gaussian_conditional(y[:, half:], scales[:, half:], means)
        x_hat = self.g_s(torch.cat((first, second), 1))
        return {"x_hat": x_hat, "likelihoods": {"y": torch.cat((p_first, p_second), 1), "z": p_z}}


class Halves(Architecture):
    network_class = HalvesNetwork
    exact_parts = ("h_s", "to_means")
    halo = 2

    def latent_shapes(self, size):
        height, width = size
        return {
            "y": (1, self.M, -(-height // 16), -(-width // 16)),
            "z": (1, self.N, -(-height // 64), -(-width // 64)),
        }

    def encode(self, x, g_a):
        y = g_a(x)
        return {"y": y, "z": self.network.h_a(y)}

    def walk(self, size, value_of):
        prior = FactorizedPrior(self.network.entropy_bottleneck)
        z_hat = value_of(Group("z", prior.medians, prior))
        height, width = self.latent_shapes(size)["y"][2:]
        scales, means = self.network.h_s(z_hat)[:, :, :height, :width].chunk(2, 1)
        half, conditional = self.M // 2, self.network.gaussian_conditional
        gaussians = Gaussians(conditional, scales[:, :half], means[:, :half])
        first = value_of(Group("y", means[:, :half], gaussians, Part(slice(0, half))))
        means = means[:, half:] + self.network.to_means(first)
        gaussians = Gaussians(conditional, scales[:, half:], means)
        second = value_of(Group("y", means, gaussians, Part(slice(half, None))))
        return torch.cat((first, second), 1)
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The family as the key `architecture` names it."""
    path = tmp_path_factory.mktemp("own") / "halves.py"
    path.write_text(OWN)
    return f"{path}:Halves"


@pytest.fixture
def halves(own):
    """A model of it, whose symbols are not all zero, as after training."""
    torch.manual_seed(0)
    model = build_model(Channels(N=8, M=12), own)
    network = model.network
    with torch.no_grad():
        network.entropy_bottleneck.quantiles[:, 0, 1] = torch.linspace(-1.3, 1.4, 8)
        for layer, gain in ((network.g_a[-1], 100), (network.h_a[-1], 3), (network.to_means, 3)):
            layer.weight *= gain
        network.h_s[-1].bias[:12] = 2  # the scales
    network.eval().requires_grad_(False)
    return model


def assert_is_halves(model):
    assert (model.name, type(model).__name__) == ("Halves", "Halves")
    assert "to_means.weight" in dict(model.network.named_parameters())


def test_the_parts_of_a_latent_are_groups(halves):
    x = to_x(skimage.data.coffee()[100:171, 200:281])
    walk = halves.round(halves.analyze(x), torch.round, (71, 81))
    assert [group.name for group in walk.groups] == ["z", "y", "y"]
    assert [v.shape for v in walk.group_values] == [(1, 8, 2, 2), (1, 6, 5, 6), (1, 6, 5, 6)]
    assert torch.equal(walk.values["y"], torch.cat(walk.group_values[1:], 1))
    assert torch.equal(walk.y_hat, walk.values["y"])
    _, first, second = walk.group_likelihoods
    assert torch.equal(walk.likelihoods["y"], torch.cat((first, second), 1))
    params = halves.network.h_s(walk.values["z"])[:, 18:, :5, :6]
    means = params + halves.network.to_means(walk.group_values[1])
    torch.testing.assert_close(walk.groups[2].centre, means)
    assert (means - params).abs().max() > 0.5


def test_an_own_family_has_the_rate_and_picture_of_its_forward(halves):
    x = to_x(skimage.data.astronaut()[128:320, 128:256])
    with torch.no_grad():
        stock = halves.network(x)
    bpps = {name: -p.log2().sum() / (192 * 128) for name, p in stock["likelihoods"].items()}
    frozen = freeze(copy.deepcopy(halves))
    close = 1e-5 * stock["x_hat"].abs().max().item()
    for model in (halves, frozen):
        latents = model.analyze(x)
        terms = true_terms(model, x, latents)
        assert terms.rates.keys() == bpps.keys()
        for name, bpp in bpps.items():
            torch.testing.assert_close(terms.rates[name][0], bpp, rtol=1e-4, atol=0)
        torch.testing.assert_close(terms.x_hat, stock["x_hat"], rtol=0, atol=close)
        symbols = model.symbols(latents, (192, 128))
        assert all(v.unique().numel() > 5 for v in symbols.values())
        x_hat = model.reconstruct(symbols, (192, 128), tile=4)
        torch.testing.assert_close(x_hat, stock["x_hat"].clamp(0, 1), rtol=0, atol=close)


def test_an_own_family_is_coded_as_compressai_codes_it(halves):
    """CompressAI's coders read the strings, each with the tables that the strings before give."""
    coder = build_coder(halves)
    x = to_x(skimage.data.astronaut()[128:320, 128:256])
    symbols = coder.model.symbols(coder.model.analyze(x), (192, 128))
    data = encode_latents(coder, symbols, (192, 128))
    decoded, _ = decode_latents(coder, data)
    assert all(torch.equal(decoded[name], v) for name, v in symbols.items())
    bitstream, network = read_bitstream(data), coder.model.network
    assert bitstream.family == "Halves"
    z, *parts = ([group.string] for group in bitstream.groups)
    with torch.no_grad():
        scales, means = network.h_s(network.entropy_bottleneck.decompress(z, (3, 2))).chunk(2, 1)
        y_hat = torch.empty(1, 0, 12, 8)
        for strings, half in zip(parts, (slice(0, 6), slice(6, 12)), strict=True):
            centre = means[:, half] + (network.to_means(y_hat) if y_hat.size(1) else 0)
            indexes = network.gaussian_conditional.build_indexes(scales[:, half].contiguous())
            value = network.gaussian_conditional.decompress(strings, indexes, means=centre)
            y_hat = torch.cat((y_hat, value), 1)
        x_hat = network.g_s(y_hat).clamp(0, 1)
    assert torch.equal(decode_picture(coder, data), x_hat)


def test_an_own_family_is_refined_and_polished(halves, config_values, write_config):
    overrides = ["polish_passes=3", "optimizer.lr=0.1", "tot_inference_iterations=20"]
    config = load_config(write_config(config_values), RefineConfig, overrides)
    x = to_x(skimage.data.coffee()[100:171, 200:281])
    problem = problem_of(freeze(halves), x)
    (trajectory,) = refined(problem, config, [1])
    base, *_, before, polished = trajectory.rows
    assert before["true_loss"] < base["true_loss"]
    assert polished["true_loss"] < before["true_loss"]
    assert {name: v.shape for name, v in trajectory.latents.items()} == {
        "y": (1, 12, 5, 6), "z": (1, 8, 2, 2)
    }  # fmt: skip


def test_a_run_of_an_own_family_leaves_files_that_decode(
    halves, own, config_values, write_config, tmp_path, photos
):
    weights = tmp_path / "weights.pth.tar"
    save_weights(weights, halves, 0)
    values = config_values | {"pretrain": str(weights), "save_bitstreams": True}
    path = write_config(values | {"architecture": own})
    assert run(path) == 0
    folder = results(config_values)
    loaded = load_checkpoint(str(weights), architecture=own)
    assert_is_halves(loaded)
    coder = build_coder(loaded)
    records = read_jsonl(folder / "images.jsonl")
    assert [record["name"] for record in records] == NAMES
    for record in records:
        assert record["refined"]["true_loss"] < record["base"]["true_loss"]
        data = (folder / "bitstreams" / f"{record['name']}.olc").read_bytes()
        symbols, _ = decode_latents(coder, data)
        stored = np.load(folder / "latents" / f"{record['name']}.npz")
        assert all(np.array_equal(stored[name], v[0]) for name, v in symbols.items())
    command = ["decompress", str(folder / "bitstreams"), "--checkpoint", str(weights)]
    assert codec.main([*command, "-o", str(tmp_path / "decoded"), "--architecture", own]) == 0
    assert len(list((tmp_path / "decoded").iterdir())) == len(NAMES)


def test_an_own_family_learns_by_its_forward(halves, monkeypatch):
    """One picture, the same noise: the loss, each rate, and the gradient of every weight."""
    ours = halves
    ours.network.train().requires_grad_(True)
    stock = copy.deepcopy(ours.network)
    x = to_x(skimage.data.astronaut()[128:320, 128:256])
    drawn, noises = torch.Generator().manual_seed(0), []

    def uniform(self, low, high):
        assert (low, high) == (-0.5, 0.5)
        noises.append(torch.rand(self.numel(), generator=drawn) - 0.5)
        return self.copy_(noises[-1].reshape(self.shape))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    terms = TrainingPass(ours, RateDistortion(0.02))(x)
    again = iter(noises[:])
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda self, *_: self.copy_(next(again).reshape(self.shape))
    )
    out = stock(x)
    monkeypatch.undo()
    assert [len(noise) for noise in noises] == [8 * 3 * 2, 6 * 12 * 8, 6 * 12 * 8]
    bpps = {name: -p.log2().sum() / (192 * 128) for name, p in out["likelihoods"].items()}
    mse = (out["x_hat"] - x).square().mean()
    expected = {
        "bpp_y": bpps["y"], "bpp_z": bpps["z"], "bpp": bpps["y"] + bpps["z"],
        "psnr": -10 * mse.log10(), "loss": bpps["y"] + bpps["z"] + 0.02 * 255**2 * mse,
        "distortion": mse, "aux_loss": stock.aux_loss(),
    }  # fmt: skip
    assert terms.keys() == expected.keys()
    for key, value in expected.items():
        assert terms[key].item() == pytest.approx(value.item(), rel=1e-4), key
    for losses in (terms, expected):
        (losses["loss"] + losses["aux_loss"]).backward()
    theirs = dict(stock.named_parameters())
    for name, p in ours.network.named_parameters():
        gradient = theirs[name].grad
        assert gradient.abs().max() > 0, name
        close = 1e-3 * gradient.abs().max().item()
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=close, msg=name)


def test_an_own_family_is_trained_and_resumed(halves, own, train_on, train_values, tmp_path):
    start = tmp_path / "start.pth.tar"
    save_weights(start, halves, 0)
    train_values |= {"architecture": own, "pretrain": str(start), "print_freq": 1}
    train_values["save_model_freq"] = 2
    assert train_on(train_values, tot_iterations=4, save_name="unbroken") == 0
    assert train_on(train_values, tot_iterations=2) == 0
    assert train_on(train_values, tot_iterations=4, resume=True) == 0
    assert_same(
        checkpoint_of(train_values, 4, save_name="unbroken"), checkpoint_of(train_values, 4)
    )
    path = folder_of(train_values) / "iter_4.pth.tar"
    before, after, alone = (
        load_checkpoint(str(file), architecture=own)
        for file in (start, path, path.with_name("weights.pth.tar"))
    )
    for model in (before, after, alone):
        assert_is_halves(model)
    trained = dict(after.network.named_parameters())
    for name, p in before.network.named_parameters():
        assert not torch.equal(p, trained[name]), name
    assert train_on(train_values, test=True) == 0
    report = json.loads((folder_of(train_values) / "test.json").read_text())
    (cat,) = (record for record in report["images"] if record["name"] == "cat.png")
    with torch.no_grad():
        out = after.network(to_x(skimage.data.chelsea()[:192, :256]))
    bits = sum(-p.log2().sum().item() for p in out["likelihoods"].values())
    assert cat["bpp"] == pytest.approx(bits / (192 * 256), rel=1e-4)


def test_an_own_family_is_trained_from_scratch(own, train_on, train_values):
    train_values |= {"architecture": own, "path_test_data": "", "tot_iterations": 2}
    assert train_on(train_values) == 0
    weights = str(folder_of(train_values) / "weights.pth.tar")
    assert_is_halves(load_checkpoint(weights, architecture=own))


def test_a_family_that_no_config_names_is_refused(halves, own, saved):
    """It does not stay registered, so only the key `architecture` finds it."""
    known = dict(ARCHITECTURES)
    source = saved(halves.network.state_dict())
    assert_is_halves(load_checkpoint(source, architecture=own))
    assert known == ARCHITECTURES
    assert find_family(own).name not in ARCHITECTURES
    assert "the closest is mbt2018-mean (it has no to_means." in refusal_of(source)
    reason = re.escape("not the weights of Halves (they are of mbt2018-mean)")
    stock = saved(build_model(Channels(N=8, M=12)).network.state_dict())
    with pytest.raises(InputError, match=reason):
        load_checkpoint(stock, architecture=own)
