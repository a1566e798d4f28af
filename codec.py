"""Pictures become files, and files become pictures.

python codec.py compress PHOTOS -o coded \
--checkpoint example_files/weights/mean_scale_n64_lambda0.01.pth.tar
python codec.py compress PHOTOS -o coded --refine fast \
--checkpoint example_files/weights/mean_scale_n64_lambda0.01.pth.tar
python codec.py decompress coded -o decoded \
--checkpoint example_files/weights/mean_scale_n64_lambda0.01.pth.tar
python codec.py info coded

The layout of a file is in coding/bitstream.py; coding/coder.py says why any machine can decode it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from common.errors import InputError, exits_with_one_line, reason_of
from config import RefineConfig, load_config

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
from common.command_line import script_parser
from common.device import is_out_of_memory, pick_device
from common.files import label_of, printable, short_enough, user_path, write_whole
from common.finding import Found, find_by_suffix, find_images
from common.images import ImageFiles, LoadedImage, save_picture
from common.progress import Progress
from fast.pool import keep_pages
from fast.tiles import coding_tile
from models import load_checkpoint
from objectives import Problem, RateDistortion

Measures = dict[str, Any]  # of a file, see `compress_picture`
Code = Callable[[LoadedImage], tuple[bytes, Measures]]


class Job(NamedTuple):
    """A file to work on, and the name, below the output folder, of what becomes of it."""

    source: Path
    target: str


def command_line() -> argparse.ArgumentParser:
    """The three commands and their options."""
    parser = script_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compress = commands.add_parser("compress", help="code images")
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
        add = command.add_argument
        add("--checkpoint", required=True, type=user_path, metavar="WEIGHTS", help="of the model")
        add("-o", "--output", required=True, type=user_path, metavar="FOLDER", help="made if new")
        add("--overwrite", action="store_true", help="replace files that are there already")
    compress.add_argument(
        "--refine", type=user_path, metavar="RECIPE",
        help="refine the latents first: fast, best, or a refinement config",
    )  # fmt: skip
    compress.add_argument(
        "--lmbda", type=float, metavar="LAMBDA",
        help="with --refine: the lambda that the model was trained for",
    )  # fmt: skip
    return parser


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """compress, decompress, info; exit code 0, 2 if anything was wrong with any file."""
    arguments = command_line().parse_args(argv)
    keep_pages()
    if arguments.command == "info":
        return for_each(find_jobs(arguments.paths, find_coded), print_header)
    folder = Path(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"-o {folder}: is a file; a folder is wanted")
    if arguments.command == "compress":
        jobs = find_jobs(arguments.paths, find_images, lambda name: short_enough(name, SUFFIX))
    else:
        jobs = apart(find_jobs(arguments.paths, find_coded, picture_name))
    taken = [job.target for job in jobs if (folder / job.target).exists()]
    if taken and not arguments.overwrite:
        raise InputError(f"{folder / taken[0]} is there already: see --overwrite")
    with named_checkpoint():
        if arguments.command == "decompress":
            act = partial(decompress_file, build_coder(load_checkpoint(arguments.checkpoint)))
        elif arguments.refine is None:
            act = partial(compress_image, build_coder(load_checkpoint(arguments.checkpoint)))
        else:
            act = refining(arguments.refine, arguments.checkpoint, arguments.lmbda)
    write_whole(folder / f".{uuid4().hex}.tmp", lambda file: file.touch()).unlink()  # it can be
    if arguments.command == "compress":
        return compress_images(jobs, act, folder)
    return for_each(jobs, partial(act, folder))


@contextmanager
def named_checkpoint() -> Iterator[None]:
    """Let an InputError on a checkpoint name --checkpoint."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith("pretrain "):
            raise
        raise InputError(f"--checkpoint {str(error).removeprefix('pretrain ')}") from None


def picture_name(name: str) -> str:
    """a.png.olc gives a.png, a.jpg.olc gives a.jpg.png."""
    name = name.removesuffix(SUFFIX)
    return name if name.endswith(".png") else short_enough(name, ".png")


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
            target = short_enough(target, ".png")
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


