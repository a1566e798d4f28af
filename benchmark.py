"""Speed and memory beside plain reference loops, measured in turns within one run.

python benchmark.py                    # all of the following; make bench
python benchmark.py refine             # the plain published loop, ours, the convolutions alone
python benchmark.py training           # pre-training beside a plain CompressAI loop
python benchmark.py loader [--records data/imagenet_tfrecords]
python benchmark.py codec [--image PICTURE]

Refinement and training: every variant runs in a process of its own, in turns, `rounds` times; what
is printed are medians over the rounds. Peak memory is what the loop adds to the process.
"""

import argparse
import copy
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from config import Channels, InputError, PretrainConfig, exits_with_one_line

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from codec import build_coder, compress_picture
from common.files import user_path, write_whole
from common.finding import find_images
from common.measuring import Stopwatch, machine_facts
from datasets import (
    Draws,
    ImageFiles,
    RecordCrops,
    Records,
    UnreadableError,
    epoch_order,
    imagenet_tfrecords,
    import_tensorflow,
    read_payload,
    sample_photos,
    to_tensor,
    write_tfrecords,
)
from experimental_inference_methods import Temperature, build_rounding
from fast_layers import keep_pages
from models import (
    Latents,
    MeanScaleHyperprior,
    TrainingPass,
    analyze,
    build_model,
    freeze,
    load_checkpoint,
    rd_pass,
    speed_up,
)
from train import TrainingState, build_optimizers, train_step
from train_flexible_inference import image_by_image

WARM_UP_BATCHES = 4
BUNDLED_WEIGHTS = "example_files/weights/mean_scale_n64_lambda0.01.pth.tar"
LMBDA, SCHEDULE = 0.01, Temperature(rate=1e-3, ub=1.0)
METHOD = "sga_logits_3c", "log_ssl_a_factor_pow"


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, 2 for bad input."""
    arguments = parse(argv)
    if arguments.command == "measure":
        return measure(arguments)
    parts = {"refine": time_refinement, "training": time_training, "loader": time_loaders,
             "codec": time_codec}  # fmt: skip
    chosen = parts if arguments.command == "all" else {arguments.command: parts[arguments.command]}
    results = {"machine": machine_facts(torch.device("cpu")), "cores": os.cpu_count()}
    for number, (name, run) in enumerate(chosen.items()):
        print("\n" * bool(number), end="")
        results[name] = run(arguments)
    text = json.dumps(results, indent=1) + "\n"
    print(f"\n{write_whole(Path(arguments.json), lambda file: file.write_text(text))}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments.

    Raises:
        InputError: a number that makes no sense.
    """
    parser = argparse.ArgumentParser(description="Measure speed and memory.")
    add = parser.add_argument
    add("command", nargs="?", default="all",
        choices=("all", "refine", "training", "loader", "codec", "measure"),
        metavar="{all,refine,training,loader,codec}")  # fmt: skip
    add("--rounds", type=int, default=3, help="how often each variant has its turn")
    add("--json", type=user_path, default="results/benchmark.json", help="where figures go")
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
    # what `measure`, one turn of one variant, is told
    add("--variant", help=argparse.SUPPRESS)
    add("--channels", type=int, help=argparse.SUPPRESS)
    add("--images", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for option in ("image_size", "batch_size", "cycle_length", "rounds", "seconds"):
        if getattr(arguments, option) <= 0:
            raise InputError(f"--{option} {getattr(arguments, option)}: must be above 0")
    return arguments


# --- refinement and training: variants in turns ---------------------------------------------------


class Variant(NamedTuple):
    """A loop to be timed: its name, whether pages are kept, and what makes its step."""

    name: str
    keeps_pages: bool
    make_step: Callable[..., Callable[[], Any]]


def time_refinement(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds a step of the plain loop, twice, ours and the convolutions, in four settings."""
    names = [name for name in REFINEMENTS if name != "compiled" or arguments.compile]
    rows = []
    for channels in (192, None):
        for images in (1, 4):
            figures = in_turns("refine", names, channels, images, arguments)
            size = "x".join(map(str, figures["ours"]["size"]))
            print(f"refinement, {size}, N = {figures['ours']['N']}, batch {images}, "
                  f"{torch.get_num_threads()} threads ({platform.machine()}), median of "
                  f"{arguments.rounds} rounds")  # fmt: skip
            print_figures(REFINEMENTS, figures, ("plain", "plain, pages kept", "floor"))
            rows.append({"images": images, "variants": figures})
    return rows


def time_training(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds a step of a plain CompressAI loop, twice, and of train.py's."""
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
    """Let every variant have its turn in a new process, `rounds` times; medians by name.

    Raises:
        InputError: a process failed.
    """
    # A user's own settings of the allocator would hide what is measured.
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, __file__, "measure", "--variant", f"{kind}:{name}",
                       "--images", str(images), "--checkpoint", arguments.checkpoint,
                       "--image_size", str(arguments.image_size)]  # fmt: skip
            command += ["--channels", str(channels)] if channels else []
            command += ["--image", str(arguments.image)] if arguments.image else []
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                raise InputError(f"{name}, batch {images}: {last.removeprefix('error: ')}")
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: summed_up(rows) for name, rows in turns.items()}


