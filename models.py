"""The mean-scale hyperprior: loading it, and the steps of one rate-distortion pass.

Minnen, Balle, Toderici 2018 (arXiv 1809.02736); the networks are CompressAI's. x is [B, 3, H, W] in
[0, 1]; y is [B, M, ceil(H/16), ceil(W/16)]; z is [B, N, ceil(H/64), ceil(W/64)].

    x -> g_a -> y -> h_a -> z        encoder: the starting latents, `analyze`
    z_hat = round(z - medians) + medians
    scales, means = h_s(z_hat)       cropped to y's size
    y_hat = round(y - means) + means
    x_hat = g_s(y_hat)               cropped to x's size, so that any size works without padding
"""

import hashlib
import io
import re
import urllib.error
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from common.files import write_whole
from common.weights import find_state_dict, read_checkpoint
from config import Channels
from fast_layers import FrozenDecoder, Pool, ToPicture, UpsamplingKernel, gdn
from metrics import bits_per_pixel, psnr, rate_distortion_loss, squared_error
from tiles import ENCODER_TILE, STRIDE, in_tiles, tiled_error

with warnings.catch_warnings():
    # compressai's imports warn of other packages' futures.
    warnings.simplefilter("ignore")
    from compressai.entropy_models import EntropyBottleneck
    from compressai.entropy_models import EntropyModel as EntropyModel
    from compressai.layers import GDN
    from compressai.models import MeanScaleHyperprior
    from compressai.zoo import load_state_dict as rename_old_weights
    from compressai.zoo import mbt2018_mean

LIKELIHOOD_MIN = 1e-9
CONSTANT_BUFFERS = (".bound", ".pedestal", ".target", ".scale_bound")


class Latents(NamedTuple):
    """The two latents of an image, before rounding; y [B, M, h, w], z [B, N, h', w']."""

    y: Tensor
    z: Tensor


# --- building and loading -------------------------------------------------------------------------


def build_model(channels: Channels) -> MeanScaleHyperprior:
    """An untrained mean-scale hyperprior with N and M channels."""
    return MeanScaleHyperprior(N=channels.N, M=channels.M)


def load_checkpoint(source: str, channels: Channels | None = None) -> MeanScaleHyperprior:
    """A trained model on the CPU, from a file or CompressAI's zoo.

    Args:
        source: a file of torch.save or safetensors that holds the weights by CompressAI's names,
            old or new, wherever they lie in it; or `zoo:mbt2018-mean:QUALITY`.
        channels: what N and M must be; without it the weights decide alone.

    Raises:
        InputError: the file is missing, broken or of another architecture; the zoo is out of
            reach; the weights' channels are not `channels`.
    """
    model = _load_zoo(source) if source.startswith("zoo:") else _load_file(source)
    if channels is not None and (model.N, model.M) != (channels.N, channels.M):
        raise InputError(
            f"pretrain {source}: has N = {model.N}, M = {model.M}, "
            f"but channels asks for N = {channels.N}, M = {channels.M}"
        )
    return model


def _load_file(source: str) -> MeanScaleHyperprior:
    weights = find_state_dict(read_checkpoint(source), source, "g_a")
    return model_from_state_dict(weights, source)


def model_from_state_dict(weights: dict[str, Tensor], source: str) -> MeanScaleHyperprior:
    """The model that these weights are of; N and M follow from their shapes.

    Raises:
        InputError: they are not a mean-scale hyperprior's, or not finite.
    """
    wrong = f"pretrain {source}: not the weights of a mean-scale hyperprior"
    if other := _other_architecture(weights):
        raise InputError(f"{wrong} ({other})")
    weights = {
        key: value.float() if value.is_floating_point() else value
        for key, value in rename_old_weights(weights).items()
    }
    try:
        for key, value in weights.items():
            if not value.isfinite().all():
                raise InputError(f"pretrain {source}: {key} holds NaN or infinite weights")
        model = MeanScaleHyperprior.from_state_dict(weights).eval()
        _restore_constants(model)
        return model
    except KeyError as error:
        raise InputError(f"{wrong} (no {error.args[0]})") from None
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:160]
        raise InputError(f"{wrong} ({reason})") from None


