"""Codes integer latents into files, and decodes files into integer latents and images.

CompressAI's coders write the strings of a file: z around the medians, y around the means that h_s
predicts from z (arXiv 1809.02736). CompressAI's own `MeanScaleHyperprior.decompress` can read these
strings if height and width are multiples of 64.

h_s also chooses one of 64 tables for each symbol of y. If the decoder chooses one other table, the
rest of the string is lost. In float32 the choice depends on the processor and the number of
threads: in about every second photo one of 10^5 indices differs. So the coder computes h_s in
float64, where the choice is the same everywhere. A few indices differ from those of CompressAI's
float32 path. The file lists them as exceptions. All of this runs on the CPU, image by image.
"""

import copy
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from architectures import Architecture, Group, Latents
from coding.bitstream import (
    MAGIC,
    VERSION,
    BitstreamError,
    Header,
    check_size,
    read_bitstream,
    write_bitstream,
)
from coding.strings import apply_exceptions, decode, encode, list_exceptions
from common.compressai import EntropyModel
from common.device import is_out_of_memory
from common.errors import InputError
from fast.freezing import is_frozen
from fast.tiles import coding_tile
from metrics import picture_quality

# Float32 holds all integers up to here. Near 2^31 CompressAI's coder never ends.
MAX_SYMBOL = 2**24


@dataclass(frozen=True)
class Coder:
    """A model with coding tables on the CPU; `build_coder` creates it.

    model: the model in float32. exact: the same model with h_s in float64. weights: the first 4
    bytes of the weights' hash. tables: the CRC-32 of the tables. z_bits: the fewest bits that the N
    symbols of one position of z can take.
    """

    model: Architecture
    exact: Architecture
    weights: bytes
    tables: int
    z_bits: float


def build_coder(model: Architecture) -> Coder:
    """The coder of a model that is not frozen; it works on a copy of the model.

    The coding tables are those of the checkpoint. If it has none, CompressAI builds them. Their
    checksum covers the CDFs, lengths and offsets of z, those of y, and the scales (float32).

    Raises:
        ValueError: the model is frozen for refinement.
        InputError: the checkpoint's tables are broken.
    """
    if is_frozen(model.network):
        raise ValueError("build the coder of a model before freezing it")
    network = copy.deepcopy(model.network).cpu().float().eval().requires_grad_(False)
    model = type(model)(network.to(memory_format=torch.contiguous_format))
    model.prepare_tables()
    bottleneck, conditional = network.entropy_bottleneck, network.gaussian_conditional
    scale_table = conditional.scale_table
    _check_tables(bottleneck, model.N)
    _check_tables(conditional, len(scale_table))
    if not (scale_table.isfinite().all() and (scale_table.diff() > 0).all()):
        raise InputError("the checkpoint's table of scales is broken: save it without")
    tables = 0
    for entropy_model in (bottleneck, conditional):
        for part in (entropy_model.quantized_cdf, entropy_model.cdf_length, entropy_model.offset):
            tables = zlib.crc32(_as_bytes(part), tables)
    tables = zlib.crc32(scale_table.numpy().astype("<f4").tobytes(), tables)
    return Coder(
        model=model,
        exact=model.with_exact_scales(),
        weights=bytes.fromhex(model.weights_hash)[:4],
        tables=tables,
        z_bits=_fewest_bits(bottleneck),
    )


def _check_tables(entropy_model: EntropyModel, count: int) -> None:
    """Refuse tables that make CompressAI's coder crash or hang, because it checks nothing."""
    cdf, lengths, offsets = (
        entropy_model.quantized_cdf, entropy_model.cdf_length, entropy_model.offset
    )  # fmt: skip
    scale = 2**entropy_model.entropy_coder_precision
    sound = cdf.dim() == 2 and lengths.shape == offsets.shape == cdf.shape[:1] == (count,)
    sound = sound and bool((lengths >= 3).all() and (lengths <= cdf.size(1)).all())
    sound = sound and bool((offsets.abs() < scale).all())
    for row, length in zip(cdf, lengths, strict=True) if sound else ():
        row = row[:length]
        sound = sound and row[0] == 0 and row[-1] == scale and bool((row.diff() > 0).all())
    if not sound:
        name = type(entropy_model).__name__
        raise InputError(f"the checkpoint's coding tables of {name} are broken: save it without")


