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
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from common.errors import InputError, exits_with_one_line, reason_of
from config import Channels, RefineConfig, load_config, resolved

# isort: split
import torch
from torch import Tensor

from architectures import Architecture
from architectures.directions import directions_beside, hint_for_missing, use_directions
from coding.bitstream import SUFFIX, read_bitstream, read_file
from coding.coder import (
    Coder,
    build_coder,
    decode_picture,
    encode_latents,
    file_measures,
)
from coding.payload import from_bytes
from coding.payload import in_words as told_in_words
from common.command_line import script_parser
from common.device import is_out_of_memory, pick_device, pick_precision
from common.files import label_of, printable, short_enough, user_path, write_whole
from common.finding import Found, find_by_suffix, find_images
from common.images import ImageFiles, LoadedImage, Maps, save_picture
from common.numbers import mean_of_known, rounded
from common.progress import Progress
from fast.pool import keep_pages
from fast.tiles import coding_tile
from models import load_checkpoint
from objectives import Problem, RateDistortion
from regions.maps import open_maps

DECODER_HINT = "give the file that the encoder had with --directions"
ENCODER_HINT = "give it with --directions, or learn it with python -m pretraining.learn_directions"
RECIPES = "fast", "best", "adapt", "ms_ssim"  # of example_files
Measures = dict[str, Any]  # of one file, see `compress_picture`
Compressor = Callable[[LoadedImage], tuple[bytes, Measures]]


class Job(NamedTuple):
    """An input file below `root`, and the name of its output file below the output folder."""

    source: Path
    target: str
    root: Path

    @property
    def name(self) -> str:
        """The input's path below `root`."""
        return self.source.relative_to(self.root).as_posix()


def command_line() -> argparse.ArgumentParser:
    """The parser of the three commands and their options."""
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
        add("--architecture", metavar="NAME", help="of WEIGHTS, if they do not tell: FILE.py:CLASS")
        add(
            "--directions", type=user_path, metavar="FILE",
            help="that adapted files need; without it the file beside WEIGHTS",
        )  # fmt: skip
        add("-o", "--output", required=True, type=user_path, metavar="FOLDER", help="made if new")
        add("--overwrite", action="store_true", help="replace files that are there already")
    compress.add_argument(
        "--refine", type=user_path, metavar="RECIPE",
        help=f"refine the latents first: {', '.join(RECIPES)}, or a refinement config",
    )  # fmt: skip
    compress.add_argument(
        "--lmbda", type=float, metavar="LAMBDA",
        help="with --refine: the lambda of the loss; for MSE the one the model was trained for",
    )  # fmt: skip
    compress.add_argument(
        "--roi", type=user_path, metavar="PATH",
        help="with --refine: where distortion counts more: a folder of grey maps, one map, or auto",
    )  # fmt: skip
    return parser


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run compress, decompress or info; exit code 0, 2 if any file failed."""
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
        jobs = with_distinct_targets(find_jobs(arguments.paths, find_coded, picture_name))
    existing = [job.target for job in jobs if (folder / job.target).exists()]
    if existing and not arguments.overwrite:
        raise InputError(f"{folder / existing[0]} is there already: see --overwrite")
    act: Callable[[], int]
    with named_checkpoint():
        if arguments.command == "compress":
            maps = chosen_maps(arguments, jobs)
            with hint_for_missing(ENCODER_HINT):
                compressor = chosen_compressor(arguments)
            act = partial(compress_images, jobs, compressor, folder, maps)
        else:
            coder = build_coder(_model_of(arguments))
            act = partial(for_each, jobs, partial(decompress_file, coder, folder))
    # Fail now, not after the first image, if the folder cannot be written to.
    write_whole(folder / f".{uuid4().hex}.tmp", lambda file: file.touch()).unlink()
    return act()


@contextmanager
def named_checkpoint() -> Iterator[None]:
    """Make the InputErrors of a checkpoint name the option --checkpoint."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith("pretrain "):
            raise
        raise InputError(f"--checkpoint {str(error).removeprefix('pretrain ')}") from None


@contextmanager
def named_recipe(recipe: str) -> Iterator[None]:
    """Make the InputErrors of a config's key name the option --refine, whose file has the key."""
    keys = RefineConfig.model_fields.keys() - {"pretrain", "architecture"}  # those are options
    try:
        yield
    except InputError as error:
        if re.split(r"\W", str(error))[0] not in keys:
            raise
        raise InputError(f"--refine {recipe}: {error}") from None


