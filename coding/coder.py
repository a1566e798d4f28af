"""Codes integer latents into files, and decodes files into integer latents and images.

CompressAI's coders write the strings of a file, group of symbols by group: for example z around its
medians, and y around the means that the networks predict (arXiv 1809.02736). CompressAI's own
`decompress` can read these strings if height and width are multiples of 64. Only autoregressive
models have another lattice and another coder, see `coding.gaussians`.

A network chooses one of 64 tables for each symbol of y. If the decoder chooses one other table, the
rest of the string is lost. In float32 the choice depends on the processor and the number of
threads: in about every second photo one of 10^5 indices differs. So the coder computes these
networks in float64, where the choice is the same everywhere. A few indices differ from those of
CompressAI's float32 path. The file lists them as exceptions. All of this runs on the CPU, image by
image.
"""

import copy
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from architectures import Architecture, Group, Latents
from architectures.distributions import FactorizedPrior
from architectures.walk import Shape, TableDistribution, TurnDistribution
from coding.adapted import adapted
from coding.bitstream import (
    Bitstream,
    BitstreamError,
    CodedGroup,
    check_size,
    read_bitstream,
    write_bitstream,
)
from coding.gaussians import decode_in_turn, encode_in_turn
from coding.payload import NOTHING, Adaptation, from_bytes, to_bytes
from coding.strings import apply_exceptions, decode, encode, list_exceptions
from common.compressai import EntropyBottleneck, EntropyModel, GaussianConditional
from common.device import is_out_of_memory
from common.errors import InputError
from common.files import printable
from fast.freezing import is_frozen
from fast.tiles import coding_tile
from metrics import picture_quality

# Float32 holds all integers up to here. Near 2^31 CompressAI's coder never ends.
MAX_SYMBOL = 2**24


@dataclass(frozen=True)
class Coder:
    """A model with coding tables on the CPU; `build_coder` creates it.

    model: the model in float32. exact: the same model with the networks that predict distributions
    in float64. weights: the first 4 bytes of the weights' hash. tables: the CRC-32 of the tables.
    """

    model: Architecture
    exact: Architecture
    weights: bytes
    tables: int

    def adapted(self, told: Adaptation) -> "Coder":
        """The same coder of an adapted model.

        Raises:
            BitstreamError, InputError: see `adapted`.
        """
        if told == NOTHING:
            return self
        return replace(self, model=adapted(self.model, told), exact=adapted(self.exact, told))


def build_coder(model: Architecture) -> Coder:
    """The coder of a model that is not frozen; it works on a copy of the model.

    The coding tables are those of the checkpoint. If it has none, CompressAI builds them. Their
    checksum covers the CDFs, lengths and offsets of each entropy model, then the scales (float32).

    Raises:
        ValueError: the model is frozen for refinement.
        InputError: the checkpoint's tables are broken, or the model cannot write files.
    """
    if is_frozen(model.network):
        raise ValueError("build the coder of a model before freezing it")
    model.check_codable()
    model = model.copy_of(copy.deepcopy(model.network).cpu().float().eval().requires_grad_(False))
    model.network.to(memory_format=torch.contiguous_format)
    model.prepare_tables()
    tables, scale_tables = 0, []
    for entropy_model in model.table_models:
        _check_tables(entropy_model)
        for part in (entropy_model.quantized_cdf, entropy_model.cdf_length, entropy_model.offset):
            tables = zlib.crc32(_as_bytes(part), tables)
        if isinstance(entropy_model, GaussianConditional):
            scale_tables.append(_checked_scales(entropy_model.scale_table))
    for scale_table in scale_tables:
        tables = zlib.crc32(scale_table.numpy().astype("<f4").tobytes(), tables)
    weights = bytes.fromhex(model.weights_hash)[:4]
    return Coder(model, model.in_float64(), weights, tables)