def _fewest_bits(entropy_model: EntropyModel) -> float:
    """The fewest bits for one symbol of each table, summed over the tables."""
    scale = 2**entropy_model.entropy_coder_precision
    likeliest = [
        row[:length].diff().max().item() / scale
        for row, length in zip(entropy_model.quantized_cdf, entropy_model.cdf_length, strict=True)
    ]
    return -sum(math.log2(p) for p in likeliest)


# --- latents to bytes and back --------------------------------------------------------------------


class _Writer:
    """A `value_of` that codes each group of a walk into `strings`, by name."""

    def __init__(self, symbols: Latents):
        self.symbols = symbols
        self.strings: dict[str, bytes] = {}
        self.indexes: dict[str, Tensor] = {}

    def __call__(self, group: Group) -> Tensor:
        symbols = self.symbols[group.name]
        indexes = group.distribution.indexes(symbols.shape)
        self.strings[group.name] = encode(group.distribution.coder, symbols, indexes)
        self.indexes[group.name] = indexes
        return symbols + group.centre


class _Reader:
    """A `value_of` that decodes each group of a walk into `symbols`, by name.

    It needs a model with h_s in float64. exceptions: where float32 chose other tables for y.
    """

    def __init__(
        self,
        strings: dict[str, bytes],
        shapes: dict[str, tuple[int, int, int, int]],
        exceptions: bytes,
    ):
        self.strings, self.shapes, self.exceptions = strings, shapes, exceptions
        self.symbols: Latents = {}

    def __call__(self, group: Group) -> Tensor:
        coder = group.distribution.coder
        indexes = group.distribution.indexes(self.shapes[group.name])
        if group.name == "y":
            apply_exceptions(indexes, self.exceptions, len(coder.quantized_cdf))
        symbols = decode(coder, self.strings[group.name], indexes)
        self.symbols[group.name] = symbols
        return symbols + group.centre


@torch.no_grad()
def encode_latents(coder: Coder, symbols: Latents, size: tuple[int, int]) -> bytes:
    """The file of one image's integer latents. It is decoded again as a check.

    Args:
        symbols: integers as `Architecture.symbols` returns them, on any device;
            y [1, M, ceil(H/16), ceil(W/16)] and z [1, N, ceil(H/64), ceil(W/64)].
        size: H, W of the image.

    Raises:
        BitstreamError: the image or a symbol is too large for the format, or the file does not
            decode to the same symbols.
        ValueError: the latents are no integers, or not those of an image of this size.
    """
    model = coder.model
    symbols = _checked_symbols(model, symbols, size)
    writer = _Writer(symbols)
    model.walk(size, writer)
    # The walk's float64 tensors are large: nothing but the indexes is kept of them.
    exact = coder.exact.place(symbols, size).groups[-1].distribution.indexes(symbols["y"].shape)
    exceptions = list_exceptions(exact, writer.indexes["y"])
    if len(exceptions) > 0xFFFF:
        raise BitstreamError("float32 and float64 disagree on too many scales: odd weights")
    header = Header(
        MAGIC, VERSION, *size, model.N, model.M, coder.weights, coder.tables,
        len(writer.strings["z"]), len(exceptions), _checksum(symbols, size), file=0,
    )  # fmt: skip
    data = write_bitstream(header, writer.strings["z"] + exceptions + writer.strings["y"])
    decoded, _ = decode_latents(coder, data)
    if not all(torch.equal(decoded[name], v) for name, v in symbols.items()):
        raise BitstreamError("what was written decodes to other symbols; nothing was kept")
    return data


def _checked_symbols(model: Architecture, symbols: Latents, size: tuple[int, int]) -> Latents:
    """The symbols as int32 on the CPU, after a check of type, shape and range."""
    if any(v.is_floating_point() for v in symbols.values()):
        raise ValueError("latents of floats: Architecture.symbols gives what is coded")
    symbols = {name: v.cpu() for name, v in symbols.items()}
    shapes, expected = (
        {name: tuple(v.shape) for name, v in symbols.items()},
        model.latent_shapes(size),
    )
    if shapes != expected:
        raise ValueError(f"latents of shapes {shapes}, not {expected}")
    check_size(*size)
    if any(not -MAX_SYMBOL < v.min() <= v.max() < MAX_SYMBOL for v in symbols.values()):
        raise BitstreamError(f"symbols beyond +-{MAX_SYMBOL}: these are no latents of a picture")
    # Strides choose convolutions that differ in the last bits, and CompressAI's decoder has these.
    # `contiguous` would keep other strides of a side of 1.
    return {name: torch.empty(v.shape, dtype=torch.int32).copy_(v) for name, v in symbols.items()}


