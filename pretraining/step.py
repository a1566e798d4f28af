"""A step of pre-training: the state that it changes, its optimizers and its update."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, get_total_norm

from common.optional_packages import import_package
from common.processes import Ranks, gather
from config import PretrainConfig
from pretraining.training_pass import TrainingPass


class _Flag:
    """A flag [] on its way from a device to the host."""

    def __init__(self, flag: Tensor):
        self._here = flag.to("cpu", non_blocking=True)
        self._copied = None
        if flag.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        """The flag; waits until it is here."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._here)


@dataclass
class TrainingState:
    """All that changes during training but the model; a checkpoint stores it.

    `data_position`: how many draws of the training data this rank has consumed. `bad_steps`: how
    many steps had a gradient that is not finite; such a step changes nothing. `bad_in_a_row`: how
    many of them came last. On a GPU both may lack the last step, until `settle` is called.
    """

    optimizer: torch.optim.Optimizer
    aux_optimizer: torch.optim.Optimizer
    step: int = 0
    data_position: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    _unsettled: _Flag | None = field(default=None, repr=False)

    def count_step(self, data_position: int, finite: Tensor) -> None:
        """Count a step; `finite` []: whether its gradients were finite.

        A GPU still computes the flag. So the flag of the step before is read, which is there.
        """
        self.settle()
        self.step += 1
        self.data_position = data_position
        self._unsettled = _Flag(finite)
        if finite.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Wait for the last step, and count it in `bad_steps` and `bad_in_a_row`."""
        if self._unsettled is None:
            return
        finite, self._unsettled = self._unsettled.read(), None
        self.bad_steps += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1

    def checkpoint(self, ranks: Ranks) -> dict[str, Any]:
        """What a checkpoint stores beside the weights, of all ranks; every rank must call this."""
        self.settle()
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
        """Restore the state of a checkpoint, not the model's weights."""
        _restore_optimizer(self.optimizer, checkpoint["optimizer_state_dict"])
        _restore_optimizer(self.aux_optimizer, checkpoint["aux_optimizer_state_dict"])
        self.step, self.bad_steps = checkpoint["iter"], checkpoint["bad_steps"]
        positions, world = checkpoint["data_position"], len(checkpoint["data_position"])
        if world != ranks.world:  # the ranks share the same draws in another way
            self.data_position = max(positions) * world // ranks.world
            return
        self.data_position = positions[ranks.rank]
        torch.set_rng_state(checkpoint["rng"][ranks.rank]["cpu"])
        if torch.cuda.is_available() and "cuda" in checkpoint["rng"][ranks.rank]:
            torch.cuda.set_rng_state(checkpoint["rng"][ranks.rank]["cuda"])


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer's state, which may come from another device."""
    own = {key: optimizer.defaults[key] for key in ("fused",) if key in optimizer.defaults}
    groups = [{**group, **own} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


def build_optimizers(
    model: nn.Module, config: PretrainConfig
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The optimizer of all weights but the quantiles, and the optimizer of the quantiles.

    The first is Adam or SOAP (arXiv 2409.11321), the second is Adam. On a GPU, Adam is one kernel,
    which can leave out a step by itself.

    Raises:
        InputError: the config asks for SOAP, and pytorch_optimizer is not installed.
    """
    named = dict(model.named_parameters())
    weights = [p for name, p in named.items() if not name.endswith(".quantiles")]
    quantiles = [p for name, p in named.items() if name.endswith(".quantiles")]
    fused = weights[0].device.type == "cuda" or None
    if config.optimizer == "soap":
        soap = import_package("pytorch_optimizer", 'optimizer = "soap"').SOAP
        main_optimizer = soap(weights, lr=config.lr.base, weight_decay=0.0)
    else:
        main_optimizer = torch.optim.Adam(weights, lr=config.lr.base, fused=fused)
    return main_optimizer, torch.optim.Adam(quantiles, lr=config.aux_lr, fused=fused)


def distribute(network: TrainingPass, ranks: Ranks) -> nn.Module:
    """Wrap the network in DistributedDataParallel if there are several ranks."""
    if ranks.world == 1:
        return network
    return DistributedDataParallel(network)


def train_step(
    network: nn.Module, state: TrainingState, x: Tensor, lr: float, clip_grad: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Update the weights by one step on x [B, 3, S, S] in [0, 1], unless a gradient is not finite.

    Args:
        lr: the learning rate of the main optimizer.
        clip_grad: the bound of each gradient's absolute value; 0: no bound.

    Returns:
        The terms of `TrainingPass` before the update, detached, and whether all gradients were
        finite, bool []. If not, nothing was changed. All ranks agree on that, for their gradients
        have been averaged.
    """
    network.zero_grad()
    terms = network(x)
    # The two losses share no parameter, so one backward pass serves both optimizers.
    (terms["loss"] + terms["aux_loss"]).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    finite = get_total_norm(gradients).isfinite()
    for group in state.optimizer.param_groups:
        group["lr"] = lr
        if clip_grad:
            clip_grad_value_(group["params"], clip_grad)
    for optimizer in (state.optimizer, state.aux_optimizer):
        _step_if(finite, optimizer)
    return {key: value.detach() for key, value in terms.items()}, finite


def _step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step if the flag is true; a fused optimizer reads it on its device."""
    if optimizer.defaults.get("fused"):
        # As torch's GradScaler tells an optimizer to leave out a step.
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()
