"""The model's steps against CompressAI's own forward and float64 autograd."""

import copy

import pytest
import skimage
import torch
from compressai.layers import GDN

from architectures import Latents
from common.device import pick_device
from common.errors import InputError
from config import Channels
from conftest import WEIGHTS, to_x
from experimental_inference_methods import hard_round
from fast.freezing import FrozenGDN
from models import (
    analyze,
    build_model,
    freeze,
    integer_latents,
    likelihood_z,
    load_checkpoint,
    medians_of,
    rd_pass,
    round_around,
)


def test_true_pass_is_compressais_forward(model):
    """Same rate and picture as the stock model in eval mode, on a size it takes (64s)."""
    x = to_x(skimage.data.astronaut()[128:320, 128:256])
    ours = rd_pass(model, x, analyze(model, x), hard_round, 0.01)
    with torch.no_grad():
        stock = load_checkpoint(str(WEIGHTS))(x)
    bpp = sum(-p.log2().sum() for p in stock["likelihoods"].values()) / (192 * 128)
    mse = (stock["x_hat"] - x).square().mean()
    torch.testing.assert_close(ours["x_hat"], stock["x_hat"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["bpp"][0], bpp, atol=0, rtol=1e-5)
    torch.testing.assert_close(ours["loss"][0], bpp + 0.01 * 255**2 * mse, atol=0, rtol=1e-5)
    torch.testing.assert_close(ours["bpp_y"] + ours["bpp_z"], ours["bpp"])


def test_the_encoder_continues_odd_sizes_by_their_border(model):
    """On a photo of odd size this start beats the encoder's own, zero-padded inside a block."""
    x = to_x(skimage.data.chelsea()[:289, :449])
    y = model.g_a(x)
    plain = Latents(y, model.h_a(y))
    ours = analyze(model, x)
    assert [v.shape for v in ours] == [v.shape for v in plain]
    losses = [rd_pass(model, x, one, hard_round, 0.01)["loss"].item() for one in (ours, plain)]
    assert losses[0] < 0.9 * losses[1]


def test_a_batch_is_its_images(model):
    x = to_x(skimage.data.astronaut()[:64, :192])
    pair = torch.cat(x.split(96, dim=3))
    together = rd_pass(model, pair, analyze(model, pair), hard_round, 0.01)["loss"]
    alone = [rd_pass(model, one[None], analyze(model, one[None]), hard_round, 0.01) for one in pair]
    torch.testing.assert_close(together, torch.cat([a["loss"] for a in alone]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (17, 16), (63, 65), (100, 37)])
def test_every_size_works(small, size):
    x = torch.rand(1, 3, *size)
    y, z = analyze(small, x)
    assert y.shape[2:] == (-(-size[0] // 16), -(-size[1] // 16))
    assert z.shape[2:] == (-(-size[0] // 64), -(-size[1] // 64))
    latents = Latents(y.requires_grad_(), z.requires_grad_())
    terms = rd_pass(small, x, latents, lambda v: v, 0.01)
    assert terms["x_hat"].shape == x.shape
    terms["loss"].sum().backward()
    assert y.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


def test_frozen_networks_collect_no_gradients(small):
    small = freeze(copy.deepcopy(small))
    x = torch.rand(1, 3, 64, 64)
    latents = Latents(*(v.requires_grad_() for v in analyze(small, x)))
    rd_pass(small, x, latents, lambda v: v, 0.01)["loss"].sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in small.parameters())
    assert not small.training


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
    x = torch.rand(1, 3, 80, 70)
    latents = analyze(small, x)
    terms = rd_pass(small, x, latents, hard_round, 0.01)
    symbols = integer_latents(small, latents)
    torch.testing.assert_close(symbols.z + medians_of(small), terms["z_hat"])
    params = small.h_s(terms["z_hat"])[:, :, :5, :5]
    torch.testing.assert_close(symbols.y + params[:, 12:], terms["y_hat"])
    stock, _ = small.entropy_bottleneck(latents.z)
    torch.testing.assert_close(stock, terms["z_hat"])


def test_round_around_moves_the_lattice():
    v, centre = torch.tensor([0.9, -2.2]), torch.tensor([0.25, 0.25])
    torch.testing.assert_close(round_around(v, centre, hard_round), torch.tensor([1.25, -1.75]))


def test_likelihood_of_z_is_compressais_where_float64_resolves_it(small):
    net = build_model(Channels(N=8, M=12)).double()
    net.load_state_dict(small.state_dict())
    z_hat = torch.linspace(-12, 12, 49, dtype=torch.float64).reshape(1, 1, 7, 7).repeat(1, 8, 1, 1)
    ours = likelihood_z(net, z_hat)
    flat = z_hat.transpose(0, 1).reshape(8, 1, -1)
    theirs = net.entropy_bottleneck._likelihood(flat)[0].reshape(8, 1, 7, 7).transpose(0, 1)
    torch.testing.assert_close(ours, theirs.clamp_min(1e-9), rtol=1e-6, atol=1e-15)


def test_likelihood_of_z_has_a_correct_gradient(small):
    net = build_model(Channels(N=2, M=3)).double()
    z_hat = torch.tensor([-2.0, -0.4, 0.3, 3.0], dtype=torch.float64).reshape(1, 2, 1, 2)
    assert torch.autograd.gradcheck(lambda v: likelihood_z(net, v), z_hat.requires_grad_())


@pytest.mark.parametrize("far", [-60.0, 60.0])
def test_a_latent_far_out_finds_its_way_back(small, far):
    """Both tails must pull inwards, where CompressAI's upper tail has gradient 0 in float32."""
    z_hat = torch.full((1, 8, 1, 1), far, requires_grad=True)
    (-likelihood_z(small, z_hat).log2()).sum().backward()
    assert (z_hat.grad.sign() == torch.sign(torch.tensor(far))).all()


def test_the_centre_of_the_prior_is_likely(small):
    """At the point where both sigmoids mirror each other the likelihood must not vanish."""
    net = build_model(Channels(N=4, M=4))
    with torch.no_grad():
        for bias in net.entropy_bottleneck.biases:
            bias.zero_()
    assert (likelihood_z(net, torch.zeros(1, 4, 1, 1)) > 1e-3).all()


# --- devices --------------------------------------------------------------------------------------


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="device = 'gpu': must be auto, cpu, cuda"):
        pick_device("gpu")
