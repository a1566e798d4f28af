"""Integer latents become files, and files become pictures; no refinement in here.

python codec.py compress PHOTOS -o coded \
--checkpoint example_files/weights/mean_scale_n64_lambda0.01.pth.tar
python codec.py decompress coded -o decoded \
--checkpoint example_files/weights/mean_scale_n64_lambda0.01.pth.tar
python codec.py info coded

A file is a header (`HEADER`), the string of z, the index exceptions and the string of y. The
strings are those of CompressAI's coders, and its stock `MeanScaleHyperprior.decompress` reads them
where height and width are multiples of 64: z around the medians, y around the means that h_s
predicts from z (arXiv 1809.02736).

h_s also chooses, among 64 tables, the one that each symbol of y is coded with, and one other choice
ruins a string. In float32 that choice hangs on the processor and the number of threads: in about
every second photo one of 10^5 indices moves. So h_s is computed in float64 here, where the choice
is the same everywhere, and the few indices that CompressAI's float32 path sees otherwise are listed
in the file as exceptions. All of this runs on the CPU, image by image.
"""

import copy
import math
import struct
import sys
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from common.command_line import script_parser
from common.errors import InputError, exits_with_one_line, reason_of

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

from common.files import fitting, label_of, printable, user_path, write_whole
from common.finding import Found, find_by_suffix, find_images
from common.limits import MAX_PIXELS
from datasets import ImageFiles, save_picture
from experimental_inference_methods import hard_round
from fast_layers import keep_pages
from metrics import picture_quality
from models import (
    EntropyModel,
    FrozenGDN,
    Latents,
    MeanScaleHyperprior,
    analyze,
    build_tables,
    integer_latents,
    is_out_of_memory,
    load_checkpoint,
    medians_of,
    rd_pass,
    reconstruct,
    weights_hash,
)
from tiles import coding_tile

MAGIC, VERSION, SUFFIX = b"OLC", 1, ".olc"
# name, type as in Python's struct (little-endian), meaning
HEADER = (
    ("magic", "3s", "OLC"),
    ("version", "B", "of this layout: 1"),
    ("height", "I", "of the picture, pixels"),
    ("width", "I", "of the picture, pixels"),
    ("N", "H", "channels of z"),
    ("M", "H", "channels of y"),
    ("weights", "4s", "start of the weights' SHA-256"),
    ("tables", "I", "CRC-32 of the coders' tables, see `build_coder`"),
    ("z_bytes", "I", "length of the string of z, which follows the header"),
    ("exception_bytes", "H", "length of the index exceptions, which follow it; y's string is last"),
    ("symbols", "I", "CRC-32 of height, width, z and y, little-endian int32, row by row"),
    ("file", "I", "CRC-32 of the whole file, with zeros for this field"),
)
LAYOUT = struct.Struct("<" + "".join(code for _, code, _ in HEADER))
Header = namedtuple("Header", [name for name, _, _ in HEADER])
# Float32 counts that far; towards 2^31 CompressAI's coder never ends.
MAX_SYMBOL = 2**24


class BitstreamError(InputError):
    """A file cannot be decoded exactly, or latents cannot be coded: one line that says why."""


class Bitstream(NamedTuple):
    """The parts of a file: its header and three byte strings."""

    header: Header
    z_string: bytes
    exceptions: bytes
    y_string: bytes


@dataclass(frozen=True)
class Coder:
    """A model made ready to code on the CPU; made by `build_coder`.

    model: CompressAI's, float32, with tables. h_s: its hyper-decoder in float64. weights: 4 bytes
    that tell weights apart; tables: the same of the tables. z_bits: what the coder needs at least
    for the N symbols of one position of z.
    """

    model: MeanScaleHyperprior
    h_s: nn.Sequential
    weights: bytes
    tables: int
    z_bits: float


def build_coder(model: MeanScaleHyperprior) -> Coder:
    """A copy of a model, not yet frozen, that `encode_latents` and `decode_latents` work with.

    The coders' tables are those of the checkpoint; where it has none, CompressAI builds them. Their
    checksum goes over z's CDFs, lengths and offsets, y's, and the scales (float32).

    Raises:
        ValueError: the model is frozen for refinement.
        InputError: the checkpoint's tables are no tables.
    """
    if any(isinstance(layer, FrozenGDN) for layer in model.modules()):
        raise ValueError("build the coder of a model before freezing it")
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    model = model.to(memory_format=torch.contiguous_format)
    build_tables(model)
    bottleneck, conditional = model.entropy_bottleneck, model.gaussian_conditional
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
        h_s=copy.deepcopy(model.h_s).double(),
        weights=bytes.fromhex(weights_hash(model))[:4],
        tables=tables,
        z_bits=_fewest_bits(model.entropy_bottleneck),
    )