def picture_name(name: str) -> str:
    """The name of a decoded image: a.png for a.png.olc, a.jpg.png for a.jpg.olc."""
    name = name.removesuffix(SUFFIX)
    return name if name.endswith(".png") else short_enough(name, ".png")


def find_coded(path: str) -> Found:
    """The files of this codec below the folder `path`, or the one file at `path`.

    Raises:
        InputError: there is no such file.
    """
    return find_by_suffix(path, frozenset((SUFFIX,)))


def find_jobs(
    paths: Sequence[str],
    find: Callable[[str], Found],
    target_of: Callable[[str], str] | None = None,
) -> list[Job]:
    """One job for each file that `find` finds at the paths; prints which files were ignored.

    Args:
        target_of: returns the target for a file's name; without it the target is the file's path.

    Raises:
        InputError: there is no such file at a path, or two files have the same name.
    """
    jobs: dict[str, Job] = {}
    for path in paths:
        found = find(path)
        if found.passed_over:
            print(f"{printable(path)}: {found.passed_over}", file=sys.stderr)
        for source in found.files:
            name = source.relative_to(found.root).as_posix() if target_of else str(source)
            target = target_of(name) if target_of else name
            job = jobs.setdefault(name, Job(source, target, found.root))
            if job.source != source:
                raise InputError(f"{job.source} and {source} would both become {job.target}")
    return list(jobs.values())


def with_distinct_targets(jobs: Sequence[Job]) -> list[Job]:
    """The same jobs, with .png added to a target that another job has too.

    For example a.jpg.png.olc gives a.jpg.png. In the same folder a.jpg.olc gives a.jpg.png.png.
    """
    used = {job.target for job in jobs if job.source.name == Path(job.target).name + SUFFIX}
    distinct = []
    for job in jobs:
        target = job.target
        while target in used and job.source.name != Path(target).name + SUFFIX:
            target = short_enough(target, ".png")
        used.add(target)
        distinct.append(job._replace(target=target))
    return distinct


def for_each(jobs: Sequence[Job], act: Callable[[Job], None]) -> int:
    """Call `act` for each job; a failure prints one line and makes the exit code 2."""
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
    """The reason why a job failed, in one line that begins with the faulty file.

    Raises:
        RuntimeError: the error itself, if it is a fault of the program and not of a file.
    """
    if isinstance(error, OSError) and error.filename not in (None, str(job.source)):
        return reason_of(error)  # it names the output file
    if isinstance(error, OSError):
        return f"{job.source}: {error.strerror or error}"
    if isinstance(error, InputError):
        return f"{job.source}: {error}"
    if not is_out_of_memory(error):
        raise error
    return f"{job.source}: no memory for a picture of this size"


def chosen_maps(arguments: argparse.Namespace, jobs: Sequence[Job]) -> Maps | None:
    """The maps of --roi; None without it.

    Raises:
        InputError: it is given without --refine, or see `open_maps`.
    """
    if arguments.roi is None:
        return None
    if arguments.refine is None:
        raise InputError("--roi: only refinement weighs distortion: add --refine fast")
    maps = open_maps(arguments.roi, [job.name for job in jobs], "--roi")
    for message in maps.messages:
        print(message, file=sys.stderr)
    return maps


def compress_images(
    jobs: Sequence[Job], compressor: Compressor, folder: Path, maps: Maps | None
) -> int:
    """Write a file for each image into `folder`; print its rate and its estimated rate.

    Args:
        maps: where distortion counts more; None: everywhere alike.

    Returns:
        The exit code, see `for_each`.
    """
    width = max(4, *(len(label_of(job.target)) for job in jobs))
    rows: list[Measures] = []

    def compress(job: Job) -> None:
        image = ImageFiles(Found(job.root, [job.source], ""), maps=maps)[0]
        x = image.pixels()
        data, row = compressor(image)
        write_whole(folder / job.target, lambda file: file.write_bytes(data))
        rows.append(row)
        print(f"{label_of(job.target):{width}} {f'{x.size(2)}x{x.size(1)}':>11} {in_words(row)}")
        for note in image.notes:
            print(f"{printable(str(job.source))}: {note}", file=sys.stderr)

    print(f"{'file':{width}} {'size':>11} {'bytes':>9} {'bpp':>8} {'estimate':>8} {'over':>7} "
          f"{'PSNR':>8} {'MS-SSIM':>8} {'coding':>8} {'decoding':>8}")  # fmt: skip
    exit_code = for_each(jobs, compress)
    if len(rows) > 1:
        shown = ("file_bytes", "file_bpp", "estimate", "psnr", "ms_ssim_db", "coding", "decoding")
        means = {key: mean_of_known(row[key] for row in rows) for key in shown}
        print(f"{'mean':{width}} {'':11} {in_words(means)}")
    return exit_code


