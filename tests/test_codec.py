"""Files: that they decode exactly, with CompressAI too, and that nothing else is taken for one."""

import bisect
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import skimage
import torch
from compressai.entropy_models import EntropyModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from architectures.distributions import Gaussians
from codec import compress_picture, main
from coding.bitstream import (
    LAYOUT,
    BitstreamError,
    CodedGroup,
    read_bitstream,
    write_bitstream,
)
from coding.coder import build_coder, decode_latents, decode_picture, encode_latents
from coding.strings import decode
from common.errors import InputError
from config import Channels
from conftest import ROOT, WEIGHTS, to_x
from models import build_model, freeze, load_checkpoint, save_weights


def symbols_of(model, x):
    return model.symbols(model.analyze(x), tuple(x.shape[2:]))


def assert_equal(decoded, symbols):
    assert decoded.keys() == symbols.keys()
    for name, integers in symbols.items():
        assert torch.equal(decoded[name], integers), name


CHECKSUM = slice(24, 28)  # where it stands in a file


def resigned(data):
    """The file with a right checksum of its bytes, as one who wants to deceive would write it."""
    unsigned = data[: CHECKSUM.start] + bytes(4) + data[CHECKSUM.stop :]
    signature = struct.pack("<I", zlib.crc32(unsigned))
    return data[: CHECKSUM.start] + signature + data[CHECKSUM.stop :]


def with_strings(data, *groups):
    """The file with other groups, each a string and its exceptions, and with a right checksum."""
    return write_bitstream(
        read_bitstream(data)._replace(groups=tuple(CodedGroup(*group) for group in groups))
    )