def _check_tables(entropy_model: EntropyModel, count: int) -> None:
    """Refuse tables with which CompressAI's coder, which checks nothing, would crash or hang."""
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
    """Bits that one symbol of every table needs at least, summed over the tables."""
    scale = 2**entropy_model.entropy_coder_precision
    likeliest = [
        row[:length].diff().max().item() / scale
        for row, length in zip(entropy_model.quantized_cdf, entropy_model.cdf_length, strict=True)
    ]
    return -sum(math.log2(p) for p in likeliest)


# --- latents to bytes and back --------------------------------------------------------------------


def encode_latents(coder: Coder, symbols: Latents, size: tuple[int, int]) -> bytes:
    """A file of one image's integer latents, decoded and compared before it is returned.

    Args:
        symbols: integers as `integer_latents` gives them, on any device; y [1, M, ceil(H/16),
            ceil(W/16)] and z [1, N, ceil(H/64), ceil(W/64)].
        size: H, W of the picture.

    Raises:
        BitstreamError: the picture or a symbol is too large for the format, or what was written
            does not decode to the same symbols.
        ValueError: the latents are no integers, or not those of a picture of this size.
    """
    if any(v.is_floating_point() for v in symbols):
        raise ValueError("latents of floats: integer_latents gives what is coded")
    model, symbols = coder.model, Latents(*(v.cpu() for v in symbols))
    shapes = _latent_shapes(size, model.N, model.M)
    if tuple(v.shape for v in symbols) != shapes:
        raise ValueError(f"latents of shapes {[tuple(v.shape) for v in symbols]}, not {shapes}")
    _check_size(*size)
    if any(not -MAX_SYMBOL < v.min() <= v.max() < MAX_SYMBOL for v in symbols):
        raise BitstreamError(f"symbols beyond +-{MAX_SYMBOL}: these are no latents of a picture")
    symbols = Latents(*(v.int() for v in symbols))
    indexes, exceptions = _indexes_to_write(coder, symbols.z, shapes.y[2:])
    z_string = _encode(model.entropy_bottleneck, symbols.z, _z_indexes(shapes.z))
    y_string = _encode(model.gaussian_conditional, symbols.y, indexes)
    if len(exceptions) > 0xFFFF:
        raise BitstreamError("float32 and float64 disagree on too many scales: odd weights")
    header = Header(
        MAGIC, VERSION, *size, model.N, model.M, coder.weights, coder.tables,
        len(z_string), len(exceptions), _checksum(symbols, size), file=0,
    )  # fmt: skip
    data = _sign(header, z_string + exceptions + y_string)
    decoded, _ = decode_latents(coder, data)
    if not all(torch.equal(a, b) for a, b in zip(decoded, symbols, strict=True)):
        raise BitstreamError("what was written decodes to other symbols; nothing was kept")
    return data


def decode_latents(coder: Coder, data: bytes) -> tuple[Latents, tuple[int, int]]:
    """The integer latents (int32) in a file and the picture's H, W; the inverse of the above.

    Raises:
        BitstreamError: the file is truncated, damaged, of another version or other weights, or
            does not decode to the symbols that were coded.
    """
    header, z_string, exceptions, y_string = read_bitstream(data)
    model, size = coder.model, (header.height, header.width)
    _check_fits(coder, header)
    shapes = _latent_shapes(size, model.N, model.M)
    positions = shapes.z[2] * shapes.z[3]
    # The coder ends at most 64 bits under what its tables say.
    if positions * coder.z_bits > 8 * len(z_string) + 64:
        raise BitstreamError(
            f"damaged: {size[1]}x{size[0]} pixels cannot be in {len(z_string)} bytes of z"
        )
    with _memory_for(size):
        z = _decode(model.entropy_bottleneck, z_string, _z_indexes(shapes.z))
        indexes = _indexes(coder, z, shapes.y[2:])
        _apply_exceptions(indexes, exceptions, len(model.gaussian_conditional.scale_table))
        symbols = Latents(_decode(model.gaussian_conditional, y_string, indexes), z)
    if _checksum(symbols, size) != header.symbols:
        raise BitstreamError(
            "does not decode to the symbols that were coded: it was made to deceive, "
            "or this machine computes otherwise than the encoder's"
        )
    return symbols, size


