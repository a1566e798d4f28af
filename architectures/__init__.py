"""Families of models: which latents they have, and in which order these are decoded.

This file imports every module of a family. The import registers the family.
"""

from architectures.base import ARCHITECTURES, Architecture, architecture
from architectures.mean_scale_hyperprior import MeanScale
from architectures.walk import Group, Latents, Walk

__all__ = ["ARCHITECTURES", "Architecture", "Group", "Latents", "MeanScale", "Walk", "architecture"]
