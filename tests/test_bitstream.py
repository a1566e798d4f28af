"""The layout of files, by a second writing of it here; forged files, also of version 1."""

import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coding.bitstream import (
    Bitstream,
    BitstreamError,
    CodedGroup,
    read_bitstream,
    read_file,
    write_bitstream,
)
from coding.coder import decode_latents, decode_picture, encode_latents

REFERENCE = Path(__file__).parent / "reference"
# Field, its type, and where it begins; the rest of a file follows.
VERSION_2 = {
    "magic": "3s", "version": "B", "height": "I", "width": "I", "weights": "4s", "tables": "I",
    "symbols": "I", "file": "I", "family": "B", "groups": "B",
}  # fmt: skip
VERSION_1 = {
    "magic": "3s", "version": "B", "height": "I", "width": "I", "N": "H", "M": "H",
    "weights": "4s", "tables": "I", "z_bytes": "I", "exception_bytes": "H", "symbols": "I",
    "file": "I",
}  # fmt: skip


def pack(fields, values, body):
    """A file of these values and this body, with a right checksum."""
    form = "<" + "".join(fields.values())
    unsigned = struct.pack(form, *({**values, "file": 0}[name] for name in fields)) + body
    signed = {**values, "file": zlib.crc32(unsigned)}
    return struct.pack(form, *(signed[name] for name in fields)) + body


def unpack(fields, data):
    """The values of the fields, and the body."""
    form = "<" + "".join(fields.values())
    values = struct.unpack_from(form, data)
    return dict(zip(fields, values, strict=True)), data[struct.calcsize(form) :]


def varint(value):
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def body_of(strings, name=None, adaptation=b""):
    """The body of version 2: a name if there is one, all lengths, all strings, an adaptation."""
    start = b"" if name is None else varint(len(name)) + name
    strings = [*strings, adaptation] if adaptation else strings
    return start + b"".join(map(varint, map(len, strings))) + b"".join(strings)


def strings_in(body, groups):
    """The strings in the body of version 2; each of these lengths has one or two bytes."""
    lengths = []
    for _ in range(2 * groups):
        more = body[0] >> 7
        lengths.append(body[0] & 127 | (body[1] << 7 if more else 0))
        body = body[1 + more :]
    ends = [0, *itertools.accumulate(lengths)]
    return [body[start:end] for start, end in itertools.pairwise(ends)]


@pytest.fixture(scope="module")
def parts(small_file):
    """The fields of a file of version 2, and its strings: of z and y, each with exceptions."""
    values, body = unpack(VERSION_2, small_file[0])
    return values, strings_in(body, values["groups"])


@pytest.fixture(scope="module")
def old_parts():
    """The fields of the file of version 1, and its body."""
    return unpack(VERSION_1, (REFERENCE / "version1.olc").read_bytes())


# --- version 2 ------------------------------------------------------------------------------------


def test_a_file_is_what_the_second_writing_makes_of_it(coder, small_file, parts):
    values, strings = parts
    assert {name: values[name] for name in ("magic", "version", "height", "width")} == {
        "magic": b"OLC", "version": 2, "height": 50, "width": 70
    }  # fmt: skip
    assert (values["family"], values["groups"]) == (0, 2)
    assert (values["weights"].hex(), values["tables"]) == (coder.weights.hex(), coder.tables)
    data, symbols = small_file
    assert pack(VERSION_2, values, body_of(strings)) == data
    checksum = zlib.crc32(struct.pack("<2i", 50, 70))
    for name in ("z", "y"):
        checksum = zlib.crc32(symbols[name].numpy().astype("<i4").tobytes(), checksum)
    assert values["symbols"] == checksum
    read = read_bitstream(data)
    assert [*itertools.chain(*read.groups)] == strings
    assert (read.family, read.version, read.size) == ("mbt2018-mean", 2, (50, 70))


# The numbers of the families in files, which must never change.
FAMILIES = {
    0: "mbt2018-mean", 1: "bmshj2018-factorized", 2: "bmshj2018-factorized-relu",
    3: "bmshj2018-hyperprior", 4: "mbt2018", 5: "cheng2020-anchor", 6: "cheng2020-attn",
    7: "cheng2020-anchor-checkerboard", 8: "elic2022-official", 9: "elic2022-chandelier",
}  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(
    strings=st.lists(st.binary(max_size=40) | st.just(b"a" * 20_000), max_size=12),
    family=st.sampled_from([*FAMILIES.values(), "own", "ä" * 70]),
    numbers=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    size=st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    adaptation=st.just(b"") | st.binary(max_size=300),
)
def test_what_is_written_is_read_by_both(strings, family, numbers, size, adaptation):
    """A file without an adaptation is as it was before there were any."""
    groups = tuple(itertools.starmap(CodedGroup, zip(strings[::2], strings[1::2], strict=False)))
    bitstream = Bitstream(*size, family, b"abcd", *numbers, groups, adaptation=adaptation)
    data = write_bitstream(bitstream)
    assert read_bitstream(data) == bitstream
    known = {name: number for number, name in FAMILIES.items()}
    number = known.get(family, 255)
    if adaptation:
        number = known[family] + 128 if family in known else 254
    values = {
        "magic": b"OLC", "version": 2, "height": size[0], "width": size[1], "weights": b"abcd",
        "tables": numbers[0], "symbols": numbers[1], "family": number,
        "groups": len(groups),
    }  # fmt: skip
    name = None if family in known else family.encode()
    body = body_of([*itertools.chain(*groups)], name, adaptation)
    assert data == pack(VERSION_2, values, body)