def _other_architecture(weights: dict[str, Tensor]) -> str:
    """What tells these weights from a mean-scale hyperprior's; empty where nothing plain does."""
    modules = {key.partition(".")[0] for key in weights}
    if "context_prediction" in modules:
        return "context_prediction: an autoregressive model, as mbt2018 and cheng2020 are"
    if not {"g_a.0.weight", "g_a.6.weight"} <= weights.keys():
        return f"no g_a.0.weight, g_a.6.weight among {', '.join(list(weights)[:3])}"
    if not {"h_a", "h_s"} & modules:
        return "no h_a, h_s: a factorized prior, as bmshj2018-factorized"
    last = weights.get("h_s.4.weight")
    if last is not None and last.shape[:1] == weights["g_a.6.weight"].shape[:1]:
        return "h_s gives no means: a scale hyperprior, as bmshj2018-hyperprior"
    return ""


def _restore_constants(model: MeanScaleHyperprior) -> None:
    """Give the buffers that nobody trains their exact values: half precision rounds 1e-9 to 0."""
    exact = dict(MeanScaleHyperprior(model.N, model.M).named_buffers())
    for name, value in model.named_buffers():
        if name.endswith(CONSTANT_BUFFERS):
            value.copy_(exact[name])


def _load_zoo(source: str) -> MeanScaleHyperprior:
    _, name, quality, *rest = (*source.split(":"), "", "")
    if name != "mbt2018-mean" or any(rest) or quality not in tuple("12345678"):
        raise InputError(f"pretrain {source}: must be zoo:mbt2018-mean:QUALITY, QUALITY 1 to 8")
    try:
        return mbt2018_mean(int(quality), pretrained=True, progress=False).eval()
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"pretrain {source}: cannot download CompressAI's weights ({error}); connect to the "
            f"network once, or put the file into {cache} by hand"
        ) from None


def save_checkpoint(path: Path, model: MeanScaleHyperprior, state: dict[str, object]) -> Path:
    """Write a checkpoint in the published layout, whole or not at all; `load_checkpoint` reads it.

    Args:
        state: what stands beside `model_state_dict`: `iter`, `optimizer_state_dict` and more.

    Raises:
        OSError: the file cannot be written.
    """
    return _save(path, {"model_state_dict": without_tables(model), **state})


def save_weights(path: Path, model: MeanScaleHyperprior, step: int) -> Path:
    """Write a trained model alone, in half precision: a quarter of a checkpoint or less.

    The coding tables of z and the scales of y's lie beside: made anew on another machine, last bits
    would differ, and no file of one machine would decode on the other.

    Raises:
        OSError: the file cannot be written.
    """
    trained = dict(model.named_parameters())
    weights = {key: value.half() if key in trained else value
               for key, value in without_tables(model).items()}  # fmt: skip
    reader = model_from_state_dict(weights, str(path))
    build_tables(reader)
    kept = ("entropy_bottleneck._", "gaussian_conditional.scale_table")
    weights |= {key: value for key, value in reader.state_dict().items() if key.startswith(kept)}
    return _save(path, {"iter": step, "model_state_dict": weights, "optimizer_state_dict": {}})


def build_tables(model: MeanScaleHyperprior) -> None:
    """Give a model the coding tables that its checkpoint did not hold, as CompressAI does."""
    scale_table = model.gaussian_conditional.scale_table
    model.update(scale_table if len(scale_table) else None)


def without_tables(model: MeanScaleHyperprior) -> dict[str, Tensor]:
    """A model's state dict with empty coding tables: training makes any that it had wrong."""
    tables = ("_offset", "_quantized_cdf", "_cdf_length", "scale_table")
    return {key: value[:0] if key.rpartition(".")[2] in tables else value
            for key, value in model.state_dict().items()}  # fmt: skip


