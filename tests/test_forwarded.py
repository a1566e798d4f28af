"""Classes of the user's that only are CompressAI's `CompressionModel`s, refined by their forward.

The truth is the stock forward, our own walks of the same weights, or the loss written out here.
"""

import copy
import textwrap

import pytest
import torch
import torch.nn.functional as F
from compressai import latent_codecs, ops
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from compressai.models import CompressionModel, MeanScaleHyperprior
from compressai.ops import quantize_ste
from torch import nn

from architectures.forwarded import forwarded_family
from architectures.walk import rounded
from common.errors import InputError
from conftest import read_jsonl
from models import model_from_state_dict
from passes import problem_of, to_optimise, true_terms
from runs import results, run

pytestmark = pytest.mark.usefixtures("without_run_plots")

SIZE = (128, 64)


def smooth(v):
    """A deterministic rounding with a derivative everywhere."""
    return v + 0.2 * torch.sin(6.28 * v)


def spread(network):
    """The network, with latents of several integers and medians that are not zero."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("quantiles"):
                weight[:, 0, 1] = torch.linspace(-1.3, 1.4, len(weight))
            elif weight.dim() == 4 and name.startswith(("g_a.", "latent_codec.hyper.h_a.", "h_a.")):
                weight.mul_(1.6)
    return network.eval()


@pytest.fixture(scope="module")
def x():
    return torch.rand((1, 3, *SIZE), generator=torch.Generator().manual_seed(2))


def gradients_of(loss, latents):
    return dict(zip(latents, torch.autograd.grad(loss, [*latents.values()]), strict=True))


def assert_near(ours, truth):
    """The gradients are the same but for 1e-4 of the largest element."""
    assert ours.keys() == truth.keys()
    for name, gradient in truth.items():
        assert gradient.abs().max() > 0
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


# --- classes of a user's --------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """A straight-through estimator as a Function of its own."""

    @staticmethod
    def forward(ctx, v):
        return torch.round(v)

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_place(v):
    rounded = v.clone()
    rounded.round_()
    return v + (rounded - v).detach()


def without_gradient(v):
    with torch.no_grad():
        error = torch.round(v) - v
    return v + error


def detached_before(v):
    base = v.detach()
    return v + (base.round() - base)


IDIOMS = {
    "round": torch.round,
    "method": lambda v: v + (v.round() - v).detach(),
    "only the result": lambda v: v - v.detach() + torch.round(v),
    "result first": lambda v: torch.round(v) - v.detach() + v,
    "both detached": lambda v: v + (torch.round(v.detach()) - v.detach()),
    "detached before": detached_before,
    "round_": in_place,
    "no_grad": without_gradient,
    "Function": lambda v: Straight.apply(v),
    "quantize_ste": quantize_ste,
    "noise": lambda v: EntropyModel.quantize(None, v, "noise"),
    "symbols": lambda v: EntropyModel.dequantize(EntropyModel.quantize(None, v, "symbols")),
}


class Own(CompressionModel):
    """A mean-scale hyperprior with names, a gain and a quantiser of its own."""

    quantise = staticmethod(IDIOMS["method"])

    def __init__(self):
        super().__init__()
        self.analysis = nn.Sequential(nn.Conv2d(3, 6, 7, 4, 3), nn.GELU(), nn.Conv2d(6, 6, 7, 4, 3))
        self.more = nn.Conv2d(6, 4, 7, 4, 3)
        self.scales_and_means = nn.ConvTranspose2d(4, 12, 4, 4)
        self.synthesis = nn.ConvTranspose2d(6, 3, 16, 16)
        self.prior = EntropyBottleneck(4)
        self.conditional = GaussianConditional(None)
        self.gain = nn.Parameter(torch.linspace(3, 9, 6)[:, None, None])

    def forward(self, x):
        y = self.analysis(x) * self.gain
        z_hat, z_likelihoods = self.prior(self.more(F.relu(y)))
        scales, means = self.scales_and_means(z_hat).chunk(2, 1)
        y_hat = self.quantise(y - means) + means
        _, y_likelihoods = self.conditional(y, scales.exp(), means)
        return {
            "x_hat": self.synthesis(y_hat),
            "likelihoods": {"y": y_likelihoods, "z": z_likelihoods},
        }


def own_model(**changed):
    torch.manual_seed(1)
    network_class = type("Changed", (Own,), changed)
    return forwarded_family(network_class)(spread(network_class()))


def loss_of_own(network, latents, x, rounding):
    """bpp + 0.01 * 255^2 * MSE of `Own`, written out in float64."""
    medians = network.prior.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
    z_hat = rounding(latents["z"] - medians) + medians
    scales, means = network.scales_and_means(z_hat).chunk(2, 1)
    y_hat = rounding(latents["y"] - means) + means
    flat = z_hat.transpose(0, 1).flatten(1)[:, None]
    p_z = network.prior._likelihood(flat)[0]
    p_y = network.conditional._likelihood(y_hat, scales.exp(), means)
    bits = -p_z.log2().sum() - p_y.log2().sum()
    mse = (network.synthesis(y_hat) - x).square().mean()
    return bits / (SIZE[0] * SIZE[1]) + 0.01 * 255**2 * mse


@pytest.mark.parametrize("idiom", IDIOMS)
def test_every_way_to_round_gives_the_chosen_rounding(idiom, x):
    model = own_model(quantise=staticmethod(IDIOMS[idiom]))
    assert list(model.latent_shapes(SIZE)) == ["z", "y"]
    latents = model.analyze(x)
    moved = to_optimise(latents)
    relaxed = problem_of(model, x).relaxed(moved, smooth).loss.sum()
    exact = to_optimise({name: v.double() for name, v in latents.items()})
    network = copy.deepcopy(model.network).double()
    truth = loss_of_own(network, exact, x.double(), smooth)
    torch.testing.assert_close(relaxed.double(), truth, rtol=1e-5, atol=0)
    ours = gradients_of(relaxed, moved)
    assert_near({name: v.double() for name, v in ours.items()}, gradients_of(truth, exact))


def test_encoders_do_not_run_again(x, monkeypatch):
    model = own_model()
    latents = model.analyze(x)
    for encoder in (model.network.analysis[0], model.network.more):
        monkeypatch.setattr(encoder, "forward", None)
    true_terms(model, x, latents)


class Masked(Own):
    """Rounds the symbols of y mask by mask, the difference from the means masked afterwards."""

    def forward(self, x):
        y = self.analysis(x) * self.gain
        z_hat, z_likelihoods = self.prior(self.more(y))
        scales, means = self.scales_and_means(z_hat).chunk(2, 1)
        y_hat = torch.zeros_like(y)
        all_means = torch.zeros_like(y)
        for mask in masks_of(y):
            here = means + 0.1 * y_hat.mean(1, keepdim=True)
            y_hat = y_hat + (quantize_ste((y - here) * mask) + here) * mask
            all_means = all_means + here * mask
        _, y_likelihoods = self.conditional(y, scales.exp(), all_means)
        return {
            "x_hat": self.synthesis(y_hat),
            "likelihoods": {"y": y_likelihoods, "z": z_likelihoods},
        }


def masks_of(y):
    """Two masks: the first half of the channels on a checkerboard, the others on its complement."""
    odd = (torch.arange(y.size(2))[:, None] + torch.arange(y.size(3))) % 2
    first = torch.stack([odd] * 3 + [1 - odd] * 3)[None].to(y)
    return first, 1 - first


def test_masks_cut_a_latent_into_parts(x):
    torch.manual_seed(1)
    model = forwarded_family(Masked)(spread(Masked()))
    latents = model.analyze(x)
    with torch.no_grad():
        terms = true_terms(model, x, latents)
        torch.testing.assert_close(terms.x_hat, model.network(x)["x_hat"], atol=1e-5, rtol=0)
    asked = torch.zeros(latents["y"].shape)
    for group in terms.walk.groups[1:]:
        assert group.name == "y"
        group.part.write(asked, group.part.of(asked) + 1)
    assert len(terms.walk.groups) == 5  # z, and two halves of channels in each of two passes
    assert (asked == 1).all()


class Undeclared(Own):
    """Has a latent without likelihoods, beside those that have some."""

    def forward(self, x):
        y = self.analysis(x) * self.gain
        z_hat = quantize_ste(self.more(y))
        scales, means = self.scales_and_means(z_hat).chunk(2, 1)
        y_hat, likelihoods = self.conditional(y, scales.exp(), means)
        return {"x_hat": self.synthesis(y_hat), "likelihoods": {"main": likelihoods}}


def test_a_latent_without_likelihoods_is_refined_too(x):
    torch.manual_seed(1)
    model = forwarded_family(Undeclared)(spread(Undeclared()))
    moved = to_optimise(model.analyze(x))
    relaxed = problem_of(model, x).relaxed(moved, smooth)
    assert relaxed.rates.keys() == {"q0", "main"}
    assert relaxed.rates["q0"] == 0
    assert all(gradient.any() for gradient in gradients_of(relaxed.loss.sum(), moved).values())


def test_everything_is_restored_also_after_an_error(x):
    before = {
        "quantize": EntropyModel.quantize, "apply": vars(torch.autograd.Function)["apply"],
        "round": torch.round, "method": torch.Tensor.round, "ste": ops.quantize_ste,
        "codec": latent_codecs.checkerboard.quantize_ste, "own": quantize_ste,
    }  # fmt: skip

    def now():
        return {
            "quantize": EntropyModel.quantize, "apply": vars(torch.autograd.Function)["apply"],
            "round": torch.round, "method": torch.Tensor.round, "ste": ops.quantize_ste,
            "codec": latent_codecs.checkerboard.quantize_ste, "own": quantize_ste,
        }  # fmt: skip

    model = own_model()
    latents = model.analyze(x)

    def broken(v):
        raise ZeroDivisionError("in the middle")

    with pytest.raises(InputError, match=r"fails \(ZeroDivisionError: in the middle\)"):
        model.round(latents, broken, SIZE)
    v = torch.tensor([0.4, 1.6])
    assert now() == before
    assert torch.equal(quantize_ste(v), torch.tensor([0.0, 2.0]))
    assert torch.equal(torch.round(v), torch.tensor([0.0, 2.0]))
    assert not any("forward" in vars(part) for part in model.network.modules())
    assert torch.isfinite(true_terms(model, x, latents).loss).all()


# --- what is refused ------------------------------------------------------------------------------


def with_forward(change):
    """`Own` with another forward: `change` gets the network, y and the stock results."""

    def forward(self, x):
        result = Own.forward(self, x)
        return change(self, self.analysis(x) * self.gain, result)

    return {"forward": forward}


def once_more(network, y, result):
    network.calls = getattr(network, "calls", 0) + 1
    if network.calls == 12:
        torch.round(y)
    return result


def plus(extra):
    return lambda network, y, result: {
        **result, "x_hat": result["x_hat"] + network.synthesis(extra(y)),
    }  # fmt: skip


def in_slices(network, y, result):
    rounded = torch.cat([torch.round(part) for part in y.chunk(2, 1)], 1)
    return {**result, "x_hat": network.synthesis(rounded)}


REFUSED = {
    "roundings": (with_forward(once_more), "has not always the same roundings"),
    "leak": (with_forward(plus(lambda y: 0.1 * y)), "more than rounded latents"),
    "signs": (with_forward(plus(torch.sign)), "more than rounded latents"),
    "slices": (with_forward(in_slices), "arranged differently"),
    "floor": ({"quantise": staticmethod(lambda v: torch.floor(v + 0.5))}, "more than rounded"),
    "shape": (
        with_forward(lambda network, y, result: {**result, "likelihoods": {"y": torch.ones(3)}}),
        r"likelihoods y that are not \[B, C, h, w\]",
    ),
    "two": (
        with_forward(lambda network, y, result: {
            **result, "likelihoods": {**result["likelihoods"], "w": result["likelihoods"]["y"]},
        }),
        "gives two likelihoods for one latent, w the second",
    ),
    "gradient": ({"quantise": staticmethod(Straight.apply)}, "hides the gradient to its latent"),
    "tuple": (with_forward(lambda network, y, result: (result["x_hat"],)), "must return"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_forward_that_cannot_be_refined_is_refused(case, x):
    changed, reason = REFUSED[case]
    with pytest.raises(InputError, match=f"^architecture Changed: its forward .*{reason}") as error:
        model = own_model(**changed)
        for _ in range(12):
            true_terms(model, x, model.analyze(x))
    assert "\n" not in str(error.value)


def test_training_polish_and_files_are_refused(x):
    model = own_model()
    with pytest.raises(InputError, match="train it with your own code"):
        type(model).build(4, 4)
    with pytest.raises(InputError, match="files need a walk"):
        model.check_codable()
    walk = model.round(model.analyze(x), torch.round, SIZE)
    with pytest.raises(InputError, match="no rates of other values"):
        _ = walk.rated_by(rounded(model.analyze(x), torch.round)).likelihoods
    with pytest.raises(InputError, match="polish is not available"):
        walk.groups[0].distribution.fixed_at(walk.group_values[0])


class Demanding(Own):
    def __init__(self, width):
        super().__init__()
        self.width = width


class Informed(Demanding):
    @classmethod
    def from_state_dict(cls, weights):
        network = cls(3)
        network.load_state_dict(weights)
        return network


def test_weights_are_loaded_as_the_class_says():
    weights = Own().state_dict()
    for network_class in (Own, Informed):
        family = forwarded_family(network_class)
        loaded = model_from_state_dict(weights, "FILE", family).network
        assert isinstance(loaded, network_class)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, weights[name])
    with pytest.raises(InputError, match="Demanding: its constructor needs arguments"):
        model_from_state_dict(weights, "FILE", forwarded_family(Demanding))
    with pytest.raises(InputError, match="not the weights of Own"):
        model_from_state_dict({"gain": weights["gain"]}, "FILE", forwarded_family(Own))


def test_constants_survive_half_precision():
    stock = MeanScaleHyperprior(4, 6)
    half = {
        name: v.half() if v.is_floating_point() else v for name, v in stock.state_dict().items()
    }
    loaded = model_from_state_dict(half, "FILE", forwarded_family(MeanScaleHyperprior))
    for name in ("entropy_bottleneck.likelihood_lower_bound.bound", "g_a.1.beta_reparam.pedestal"):
        assert torch.equal(loaded.network.get_buffer(name), stock.get_buffer(name))
    assert (loaded.N, loaded.M) == (4, 6)
    assert (own_model().N, own_model().M) == (4, 6)


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture
def own_values(config_values, saved, tmp_path):
    """The JSON values of a refinement with a class of the user's in a file of its own."""
    source = """
        from test_forwarded import Own as Base


        class Mine(Base):
            pass
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(source))
    torch.manual_seed(1)
    return config_values | {
        "architecture": f"{tmp_path / 'mine.py'}:Mine",
        "pretrain": saved(spread(Own()).state_dict()),
        "tot_inference_iterations": 5,
        "eval_freq": 1,
        "tot_batches": 1,
        "batch_size": 3,
    }


def test_a_run_lowers_the_true_loss(own_values, write_config):
    assert run(write_config(own_values)) == 0
    records = read_jsonl(results(own_values) / "images.jsonl")
    assert len(records) == 3
    for record in records:
        assert record["refined"]["true_loss"] < record["base"]["true_loss"]


def test_a_run_refuses_polish_and_files(own_values, write_config, capsys):
    assert run(write_config(own_values | {"polish_passes": 4})) == 2
    assert "polish_passes: must be 0 for Mine" in capsys.readouterr().err
    own_values["save_name"] = "other"
    assert run(write_config(own_values | {"save_bitstreams": True})) == 2
    assert "Mine is refined by its own forward" in capsys.readouterr().err
