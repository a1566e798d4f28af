"""Short ways to the passes and the refinements that several test modules ask for."""

import torch

from experimental_inference_methods import rounding_from_config
from objectives import Problem, RateDistortion
from train_flexible_inference import refine

LMBDA = 0.01


def problem_of(model, x, lmbda=LMBDA, tile=None, precision=torch.float32):
    """The problem that x [B, 3, H, W] poses to the model."""
    return Problem(model, x, RateDistortion(lmbda), tile, precision)


def true_terms(model, x, latents, lmbda=LMBDA, tile=None):
    """`Terms` of truly rounded latents, without gradients."""
    with torch.no_grad():
        return problem_of(model, x, lmbda, tile).true(latents)


def to_optimise(latents):
    """Copies of latents that collect gradients."""
    return {name: v.detach().clone().requires_grad_() for name, v in latents.items()}


def refined(problem, config, seeds, rounding=None, progress=lambda *_: None, start=None):
    """The trajectories of a problem's images; one seed each. The config's rounding unless given."""
    names = [f"image {seed}" for seed in seeds]  # an image's noise depends on its name
    return refine(problem, rounding or rounding_from_config(config), config, names, progress, start)