def in_words(row: Measures) -> str:
    """The measures of a file, or their means, as the columns of the table of `compress_images`."""
    return (
        f"{row['file_bytes']:9.0f} {row['file_bpp']:8.4f} "
        f"{row['estimate']:8.4f} {100 * (row['file_bpp'] / row['estimate'] - 1):+6.2f}% "
        f"{row['psnr']:5.2f} dB {rounded(row['ms_ssim_db'], 2):>5} dB "
        f"{row['coding']:6.2f} s {row['decoding']:6.2f} s"
    )


def chosen_compressor(arguments: argparse.Namespace) -> Compressor:
    """What compresses an image, after refinement or without it.

    Raises:
        InputError: see `refining_compressor`.
    """
    if arguments.refine is not None:
        return refining_compressor(arguments)
    if arguments.directions is not None:
        raise InputError("--directions: only refinement adapts the decoder: add --refine adapt")
    return partial(compress_image, build_coder(_model_of(arguments)))


def _model_of(arguments: argparse.Namespace) -> Architecture:
    model = load_checkpoint(arguments.checkpoint, architecture=arguments.architecture)
    use_directions(model, Path(arguments.directions or directions_beside(arguments.checkpoint)))
    return model


def compress_image(coder: Coder, image: LoadedImage) -> tuple[bytes, Measures]:
    """The file of an image's unrefined latents; see `compress_picture`."""
    return compress_picture(coder, image.pixels()[None])


def compress_picture(coder: Coder, x: Tensor) -> tuple[bytes, Measures]:
    """Code the encoder's latents of x [1, 3, H, W] in [0, 1], not refined.

    Returns:
        The bytes of the file. Its measures: those of `file_measures`, `estimate` (bpp by the
        likelihoods), `coding` and `decoding` (seconds).

    Raises:
        BitstreamError: see `encode_latents`.
    """
    start, tile = time.perf_counter(), coding_tile((x.size(2), x.size(3)))
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


def refining_compressor(arguments: argparse.Namespace) -> Compressor:
    """A compressor that refines an image's latents, as a recipe says, and codes them.

    Args:
        arguments: `refine`: one of RECIPES, or the path of a refinement config, whose model and
            images are ignored. `lmbda`: of the loss, for MSE what the model was trained for; None
            if it is the recipe's own model, or the recipe is for MS-SSIM. `directions`: their file,
            in place of the recipe's. `checkpoint`, `architecture`: see `load_checkpoint`.

    Raises:
        InputError: the recipe, the checkpoint or the directions are missing or wrong, or lmbda is
            not known.
    """
    # Imported here, because plain coding does not need refinement.
    from experimental_inference_methods import rounding_from_config
    from refinement.told import adapt_facts
    from train_flexible_inference import open_refiner

    model, recipe = _model_of(arguments), arguments.refine
    channels = Channels(N=model.N, M=model.M)
    config = recipe_config(arguments, channels)
    with named_recipe(recipe):
        rounding = rounding_from_config(config)
        device = pick_device(config.device)
        config = config.model_copy(update={"precision": pick_precision(config.precision, device)})
        refiner = open_refiner(model, rounding, config, device)
    facts = adapt_facts(config, model)
    print(
        f"refined as {recipe} says: {rounding.name}, lambda {config.lmbda:g} for "
        f"{config.objective}, {config.tot_inference_iterations} steps, "
        f"{config.polish_passes} passes of polish, {device}, {config.precision}"
        + (f", weighted by {printable(arguments.roi)}" if arguments.roi else "")
        + (f", {facts['adapt']}" if facts else "")
    )
    if config.dev_options.maps and not arguments.roi:
        print("the maps of this recipe are for its own images: see --roi", file=sys.stderr)

    def compress(image: LoadedImage) -> tuple[bytes, Measures]:
        start, steps = time.perf_counter(), config.tot_inference_iterations
        with Progress(image.name, steps + config.polish_passes, config.print_freq) as progress:
            result = refiner.refine_image(image, progress)
        coded = time.perf_counter()
        if stopped := result.trajectory.stopped:
            kept = result.trajectory.best["step"]
            print(f"{printable(image.name)}: stopped, {stopped}; kept step {kept}", file=sys.stderr)
        decode_picture(refiner.file_coder, result.file.bitstream)
        times = {"coding": coded - start, "decoding": time.perf_counter() - coded}
        estimate = {"estimate": result.trajectory.best["true_bpp"]}
        return result.file.bitstream, {**result.file.measures["refined"], **estimate, **times}

    return compress


