"""Runs that adapt the decoder: records, files, commands, resumption, and what is refused."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from toys import toy

import codec
from architectures.directions import directions_beside, load_directions, save_directions
from coding.bitstream import read_bitstream
from coding.payload import KINDS, from_bytes, to_bytes
from compare import check_inputs, plan_runs
from config import CompareConfig, RefineConfig, load_config
from conftest import WEIGHTS, read_jsonl, values_of_refinement, write_photos
from datasets import open_images
from experimental_inference_methods import rounding_from_config
from models import load_checkpoint, save_weights
from objectives import Problem, objective_of
from pretraining import learn_directions
from reports.compared_run import ComparedRun
from reports.details import details_of
from runs import leave_out_plots, numbers, results, run
from train_flexible_inference import open_refiner, refine

NAMES = ["a_chelsea.png", "b_coffee.png"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a tiny model's weights, whose fits take no time."""
    return save_weights(tmp_path_factory.mktemp("weights") / "tiny.pth", toy("mbt2018-mean"), 0)


@pytest.fixture(scope="module")
def plain_once(weights, tmp_path_factory):
    """The JSON values of a finished run that tells nothing, and the path of its config."""
    return finished_run(tmp_path_factory.mktemp("plain"), weights, {})


@pytest.fixture(scope="module")
def directions(plain_once, tmp_path_factory):
    """A file of two directions, learnt from a run of the same photos."""
    path = tmp_path_factory.mktemp("directions") / "two.npz"
    arguments = [str(results(plain_once[0])), "-o", str(path), "--count", "2"]
    assert learn_directions.main(arguments) == 0
    return path


@pytest.fixture(scope="module")
def other_directions(directions, weights, tmp_path_factory):
    """Directions of the same weights, but not the same ones."""
    path = tmp_path_factory.mktemp("other") / "two.npz"
    found = load_directions(directions, load_checkpoint(str(weights)))
    save_directions(path, 2 * found.weight, found.bias, found.weights)
    return path


@pytest.fixture(scope="module")
def adapted_once(weights, directions, tmp_path_factory):
    """The JSON values of a finished run that tells all there is, and the path of its config."""
    adapt = {"lattice": 1.3, "directions": str(directions), "last_layer": True, "fits": 1}
    return finished_run(tmp_path_factory.mktemp("adapted"), weights, {"adapt": adapt})


def finished_run(folder, weights, changes):
    values = values_of_refinement(write_photos(folder / "photos"), folder / "results") | {
        "pretrain": str(weights), "tot_batches": 2, "polish_passes": 2, "save_bitstreams": True,
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(values | changes))
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        assert run(path) == 0
    return values, path


def records_of(values):
    return read_jsonl(results(values) / "images.jsonl")


def psnr_of(picture, name, values):
    """The PSNR of pixels [H, W, 3] to a photo of a run."""
    photo = Path(values["dev_options"]["path_test"]["folder"]) / name
    return skimage.metrics.peak_signal_noise_ratio(np.asarray(Image.open(photo)), picture)


