"""The probability that each rounding function gives to each candidate, as a plot."""

import numpy as np
import torch
from matplotlib.figure import Figure

from experimental_inference_methods import METHODS, rounding_logits


def plot_probabilities() -> Figure:
    """The probability of each rounding candidate over v, at temperature 1.

    There is a panel for each registered function, with its default hyper-parameters, like the first
    figure of arXiv 2401.17789.
    """
    scored = [(name, function) for (name, function), method in METHODS.items() if method.score]
    figure = Figure(figsize=(13, 2.7 * -(-len(scored) // 4)), dpi=110, layout="constrained")
    axes = figure.subplots(-(-len(scored) // 4), 4, squeeze=False).ravel()
    for axis, (name, function) in zip(axes, scored, strict=False):
        v, probability, candidates = candidate_probabilities(name, function)
        for one, label in zip(probability, candidates, strict=True):
            axis.plot(v, one, label=label)
        axis.set(title=f"{name}\n{function}" if function else name, ylim=(-0.03, 1.03))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[len(scored) :]:
        axis.axis("off")
    figure.supxlabel("v", fontsize=9)
    figure.supylabel("probability", fontsize=9)
    return figure


def candidate_probabilities(
    name: str, function: str | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Values v [n], the probabilities [K, n] at temperature 1, and the names of K candidates."""
    candidates, _ = rounding_logits(torch.tensor([0.25]), name, function)
    three = candidates.size(-1) == 3
    v = torch.linspace(-0.499, 0.499, 400) if three else torch.linspace(0.001, 0.999, 400)
    _, logits = rounding_logits(v.double(), name, function)  # [n, K]
    names = ["round(v) - 1", "round(v)", "round(v) + 1"] if three else ["floor(v)", "ceil(v)"]
    return v.numpy(), torch.softmax(logits, dim=-1).movedim(-1, 0).numpy(), names
