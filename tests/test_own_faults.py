"""Faults of a class of the user's: each ends in one line, before a folder is made.

Each class is that of docs/models.md with a few words changed.
"""

import re
import textwrap
from pathlib import Path

import pytest
import torch

import train_flexible_inference
from common.errors import InputError
from config import Channels
from conftest import ROOT
from models import build_model, load_checkpoint
from runs import results
from trainings import folder_of

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHAPES = '    return {"y": y_shape, "z": (1, self.N, -(-size[0] // 64), -(-size[1] // 64))}'
LATENTS = '    return {"y": y, "z": self.network.h_a(y)}'
EXACT = 'exact_parts = ("h_s", "second")'
WHOLE = "network_class = TwoHalves"
SECOND = "        second = value_of("
LAST = "        return torch.cat((first, second), 1)"
OTHER = """
    class network_class(nn.Module):
        def __init__(self, N, M):
            super().__init__()
"""


def changed(*pairs):
    """The page's code, with each old text replaced by a new one."""
    code = CODE
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in code, old
        code = code.replace(old, new)
    return code


def number_of(old):
    """The number of the first line that has a text of the page's code."""
    return str(CODE[: CODE.index(old)].count("\n") + 1)


def distribution(*methods):
    """A z whose distribution has only these methods, which are those of the page's."""
    given = "".join(f"    {name} = FactorizedPrior.{name}\n" for name in methods)
    own = f"class Strange:\n    def __init__(self, coder):\n        self.coder = coder\n{given}"
    return changed(
        "class MyCodec(", f"{own}\n\nclass MyCodec(",
        "prior.medians, prior)", "prior.medians, Strange(network.entropy_bottleneck))",
    )  # fmt: skip


@pytest.fixture
def write_class(tmp_path):
    """Writes code to a file, and gives the class as `architecture` names it."""

    def write(code, name="MyCodec"):
        path = tmp_path / "my_codec.py"
        path.write_text(code)
        return f"{path}:{name}"

    return write


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the page's class."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "page.py").write_text(CODE)
    torch.manual_seed(0)
    network = build_model(Channels(N=8, M=12), f"{folder / 'page.py'}:MyCodec").network
    torch.save(network.state_dict(), folder / "weights.pth.tar")
    return str(folder / "weights.pth.tar")


@pytest.fixture
def line_of_refinement(config_values, write_config, weights, capsys):
    """The one line in which a refinement with a class is refused; no folder is made."""

    def line_of(architecture, **more):
        values = config_values | {"architecture": architecture, "pretrain": weights} | more
        assert train_flexible_inference.main(["--config", str(write_config(values))]) == 2
        return line_in(capsys.readouterr().err, architecture, results(values))

    return line_of


@pytest.fixture
def line_of_training(train_values, train_on, capsys):
    """The same of a training."""

    def line_of(architecture, **more):
        values = train_values | {"architecture": architecture} | more
        assert train_on(values) == 2
        return line_in(capsys.readouterr().err, architecture, folder_of(values))

    return line_of


def line_in(printed, architecture, folder):
    lines = printed.splitlines()
    assert len(lines) == 1, printed
    start = f"error: architecture {architecture}: "
    assert lines[0].startswith(start)
    assert not folder.exists()
    return lines[0].removeprefix(start)


# --- faults that refinement and training share ----------------------------------------------------

