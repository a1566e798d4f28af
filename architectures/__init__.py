"""Families of models: what their latents are, and how these are decoded, step by step.

A module in this folder registers a family when it is imported, which happens here.
"""

from architectures.base import ARCHITECTURES, Architecture, architecture
from architectures.mean_scale_hyperprior import MeanScale
from architectures.walk import Group, Latents, Walk

__all__ = ["ARCHITECTURES", "Architecture", "Group", "Latents", "MeanScale", "Walk", "architecture"]
