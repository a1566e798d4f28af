"""The result of a comparison in a sentence or two: which method is best, and by how much."""

from collections.abc import Sequence

import pandas as pd

from config import CompareConfig, Target
from reports.comparison_tables import half_interval


def answer(images: pd.DataFrame, config: CompareConfig, target: Target | None = None) -> str:
    """One sentence for each objective, or for the target: the best method, its lead, the next one.

    Methods are ranked by the mean over models and images of the loss, relative to the anchor's.
    With a target there are no losses: then the rate counts at equal quality, and PSNR at equal
    rate.

    Args:
        images: the table of `rows_of_shared_images`.
        target: what all methods aim at, if anything.
    """
    if target is not None:
        return _answer_at_target(images, target)
    sentences = []
    for objective, own in images.dropna(subset=["true_loss"]).groupby("objective", sort=False):
        counted = own.rename(columns={"true_loss": "value"})
        what = "the lowest loss" if objective == "mse" else f"the lowest loss for {objective}"
        sentences.append(_answer_of_loss(_by_method(counted), what, config.anchor))
    return " ".join(filter(None, sentences))


def _by_method(images: pd.DataFrame) -> pd.DataFrame:
    """A row for each model and image, a column for each method that has them all; seeds averaged.

    Args:
        images: the columns model, image, method and value.
    """
    return images.pivot_table("value", ["model", "image"], "method", sort=False).dropna(axis=1)


def _answer_of_loss(losses: pd.DataFrame, what: str, anchor: str) -> str:
    """Which column is lowest, by how much less than the anchor, and how far the next one is."""
    if losses.shape[1] < 2:
        return ""
    known = losses if anchor not in losses else losses.div(losses[anchor], axis=0)
    best, second = known.mean().sort_values(kind="stable").index[:2]
    models = losses.index.unique("model")
    lowest = losses.groupby("model", sort=False).mean().idxmin(axis=1)
    wins = [model for model in models if lowest[model] == best]
    text = f"{best} has {what}"
    if len(models) > 1:
        with_all = len(wins) == len(models)
        text += f" with {'all' if with_all else f'{len(wins)} of'} {len(models)} models"
    if anchor in losses and anchor != best:
        change = 100 * (losses[best] / losses[anchor] - 1)
        better = (change.groupby("image").mean() < 0).sum()
        text += (
            f": {_less(change)} than {anchor}, lower on {better} of "
            f"{losses.index.unique('image').size} images"
        )
    if second != anchor:
        text += f"; {_next(100 * (losses[second] / losses[best] - 1), second)}"
    return f"{text}."


def _less(change: pd.Series) -> str:
    """A mean change in percent, with its interval over images, as `1.20 ± 0.30 % less`."""
    mean, half = _mean_over_images(change)
    interval = "" if pd.isna(half) else f" ± {half:.2f}"
    return f"{abs(mean):.2f}{interval} % {'less' if mean <= 0 else 'more'}"


def _next(change: pd.Series, name: str) -> str:
    """How far the second method is behind, and whether that is more than chance."""
    mean, half = _mean_over_images(change)
    if pd.isna(half):
        return f"next is {name}, {mean:.2f} % above it"
    chance = ", which may be chance" if abs(mean) <= half else ""
    return f"next is {name}, {mean:.2f} ± {half:.2f} % above it{chance}"


def _mean_over_images(change: pd.Series) -> tuple[float, float]:
    """The mean of changes, and half its 95 % confidence interval; models are averaged first."""
    of_images: Sequence[float] = list(change.groupby("image").mean())
    return float(change.groupby("image").mean().mean()), half_interval(of_images)


def _answer_at_target(images: pd.DataFrame, target: Target) -> str:
    """Which method has the best picture at the wanted rate, or the smallest file for a quality."""
    refined = images[images["method"] != "base"]
    if target.kind != "bpp":
        at, ranked = "quality", {"bpp": "the smallest files"}
    else:
        at, ranked = "rate", {"psnr": "the highest PSNR", "psnr_inside": "the highest inside maps"}
    found = [
        words for key, what in ranked.items()
        if key in refined and (words := _first_two(refined, key, what))
    ]  # fmt: skip
    return f"At the {at} of {target.in_words(target.wanted)}, {', and '.join(found)}." * bool(found)


def _first_two(images: pd.DataFrame, key: str, what: str) -> str:
    """The best and the second method by a column's mean; "" if there are no two."""
    means = _by_method(images.rename(columns={key: "value"})).mean()
    means = means.sort_values(ascending=key == "bpp", kind="stable")
    if len(means) < 2:
        return ""
    first, second = (
        f"{value:.4f} bpp" if key == "bpp" else f"{value:.2f} dB" for value in means[:2]
    )
    return f"{means.index[0]} has {what}, {first} (next is {means.index[1]}, {second})"
