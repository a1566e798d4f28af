"""The sentence that a comparison's page begins with, against numbers made by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from config import CompareConfig, Target
from reports.answer import answer
from reports.comparison_tables import method_table
from reports.page_data import change_data
from reports.page_tables import Cells, html_table

MODELS = ("lambda 0.01", "lambda 0.02")
# The loss of each image, for both models.
LOSSES = {"base": [1.0, 2.0, 4.0], "slow": [0.9, 1.9, 3.7], "quick": [0.8, 1.7, 3.4]}


def config_with(anchor):
    """A comparison of the methods of LOSSES."""
    return CompareConfig.model_validate({
        "save_name": "a", "anchor": anchor, "models": [{"train_lambda": 1, "pretrain": "x"}],
        "methods": {name: {"config": "x"} for name in LOSSES if name != "base"},
    })  # fmt: skip


def images_of(losses, models=MODELS[:1], objective="mse"):
    """A table of `rows_of_shared_images`; the second model's losses are twice the first one's."""
    return pd.DataFrame([
        {"method": method, "model": model, "image": f"{image}.png", "seed": 0,
         "objective": objective, "true_loss": (number + 1) * loss, "bpp": loss, "psnr": 30 + loss}
        for number, model in enumerate(models)
        for method, of_method in losses.items() for image, loss in enumerate(of_method)
    ])  # fmt: skip


def percent(first, second):
    """The mean change of the first losses against the second, and Student's half interval."""
    change = 100 * (np.divide(LOSSES[first], LOSSES[second]) - 1)
    low, high = stats.ttest_1samp(change, 0).confidence_interval(0.95)
    return f"{abs(change.mean()):.2f} ± {(high - low) / 2:.2f} %"


@pytest.mark.parametrize(
    ("models", "words", "cases"),
    [(MODELS[:1], "", "3 of 3 images"), (MODELS, " with both models", "6 of 6 cases")],
)
def test_the_best_its_lead_and_the_next(models, words, cases):
    assert answer(images_of(LOSSES, models), config_with("base")) == (
        f"quick has the lowest loss{words}: {percent('quick', 'base')} less than base, lower in "
        f"{cases}; next is slow, {percent('slow', 'quick')} above it."
    )
    # The next one is the anchor: it has been named.
    assert answer(images_of(LOSSES, models), config_with("slow")) == (
        f"quick has the lowest loss{words}: {percent('quick', 'slow')} less than slow, lower in "
        f"{cases}."
    )


def test_a_model_that_a_method_lacks_is_not_counted_but_named():
    images = images_of(LOSSES | {"partial": [0.1, 0.2, 0.4]}, MODELS)
    images = images[(images["method"] != "partial") | (images["model"] == MODELS[0])]
    text = answer(images, config_with("base"))
    assert text.startswith(
        "partial has the lowest loss: 90.00 ± 0.00 % less than base, lower in 3 of 3"
    )
    assert text.endswith(" above it; not counted, for some method lacks them: lambda 0.02.")


def test_without_a_model_that_all_have_methods_with_all_models_are_ranked():
    images = images_of(LOSSES | {"one": [0.1, 0.1, 0.1], "other": [0.1, 0.1, 0.1]}, MODELS)
    lacks = {"one": MODELS[1], "other": MODELS[0]}
    images = images[
        [lacks.get(m) != model for m, model in zip(images["method"], images["model"], strict=True)]
    ]
    text = answer(images, config_with("base"))
    assert text.startswith("quick has the lowest loss over 2 models: ")
    assert text.endswith(" above it; not ranked, for some of their losses are missing: one, other.")


def test_two_images_have_no_interval():
    images = images_of({name: losses[:2] for name, losses in LOSSES.items()})
    text = answer(images, config_with("base"))
    assert text.startswith(
        "quick has the lowest loss: 17.50 % less than base, lower in 2 of 2 images; "
    )
    assert "±" not in text and "chance" not in text


def test_an_image_without_a_loss_is_in_no_change():
    """Its loss is missing on one side only: means over different images would mislead."""
    images = images_of({"base": [1.0, 2.0, 4.0], "quick": [0.5, 1.0, math.nan]})
    table = method_table(images, config_with("base")).set_index("method")
    for key in ("change_percent", "change_of_mean_percent"):
        assert table.loc["quick", key] == pytest.approx(-50)


