"""Every architecture against CompressAI's own: rates, pictures, strings, checkpoints, halos."""

import copy

import pytest
import skimage
import torch
import torch.nn.functional as F
from toys import CODED, IN_TURN, NAMES, STOCK, M, N, groups_of, stock_decoding, toy

from architectures import ARCHITECTURES, Checkerboard
from coding.bitstream import BitstreamError, read_bitstream, write_bitstream
from coding.coder import build_coder, decode_latents, decode_picture, encode_latents
from common.errors import InputError
from conftest import needs, refusal_of, to_x
from models import freeze, load_checkpoint, save_weights
from objectives import Problem, RateDistortion
from passes import to_optimise, true_terms

PICTURE = to_x(skimage.data.astronaut()[128:320, 128:256])  # 192x128
SIZE = (192, 128)

every_name = pytest.mark.parametrize("name", NAMES)


def frozen(name):
    return freeze(copy.deepcopy(toy(name)))


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_rates_and_pictures_are_compressais(name):
    """Where `forward` itself is consistent: not y's rate in autoregressive models."""
    stock = toy(name).network(PICTURE)
    bpps = {key: -p.log2().sum() / (192 * 128) for key, p in stock["likelihoods"].items()}
    if name in IN_TURN:
        del bpps["y"]
    close = 1e-5 * stock["x_hat"].abs().max().item()
    for model in (toy(name), frozen(name)):
        latents = model.analyze(PICTURE)
        terms = true_terms(model, PICTURE, latents)
        for key, bpp in bpps.items():
            torch.testing.assert_close(terms.rates[key][0], bpp, rtol=1e-4, atol=0)
        torch.testing.assert_close(terms.x_hat, stock["x_hat"], rtol=0, atol=close)
        symbols = model.symbols(latents, SIZE)
        assert symbols["y"].unique().numel() > 5
        x_hat = model.reconstruct(symbols, SIZE)
        torch.testing.assert_close(x_hat, stock["x_hat"].clamp(0, 1), rtol=0, atol=close)


@pytest.mark.parametrize("name", IN_TURN)
@torch.no_grad()
def test_an_autoregressive_rate_is_that_of_integers_in_their_context(name):
    """By CompressAI's layers at one position after the other."""
    model = toy(name)
    network, latents = model.network, model.analyze(PICTURE)
    terms = true_terms(model, PICTURE, latents)
    y_hat = F.pad(latents["y"].round(), (2, 2, 2, 2))
    z_hat = network.entropy_bottleneck(latents["z"])[0]
    params, bits = network.h_s(z_hat), 0.0
    for row, column in ((row, column) for row in range(12) for column in range(8)):
        seen = y_hat[:, :, row : row + 5, column : column + 5].clone()
        seen[:, :, 2, 2:] = seen[:, :, 3:] = 0
        context = network.context_prediction(seen)[:, :, 2:3, 2:3]
        here = torch.cat((params[:, :, row : row + 1, column : column + 1], context), 1)
        scales, means = network.entropy_parameters(here).chunk(2, 1)
        value = y_hat[:, :, row + 2 : row + 3, column + 2 : column + 3]
        p = network.gaussian_conditional._likelihood(value, scales, means)
        bits -= p.clamp_min(1e-9).log2().sum()
    torch.testing.assert_close(terms.rates["y"][0], bits / (192 * 128), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", CODED)
def test_files_of_any_size_decode_to_the_same_symbols_and_picture(name):
    coder = build_coder(toy(name))
    for height, width in ((192, 128), (71, 81), (16, 33), (100, 32), (17, 5), (1, 1)):
        x = PICTURE[:, :, :height, :width]
        symbols = coder.model.symbols(coder.model.analyze(x), (height, width))
        data = encode_latents(coder, symbols, (height, width))
        assert read_bitstream(data).family == name
        decoded, size = decode_latents(coder, data)
        assert size == (height, width)
        assert all(torch.equal(decoded[key], v) for key, v in symbols.items())
        x_hat = coder.model.reconstruct(symbols, (height, width))
        torch.testing.assert_close(decode_picture(coder, data), x_hat, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in STOCK if name not in IN_TURN])
def test_compressais_own_decoder_reads_the_strings(name):
    coder = build_coder(toy(name))
    symbols = coder.model.symbols(coder.model.analyze(PICTURE), SIZE)
    data = encode_latents(coder, symbols, SIZE)
    stock = stock_decoding(name, coder.model, read_bitstream(data).groups, SIZE)
    torch.testing.assert_close(decode_picture(coder, data), stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CODED)
