"""More channels of y for a trained model."""

import pytest
import torch

from config import Channels
from models import build_model, save_weights
from pretraining.growth import grow_y
from trainings import checkpoint_of


@pytest.fixture
def pair():
    """A model with 12 channels of y, and the same grown to 20."""
    torch.manual_seed(0)
    model = build_model(Channels(N=8, M=12))
    return model.network.eval(), grow_y(model, Channels(N=8, M=20)).network.eval()


@torch.no_grad()
def test_the_old_channels_stay_as_they_were(pair):
    old, new = pair
    x = torch.rand(2, 3, 128, 64)
    y, y_grown = old.g_a(x), new.g_a(x)
    assert y_grown.shape == (2, 20, 8, 4)
    torch.testing.assert_close(y_grown[:, :12], y)
    z = old.h_a(y)
    torch.testing.assert_close(new.h_a(y_grown), z)
    scales, means = old.h_s(z).chunk(2, 1)
    scales_grown, means_grown = new.h_s(z).chunk(2, 1)
    torch.testing.assert_close(scales_grown[:, :12], scales)
    torch.testing.assert_close(means_grown[:, :12], means)
    assert torch.equal(scales_grown[:, 12:], torch.ones(2, 8, 8, 4))
    assert torch.equal(means_grown[:, 12:], torch.zeros(2, 8, 8, 4))
    torch.testing.assert_close(new.entropy_bottleneck(z)[1], old.entropy_bottleneck(z)[1])
    y_grown[:, 12:] = 0
    torch.testing.assert_close(new.g_s(y_grown), old.g_s(y))


@torch.no_grad()
def test_the_new_channels_depend_on_x_and_change_x_hat_a_little(pair):
    old, new = pair
    y = new.g_a(torch.rand(2, 3, 128, 64))
    assert (y[:, 12:].std((0, 2, 3)) > 0).all()
    x_hat, change = old.g_s(y[:, :12]), new.g_s(y) - old.g_s(y[:, :12])
    assert 0 < change.std() < 0.3 * x_hat.std()


@pytest.mark.parametrize(
    ("N", "M", "wrong"),
    [(8, 20, ""), (8, 12, ""), (8, 10, "M = 12 or more"), (12, 20, "same N")],
)
def test_training_goes_on_with_more_channels_but_no_fewer(
    N, M, wrong, train_on, train_values, tmp_path, capsys
):
    small = save_weights(tmp_path / "small.pth.tar", build_model(Channels(N=8, M=12)), 0)
    values = {**train_values, "pretrain": str(small), "channels": {"N": N, "M": M}, "grow_y": True}
    assert train_on(values) == (2 if wrong else 0)
    if wrong:
        assert wrong in capsys.readouterr().err
    else:
        weights = checkpoint_of(values, 8)["model_state_dict"]
        assert weights["g_a.6.weight"].shape == (M, N, 5, 5)


def test_growing_needs_a_model(train_on, train_values, capsys):
    assert train_on(train_values, grow_y=True) == 2
    assert "pretrain names no model" in capsys.readouterr().err