def to_pixels(x_hat):
    """uint8 [H, W, 3] of x_hat [3, H, W]."""
    return (x_hat.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    return error


# --- what a run leaves behind ---------------------------------------------------------------------


def test_records_and_files_tell_the_same(adapted_once):
    values, _ = adapted_once
    for record in records_of(values):
        file = results(values) / "bitstreams" / f"{record['name']}.olc"
        bitstream, pixels = read_bitstream(file.read_bytes()), record["width"] * record["height"]
        assert bitstream.adaptation.hex() == record["told"]
        assert record["base"]["bpp_told"] == 0
        count = len(record["told"]) // 2
        in_file = count + (1 if count < 2**7 else 2)  # its length has 7 bits in each byte
        assert record["refined"]["bpp_told"] == pytest.approx(8 * in_file / pixels)
        parts = [record["refined"][f"bpp_{part}"] for part in ("y", "z", "told")]
        assert sum(parts) == pytest.approx(record["refined"]["bpp"])
        told = from_bytes(bitstream.adaptation)
        assert told.lattice == 6 and [KINDS[group.kind] for group in told.groups] == list(KINDS)
        assert told.directions.hex() == record["directions"]
    facts = json.loads((results(values) / "summary.json").read_text())
    assert facts["adapt"] == "lattice 1.297, 2 directions, last layer"
    log = (results(values) / "log.txt").read_text()
    assert "8 steps and 2 passes of polish, lattice 1.297, 2 directions, last layer, N = 12" in log
    assert f"{len(record['told']) // 2} bytes of adaptation" in log


def test_stock_layers_with_the_told_changes_decode_the_symbols(adapted_once, weights, directions):
    """The decoder once more: CompressAI's layers, plain sums, and no code of ours."""
    values, _ = adapted_once
    stock = load_checkpoint(str(weights)).network
    with np.load(directions) as arrays:
        of_weight, of_bias = (torch.from_numpy(arrays[key]).double() for key in ("weight", "bias"))
    for record in records_of(values):
        told = from_bytes(bytes.fromhex(record["told"]))
        network = copy.deepcopy(stock)
        last = network.g_s[-1]
        for group in told.groups:
            numbers_of = torch.tensor(group.values).double() * 2 ** ((group.step - 192) / 4)
            if KINDS[group.kind] == "directions":
                for k, factor in enumerate(numbers_of):
                    last.weight.data += (factor * of_weight[k]).float()
                    last.bias.data += (factor * of_bias[k]).float()
            else:
                last.weight.data.view(-1)[: len(numbers_of)] += numbers_of.float()
        with np.load(results(values) / "latents" / f"{record['name']}.npz") as saved:
            y, z = (torch.from_numpy(saved[latent])[None] for latent in ("y", "z"))
        medians = network.entropy_bottleneck.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
        with torch.no_grad():
            means = network.h_s(z + medians)[:, :, : y.size(2), : y.size(3)].chunk(2, 1)[1]
            x_hat = network.g_s(means + 2 ** (told.lattice / 16) * y)
        pixels = to_pixels(x_hat[0, :, : record["height"], : record["width"]])
        expected = record["refined"]["psnr"]
        assert psnr_of(pixels, record["name"], values) == pytest.approx(expected, abs=1e-3)


def test_details_show_the_adapted_picture(adapted_once):
    values, path = adapted_once
    config = load_config(path, RefineConfig)
    done = ComparedRun("adapted", "model", 0, results(values))
    _, base, refined = details_of([done], config, open_images(config), NAMES[0])
    record = records_of(values)[0]
    for side, detail in (("base", base), ("refined", refined)):
        psnr = psnr_of(to_pixels(detail.x), NAMES[0], values)
        assert psnr == pytest.approx(record[side]["psnr"], abs=1e-3)
        bpp_y = detail.bits.sum().item() / (record["width"] * record["height"])
        assert bpp_y == pytest.approx(record[side]["bpp_y"], rel=1e-4)


def test_details_without_their_directions_are_left_out(
    adapted_once, directions, other_directions, capsys
):
    values, path = adapted_once
    config, right = load_config(path, RefineConfig), directions.read_bytes()
    done = ComparedRun("adapted", "model", 0, results(values))
    try:
        directions.unlink()
        assert details_of([done], config, open_images(config), NAMES[0]) is None
        shutil.copy(other_directions, directions)
        assert details_of([done], config, open_images(config), NAMES[0]) is None
    finally:
        directions.write_bytes(right)
    missing, others = capsys.readouterr().out.splitlines()
    assert missing.startswith(f"{NAMES[0]}: no pictures: directions {directions}: no such file; ")
    assert others.startswith(f"{NAMES[0]}: no pictures: made with other directions (")


def test_a_plain_run_tells_nothing(plain_once):
    folder = results(plain_once[0])
    for record in records_of(plain_once[0]):
        assert not record.keys() & {"told", "directions", "adapt"}
        assert not {"bpp_told"} & (record["base"].keys() | record["refined"].keys())
    assert not json.loads((folder / "summary.json").read_text()).keys() & {"adapt", "directions"}
    assert "told" not in (folder / "trajectories" / f"{NAMES[0]}.csv").read_text()


def test_directions_are_learnt_on_the_lattice_of_the_run(
    adapted_once, weights, tmp_path, monkeypatch
):
    """The error of the plain decoder at the symbols' own y_hat is that of CompressAI's layers."""
    values, _ = adapted_once
    errors = []

    def remember(photos, error, pixels, add=learn_directions.Photos.add):
        errors.append(error.error)
        add(photos, error, pixels)

    monkeypatch.setattr("pretraining.learn_directions.Photos.add", remember)
    arguments = [str(results(values)), "-o", str(tmp_path / "one.npz"), "--count", "1"]
    assert learn_directions.main(arguments) == 0
    network, record = load_checkpoint(str(weights)).network, records_of(values)[1]
    with np.load(results(values) / "latents" / f"{NAMES[1]}.npz") as saved:
        y, z = (torch.from_numpy(saved[latent])[None] for latent in ("y", "z"))
    medians = network.entropy_bottleneck.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
    with torch.no_grad():
        x_hat = network.g_s(network.h_s(z + medians).chunk(2, 1)[1] + 2 ** (6 / 16) * y)
    photo = Path(values["dev_options"]["path_test"]["folder"]) / NAMES[1]
    x = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)[None] / 255
    assert x.shape[2:] == (record["height"], record["width"]) == x_hat.shape[2:]
    assert errors[1] == pytest.approx((x - x_hat).square().sum().item(), rel=1e-4)


