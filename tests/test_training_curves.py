"""Curves of trainings that follow on one another."""

import json

import pytest
from PIL import Image

from reports.training_curves import chain_of, main


def row_of_crops(step, loss, speed):
    return {"kind": "train", "step": step, "loss": loss, "psnr": 30.0, "bpp": 0.5,
            "steps_per_second": speed}  # fmt: skip


def row_of_test(step, loss):
    return {"kind": "test", "step": step, "loss": loss, "psnr": 29.0, "bpp": 0.4}


FIRST = [row_of_crops(100, 9.0, 0.5), row_of_test(100, 8.0), row_of_crops(300, 5.0, 1.0)]
SECOND = [row_of_test(0, 4.0), row_of_crops(720, 3.0, 0.2), row_of_test(720, 2.0)]


def test_the_hours_of_a_chain_add_up():
    chain = chain_of("two", [FIRST, SECOND])
    seconds = [200, 200, 400, 400, 4000, 4000]
    assert [row["hours"] * 3600 for row in chain.rows] == pytest.approx(seconds)
    assert [end * 3600 for end in chain.ends] == pytest.approx([400, 4000])


def test_a_picture_of_two_chains(tmp_path, capsys):
    folder, file = tmp_path / "run", tmp_path / "second.jsonl"
    folder.mkdir()
    for path, rows in ((folder / "metrics.jsonl", FIRST), (file, SECOND)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "curves.png"
    chains = ["--chain", "short", str(folder), "--chain", "long", str(folder), str(file)]
    assert main([str(picture), *chains]) == 0
    assert capsys.readouterr().out.strip() == str(picture)
    with Image.open(picture) as image:
        assert image.size[0] > 2 * image.size[1]
        assert len(set(image.convert("RGB").getdata())) > 100


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["c.png", "--chain", "a", "missing"], "missing: has no rows of metrics"),
        (["c.png", "--chain", "a"], "--chain a: names no run"),
        (["c.gif", "--chain", "a", "missing"], "c.gif: must end in .png or .svg"),
    ],
)
def test_wrong_arguments_give_one_line(arguments, wrong, capsys):
    assert main(arguments) == 2
    assert wrong in capsys.readouterr().err