FAULTS = {
    "exit on import": ("class MyCodec(", "raise SystemExit(0)\nclass MyCodec(",
                       "my_codec.py:LINE: SystemExit: 0"),
    "bad import": ("from torch import nn", "from torch import nn_", ":LINE: ImportError: cannot"),
    "constructor": ("self.N, self.M = N, M", "self.N, self.M = N, M / 0",
                    "my_codec.py:LINE: ZeroDivisionError: division by zero"),
    "exit in constructor": ("self.N, self.M = N, M", "raise SystemExit",
                            ":LINE: SystemExit; while it loads pretrain"),
    "no network_class": (WHOLE, "pass", "has no attribute 'network_class'"),
    "wrong network_class": (WHOLE, "network_class = 3", "AttributeError|TypeError"),
    "no from_state_dict": ("def from_state_dict", "def other", "no attribute 'from_state_dict'"),
    "from_state_dict returns None": ("        return network\n", "", "must return the network; it"),
    "from_state_dict fails": ('weights["g_a.6.weight"]', 'weights["g_a.7.weight"]',
                              "my_codec.py:LINE: KeyError: 'g_a.7.weight'"),
    "from_state_dict swaps": ("cls(N, M)", "cls(M, N)",
                              r"my_codec.py:\d+: RuntimeError: Error.*size mismatch"),
    "no N": ("self.N, self.M = N, M", "self.M = M", "has no N"),
    "N is no int": ("self.N, self.M = N, M", "self.N, self.M = str(N), M",
                    "N must be an int; it is str"),
    "walk fails": ("self.M // 2", "self.M // 0", "my_codec.py:LINE: ZeroDivisionError"),
    "walk returns None": (LAST, LAST.replace("return torch", "y_hat = torch"),
                          "walk must return y_hat, a Tensor; it returns None"),
    "walk returns a half": (SECOND, "        return first\n" + SECOND,
                            "ask for 180 of 360 symbols of y"),
    "walk returns a cut y_hat": (LAST, LAST.replace("(first,", "(first[:, :0],"),
                                 "RuntimeError"),
    "walk returns NaN": (LAST, LAST.replace("torch.cat(", "float('nan') * torch.cat("),
                         "a y_hat with NaN"),
    "another group": ('Group("z"', 'Group("w"', r":\d+: walk asks for w, but encode gives y, z"),
    "a group twice": ("Part(slice(half, None))", "Part(slice(0, half))", "symbols of y twice"),
    "no Group": ('Group("z", prior.medians, prior)', '"z"', "value_of must get a Group"),
    "no part": ("Part(slice(0, half))", "slice(0, half)", "the part of y must be a Part"),
    "a centre that does not fit": ("prior.medians, prior", "prior.medians[:, 1:], prior",
                                   r"the centre \[1, 7, 1, 1\] of z does not fit"),
    "a latent is missing": (LATENTS, '    return {"y": y}', "encode gives no z, but latent_shapes"),
    "no dict of latents": (LATENTS, "    return y", "encode must return a dict"),
    "latents of other shapes": ("self.network.h_a(y)", "self.network.h_a(y)[:, 1:]",
                                r"encode gives z \[1, 7, 2, 2\], but .* z \[1, 8, 2, 2\]"),
    "shapes of a latent more": (SHAPES, SHAPES.replace("}", ', "w": y_shape}'),
                                "encode gives no w"),
    "shapes that are short": (SHAPES, SHAPES.replace("(1, self.N,", "(self.N,"),
                              r"must have a tuple \(1, C, h, w\) for z"),
    "no shapes": (SHAPES, "    return None", "latent_shapes must return a dict"),
    "halo": ("halo = 2", "halo = -1", "halo must be None or a whole number from 0; it is -1"),
    "halo of text": ("halo = 2", "halo = '2'", "halo must be None or a whole"),
    "exact_parts is a text": (EXACT, 'exact_parts = ("h_s")', "must be a tuple of names"),
    "exact_parts has no such part": (EXACT, 'exact_parts = ("h_s", "secnd")', "names secnd, but"),
    "exact_parts lacks a part": (EXACT, 'exact_parts = ("h_s",)',
                                 "RuntimeError: .*; exact_parts must name all"),
    "no g_a": ("self.g_a =", "self.ga =", "no attribute 'g_a'|Missing key"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_a_refinement_in_one_line(name, write_class, line_of_refinement):
    old, new, message = FAULTS[name]
    line = line_of_refinement(write_class(changed(old, new)))
    assert re.search(message.replace("LINE", number_of(old)), line)


# What refinement does not see comes first: it loads weights, and never builds a network.
OF_TRAINING = {
    "build": (WHOLE, f"{WHOLE}\n    build = None", "TypeError"),
    "build returns None": (WHOLE, f"{WHOLE}\n    build = classmethod(lambda cls, *_: None)",
                           "build must return a model of the class; it returns None"),
    "no CompressionModel": (WHOLE, OTHER, "its network has no update and no aux_loss"),
    "no bottleneck": ("class TwoHalves(CompressionModel):",
                      "class TwoHalves(CompressionModel):\n    aux_loss = lambda self: 0",
                      "its network has no EntropyBottleneck"),
    "does not restore": ("network.load_state_dict(weights)", "pass",
                         "from_state_dict does not restore .*the class cannot load what it was"),
    **{name: FAULTS[name] for name in (
        "exit on import", "constructor", "no network_class", "no from_state_dict",
        "from_state_dict returns None", "from_state_dict swaps", "walk fails",
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_TRAINING)
def test_a_fault_ends_a_training_in_one_line(name, write_class, line_of_training):
    old, new, message = OF_TRAINING[name]
    line = line_of_training(write_class(changed(old, new)))
    assert re.search(message.replace("LINE", number_of(old)), line)


def test_channels_that_a_class_cannot_have_end_a_training_in_one_line(
    write_class, line_of_training
):
    line = line_of_training(write_class(CODE), channels={"N": 8, "M": 13})
    assert re.search(r":\d+: the centre .*; with the channels N = 8, M = 13$", line)


# --- distributions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((), "the distribution Strange of z has no likelihood"),
        (("likelihood",), "the distribution Strange of z has no fixed_at"),
    ],
)
def test_a_distribution_without_a_method_is_named(
    methods, message, write_class, line_of_refinement
):
    code = distribution(*methods)
    assert message in line_of_refinement(write_class(code))


def test_a_distribution_that_no_coder_knows_is_refused_where_files_are_wanted(
    write_class, line_of_refinement, weights
):
    own = write_class(distribution("likelihood", "fixed_at"))
    message = "its latent z has the distribution Strange, which no coder knows"
    assert message in line_of_refinement(own, save_bitstreams=True)
    assert load_checkpoint(weights, architecture=own).N == 8  # without files it can be refined


# --- classes without a walk -----------------------------------------------------------------------

FORWARD_ONLY = """
    from compressai.models import MeanScaleHyperprior


    class Mine(MeanScaleHyperprior):
        def __init__(self, N=8, M=12):
            super().__init__(N, M)

        @classmethod
        def from_state_dict(cls, weights):
            network = cls()
            network.load_state_dict(weights)
            return network

        def forward(self, x):
            return super().forward(x)
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return super().forward(x)", "raise ValueError('a fault')",
         r"its forward fails \(.*my_codec.py:16: ValueError: a fault\)"),
        ("            return network\n", "", "from_state_dict of Mine must return the network"),
        ("super().__init__(N, M)", "super().__init__(N, M / 0)", ":7: ZeroDivisionError"),
        ("return super().forward(x)", "return 3", "its forward must return"),
    ],
)  # fmt: skip
def test_a_fault_of_a_class_without_a_walk_is_one_line(
    old, new, message, write_class, line_of_refinement, small, saved
):
    source = saved(small.network.state_dict())
    code = textwrap.dedent(FORWARD_ONLY.replace(old, new))
    own = write_class(code, "Mine")
    assert re.search(message, line_of_refinement(own, pretrain=source))


def test_a_class_without_a_walk_is_not_trained(write_class, line_of_training, small, saved):
    own = write_class(textwrap.dedent(FORWARD_ONLY), "Mine")
    assert "is refined by its own forward" in line_of_training(own)
    pretrain = saved(small.network.state_dict())
    assert "takes one picture at a time" in line_of_training(own, pretrain=pretrain)


# --- classes without a fault ----------------------------------------------------------------------

MULTIPLES_OF_8 = "self.N, self.M = N, M", "assert N % 8 == 0\n        self.N, self.M = N, M"


@pytest.mark.parametrize(
    "pairs",
    [
        MULTIPLES_OF_8,
        ("def __init__(self, N=64, M=96):", "def __init__(self):\n        N, M = 8, 12",
         "cls(N, M)", "cls()"),
    ],
)  # fmt: skip
def test_an_unusual_class_is_refined(pairs, write_class, config_values, write_config, weights):
    own = write_class(changed(*pairs))
    values = config_values | {"architecture": own, "pretrain": weights, "tot_batches": 1,
                              "tot_inference_iterations": 2}  # fmt: skip
    assert train_flexible_inference.main(["--config", str(write_config(values))]) == 0


@pytest.mark.parametrize(
    ("old", "new"), [(EXACT, "exact_parts = {'h_s', 'second'}"), ("halo = 2", "halo = None")]
)
def test_an_unusual_class_is_loaded(old, new, write_class, weights):
    assert load_checkpoint(weights, architecture=write_class(changed(old, new))).M == 12


def test_weights_of_another_family_are_told(write_class, small, saved):
    source = saved(small.network.state_dict())
    with pytest.raises(InputError, match=r"^pretrain .*\(they are of mbt2018-mean\)"):
        load_checkpoint(source, architecture=write_class(CODE))


def test_a_class_that_wants_other_channels_than_four_is_trained(
    write_class, train_values, train_on
):
    own = write_class(changed(*MULTIPLES_OF_8))
    values = train_values | {"architecture": own, "path_test_data": "", "tot_iterations": 2}
    assert train_on(values) == 0
    assert (folder_of(values) / "weights.pth.tar").is_file()


def test_the_trial_moves_no_random_numbers_and_no_mode(write_class):
    own = write_class(CODE)
    torch.manual_seed(3)
    model = build_model(Channels(N=8, M=12), own)
    ours = torch.rand(1)
    assert all(part.training for part in model.network.modules())
    torch.manual_seed(3)
    type(model).network_class(N=8, M=12)
    assert torch.equal(ours, torch.rand(1))


def test_weights_with_names_of_no_family_are_told(write_class, weights):
    more = write_class(changed("self.h_a =", "self.more = conv(1, 1)\n        self.h_a ="))
    with pytest.raises(
        InputError, match=r"my_codec.py:\d+: RuntimeError: .*while it loads pretrain"
    ):
        load_checkpoint(weights, architecture=more)


def test_the_line_of_a_file_that_is_named_from_here_is_told(
    write_class, monkeypatch, tmp_path, weights
):
    write_class(changed("self.M // 2", "self.M // 0"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"my_codec.py:MyCodec: my_codec.py:\d+: ZeroDiv"):
        load_checkpoint(weights, architecture=f"{Path('my_codec.py')}:MyCodec")