# --- the codec ------------------------------------------------------------------------------------


def test_decompress_and_info(adapted_once, weights, directions, tmp_path, capsys):
    values, _ = adapted_once
    coded = results(values) / "bitstreams"
    arguments = ["--checkpoint", str(weights), "-o", str(tmp_path), "--directions"]
    assert codec.main(["decompress", str(coded), *arguments, str(directions)]) == 0
    capsys.readouterr()
    for record in records_of(values):
        picture = np.asarray(Image.open(tmp_path / record["name"]))
        psnr = psnr_of(picture, record["name"], values)
        assert psnr == pytest.approx(record["refined"]["psnr"], abs=1e-3)
        file = coded / f"{record['name']}.olc"
        assert codec.main(["info", str(file)]) == 0
        *_, parts, words = capsys.readouterr().out.splitlines()
        total, told = file.stat().st_size, len(record["told"]) // 2
        assert parts.startswith(f"  {total} bytes: header ")
        assert parts.endswith(f", adaptation {told}")
        summands = parts.partition("header")[2].replace("+", " ").replace(",", " ").split()
        assert sum(int(word) for word in summands if word.isdigit()) == total
        counts = [0, 0]
        for group in from_bytes(bytes.fromhex(record["told"])).groups:
            counts[group.kind] = np.count_nonzero(group.values)
        assert words == (f"  adaptation: lattice 1.2968, {counts[0]} factors of directions, "
                         f"{counts[1]} weights of the last layer")  # fmt: skip


def test_files_need_their_directions_and_plain_files_none(
    adapted_once, plain_once, weights, other_directions, tmp_path, capsys
):
    file, plain = (results(values) / "bitstreams" / f"{NAMES[0]}.olc"
                   for values, _ in (adapted_once, plain_once))  # fmt: skip
    arguments = ["--checkpoint", str(weights), "-o", str(tmp_path / "decoded")]
    assert codec.main(["decompress", str(file), *arguments]) == 2
    beside = weights.with_name("tiny.directions.npz")
    assert directions_beside(str(weights)) == beside
    assert one_line(capsys) == (
        f"error: {file}: directions {beside}: no such file; "
        "give the file that the encoder had with --directions\n"
    )
    other = ["--directions", str(other_directions)]
    assert codec.main(["decompress", str(file), *arguments, *other]) == 2
    assert f"{file}: made with other directions (" in one_line(capsys)
    broken = tmp_path / "broken.npz"
    broken.write_text("no directions")
    arguments += ["--directions", str(broken)]
    assert codec.main(["decompress", str(file), *arguments]) == 2
    assert "no file of directions" in one_line(capsys)
    assert codec.main(["decompress", str(plain), *arguments]) == 0


def test_directions_beside_the_weights_are_found(
    adapted_once, weights, directions, tmp_path, capsys
):
    own = shutil.copy(weights, tmp_path)
    shutil.copy(directions, directions_beside(own))
    coded = results(adapted_once[0]) / "bitstreams"
    assert codec.main(["decompress", str(coded), "--checkpoint", own, "-o", str(tmp_path)]) == 0