def decode_picture(coder: Coder, data: bytes) -> Tensor:
    """x_hat [1, 3, H, W] in [0, 1], on the CPU, of a file.

    Raises:
        BitstreamError: see `decode_latents`.
    """
    symbols, size = decode_latents(coder, data)
    with _memory_for(size):
        x_hat = reconstruct(coder.model, symbols, size, coding_tile(size))
    if not x_hat.isfinite().all():
        raise BitstreamError("its picture is not finite: these are no latents of a picture")
    return x_hat


@contextmanager
def _memory_for(size: tuple[int, int]) -> Iterator[None]:
    """Make a BitstreamError of what is raised where memory ends."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise BitstreamError(f"no memory for {size[1]}x{size[0]} pixels") from None


def file_measures(data: bytes, x_hat: Tensor, x: Tensor) -> dict[str, float | None]:
    """What a file of x costs, and what x_hat, decoded from it, gives; both [1, 3, H, W] in [0, 1].

    file_bytes; file_bpp, header and all; psnr, ms_ssim and ms_ssim_db as `picture_quality` has
    them.
    """
    rate = {"file_bytes": len(data), "file_bpp": 8 * len(data) / (x.size(2) * x.size(3))}
    return {**rate, **picture_quality(x_hat, x.cpu())}


def read_bitstream(data: bytes) -> Bitstream:
    """The header and the strings of a file, checked as far as that goes without the weights.

    `[[y_string], [z_string]]` is what CompressAI's `decompress` takes.

    Raises:
        BitstreamError: no such file, another version, truncated or damaged.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise BitstreamError(f"no file of this codec (they start with {MAGIC.decode()})")
    if len(data) < LAYOUT.size:
        raise BitstreamError(f"truncated: {len(data)} bytes, the header alone has {LAYOUT.size}")
    header = Header(*LAYOUT.unpack_from(data))
    if header.version != VERSION:
        raise BitstreamError(f"of version {header.version}: this code reads version {VERSION}")
    body = data[LAYOUT.size :]
    if header.file != _sign_of(header, body):
        raise BitstreamError("truncated or damaged: its checksum does not match its bytes")
    z_end = header.z_bytes
    y_start = z_end + header.exception_bytes
    if y_start > len(body):
        raise BitstreamError(f"damaged: strings of {y_start} bytes in {len(body)}")
    _check_size(header.height, header.width)
    return Bitstream(header, body[:z_end], body[z_end:y_start], body[y_start:])


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise BitstreamError(f"{width}x{height} pixels: from 1 to {MAX_PIXELS} can be coded")


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


