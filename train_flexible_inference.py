"""Refine the latents of images under a frozen mean-scale hyperprior.

python train_flexible_inference.py --config example_files/flexible_inference.json
"""

import sys

import skimage
import torch
from torch import Tensor

from config import RefineConfig, exits_with_one_line, parse_command_line
from experimental_inference_methods import hard_round, rounding_from_config
from models import Latents, analyze, freeze, load_checkpoint, pick_device, rd_pass


@exits_with_one_line
def main(argv=None) -> int:
    """Refine one sample photo and print its loss before and after."""
    config = parse_command_line(RefineConfig, __doc__, argv)
    rounding = rounding_from_config(config)
    device = pick_device(config.device)
    model = freeze(load_checkpoint(config.pretrain, config.channels)).to(device)
    x = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].to(device) / 255
    latents = Latents(*(v.requires_grad_() for v in analyze(model, x)))
    optimizer = torch.optim.Adam(latents, lr=config.optimizer.lr)
    before = true_loss(model, x, latents, config.lmbda)
    for step in range(config.tot_inference_iterations):
        optimizer.zero_grad()
        rd_pass(model, x, latents, rounding.at(step), config.lmbda)["loss"].sum().backward()
        optimizer.step()
    print(f"true loss {before:.4f} -> {true_loss(model, x, latents, config.lmbda):.4f}")
    return 0


@torch.no_grad()
def true_loss(model, x: Tensor, latents: Latents, lmbda: float) -> float:
    """bpp + lambda * 255^2 * MSE with hard rounding."""
    return rd_pass(model, x, latents, hard_round, lmbda)["loss"].item()


if __name__ == "__main__":
    sys.exit(main())
