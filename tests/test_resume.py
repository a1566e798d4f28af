"""What a run's folder holds: whole or made again, under names that fit, and writable or skipped."""

import json
import os
import resource
import signal

import pytest
import skimage
from PIL import Image

import common.records
import refinement.run
from common.records import append_record
from config import RefineConfig, load_config
from conftest import read_jsonl, to_x
from passes import problem_of, refined
from runs import NAMES, numbers, results, run

pytestmark = pytest.mark.usefixtures("without_run_plots")


def _emptied(path):
    path.write_bytes(b"")


def _cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _without_rows(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))


def _garbled(path):
    path.write_text(path.read_text().replace("0.", "x."))


def _removed(path):
    path.unlink()


# Of each kind of file all, three images at a time.
DAMAGES = {
    "trajectories/{}.csv": [_emptied, _without_rows, _garbled],
    "latents/{}.npz": [_emptied, _cut, _removed],
    "bitstreams/{}.olc": [_emptied, _cut, _removed],
    "reconstructions/{}/refined.png": [_emptied, _cut, _removed],
}


def test_what_is_not_whole_is_done_again(config_values, write_config, capsys):
    config_values["dev_options"]["save_final"] = True
    values = {"save_bitstreams": True, "tot_inference_iterations": 2, "eval_freq": 2}
    path = write_config(config_values | values)
    assert run(path) == 0
    folder = results(config_values)
    before = numbers(folder)
    for kind, damages in DAMAGES.items():
        files = [folder / kind.format(name) for name in NAMES]
        whole = [file.read_bytes() for file in files]
        for file, damage in zip(files, damages, strict=True):
            damage(file)
        capsys.readouterr()
        assert run(path, "resume=true") == 0
        said = capsys.readouterr().out
        for name in NAMES:
            assert f"{name}: its results are not whole; it is done again" in said, kind
        assert numbers(folder) == before
        if not kind.startswith("latents"):  # a zip holds the time
            assert [file.read_bytes() for file in files] == whole
    (folder / "trajectories" / f"{NAMES[1]}.csv").unlink()
    assert run(path, "resume=true") == 0
    assert "2 of 3 images are done already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ['{"name": "b_cof', "[1]", '{"name": "b_coffee.png"}', "\0\0\0", '{"base": 1}', None],
)
def test_a_line_that_is_no_record_is_no_matter(finished, write_config, capsys, line):
    """A kill tears the last line, a crash of the machine leaves zeros."""
    path = write_config(finished)
    folder = results(finished)
    before, records = numbers(folder), folder / "images.jsonl"
    lines = records.read_text().splitlines()
    if line is None:  # words for a number
        line = lines[2].replace('"psnr": ', '"psnr": "x", "was": ')
    records.write_text("\n".join([*lines[:2], line]))
    assert run(path, "resume=true") == 0
    assert "2 of 3 images are done already" in capsys.readouterr().out
    assert numbers(folder) == before


def test_records_are_added_line_by_line(config_values, write_config, monkeypatch):
    """Not written anew, all of them, for each image."""
    whole = []
    for module in (common.records, refinement.run):
        monkeypatch.setattr(module, "write_records", lambda path, records: whole.append(path))
    assert run(write_config(config_values)) == 0
    assert len(numbers(results(config_values))) == 3
    assert len(whole) == 0


@pytest.mark.usefixtures("with_run_plots")
def test_long_names_and_those_of_other_letters(config_values, write_config, photos, capsys):
    """83 Chinese characters are 253 bytes with .png: NAME.png.csv would be too long."""
    names = ["日" * 83 + ".png", "x" * 251 + ".png", "a\nb.png"]
    for old, new in zip(NAMES, names, strict=True):
        (photos / old).rename(photos / new)
    config_values["dev_options"]["save_final"] = True
    path = write_config(config_values | {"save_bitstreams": True})
    assert run(path) == 0
    folder = results(config_values)
    assert {record["name"] for record in numbers(folder)} == set(names)
    assert "a\\nb.png" in capsys.readouterr().out
    assert run(path, "resume=true") == 0
    assert "3 of 3 images are done already" in capsys.readouterr().out
    for kind in ("trajectories", "latents", "bitstreams", "reconstructions"):
        assert len(list((folder / kind).iterdir())) == 3


