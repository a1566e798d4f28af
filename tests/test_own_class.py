"""The model of docs/models.md, which no library has: its code is trained, refined and coded."""

import re

import numpy as np
import pytest
import torch

import codec
from architectures.own import find_family
from coding.coder import build_coder, decode_latents
from common.errors import InputError
from config import Channels
from conftest import ROOT, read_jsonl
from models import build_model, load_checkpoint
from objectives import Problem, RateDistortion
from runs import results, run
from trainings import folder_of

pytestmark = pytest.mark.usefixtures("without_run_plots")


@pytest.fixture
def own(tmp_path):
    """The page's code as a file, and the class in it, as `architecture` names it."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.S)
    assert len(code.splitlines()) < 60
    (tmp_path / "my_codec.py").write_text(code)
    return f"{tmp_path / 'my_codec.py'}:MyCodec"


def test_the_example_is_trained_refined_and_coded(
    own, train_on, train_values, config_values, write_config, tmp_path
):
    train_values |= {"architecture": own, "path_test_data": "", "tot_iterations": 30}
    train_values["lr"]["base"] = 0.01
    assert train_on(train_values) == 0
    weights = str(folder_of(train_values) / "weights.pth.tar")
    config_values |= {"pretrain": weights, "architecture": own, "save_bitstreams": True,
                      "optimizer": {"lr": 0.3}, "polish_passes": 2}  # fmt: skip
    assert run(write_config(config_values)) == 0
    folder = results(config_values)
    coder = build_coder(load_checkpoint(weights, architecture=own))
    records = read_jsonl(folder / "images.jsonl")
    assert len(records) == 3
    for record in records:
        assert record["refined"]["true_loss"] < record["base"]["true_loss"]
        data = (folder / "bitstreams" / f"{record['name']}.olc").read_bytes()
        symbols, _ = decode_latents(coder, data)
        with np.load(folder / "latents" / f"{record['name']}.npz") as stored:
            assert all(np.array_equal(stored[name], v[0]) for name, v in symbols.items())
    command = ["decompress", str(folder / "bitstreams"), "--checkpoint", weights]
    assert codec.main([*command, "-o", str(tmp_path / "a"), "--architecture", own]) == 0
    assert len(list((tmp_path / "a").iterdir())) == 3
    assert codec.main([*command, "-o", str(tmp_path / "b")]) == 2  # no registered family has them


@torch.no_grad()
def test_the_examples_rate_is_that_of_its_two_halves(own):
    """By CompressAI's entropy models, half by half."""
    torch.manual_seed(0)
    model = build_model(Channels(N=8, M=12), own)
    network, x = model.network.eval(), torch.rand(1, 3, 64, 128)
    network.g_a[6].weight *= 50
    latents = model.analyze(x)
    terms = Problem(model, x, RateDistortion(0.01)).true(latents)
    z_hat, p_z = network.entropy_bottleneck(latents["z"])
    params = network.h_s(z_hat)
    first, p_first = network.gaussian_conditional(
        latents["y"][:, :6], params[:, :6], params[:, 6:12]
    )
    scales, means = network.second(torch.cat((params, first), 1)).chunk(2, 1)
    second, p_second = network.gaussian_conditional(latents["y"][:, 6:], scales, means)
    bits = -sum(p.log2().sum() for p in (p_z, p_first, p_second))
    torch.testing.assert_close(terms.bpp[0], bits / (64 * 128), rtol=1e-4, atol=0)
    x_hat = network.g_s(torch.cat((first, second), 1))
    torch.testing.assert_close(terms.x_hat, x_hat, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("code", "name", "problem"),
    [
        ("x = 1", "MyCodec", "has no MyCodec; a class is wanted that is"),
        ("MyCodec = 3", "MyCodec", "MyCodec is neither"),
        ("import nothing_like_it", "A", ":1: ModuleNotFoundError: No module named"),
        ("def broken(:", "A", ":1: SyntaxError"),
        ("from architectures import Architecture\nclass A(Architecture): pass", "A",
         "the class lacks encode, latent_shapes, walk"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_used_is_named(code, name, problem, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(InputError) as refused:
        find_family(f"{tmp_path / 'mine.py'}:{name}")
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        find_family(f"{tmp_path / 'mine.py'}:A")


def test_a_class_may_import_its_neighbour_and_registers_nothing(tmp_path, own):
    from architectures import ARCHITECTURES

    known = dict(ARCHITECTURES)
    (tmp_path / "again.py").write_text(
        "from architectures import architecture\nfrom my_codec import MyCodec\n"
        "@architecture('mbt2018')\nclass Again(MyCodec):\n    pass\n"
    )
    assert find_family(f"{tmp_path / 'again.py'}:Again").halo == 2
    assert known == ARCHITECTURES
