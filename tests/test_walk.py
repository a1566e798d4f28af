"""The walk through a model's groups; and a second family of models, which is one class more."""

import copy
import json

import numpy as np
import pytest
import skimage
import torch
from compressai.models import ScaleHyperprior

from architectures import ARCHITECTURES, Architecture, Group, architecture
from architectures.distributions import FactorizedPrior, Gaussians
from coding.bitstream import read_bitstream
from coding.coder import build_coder, decode_latents, decode_picture, encode_latents
from config import Channels, RefineConfig, load_config
from conftest import read_jsonl, refusal_of, to_x
from models import build_model, freeze, load_checkpoint, save_weights
from objectives import RateDistortion
from passes import problem_of, refined, true_terms
from pretraining.training_pass import TrainingPass
from runs import NAMES, results, run
from trainings import assert_same, checkpoint_of, folder_of

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


# --- a second family ------------------------------------------------------------------------------


class ScaleOnly(Architecture):
    """The scale hyperprior of arXiv 1802.01436: y lies on the integers, and h_a takes |y|."""

    network_class = ScaleHyperprior

    @classmethod
    def mismatch(cls, weights):
        last, middle = weights.get("h_s.4.weight"), weights.get("g_a.6.weight")
        if last is None or middle is None or len(last) != len(middle):
            return "h_s does not give one scale for each channel of y"
        return ""

    def latent_shapes(self, size):
        height, width = size
        return {
            "y": (1, self.M, -(-height // 16), -(-width // 16)),
            "z": (1, self.N, -(-height // 64), -(-width // 64)),
        }

    def encode(self, x, g_a):
        y = g_a(x)
        return {"y": y, "z": self.network.h_a(y.abs())}

    def walk(self, size, value_of):
        prior = FactorizedPrior(self.network.entropy_bottleneck)
        z_hat = value_of(Group("z", prior.medians, prior))
        height, width = self.latent_shapes(size)["y"][2:]
        scales = self.network.h_s(z_hat)[:, :, :height, :width]
        zeros = torch.zeros_like(scales)
        gaussians = Gaussians(self.network.gaussian_conditional, scales, zeros)
        return value_of(Group("y", zeros, gaussians))


@pytest.fixture
def family():
    """The name of a second family, known for one test."""
    known = dict(ARCHITECTURES)
    architecture("scale hyperprior")(ScaleOnly)
    yield ScaleOnly.name
    ARCHITECTURES.clear()
    ARCHITECTURES.update(known)


@pytest.fixture
def scale_only(family):
    """A model of it, whose symbols are not all zero, as after training."""
    torch.manual_seed(0)
    model = build_model(Channels(N=8, M=12), family)
    with torch.no_grad():
        model.network.entropy_bottleneck.quantiles[:, 0, 1] = torch.linspace(-1.3, 1.4, 8)
        for layer, gain in ((model.network.g_a[-1], 100), (model.network.h_a[-1], 3)):
            layer.weight *= gain
    model.network.eval().requires_grad_(False)
    return model


def test_a_second_family_has_compressais_rate_and_picture(scale_only):
    x = to_x(skimage.data.astronaut()[128:320, 128:256])
    with torch.no_grad():
        stock = scale_only.network(x)
    bpps = {name: -p.log2().sum() / (192 * 128) for name, p in stock["likelihoods"].items()}
    frozen = freeze(copy.deepcopy(scale_only))
    for model in (scale_only, frozen):
        latents = model.analyze(x)
        terms = true_terms(model, x, latents)
        for name, bpp in bpps.items():
            torch.testing.assert_close(terms.rates[name][0], bpp, rtol=1e-4, atol=0)
        close = 1e-5 * stock["x_hat"].abs().max().item()
        torch.testing.assert_close(terms.x_hat, stock["x_hat"], rtol=0, atol=close)
        symbols = model.symbols(latents, (192, 128))
        assert all(v.unique().numel() > 5 for v in symbols.values())
        assert torch.equal(symbols["y"], latents["y"].round().int())
        x_hat = model.reconstruct(symbols, (192, 128), tile=4)
        torch.testing.assert_close(x_hat, stock["x_hat"].clamp(0, 1), rtol=0, atol=close)


def test_a_second_family_is_coded_as_compressai_codes_it(scale_only):
    coder = build_coder(scale_only)
    x = to_x(skimage.data.astronaut()[128:320, 128:256])
    symbols = coder.model.symbols(coder.model.analyze(x), (192, 128))
    data = encode_latents(coder, symbols, (192, 128))
    decoded, _ = decode_latents(coder, data)
    assert all(torch.equal(decoded[name], v) for name, v in symbols.items())
    parts = read_bitstream(data)
    with torch.no_grad():
        stock = coder.model.network.decompress([[parts.y_string], [parts.z_string]], (3, 2))
    assert torch.equal(decode_picture(coder, data), stock["x_hat"])


def test_a_second_family_is_refined_and_polished(scale_only, config_values, write_config):
    overrides = ["polish_passes=3", "optimizer.lr=0.1", "tot_inference_iterations=20"]
    config = load_config(write_config(config_values), RefineConfig, overrides)
    x = to_x(skimage.data.coffee()[100:171, 200:281])
    problem = problem_of(freeze(scale_only), x)
    (trajectory,) = refined(problem, config, [1])
    base, *_, before, polished = trajectory.rows
    assert before["true_loss"] < base["true_loss"]
    assert polished["true_loss"] < before["true_loss"]
    assert {name: v.shape for name, v in trajectory.latents.items()} == {
        "y": (1, 12, 5, 6), "z": (1, 8, 2, 2)
    }  # fmt: skip


def test_a_run_finds_a_second_family_by_its_weights(
    scale_only, config_values, write_config, tmp_path, photos
):
    weights = tmp_path / "weights.pth.tar"
    save_weights(weights, scale_only, 0)
    path = write_config(config_values | {"pretrain": str(weights), "save_bitstreams": True})
    assert run(path) == 0
    folder = results(config_values)
    loaded = load_checkpoint(str(weights))
    assert isinstance(loaded, ScaleOnly)
    coder = build_coder(loaded)
    records = read_jsonl(folder / "images.jsonl")
    assert [record["name"] for record in records] == NAMES
    for record in records:
        assert record["refined"]["true_loss"] < record["base"]["true_loss"]
        data = (folder / "bitstreams" / f"{record['name']}.olc").read_bytes()
        symbols, _ = decode_latents(coder, data)
        stored = np.load(folder / "latents" / f"{record['name']}.npz")
        assert all(np.array_equal(stored[name], v[0]) for name, v in symbols.items())


def test_a_second_family_learns_by_compressais_own_pass(scale_only, monkeypatch):
    """One picture, the same noise: the loss, each rate, and the gradient of every weight."""
    ours = scale_only
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
    assert [len(noise) for noise in noises] == [8 * 3 * 2, 12 * 12 * 8]
    bpps = {name: -p.log2().sum() / (192 * 128) for name, p in out["likelihoods"].items()}
    mse = (out["x_hat"] - x).square().mean()
    expected = {
        "bpp_y": bpps["y"], "bpp_z": bpps["z"], "bpp": bpps["y"] + bpps["z"],
        "psnr": -10 * mse.log10(), "loss": bpps["y"] + bpps["z"] + 0.02 * 255**2 * mse,
        "aux_loss": stock.aux_loss(),
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


def test_a_second_family_is_trained_from_its_weights(scale_only, train_on, train_values, tmp_path):
    """No key of the config names a family: `pretrain` and checkpoints are known by their weights.

    A new training is of the mean-scale hyperprior.
    """
    start = tmp_path / "start.pth.tar"
    save_weights(start, scale_only, 0)
    train_values |= {"pretrain": str(start), "print_freq": 1, "save_model_freq": 2}
    assert train_on(train_values, tot_iterations=4, save_name="unbroken") == 0
    assert train_on(train_values, tot_iterations=2) == 0
    assert train_on(train_values, tot_iterations=4, resume=True) == 0
    assert_same(
        checkpoint_of(train_values, 4, save_name="unbroken"), checkpoint_of(train_values, 4)
    )
    path = folder_of(train_values) / "iter_4.pth.tar"
    before, after = load_checkpoint(str(start)), load_checkpoint(str(path))
    assert isinstance(before, ScaleOnly) and isinstance(after, ScaleOnly)
    assert isinstance(load_checkpoint(str(path.with_name("weights.pth.tar"))), ScaleOnly)
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


def test_a_family_that_is_not_registered_is_refused(scale_only, saved):
    source = saved(scale_only.network.state_dict())
    assert isinstance(load_checkpoint(source), ScaleOnly)
    del ARCHITECTURES[ScaleOnly.name]
    assert "a scale hyperprior, as bmshj2018-hyperprior" in refusal_of(source)