def test_a_recipe_with_adapt_makes_the_files_of_the_run(adapted_once, weights, tmp_path, capsys):
    values, path = adapted_once
    photo = Path(values["dev_options"]["path_test"]["folder"]) / NAMES[0]
    arguments = ["--checkpoint", str(weights), "-o", str(tmp_path), "--refine", str(path)]
    assert codec.main(["compress", str(photo), *arguments]) == 0
    file = results(values) / "bitstreams" / f"{NAMES[0]}.olc"
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    said, row = capsys.readouterr().out.splitlines()[::2]
    assert said.endswith("float32, lattice 1.297, 2 directions, last layer")
    assert float(row.split()[4]) == pytest.approx(records_of(values)[0]["refined"]["bpp"], abs=1e-4)


def test_refusals_of_a_key_name_the_recipe(plain_once, tmp_path, capsys):
    weights = save_weights(tmp_path / "cheng.pth", toy("cheng2020-anchor"), 0)
    arguments = ["--checkpoint", str(weights), "-o", str(tmp_path / "coded")]
    arguments += ["--refine", "adapt", "--lmbda", "0.01"]
    photos = plain_once[0]["dev_options"]["path_test"]["folder"]
    assert codec.main(["compress", photos, *arguments]) == 2
    assert one_line(capsys).startswith(
        "error: --refine adapt: adapt.directions: the decoder of cheng2020-anchor does not end with"
    )


def test_compress_says_that_refinement_stopped(plain_once, weights, tmp_path, capsys):
    values, _ = plain_once
    changed = {"tot_batches": 1, "polish_passes": 0, "optimizer": {"name": "sgd", "lr": 1e30}}
    recipe, photos = tmp_path / "astray.json", values["dev_options"]["path_test"]["folder"]
    recipe.write_text(json.dumps(values | changed))
    arguments = ["--checkpoint", str(weights), "-o", str(tmp_path), "--refine", str(recipe)]
    assert codec.main(["compress", str(Path(photos) / NAMES[0]), *arguments]) == 0
    stopped = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert len(stopped) == 1
    assert stopped[0].startswith(f"{NAMES[0]}: stopped, the loss is not finite at step ")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--refine", "adapt", "--directions", "gone.npz"],
            "error: directions gone.npz: no such file; give it with --directions, or learn it with "
            "python -m pretraining.learn_directions\n",
        ),
        (["--refine", "fast", "--directions", "gone.npz"], "fast does not adapt the decoder; try"),
        (["--directions", "gone.npz"], "only refinement adapts the decoder: add --refine adapt"),
        (["--refine", "other"], "no such recipe; fast, best, adapt, ms_ssim, or a config's path"),
    ],
)
def test_what_compress_refuses(photos, tmp_path, capsys, options, reason):
    arguments = ["--checkpoint", str(WEIGHTS), "-o", str(tmp_path / "coded"), *options]
    assert codec.main(["compress", str(photos), *arguments]) == 2
    assert reason in one_line(capsys)
    assert not (tmp_path / "coded").exists()


# --- resumption -----------------------------------------------------------------------------------


def test_resumption_needs_the_same_directions(
    adapted_once, directions, other_directions, tmp_path, capsys, monkeypatch
):
    leave_out_plots(monkeypatch)
    values, path = adapted_once
    shutil.copytree(results(values), tmp_path / "run")
    overrides, right = [f"output_dir={tmp_path}", "resume=true"], directions.read_bytes()
    shutil.copy(other_directions, directions)
    assert run(path, *overrides) == 2
    assert "cannot resume, its results were made with other directions (" in one_line(capsys)
    directions.write_bytes(right)
    assert run(path, *overrides) == 0
    assert "2 of 2 images are done already" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["killed", "damaged"])
def test_an_image_that_is_done_again_has_the_same_numbers(
    adapted_once, tmp_path, capsys, monkeypatch, loss
):
    leave_out_plots(monkeypatch)
    values, path = adapted_once
    folder = shutil.copytree(results(values), tmp_path / "run")
    first, second = (folder / "images.jsonl").read_text().splitlines(keepends=True)
    left = first if loss == "killed" else first + second.replace('"told": "', '"told": "ff')
    (folder / "images.jsonl").write_text(left)
    assert run(path, f"output_dir={tmp_path}", "resume=true") == 0
    assert "1 of 2 images are done already" in capsys.readouterr().out
    assert numbers(folder) == numbers(results(values))


