"""A trained model's inner layers under new channels of y."""

import pytest
import torch

from config import Channels
from models import build_model, save_weights
from pretraining.new_y import with_new_y
from trainings import checkpoint_of

CHANNELS = {"N": 8, "M": 12}


@pytest.fixture
def trained():
    torch.manual_seed(0)
    return build_model(Channels(**CHANNELS))


@pytest.mark.parametrize("M", [20, 12, 10])
@torch.no_grad()
def test_the_inner_layers_stay_and_the_layers_at_y_are_new(trained, M):
    model = with_new_y(trained, Channels(N=8, M=M))
    old, new = trained.network.eval(), model.network.eval()
    x = torch.rand(2, 3, 128, 64)
    features = old.g_a[:6](x)
    assert torch.equal(new.g_a[:6](x), features)
    assert torch.equal(new.g_s[1:](features), old.g_s[1:](features))
    y = new.g_a(x)
    assert y.shape == (2, M, 8, 4)
    z = new.h_a(y)
    assert torch.equal(new.entropy_bottleneck(z)[1], old.entropy_bottleneck(z)[1])
    assert new.h_s(z).shape == (2, 2 * M, 8, 4)
    if M == 12:
        assert not torch.equal(y, old.g_a(x))
        assert not torch.equal(new.g_s(y), old.g_s(y))
        assert not torch.equal(new.h_s(z), old.h_s(z))


@torch.no_grad()
def test_y_is_four_times_as_large_as_that_of_an_untrained_layer(trained):
    torch.manual_seed(5)
    renewed = with_new_y(trained, Channels(N=8, M=64)).network
    torch.manual_seed(5)
    fresh = build_model(Channels(N=8, M=64)).network
    for layer, other in ((renewed.g_a[6], fresh.g_a[6]), (renewed.g_s[0], fresh.g_s[0])):
        assert torch.equal(layer.weight, 4 * other.weight)
    assert torch.equal(renewed.h_s[4].weight, fresh.h_s[4].weight)


@pytest.mark.parametrize(
    ("N", "M", "error"), [(8, 20, ""), (12, 20, "has N = 8; with new_y, channels may ask")]
)
def test_training_goes_on_with_another_m(
    N, M, error, trained, train_on, train_values, tmp_path, capsys
):
    small = save_weights(tmp_path / "small.pth.tar", trained, 0)
    values = {**train_values, "pretrain": str(small), "channels": {"N": N, "M": M}, "new_y": True}
    assert train_on(values) == (2 if error else 0)
    if error:
        assert error in capsys.readouterr().err
    else:
        weights = checkpoint_of(values, 8)["model_state_dict"]
        assert weights["g_a.6.weight"].shape == (M, N, 5, 5)


def test_layers_need_a_model_to_come_from(train_on, train_values, capsys):
    assert train_on(train_values, new_y=True) == 2
    assert "pretrain names no model" in capsys.readouterr().err
