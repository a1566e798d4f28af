"""Speed and memory beside plain reference loops, measured in turns within one run.

python benchmark.py                    # refine, training, loader, codec; make bench
python benchmark.py refine             # the plain published loop, ours, the convolutions alone
python benchmark.py training           # pre-training beside a plain CompressAI loop
python benchmark.py loader             # beside a plain PIL loop; your tfrecords: --records FOLDER
python benchmark.py codec              # coding and decoding of a picture; yours: --image FILE
python benchmark.py objectives         # a step with each objective, and with a map
python benchmark.py architectures      # each architecture: a step, and a file's coding and decoding
python benchmark.py gpu                # checks and speed of a GPU, docs/gpu.md; make bench-gpu

Refinement and training: every variant runs in a process of its own, in turns, `rounds` times; what
is printed are medians over the rounds. Peak memory is what the loop adds to the process.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, exits_with_one_line
from config import Channels

# isort: split
import numpy as np
import torch
from torch import Tensor

from benchmarks.architectures import ARCHITECTURE_STEPS, CHANNELS, time_files, untrained
from benchmarks.gpu import check_gpu
from benchmarks.loaders import time_loaders
from benchmarks.objectives import OBJECTIVE_STEPS
from benchmarks.refinement_loops import REFINEMENTS
from benchmarks.training_loops import TRAININGS
from benchmarks.variant import Variant
from codec import compress_picture
from coding.coder import build_coder
from common.command_line import script_parser
from common.files import user_path, write_whole
from common.finding import find_images
from common.images import ImageFiles, UnreadableError, to_tensor
from common.measuring import Stopwatch, machine_facts
from datasets import sample_photos
from fast.pool import keep_pages
from models import build_model, load_checkpoint

BUNDLED_WEIGHTS = "example_files/weights/mean_scale_n64_lambda0.01.pth.tar"
LOOPS = {"refine": REFINEMENTS, "training": TRAININGS, "objectives": OBJECTIVE_STEPS,
         "architectures": ARCHITECTURE_STEPS}  # fmt: skip
DEFAULT = ("refine", "training", "loader", "codec")  # `architectures` takes half an hour
COMMANDS = (*DEFAULT, "objectives", "architectures", "gpu")


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks of the command line; exit code 0, 2 for bad input."""
    arguments = parse(argv)
    if arguments.command == "measure":
        return measure(arguments)
    if arguments.command == "gpu":
        return check_gpu(arguments.device, arguments.checkpoint, Path(arguments.json))
    parts = {"refine": time_refinement, "training": time_training, "loader": time_loaders,
             "codec": time_codec, "objectives": time_objectives,
             "architectures": time_architectures}  # fmt: skip
    wanted = DEFAULT if arguments.command == "all" else (arguments.command,)
    chosen = {name: parts[name] for name in wanted}
    results: dict[str, Any] = {
        "machine": machine_facts(torch.device("cpu")),
        "cores": os.cpu_count(),
    }
    for number, (name, run) in enumerate(chosen.items()):
        print("\n" * bool(number), end="")
        results[name] = run(arguments)
    text = json.dumps(results, indent=1) + "\n"
    print(f"\n{write_whole(Path(arguments.json), lambda file: file.write_text(text))}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, parsed and checked.

    Raises:
        InputError: a number is not above 0.
    """
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("command", nargs="?", default="all",
        choices=("all", *COMMANDS, "measure"), metavar=f"{{all,{','.join(COMMANDS)}}}")  # fmt: skip
    add("--rounds", type=int, default=3, help="how often each variant has its turn")
    add("--json", type=user_path,
        help="where figures go (none: results/benchmark.json, or results/gpu.json)")  # fmt: skip
    add("--checkpoint", type=user_path, default=BUNDLED_WEIGHTS, metavar="WEIGHTS",
        help="the small model")  # fmt: skip
    add("--image", type=user_path, help="a picture (none: a sample photo at 768x512)")
    add("--compile", action="store_true", help="refine: also torch.compile of the plain decoder")
    add(
        "--records",
        type=user_path,
        help="loader: folder of tfrecords (none: made of sample photos)",
    )
    add("--image_size", type=int, default=256, help="loader and training: side of the crops")
    add("--batch_size", type=int, default=32, help="loader: crops a batch")
    add("--cycle_length", type=int, default=4, help="loader: files read in turn")
    add("--seconds", type=float, default=4.0, help="loader: of each loader in each round")
    add("--device", default="cuda", help="gpu: cuda, cuda:N, or cpu for the checks at toy size")
    # Options of `measure`, which runs one variant once.
    add("--variant", help=argparse.SUPPRESS)
    add("--channels", type=int, help=argparse.SUPPRESS)
    add("--architecture", choices=tuple(CHANNELS), help="architectures: only this one")
    add("--images", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.json = arguments.json or (
        "results/gpu.json" if arguments.command == "gpu" else "results/benchmark.json"
    )
    for option in ("image_size", "batch_size", "cycle_length", "rounds", "seconds"):
        if getattr(arguments, option) <= 0:
            raise InputError(f"--{option} {getattr(arguments, option)}: must be above 0")
    return arguments


# --- refinement and training: variants in turn ----------------------------------------------------


def time_refinement(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time refinement in four settings; the figures of each variant, printed and returned."""
    names = [name for name in REFINEMENTS if name != "compiled" or arguments.compile]
    rows = []
    for channels in (192, None):
        for images in (1, 4):
            figures = in_turns("refine", names, channels, images, arguments)
            size = "x".join(map(str, figures["ours"]["size"]))
            print(f"refinement, {size}, N = {figures['ours']['N']}, batch {images}, "
                  f"{torch.get_num_threads()} threads ({platform.machine()}), median of "
                  f"{arguments.rounds} rounds")  # fmt: skip
            print_figures(REFINEMENTS, figures, ("plain, pages kept", "floor", "floor, bfloat16"))
            rows.append({"images": images, "variants": figures})
    return rows


def time_objectives(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a step with each objective in two settings; the figures, printed and returned."""
    rows = []
    for channels in (192, None):
        figures = in_turns("objectives", list(OBJECTIVE_STEPS), channels, 1, arguments)
        size = "x".join(map(str, figures["mse"]["size"]))
        print(f"a step, {size}, N = {figures['mse']['N']}, {torch.get_num_threads()} threads "
              f"({platform.machine()}), median of {arguments.rounds} rounds")  # fmt: skip
        print_figures(OBJECTIVE_STEPS, figures, ("mse", "plain, ms-ssim"))
        rows.append({"images": 1, "variants": figures})
    return rows


def time_training(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time training in two settings; the figures of each variant, printed and returned."""
    rows = []
    for channels in (192, None):
        figures = in_turns("training", list(TRAININGS), channels, 4, arguments)
        print(f"training, batch 4 of {arguments.image_size}x{arguments.image_size}, "
              f"N = {figures['ours']['N']}, {torch.get_num_threads()} threads "
              f"({platform.machine()}), median of {arguments.rounds} rounds")  # fmt: skip
        print_figures(TRAININGS, figures, ("plain", "plain, pages kept"))
        rows.append({"images": 4, "variants": figures})
    return rows


def in_turns(
    kind: str,
    names: Sequence[str],
    channels: int | None,
    images: int,
    arguments: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Run each variant in a new process, `rounds` times in turn; medians by variant.

    Args:
        kind: `refine` or `training`; names: the variants.
        channels: N and M of an untrained model; None takes the checkpoint's model.
        images: the batch size.

    Raises:
        InputError: a process failed.
    """
    # A user's settings of malloc would change what is measured.
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, __file__, "measure", "--variant", f"{kind}:{name}",
                       "--images", str(images), "--checkpoint", arguments.checkpoint,
                       "--image_size", str(arguments.image_size)]  # fmt: skip
            command += ["--channels", str(channels)] if channels else []
            command += ["--architecture", arguments.architecture] if kind == "architectures" else []
            command += ["--image", str(arguments.image)] if arguments.image else []
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                raise InputError(f"{name}, batch {images}: {last.removeprefix('error: ')}")
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: summarise(rows) for name, rows in turns.items()}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians over the runs of a variant, and the fastest and slowest seconds a step."""
    seconds = [row["seconds"] for row in rows]
    peak = statistics.median(row["peak_mb"] for row in rows)
    return {**rows[0], "seconds": statistics.median(seconds), "fastest": min(seconds),
            "slowest": max(seconds), "peak_mb": peak}  # fmt: skip


def print_figures(
    variants: dict[str, Variant], figures: dict[str, dict[str, Any]], beside: Sequence[str]
) -> None:
    """Print one line for each variant: seconds a step, memory, and its time over that of others."""
    print(f"  {'':52} s/step   (from, to)       peak MB"
          + "".join(f"  / {name:17}" for name in beside))  # fmt: skip
    for name, row in figures.items():
        ratios = "".join(f"  {row['seconds'] / figures[key]['seconds']:<19.3f}" for key in beside)
        span = f"({row['fastest']:.3f}, {row['slowest']:.3f})"
        print(f"  {variants[name].name:52} {row['seconds']:6.3f}   {span:16} {row['peak_mb']:7.0f}"
              f"{ratios}")  # fmt: skip


def time_architectures(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a step of refinement and the files of each architecture; printed and returned."""
    rows = []
    print(f"architectures, 768x512, {torch.get_num_threads()} threads ({platform.machine()}), "
          f"median of {arguments.rounds} rounds, seconds\n{'':30} {'N':>4} {'M':>4} {'plain':>7} "
          f"{'ours':>7} {'bfloat16':>8} {'/ plain':>8} {'coding':>7} {'decoding':>8} "
          f"{'stock decoding':>14}")  # fmt: skip
    for name in [arguments.architecture] if arguments.architecture else CHANNELS:
        arguments.architecture = name
        figures = in_turns("architectures", list(ARCHITECTURE_STEPS), None, 1, arguments)
        seconds = {key: row["seconds"] for key, row in figures.items()}
        files = time_files(untrained(name), arguments.rounds)
        N, M = CHANNELS[name]
        print(f"{name:30} {N:4} {M:4} {seconds['plain']:7.2f} "
              f"{seconds['ours']:7.2f} {seconds['ours, bfloat16']:8.2f} "
              f"{seconds['ours'] / seconds['plain']:8.2f} {files['coding']:7.2f} "
              f"{files['decoding']:8.2f} {files['stock decoding']:14.2f}")  # fmt: skip
        rows.append({"architecture": name, "variants": figures, "files": files})
    return rows


def measure(arguments: argparse.Namespace) -> int:
    """Run one variant once; print the median time of its steps and its peak memory as JSON."""
    kind, _, name = (arguments.variant or "").partition(":")
    variant = LOOPS.get(kind, {}).get(name)
    if variant is None:
        known = ", ".join(f"{kind}:{name}" for kind, names in LOOPS.items() for name in names)
        raise InputError(f"--variant {arguments.variant}: there are {known}")
    if variant.keeps_pages:
        keep_pages()
    torch.manual_seed(0)
    if arguments.architecture:
        model = untrained(arguments.architecture)
    elif arguments.channels:
        model = build_model(Channels(N=arguments.channels, M=arguments.channels))
    else:
        model = load_checkpoint(arguments.checkpoint)
    x = picture_of(arguments.image)  # [1, 3, H, W]
    if kind == "training":
        side = arguments.image_size
        if side > min(x.shape[2:]):
            raise InputError(f"--image_size {side}: the picture has {x.size(3)}x{x.size(2)} pixels")
        starts = np.random.default_rng(0).integers(
            [1 + x.size(2) - side, 1 + x.size(3) - side], size=(arguments.images, 2)
        )
        x = torch.cat([x[:, :, top : top + side, left : left + side] for top, left in starts])
    elif x.size(2) % 64 or x.size(3) % 64:
        raise InputError(f"--image: {x.size(3)}x{x.size(2)} pixels; the plain loop wants "
                         "multiples of 64")  # fmt: skip
    else:
        x = x.expand(arguments.images, -1, -1, -1).contiguous()
    times: list[float] = []
    watch = Stopwatch(torch.device("cpu"))
    step = variant.make_step(model, x)
    while len(times) < 4 or (sum(times) < 3 and len(times) < 30):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = watch.read()[1] - watch.before / 2**20
    row = {"seconds": statistics.median(times[2:]), "peak_mb": peak, "N": model.N, "M": model.M,
           "size": [x.size(3), x.size(2)]}  # fmt: skip
    print(json.dumps(row))
    return 0


def picture_of(path: str | None) -> Tensor:
    """The pixels [1, 3, H, W] in [0, 1] of an image file, or of a sample photo at 768x512.

    Raises:
        InputError: the file cannot be read.
    """
    if path is None:
        photos = sample_photos()
        picture = photos.picture(photos.names.index("coffee.png")).image.resize((768, 512))
    else:
        try:
            picture = ImageFiles(find_images(path)).picture(0).image
        except UnreadableError as error:
            raise InputError(f"--image {path}: {error}") from None
    return to_tensor(picture)[None]


def time_codec(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the seconds that coding and decoding of one image take, networks included."""
    coder = build_coder(load_checkpoint(arguments.checkpoint))
    x = picture_of(arguments.image)  # [1, 3, H, W]
    compress_picture(coder, x)  # warms up
    rows = [compress_picture(coder, x)[1] for _ in range(3 * arguments.rounds)]
    print(
        f"{x.size(3)}x{x.size(2)}, N = {coder.model.N}, M = {coder.model.M}, "
        f"{rows[0]['file_bytes']} bytes, {os.cpu_count()} cores ({platform.machine()}), median of "
        f"{len(rows)} rounds"
    )
    for key, what in (("coding", "g_a, h_a, coding, decoding to compare"),
                      ("decoding", "decoding, g_s")):  # fmt: skip
        times = [row[key] for row in rows]
        print(
            f"{key:9} {statistics.median(times):6.3f} s   ({min(times):.3f} to {max(times):.3f})"
            f"   {what}"
        )
    return {key: [row[key] for row in rows] for key in ("coding", "decoding")}


if __name__ == "__main__":
    sys.exit(main())