def test_more_groups_than_a_byte_counts_are_not_written():
    most = Bitstream(1, 1, "mbt2018", b"abcd", 1, 2, (CodedGroup(b"a"),) * 255)
    assert read_bitstream(write_bitstream(most)) == most
    with pytest.raises(BitstreamError, match="256 groups: a file has 255 at most"):
        write_bitstream(most._replace(groups=(CodedGroup(b"a"),) * 256))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", b"OLD", "no file of this codec"),
        ("version", 0, "version 0: this code reads versions 1 and 2"),
        ("version", 3, "version 3: this code reads versions 1 and 2"),
        ("height", 0, "70x0 pixels"),
        ("height", 2**32 - 1, "70x4294967295 pixels"),
        ("width", 50_000, "cannot be in"),  # 2.5 million pixels in some 20 bytes of z
        ("weights", b"abcd", "other weights"),
        ("tables", 1, "other coding tables"),
        ("symbols", 7, "does not decode to the symbols"),
        ("family", 4, "made with a model of mbt2018; these weights are of mbt2018-mean"),
        ("family", 10, "of family 10, which this code does not know"),
        ("family", 127, "of family 127, which this code does not know"),
        ("family", 138, "of family 138, which this code does not know"),
        ("family", 253, "of family 253, which this code does not know"),
        ("family", 128, "strings of|make no sense"),  # a byte of a string as a length
        ("groups", 1, "bytes more than its strings have|strings of"),
        ("groups", 255, "strings of|make no sense"),
    ],
)
def test_a_forged_header_is_refused(coder, parts, field, value, message):
    values, strings = parts
    with pytest.raises(BitstreamError, match=message):
        decode_latents(coder, pack(VERSION_2, {**values, field: value}, body_of(strings)))


def test_a_wrong_checksum_is_refused(coder, small_file):
    data = bytearray(small_file[0])
    data[24] ^= 1  # the first byte of the checksum
    with pytest.raises(BitstreamError, match="checksum does not match"):
        decode_latents(coder, bytes(data))


@pytest.mark.parametrize("count", [0, 1, 3, 255])
def test_too_few_or_too_many_groups_are_refused(coder, parts, count):
    """Whole groups, whose lengths are right."""
    values, strings = parts
    forged = (strings + [b""] * 2 * 255)[: 2 * count]
    message = "not enough" if count < 2 else f"it has {count} groups, too many"
    with pytest.raises(BitstreamError, match=message):
        decode_latents(coder, pack(VERSION_2, {**values, "groups": count}, body_of(forged)))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("length", [2**14, 2**28, 2**35 - 1])
def test_lengths_beyond_the_body_are_refused(coder, parts, which, length):
    values, strings = parts
    lengths = [varint(length if index == which else len(s)) for index, s in enumerate(strings)]
    body = b"".join(lengths + strings)
    with pytest.raises(BitstreamError, match="strings of"):
        decode_latents(coder, pack(VERSION_2, values, body))


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"\xff" * 9, "lengths make no sense"), (b"\x80" * 5, "sense"), (b"\x80" * 4, "strings of 1")],
)
def test_a_length_that_does_not_end_is_refused(coder, parts, start, message):
    with pytest.raises(BitstreamError, match=message):
        decode_latents(coder, pack(VERSION_2, {**parts[0]}, start))


def test_bytes_behind_the_strings_are_refused(coder, parts):
    values, strings = parts
    for tail in (b"\0", b"a" * 3000):
        with pytest.raises(BitstreamError, match=f"damaged: {len(tail)} bytes more than its"):
            decode_latents(coder, pack(VERSION_2, values, body_of(strings) + tail))