def recipe_config(arguments: argparse.Namespace, channels: Channels) -> RefineConfig:
    """The refinement config of a recipe for this checkpoint; see `refining_compressor`.

    Args:
        channels: those of the checkpoint.
    """
    recipe, checkpoint, lmbda = arguments.refine, arguments.checkpoint, arguments.lmbda
    shipped = Path(__file__).parent / "example_files" / f"{recipe}.json"
    path = shipped if shipped.is_file() and not Path(recipe).is_file() else Path(recipe)
    if not path.is_file():
        raise InputError(
            f"--refine {recipe}: no such recipe; {', '.join(RECIPES)}, or a config's path"
        )
    config = load_config(path, RefineConfig, source=f"--refine {recipe}")
    roots, weights = (Path(), Path(__file__).parent), Path(checkpoint)
    recipe_weights = [root / config.pretrain for root in roots]
    same_weights = weights.is_file() and any(
        file.is_file() and file.samefile(weights) for file in recipe_weights
    )
    if lmbda is None and not same_weights and config.objective == "mse":
        raise InputError(
            f"--lmbda is missing: which lambda was {checkpoint} trained for? "
            f"--refine {recipe} has {config.train_lambda:g} for {config.pretrain}"
        )
    values: dict[str, Any] = {
        "pretrain": checkpoint,
        "channels": resolved(channels),
        "save_bitstreams": True,
    }
    if lmbda is not None and config.objective == "mse":
        values |= {"train_lambda": lmbda, "dev_options.inference_lambda": None}
    elif lmbda is not None:
        values["dev_options.inference_lambda"] = lmbda
    if arguments.directions is not None:
        if config.adapt is None:
            raise InputError(
                f"--directions: --refine {recipe} does not adapt the decoder; try --refine adapt"
            )
        values["adapt.directions"] = arguments.directions
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_config(path, RefineConfig, overrides, f"--refine {recipe} --lmbda {lmbda}")


def decompress_file(coder: Coder, folder: Path, job: Job) -> None:
    """Decode one file into `folder`, and print the path of the image."""
    with hint_for_missing(DECODER_HINT):
        x_hat = decode_picture(coder, read_file(job.source))
    print(printable(str(save_picture(folder / job.target, x_hat[0]))))


def print_header(job: Job) -> None:
    """Print the fields of a file's header, and the length of each part of the file."""
    data = read_file(job.source)
    bitstream = read_bitstream(data)
    height, width = bitstream.size
    strings = [len(group.string) for group in bitstream.groups]
    exceptions = sum(len(group.exceptions) for group in bitstream.groups)
    told = len(bitstream.adaptation)
    print(
        f"{printable(str(job.source))}: version {bitstream.version}, {width}x{height} pixels, "
        f"{8 * len(data) / (height * width):.4f} bpp\n"
        f"  {printable(bitstream.family)}, weights {bitstream.weights.hex()}, "
        f"tables {bitstream.tables:08x}, symbols {bitstream.symbols:08x}\n"
        f"  {len(data)} bytes: header {len(data) - sum(strings) - exceptions - told}, "
        f"groups {' + '.join(map(str, strings))}, index exceptions {exceptions}"
        + (f", adaptation {told}" if told else "")
    )
    if told:
        print(f"  adaptation: {told_in_words(from_bytes(bitstream.adaptation))}")


if __name__ == "__main__":
    sys.exit(main())
