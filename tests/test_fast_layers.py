"""The layers made for speed, against float64 autograd of torch's and CompressAI's own."""

import copy
import platform

import pytest
import torch
import torch.nn.functional as F
from compressai.layers import GDN
from forks import Fork, ends_of
from plain import plain_rate

from config import Channels
from experimental_inference_methods import METHODS, Temperature, build_rounding
from fast.decoder import ToPicture
from fast.freezing import FastGDN
from fast.gdn import gdn
from fast.layout import interleave
from fast.pool import Pool
from fast.upsampling import UpsamplingKernel
from fast.winograd import Winograd
from models import build_model, freeze, prepare_for_training
from passes import LMBDA, problem_of, to_optimise, true_terms

CANDIDATES = sorted((key for key in METHODS if METHODS[key].score), key=str)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_gdn_has_the_derivatives_of_its_formula(monkeypatch, inverse, rows):
    torch.manual_seed(0)
    channels = 5
    monkeypatch.setattr("fast.gdn.CHUNK_BYTES", rows * channels * 8)
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64, requires_grad=True)
    beta = (torch.rand(channels, dtype=torch.float64) + 0.1).requires_grad_()
    gamma = torch.rand(channels, channels, dtype=torch.float64, requires_grad=True)
    norm = beta[:, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x**2)
    expected = x * norm**0.5 if inverse else x * norm**-0.5
    torch.testing.assert_close(gdn(x, beta, gamma, inverse), expected)
    assert torch.autograd.gradcheck(lambda *v: gdn(*v, inverse), (x, beta, gamma))


def test_gdn_with_a_pool_gives_the_same_once():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    beta, gamma = torch.rand(5) + 0.1, torch.rand(5, 5)
    gradients = []
    for pool in (None, Pool()):
        out = gdn(x, beta, gamma, True, pool)
        gradients.append(torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)[0])
    assert torch.equal(*gradients)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x, torch.ones_like(out))


def test_a_pool_hands_memory_out_again_only_when_nobody_uses_it():
    pool, like = Pool(), torch.empty(0)
    first = pool.empty(like, 2, 3, 50, 40)
    assert first.is_contiguous(memory_format=torch.channels_last)
    place = first.data_ptr()
    assert place % 64 == 0
    view = first[0, 1:]
    del first
    second = pool.empty(like, 2, 3, 50, 40)
    assert second.data_ptr() != place  # the view lives
    del view
    third = pool.empty(like, 2, 3, 45, 40)  # a little smaller
    assert third.data_ptr() == place
    del second, third
    large = pool.empty(like, 2, 3, 55, 40)
    assert len(pool._free) == 1  # of the two, one made room
    del large
    pool.empty(like, 1, 1, 1, 1)
    assert sum(map(len, pool._free)) < 2 * (2 * 3 * 55 * 40 * 4 + 64)
    assert copy.deepcopy(pool)._free == []
    pool.clear()
    assert pool._free == []


@pytest.mark.parametrize("inverse", [False, True])
def test_trainable_gdn_is_compressais(inverse):
    torch.manual_seed(0)
    stock = GDN(6, inverse=inverse).double()
    with torch.no_grad():
        stock.gamma += torch.rand(6, 6) * 0.2 - 0.05
        stock.beta += torch.rand(6) - 0.5
    ours = FastGDN(stock).double()
    assert list(ours.state_dict()) == list(stock.state_dict())
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    weight = torch.randn_like(x)
    for layer in (stock, ours):
        (layer(x) * weight).sum().backward()
    torch.testing.assert_close(ours(x), stock(x))
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_gdn_in_bfloat16_keeps_its_type():
    x = torch.randn(1, 4, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    beta, gamma = torch.ones(4, requires_grad=True), torch.eye(4, requires_grad=True)
    out = gdn(x, beta, gamma, False)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert beta.grad.dtype == gamma.grad.dtype == torch.float32
    expected = x.float() / (1 + x.float() ** 2).sqrt()
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [(1, 1), (4, 8), (5, 7), (9, 2), (13, 21)])
@pytest.mark.parametrize(("channels", "form"), [((6, 5), "direct"), ((7, 9), "winograd")])
def test_every_form_of_upsampling_is_the_transposed_convolution(monkeypatch, channels, form, size):
    if form == "winograd":
        monkeypatch.setattr("fast.upsampling.FEWEST_WINOGRAD_CHANNELS", 7)
        monkeypatch.setattr("fast.upsampling.FEWEST_WINOGRAD_PIXELS", 1)
        monkeypatch.setattr("fast.winograd.WINOGRAD_TILES", 3)
    torch.manual_seed(0)
    weight, bias = torch.randn(*channels, 5, 5), torch.randn(channels[1])
    kernel = UpsamplingKernel(weight, bias, Pool())
    x = torch.randn(2, channels[0], *size, requires_grad=True)
    assert kernel.has_winograd(*size, x) == (form == "winograd")
    exact = x.detach().double().requires_grad_()
    expected = F.conv_transpose2d(exact, weight.double(), bias.double(), 2, 2, 1)
    out = kernel(x)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-4)
    assert (out - expected).square().mean().sqrt() < 1e-5 * expected.square().mean().sqrt()
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient.double())
    error = (x.grad - exact.grad).square().mean().sqrt()
    assert error < 1e-5 * exact.grad.square().mean().sqrt()