def test_the_file_is_as_long_as_the_estimate(name):
    coder = build_coder(toy(name))
    latents = coder.model.analyze(PICTURE)
    data = encode_latents(coder, coder.model.symbols(latents, SIZE), SIZE)
    estimate = true_terms(coder.model, PICTURE, latents).bpp.item() * 192 * 128 / 8
    groups = read_bitstream(data).groups
    strings = sum(len(group.string) for group in groups)
    assert 0.95 * estimate - 8 < strings < 1.06 * estimate + 12 * len(groups)


@every_name
def test_the_fast_layers_give_the_plain_gradient(name):
    latents = toy(name).analyze(PICTURE)
    _, plain = _loss_and_gradients(copy.deepcopy(toy(name)), PICTURE, latents)
    _, fast = _loss_and_gradients(frozen(name), PICTURE, latents)
    for key, gradient in plain.items():
        close = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(fast[key], gradient, rtol=0, atol=close)


@every_name
def test_tiles_have_the_halo_that_the_networks_see(name):
    """The gradient of a block of pixels reaches the halo's positions, and none beyond."""
    model = toy(name)
    side, middle = 2 * (model.halo + 3) + 1, model.halo + 3
    y = torch.randn(1, M, side, side, generator=torch.Generator().manual_seed(0))
    y = y.double().requires_grad_()
    x_hat = copy.deepcopy(model.network.g_s).double()(y)
    block = slice(16 * middle, 16 * middle + 16)
    (gradient,) = torch.autograd.grad(x_hat[:, :, block, block].square().sum(), y)
    rows, columns = (gradient[0].abs().sum((0, axis)).nonzero().flatten() for axis in (2, 1))
    reach = max(middle - rows.min(), rows.max() - middle, middle - columns.min())
    assert reach <= model.halo
    assert model.halo - reach <= (1 if model.halo > 2 else 0)


@every_name
@torch.no_grad()
def test_an_encoder_in_tiles_gives_the_whole_pictures_latents(name):
    model = copy.deepcopy(toy(name))
    model.network.double()
    x = to_x(skimage.data.astronaut()[:432, :464]).double()
    whole, tiled = model.analyze(x, tile=1000), model.analyze(x, tile=8)
    for key, v in whole.items():
        torch.testing.assert_close(tiled[key], v, rtol=0, atol=1e-9 * v.abs().max().item())


def _smooth(v):
    return v + 0.1 * torch.sin(3 * v)


def _loss_and_gradients(model, x, latents, tile=None):
    latents = to_optimise(latents)
    terms = Problem(model, x, RateDistortion(0.01), tile).relaxed(latents, _smooth)
    terms.loss.sum().backward()
    return terms.loss.detach(), {key: v.grad for key, v in latents.items()}


@every_name
def test_tiles_give_the_whole_pictures_loss_and_gradient(name):
    model, x = frozen(name), to_x(skimage.data.astronaut()[:400, :330])
    latents = model.analyze(x)
    loss, whole = _loss_and_gradients(model, x, latents)
    tiled_loss, tiled = _loss_and_gradients(model, x, latents, tile=8)
    torch.testing.assert_close(tiled_loss, loss, rtol=1e-5, atol=0)
    for key, gradient in whole.items():
        close = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(tiled[key], gradient, rtol=0, atol=close)


@every_name
def test_images_of_a_batch_do_not_see_each_other(name):
    model, x = frozen(name), torch.cat((PICTURE[:, :, :70, :90], PICTURE[:, :, 100:170, 20:110]))
    loss, both = _loss_and_gradients(model, x, model.analyze(x))
    for index, one in enumerate(x.split(1)):
        loss_alone, alone = _loss_and_gradients(model, one, model.analyze(one))
        torch.testing.assert_close(loss[index : index + 1], loss_alone, rtol=1e-5, atol=0)
        for key, gradient in alone.items():
            close = 1e-4 * gradient.abs().max().item()
            torch.testing.assert_close(both[key][index : index + 1], gradient, rtol=0, atol=close)


# --- checkpoints ----------------------------------------------------------------------------------


@every_name
def test_weights_tell_their_architecture(name, saved):
    """As `compressai/examples/train.py` saves them, by DataParallel too."""
    weights = toy(name).network.state_dict()
    for prefix in ("", "module."):
        state = {prefix + key: value for key, value in weights.items()}
        source = saved({"epoch": 3, "state_dict": state, "loss": 0.5, "optimizer": {"state": {}}})
        model = load_checkpoint(source)
        assert type(model) is ARCHITECTURES[name]
        assert (model.N, model.M) == (N, M)
        assert getattr(model, "groups", None) == (
            groups_of(name) or ([M] if isinstance(model, Checkerboard) else None)
        )
        for key, value in model.network.state_dict().items():
            assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("name", [*IN_TURN, "elic2022-official"])