def compress_images(jobs: Sequence[Job], code: Code, folder: Path) -> int:
    """Write a file for each image into `folder`, and print its rate beside the estimated one."""
    width = max(4, *(len(label_of(job.target)) for job in jobs))
    rows: list[Measures] = []

    def line(name: str, size: str, row: Measures) -> str:
        return (
            f"{name:{width}} {size:>11} {row['file_bytes']:9.0f} {row['file_bpp']:8.4f} "
            f"{row['estimate']:8.4f} {100 * (row['file_bpp'] / row['estimate'] - 1):+6.2f}% "
            f"{row['psnr']:5.2f} dB {row['coding']:6.2f} s {row['decoding']:6.2f} s"
        )

    def compress(job: Job) -> None:
        image = ImageFiles(find_images(job.source))[0]
        if image.x is None:
            raise InputError(image.error)
        data, row = code(image)
        write_whole(folder / job.target, lambda file: file.write_bytes(data))
        rows.append(row)
        print(line(label_of(job.target), f"{image.x.size(2)}x{image.x.size(1)}", row))
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


def compress_image(coder: Coder, image: LoadedImage) -> tuple[bytes, Measures]:
    """The file of an image's unrefined latents; see `compress_picture`."""
    return compress_picture(coder, image.x[None])


def compress_picture(coder: Coder, x: Tensor) -> tuple[bytes, Measures]:
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


def refining(recipe: str, checkpoint: str, lmbda: float | None) -> Code:
    """What refines an image's latents, as a recipe says, before it codes them.

    Args:
        recipe: `fast` or `best` of example_files, or the path of a refinement config, of which the
            model and the images do not count.
        lmbda: that the model was trained for; may be left out where it is the recipe's own model.

    Raises:
        InputError: the recipe or the checkpoint is missing or wrong, or lmbda is not known.
    """
    # Imported late: coding alone needs nothing of refinement.
    from experimental_inference_methods import rounding_from_config
    from train_flexible_inference import open_refiner

    model = load_checkpoint(checkpoint)
    config = recipe_config(recipe, checkpoint, lmbda)
    rounding = rounding_from_config(config)
    print(
        f"refined as {recipe} says: {rounding.name}, lambda {config.lmbda:g}, "
        f"{config.tot_inference_iterations} steps, {config.polish_passes} passes of polish"
    )
    refiner = open_refiner(model, rounding, config, pick_device(config.device))

    def code(image: LoadedImage) -> tuple[bytes, Measures]:
        start, steps = time.perf_counter(), config.tot_inference_iterations
        with Progress(image.name, steps + config.polish_passes, config.print_freq) as progress:
            result = refiner.refine_image(image, progress)
        coded = time.perf_counter()
        decode_picture(refiner.coder, result.coded.bitstream)
        times = {"coding": coded - start, "decoding": time.perf_counter() - coded}
        estimate = {"estimate": result.trajectory.best["true_bpp"]}
        return result.coded.bitstream, {**result.coded.measures["refined"], **estimate, **times}

    return code


def recipe_config(recipe: str, checkpoint: str, lmbda: float | None) -> RefineConfig:
    """The refinement config of a recipe for this checkpoint; see `refining`."""
    shipped = Path(__file__).parent / "example_files" / f"{recipe}.json"
    path = shipped if shipped.is_file() and not Path(recipe).is_file() else Path(recipe)
    if not path.is_file():
        raise InputError(f"--refine {recipe}: no such recipe; fast, best, or a config's path")
    config = load_config(path, RefineConfig, source=f"--refine {recipe}")
    own = [place / config.pretrain for place in (Path(), Path(__file__).parent)]
    given = Path(checkpoint)
    is_own = given.is_file() and any(file.is_file() and file.samefile(given) for file in own)
    if lmbda is None and not is_own:
        raise InputError(
            f"--lmbda is missing: which lambda was {checkpoint} trained for? "
            f"--refine {recipe} has {config.train_lambda:g} for {config.pretrain}"
        )
    values: dict[str, Any] = {"pretrain": checkpoint, "channels": None, "save_bitstreams": True}
    if lmbda is not None:
        values |= {"train_lambda": lmbda, "dev_options.inference_lambda": None}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_config(path, RefineConfig, overrides, f"--refine {recipe} --lmbda {lmbda}")


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
