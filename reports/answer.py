"""The result of a comparison in a sentence or two: which method is best, and by how much."""

import math

import numpy as np
import pandas as pd

from config import CompareConfig, Target
from reports.comparison_tables import by_method, changes_against, half_interval


def answer(images: pd.DataFrame, config: CompareConfig, target: Target | None = None) -> str:
    """One sentence for each objective, or for the target: the best method, its lead, the next one.

    Methods are ranked by the mean over models and images of the loss's logarithm, so that all
    models count alike. A model that some method lacks is not counted, and named. With a target
    there are no losses: then the rate counts at equal quality, and PSNR at equal rate.

    Args:
        images: the table of `rows_of_shared_images`.
        target: what all methods aim at, if anything.
    """
    if target is not None:
        return _answer_at_target(images, target)
    sentences = []
    for objective, own in images.dropna(subset=["true_loss"]).groupby("objective", sort=False):
        what = "the lowest loss" if objective == "mse" else f"the lowest loss for {objective}"
        sentences.append(_answer_of_loss(by_method(own, "true_loss"), what, config.anchor))
    return " ".join(filter(None, sentences))


def _answer_of_loss(of_all: pd.DataFrame, what: str, anchor: str) -> str:
    """Which column is lowest, by how much less than the anchor, and how far the next one is.

    Only rows that all columns have are counted; if there are none, only whole columns.

    Args:
        of_all: losses as of `by_method`.
    """
    whole = of_all.dropna()
    counted = of_all if whole.empty else whole
    losses = counted.dropna(axis=1)
    if losses.shape[1] < 2:
        return ""
    best = np.log(losses).mean().idxmin()
    text = f"{best} has {what}{_wins(counted, best)}"
    if anchor in losses and anchor != best:
        text += f": {_lead(changes_against(losses, anchor)[best], anchor)}"
    behind = changes_against(losses, best).drop(columns=best)
    second = behind.mean().idxmin()
    if second != anchor:
        mean, half = _mean_over_images(behind[second])
        text += f"; next is {second}, {_percent(mean, half)} above it{_chance(mean, half)}"
    if lacking := [name for name in of_all if name not in losses]:
        text += f"; not ranked, for some of their losses are missing: {', '.join(lacking)}"
    if left := sorted({*of_all.index.unique("model")} - {*counted.index.unique("model")}):
        text += f"; not counted, for some method lacks them: {', '.join(left)}"
    return f"{text}."


def _wins(losses: pd.DataFrame, best: str) -> str:
    """With how many of several models the mean loss of a method is the lowest of all methods."""
    means = losses.groupby("model", sort=False).mean()
    count, wins = len(means), (means.idxmin(axis=1) == best).sum()
    if count == 1 or wins == 0:
        return "" if count == 1 else f" over {count} models"
    if wins == count:
        return " with both models" if count == 2 else f" with all {count} models"
    return f" with {wins} of {count} models"


def _lead(change: pd.Series, anchor: str) -> str:
    """The change against the anchor, and how often it is below 0."""
    mean, half = _mean_over_images(change)
    cases = "cases" if change.index.unique("model").size > 1 else "images"
    return (
        f"{_percent(abs(mean), half)} {'less' if mean <= 0 else 'more'} than {anchor}, lower in "
        f"{(change < 0).sum()} of {len(change)} {cases}{_chance(mean, half)}"
    )


def _mean_over_images(change: pd.Series) -> tuple[float, float]:
    """A mean of changes, and half its 95 % confidence interval; models are averaged first."""
    of_images = change.groupby("image").mean()
    return float(of_images.mean()), half_interval(list(of_images))


def _percent(mean: float, half: float) -> str:
    return f"{mean:.2f} %" if math.isnan(half) else f"{mean:.2f} ± {half:.2f} %"


def _chance(mean: float, half: float) -> str:
    """A warning, if 0 is in the interval."""
    return ", which may be chance" if abs(mean) <= half else ""


def _answer_at_target(images: pd.DataFrame, target: Target) -> str:
    """Which method has the best picture at the wanted rate, or the lowest rate for a quality."""
    refined = images[images["method"] != "base"]
    if target.kind != "bpp":
        at, ranked = "quality", {"bpp": "the lowest rate"}
    else:
        at, ranked = "rate", {"psnr": "the highest PSNR", "psnr_inside": "the highest inside maps"}
    found = [
        words for key, what in ranked.items()
        if key in refined and (words := _first_two(refined, key, what))
    ]  # fmt: skip
    return f"At the {at} of {target.in_words(target.wanted)}, {', and '.join(found)}." * bool(found)


def _first_two(images: pd.DataFrame, key: str, what: str) -> str:
    """The best and the second method by a column's mean; "" if there are no two."""
    # A picture without error has no finite PSNR.
    known = images.assign(psnr=images["psnr"].fillna(math.inf))
    means = by_method(known, key).dropna(axis=1).mean()
    means = means.sort_values(ascending=key == "bpp", kind="stable")
    if len(means) < 2:
        return ""
    form = "{:.4f} bpp" if key == "bpp" else "{:.2f} dB"
    first, second = (form.format(value) for value in means[:2])
    return f"{means.index[0]} has {what}, {first} (next is {means.index[1]}, {second})"
