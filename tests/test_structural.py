"""Our MS-SSIM: against pytorch-msssim, and against a plain one in float64 by autograd."""

import pytest
import pytorch_msssim
import skimage
import torch
from plain import plain_ms_ssim

import fast.structural
from conftest import to_x
from fast.structural import ms_ssim, weighs_nothing

SIZES = [(161, 161), (162, 175), (177, 163), (176, 240), (203, 190)]
SIGNED = torch.tensor([1.0, -3.0], dtype=torch.float64)  # the gradient wanted of each image


def pair_of(size, dtype=torch.float64):
    """Two photos [2, 3, H, W], and as many of noise and blur about them."""
    height, width = size
    photos = skimage.data.coffee()[100:, 200:], skimage.data.astronaut()[30:, 150:]
    x = torch.cat([to_x(photo[:height, :width]) for photo in photos]).double()
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
    strength = torch.tensor([0.05, 0.15], dtype=x.dtype)[:, None, None, None]
    return (blurred + strength * noise).to(dtype), x.to(dtype)


def maps_of(size, kind):
    """Weights [2, 1, H, W] of a kind: none, any, or 0 in half of each picture."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(2, 1, *size, dtype=torch.float64, generator=generator) ** 3
    if kind == "half":
        weights[0, :, : size[0] // 2] = 0
        weights[1, :, :, size[1] // 2 :] = 0
    return weights


def with_gradient(similarity, x_hat, *rest):
    """The similarities and the gradient to x_hat, with a different factor for each image."""
    x_hat = x_hat.detach().clone().requires_grad_()
    value = similarity(x_hat, *rest)
    (value * SIGNED[: len(value)].to(value.dtype)).sum().backward()
    return value.detach(), x_hat.grad


def assert_near(ours, expected, tolerance):
    """Values to a relative tolerance, the gradient to that of its largest element."""
    torch.testing.assert_close(ours[0], expected[0], rtol=tolerance, atol=0)
    for mine, other in zip(ours[1], expected[1], strict=True):  # each image
        scale = other.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * scale)


def of_package(x_hat, x, window=None):
    return pytorch_msssim.ms_ssim(x_hat, x, data_range=1.0, size_average=False, win=window)


@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradient_are_those_of_pytorch_msssim(size):
    """Its own window is in float32; with one in float64 the results are the same."""
    pair = pair_of(size)
    ours, rounded = (with_gradient(one, *pair) for one in (ms_ssim, of_package))
    assert ours[0].min() > 0.5 and ours[0].max() < 0.99
    assert_near(ours, rounded, 1e-4)
    torch.testing.assert_close(ours[0], rounded[0], rtol=1e-5, atol=0)
    window = torch.exp(-(torch.arange(-5.0, 6, dtype=torch.float64) ** 2) / 4.5)
    window = (window / window.sum()).expand(3, 1, 1, -1)
    assert_near(ours, with_gradient(of_package, *pair, window), 1e-10)


@pytest.mark.parametrize("kind", ["none", "any", "half"])
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradient_are_those_of_the_formula(size, kind):
    inputs = *pair_of(size), maps_of(size, kind)
    ours, expected = (with_gradient(one, *inputs) for one in (ms_ssim, plain_ms_ssim))
    assert_near(ours, expected, 1e-10)
    with torch.no_grad():
        assert torch.equal(ms_ssim(*inputs), ours[0])


def test_weights_count_where_they_are():
    """A fault in the picture's half without weight changes nothing; in the other half it does."""
    x_hat, x = pair_of((200, 360))
    weights = torch.zeros_like(x[:, :1])
    weights[..., 200:] = 1
    before = ms_ssim(x_hat, x, weights)
    faults = torch.rand(x[..., :100].shape, dtype=x.dtype)
    for places, changes in ((slice(0, 60), False), (slice(290, 350), True)):
        spoilt = x_hat.clone()
        spoilt[..., places] = faults[..., :60]
        after = ms_ssim(spoilt, x, weights)
        assert (after < before - 0.01).all() if changes else torch.equal(after, before)


def test_equal_weights_are_none():
    x_hat, x = pair_of((177, 163))
    weights = torch.tensor([1.0, 0.3], dtype=x.dtype)[:, None, None, None].expand_as(x[:, :1])
    equal, none = (with_gradient(ms_ssim, x_hat, x, one) for one in (weights, None))
    assert_near(equal, none, 1e-12)