def test_upsampling_may_be_followed_by_a_layer_that_works_in_place(monkeypatch):
    """h_s has LeakyReLU(inplace=True) after it."""
    monkeypatch.setattr("fast.upsampling.FEWEST_WINOGRAD_CHANNELS", 4)
    monkeypatch.setattr("fast.upsampling.FEWEST_WINOGRAD_PIXELS", 1)
    for channels in (3, 8):  # directly, and Winograd's form with a cropped result
        kernel = UpsamplingKernel(torch.randn(8, channels, 5, 5), torch.randn(channels), Pool())
        x = torch.randn(1, 8, 3, 5, requires_grad=True)
        F.leaky_relu(kernel(x), inplace=True).sum().backward()
        assert x.grad.abs().sum() > 0


def test_interleaved_phases_are_torchs_pixel_shuffle():
    phases = torch.randn(2, 12, 3, 5).to(memory_format=torch.channels_last)
    by_channel = phases.view(2, 2, 2, 3, 3, 5).permute(0, 3, 1, 2, 4, 5).reshape(2, 12, 3, 5)
    picture = torch.empty(2, 3, 6, 10).to(memory_format=torch.channels_last)
    interleave(phases, picture)
    torch.testing.assert_close(picture, F.pixel_shuffle(by_channel, 2))


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("size", [(1, 3), (2, 2), (5, 4)])
@pytest.mark.parametrize("part", [(0, 0, 99, 99), (0, 0, 3, 7), (2, 1, 2, 9), (3, 4, 99, 99)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_last_three_layers_in_strips_are_the_layers(monkeypatch, rows, size, part, weighted):
    """Picture, squared error of a part of it, and their gradients, in float64 by autograd."""
    torch.manual_seed(0)
    channels, (height, width), (top, left, *part_size) = 6, size, part
    monkeypatch.setattr("fast.decoder.STRIP_BYTES", rows * channels * 2 * width * 8)
    first, first_bias = torch.randn(4, channels, 5, 5).double(), torch.randn(channels).double()
    beta, gamma = torch.rand(channels).double() + 0.1, torch.rand(channels, channels).double()
    last, last_bias = torch.randn(channels, 3, 5, 5).double(), torch.randn(3).double()
    v = torch.randn(2, 4, height, width, dtype=torch.float64)
    ours, theirs = v.clone().requires_grad_(), v.clone().requires_grad_()
    x = F.conv_transpose2d(theirs, first, first_bias, 2, 2, 1)
    normal = x * (beta[:, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x**2)).sqrt()
    picture = F.conv_transpose2d(normal, last, last_bias, 2, 2, 1)
    expected = picture[:, :, top : top + part_size[0], left : left + part_size[1]]
    target = torch.rand_like(expected)
    upsampling = UpsamplingKernel(first, first_bias, Pool())
    stage = ToPicture(upsampling, beta, gamma, last, last_bias)
    counts = torch.rand_like(target[:, :1]) if weighted else None
    error, shown = stage.squared_error(ours, target, (top, left), counts)
    torch.testing.assert_close(shown, expected)
    torch.testing.assert_close(stage(v), picture)
    squares = (expected - target).square() * (1 if counts is None else counts)
    theirs_error = squares.sum(dim=(1, 2, 3))
    torch.testing.assert_close(error, theirs_error)
    weights = torch.tensor([1.0, -3.0], dtype=torch.float64)
    (error * weights).sum().backward()
    (theirs_error * weights).sum().backward(retain_graph=True)
    torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(stage.squared_error(v, target, (top, left), counts)[0], error)
    to_picture = torch.randn_like(picture)
    (expected_gradient,) = torch.autograd.grad(picture, theirs, to_picture)
    ours_picture = stage(ours)
    (gradient,) = torch.autograd.grad(ours_picture, ours, to_picture, retain_graph=True)
    torch.testing.assert_close(gradient, expected_gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ours_picture, ours, to_picture)


@pytest.mark.parametrize("key", CANDIDATES, ids=lambda k: "-".join(filter(None, k)))
@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_the_one_derivative_kept_is_the_numerical_one(monkeypatch, key, tau):
    monkeypatch.setattr("rounding.candidates.CandidateSample.CHUNK", 5)
    rounding = build_rounding(*key, temperature=Temperature(0.0, 1.0))
    v = torch.tensor([-2.3, -1.1, -0.6, 0.1, 0.35, 0.8, 1.7, 2.45], dtype=torch.float64)
    v = v.reshape(1, 2, 2, 2).requires_grad_()
    seed = 3

    def sample(v):
        return rounding(v, tau, torch.Generator().manual_seed(seed))

    assert sample(v).shape == v.shape
    assert torch.autograd.gradcheck(sample, v, eps=1e-7, atol=1e-4, rtol=1e-4)


def plain_loss(network, x, latents, rounding):
    """bpp + lambda * 255^2 * MSE, averaged over images, by CompressAI's own modules alone."""
    bpp, y_hat = plain_rate(network, latents, rounding, x.shape[2:])
    return bpp.mean() + LMBDA * 255**2 * F.mse_loss(network.g_s(y_hat), x)


def _shifted(v):
    return v + 0.3


def test_a_frozen_model_has_the_loss_and_gradient_of_compressais_layers():
    """In float64: CompressAI's own modules by autograd, with the same shift for rounding."""
    torch.manual_seed(0)
    stock = build_model(Channels(N=8, M=12))
    stock.network.double().eval()
    frozen = freeze(copy.deepcopy(stock))
    frozen.network.double()
    x = torch.rand(2, 3, 128, 64, dtype=torch.float64)
    y, z = (torch.randn(2, c, h, w, dtype=torch.float64) * 2 for c, h, w in ((12, 8, 4), (8, 2, 1)))
    latents = {"y": y, "z": z}
    ours, theirs = to_optimise(latents), to_optimise(latents)
    loss = problem_of(frozen, x).relaxed(ours, _shifted).loss.mean()
    loss.backward()
    expected = plain_loss(stock.network, x, theirs, _shifted)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, mine in ours.items():
        torch.testing.assert_close(mine.grad, theirs[name].grad)
    # the true loss, in float32 as everyone has it, agrees to float32 rounding
    single = copy.deepcopy(stock)
    single.network.float()
    single = freeze(single)
    with torch.no_grad():
        true = plain_loss(stock.network, x, latents, torch.round)
    mine = true_terms(single, x.float(), {name: v.float() for name, v in latents.items()}).loss
    assert mine.mean().item() == pytest.approx(true.item(), rel=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [None, 3])
def test_winograds_form_within_a_frozen_model(monkeypatch, precision, tile):
    """In float32 near CompressAI's; in bfloat16, where it does not serve, roughly so."""
    torch.manual_seed(0)
    monkeypatch.setattr("fast.upsampling.FEWEST_WINOGRAD_CHANNELS", 8)
    monkeypatch.setattr("fast.upsampling.FEWEST_WINOGRAD_PIXELS", 1)
    stock = build_model(Channels(N=8, M=8))
    stock.network.eval()
    frozen = freeze(copy.deepcopy(stock))
    calls = []
    upsampled = Winograd.upsample
    monkeypatch.setattr(Winograd, "upsample", lambda *args: calls.append(1) or upsampled(*args))
    x = torch.rand(1, 3, 128, 64)
    latents = {"y": torch.randn(1, 8, 8, 4) * 2, "z": torch.randn(1, 8, 2, 1) * 2}
    ours, theirs = to_optimise(latents), to_optimise(latents)
    problem = problem_of(frozen, x, tile=tile, precision=precision)
    loss = problem.relaxed(ours, _shifted).loss.mean()
    loss.backward()
    assert bool(calls) == (precision == torch.float32)
    expected = plain_loss(stock.network, x, theirs, _shifted)
    expected.backward()
    tolerance = 1e-4 if precision == torch.float32 else 0.05
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 10)
    error = (ours["y"].grad - theirs["y"].grad).norm() / theirs["y"].grad.norm()
    assert error < tolerance


class _Doubled(torch.nn.ConvTranspose2d):
    """A subclass, which computes something else than its base class."""

    def forward(self, x, output_size=None):
        return 2 * super().forward(x, output_size)


def _other_kernel():
    return torch.nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)