@torch.no_grad()
def test_a_hash_of_weights_stays_when_a_masked_layer_has_masked_them(name):
    model = copy.deepcopy(toy(name))
    before = model.weights_hash
    parts = [v for key, v in model.network.named_modules() if key.endswith("context_prediction")]
    for part in parts:
        part.weight.fill_(0.5)
    changed = model.weights_hash
    assert changed != before
    for part in parts:
        part(torch.zeros(1, part.in_channels, 4, 4))
        assert (part.weight == 0).any()
    assert model.weights_hash == changed


@pytest.mark.parametrize("name", CODED)
def test_weights_alone_in_half_precision_code_the_same_everywhere(name, tmp_path):
    path = save_weights(tmp_path / "weights.pth.tar", toy(name), 0)
    coders = [build_coder(load_checkpoint(str(path))) for _ in range(2)]
    symbols = coders[0].model.symbols(coders[0].model.analyze(PICTURE), SIZE)
    data = encode_latents(coders[0], symbols, SIZE)
    decoded, _ = decode_latents(coders[1], data)
    assert all(torch.equal(decoded[key], v) for key, v in symbols.items())
    assert load_checkpoint(str(path)).network.state_dict().keys() == (
        toy(name).network.state_dict().keys()
    )


def test_a_checkpoint_of_another_architecture_is_named(saved):
    source = saved(toy("mbt2018").network.state_dict())
    with pytest.raises(
        InputError, match=r"not the weights of mbt2018-mean \(they are of mbt2018\)"
    ):
        load_checkpoint(source, architecture="mbt2018-mean")
    with pytest.raises(
        InputError, match=r"architecture mbt2019: did you mean mbt2018\? It must be"
    ):
        load_checkpoint(source, architecture="mbt2019")
    weights = toy("elic2022-official").network.state_dict()
    del weights["g_s.1.weight"]
    assert "closest is elic2022-official (no g_s.1.weight)" in refusal_of(saved(weights))


# --- damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mbt2018", marks=needs("constriction")),
        "elic2022-official", "bmshj2018-factorized",
    ],
)  # fmt: skip
def test_forged_strings_are_refused(name):
    """Under right checksums of the file; only the symbols' own checksum is not forged."""
    coder = build_coder(toy(name))
    symbols = coder.model.symbols(coder.model.analyze(PICTURE), SIZE)
    whole = read_bitstream(encode_latents(coder, symbols, SIZE))
    string = whole.groups[-1].string
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(256, (len(string),), generator=generator).tolist())
    forged = [
        b"", string[:-4], string[: len(string) // 2], string + b"\0" * 4, string + b"abc",
        b"\xff" * len(string), bytes(len(string)), noise, string[:8] + noise[8:],
        noise[:8] + string[8:], string[:4] + b"\xff\xff\xff\x7f" + string[8:],
    ]  # fmt: skip
    groups = [(*whole.groups[:-1], whole.groups[-1]._replace(string=other)) for other in forged]
    groups += [whole.groups[:-1], (*whole.groups, whole.groups[-1])]
    refused = 0
    for changed in groups:
        data = write_bitstream(whole._replace(groups=changed))
        try:  # a coder may not need the last bytes of a string, or not see bytes after it
            decoded, _ = decode_latents(coder, data)
            assert all(torch.equal(decoded[key], v) for key, v in symbols.items())
        except BitstreamError:
            refused += 1
    assert refused >= len(groups) - 3
    exceptions = whole.groups[-1]._replace(exceptions=b"\xfe\xff\xff\x7f")
    if name != "mbt2018":  # whose y has no tables
        with pytest.raises(BitstreamError, match="outside the picture"):
            decode_latents(
                coder, write_bitstream(whole._replace(groups=(*whole.groups[:-1], exceptions)))
            )


@needs("constriction")
def test_files_of_another_architecture_are_named():
    coders = [build_coder(toy(name)) for name in ("mbt2018", "mbt2018-mean")]
    symbols = coders[0].model.symbols(coders[0].model.analyze(PICTURE), SIZE)
    data = encode_latents(coders[0], symbols, SIZE)
    with pytest.raises(BitstreamError, match="a model of mbt2018; these weights are of mbt2018-m"):
        decode_latents(coders[1], data)


@needs("constriction")
def test_symbols_too_far_apart_for_the_range_coder_are_refused():
    coder = build_coder(toy("mbt2018"))
    symbols = coder.model.symbols(coder.model.analyze(PICTURE), SIZE)
    for far in (30_000, 2**21):
        symbols["y"][0, 0, 0, 0], symbols["y"][0, 0, 0, 1] = far, -far
        if far < 2**21:
            decoded, _ = decode_latents(coder, encode_latents(coder, symbols, SIZE))
            assert torch.equal(decoded["y"], symbols["y"])
        else:
            with pytest.raises(BitstreamError, match="too far apart"):
                encode_latents(coder, symbols, SIZE)
