"""Pre-train the mean-scale hyperprior on crops of photos.

python train.py --config example_files/pretrain.json
python train.py --config example_files/pretrain.json --set resume=true
torchrun --nproc_per_node=2 train.py --config example_files/pretrain.json

Loss: bpp + lambda * 255^2 * MSE with uniform noise for rounding (arXiv 1809.02736), and an
auxiliary loss with an optimizer of its own for the entropy bottleneck's quantiles, which no other
loss sees and without which the entropy coder's tables fit nothing.
"""

import sys
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from config import InputError, PretrainConfig, exits_with_one_line, parse_command_line

# isort: split
import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, get_total_norm

from architectures import Architecture
from common.device import is_out_of_memory, pick_device
from common.processes import Ranks, StopSignal, first_rank_does, gather, join_ranks
from datasets import Draws, ImageFiles, open_folder, open_training_data
from fast.memory import MemoryBound, memory_bound
from fast.pool import keep_pages
from fast.tiles import coding_tile
from metrics import picture_quality
from models import build_model, load_checkpoint, model_from_state_dict, prepare_for_training
from objectives import Problem, RateDistortion
from pretraining.run import open_training_run
from pretraining.training_pass import TrainingPass
from pretraining.window import Window

# So many steps in a row without a finite gradient end a run.
MAX_BAD_STEPS = 10
# Bytes that testing keeps per element of y, where no optimizer has its own: y twice and its prior.
TESTED_LATENT = 40


@exits_with_one_line
def main(argv=None) -> int:
    """Train, or test alone; exit code 0, also when a signal stopped it, 1 for a diverged run."""
    config = parse_command_line(PretrainConfig, "Pre-train the mean-scale hyperprior.", argv)
    keep_pages()
    ranks = join_ranks(config.device)
    device = pick_device(config.device, ranks.local)
    test_images = open_test_images(config)
    if config.test:
        run = open_training_run(config, ranks)
        run.mention_passed_over("path_test_data", test_images.passed_over)
        model = run.model_to_test().to(device)
        return run.report_test(validate(model, test_images, config.train_lambda, ranks))

    # Rank 0 first: it finds the records and keeps their places for the others.
    data = first_rank_does(ranks, lambda: open_training_data(config))
    run = open_training_run(config, ranks)
    checkpoint = run.checkpoint_to_resume()
    torch.manual_seed(config.seed)
    model = prepare_for_training(start_model(config, checkpoint)).to(device)
    objective = RateDistortion(config.train_lambda)
    network = wrap(TrainingPass(model, objective, config.precision), ranks)
    state = TrainingState(*build_optimizers(model.network, config))
    torch.manual_seed(config.seed + ranks.rank)
    if checkpoint is not None:
        state.restore(checkpoint, ranks)
    batches = data.batches(
        Draws(config.seed, ranks.rank, ranks.world, state.data_position), run.skip
    )
    run.announce(state.step, model, data, device)
    if test_images is not None:
        run.mention_passed_over("path_test_data", test_images.passed_over)

    window, due = Window(ranks, config.batch_size), False
    # Closed on every way out: its workers do not end by SIGTERM.
    with closing(batches), StopSignal(ranks) as stop:
        while state.step < config.tot_iterations and not stop.agreed():
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            x = batch.x.to(device, non_blocking=True).float() / 255  # [B, 3, S, S]
            lr = config.lr.at(state.step)
            terms = train_step(network, state, x, lr, config.lr.clip_grad)
            state.count(batch.position, finite=terms is not None)
            window.add(terms, waited)
            if state.bad_in_a_row >= MAX_BAD_STEPS:
                return run.diverged(state.step, MAX_BAD_STEPS)
            if state.step % config.print_freq == 0:
                run.log_training(state.step, {"lr": lr, **window.read()}, state.bad_steps)
            due = due or state.step % config.save_model_freq == 0
            if due and not state.bad_in_a_row and state.step < config.tot_iterations:
                due = False
                with window.stopped_clock():
                    run.save(state.step, model, state.checkpoint(ranks))
                    results = validate(model, test_images, config.train_lambda, ranks)
                    run.log_test(state.step, results)
        run.save(state.step, model, state.checkpoint(ranks))
    if state.step < config.tot_iterations:
        return run.stopped(state.step)
    run.log_test(state.step, validate(model, test_images, config.train_lambda, ranks))
    return run.finish(state.step, model)


def start_model(config: PretrainConfig, checkpoint: dict[str, Any] | None) -> Architecture:
    """The model of a checkpoint, or of `pretrain`, or a new one.

    Raises:
        InputError: `pretrain` cannot be read, or has other channels than the config asks for.
    """
    if checkpoint is not None:
        return model_from_state_dict(checkpoint["model_state_dict"], config.save_name)
    if config.pretrain:
        return load_checkpoint(config.pretrain, config.channels)
    return build_model(config.network_channels)


