"""MS-SSIM and the losses once more, in the plainest way, by autograd and CompressAI's modules."""

import torch
import torch.nn.functional as F

EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli, Bovik 2003, table 1


def _window_means(v):
    """Means of v [B, C, H, W] over Gaussian windows of 11x11 pixels, by two dense matrices."""
    matrices = []
    for side in v.shape[2:]:
        distances = torch.arange(side) - torch.arange(5, side - 5)[:, None]  # [side - 10, side]
        window = torch.exp(-(distances.to(v.dtype) ** 2) / (2 * 1.5**2)) * (abs(distances) <= 5)
        matrices.append(window / window.sum(1, keepdim=True))
    over_rows, over_columns = matrices
    return over_rows @ v @ over_columns.T


def _halved(v):
    """Sums of 2x2 pixels; a row or column of zeros comes before an odd number of them."""
    v = F.pad(v, (v.size(3) % 2, 0, v.size(2) % 2, 0))
    return v[:, :, ::2, ::2] + v[:, :, 1::2, ::2] + v[:, :, ::2, 1::2] + v[:, :, 1::2, 1::2]


def plain_ms_ssim(a, b, weights=None):
    """MS-SSIM [B] of pictures [B, C, H, W] with weights [B, 1, H, W] of pixels."""
    product, ones = 1, torch.ones_like(b[:, :1])
    weights = ones if weights is None else weights
    for scale, exponent in enumerate(EXPONENTS):
        if scale:
            a, b = _halved(a) / 4, _halved(b) / 4
            ones = torch.ones_like(weights)
            weights = _halved(weights) / _halved(ones)  # of the pixels that there are
        mean_a, mean_b = _window_means(a), _window_means(b)
        var_a, var_b = _window_means(a**2) - mean_a**2, _window_means(b**2) - mean_b**2
        covariance = _window_means(a * b) - mean_a * mean_b
        similarity = (2 * covariance + 0.0009) / (var_a + var_b + 0.0009)
        if scale == 4:
            similarity = similarity * (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        centres = weights[:, :, 5:-5, 5:-5]
        mean = (similarity * centres).sum((2, 3)) / centres.sum((2, 3))
        product = product * mean.clamp_min(0) ** exponent
    return product.mean(1)


def plain_rate(network, latents, rounding, size):
    """bpp [B] and y_hat of a hyperprior's latents, by CompressAI's own modules alone."""
    medians = network.entropy_bottleneck.quantiles[:, 0, 1].detach().view(1, -1, 1, 1)
    z_hat, y = rounding(latents["z"] - medians) + medians, latents["y"]
    params = network.h_s(z_hat)[:, :, : y.size(2), : y.size(3)]
    if hasattr(network, "context_prediction"):
        y_hat = rounding(y)
        both = torch.cat((params, network.context_prediction(y_hat)), 1)
        scales, means = network.entropy_parameters(both).chunk(2, 1)
    else:
        scales, means = params.chunk(2, 1)
        y_hat = rounding(y - means) + means
    bottleneck, conditional = network.entropy_bottleneck, network.gaussian_conditional
    # Below the bound its gradient still leads upwards, which clamp_min's does not.
    by_channel = z_hat.transpose(0, 1).flatten(1)[:, None]  # [N, 1, B h' w']
    p_z = bottleneck.likelihood_lower_bound(bottleneck._likelihood(by_channel)[0])
    p_z = p_z.view(z_hat.size(1), len(y), -1).transpose(0, 1)
    p_y = conditional.likelihood_lower_bound(conditional._likelihood(y_hat, scales, means))
    bits = -p_z.log2().flatten(1).sum(1) - p_y.log2().flatten(1).sum(1)
    return bits / (size[0] * size[1]), y_hat


def plain_error(a, b, weights=None):
    """The mean squared error [B], of weighted pixels."""
    return ((a - b) ** 2 * (1 if weights is None else weights)).mean((1, 2, 3))
