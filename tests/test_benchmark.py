"""The benchmark's own turns: what each measures is what it says, and wrong input is one line."""

import json

import pytest
import skimage
import torch
from PIL import Image

import benchmark
from benchmark import main, summarise
from benchmarks.refinement_loops import plain_round
from benchmarks.variant import SCHEDULE
from experimental_inference_methods import build_rounding, gumbel_softmax, rounding_logits


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(skimage.data.coffee()[100:228, 200:328]).save(path)
    return str(path)


@pytest.mark.parametrize("variant", ["refine:plain", "refine:ours", "refine:floor"])
def test_a_turn_prints_its_figures(picture, capsys, variant):
    assert main(["measure", "--variant", variant, "--images", "2", "--image", picture]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["seconds"] > 0
    assert (row["N"], row["M"], row["size"]) == (64, 192, [128, 128])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure"], "--variant None: there are refine:plain, "),
        (["measure", "--variant", "refine:fast"], "--variant refine:fast"),
        (["measure", "--variant", "training:ours", "--image_size", "256"], "--image_size 256"),
        (["refine", "--rounds", "0"], "--rounds 0: must be above 0"),
    ],
)
def test_wrong_arguments_are_one_line(picture, capsys, arguments, message):
    assert main([*arguments, "--image", picture]) == 2
    assert message in capsys.readouterr().err


def test_odd_pictures_are_refused_for_the_plain_loop(tmp_path, capsys):
    path = tmp_path / "odd.png"
    Image.fromarray(skimage.data.coffee()[:100, :128]).save(path)
    assert main(["measure", "--variant", "refine:ours", "--image", str(path)]) == 2
    assert "128x100 pixels; the plain loop wants multiples of 64" in capsys.readouterr().err


def test_the_plain_loop_draws_from_the_same_distribution():
    """Mean and spread of its rounding and of the project's, at one value and temperature."""
    v = torch.full((100_000,), 0.3, dtype=torch.float64)
    torch.manual_seed(0)
    plain = plain_round(v, SCHEDULE(100))
    rounding = build_rounding("sga_logits_3c", "log_ssl_a_factor_pow", temperature=SCHEDULE)
    ours = rounding(v, SCHEDULE(100), torch.Generator().manual_seed(0))
    assert plain.mean().item() == pytest.approx(ours.mean().item(), abs=0.01)
    assert plain.std().item() == pytest.approx(ours.std().item(), rel=0.02)
    candidates, logits = rounding_logits(v[:1], "sga_logits_3c", "log_ssl_a_factor_pow")
    weights = gumbel_softmax(logits.movedim(-1, 0).expand(3, 100_000), SCHEDULE(100), None)
    expected = (weights * candidates[0][:, None]).sum(0).mean().item()
    assert plain.mean().item() == pytest.approx(expected, abs=0.01)


def test_medians_and_extremes_of_turns():
    rows = [{"seconds": s, "peak_mb": p, "N": 4} for s, p in ((3.5, 10), (1.0, 40), (2.0, 20))]
    got = summarise(rows)
    assert got == {"seconds": 2.0, "fastest": 1.0, "slowest": 3.5, "peak_mb": 20, "N": 4}


REFINED = [
    "plain", "plain, pages kept", "ours", "ours, bfloat16", "floor", "floor, bfloat16",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "loops", "ratios"),
    [
        (["refine"], REFINED, [1.5, 0.6, 0.5]),
        (["refine", "--compile"], [*REFINED, "compiled"], [1.5, 0.6, 0.5]),
        (["training"], ["plain", "plain, pages kept", "ours", "ours, bfloat16"], [3.0, 1.5]),
    ],
)  # fmt: skip
def test_all_loops_stand_beside_the_plain_ones(
    monkeypatch, tmp_path, capsys, arguments, loops, ratios
):
    """With turns of 1, 2, 3, ... seconds: which loops have turns, and how they compare."""

    def in_turns(kind, names, *_):
        assert (kind, list(names)) == (arguments[0], loops)
        turn = {"peak_mb": 5, "N": 8, "size": [64, 64]}
        return {name: summarise([turn | {"seconds": place}]) for place, name in enumerate(names, 1)}

    monkeypatch.setattr(benchmark, "in_turns", in_turns)
    path = tmp_path / "figures.json"
    assert main([*arguments, "--json", str(path)]) == 0
    settings = json.loads(path.read_text())[arguments[0]]
    assert [list(setting["variants"]) for setting in settings] == [loops] * len(settings)
    ours = [line for line in capsys.readouterr().out.splitlines() if " 3.000   (3.000, " in line]
    assert len(ours) == len(settings) > 1
    for line in ours:
        assert [float(word) for word in line.split()[-len(ratios) :]] == ratios
