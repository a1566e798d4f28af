"""Integer latents become files, and files become pictures; no refinement in here.

python codec.py compress photo.png photos/ --checkpoint WEIGHTS -o coded
python codec.py decompress coded/*.olc --checkpoint WEIGHTS -o decoded
python codec.py info coded/*.olc

The layout of a file is in coding/bitstream.py; coding/coder.py says why any machine can decode it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from config import InputError, exits_with_one_line, reason_of

# isort: split
import torch
from torch import Tensor

from coding.bitstream import LAYOUT, SUFFIX, read_bitstream, read_file
from coding.coder import (
    Coder,
    build_coder,
    decode_picture,
    encode_latents,
    file_measures,
)
from common.device import is_out_of_memory
from common.files import fitting, label_of, printable, user_path, write_whole
from common.finding import Found, find_by_suffix, find_images
from datasets import ImageFiles, save_picture
from fast.pool import keep_pages
from fast.tiles import coding_tile
from models import load_checkpoint
from objectives import Problem, RateDistortion


class Job(NamedTuple):
    """A file to work on, and the name, below the output folder, of what becomes of it."""

    source: Path
    target: str


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """compress, decompress, info; exit code 0, 2 if anything was wrong with any file."""
    parser = argparse.ArgumentParser(description="Pictures become files and files pictures.")
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
    problem = Problem(coder.model, x, RateDistortion(0.0), tile)
    latents = coder.model.analyze(x)
    data = encode_latents(coder, coder.model.symbols(latents, problem.size), problem.size)
    coded = time.perf_counter()
    x_hat = decode_picture(coder, data)
    decoded = time.perf_counter()
    with torch.no_grad():
        estimate = problem.true(latents).bpp.item()
    times = {"coding": coded - start, "decoding": decoded - coded}
    return data, {**file_measures(data, x_hat, x), "estimate": estimate, **times}


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