# --- what is written comes back -------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (128, 192), (192, 64)])
def test_compressai_decodes_multiples_of_64_to_the_same_picture(coder, size):
    x = to_x(skimage.data.astronaut()[: size[0], 100 : 100 + size[1]])
    data, _ = compress_picture(coder, x)
    z, y = read_bitstream(data).groups
    stock = load_checkpoint(str(WEIGHTS)).network
    stock.update()  # builds what the checkpoint lacks: other tables of z could not read the file
    with torch.no_grad():
        theirs = stock.decompress([[y.string], [z.string]], (size[0] // 64, size[1] // 64))
    assert torch.equal(theirs["x_hat"], decode_picture(coder, data))


def _channels_last(v):
    """The same values with the strides of channels-last memory, also for sides of 1."""
    return v.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize(("photo", "size"), [("astronaut", (512, 512)), ("coffee", (384, 576))])
def test_the_memory_format_of_latents_changes_no_file(coder, photo, size):
    """A network in channels-last memory gives such latents; h_s of them has other last bits."""
    x = to_x(getattr(skimage.data, photo)()[: size[0], : size[1]])
    symbols = {name: v.contiguous() for name, v in symbols_of(coder.model, x).items()}
    strided = {name: _channels_last(v) for name, v in symbols.items()}
    assert encode_latents(coder, symbols, size) == encode_latents(coder, strided, size)


def test_compressai_s_own_strings_are_the_ones_in_the_file(coder):
    x = to_x(skimage.data.coffee()[:128, :128])
    data, _ = compress_picture(coder, x)
    z, y = read_bitstream(data).groups
    with torch.no_grad():
        strings = coder.model.network.compress(x)["strings"]
    assert strings == [[y.string], [z.string]]


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 140),
    width=st.integers(1, 140),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.2, 2.0, 40.0, 4000.0]),
)
def test_any_integers_of_any_size_come_back(coder, height, width, seed, spread):
    """Symbols far outside the tables too, which the coder escapes."""
    generator = torch.Generator().manual_seed(seed)
    symbols = {
        name: (torch.randn(shape, generator=generator) * spread).round().int()
        for name, shape in {
            "y": (1, coder.model.M, -(-height // 16), -(-width // 16)),
            "z": (1, coder.model.N, -(-height // 64), -(-width // 64)),
        }.items()
    }
    data = encode_latents(coder, symbols, (height, width))
    decoded, size = decode_latents(coder, data)
    assert size == (height, width)
    assert_equal(decoded, symbols)
    again = encode_latents(coder, decoded, size)
    assert again == data


def test_the_file_s_picture_is_that_of_its_latents(coder, model):
    """The frozen model, whose GDN sums in another order, agrees to float rounding."""
    x = to_x(skimage.data.chelsea()[:77, :93])
    latents, network = model.analyze(x), model.network
    symbols = model.symbols(latents, (77, 93))
    x_hat = decode_picture(coder, encode_latents(coder, symbols, (77, 93)))
    assert x_hat.shape == x.shape
    torch.testing.assert_close(x_hat, model.reconstruct(symbols, (77, 93)), atol=1e-5, rtol=0)
    y = latents["y"]
    z_hat = symbols["z"] + network.entropy_bottleneck.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
    _, means = network.h_s(z_hat)[:, :, : y.size(2), : y.size(3)].chunk(2, 1)
    plain = network.g_s((y - means).round() + means)[:, :, :77, :93].clamp(0, 1)
    torch.testing.assert_close(x_hat, plain, atol=1e-5, rtol=0)


def test_a_file_costs_what_the_model_estimates(coder):
    """Under 1 % and the header more, on a picture of 24 000 bits."""
    data, measures = compress_picture(coder, to_x(skimage.data.astronaut()[100:356, 100:356]))
    estimate = measures["estimate"] * 256 * 256
    assert estimate < 8 * len(data) < 1.01 * estimate + 8 * LAYOUT.size
    assert LAYOUT.size < 40
    assert measures["file_bpp"] == 8 * len(data) / 256**2


def test_other_arithmetic_decodes_to_the_same_symbols(coder, monkeypatch):
    """A scale on the edge between two tables, which float32 sees on the other side of it."""
    x = to_x(skimage.data.astronaut()[:128, :128])
    symbols = symbols_of(coder.model, x)
    honest = Gaussians.indexes
    odd = torch.zeros_like(symbols["y"])
    odd[0, 3, 2, 1], odd[0, 3, 2, 2], odd[0, 63, 7, 7], odd[0, 0, 0, 0] = 1, -1, -2, 1

    def elsewhere(gaussians, shape):
        indexes = honest(gaussians, shape)
        return (indexes + odd).clamp(0, 63) if gaussians.scales.dtype == torch.float64 else indexes

    monkeypatch.setattr(Gaussians, "indexes", elsewhere)
    data = encode_latents(coder, symbols, (128, 128))
    z, y = read_bitstream(data).groups
    assert not z.exceptions
    assert len(y.exceptions) in range(4, 12)
    decoded, _ = decode_latents(coder, data)
    assert_equal(decoded, symbols)
    monkeypatch.setattr(Gaussians, "indexes", honest)
    with pytest.raises(BitstreamError, match=r"symbols that were coded|no sense"):
        decode_latents(coder, data)


def test_another_processor_decodes_the_same_symbols(tmp_path):
    """Instruction sets of oneDNN and ATen, and the number of threads, stand for it."""
    source = tmp_path / "a.png"
    Image.fromarray(skimage.data.chelsea()[:130, :200]).save(source)
    old = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "3"}

    weights = ["--checkpoint", str(WEIGHTS)]
    assert main(["compress", str(source), "-o", str(tmp_path / "new"), *weights]) == 0
    command = ["decompress", str(tmp_path / "new"), "-o", str(tmp_path / "decoded"), *weights]
    subprocess.run([sys.executable, "codec.py", *command], cwd=ROOT, env=os.environ | old,
                   check=True)  # fmt: skip
    ours = decode_picture(
        build_coder(load_checkpoint(str(WEIGHTS))), (tmp_path / "new/a.png.olc").read_bytes()
    )
    theirs = np.asarray(Image.open(tmp_path / "decoded/a.png")).astype(int)
    difference = np.abs(theirs - (ours[0] * 255).round().permute(1, 2, 0).numpy())
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_weights_that_hold_tables_give_the_tables_that_they_hold(coder, tmp_path):
    """Those that CompressAI computes on this machine, if `save_weights` wrote them here."""
    model, stock = load_checkpoint(str(WEIGHTS)), load_checkpoint(str(WEIGHTS))
    stock.network.update(force=True)
    save_weights(tmp_path / "again.pth.tar", model, 0)
    again = build_coder(load_checkpoint(str(tmp_path / "again.pth.tar")))
    assert (again.tables, again.weights) == (build_coder(stock).tables, coder.weights)
    held, used = (v.network.entropy_bottleneck for v in (model, coder.model))
    assert held._quantized_cdf.numel() > 0
    assert torch.equal(held._quantized_cdf, used._quantized_cdf)
    assert build_coder(model).tables == coder.tables
    cdf = model.network.entropy_bottleneck._quantized_cdf
    cdf[0, cdf[0].diff().argmax()] += 1  # the likeliest symbol's interval begins one later
    assert build_coder(model).tables != coder.tables


# --- what is not a file of these weights is refused -----------------------------------------------


@settings(deadline=None, max_examples=3000)
@given(st.data())
def test_no_mutation_gets_through(coder, small_file, data):
    """Bits flipped, bytes cut, put in, overwritten, repeated: refused, or the same symbols."""
    original, symbols = small_file
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "write", "drop", "repeat"])):
            case "flip" if at < len(mutated):
                mutated[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del mutated[at:]
            case "insert":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "write":
                mutated[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
            case "drop":
                del mutated[at : at + 5]
            case "repeat":
                mutated[at:at] = mutated[at : at + 20]
    _refused_or_same(coder, bytes(mutated), original, symbols)


@settings(deadline=None, max_examples=1500)
@given(st.data())
def test_no_forgery_crashes(coder, small_file, data):
    """The same with a right checksum, so that the decoders behind it meet the nonsense."""
    original, symbols = small_file
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        start, end = st.integers(4, CHECKSUM.start - 1), st.integers(CHECKSUM.stop, LAYOUT.size + 8)
        at = data.draw(start | end | st.integers(LAYOUT.size, len(mutated) - 1))
        mutated[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del mutated[data.draw(st.integers(LAYOUT.size, len(mutated))) :]
    _refused_or_same(coder, resigned(bytes(mutated)), original, symbols)


def _refused_or_same(coder, mutated, original, symbols):
    try:
        decoded, size = decode_latents(coder, mutated)
    except BitstreamError as error:
        assert len(str(error).splitlines()) == 1
    else:
        # A forger may change what no symbol depends on: bits behind the end of a string.
        assert size == (50, 70)
        assert_equal(decoded, symbols)


def _escape_that_counts_on(entropy_model, table):
    """The coder's first state, from which it decodes an escape and then only nibbles of 15."""
    length = entropy_model.cdf_length[table]
    start, end = entropy_model.quantized_cdf[table, length - 2 : length].tolist()
    high, low = divmod((1 << 46) - 1, end - start)
    return struct.pack("<Q", high << 16 | start + low)


@pytest.mark.parametrize("where", ["z", "y"])
def test_an_escape_without_end_is_refused(coder, small_file, where):
    """CompressAI's decoder would read fifteen nibbles for each one of it, behind the string."""
    data, symbols = small_file
    network, tail = coder.model.network, b"\xff" * 1_000_000
    if where == "z":
        forged = _escape_that_counts_on(network.entropy_bottleneck, 0) + tail
        # the second one is short enough for its picture
        files = [with_strings(data, (string,), (b"",)) for string in (forged, forged[:300])]
    else:
        gaussians = coder.exact.place(symbols, (50, 70)).groups[-1].distribution
        first = gaussians.indexes(symbols["y"].shape).flatten()[0].item()
        forged = _escape_that_counts_on(network.gaussian_conditional, first) + tail
        files = [with_strings(data, read_bitstream(data).groups[0], (forged,))]
    for file in files:
        with pytest.raises(BitstreamError, match="no encoder writes such a string"):
            decode_latents(coder, file)


def test_the_coder_stays_in_its_padding_behind_any_end(coder, monkeypatch):
    """Symbols decoded of zeros alone, behind every kind of end: fewer words than are put there.

    A second writing of the decoder, which counts what it reads.
    """
    padded, indexes = [], torch.zeros(1, 64, 5, 1, dtype=torch.int32)

    def noted(entropy_model, strings, indexes, dtype):
        padded.extend(strings)
        return indexes

    monkeypatch.setattr(EntropyModel, "decompress", noted)
    decode(coder.model.network.gaussian_conditional, b"", indexes)
    words, read = len(padded[0]) // 4, []
    generator = np.random.default_rng(0)
    conditional = coder.model.network.gaussian_conditional
    for table in (0, 20, 63):
        row = conditional.quantized_cdf[table, : conditional.cdf_length[table]].tolist()
        for _ in range(20):
            state = int(generator.integers(1 << 31, 1 << 62))
            read.append(_words_read(row, state, count=indexes.numel()))
    assert 0 < max(read) <= words


def _words_read(cdf, state, count):
    words = 0

    def advance(state, words):
        return (state << 32, words + 1) if state < 1 << 31 else (state, words)

    for _ in range(count):
        value = bisect.bisect_right(cdf, state & 0xFFFF) - 1
        start, frequency = cdf[value], cdf[value + 1] - cdf[value]
        state = frequency * (state >> 16) + (state & 0xFFFF) - start
        state, words = advance(state, words)
        if value == len(cdf) - 2:
            nibbles = 0
            while True:
                nibble, state = state & 15, state >> 4
                state, words = advance(state, words)
                nibbles += nibble
                if nibble < 15:
                    break
            for _ in range(nibbles):
                state, words = advance(state >> 4, words)
    return words


def test_every_single_bit_counts(coder, small_file):
    original, _ = small_file
    for position in range(8 * len(original)):
        flipped = bytearray(original)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(BitstreamError):
            read_bitstream(bytes(flipped))


@pytest.mark.parametrize("length", [0, 1, 3, 37, 38, 100, -1])
def test_a_truncated_file_is_called_so(coder, small_file, length):
    with pytest.raises(BitstreamError, match=r"truncated|no file of this codec"):
        decode_latents(coder, small_file[0][:length])


def test_other_weights_are_refused(small_file):
    other = load_checkpoint(str(WEIGHTS))
    with torch.no_grad():
        next(other.network.g_s.parameters())[0] *= 1.01
    with pytest.raises(BitstreamError, match="made with other weights"):
        decode_latents(build_coder(other), small_file[0])


def test_exceptions_that_lead_outside_are_refused(coder, small_file):
    z, y = read_bitstream(small_file[0]).groups
    for exceptions in (b"\xff\xff\xff\xff\xff\x7f", b"\x80", b"\x00" * 200):
        for groups in ((z, (y.string, exceptions)), ((z.string, exceptions), y)):
            with pytest.raises(BitstreamError, match="exception"):
                decode_latents(coder, with_strings(small_file[0], *groups))


def test_what_cannot_be_coded_is_refused(coder, small_file):
    _, symbols = small_file
    with pytest.raises(ValueError, match="latents of shapes"):
        encode_latents(coder, symbols, (50, 90))
    with pytest.raises(ValueError, match="latents of floats"):
        encode_latents(coder, {name: v.float() for name, v in symbols.items()}, (50, 70))
    for value in (2**31 - 1, -(2**31), 2**24):  # CompressAI's coder would run for ever
        huge = symbols | {"y": symbols["y"].clone()}
        huge["y"][0, 0, 0, 0] = value
        with pytest.raises(BitstreamError, match="symbols beyond"):
            encode_latents(coder, huge, (50, 70))
    with pytest.raises(ValueError, match="before freezing"):
        build_coder(freeze(build_model(Channels(N=8, M=8))))


def _lengthen(net):
    net.entropy_bottleneck._cdf_length[3] = 10_000


def _drop_rows(net):
    for name in ("_quantized_cdf", "_cdf_length", "_offset"):
        setattr(net.entropy_bottleneck, name, getattr(net.entropy_bottleneck, name)[:10])


def _drop_scales(net):
    net.update()
    net.gaussian_conditional.scale_table = net.gaussian_conditional.scale_table[:32]


def _flatten_scales(net):
    net.update()
    net.gaussian_conditional.scale_table.fill_(1.0)


def _shift(net):
    net.entropy_bottleneck._offset[0] = 2**30


@pytest.mark.parametrize("damage", [_lengthen, _drop_rows, _drop_scales, _flatten_scales, _shift])
def test_broken_tables_are_refused(damage):
    """With which CompressAI's coder crashes, hangs, or codes nonsense."""
    model = load_checkpoint(str(WEIGHTS))
    damage(model.network)
    with pytest.raises(InputError, match="broken: save it without"):
        build_coder(model)
