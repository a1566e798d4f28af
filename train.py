"""Pre-train a model on crops of photos.

python train.py --config example_files/train_demo.json
python train.py --config example_files/train_demo.json --images PHOTOS --set save_name=mine
torchrun --nproc_per_node=2 train.py --config example_files/pretrain.json

The loss is rate + lambda * distortion (`objective`), with uniform noise in place of rounding (arXiv
1809.02736), or with rounded latents for h_s and g_s (`quantization`).
An auxiliary loss, with its own optimizer, trains the quantiles of the entropy bottleneck. The
entropy coder's tables are made from them, and no other loss depends on them.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from common.errors import InputError, exits_with_one_line
from config import PretrainConfig, parse_command_line

# isort: split
import torch

from architectures import ARCHITECTURES, Architecture
from architectures.own import find_family
from architectures.trial import tried
from common.device import pick_device
from common.images import ImageFiles
from common.processes import Ranks, StopSignal, first_rank_does, join_ranks
from datasets import open_folder, open_training_data
from fast.pool import keep_pages
from models import build_model, load_checkpoint, model_from_state_dict, prepare_for_training
from objectives import objective_of
from pretraining.device_batches import on_device
from pretraining.draws import Draws
from pretraining.new_context import with_new_context
from pretraining.new_y import with_new_y
from pretraining.run import folder_of, open_training_run, precision_of
from pretraining.step import TrainingState, build_optimizers, distribute, train_step
from pretraining.training_pass import TrainingPass
from pretraining.validation import validate
from pretraining.window import Window

# A run ends after so many steps in a row whose gradients are not finite.
MAX_BAD_STEPS = 10


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Train or test; exit code 0, also after a signal; 1 if it diverged or an image failed."""
    config = parse_command_line(PretrainConfig, __doc__, argv)
    keep_pages()
    ranks = join_ranks(config.device)
    device = pick_device(config.device, ranks.local)
    objective = objective_of(config, config.train_lambda)
    test_images = open_test_images(config)
    refuse_faults(config)  # before a folder is made
    if config.test:
        return test(config, ranks, device, test_images)

    precision = first_rank_does(ranks, lambda: precision_of(config, device))
    config = config.model_copy(update={"precision": precision})
    # Rank 0 comes first: it stores the index of the tfrecords, which the others then read.
    data = first_rank_does(ranks, lambda: open_training_data(config))
    run = open_training_run(config, ranks)
    checkpoint = run.checkpoint_to_resume()
    torch.manual_seed(config.seed)
    model = prepare_for_training(start_model(config, checkpoint)).to(device)
    training_pass = TrainingPass(model, objective, getattr(torch, precision), config.quantization)
    network = distribute(training_pass, ranks)
    state = TrainingState(*build_optimizers(model.network, config))
    torch.manual_seed(config.seed + ranks.rank)
    if checkpoint is not None:
        state.restore(checkpoint, ranks)
    draws = Draws(config.seed, ranks.rank, ranks.world, state.data_position)
    batches = on_device(data.batches(draws, run.skip), device)
    run.announce(state.step, model, data, f"{device}, {precision}")
    run.log_passed_over("path_test_data", left_out(test_images))

    window, save_due = Window(ranks, config.batch_size), False
    # The batches must be closed in any case, for their workers ignore SIGTERM.
    with closing(batches), StopSignal(ranks) as stop:
        while state.step < config.tot_iterations and not stop.agreed():
            with window.waiting():
                batch = next(batches)
            x = batch.x.float() / 255  # [B, 3, S, S]
            lr = config.lr.at(state.step, config.tot_iterations)
            terms, finite = train_step(network, state, x, lr, config.lr.clip_grad)
            state.count_step(batch.position, finite)
            window.add(terms, finite)
            printing = state.step % config.print_freq == 0
            save_due = save_due or state.step % config.save_model_freq == 0
            if printing or save_due or state.step == config.tot_iterations:
                state.settle()
            if state.bad_in_a_row >= MAX_BAD_STEPS:
                return run.end_diverged(state.step, MAX_BAD_STEPS)
            if printing:
                run.log_training(state.step, {"lr": lr, **window.read()}, state.bad_steps)
            if save_due and not state.bad_in_a_row and state.step < config.tot_iterations:
                save_due = False
                with window.stopped_clock():
                    run.save(state.step, model, state.checkpoint(ranks))
                    results = validate(model, test_images, objective, ranks)
                    run.log_test(state.step, results)
        run.save(state.step, model, state.checkpoint(ranks))
    if state.step < config.tot_iterations:
        return run.end_stopped(state.step)
    run.log_test(state.step, validate(model, test_images, objective, ranks))
    return run.finish(state.step, model)


def test(
    config: PretrainConfig, ranks: Ranks, device: torch.device, images: ImageFiles | None
) -> int:
    """Test the model of a run; exit code 0, 1 if an image failed."""
    run = open_training_run(config, ranks)
    run.log_passed_over("path_test_data", left_out(images))
    model = run.model_to_test().to(device)
    objective = objective_of(config, config.train_lambda)
    return run.report_test(validate(model, images, objective, ranks))


def left_out(images: ImageFiles | None) -> str:
    """Which files of `path_test_data` were passed over, in words; empty if none were."""
    return "" if images is None else images.passed_over


def start_model(config: PretrainConfig, checkpoint: dict[str, Any] | None) -> Architecture:
    """The model of a checkpoint; else that of `pretrain`; else a new one.

    Raises:
        InputError: `pretrain` cannot be read, or has other channels than the config asks for.
    """
    if checkpoint is not None:
        family = None if config.architecture is None else find_family(config.architecture)
        weights = checkpoint["model_state_dict"]
        return tried(model_from_state_dict(weights, config.save_name, family))
    if config.new_y:
        return with_new_y(load_checkpoint(config.pretrain), config.network_channels)
    if config.new_context:
        return with_new_context(load_checkpoint(config.pretrain, config.channels))
    if config.pretrain:
        return load_checkpoint(config.pretrain, config.channels, config.architecture)
    return build_model(config.network_channels, config.architecture)


def refuse_faults(config: PretrainConfig) -> None:
    """Refuse a class of the user's that cannot be trained or loaded; registered families are sound.

    Where there are checkpoints, the class is tried when the newest is loaded.

    Raises:
        InputError: the class has a fault.
    """
    if config.architecture is None or config.architecture in ARCHITECTURES:
        return
    if next(folder_of(config).glob("iter_*.pth.tar"), None) is not None:
        return
    if config.test and not config.pretrain:
        return  # there is nothing to test
    model = start_model(config, None)
    if not (config.test or model.batches):
        raise InputError(
            f"architecture {config.architecture}: takes one picture at a time (batches is False), "
            "and training takes several"
        )


def open_test_images(config: PretrainConfig) -> ImageFiles | None:
    """The images of `path_test_data`; None if the key is empty.

    Raises:
        InputError: no image is at that path.
    """
    if not config.path_test_data:
        return None
    return open_folder(config.path_test_data, "path_test_data")


if __name__ == "__main__":
    sys.exit(main())