def _in_groups():
    return torch.nn.ConvTranspose2d(8, 8, 5, stride=2, padding=2, output_padding=1, groups=4)


def _without_bias():
    return torch.nn.ConvTranspose2d(8, 8, 5, stride=2, padding=2, output_padding=1, bias=False)


def _dilated():
    return torch.nn.ConvTranspose2d(8, 8, 5, stride=2, padding=4, output_padding=1, dilation=2)


def _subclass():
    return _Doubled(8, 8, 5, stride=2, padding=2, output_padding=1)


@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("layer", [_other_kernel, _in_groups, _without_bias, _dilated, _subclass])
def test_layers_of_another_kind_are_left_as_they_are(layer, place):
    """At the start of g_s, and within its end, which is then not fused with the error."""
    torch.manual_seed(0)
    stock = build_model(Channels(N=8, M=8))
    stock.network.g_s[place] = layer()
    stock.network.eval()
    frozen = freeze(copy.deepcopy(stock))
    assert any(type(part) is type(layer()) for part in frozen.network.g_s.modules())
    assert hasattr(frozen.network.g_s, "squared_error") == (place == 0)
    x = torch.rand(1, 3, 64, 128)
    latents = {"y": torch.randn(1, 8, 4, 8) * 2, "z": torch.randn(1, 8, 1, 2) * 2}
    expected = plain_loss(stock.network, x, theirs := to_optimise(latents), _shifted)
    loss = problem_of(frozen, x).relaxed(ours := to_optimise(latents), _shifted).loss.mean()
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, mine in ours.items():
        scale = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(mine.grad, theirs[name].grad, rtol=1e-3, atol=1e-4 * scale)
    with torch.no_grad():
        x_hat = frozen.synthesize(latents["y"], (64, 128))
        torch.testing.assert_close(x_hat, stock.network.g_s(latents["y"]), rtol=1e-4, atol=1e-5)