def _latent_shapes(size: tuple[int, int], N: int, M: int) -> Latents:
    """The shapes of y and z of a picture of H, W."""
    height, width = size
    return Latents((1, M, -(-height // 16), -(-width // 16)),
                   (1, N, -(-height // 64), -(-width // 64)))  # fmt: skip


def _sign(header: Header, body: bytes) -> bytes:
    return LAYOUT.pack(*header._replace(file=_sign_of(header, body))) + body


def _sign_of(header: Header, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(LAYOUT.pack(*header._replace(file=0))))


def _checksum(symbols: Latents, size: tuple[int, int]) -> int:
    checksum = zlib.crc32(struct.pack("<2i", *size))
    return zlib.crc32(_as_bytes(symbols.y), zlib.crc32(_as_bytes(symbols.z), checksum))


def _as_bytes(v: Tensor) -> bytes:
    return v.contiguous().numpy().astype("<i4").tobytes()


# --- CompressAI's coders --------------------------------------------------------------------------


def _encode(entropy_model: EntropyModel, symbols: Tensor, indexes: Tensor) -> bytes:
    """The string of integer symbols, each coded with the table of its index; both [1, C, h, w]."""
    return EntropyModel.compress(entropy_model, symbols.float(), indexes)[0]


def _decode(entropy_model: EntropyModel, string: bytes, indexes: Tensor) -> Tensor:
    """The symbols, int32 [1, C, h, w], of a string.

    CompressAI's decoder checks no end: behind the string it reads on in the zeros put there. A
    symbol costs it less than 16 bits, an escaped one four more, and as many as these count up: a
    nibble of 15 means at least as many nibbles, and that the next counts too. Honest symbols, below
    2^24, count to 7. So few nibbles of 15 can follow each other that it stays inside the zeros.

    Raises:
        BitstreamError: no encoder writes such a string.
    """
    words = np.frombuffer(string[: len(string) // 4 * 4], "<u4") == 0xFFFFFFFF
    if len(string) > 6 * indexes.numel() + 64 or (words[1:] & words[:-1]).any():
        raise BitstreamError("damaged: no encoder writes such a string")
    padded = string + bytes(4 * indexes.numel() + 2**16)
    return EntropyModel.decompress(entropy_model, [padded], indexes, torch.int32)


def _z_indexes(shape: Sequence[int]) -> Tensor:
    """Table c for channel c, int32 [1, N, h', w']."""
    return torch.arange(shape[1], dtype=torch.int32).reshape(1, -1, 1, 1).expand(*shape)


def _indexes(coder: Coder, z: Tensor, size: tuple[int, int]) -> Tensor:
    """The table of every symbol of y, int32 [1, M, *size], from h_s in float64."""
    z_hat = (z + medians_of(coder.model)).double()  # [1, N, h', w']
    scales = coder.h_s(z_hat)[:, : coder.model.M, : size[0], : size[1]]
    return coder.model.gaussian_conditional.build_indexes(scales)


def _indexes_to_write(coder: Coder, z: Tensor, size: tuple[int, int]) -> tuple[Tensor, bytes]:
    """The tables that CompressAI's float32 path chooses, and where `_indexes` differs."""
    model = coder.model
    scales = model.h_s(z + medians_of(model))[:, : model.M, : size[0], : size[1]]
    stock = model.gaussian_conditional.build_indexes(scales)
    return stock, _list_exceptions(_indexes(coder, z, size), stock)


def _list_exceptions(indexes: Tensor, wanted: Tensor) -> bytes:
    """One number for each step by which an index must move: 2 * gap, plus 1 if it moves down.

    The gap counts positions since the last such number, row by row. Numbers are written seven bits
    a byte, the low ones first, the high bit on all but the last byte.
    """
    moves = (wanted - indexes).flatten().numpy()
    written, last = bytearray(), 0
    for position in np.flatnonzero(moves).tolist():
        for _ in range(abs(int(moves[position]))):
            number = 2 * (position - last) + int(moves[position] < 0)
            last = position
            while number >= 128:
                written.append(number & 127 | 128)
                number >>= 7
            written.append(number)
    return bytes(written)


def _apply_exceptions(indexes: Tensor, exceptions: bytes, tables: int) -> None:
    """Move indexes, in place, as `_list_exceptions` wrote; there are so many tables.

    Raises:
        BitstreamError: they lead outside the picture or the tables.
    """
    flat, position, number, shift = indexes.view(-1), 0, 0, 0
    for byte in exceptions:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            position += number >> 1
            if position >= len(flat):
                raise BitstreamError("damaged: an index exception lies outside the picture")
            flat[position] += -1 if number & 1 else 1
            number = shift = 0
    if shift or flat.min() < 0 or flat.max() >= tables:
        raise BitstreamError("damaged: its index exceptions make no sense")


# --- the command line -----------------------------------------------------------------------------


class Job(NamedTuple):
    """A file to work on, and the name, below the output folder, of what becomes of it."""

    source: Path
    target: str


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """compress, decompress, info; exit code 0, 2 if anything was wrong with any file."""
    parser = script_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compress = commands.add_parser("compress", help="code images, without refinement")
    decompress = commands.add_parser("decompress", help="decode files to PNG")
    info = commands.add_parser("info", help="print what the headers of files say")
    compress.add_argument(
        "paths", nargs="+", type=user_path, metavar="IMAGE", help="a file or a folder"
    )
    for command in (decompress, info):
        command.add_argument(
            "paths", nargs="+", type=user_path, metavar="FILE", help=f"a {SUFFIX} file or a folder"
        )
    for command in (compress, decompress):
        command.add_argument(
            "--checkpoint", required=True, type=user_path, metavar="WEIGHTS", help="of the model"
        )
        command.add_argument(
            "-o",
            "--output",
            required=True,
            type=user_path,
            metavar="FOLDER",
            help="made if need be",
        )
        command.add_argument(
            "--overwrite", action="store_true", help="replace files that are there already"
        )
    arguments = parser.parse_args(argv)
    keep_pages()
    if arguments.command == "info":
        return for_each(find_jobs(arguments.paths, find_coded), print_header)
    folder = Path(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"-o {folder}: is a file; a folder is wanted")
    if arguments.command == "compress":
        jobs = find_jobs(arguments.paths, find_images, lambda name: fitting(name, SUFFIX))
    else:
        jobs = apart(find_jobs(arguments.paths, find_coded, picture_name))
    taken = [job.target for job in jobs if (folder / job.target).exists()]
    if taken and not arguments.overwrite:
        raise InputError(f"{folder / taken[0]} is there already: see --overwrite")
    coder = open_coder(arguments.checkpoint)
    write_whole(folder / f".{uuid4().hex}.tmp", lambda file: file.touch()).unlink()  # it can be
    if arguments.command == "compress":
        return compress_images(jobs, coder, folder)
    return for_each(jobs, partial(decompress_file, coder, folder))


def open_coder(checkpoint: str) -> Coder:
    """The coder of a checkpoint's model.

    Raises:
        InputError: see `load_checkpoint` and `build_coder`; it names --checkpoint.
    """
    try:
        return build_coder(load_checkpoint(checkpoint))
    except InputError as error:
        message = str(error).removeprefix("pretrain ")
        raise InputError(f"--checkpoint {message}") from None


def picture_name(name: str) -> str:
    """a.png.olc gives a.png, a.jpg.olc gives a.jpg.png."""
    name = name.removesuffix(SUFFIX)
    return name if name.endswith(".png") else fitting(name, ".png")


def find_coded(path: str) -> Found:
    """The files of this codec below a folder, or the one at `path`.

    Raises:
        InputError: there is none.
    """
    return find_by_suffix(path, frozenset((SUFFIX,)))


def find_jobs(
    paths: Sequence[str],
    find: Callable[[str], Found],
    target_of: Callable[[str], str] | None = None,
) -> list[Job]:
    """The files that `find` finds at paths, and what `target_of` makes of their names.

    Without `target_of` the target is the path itself. A line says what was passed over.

    Raises:
        InputError: a path leads to no such file, or files in two places have one name.
    """
    jobs: dict[str, Job] = {}
    for path in paths:
        found = find(path)
        if found.passed_over:
            print(f"{printable(path)}: {found.passed_over}", file=sys.stderr)
        for source in found.files:
            name = source.relative_to(found.root).as_posix() if target_of else str(source)
            job = jobs.setdefault(name, Job(source, target_of(name) if target_of else name))
            if job.source != source:
                raise InputError(f"{job.source} and {source} would both become {job.target}")
    return list(jobs.values())


def apart(jobs: Sequence[Job]) -> list[Job]:
    """The same jobs, each with a target of its own: .png is added where it is another's own name.

    Beside a.jpg.png.olc, which gives a.jpg.png, a.jpg.olc gives a.jpg.png.png.
    """
    taken = {job.target for job in jobs if job.source.name == Path(job.target).name + SUFFIX}
    distinct = []
    for job in jobs:
        target = job.target
        while target in taken and job.source.name != Path(target).name + SUFFIX:
            target = fitting(target, ".png")
        taken.add(target)
        distinct.append(job._replace(target=target))
    return distinct


def for_each(jobs: Sequence[Job], act: Callable[[Job], None]) -> int:
    """Let `act` have every job; one that fails is one line and exit code 2, the rest goes on."""
    code = 0
    for job in jobs:
        try:
            act(job)
        except BrokenPipeError:
            raise
        except (InputError, OSError, RuntimeError, MemoryError) as error:
            print(f"error: {printable(_failure(job, error))}", file=sys.stderr)
            code = 2
    return code


def _failure(job: Job, error: Exception) -> str:
    """What failed at a job, in a line that begins with the file that is to blame.

    Raises:
        RuntimeError: the error itself, where it is a program's and not a file's.
    """
    if isinstance(error, OSError) and error.filename not in (None, str(job.source)):
        return reason_of(error)  # what could not be written
    if isinstance(error, OSError):
        return f"{job.source}: {error.strerror or error}"
    if isinstance(error, InputError):
        return f"{job.source}: {error}"
    if not is_out_of_memory(error):
        raise error
    return f"{job.source}: no memory for a picture of this size"


def compress_images(jobs: Sequence[Job], coder: Coder, folder: Path) -> int:
    """Write a file for each image into `folder`, and print its rate beside the estimated one."""
    width = max(4, *(len(label_of(job.target)) for job in jobs))
    rows: list[dict[str, float]] = []

    def line(name: str, size: str, row: dict[str, float]) -> str:
        return (
            f"{name:{width}} {size:>11} {row['file_bytes']:9.0f} {row['file_bpp']:8.4f} "
            f"{row['estimate']:8.4f} {100 * (row['file_bpp'] / row['estimate'] - 1):+6.2f}% "
            f"{row['psnr']:5.2f} dB {row['coding']:6.2f} s {row['decoding']:6.2f} s"
        )

    def compress(job: Job) -> None:
        image = ImageFiles(find_images(job.source))[0]
        if image.x is None:
            raise InputError(image.error)
        x = image.x[None]  # [1, 3, H, W]
        data, row = compress_picture(coder, x)
        write_whole(folder / job.target, lambda file: file.write_bytes(data))
        rows.append(row)
        print(line(label_of(job.target), f"{x.size(3)}x{x.size(2)}", row))
        for note in image.notes:
            print(f"{printable(str(job.source))}: {note}", file=sys.stderr)

    print(f"{'file':{width}} {'size':>11} {'bytes':>9} {'bpp':>8} {'estimate':>8} {'over':>7} "
          f"{'PSNR':>8} {'coding':>8} {'decoding':>8}")  # fmt: skip
    code = for_each(jobs, compress)
    if len(rows) > 1:
        shown = ("file_bytes", "file_bpp", "estimate", "psnr", "coding", "decoding")
        means = {key: sum(row[key] for row in rows) / len(rows) for key in shown}
        print(line("mean", "", means))
    return code


def compress_picture(coder: Coder, x: Tensor) -> tuple[bytes, dict[str, float]]:
    """The file of x [1, 3, H, W] in [0, 1], as the encoder's latents have it, and its measures.

    Returns:
        The file; those of `file_measures`, the `estimate` of its bpp by the likelihoods, and the
        seconds of `coding` and `decoding`.

    Raises:
        BitstreamError: see `encode_latents`.
    """
    start, tile = time.perf_counter(), coding_tile(x.shape[2:])
    latents = analyze(coder.model, x)
    data = encode_latents(coder, integer_latents(coder.model, latents), tuple(x.shape[2:]))
    coded = time.perf_counter()
    x_hat = decode_picture(coder, data)
    decoded = time.perf_counter()
    with torch.no_grad():
        terms = rd_pass(coder.model, x, latents, hard_round, 0.0, tile)
        estimate = terms["bpp"].item()
    times = {"coding": coded - start, "decoding": decoded - coded}
    return data, {**file_measures(data, x_hat, x), "estimate": estimate, **times}


def read_file(path: Path) -> bytes:
    """The bytes of a file, if it may be one of this codec: nothing large is read in vain.

    Raises:
        BitstreamError: it does not begin like one, or is longer than its header allows.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(LAYOUT.size)
        if len(start) == LAYOUT.size and start.startswith(MAGIC):
            header = Header(*LAYOUT.unpack(start))
            shapes = _latent_shapes((header.height, header.width), header.N, header.M)
            symbols = math.prod(shapes.y) + math.prod(shapes.z)
            if path.stat().st_size > LAYOUT.size + 6 * symbols + 2**17:
                raise BitstreamError("damaged: longer than any file of a picture of its size")
            return start + file.read()
    return start


def decompress_file(coder: Coder, folder: Path, job: Job) -> None:
    """Write the picture of one file into `folder`, and print where."""
    x_hat = decode_picture(coder, read_file(job.source))
    print(printable(str(save_picture(folder / job.target, x_hat[0]))))


def print_header(job: Job) -> None:
    """Print what a file's header says, and how its bytes divide."""
    data = read_file(job.source)
    header, z_string, exceptions, y_string = read_bitstream(data)
    bpp = 8 * len(data) / (header.height * header.width)
    print(
        f"{printable(str(job.source))}: version {header.version}, "
        f"{header.width}x{header.height} pixels, {bpp:.4f} bpp\n"
        f"  N = {header.N}, M = {header.M}, weights {header.weights.hex()}, "
        f"tables {header.tables:08x}, symbols {header.symbols:08x}\n"
        f"  {len(data)} bytes: header {LAYOUT.size}, z {len(z_string)}, "
        f"index exceptions {len(exceptions)}, y {len(y_string)}"
    )


if __name__ == "__main__":
    sys.exit(main())