def summed_up(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a variant's turns, and the fastest and slowest of them."""
    seconds = [row["seconds"] for row in rows]
    peak = statistics.median(row["peak_mb"] for row in rows)
    return {**rows[0], "seconds": statistics.median(seconds), "fastest": min(seconds),
            "slowest": max(seconds), "peak_mb": peak}  # fmt: skip


def print_figures(
    variants: dict[str, Variant], figures: dict[str, dict[str, Any]], beside: Sequence[str]
) -> None:
    """A line a variant: seconds a step, how many times those of others, and memory."""
    print(f"  {'':52} s/step   (from, to)       peak MB"
          + "".join(f"  / {name:17}" for name in beside))  # fmt: skip
    for name, row in figures.items():
        ratios = "".join(f"  {row['seconds'] / figures[key]['seconds']:<19.3f}" for key in beside)
        span = f"({row['fastest']:.3f}, {row['slowest']:.3f})"
        print(f"  {variants[name].name:52} {row['seconds']:6.3f}   {span:16} {row['peak_mb']:7.0f}"
              f"{ratios}")  # fmt: skip


def measure(arguments: argparse.Namespace) -> int:
    """One turn of one variant: the median of a few steps and the peak of memory, as JSON."""
    kind, _, name = (arguments.variant or "").partition(":")
    variant = LOOPS.get(kind, {}).get(name)
    if variant is None:
        known = ", ".join(f"{kind}:{name}" for kind, names in LOOPS.items() for name in names)
        raise InputError(f"--variant {arguments.variant}: there are {known}")
    if variant.keeps_pages:
        keep_pages()
    torch.manual_seed(0)
    if arguments.channels:
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
    watch, times = Stopwatch(torch.device("cpu")), []
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
    """x [1, 3, H, W] in [0, 1] of a picture, or of a sample photo at 768x512.

    Raises:
        InputError: it cannot be read.
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


# --- the loops of refinement ----------------------------------------------------------------------


def plain_loss(
    model: MeanScaleHyperprior,
    x: Tensor,
    latents: Latents,
    round_y: Callable[[Tensor], Tensor],
    round_z: Callable[[Tensor], Tensor],
) -> Tensor:
    """bpp + lambda * 255^2 * MSE, averaged over images, by CompressAI's own modules."""
    medians = model.entropy_bottleneck.quantiles[:, 0, 1].detach().view(1, -1, 1, 1)
    z_hat = round_z(latents.z - medians) + medians
    scales, means = model.h_s(z_hat).chunk(2, 1)
    y_hat = round_y(latents.y - means) + means
    z_by_channel = z_hat.transpose(0, 1).reshape(model.N, 1, -1)
    bottleneck, conditional = model.entropy_bottleneck, model.gaussian_conditional
    p_z = bottleneck.likelihood_lower_bound(bottleneck._likelihood(z_by_channel)[0])
    p_y = conditional.likelihood_lower_bound(conditional._likelihood(y_hat, scales, means))
    bits = -p_z.log2().sum() - p_y.log2().sum()
    mse = F.mse_loss(model.g_s(y_hat), x)
    return bits / (x.numel() / 3) + LMBDA * 255**2 * mse


def plain_round(v: Tensor, tau: float) -> Tensor:
    """Three-class SSL at its published settings: candidates and logits stacked, then torch's own
    relaxed categorical distribution."""
    nearest = v.round().detach()
    candidates = torch.stack((nearest - 1, nearest, nearest + 1), dim=-1)
    u = (0.98 * (v.unsqueeze(-1) - candidates).abs() / 1.5).clamp(1e-6, 1 - 1e-6)
    p = torch.sigmoid(-1.4 * torch.logit(u)).clamp_min(1e-6)
    logits = 1.4 * p.log()
    sampler = torch.distributions.RelaxedOneHotCategorical(tau, logits=logits / tau)
    return (sampler.rsample() * candidates).sum(dim=-1)


def plain_step(model: MeanScaleHyperprior, x: Tensor) -> Callable[[], Any]:
    """The published loop, written simply: the decoder's weights collect gradients that nobody uses,
    and every step ends with a whole evaluation."""
    with torch.no_grad():
        y = model.g_a(x)
        z = model.h_a(y)
    latents = Latents(y.requires_grad_(), z.requires_grad_())
    optimizer = torch.optim.Adam(latents, lr=0.005)

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        relaxed = partial(plain_round, tau=SCHEDULE(100))
        loss = plain_loss(model, x, latents, relaxed, relaxed)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            true_loss = plain_loss(model, x, latents, torch.round, torch.round)
        return loss.item(), true_loss.item()

    return step


def our_step(model: MeanScaleHyperprior, x: Tensor) -> Callable[[], Any]:
    """The step of `train_flexible_inference.refine`; its evaluations come every 50 steps."""
    model = freeze(model)
    x = x.contiguous(memory_format=torch.channels_last)
    latents = Latents(*(v.clone().requires_grad_() for v in analyze(model, x)))
    optimizer = torch.optim.Adam(latents, lr=0.005, fused=True)
    rounding = build_rounding(*METHOD, temperature=SCHEDULE)
    generators = [torch.Generator() for _ in x]

    def step() -> None:
        optimizer.zero_grad()
        relaxed = image_by_image([rounding.at(100, g.manual_seed(0)) for g in generators])
        rd_pass(model, x, latents, relaxed, LMBDA)["loss"].sum().backward()
        optimizer.step()

    return step


def floor_step(model: MeanScaleHyperprior, x: Tensor) -> Callable[[], Any]:
    """The convolutions of g_s and h_s alone, torch's own, forward and backward to their input."""
    model.requires_grad_(False).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    latents = analyze(model, x)
    chains = []
    for network, v in ((model.g_s, latents.y), (model.h_s, latents.z)):
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        layers = nn.Sequential(*(layer for layer in network if isinstance(layer, kinds)))
        chains.append((layers, v.requires_grad_(), torch.randn_like(layers(v))))

    def step() -> None:
        for layers, v, gradient in chains:
            v.grad = None
            layers(v).backward(gradient)

    return step


def compiled_step(model: MeanScaleHyperprior, x: Tensor) -> Callable[[], Any]:
    """Ours with the decoder's layers as CompressAI writes them, through torch.compile."""
    plain = copy.deepcopy(model.g_s).requires_grad_(False)
    step = our_step(model, x)
    model.g_s = torch.compile(plain.to(memory_format=torch.channels_last))
    return step


# --- the loops of training ------------------------------------------------------------------------


def plain_training(model: MeanScaleHyperprior, x: Tensor) -> Callable[[], Any]:
    """A loop as CompressAI's users write it first."""
    model.train()
    named = dict(model.named_parameters())
    quantiles = [p for name, p in named.items() if name.endswith(".quantiles")]
    weights = [p for name, p in named.items() if not name.endswith(".quantiles")]
    optimizer, aux_optimizer = torch.optim.Adam(weights, lr=1e-4), torch.optim.Adam(quantiles)

    def step() -> float:
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        out = model(x)
        bits = sum(-p.log2().sum() for p in out["likelihoods"].values())
        loss = bits / (x.numel() / 3) + LMBDA * 255**2 * F.mse_loss(out["x_hat"], x)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        aux_loss = model.aux_loss()
        aux_loss.backward()
        aux_optimizer.step()
        return loss.item()

    return step


def our_training(model: MeanScaleHyperprior, x: Tensor) -> Callable[[], Any]:
    """The step of train.py."""
    model = speed_up(model)
    config = PretrainConfig(
        train_lambda=LMBDA,
        channels=Channels(N=model.N, M=model.M),
        save_name="bench",
        train_folder="sample",
    )
    state = TrainingState(model, *build_optimizers(model, config))
    network = TrainingPass(model, LMBDA)
    return lambda: train_step(network, state, x, 1e-4, config.lr.clip_grad)


REFINEMENTS = {
    "plain": Variant("plain published loop, as its users have it", False, plain_step),
    "plain, pages kept": Variant("plain published loop, pages kept", True, plain_step),
    "ours": Variant("this project's loop", True, our_step),
    "floor": Variant("floor: torch's convolutions alone, pages kept", True, floor_step),
    "compiled": Variant("this loop, torch.compile of CompressAI's g_s", True, compiled_step),
}
TRAININGS = {
    "plain": Variant("plain CompressAI loop, as its users have it", False, plain_training),
    "plain, pages kept": Variant("plain CompressAI loop, pages kept", True, plain_training),
    "ours": Variant("train.py's step", True, our_training),
}
LOOPS = {"refine": REFINEMENTS, "training": TRAININGS}


# --- the loader of tfrecords ----------------------------------------------------------------------


def time_loaders(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of the project's loader and of plain PIL, in turns."""
    if arguments.records is not None:
        return compare_loaders(imagenet_tfrecords(arguments.records, "--records"), arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_sample_records(Path(folder))
        return compare_loaders(imagenet_tfrecords(Path(folder) / "records"), arguments)


def compare_loaders(records: Records, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print images per second of the project's loader and of plain PIL, in turns, and the ratio."""
    size, batch_size = arguments.image_size, arguments.batch_size
    data = RecordCrops(records, size, batch_size, arguments.cycle_length)
    draws = Draws(seed=0)
    loaders = {
        "tf.data, as train.py": lambda: data.batches(draws, lambda name, reason: None),
        "PIL, one thread": lambda: pil_batches(records, size, batch_size, arguments.cycle_length),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(arguments.rounds):
        for name, make in loaders.items():
            speeds[name].append(images_per_second(make(), batch_size, arguments.seconds))
    print(
        f"{len(records.file)} records of {records.length.mean() / 1000:.0f} kB, crops of {size}, "
        f"batches of {batch_size}, {os.cpu_count()} cores ({platform.machine()}), median of "
        f"{arguments.rounds} rounds"
    )
    for name, values in speeds.items():
        print(
            f"{name:22} {statistics.median(values):8.1f} images/s   "
            f"({min(values):.1f} to {max(values):.1f})"
        )
    ours, plain = speeds.values()
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    print(f"{'ratio':22} {statistics.median(ratios):8.2f}            "
          f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return {"images_per_second": speeds, "ratio": statistics.median(ratios)}


def time_codec(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the seconds that coding and decoding of one picture take, networks included."""
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


def images_per_second(batches: Iterator, batch_size: int, seconds: float) -> float:
    """Speed of an endless iterator of batches, its first few left out."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - started)


def pil_batches(
    records: Records, size: int, batch_size: int, cycle_length: int
) -> Iterator[np.ndarray]:
    """uint8 [B, S, S, 3] of the same records in the same order, as one would write it first."""
    tf = import_tensorflow()
    rng = np.random.default_rng(0)
    batch, epoch = [], 0
    while True:
        for record in epoch_order(records, 0, epoch, cycle_length):
            example = tf.train.Example.FromString(read_payload(records, record))
            data = example.features.feature["image"].bytes_list.value[0]
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            if min(picture.size) < size:
                continue
            left = rng.integers(picture.width - size + 1)
            top = rng.integers(picture.height - size + 1)
            pixels = np.asarray(picture)[top : top + size, left : left + size]
            batch.append(pixels[:, ::-1] if rng.random() < 0.5 else pixels)
            if len(batch) == batch_size:
                yield np.stack(batch)
                batch = []
        epoch += 1


def make_sample_records(folder: Path) -> None:
    """Records of ImageNet's size, cut from the four sample photos: 64 JPEGs of 500x375."""
    rng = np.random.default_rng(0)
    photos = sample_photos()
    (folder / "images").mkdir()
    for index in range(64):
        picture = photos.picture(index % len(photos)).image
        scale = max(500 / picture.width, 375 / picture.height) * rng.uniform(1.0, 1.5)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        left = int(rng.integers(picture.width - 500 + 1))
        top = int(rng.integers(picture.height - 375 + 1))
        crop = picture.crop((left, top, left + 500, top + 375))
        crop.save(folder / "images" / f"{index:02d}.jpg", quality=95)
    write_tfrecords(folder / "images", folder / "records", shards=4, workers=1)


if __name__ == "__main__":
    sys.exit(main())
