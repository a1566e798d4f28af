"""Pre-training on a GPU: the step never waits, leaves out bad steps, and gets its batches early."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import skimage
import torch

from common.processes import Ranks
from config import PretrainConfig
from conftest import to_x
from models import build_model, prepare_for_training
from objectives import RateDistortion
from pretended_gpu import Kernels, PretendedGpu
from pretraining.device_batches import on_device
from pretraining.draws import Batch
from pretraining.step import TrainingState, build_optimizers, train_step
from pretraining.training_pass import TrainingPass
from pretraining.window import Window
from trainings import assert_same

ALONE = Ranks(0, 1, 0)


def training_on(host):
    torch.manual_seed(0)
    config = PretrainConfig(
        train_lambda=0.01, channels={"N": 8, "M": 8}, save_name="x", train_folder="x",
    )  # fmt: skip
    model = build_model(config.channels)
    model.network.to(host)
    training = TrainingPass(prepare_for_training(model), RateDistortion(0.01))
    return training, TrainingState(*build_optimizers(model.network, config))


@pytest.fixture
def streams_here(monkeypatch):
    """Streams and events that do nothing; copies from pinned memory are counted."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr("torch.cuda.Event", lambda: event)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device=None: stream)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    return pinned


def test_a_step_never_waits_for_the_host():
    with PretendedGpu("meta"):
        training, state = training_on("meta")
        window = Window(ALONE, 2)
        x = torch.zeros(2, 3, 64, 64, device="meta")
        window.add(*train_step(training, state, x, 1e-3, 1.0))
        with Kernels() as kernels:
            window.add(*train_step(training, state, x, 1e-3, 1.0))
    assert kernels.waits == []
    assert kernels.counts["_fused_adam_"] == 2


@pytest.mark.usefixtures("streams_here")
def test_the_optimizer_leaves_out_a_bad_step_by_itself():
    pixels = skimage.data.astronaut()
    x = torch.cat([to_x(pixels[64 * i : 64 * i + 64, 100:164]) for i in range(2)])
    bad = torch.full_like(x, torch.nan)
    counts, weights, means = {}, {}, {}
    for place in ("cpu", "gpu"):
        with PretendedGpu("cpu") if place == "gpu" else nullcontext():
            training, state = training_on("cpu")
            assert (place == "gpu") == bool(state.optimizer.defaults["fused"])
            window, counts[place] = Window(ALONE, 2), []
            for one in (x, bad, bad, x, bad):
                torch.manual_seed(1)
                terms, finite = train_step(training, state, one, 1e-3, 1.0)
                state.count_step(0, finite)
                window.add(terms, finite)
                counts[place].append((state.bad_steps, state.bad_in_a_row))
            state.settle()
            counts[place].append((state.bad_steps, state.bad_in_a_row))
            weights[place] = training.network.state_dict()
            means[place] = window.read()["loss"]
    assert counts["cpu"] == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 1)]
    assert counts["gpu"] == [(0, 0), (0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]  # one step later
    assert means["gpu"] == pytest.approx(means["cpu"], rel=1e-5)
    for name, weight in weights["cpu"].items():
        torch.testing.assert_close(weights["gpu"][name], weight, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_another_device_loads():
    """Adam keeps its count of steps elsewhere there, and is one kernel."""
    _, state = training_on("cpu")
    for p in state.optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    with PretendedGpu("cpu"):
        _, on_gpu = training_on("cpu")
        on_gpu.restore(state.checkpoint(ALONE), ALONE)
        assert on_gpu.optimizer.param_groups[0]["fused"]
    _, back = training_on("cpu")
    back.restore(on_gpu.checkpoint(ALONE), ALONE)
    assert not back.optimizer.param_groups[0]["fused"]
    assert_same(back.optimizer.state_dict(), state.optimizer.state_dict())


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_batches_arrive_in_order_and_are_closed(streams_here, place):
    closed = []

    def batches():
        try:
            for position in range(5):
                yield Batch(torch.full((1, 3, 2, 2), position, dtype=torch.uint8), position)
        finally:
            closed.append(True)

    with PretendedGpu("cpu") if place == "gpu" else nullcontext():
        arriving = on_device(batches(), torch.device("cuda" if place == "gpu" else "cpu"))
        for expected in range(3):
            batch = next(arriving)
            assert batch.position == expected == batch.x.unique().item()
        assert not closed
        arriving.close()
    assert closed == [True]
    assert len(streams_here) == (3 if place == "gpu" else 0)
