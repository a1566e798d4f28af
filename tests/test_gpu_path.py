"""What a GPU would do: the same numbers, few kernels, and no wait for the host."""

import pytest
import skimage
import torch

from config import Channels, Optimizer, RefineConfig, load_config
from conftest import to_x
from experimental_inference_methods import METHODS, Temperature, build_rounding
from fast.pool import Pool
from fast.upsampling import UpsamplingKernel
from models import build_model, freeze
from passes import problem_of, refined
from pretended_gpu import Kernels, PretendedGpu
from refinement.batch import ImageNoise
from refinement.descent import build_optimizer
from rounding.candidates import CandidateSample

pytestmark = pytest.mark.usefixtures("generators_here")

SSL = ("sga_logits_3c", "log_ssl_a_factor_pow")
ID_OF = {"ids": lambda key: "-".join(filter(None, key))}


def kernels_of_a_step(method, images, channels=8):
    """The kernels of a step after the first, on images of 512x768 pixels."""
    model = build_model(Channels(N=channels, M=channels))
    model.network.to("meta")
    with PretendedGpu("meta"):
        freeze(model)
        x = torch.zeros(images, 3, 512, 768, device=model.device)
        problem = problem_of(model, x.contiguous(memory_format=torch.channels_last))
        latents = {name: v.requires_grad_() for name, v in model.analyze(problem.x).items()}
        optimizer = build_optimizer(latents, Optimizer())
        noise = ImageNoise(range(images), problem.x.device)
        rounding = build_rounding(*method, temperature=Temperature(1e-3, 1.0))

        def step():
            optimizer.zero_grad()
            problem.relaxed(latents, noise.rounding(rounding, 1, 1)).loss.sum().backward()
            optimizer.step()

        step()
        with Kernels() as kernels:
            step()
    return kernels


def kernels_of_a_rounding(method, images):
    """The kernels of a rounding and its gradient."""
    rounding = build_rounding(*method, temperature=Temperature(1e-3, 1.0))
    v = torch.zeros(images, 6, 4, 5, device="meta", requires_grad=True)
    with PretendedGpu("meta"), Kernels() as kernels:
        noise = ImageNoise(range(images), v.device)
        noise.rounding(rounding, 1, 1)(v).sum().backward()
    return kernels


def assert_only_noise_differs(two, five):
    """The kernels for five images are those for two, but each image draws its own noise."""
    draws = {name: two.counts[name] for name in ("uniform_", "normal_") if two.counts[name]}
    assert two.counts - five.counts == {}
    assert five.counts - two.counts == {name: 3 * n / 2 for name, n in draws.items()}
    assert two.waits == five.waits == []


@pytest.mark.parametrize("method", sorted(METHODS, key=str), **ID_OF)
def test_a_rounding_has_as_many_kernels_for_any_batch_and_never_waits(method):
    assert_only_noise_differs(*(kernels_of_a_rounding(method, images) for images in (2, 5)))


def test_a_step_has_as_many_kernels_for_any_batch_and_never_waits():
    assert_only_noise_differs(*(kernels_of_a_step(SSL, images) for images in (2, 5)))


@pytest.mark.parametrize("method", [("unoise", None), SSL], **ID_OF)
def test_the_forms_for_a_gpu_refine_as_those_for_a_cpu(model, config_values, write_config, method):
    config = load_config(write_config(config_values), RefineConfig)
    rounding = build_rounding(*method, temperature=Temperature(0.01, 1.0))
    x = torch.cat([to_x(skimage.data.coffee()[100:171, left : left + 80]) for left in (200, 300)])
    on_cpu = refined(problem_of(model, x), config, [11, 12], rounding)
    with PretendedGpu("cpu"):
        on_gpu = refined(problem_of(model, x), config, [11, 12], rounding)
    for ours, expected in zip(on_gpu, on_cpu, strict=True):
        for metric in ("relaxed_loss", "true_loss", "true_psnr"):
            values = ([row[metric] for row in one.rows] for one in (ours, expected))
            assert next(values) == pytest.approx(next(values), rel=1e-3)


def test_what_suits_only_the_caches_of_a_cpu_is_not_used_on_a_gpu(model, monkeypatch):
    def refuse(*_):
        raise AssertionError("for a CPU only")

    monkeypatch.setattr(Pool, "_block_of", refuse)
    monkeypatch.setattr(UpsamplingKernel, "winograd", property(refuse))
    monkeypatch.setattr(CandidateSample, "CHUNK", 0)  # no tensor can be split into such chunks
    kernels_of_a_step(SSL, 1, channels=96)
    wide = UpsamplingKernel(torch.zeros(96, 96, 5, 5), torch.zeros(96), Pool())
    with pytest.raises(AssertionError, match="for a CPU only"):
        wide(torch.zeros(1, 96, 64, 64))
    y = torch.zeros(1, model.M, 4, 4, requires_grad=True)
    with pytest.raises(AssertionError, match="for a CPU only"):
        model.squared_error(y, torch.zeros(1, 3, 64, 64))
    rounding = build_rounding(*SSL, temperature=Temperature(1e-3, 1.0))
    with pytest.raises(RuntimeError, match="split"):
        rounding(y, 0.5)
