"""Small real inputs shared by the tests: crops of scikit-image's photos and configs for them."""

import copy
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

# Two processes share the cores: one thread each, which must be said before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WEIGHTS = ROOT / "example_files" / "weights" / "mean_scale_n64_lambda0.01.pth.tar"

# Options of torch.save.
TORCH_FORMATS = {
    "zip": {},
    "before torch 1.6": {"_use_new_zipfile_serialization": False},
    "pickle protocol 4": {"pickle_protocol": 4},
}


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip where packages are absent: on a machine with `requirements/gpu_machine.txt` alone."""
    absent = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@pytest.fixture(scope="session")
def model():
    """The bundled weights, made ready for refinement."""
    from models import freeze, load_checkpoint

    return freeze(load_checkpoint(str(WEIGHTS)))


@pytest.fixture(scope="module")
def small():
    """A tiny model whose medians are not zero, as after training."""
    from config import Channels
    from models import build_model

    torch.manual_seed(0)
    model = build_model(Channels(N=8, M=12))
    with torch.no_grad():
        model.network.entropy_bottleneck.quantiles[:, 0, 1] = torch.linspace(-1.3, 1.4, 8)
    model.network.eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def network(small):
    """The network of `small`: CompressAI's own module."""
    return small.network


@pytest.fixture(scope="session")
def coder():
    """The coder of the bundled weights."""
    from coding.coder import build_coder
    from models import load_checkpoint

    return build_coder(load_checkpoint(str(WEIGHTS)))


@pytest.fixture(scope="session")
def small_file(coder):
    """A file of a 70x50 picture, about 900 bytes, and its symbols."""
    from coding.coder import encode_latents

    x = to_x(skimage.data.chelsea()[60:110, 100:170])
    symbols = coder.model.symbols(coder.model.analyze(x), (50, 70))
    return encode_latents(coder, symbols, (50, 70)), symbols


@pytest.fixture
def saved(tmp_path):
    """Writes something with torch.save and gives the path."""

    def save(checkpoint, **options):
        path = tmp_path / "checkpoint.pth.tar"
        torch.save(checkpoint, path, **options)
        return str(path)

    return save


@pytest.fixture
def written(tmp_path):
    """Writes bytes to a file and gives the path."""

    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def photos(tmp_path):
    """A folder of three small crops, of odd and even sizes."""
    return write_photos(tmp_path / "photos")


@pytest.fixture
def config_values(tmp_path, photos):
    """The JSON values of a short refinement of `photos`."""
    return values_of_refinement(photos, tmp_path / "results")


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory):
    """The JSON values of a short refinement that has been done."""
    from train_flexible_inference import main

    folder = tmp_path_factory.mktemp("finished")
    values = values_of_refinement(write_photos(folder / "photos"), folder / "results")
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    assert main(["--config", str(path)]) == 0
    return values


@pytest.fixture
def finished(finished_once, tmp_path):
    """The same, with a copy of its results for one test to spoil."""
    output = shutil.copytree(finished_once["output_dir"], tmp_path / "finished")
    return copy.deepcopy(finished_once) | {"output_dir": str(output)}


@pytest.fixture
def write_config(tmp_path):
    """Writes JSON values to a file and gives its path."""

    def write(values, name="config.json"):
        path = tmp_path / name
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.fixture
def tfrecords(tmp_path):
    """Twenty pictures of distinct numbers in three files."""
    from crops import encode, picture, write_tfrecord

    folder = tmp_path / "records"
    folder.mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(20), 3)):
        write_tfrecord(
            folder / f"train-{shard}.tfrecord", [encode(picture(number)) for number in numbers]
        )
    return folder


@pytest.fixture
def converted_here(monkeypatch):
    """Lets conversions to tfrecords work in this process: starting another takes seconds."""
    here = "pretraining.make_tfrecords.ProcessPoolExecutor"
    monkeypatch.setattr(here, lambda workers, **_: ThreadPoolExecutor(workers))