@pytest.mark.parametrize("rows", [8, 37, 160, 1000])
@pytest.mark.parametrize("kind", ["none", "any"])
def test_strips_of_any_number_of_rows_give_the_same(monkeypatch, rows, kind):
    size = (171, 163)
    inputs = *pair_of(size), maps_of(size, kind)
    expected = with_gradient(ms_ssim, *inputs)
    heights, maps_of_strip = [], fast.structural._maps_of

    def noted(a, b):
        heights.append(a.size(2) - 10)
        return maps_of_strip(a, b)

    monkeypatch.setattr(fast.structural, "_maps_of", noted)
    monkeypatch.setattr(fast.structural, "STRIP_BYTES", rows * 2 * 3 * 163 * 8)
    assert_near(with_gradient(ms_ssim, *inputs), expected, 1e-12)
    assert heights[0] == min(rows, 161)


@pytest.mark.parametrize("kind", ["none", "any"])
def test_float32_is_near_float64(kind):
    size = (177, 190)
    exact = *pair_of(size), maps_of(size, kind)
    single = [None if v is None else v.float() for v in exact]
    value, gradient = with_gradient(ms_ssim, *single)
    assert value.dtype == gradient.dtype == torch.float32
    assert_near((value.double(), gradient.double()), with_gradient(ms_ssim, *exact), 1e-4)


def test_autocast_changes_nothing():
    pair = pair_of((177, 163), torch.float32)
    expected = with_gradient(ms_ssim, *pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = with_gradient(ms_ssim, *pair)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_the_gradient_can_be_taken_once():
    x_hat, x = pair_of((161, 161))
    x_hat.requires_grad_()
    value = ms_ssim(x_hat, x).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_negative_picture_has_similarity_0_and_no_gradient():
    """Its covariances with the picture are below 0. The other image of the batch is as it was."""
    x_hat, x = pair_of((161, 170))
    value, gradient = with_gradient(ms_ssim, torch.cat((1 - x[:1], x_hat[1:])), x)
    assert value[0] == 0 and gradient[0].eq(0).all()
    alone, expected = with_gradient(ms_ssim, x_hat, x)
    torch.testing.assert_close(value[1], alone[1])
    torch.testing.assert_close(gradient[1], expected[1])


def test_a_channel_of_similarity_0_leaves_the_gradient_of_the_others():
    x_hat, x = pair_of((161, 161))
    x_hat[:, 1] = 1 - x[:, 1]
    value, gradient = with_gradient(ms_ssim, x_hat, x)
    others = [with_gradient(plain_ms_ssim, x_hat[:, [c]], x[:, [c]]) for c in (0, 2)]
    torch.testing.assert_close(value, (others[0][0] + others[1][0]) / 3)
    expected = [others[0][1] / 3, torch.zeros_like(x[:, :1]), others[1][1] / 3]
    torch.testing.assert_close(gradient, torch.cat(expected, 1), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", ["none", "half"])
def test_equal_pictures_have_similarity_1_and_no_gradient(kind):
    _, x = pair_of((170, 161))
    value, gradient = with_gradient(ms_ssim, x, x, maps_of((170, 161), kind))
    torch.testing.assert_close(value, torch.ones_like(value), rtol=1e-13, atol=0)
    assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("size", [(161, 168), (169, 176), (176, 161), (185, 200)])
def test_weights_that_no_window_sees_are_known(size):
    """They are those for which the weighted mean is 0 / 0; the other image has its own weights."""
    x = torch.rand(2, 1, *size, dtype=torch.float64)
    middle = size[0] // 2, size[1] // 2
    seen = []
    for axis in (0, 1):
        for place in (0, 4, 5, 60, 65, 71, 72, 76, 79, 80, size[axis] - 81, size[axis] - 80):
            weights = torch.ones_like(x)
            weights[1] = 0
            at = (place, middle[1]) if axis == 0 else (middle[0], place)
            weights[(1, 0, *at)] = 1
            first, second = ms_ssim(x, x, weights)
            assert first == pytest.approx(1)
            assert weighs_nothing(weights) == second.isnan()
            assert not weighs_nothing(weights[:1])
            seen.append(second.isnan().item())
    assert 5 < sum(seen) < 20
