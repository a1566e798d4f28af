"""Directions of the last layer: learnt from photos, stored beside the weights, and the command."""

import copy
import json

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from toys import toy

from adaptation.learn import RIDGE, Photos
from adaptation.least_squares import Quadratic, quadratic_of
from architectures.directions import (
    Directions,
    directions_beside,
    load_directions,
    save_directions,
    use_directions,
)
from common.errors import InputError
from conftest import to_x
from models import freeze, save_checkpoint
from objectives import Problem, RateDistortion

FAMILY, C, SIZE = "mbt2018-mean", 12, (80, 96)  # C: channels of a toy's last layer
X = to_x(skimage.data.coffee()[100:180, 200:296])


def some_directions():
    """Five random directions of a toy."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, C, 3, 5, 5), (5, 3)
    return Directions(*(torch.randn(v, generator=generator) / 8 for v in shapes), "", b"")


# --- learning -------------------------------------------------------------------------------------


def spd(generator, size):
    """A symmetric matrix with all sorts of positive curvatures."""
    root = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
    root *= torch.rand(size, 1, generator=generator, dtype=torch.float64) + 0.1
    return root @ root.T


@pytest.fixture
def learnt():
    """Photos of all sizes, their slopes for each pixel, those that span them, the mean metric."""
    generator = torch.Generator().manual_seed(0)
    size, photos, own = 51, Photos(), []
    slopes = torch.randn(3, size, 3, generator=generator, dtype=torch.float64)
    grams = [spd(generator, size) for _ in range(20)]
    for index, gram in enumerate(grams):
        factors = torch.randn(3, generator=generator, dtype=torch.float64)
        own.append(torch.einsum("k,kpc->pc", factors, slopes))
        pixels = 100 * (1 + index % 5) ** 3
        photos.add(Quadratic(1.0, pixels * own[-1], pixels * gram), pixels)
    mean = torch.stack(grams).mean(0)
    return photos, own, slopes, mean + RIDGE * torch.diag(mean.diagonal())


def test_directions_span_the_newton_steps_of_photos(learnt):
    photos, _, slopes, metric = learnt
    directions = photos.directions(3)
    assert directions.shape == (3, 51, 3)
    steps = np.linalg.solve(metric.numpy(), slopes.transpose(0, 1).flatten(1).numpy())
    steps = steps.reshape(51, 3, 3).transpose(1, 0, 2).reshape(3, -1)  # [step, P * 3]
    basis = directions.flatten(1).numpy()
    factors = np.linalg.lstsq(basis.T, steps.T, rcond=None)[0]
    np.testing.assert_allclose(basis.T @ factors, steps.T, rtol=0, atol=1e-9 * abs(steps).max())


@pytest.mark.parametrize("count", [2, 3])
def test_directions_are_orthonormal_in_the_mean_metric(learnt, count):
    photos, _, _, metric = learnt
    directions = photos.directions(count)
    products = torch.einsum("kpc,pq,lqc->kl", directions, metric, directions)
    torch.testing.assert_close(products, torch.eye(count).double(), rtol=0, atol=1e-10)


def test_the_first_direction_saves_most(learnt):
    """Among all directions: the sum over photos of what a step along it saves, by its error."""
    photos, own, slopes, metric = learnt
    directions = photos.directions(3)

    def saved(direction):
        length = torch.einsum("pc,pq,qc->", direction, metric, direction)
        total = 0.0
        for slope in own:
            whole = (slope * torch.linalg.solve(metric, slope)).sum().sqrt()
            total += (direction * slope).sum() ** 2 / length / whole
        return total.item()

    by_use = [saved(direction) for direction in directions]
    assert by_use == sorted(by_use, reverse=True)
    generator = torch.Generator().manual_seed(1)
    steps = torch.linalg.solve(metric, slopes)
    for _ in range(20):
        factors = torch.randn(3, generator=generator, dtype=torch.float64)
        assert saved(torch.einsum("k,kpc->pc", factors, steps)) <= by_use[0] * (1 + 1e-9)


def test_a_photo_without_an_error_teaches_nothing(learnt):
    photos, _, _, metric = learnt
    photos.add(Quadratic(0.0, torch.zeros(51, 3).double(), metric), 1)
    assert photos.directions(3).isfinite().all()


def test_no_photo_teaches_no_direction():
    with pytest.raises(ValueError, match="no photo was added"):
        Photos().directions(3)


def test_a_factor_of_1_changes_the_mean_squared_error_of_a_photo_by_1():
    model, photos = toy(FAMILY), Photos()
    y_hat = model.round(model.analyze(X), torch.round, SIZE).y_hat
    photos.add(quadratic_of(Problem(model, X, RateDistortion(0.01)), y_hat), SIZE[0] * SIZE[1])
    (direction,) = photos.directions(5)
    weight = direction[:-1].reshape(C, 5, 5, 3).permute(0, 3, 1, 2)
    g_s = copy.deepcopy(model.network.g_s).double()
    with torch.no_grad():
        before = g_s(y_hat.double())
        g_s[-1].weight += weight
        g_s[-1].bias += direction[-1]
        change = (g_s(y_hat.double()) - before).square().mean((0, 2, 3)).sum().item()
    assert change == pytest.approx(1, rel=0.01)


# --- files of directions --------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """A file of directions of a toy."""
    path, directions = tmp_path / "a.directions.npz", some_directions()
    save_directions(path, directions.weight, directions.bias, toy(FAMILY).weights_hash)
    return path


def test_directions_are_read_as_written(stored):
    directions, model = some_directions(), toy(FAMILY)
    loaded = load_directions(stored, model)
    assert torch.equal(loaded.weight, directions.weight.half().float())
    assert torch.equal(loaded.bias, directions.bias.half().float())
    assert loaded.weights == model.weights_hash
    assert len(loaded.mark) == 2
    assert load_directions(stored, model).mark == loaded.mark
    bias = directions.bias.clone()
    bias[-1, -1] += 0.01
    save_directions(stored, directions.weight, bias, model.weights_hash)
    assert load_directions(stored, model).mark != loaded.mark


def test_directions_are_read_once_and_before_the_model_is_frozen(stored):
    model = copy.deepcopy(toy(FAMILY))
    use_directions(model, stored)
    found = model.find_directions()
    stored.unlink()
    assert freeze(model).find_directions() is found
    assert model.with_lattice(1.2).find_directions() is found
    use_directions(model, stored)
    assert model.find_directions() is found
    with pytest.raises(ValueError, match="before freezing it"):
        use_directions(model, stored.with_name("b.npz"))


def test_a_frozen_model_reads_the_directions_of_its_weights(stored):
    model, bias = copy.deepcopy(toy(FAMILY)), some_directions().bias
    use_directions(model, stored)
    assert torch.equal(freeze(model).find_directions().bias, bias.half().float())
    other = copy.deepcopy(toy(FAMILY))
    other.network.g_a[0].bias += 1
    use_directions(other, stored)
    with pytest.raises(InputError, match=f"for weights {toy(FAMILY).weights_hash}, but these are"):
        freeze(other).find_directions()


def test_missing_directions_factors_are_zero():
    directions = some_directions()
    change = directions.change(torch.tensor([0.5, -2.0]).double())
    for ours, v in zip(change, directions[:2], strict=True):
        torch.testing.assert_close(ours, 0.5 * v[0] - 2 * v[1])


@pytest.mark.parametrize(
    ("checkpoint", "beside"),
    [
        ("w/a.pth.tar", "w/a.directions.npz"),
        ("a_lambda0.01.pth.tar", "a_lambda0.01.directions.npz"),
        ("/x/b.safetensors", "/x/b.directions.npz"),
        ("c.pt", "c.directions.npz"),
        ("w.tar/plain", "w.tar/plain.directions.npz"),
    ],
)
def test_directions_lie_beside_the_weights(checkpoint, beside):
    assert str(directions_beside(checkpoint)) == beside


def refusal(path, model=None):
    """The one line in which a file is refused."""
    with pytest.raises(InputError) as refused:
        load_directions(path, model or toy(FAMILY))
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"directions {path}: ") or model is not None
    return message


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file; python -m pretraining.learn_directions makes it" in refusal(
        tmp_path / "none.npz"
    )


def test_directions_of_other_weights_are_refused(stored):
    other = copy.deepcopy(toy(FAMILY))
    other.network.g_a[0].bias += 1
    for model in (other, toy("mbt2018")):
        assert refusal(stored, model) == (
            f"directions {stored}: for weights {toy(FAMILY).weights_hash}, but these are "
            f"{model.weights_hash}"
        )
    line = "directions: the decoder of cheng2020-anchor does not end with a deconv"
    assert refusal(stored, toy("cheng2020-anchor")) == line


def test_truncated_and_damaged_files_are_refused(stored):
    data = stored.read_bytes()
    for length in [*range(0, len(data), 211), 1, 4, len(data) - 1]:
        stored.write_bytes(data[:length])
        refusal(stored)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[place if rng.random() < 0.5 else -1 - place % 300] ^= 1 << rng.integers(8)
        stored.write_bytes(damaged)
        try:
            load_directions(stored, toy(FAMILY))  # not all bits of a zip file count
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": np.full((2, C, 3, 5, 5), np.nan, np.float16)},
        {"bias": np.array([[1, 2, np.inf]] * 2, np.float16)},
        {"weight": np.ones((2, C, 3, 5, 5), np.float32)},
        {"bias": np.ones((2, 3), np.float64)},
        {"weight": np.ones((2, C, 3, 25), np.float16)},
        {"weight": np.ones((3, C, 3, 5, 5), np.float16)},
        {"weight": np.ones((0, C, 3, 5, 5), np.float16), "bias": np.ones((0, 3), np.float16)},
        {"weight": np.ones((2, C + 1, 3, 5, 5), np.float16)},
        {"bias": np.ones((2, 4), np.float16)},
        {"bias": np.ones(3, np.float16)},
        {"weight": np.array("weight")},
        {"weight": np.array([{}], object)},
        {"weights": np.array(["ab", "cd"])},
    ],
)
def test_wrong_arrays_are_refused(changed, tmp_path):
    path = tmp_path / "a.directions.npz"
    right = {"weight": np.ones((2, C, 3, 5, 5), np.float16), "bias": np.ones((2, 3), np.float16),
             "weights": np.array(toy(FAMILY).weights_hash)}  # fmt: skip
    np.savez(path, **right)
    load_directions(path, toy(FAMILY))
    np.savez(path, **right | changed)
    refusal(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "a.directions.npz"
    many = np.zeros(1, [(f"name{number}", "f2") for number in range(2000)])
    np.savez(path, weights=np.array("ab"), weight=many)  # numpy's message has two lines
    assert "no file of directions" in refusal(path)
    np.savez(path, weight=np.ones(3))
    assert "no file of directions" in refusal(path)
    for content in (b"", b"no zip", np.ones(3), np.array([{}], object)):
        with path.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else np.save(file, content)
        assert "no file of directions" in refusal(path)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_toy(tmp_path_factory):
    """The folder of a short refinement of two photos with a toy, and the toy's weights."""
    root = tmp_path_factory.mktemp("toy")
    (root / "photos").mkdir()
    for name, pixels in (("a", skimage.data.coffee()), ("b", skimage.data.chelsea())):
        Image.fromarray(pixels[100:171, 200:291]).save(root / "photos" / f"{name}.png")
    weights = save_checkpoint(root / "toy.pth.tar", toy(FAMILY), {})
    values = {
        "train_lambda": 0.01, "save_name": "run", "pretrain": str(weights),
        "tot_inference_iterations": 2, "output_dir": str(root / "results"),
        "dev_options": {
            "folder": True, "path_test": {"folder": str(root / "photos")},
            "improving_methods": {"soft_round_unoise": True},
        },
        "adapt": {"lattice": 1.3},
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patched:
        from runs import leave_out_plots
        from train_flexible_inference import main as refine

        leave_out_plots(patched)
        assert refine(["--config", str(root / "config.json")]) == 0
    return root / "results" / "run", weights


@pytest.fixture
def learn():
    """The command."""
    from pretraining.learn_directions import main

    return main


def test_the_command_writes_the_directions_of_a_run(finished_toy, learn, tmp_path, capsys):
    folder, weights = finished_toy
    path = tmp_path / "out.npz"
    assert learn([str(folder), "-o", str(path), "--count", "7"]) == 0
    assert f"{path}: 2 directions of 2 photos" in capsys.readouterr().out
    loaded = load_directions(path, toy(FAMILY))
    assert len(loaded.bias) == 2
    # as from the symbols of the run, on its lattice
    photos, step = Photos(), 2 ** (6 / 16)
    for name in ("a", "b"):
        with np.load(folder / "latents" / f"{name}.png.npz") as arrays:
            symbols = {key: torch.from_numpy(v)[None] for key, v in arrays.items()}
        x = to_x(Image.open(weights.parent / "photos" / f"{name}.png"))
        y_hat = toy(FAMILY).with_lattice(step).place(symbols, (71, 91)).y_hat
        photos.add(quadratic_of(Problem(toy(FAMILY), x, RateDistortion(0.01)), y_hat), 71 * 91)
    expected = photos.directions(7)
    for ours, bias, direction in zip(loaded.weight, loaded.bias, expected, strict=True):
        columns = torch.cat((ours.permute(0, 2, 3, 1).reshape(-1, 3), bias[None]))
        sign = (columns * direction).sum().sign()
        close = 2e-3 * direction.abs().max().item()
        torch.testing.assert_close(sign * columns.double(), direction, rtol=0, atol=close)


def test_the_file_is_beside_the_weights_by_default(finished_toy, learn):
    folder, weights = finished_toy
    assert learn([str(folder), "--count", "1"]) == 0
    path = weights.with_name("toy.directions.npz")
    assert len(load_directions(path, toy(FAMILY)).bias) == 1
    path.unlink()


def test_the_command_replaces_a_file_only_if_told_to(finished_toy, learn, tmp_path, capsys):
    path = tmp_path / "out.npz"
    path.write_text("old")
    arguments = [str(finished_toy[0]), "-o", str(path), "--count", "1"]
    assert learn(arguments) == 2
    assert capsys.readouterr().err == f"error: {path} is there already: see --overwrite\n"
    assert path.read_text() == "old"
    assert learn([*arguments, "--overwrite"]) == 0
    assert len(load_directions(path, toy(FAMILY)).bias) == 1


@pytest.mark.parametrize(
    ("slope", "gram", "reason"),
    [
        (0.0, torch.eye(301), "no change of the last layer lowers their errors"),
        (float("nan"), torch.eye(301), "their errors are not finite"),
        (1.0, -torch.eye(301), "their mean curvature is not positive"),
        (1.0, torch.zeros(301, 301), "directions beyond the range of half precision"),
    ],
)
def test_photos_that_give_no_directions_are_refused(
    finished_toy, learn, tmp_path, capsys, monkeypatch, slope, gram, reason
):
    error = Quadratic(1.0, torch.full((301, 3), slope).double(), gram.double())
    monkeypatch.setattr("pretraining.learn_directions.quadratic_of", lambda *_: error)
    folder, path = finished_toy[0], tmp_path / "out.npz"
    assert learn([str(folder), "-o", str(path)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {folder}: its photos give no directions: {reason}\n"
    assert not path.exists()


def test_the_command_refuses_what_is_no_run(finished_toy, learn, tmp_path, capsys):
    folder, weights = finished_toy
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "config.json").write_bytes((folder / "config.json").read_bytes())
    (copied / "images.jsonl").write_bytes((folder / "images.jsonl").read_bytes())
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((folder / "config.json").read_bytes())
    for arguments, message in (
        ([tmp_path / "none"], "none"), ([weights], "toy.pth.tar"),
        ([folder, "--count", "0"], "--count 0: from 1 to 4096"),
        ([empty], "has no refined image"), ([copied], "a.png.npz"),
    ):  # fmt: skip
        assert learn([*map(str, arguments), "-o", str(tmp_path / "out.npz")]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1]
        assert lines[-1].startswith("error: ")
    assert not (tmp_path / "out.npz").exists()
