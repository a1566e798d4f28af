"""Refinement of latents: pace, noise, evaluation, polish, targets, and the folder of a run."""