@torch.no_grad()
def decode_latents(coder: Coder, data: bytes) -> tuple[Latents, tuple[int, int]]:
    """The integer latents (int32) in a file, and H, W of the image; inverts `encode_latents`.

    Raises:
        BitstreamError: the file is truncated or damaged, has another version or other weights, or
            does not decode to the symbols that were coded.
    """
    header, z_string, exceptions, y_string = read_bitstream(data)
    size = header.height, header.width
    _check_fits(coder, header)
    shapes = coder.model.latent_shapes(size)
    positions = shapes["z"][2] * shapes["z"][3]
    # A string may be up to 64 bits shorter than its symbols' bits in the tables.
    if positions * coder.z_bits > 8 * len(z_string) + 64:
        raise BitstreamError(
            f"damaged: {size[1]}x{size[0]} pixels cannot be in {len(z_string)} bytes of z"
        )
    reader = _Reader({"y": y_string, "z": z_string}, shapes, exceptions)
    with _memory_for(size):
        coder.exact.walk(size, reader)
    symbols = {name: reader.symbols[name] for name in shapes}
    if _checksum(symbols, size) != header.symbols:
        raise BitstreamError(
            "does not decode to the symbols that were coded: it was made to deceive, "
            "or this machine computes otherwise than the encoder's"
        )
    return symbols, size


def decode_picture(coder: Coder, data: bytes) -> Tensor:
    """The reconstruction x_hat [1, 3, H, W] in [0, 1] of a file, on the CPU.

    Raises:
        BitstreamError: see `decode_latents`.
    """
    symbols, size = decode_latents(coder, data)
    with _memory_for(size):
        x_hat = coder.model.reconstruct(symbols, size, coding_tile(size))
    if not x_hat.isfinite().all():
        raise BitstreamError("its picture is not finite: these are no latents of a picture")
    return x_hat


@contextmanager
def _memory_for(size: tuple[int, int]) -> Iterator[None]:
    """Turn an out-of-memory error into a BitstreamError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise BitstreamError(f"no memory for {size[1]}x{size[0]} pixels") from None


def file_measures(data: bytes, x_hat: Tensor, x: Tensor) -> dict[str, float | None]:
    """The rate of a file, and the quality of its reconstruction.

    Args:
        data: the bytes of the file of x.
        x_hat, x: the decoded and the original image, both [1, 3, H, W] in [0, 1].

    Returns:
        file_bytes; file_bpp, header included; psnr, ms_ssim and ms_ssim_db of `picture_quality`.
    """
    rate = {"file_bytes": len(data), "file_bpp": 8 * len(data) / (x.size(2) * x.size(3))}
    return {**rate, **picture_quality(x_hat, x.cpu())}


def _check_fits(coder: Coder, header: Header) -> None:
    model = coder.model
    if (header.N, header.M) != (model.N, model.M):
        raise BitstreamError(
            f"made with N = {header.N}, M = {header.M}; these weights have "
            f"N = {model.N}, M = {model.M}"
        )
    if header.weights != coder.weights:
        raise BitstreamError(
            f"made with other weights ({header.weights.hex()}; these are {coder.weights.hex()})"
        )
    if header.tables != coder.tables:
        raise BitstreamError(
            "made with other coding tables: the weights are the same, but hold no tables (those of "
            "train.py's weights.pth.tar do), and another machine computed others from them"
        )


def _checksum(symbols: Latents, size: tuple[int, int]) -> int:
    checksum = zlib.crc32(struct.pack("<2i", *size))
    return zlib.crc32(_as_bytes(symbols["y"]), zlib.crc32(_as_bytes(symbols["z"]), checksum))


def _as_bytes(v: Tensor) -> bytes:
    return v.contiguous().numpy().astype("<i4").tobytes()
