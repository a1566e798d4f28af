"""Loops of training: a simple one with CompressAI, and that of train.py."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import Architecture
from benchmarks.variant import LMBDA, MSE_WEIGHT, Variant, in_bfloat16
from config import Channels, PretrainConfig
from models import prepare_for_training
from objectives import RateDistortion
from pretraining.step import TrainingState, build_optimizers, train_step
from pretraining.training_pass import TrainingPass


def plain_training(model: Architecture, x: Tensor) -> Callable[[], Any]:
    """The step of a simple training loop, as a user of CompressAI would write it.

    The loss is written again on purpose: this loop shares nothing with `objectives`.
    """
    network = model.network.train()
    named = dict(network.named_parameters())
    quantiles = [p for name, p in named.items() if name.endswith(".quantiles")]
    weights = [p for name, p in named.items() if not name.endswith(".quantiles")]
    optimizer, aux_optimizer = torch.optim.Adam(weights, lr=1e-4), torch.optim.Adam(quantiles)

    def step() -> float:
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        out = network(x)
        bits = sum(-p.log2().sum() for p in out["likelihoods"].values())
        loss = bits / (x.numel() / 3) + MSE_WEIGHT * F.mse_loss(out["x_hat"], x)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        aux_loss = network.aux_loss()
        aux_loss.backward()
        aux_optimizer.step()
        return loss.item()

    return step


def our_training(
    model: Architecture, x: Tensor, precision: torch.dtype = torch.float32
) -> Callable[[], Any]:
    """The step of train.py."""
    model = prepare_for_training(model)
    config = PretrainConfig(
        train_lambda=LMBDA,
        channels=Channels(N=model.N, M=model.M),
        save_name="bench",
        train_folder="sample",
    )
    state = TrainingState(*build_optimizers(model.network, config))
    network = TrainingPass(model, RateDistortion(LMBDA), precision)
    return lambda: train_step(network, state, x, 1e-4, config.lr.clip_grad)


TRAININGS = {
    "plain": Variant("plain CompressAI loop, as its users have it", False, plain_training),
    "plain, pages kept": Variant("plain CompressAI loop, pages kept", True, plain_training),
    "ours": Variant("train.py's step", True, our_training),
    "ours, bfloat16": Variant("train.py's step, bfloat16", True, in_bfloat16(our_training)),
}