@pytest.mark.parametrize(("family", "name"), [(128, None), (254, b"my family")])
def test_an_adaptation_of_another_length_is_refused(parts, family, name):
    values, strings = parts
    values = {**values, "family": family}
    body = body_of(strings, name, b"adapted")
    assert read_bitstream(pack(VERSION_2, values, body)).adaptation == b"adapted"
    assert read_bitstream(pack(VERSION_2, values, body_of([*strings, b""], name))).adaptation == b""
    with pytest.raises(BitstreamError, match="strings of 7 bytes in 6"):
        read_bitstream(pack(VERSION_2, values, body[:-1]))
    with pytest.raises(BitstreamError, match="damaged: 1 bytes more"):
        read_bitstream(pack(VERSION_2, values, body + b"a"))


@pytest.mark.parametrize("name", [b"my family", b"\xff\xfe", b"", b"a\nb", b"x" * 3000])
def test_a_family_by_name_that_the_weights_are_not_of_is_refused(coder, parts, name):
    values, strings = parts
    forged = pack(VERSION_2, {**values, "family": 255}, body_of(strings, name))
    assert read_bitstream(forged).family == name.decode("utf-8", "replace")
    with pytest.raises(BitstreamError, match="these weights are of mbt2018-mean") as refused:
        decode_latents(coder, forged)
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(BitstreamError, match="strings of"):
        decode_latents(coder, pack(VERSION_2, {**values, "family": 255}, varint(90) + name[:9]))


def test_a_file_that_is_too_long_for_its_picture_is_not_read(tmp_path, small_file):
    path = tmp_path / "a.olc"
    path.write_bytes(small_file[0])
    assert read_file(path) == small_file[0]
    with path.open("ab") as file:
        file.truncate(32 * 50 * 70 + 2**20 + 1)
    with pytest.raises(BitstreamError, match="longer than any file of a picture of its size"):
        read_file(path)


# --- version 1 ------------------------------------------------------------------------------------


def test_a_file_of_version_1_decodes_as_it_did(coder, old_parts):
    """The first release's code wrote it and decoded it: a crop of skimage's coffee, 117x91 pixels.

    One of its indexes is an exception.
    """
    data = (REFERENCE / "version1.olc").read_bytes()
    assert old_parts[0]["exception_bytes"] == 3
    symbols, size = decode_latents(coder, data)
    assert size == (91, 117)
    with np.load(REFERENCE / "version1.npz") as arrays:
        assert symbols.keys() == {"y", "z"}
        for name, integers in symbols.items():
            assert integers.unique().numel() > 5
            assert np.array_equal(arrays[name], integers[0]), name
        picture = arrays["picture"].astype(int)
    x_hat = (decode_picture(coder, data)[0] * 255).round().permute(1, 2, 0).numpy()
    difference = np.abs(x_hat - picture)  # another processor has other last bits
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_version_2_has_the_strings_of_version_1(coder, old_parts):
    """The same symbols, written again."""
    data = (REFERENCE / "version1.olc").read_bytes()
    symbols, size = decode_latents(coder, data)
    old, new = read_bitstream(data), read_bitstream(encode_latents(coder, symbols, size))
    assert (old.version, new.version) == (1, 2)
    assert new._replace(version=1) == old
    assert torch.equal(decode_latents(coder, write_bitstream(old))[0]["y"], symbols["y"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("height", 0, "117x0 pixels"),
        ("height", 2**32 - 1, "117x4294967295 pixels"),
        ("width", 50_000, "cannot be in"),
        ("weights", b"abcd", "other weights"),
        ("tables", 1, "other coding tables"),
        ("z_bytes", 2**32 - 1, "strings of"),
        ("exception_bytes", 65535, "strings of"),
        ("symbols", 7, "does not decode to the symbols"),
    ],
)
def test_a_forged_header_of_version_1_is_refused(coder, old_parts, field, value, message):
    values, body = old_parts
    with pytest.raises(BitstreamError, match=message):
        decode_latents(coder, pack(VERSION_1, {**values, field: value}, body))


@pytest.mark.parametrize("length", [4, 27, 30, 37, 100, -1])
def test_a_truncated_file_of_version_1_is_called_so(coder, length):
    data = (REFERENCE / "version1.olc").read_bytes()
    with pytest.raises(BitstreamError, match="truncated"):
        decode_latents(coder, data[:length])


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_forgery_of_version_1_crashes(coder, old_parts, data):
    values, body = old_parts
    mutated = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del mutated[data.draw(st.integers(0, len(mutated))) :]
    changed = data.draw(st.sampled_from(["z_bytes", "exception_bytes", "width", "M", "version"]))
    numbers = st.integers(1, 2) if changed == "version" else st.integers(0, 300)
    forged = pack(VERSION_1, {**values, changed: data.draw(numbers)}, bytes(mutated))
    try:
        decoded, size = decode_latents(coder, forged)
    except BitstreamError as error:
        assert len(str(error).splitlines()) == 1
    else:
        genuine = decode_latents(coder, pack(VERSION_1, values, body))
        assert size == genuine[1]
        assert all(torch.equal(decoded[name], v) for name, v in genuine[0].items())