def test_a_frozen_model_is_not_frozen_again():
    with pytest.raises(ValueError, match="frozen already"):
        freeze(freeze(build_model(Channels(N=8, M=8))))


@pytest.mark.parametrize("layer", [_other_kernel, _without_bias, _in_groups, _dilated])
def test_a_kernel_of_upsampling_is_made_of_no_other_layer(layer):
    with pytest.raises(ValueError, match="kernel of 5"):
        UpsamplingKernel.of(layer())


def test_a_model_made_ready_for_training_computes_the_same():
    torch.manual_seed(0)
    stock = build_model(Channels(N=8, M=8))
    fast = prepare_for_training(copy.deepcopy(stock))
    assert any(isinstance(layer, FastGDN) for layer in fast.network.g_s)
    x = torch.rand(1, 3, 64, 64)
    for model in (stock, fast):
        latents = model.encode(x, model.network.g_a)
        problem_of(model, x).relaxed(latents, lambda v: v + 0.2).loss.backward()
    expected = {name: v.grad for name, v in stock.network.named_parameters()}
    gradients = {name: v.grad for name, v in fast.network.named_parameters()}
    assert gradients.keys() == expected.keys()
    # Only the auxiliary loss moves the quantiles.
    quantiles = "entropy_bottleneck.quantiles"
    assert gradients.pop(quantiles) is expected.pop(quantiles) is None
    for name, theirs in expected.items():
        scale = theirs.abs().max().item()
        torch.testing.assert_close(gradients[name], theirs, rtol=1e-3, atol=1e-4 * scale,
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip


PAGE_FAULTS = """
import os, resource, torch
from fast.pool import keep_pages
took = keep_pages() if os.environ["PAGES"] == "keep" else False
x = torch.randn(2**24, requires_grad=True)  # 64 MiB
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x.grad = None
    (x * 2).exp().sin().sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
counts = [faults_of_a_step() for _ in range(5)]
print(took, sum(counts[3:]))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep the pages it frees"
)
def test_kept_pages_do_not_fault_again():
    counts = []
    for pages in ("leave", "keep"):
        ((code, out, errors),) = ends_of([Fork(PAGE_FAULTS, PAGES=pages)])
        assert code == 0, errors
        counts.append(out.split())
    (_, without), (took, kept) = counts
    assert took == "True"
    assert int(without) > 2 * 2**26 // 2**21  # even in huge pages
    assert int(kept) < int(without) / 4