@pytest.fixture
def small_files():
    """A function that lets no file be longer: the kernel's own refusal, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


# A torn zip file says so once more when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("with_run_plots")
def test_an_image_whose_results_cannot_be_written_is_skipped(
    config_values, write_config, photos, capsys, small_files
):
    """The other two go on; resume does what is missing."""
    large = Image.open(photos / NAMES[0]).resize((700, 500))
    large.save(photos / NAMES[0])
    path = write_config(config_values | {"tot_inference_iterations": 2, "eval_freq": 2})
    small_files(6_000)  # between the latents of the small pictures and those of the large one
    code = run(path, "save_name=limited")
    small_files(resource.RLIM_INFINITY)
    said = capsys.readouterr()
    folder = results(config_values | {"save_name": "limited"})
    assert code == 2  # for the plots are too large too
    assert f"{NAMES[0]}: skipped: its results cannot be written: {folder}" in said.out
    assert "File too large" in said.out
    assert [record["name"] for record in numbers(folder)] == NAMES[1:]
    assert "Traceback" not in said.err + said.out
    assert not list(folder.rglob(".*"))
    assert run(path, "save_name=limited", "resume=true") == 0
    assert len(numbers(folder)) == 3


@pytest.mark.usefixtures("with_run_plots")
def test_a_full_disk_is_one_line(config_values, write_config, capsys, small_files):
    path = write_config(config_values)
    small_files(100)
    code = run(path)
    small_files(resource.RLIM_INFINITY)
    error = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(error) == 1
    assert f"{results(config_values)}/config.json: File too large" in error[0]


# --- what the first line says ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "scale_factor 1.4)"),
        (
            ("dev_options.improving_methods.sga_logits_3c=false",
             "dev_options.improving_methods.sga_logits=true",
             "dev_options.sga_logits_params.logits=ssl", "dev_options.scale_factor=1.4"),
            "(scale_factor 1.4 as the config says, not its own 1.33333)",
        ),
    ],
)  # fmt: skip
def test_the_first_line_says_what_the_config_overrides(
    config_values, write_config, capsys, overrides, said
):
    assert run(write_config(config_values), "images=1", *overrides) == 0
    assert said in capsys.readouterr().out.splitlines()[0]


def test_images_says_how_many(config_values, write_config, capsys):
    path = write_config(config_values)
    assert run(path, "images=2", "batch_size=2") == 0
    assert len(read_jsonl(results(config_values) / "images.jsonl")) == 2
    assert load_config(path, RefineConfig).image_count == 3
    assert load_config(path, RefineConfig, ["batch_size=2"]).image_count == 6


def test_what_a_folder_has_beside_images_is_said(config_values, write_config, photos, capsys):
    (photos / "notes.txt").write_text("no picture")
    (photos / "photo.nef").write_bytes(b"II*\0")
    assert run(write_config(config_values), "images=1") == 0
    out = capsys.readouterr().out
    assert out.count("passed over: ") == 1
    assert "1 no readable image (.txt)" in out and "1 camera raw (.nef)" in out


def test_a_home_is_a_home_everywhere(config_values, write_config, photos, tmp_path, monkeypatch):
    """Whichever path a user gives with ~: data, weights, results, the config itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(photos)
    config_values |= {"output_dir": "~/results", "tot_inference_iterations": 1, "eval_freq": 1}
    config_values["dev_options"]["path_test"]["folder"] = "~/photos"
    (tmp_path / "weights").symlink_to(config_values["pretrain"])
    config_values["pretrain"] = "~/weights"
    write_config(config_values)
    assert run("~/config.json", "images=1") == 0
    assert (tmp_path / "results/run/images.jsonl").is_file()
    assert not list(photos.glob("~*"))
    stored = json.loads((tmp_path / "results/run/config.json").read_text())
    assert stored["output_dir"] == str(tmp_path / "results")


def test_a_torn_line_takes_no_other_with_it(tmp_path, small_files):
    """A disk that was full for one record, and was not for the next."""
    path = tmp_path / "images.jsonl"
    append_record(path, {"name": "one"})
    small_files(path.stat().st_size + 5)
    with pytest.raises(OSError, match=r"File too large|No space"):
        append_record(path, {"name": "two"})
    small_files(resource.RLIM_INFINITY)
    append_record(path, {"name": "three"})
    assert [record["name"] for record in read_jsonl(path)] == ["one", "three"]


def test_a_folder_with_records_of_any_kind_is_not_begun_anew(finished, write_config, capsys):
    path = write_config(finished)
    records = results(finished) / "images.jsonl"
    records.write_text(records.read_text().replace("psnr_raw", "psnr_of_before"))
    before = records.read_bytes()
    assert run(path) == 2
    assert "holds the results of 0 images" in capsys.readouterr().err
    assert records.read_bytes() == before
    assert run(path, "resume=true") == 0
    assert "3 of its lines are no whole records, and dropped" in capsys.readouterr().out


@pytest.mark.usefixtures("with_run_plots")
def test_a_name_that_is_no_text_reaches_the_tracker(config_values, write_config, photos):
    (photos / NAMES[0]).rename(photos / os.fsdecode(b"caf\xe9.png"))
    path = write_config(config_values | {"tracker": "tensorboard"})
    assert run(path, "images=1", "tot_inference_iterations=1") == 0
    assert list((results(config_values) / "tensorboard").iterdir())


def test_crops_of_an_older_run_are_not_mixed_with_others(
    config_values, write_config, tmp_path, capsys
):
    """Before there was `crop_seed`, the seed of the noise placed the crops of pathology."""
    slides = tmp_path / "slides"
    slides.mkdir()
    Image.fromarray(skimage.data.immunohistochemistry()).save(slides / "s.tif")
    config_values["dev_options"] |= {
        "folder": False, "pathology": True, "path_test": {"pathology": str(slides)}
    }  # fmt: skip
    path = write_config(config_values | {"seed": 5, "image_size": 64})
    assert run(path, "tot_inference_iterations=1") == 0
    stored = results(config_values) / "config.json"
    values = json.loads(stored.read_text())
    del values["crop_seed"]
    stored.write_text(json.dumps(values))
    assert run(path, "tot_inference_iterations=1", "resume=true") == 2
    assert "crop_seed (5 then, 0 now)" in capsys.readouterr().err


def test_pictures_are_kept_only_where_they_are_wanted(model, config_values, write_config):
    x = to_x(skimage.data.coffee()[100:164, 200:264])
    for wanted, labels in (
        ("false", set()),
        ("true", {"base", "refined", "step_0001", "step_0008"}),
    ):
        config = load_config(
            write_config(config_values), RefineConfig, [f"dev_options.save_final={wanted}"]
        )
        (result,) = refined(problem_of(model, x), config, [0])
        assert result.reconstructions.keys() == labels