def test_the_next_is_never_below_the_best():
    """One image where the second is far better does not turn the order of the means."""
    losses = {"base": [1.0, 1.0, 1.0], "slow": [0.3, 1.1, 1.1], "quick": [0.7, 0.72, 0.71]}
    text = answer(images_of(losses), config_with("base"))
    assert text.startswith("quick has the lowest loss: 29.00 ± ")
    assert "; next is slow, 16.85 ± " in text and text.endswith(" above it, which may be chance.")


def test_the_anchor_may_be_the_best():
    text = answer(images_of(LOSSES), config_with("quick"))
    assert text == (
        f"quick has the lowest loss; next is slow, {percent('slow', 'quick')} above it."
    )


def test_a_lead_within_chance_is_no_lead():
    close = LOSSES | {"slow": [0.79, 1.72, 3.42]}
    text = answer(images_of(close), config_with("base"))
    assert text.endswith("; next is slow, 0.17 ± 3.14 % above it, which may be chance.")
    one = {name: losses[:1] for name, losses in LOSSES.items()}
    assert answer(images_of(one), config_with("base")) == (
        "quick has the lowest loss: 20.00 % less than base, lower in 1 of 1 images; next is slow, "
        "12.50 % above it."
    )


def test_each_objective_has_a_sentence():
    similar = images_of({"base": [1.0] * 3, "similar": [0.5, 0.6, 0.55]}, objective="ms-ssim")
    text = answer(pd.concat([images_of(LOSSES), similar]), config_with("base"))
    assert text.startswith("quick has the lowest loss: ")
    assert "similar has the lowest loss for ms-ssim: 45.00 ± 12.42 % less than base" in text
    # Without the anchor's loss there is no lead to tell.
    assert answer(similar, config_with("quick")) == (
        "similar has the lowest loss for ms-ssim; next is base, 82.83 ± 41.46 % above it."
    )
    assert answer(similar[similar["method"] == "base"], config_with("base")) == ""


def test_a_target_is_met_by_all():
    images = images_of({name: LOSSES[name] for name in ("base", "slow", "quick")})
    images["true_loss"] = math.nan
    assert answer(images, config_with("base"), Target("bpp", 0.4)) == (
        "At the rate of 0.4000 bpp, slow has the highest PSNR, 32.17 dB (next is quick, 31.97 dB)."
    )
    assert answer(images, config_with("base"), Target("psnr", 32)) == (
        "At the quality of 32.00 dB, quick has the lowest rate, 1.9667 bpp (next is slow, "
        "2.1667 bpp)."
    )
    images["psnr_inside"] = images["psnr"].where(images["method"] == "slow", 40)
    text = answer(images, config_with("base"), Target("bpp", 0.4))
    assert text.endswith(
        ", and quick has the highest inside maps, 40.00 dB (next is slow, 32.17 dB)."
    )
    exact = images.assign(psnr=images["psnr"].where(images["method"] != "quick"))
    assert "quick has the highest PSNR, inf dB (next is slow, 32.17 dB)" in answer(
        exact, config_with("base"), Target("bpp", 0.4)
    )
    alone = images[images["method"] != "quick"]
    assert answer(alone, config_with("base"), Target("bpp", 0.4)) == ""


def test_changes_of_images_are_against_the_anchor():
    images = images_of(LOSSES)
    table = pd.DataFrame([
        {"model": MODELS[0], "objective": "mse", "method": "quick", "change_percent": -5.0,
         "half_interval": 1.0}
    ])  # fmt: skip
    (found,) = change_data(table, images, "slow")
    expected = 100 * (np.divide(LOSSES["quick"], LOSSES["slow"]) - 1)
    assert list(found["images"].values()) == pytest.approx(list(expected))
    assert (found["mean"], found["half"]) == (-5.0, 1.0)
    assert change_data(table, images, "missing") == []


def test_tables_leave_out_what_says_nothing():
    heads = ["model", "method", "images", "bpp", "empty"]
    rows = [
        ["m 1", "a<b", "6", "0.1", ""],
        ["m 2", "c", "6", "0.2", ""],
        ["m 1", "d", "6", "1", ""],
    ]
    table, common = html_table(Cells(heads, rows, frozenset({1}), frozenset({"bpp"})))
    assert common == "Wherever known: images 6."
    assert "empty" not in table and ">images<" not in table
    assert table.count("<tbody>") == 2  # for each model, also if its rows are apart
    first, second = table.split("<tbody>")[1:]
    assert "m 1" in first and "a&lt;b" in first and ">d<" in first
    assert '<tr class="best"><td>c</td><td class="minor">0.2</td></tr>' in second
