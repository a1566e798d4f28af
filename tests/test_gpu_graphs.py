"""CUDA graphs without a GPU: a recorded step does what the step itself does."""

import json
from dataclasses import replace

import pytest
import skimage
import torch

from common.errors import InputError
from config import RefineConfig, load_config
from conftest import to_x
from experimental_inference_methods import METHODS, Rounding, Temperature, build_rounding
from passes import problem_of, refined
from pretended_gpu import PretendedGpu, RecordedGraph
from refinement.graph import WARM_UPS, pick_cuda_graphs
from runs import run

ID_OF = {"ids": lambda key: "-".join(filter(None, key))}
SSL = ("sga_logits_3c", "log_ssl_a_factor_pow")


@pytest.mark.parametrize("method", [("temp_uste", None), ("soft_round_knoise", None), SSL], **ID_OF)
@pytest.mark.usefixtures("generators_here")
def test_a_recorded_step_does_what_the_step_does(
    model, config_values, write_config, monkeypatch, method
):
    """Temperature, learning rate and noise change from step to step; recorded numbers do not."""
    config_values |= {"tot_inference_iterations": 8, "eval_freq": 3}
    config_values["dev_options"]["temp_rate"] = 0.1
    config_values["optimizer"]["schedule"] = "cosine"
    path = write_config(config_values)
    graphs = []

    def recorded(*arguments):
        graphs.append(RecordedGraph(*arguments))
        return graphs[-1]

    monkeypatch.setattr("refinement.graph.CudaGraph", recorded)
    rounding = build_rounding(*method, temperature=Temperature(0.1, 1.0))
    x = torch.cat([to_x(skimage.data.coffee()[100:148, left : left + 64]) for left in (200, 300)])
    rows, shown = {}, {False: [], True: []}
    for graph in shown:
        config = load_config(path, RefineConfig, [f"cuda_graphs={json.dumps(graph)}"])

        def note(relaxed_loss, _, losses=shown[graph]):
            losses.append(relaxed_loss)

        with PretendedGpu("cpu"):
            trajectories = refined(problem_of(model, x), config, [11, 12], rounding, note)
        rows[graph] = [row for one in trajectories for row in one.rows]
    (graph,) = graphs
    assert (graph.warm_ups, graph.replays) == (WARM_UPS, 8 - WARM_UPS)
    for ours, expected in zip(rows[True], rows[False], strict=True):
        for key in ("relaxed_loss", "relaxed_bpp_z", "true_loss", "true_psnr"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-5)
    # Nobody keeps a tensor that the next step overwrites.
    ours, expected = ([loss.item() for loss in losses] for losses in (shown[True], shown[False]))
    assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS, key=str), **ID_OF)
@pytest.mark.parametrize("tau", [0.0, 1e-6, 0.3, 1.0])
def test_a_temperature_may_be_a_tensor(method, tau):
    rounding = build_rounding(*method, temperature=Temperature(0.1, 1.0))
    assert rounding.takes_tensors
    v = torch.linspace(-1.7, 1.8, 60).reshape(1, 3, 4, 5)
    results = []
    for value in (tau, torch.tensor(tau, dtype=torch.float64)):
        leaf = v.clone().requires_grad_()
        v_hat = rounding(leaf, value, torch.Generator().manual_seed(1))
        v_hat.sum().backward()
        results.append((v_hat.detach(), leaf.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_method_that_reads_its_temperature_is_refused_for_graphs(config_values, write_config):
    def cautious(v, tau, source):
        return v + tau if tau > 0.5 else v

    path, gpu = write_config(config_values), torch.device("cuda")
    config = load_config(path, RefineConfig, ["cuda_graphs=true"])
    rounding = Rounding("cautious", None, {}, Temperature(0.1, 1.0), cautious)
    with pytest.raises(InputError, match="cuda_graphs is true, but cautious reads the number"):
        pick_cuda_graphs(config, rounding, gpu)
    # With auto it is refined without graphs.
    config = load_config(path, RefineConfig, ["cuda_graphs=auto"])
    assert not pick_cuda_graphs(config, rounding, gpu)
    assert pick_cuda_graphs(config, replace(rounding, sample=lambda v, tau, source: v + tau), gpu)
    assert not pick_cuda_graphs(config, rounding, torch.device("cpu"))


def test_graphs_need_a_gpu(config_values, write_config, capsys):
    assert run(write_config(config_values), "cuda_graphs=true", "device=cpu") == 2
    assert capsys.readouterr().err == (
        "error: cuda_graphs is true, but device is cpu: it needs a GPU\n"
    )