def _check_tables(entropy_model: EntropyModel) -> None:
    """Refuse tables that make CompressAI's coder crash or hang, because it checks nothing."""
    cdf, lengths, offsets = (
        entropy_model.quantized_cdf, entropy_model.cdf_length, entropy_model.offset
    )  # fmt: skip
    bottleneck = isinstance(entropy_model, EntropyBottleneck)
    count = len(entropy_model.quantiles if bottleneck else entropy_model.scale_table)
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


def _checked_scales(scale_table: Tensor) -> Tensor:
    if not (scale_table.isfinite().all() and (scale_table.diff() > 0).all()):
        raise InputError("the checkpoint's table of scales is broken: save it without")
    return scale_table


def _fewest_bits(entropy_model: EntropyModel) -> float:
    """The fewest bits for one symbol of each table, summed over the tables."""
    scale = 2**entropy_model.entropy_coder_precision
    likeliest = [
        row[:length].diff().max().item() / scale
        for row, length in zip(entropy_model.quantized_cdf, entropy_model.cdf_length, strict=True)
    ]
    return -sum(math.log2(p) for p in likeliest)


# --- latents to bytes and back --------------------------------------------------------------------


def _encoded(coder: Coder, symbols: Latents, size: tuple[int, int]) -> tuple[CodedGroup, ...]:
    """The groups of a file, in coding order."""
    exact_groups = coder.exact.place(symbols, size).groups
    coded: list[CodedGroup] = []

    def written(group: Group) -> Tensor:
        here = group.part.of(symbols[group.name])
        exact_group = exact_groups[len(coded)]
        if isinstance(exact_group.distribution, TurnDistribution):
            coded.append(CodedGroup(encode_in_turn(exact_group.distribution, here)))
            return group.on_lattice(here)
        shape = group.part.shape_in(coder.model.latent_shapes(size)[group.name])
        distribution = _with_tables(group)
        indexes = distribution.indexes(shape)
        exceptions = list_exceptions(_with_tables(exact_group).indexes(shape), indexes)
        if len(exceptions) > 0xFFFF:
            raise BitstreamError("float32 and float64 disagree on too many scales: odd weights")
        coded.append(CodedGroup(encode(distribution.coder, here, indexes), exceptions))
        return group.on_lattice(here)

    coder.model.walk(size, written)
    return tuple(coded)


def _with_tables(group: Group) -> TableDistribution:
    if not isinstance(group.distribution, TableDistribution):
        name = type(group.distribution).__name__
        raise BitstreamError(f"{group.name} has the distribution {name}, which no coder knows")
    return group.distribution


class _Reader:
    """A `value_of` that decodes each group of a walk into `symbols`, by name.

    It needs a model whose distributions are computed in float64.
    """

    def __init__(self, groups: Sequence[CodedGroup], shapes: dict[str, Shape]):
        self.groups, self.shapes = groups, shapes
        self.read = 0
        self.symbols: Latents = {}

    def __call__(self, group: Group) -> Tensor:
        if self.read == len(self.groups):
            raise BitstreamError(f"damaged: it has {self.read} groups, which are not enough")
        string, exceptions = self.groups[self.read]
        self.read += 1
        shape = group.part.shape_in(self.shapes[group.name])
        if isinstance(group.distribution, TurnDistribution):
            here = decode_in_turn(group.distribution, string, shape)
        else:
            here = self._by_tables(group, string, exceptions, shape)
        if group.name not in self.symbols:
            self.symbols[group.name] = here.new_zeros(self.shapes[group.name])
        group.part.write(self.symbols[group.name], here)
        return group.on_lattice(here)

    def _by_tables(self, group: Group, string: bytes, exceptions: bytes, shape: Shape) -> Tensor:
        distribution = _with_tables(group)
        if isinstance(distribution, FactorizedPrior):
            # A string may be up to 64 bits shorter than its symbols' bits in the tables.
            least = shape[2] * shape[3] * _fewest_bits(distribution.coder)
            if least > 8 * len(string) + 64:
                raise BitstreamError(
                    f"damaged: its picture cannot be in {len(string)} bytes of {group.name}"
                )
        indexes = distribution.indexes(shape).clone()
        if exceptions:
            apply_exceptions(indexes, exceptions, len(distribution.coder.quantized_cdf))
        return decode(distribution.coder, string, indexes)