@pytest.fixture
def without_run_plots(request, monkeypatch):
    """Lets runs and trainings draw nothing, which takes half of their time.

    For whole modules; where a test reads plots, or odd names or numbers meet them, it asks for
    `with_run_plots`.
    """
    if "with_run_plots" not in request.fixturenames:
        from runs import leave_out_plots

        leave_out_plots(monkeypatch)
        empty = SimpleNamespace(savefig=lambda path: path.touch())
        for plot in ("pretraining.run.plot_training", "reports.run_report.plot_comparison"):
            monkeypatch.setattr(plot, lambda *_: empty)


@pytest.fixture
def with_run_plots():
    """Keeps the plots in a module that leaves them out."""


@pytest.fixture
def generators_here(monkeypatch):
    """Lets the noise of a pretended GPU come from generators of the CPU."""
    monkeypatch.setattr("refinement.batch.Generator", lambda device: torch.Generator())


@pytest.fixture
def numbered_folder(tmp_path):
    """Six pictures of distinct numbers, three of them in a folder within."""
    from crops import encode, picture

    root = tmp_path / "images"
    (root / "class").mkdir(parents=True)
    for number in range(6):
        place = root / "class" if number % 2 else root
        (place / f"{number}.png").write_bytes(encode(picture(number)))
    return root


@pytest.fixture
def train_values(tmp_path):
    """The JSON values of a very short training of a very small network."""
    folder = tmp_path / "train"
    folder.mkdir()
    for name, pixels in (
        ("a", skimage.data.astronaut()[:200, :200]),
        ("b", skimage.data.coffee()[:150, :150]),
        ("c", skimage.data.rocket()[200:300, 200:330]),
    ):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    test = tmp_path / "test"
    test.mkdir()
    Image.fromarray(skimage.data.chelsea()[:192, :256]).save(test / "cat.png")
    Image.fromarray(skimage.data.chelsea()[100:171, 50:131]).save(test / "odd.png")
    return {
        "tot_iterations": 8,
        "train_lambda": 0.01,
        "channels": {"N": 8, "M": 12},
        "lr": {"base": 1e-3, "warmup_step": 2, "decay": 0.5, "decay_interval": 6},
        "batch_size": 2,
        "print_freq": 2,
        "save_model_freq": 4,
        "image_size": 64,
        "seed": 3,
        "save_name": "run",
        "train_folder": str(folder),
        "path_test_data": str(test),
        "device": "cpu",
        "output_dir": str(tmp_path / "checkpoints"),
    }


@pytest.fixture
def train_on(write_config):
    """The exit code of a training by JSON values, some of them changed."""
    import train

    def train_on(values, **changed):
        return train.main(["--config", str(write_config({**values, **changed}, "train.json"))])

    return train_on


def write_photos(folder):
    """The folder, now with three small crops, of odd and even sizes."""
    folder.mkdir()
    crops = {
        "a_chelsea.png": skimage.data.chelsea()[60:131, 100:181],
        "b_coffee.png": skimage.data.coffee()[100:164, 200:264],
        "c_rocket.png": skimage.data.rocket()[200:264, 300:400],
    }
    for name, pixels in crops.items():
        Image.fromarray(pixels).save(folder / name)
    return folder


def values_of_refinement(photos, output):
    """The JSON values of a short refinement of a folder of photos."""
    return {
        "train_lambda": 0.01,
        "save_name": "run",
        "pretrain": str(WEIGHTS),
        "tot_batches": 3,
        "tot_inference_iterations": 8,
        "eval_freq": 4,
        "optimizer": {"name": "adam", "lr": 0.02},
        "output_dir": str(output),
        "dev_options": {
            "folder": True,
            "path_test": {"folder": str(photos)},
            "improving_methods": {"sga_logits_3c": True},
            "sga_logits_params": {"logits": "log_ssl_a_factor_pow"},
            "temp_rate": 0.01,
        },
    }


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def to_x(pixels):
    """x [1, 3, H, W] in [0, 1] of uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def assert_loads(source, network):
    """The file at `source` gives the network's weights and buffers, bit by bit."""
    from models import load_checkpoint

    loaded = load_checkpoint(source).network.state_dict()
    assert loaded.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(loaded[name], value), name


def refusal_of(source):
    """The one line in which the file at `source` is refused."""
    from common.errors import InputError
    from models import load_checkpoint

    with pytest.raises(InputError) as refused:
        load_checkpoint(source)
    message = str(refused.value)
    assert message.startswith(f"pretrain {source}: ")
    assert "\n" not in message
    return message