def _save(path: Path, checkpoint: dict[str, object]) -> Path:
    buffer = io.BytesIO()  # torch.save itself tells of a full disk in another way than files do
    torch.save(checkpoint, buffer)
    return write_whole(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def weights_hash(model: MeanScaleHyperprior) -> str:
    """16 hexadecimal digits that tell one set of trained weights from another."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class FastGDN(GDN):
    """CompressAI's GDN, parameters, gradients and all; see `fast_layers.gdn`."""

    def __init__(self, layer: GDN):
        super().__init__(len(layer.beta), inverse=layer.inverse)
        self.to(layer.beta).load_state_dict(layer.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x, [B, C, H, W]."""
        beta, gamma = self.beta_reparam(self.beta), self.gamma_reparam(self.gamma)
        return gdn(x, beta, gamma, self.inverse)


class FrozenGDN(nn.Module):
    """CompressAI's GDN with fixed weights, re-parametrised once; see `fast_layers.gdn`."""

    def __init__(self, layer: GDN, pool: Pool | None = None):
        super().__init__()
        self.pool = pool
        gamma = layer.gamma_reparam(layer.gamma)
        self.register_buffer("beta", layer.beta_reparam(layer.beta).detach())  # [C]
        self.register_buffer("gamma", gamma.detach())  # [C, C]
        self.inverse = layer.inverse

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x, [B, C, H, W]."""
        return gdn(x, self.beta, self.gamma, self.inverse, self.pool)


class FrozenBottleneck(nn.Module):
    """What rates of z need of CompressAI's EntropyBottleneck, its weights re-parametrised once."""

    def __init__(self, bottleneck: EntropyBottleneck):
        super().__init__()
        self.register_buffer("quantiles", bottleneck.quantiles.detach())  # [N, 1, 3]
        self.likelihood_lower_bound = bottleneck.likelihood_lower_bound
        self.layers = len(bottleneck.filters) + 1
        for index in range(self.layers):
            matrix = F.softplus(bottleneck.matrices[index]).detach()  # [N, f', f]
            self.register_buffer(f"matrix_{index}", matrix)
            self.register_buffer(f"bias_{index}", bottleneck.biases[index].detach())  # [N, f', 1]
            if index < len(bottleneck.filters):
                factor = torch.tanh(bottleneck.factors[index]).detach()  # [N, f', 1]
                self.register_buffer(f"factor_{index}", factor)

    def _logits_cumulative(self, inputs: Tensor, stop_gradient: bool) -> Tensor:
        """Logits of the cumulative distribution, [N, 1, L], as CompressAI's method of this name."""
        logits = inputs.detach() if stop_gradient else inputs
        for index in range(self.layers):
            matrix, bias = getattr(self, f"matrix_{index}"), getattr(self, f"bias_{index}")
            logits = torch.baddbmm(bias, matrix, logits)  # [N, f', L]
            if index < self.layers - 1:
                factor = getattr(self, f"factor_{index}")
                logits = torch.addcmul(logits, factor, logits.tanh())
        return logits


class CoderScales(nn.Module):
    """Scales as the entropy coder has them: the bound, then up to the next one of its table.

    The gradient is that of the scales before. Maps a tensor of any shape.
    """

    def __init__(self, lower_bound: nn.Module, scale_table: Tensor):
        super().__init__()
        self.lower_bound = lower_bound
        self.register_buffer("scale_table", scale_table.float())

    def forward(self, scales: Tensor) -> Tensor:
        """Entries of the table, shaped as `scales`."""
        scales = self.lower_bound(scales)
        coded = self.scale_table[
            torch.bucketize(scales.detach().contiguous(), self.scale_table[:-1])
        ]
        return scales + (coded - scales).detach()


def speed_up(model: MeanScaleHyperprior) -> MeanScaleHyperprior:
    """The same model made ready for training, in place: `FastGDN`, channels-last."""
    for network in (model.g_a, model.g_s):
        for index, layer in enumerate(network):
            if isinstance(layer, GDN):
                network[index] = FastGDN(layer)
    return model.train().to(memory_format=torch.channels_last)


def freeze(model: MeanScaleHyperprior, coder_scales: bool = False) -> MeanScaleHyperprior:
    """The same model made ready for refinement, in place: only latents will be optimised.

    Eval mode, weights without gradients, channels-last, the layers of `fast_layers.py`. With
    `coder_scales` rates are those of `CoderScales`, a little above the continuous ones. To be
    called on the device where the model will work.

    Raises:
        ValueError: the model is frozen already, or a transposed convolution is not CompressAI's
            `deconv`.
    """
    if isinstance(model.g_s, FrozenDecoder):
        raise ValueError("the model is frozen already")
    pool = Pool()
    for network in (model.g_a, model.g_s, model.h_s):
        for index, layer in enumerate(network):
            if isinstance(layer, GDN):
                network[index] = FrozenGDN(layer, pool)
            elif isinstance(layer, nn.ConvTranspose2d):
                shape = layer.kernel_size, layer.stride, layer.padding, layer.output_padding
                if shape != ((5, 5), (2, 2), (2, 2), (1, 1)) or layer.bias is None:
                    raise ValueError(f"a kernel of 5, stride 2 and bias are wanted, not {layer}")
                # h_s is too small to gain by a pool and another form.
                pooled = None if network is model.h_s else pool
                network[index] = UpsamplingKernel(layer.weight, layer.bias, pooled)
    *layers, before, normalisation, last = model.g_s
    to_picture = ToPicture(before, normalisation.beta, normalisation.gamma, last.weight, last.bias)
    model.g_s = FrozenDecoder(*layers, to_picture)
    if coder_scales:
        build_tables(model)
        conditional = model.gaussian_conditional
        conditional.lower_bound_scale = CoderScales(
            conditional.lower_bound_scale, conditional.scale_table
        )
    model.entropy_bottleneck = FrozenBottleneck(model.entropy_bottleneck)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` (this rank's) or `cuda:N`.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise InputError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device = {name!r}: not usable here ({reason})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return device


def release_memory(model: MeanScaleHyperprior) -> None:
    """Let a frozen model give back what it keeps for pictures of the size before."""
    model.g_s[-1].upsampling.pool.clear()


def is_out_of_memory(error: Exception) -> bool:
    """Whether this was raised because a GPU or the machine has no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "allocate memory" in str(error)


# --- the steps of one pass ------------------------------------------------------------------------


@torch.no_grad()
def analyze(model: MeanScaleHyperprior, x: Tensor, tile: int = ENCODER_TILE) -> Latents:
    """The encoder's latents of x [B, 3, H, W] in [0, 1], not rounded, without gradients.

    x is continued by its border pixels to multiples of 16, so that the zeros with which the
    convolutions pad do not lie inside the last row and column of y, where the decoder has none.
    g_a sees `tile` positions of y a side at a time: it runs once, and would else take more memory
    than all that follows.
    """
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
    y = in_tiles(model.g_a, x, tile, STRIDE, 1)  # [B, M, ceil(H/16), ceil(W/16)]
    z = model.h_a(y)  # [B, N, ceil(H/64), ceil(W/64)]
    return Latents(y, z)


def medians_of(model: MeanScaleHyperprior) -> Tensor:
    """The entropy bottleneck's medians, [1, N, 1, 1]: z lies on the integers plus them."""
    return model.entropy_bottleneck.quantiles[:, 0, 1].detach().reshape(1, -1, 1, 1)


def round_around(v: Tensor, centre: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """rounding(v - centre) + centre: the lattice is the integers plus `centre`, any shape."""
    return rounding(v - centre) + centre


def prior_params(
    model: MeanScaleHyperprior, z_hat: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """scales and means of y given z_hat, both [B, M, *size], y's height and width."""
    params = model.h_s(z_hat)[:, :, : size[0], : size[1]]  # [B, 2 M, h, w]
    scales, means = params.chunk(2, dim=1)
    return scales, means


def _widened(v: Tensor) -> Tensor:
    """v in float32 at least."""
    return v.float() if v.dtype in (torch.bfloat16, torch.float16) else v


def likelihood_z(model: MeanScaleHyperprior, z_hat: Tensor) -> Tensor:
    """p(z_hat) under the factorised prior, [B, N, h', w'] in [1e-9, 1] (arXiv 1802.01436).

    The difference of sigmoids is taken on the negative side of both tails, where float32 resolves
    it; CompressAI's own underflows far above the median, gradient and all. In float32 at
    least, whatever precision the networks have.
    """
    bottleneck = model.entropy_bottleneck
    flat = _widened(z_hat).transpose(0, 1).reshape(z_hat.size(1), 1, -1)  # [N, 1, B h' w']
    with torch.autocast(z_hat.device.type, enabled=False):
        ends = torch.cat((flat - 0.5, flat + 0.5), dim=2)
        lower, upper = bottleneck._logits_cumulative(ends, stop_gradient=False).chunk(2, dim=2)
    sign = torch.where(lower + upper > 0, -1.0, 1.0)
    p = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
    p = p.reshape(z_hat.size(1), z_hat.size(0), *z_hat.shape[2:]).transpose(0, 1)
    return bottleneck.likelihood_lower_bound(p)


def likelihood_y(
    model: MeanScaleHyperprior, y_hat: Tensor, scales: Tensor, means: Tensor
) -> Tensor:
    """p(y_hat) of a Gaussian convolved with a unit box, all [B, M, h, w], in [1e-9, 1].

    Scales below the model's bound, 0.11, count as the bound (arXiv 1802.01436). In float32 at
    least, whatever precision the networks have.
    """
    conditional = model.gaussian_conditional
    p = conditional._likelihood(_widened(y_hat), _widened(scales), _widened(means))
    return conditional.likelihood_lower_bound(p)


def synthesize(
    model: MeanScaleHyperprior, y_hat: Tensor, size: tuple[int, int], tile: int | None = None
) -> Tensor:
    """x_hat [B, 3, *size] for y_hat [B, M, h, w]; not clamped to [0, 1].

    With `tile` g_s sees so many positions of y a side at a time. There is no gradient then, and
    where the model is frozen it may not be wanted: see `squared_error_of`.

    Raises:
        RuntimeError: a gradient through a frozen g_s is wanted.
    """
    x_hat = model.g_s(y_hat) if tile is None else in_tiles(model.g_s, y_hat, tile, 1, STRIDE)
    return _widened(x_hat[:, :, : size[0], : size[1]])


def squared_error_of(
    model: MeanScaleHyperprior, y_hat: Tensor, x: Tensor, corner: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Sum of squared errors of x_hat, [B] in float64, and x_hat itself, [B, 3, H, W].

    Args:
        y_hat: [B, M, h, w].
        x: [B, 3, H, W], what the picture should be from row and column `corner` on.
    """
    if isinstance(model.g_s, FrozenDecoder):
        return model.g_s.squared_error(y_hat, x, corner)
    (top, left), (height, width) = corner, x.shape[2:]
    x_hat = _widened(model.g_s(y_hat)[:, :, top : top + height, left : left + width])
    return squared_error(x_hat, x), x_hat


class TrainingPass(nn.Module):
    """One forward pass of pre-training: uniform noise stands for rounding (arXiv 1809.02736).

    A module of its own so that DistributedDataParallel can wrap the whole of it.
    """

    def __init__(self, model: MeanScaleHyperprior, lmbda: float, precision: str = "float32"):
        super().__init__()
        self.model = model
        self.lmbda = lmbda
        self.precision = getattr(torch, precision)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """loss, aux_loss, bpp, bpp_y, bpp_z and psnr (dB) of x [B, 3, H, W] in [0, 1]; scalars.

        The networks run in `precision`, the likelihoods and the distortion in float32. aux_loss
        moves nothing but the quantiles, which no other loss sees. Height and width must be
        multiples of 64.
        """
        reduced = self.precision != torch.float32
        with torch.autocast(x.device.type, dtype=self.precision, enabled=reduced):
            y = self.model.g_a(x)  # [B, M, H / 16, W / 16]
            z = self.model.h_a(y)  # [B, N, H / 64, W / 64]
            latents = Latents(y.float(), z.float())
            terms = rd_pass(self.model, x, latents, _add_uniform_noise, self.lmbda)
        means = {key: terms[key].mean() for key in ("loss", "bpp", "bpp_y", "bpp_z")}
        return {
            **means,
            "psnr": psnr(terms["mse"].detach()).mean(),
            "aux_loss": self.model.aux_loss(),
        }


def _add_uniform_noise(v: Tensor) -> Tensor:
    return v + torch.empty_like(v).uniform_(-0.5, 0.5)


def rd_pass(
    model: MeanScaleHyperprior,
    x: Tensor,
    latents: Latents,
    rounding: Callable[[Tensor], Tensor],
    lmbda: float,
    tile: int | None = None,
    precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """One pass from latents to rate, distortion and loss; relaxed or true as `rounding` is.

    Args:
        x: [B, 3, H, W] in [0, 1].
        rounding: maps centred latents of any shape; `Rounding.at(step)` or `hard_round`.
        lmbda: weight of the distortion, bpp + lmbda * 255^2 * MSE.
        tile: positions of y a side that g_s sees at a time; the whole picture without it.
        precision: of g_s, by autocast where it is not float32.

    Returns:
        loss, bpp, bpp_y, bpp_z (bits per pixel) and mse (of pixels in [0, 1], not clamped), each
        [B]; y_hat, z_hat and x_hat, the latter without a gradient where the model is frozen.
    """
    y, z = latents
    num_pixels = x.size(2) * x.size(3)
    z_hat = round_around(z, medians_of(model), rounding)
    scales, means = prior_params(model, z_hat, y.shape[2:])
    y_hat = round_around(y, means, rounding)
    bpp_z = bits_per_pixel(likelihood_z(model, z_hat), num_pixels)
    bpp_y = bits_per_pixel(likelihood_y(model, y_hat, scales, means), num_pixels)
    with _autocast(x.device.type, precision):
        if tile is None:
            error, x_hat = squared_error_of(model, y_hat, x)
        else:
            error, x_hat = tiled_error(partial(squared_error_of, model), y_hat, x, tile)
    mse = (error / x[0].numel()).to(x.dtype)
    bpp = bpp_y + bpp_z
    return {
        "loss": rate_distortion_loss(bpp, mse, lmbda),
        "bpp": bpp,
        "bpp_y": bpp_y,
        "bpp_z": bpp_z,
        "mse": mse,
        "y_hat": y_hat,
        "z_hat": z_hat,
        "x_hat": x_hat,
    }


def _autocast(device_type: str, precision: torch.dtype) -> AbstractContextManager:
    """Autocast to `precision`; float32 leaves an autocast around it alone."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device_type, dtype=precision)


@torch.no_grad()
def integer_latents(model: MeanScaleHyperprior, latents: Latents) -> Latents:
    """The symbols an entropy coder codes, int32: round(y - means) and round(z - medians)."""
    medians = medians_of(model)
    z = (latents.z - medians).round()
    _, means = prior_params(model, z + medians, latents.y.shape[2:])
    return Latents((latents.y - means).round().int(), z.int())


@torch.no_grad()
def reconstruct(
    model: MeanScaleHyperprior, symbols: Latents, size: tuple[int, int], tile: int | None = None
) -> Tensor:
    """x_hat [1, 3, *size] in [0, 1] of the integers that `integer_latents` gives.

    `tile`: see `synthesize`.
    """
    z_hat = symbols.z + medians_of(model)
    _, means = prior_params(model, z_hat, symbols.y.shape[2:])
    return synthesize(model, symbols.y + means, size, tile).clamp(0, 1)
