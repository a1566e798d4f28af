"""Families of models: which latents they have, and in which order these are decoded.

This file imports every module of a family. The import registers the family.
"""

from architectures.autoregressive import Anchor, Attention, Autoregressive
from architectures.base import ARCHITECTURES, Architecture, architecture
from architectures.checkerboard import AnchorCheckerboard, Checkerboard, Elic, ElicChandelier
from architectures.factorized import Factorized, FactorizedReLU
from architectures.hyperpriors import MeanScale, Scale
from architectures.walk import Group, Latents, Part, Walk

__all__ = [
    "ARCHITECTURES",
    "Anchor",
    "AnchorCheckerboard",
    "Architecture",
    "Attention",
    "Autoregressive",
    "Checkerboard",
    "Elic",
    "ElicChandelier",
    "Factorized",
    "FactorizedReLU",
    "Group",
    "Latents",
    "MeanScale",
    "Part",
    "Scale",
    "Walk",
    "architecture",
]