@dataclass
class TrainingState:
    """All that changes during training, as a checkpoint keeps it."""

    optimizer: torch.optim.Optimizer
    aux_optimizer: torch.optim.Optimizer
    step: int = 0
    data_position: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0

    def count(self, data_position: int, finite: bool) -> None:
        """A step is over; `finite` is False where it changed nothing."""
        self.step += 1
        self.data_position = data_position
        self.bad_steps += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1

    def checkpoint(self, ranks: Ranks) -> dict[str, Any]:
        """What stands beside the weights, of all ranks; every rank must call this."""
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        return {
            "iter": self.step,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "aux_optimizer_state_dict": self.aux_optimizer.state_dict(),
            "rng": gather(ranks, rng),
            "data_position": gather(ranks, self.data_position),
            "bad_steps": self.bad_steps,
        }

    def restore(self, checkpoint: dict[str, Any], ranks: Ranks) -> None:
        """Go on from a checkpoint whose weights the model has already."""
        self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        self.aux_optimizer.load_state_dict(checkpoint["aux_optimizer_state_dict"])
        self.step, self.bad_steps = checkpoint["iter"], checkpoint["bad_steps"]
        positions, world = checkpoint["data_position"], len(checkpoint["data_position"])
        if world != ranks.world:  # the same images, shared out anew
            self.data_position = max(positions) * world // ranks.world
            return
        self.data_position = positions[ranks.rank]
        torch.set_rng_state(checkpoint["rng"][ranks.rank]["cpu"])
        if torch.cuda.is_available() and "cuda" in checkpoint["rng"][ranks.rank]:
            torch.cuda.set_rng_state(checkpoint["rng"][ranks.rank]["cuda"])


def train_step(
    network: nn.Module, state: TrainingState, x: Tensor, lr: float, clip_grad: float
) -> dict[str, Tensor] | None:
    """One update on x [B, 3, S, S] in [0, 1]; what `TrainingPass` gave before it, detached.

    None, and nothing changed, where a gradient is not finite: on every rank at once, for
    DistributedDataParallel has averaged the gradients.
    """
    network.zero_grad()
    terms = network(x)
    # The two losses have no parameter in common, so one backward serves both optimizers.
    (terms["loss"] + terms["aux_loss"]).backward()
    if not get_total_norm([p.grad for p in network.parameters()]).isfinite():
        return None
    for group in state.optimizer.param_groups:
        group["lr"] = lr
        if clip_grad:
            clip_grad_value_(group["params"], clip_grad)
    state.optimizer.step()
    state.aux_optimizer.step()
    return {key: value.detach() for key, value in terms.items()}


def validate(
    model: Architecture, images: ImageFiles | None, lmbda: float, ranks: Ranks
) -> list[dict[str, Any]]:
    """Truly rounded rate and quality of every whole image, in order; nothing without images.

    Each record is one of `measure`. The ranks share the images.
    """
    if images is None:
        return []
    bound = memory_bound(model.N, model.M, None, model.device)._replace(per_latent=TESTED_LATENT)
    was_training = model.network.training
    model.network.eval()
    own = images.names[ranks.rank :: ranks.world]
    records = [measure(model, images, name, lmbda, bound) for name in own]
    model.network.train(was_training)
    gathered = {record["name"]: record for part in gather(ranks, records) for record in part}
    return [gathered[name] for name in images.names]


@torch.no_grad()
def measure(
    model: Architecture, images: ImageFiles, name: str, lmbda: float, bound: MemoryBound
) -> dict[str, Any]:
    """name, loss, bpp, bpp_y, bpp_z and `picture_quality` of a whole image, truly rounded.

    name and error where it cannot be read, does not fit into memory or fails otherwise: the other
    images and the training go on.
    """
    try:
        (image,) = images.load([name])
        if image.x is None:
            return {"name": name, "error": image.error}
        tile = tested_tile(image.x.shape[1:], bound)
        x = image.x[None].to(model.device)  # [1, 3, H, W]
        terms = Problem(model, x, RateDistortion(lmbda), tile).true(model.analyze(x))
        rates = {f"bpp_{latent}": rate.item() for latent, rate in sorted(terms.rates.items())}
        values = {"loss": terms.loss.item(), "bpp": terms.bpp.item(), **rates}
        return {"name": name, **values, **picture_quality(terms.x_hat, x)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"name": name, "error": f"does not fit into the memory of {model.device}"}
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"name": name, "error": reason}


def tested_tile(size: tuple[int, int], bound: MemoryBound) -> int | None:
    """How large tiles of a picture of H, W are; pictures that are coded whole stay whole.

    Raises:
        MemoryError: it does not even fit in the smallest tiles.
    """
    side = coding_tile(size)
    if side is None:
        return None
    try:
        return min(side, bound.tile(size) or side)
    except InputError:
        raise MemoryError from None


def open_test_images(config: PretrainConfig) -> ImageFiles | None:
    """The images of `path_test_data`, if there are any.

    Raises:
        InputError: no image is there.
    """
    if not config.path_test_data:
        return None
    return open_folder(config.path_test_data, "path_test_data")


def build_optimizers(
    model: nn.Module, config: PretrainConfig
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The optimizer of all weights but the quantiles (Adam; SOAP, arXiv 2409.11321), and theirs."""
    named = dict(model.named_parameters())
    weights = [p for name, p in named.items() if not name.endswith(".quantiles")]
    quantiles = [p for name, p in named.items() if name.endswith(".quantiles")]
    if config.optimizer == "soap":
        main_optimizer = SOAP(weights, lr=config.lr.base, weight_decay=0.0)
    else:
        main_optimizer = torch.optim.Adam(weights, lr=config.lr.base)
    return main_optimizer, torch.optim.Adam(quantiles, lr=config.aux_lr)


def wrap(network: TrainingPass, ranks: Ranks) -> nn.Module:
    """DistributedDataParallel where there are several ranks; it starts them from equal weights."""
    if ranks.world == 1:
        return network
    return DistributedDataParallel(network)


if __name__ == "__main__":
    sys.exit(main())