def test_a_descent_that_goes_astray_is_not_fitted(
    config_values, write_config, weights, capsys, monkeypatch
):
    """The fit is due before the next evaluation would stop the descent."""
    leave_out_plots(monkeypatch)
    values = config_values | {
        "pretrain": str(weights), "tot_batches": 1, "eval_freq": 8,
        "optimizer": {"name": "sgd", "lr": 1e30}, "adapt": {"last_layer": True, "fits": 1},
    }  # fmt: skip
    assert run(write_config(values)) == 0
    assert "stopped, the loss is not finite at step 8; kept step 0" in capsys.readouterr().out


def test_a_graph_is_recorded_anew_for_another_decoder(adapted_once, weights, monkeypatch):
    """At the start, for the lattice, and for the one fit; an old graph repeats the old decoder."""
    config = load_config(adapted_once[1], RefineConfig)
    rounding, cpu = rounding_from_config(config), torch.device("cpu")
    model = open_refiner(load_checkpoint(str(weights)), rounding, config, cpu).model
    image = open_images(config)[0]
    problem = Problem(model, image.pixels()[None], objective_of(config, config.lmbda))
    recorded = []

    def graphed(function, noise):
        recorded.append(function)
        return function

    monkeypatch.setattr("train_flexible_inference.graphed", graphed)
    config = config.model_copy(update={"cuda_graphs": True})
    (trajectory,) = refine(problem, rounding, config, [image.name], lambda *_: None)
    assert len(recorded) == 3
    assert to_bytes(trajectory.told).hex() == records_of(adapted_once[0])[0]["told"]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["adapt.directions=auto", "objective=ms-ssim", "dev_options.inference_lambda=8"],
         'adapt.directions: fits are for the objective "mse"; with "ms-ssim" set adapt.directions'),
        (["adapt.last_layer=true", "objective=ms-ssim", "dev_options.inference_lambda=8"],
         'adapt.last_layer: fits are for the objective "mse"'),
        (["adapt.last_layer=true", "pretrain=cheng2020-anchor"],
         "adapt.last_layer: the decoder of cheng2020-anchor does not end with a deconv"),
        (["adapt.lattice=1.2", "pretrain=bmshj2018-factorized"],
         "adapt.lattice: bmshj2018-factorized has no scales, so its lattice cannot be coarser"),
        (["adapt.lattice=1000"], "adapt.lattice = 1000.0: a step of 1000: from 0.00390625 to 245"),
        (["adapt.directions=gone.npz"], "directions gone.npz: no such file; python -m pretraining"),
        (["adapt.directions=DIRECTIONS", "tot_batches=1"], "npz: for weights "),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_before_there_is_a_folder(
    config_values, write_config, directions, tmp_path, capsys, changes, reason
):
    path, overrides = write_config(config_values), []
    for change in changes:
        key, _, value = change.partition("=")
        if value in ("cheng2020-anchor", "bmshj2018-factorized"):
            save_weights(tmp_path / value, toy(value), 0)
            value = tmp_path / value
        overrides.append(f"{key}={directions if value == 'DIRECTIONS' else value}")
    assert run(path, *overrides) == 2
    assert reason in one_line(capsys)
    assert not results(config_values).exists()


def test_a_comparison_refuses_it_before_its_first_run(config_values, write_config, photos):
    method = {"config": str(write_config(config_values))}
    values = {
        "save_name": "two", "data_set": "folder", "path": str(photos),
        "methods": {"plain": method, "adapted": {**method, "set": {"adapt.directions": "gone"}}},
        "models": [{"train_lambda": 0.01, "pretrain": str(WEIGHTS)}],
    }  # fmt: skip
    config = load_config(write_config(values, "compare.json"), CompareConfig)
    runs = plan_runs(config)
    assert [one.config.adapt is not None for one in runs] == [False, True]
    with pytest.raises(Exception, match=r"^methods.adapted with .*: directions gone: no such file"):
        check_inputs(config, runs)