@torch.no_grad()
def encode_latents(
    coder: Coder, symbols: Latents, size: tuple[int, int], told: Adaptation = NOTHING
) -> bytes:
    """The file of one image's integer latents. It is decoded again as a check.

    Args:
        symbols: integers as `Architecture.symbols` returns them, on any device, with the shapes of
            `Architecture.latent_shapes`.
        size: H, W of the image.
        told: what the decoder is told beside the latents.

    Raises:
        BitstreamError: the image or a symbol is too large for the format, or the file does not
            decode to the same symbols.
        ValueError: the latents are no integers, or not those of an image of this size.
    """
    symbols = _checked_symbols(coder.model, symbols, size)
    groups = _encoded(coder.adapted(told), symbols, size)
    data = write_bitstream(Bitstream(
        *size, coder.model.name_in_files, coder.weights, coder.tables, _checksum(symbols, size),
        groups, adaptation=to_bytes(told),
    ))  # fmt: skip
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
    _, symbols, size = _decoded(coder, data)
    return symbols, size


def _decoded(coder: Coder, data: bytes) -> tuple[Coder, Latents, tuple[int, int]]:
    """The coder as a file adapts it, and `decode_latents` of the file."""
    bitstream = read_bitstream(data)
    _check_fits(coder, bitstream)
    coder = coder.adapted(from_bytes(bitstream.adaptation))
    size = bitstream.size
    shapes = coder.model.latent_shapes(size)
    reader = _Reader(bitstream.groups, shapes)
    with _memory_for(size):
        coder.exact.walk(size, reader)
    if reader.read < len(bitstream.groups):
        raise BitstreamError(f"damaged: it has {len(bitstream.groups)} groups, too many")
    if _checksum(reader.symbols, size) != bitstream.symbols:
        raise BitstreamError(
            "does not decode to the symbols that were coded: it was made to deceive, "
            "or this machine computes otherwise than the encoder's"
        )
    return coder, {name: reader.symbols[name] for name in shapes}, size


@torch.no_grad()
def decode_picture(coder: Coder, data: bytes) -> Tensor:
    """The reconstruction x_hat [1, 3, H, W] in [0, 1] of a file, on the CPU.

    Raises:
        BitstreamError: see `decode_latents`.
    """
    coder, symbols, size = _decoded(coder, data)
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


def _check_fits(coder: Coder, bitstream: Bitstream) -> None:
    if bitstream.family != coder.model.name_in_files:
        raise BitstreamError(
            f"made with a model of {printable(bitstream.family)}; these weights are of "
            f"{coder.model.name_in_files}"
        )
    if bitstream.weights != coder.weights:
        raise BitstreamError(
            f"made with other weights ({bitstream.weights.hex()}; these are {coder.weights.hex()})"
        )
    if bitstream.tables != coder.tables:
        raise BitstreamError(
            "made with other coding tables: the weights are the same, but hold no tables (those of "
            "train.py's weights.pth.tar do), and another machine computed others from them"
        )


def _checksum(symbols: Latents, size: tuple[int, int]) -> int:
    """The CRC-32 of height, width and all symbols, latent by latent from the last name's on."""
    checksum = zlib.crc32(struct.pack("<2i", *size))
    for name in sorted(symbols, reverse=True):
        checksum = zlib.crc32(_as_bytes(symbols[name]), checksum)
    return checksum


def _as_bytes(v: Tensor) -> bytes:
    return v.contiguous().numpy().astype("<i4").tobytes()
