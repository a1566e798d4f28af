"""The adaptation in a file: a second reading of its bits here, its size, and forged bytes."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coding.bitstream import Bitstream, BitstreamError, CodedGroup, write_bitstream
from coding.payload import (
    KINDS,
    MOST_BYTES,
    Adaptation,
    Numbers,
    bits,
    from_bytes,
    lattice_code,
    step_code,
    to_bytes,
)
from coding.runs import BitReader, BitWriter, cost_in_bits, read_values, write_values


def bits_of(data):
    return [byte >> shift & 1 for byte in data for shift in range(7, -1, -1)]


def take(stream, count):
    """The number in the next bits, high ones first; `stream` is an iterator over bits."""
    number = 0
    for _ in range(count):
        number = 2 * number + next(stream)
    return number


def take_rice(stream, k):
    quotient = 0
    while not next(stream):
        quotient += 1
    return (quotient << k) + take(stream, k)


def take_flags(stream, count):
    """Flags of a row, of which `count` are "yes"; the last one is."""
    code, flags = take(stream, 4), []
    while sum(flags) < count:
        if code <= 9:
            flags += [False] * take_rice(stream, code) + [True]
        else:
            flags += [True] * take_rice(stream, code - 9) + [False]
    return flags if code <= 9 else flags[:-1]


def take_values(stream):
    """The values, flag by flag, as the text in coding/runs.py tells."""
    count, shift, more = 0, 0, True
    while more:
        more = next(stream)
        count += take(stream, 3) << shift
        shift += 3
    if not count:
        return []
    where, ends = take_flags(stream, count), take_flags(stream, count)
    magnitudes, magnitude = [], 1
    for end in ends:
        if end:
            magnitudes.append(magnitude)
        magnitude = 1 if end else magnitude + 1
    signed = iter([-m if next(stream) else m for m in magnitudes])
    return [next(signed) if nonzero else 0 for nonzero in where]


def written(values):
    writer = BitWriter()
    write_values(writer, values)
    return writer


def without_last_zeros(values):
    values = list(values)
    while values and values[-1] == 0:
        values.pop()
    return values


def entropy_in_bits(values):
    counts = np.unique(values, return_counts=True)[1]
    return -(counts * np.log2(counts / counts.sum())).sum()


# Rows of all sorts: sparse, dense, of ones alone, with rare large values.
VALUES = st.one_of(
    st.lists(st.integers(-2, 2), max_size=30),
    st.lists(st.sampled_from([0] * 12 + [1, -1, 2]), max_size=150),
    st.lists(st.sampled_from([1] * 9 + [-1, 0, 3]), max_size=60),
    st.lists(st.integers(-(2**15), 2**15) | st.just(0), max_size=12),
).map(tuple)


# --- values ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(VALUES)
def test_values_are_what_a_second_reading_finds(values):
    writer = written(values)
    data = writer.to_bytes()
    stream = iter(bits_of(data))
    assert take_values(stream) == without_last_zeros(values)
    rest = list(stream)
    assert len(rest) < 8
    assert not any(rest)
    assert cost_in_bits(values) == 8 * len(data) - len(rest)
    assert cost_in_bits(np.array(values, np.int32)) == cost_in_bits(values)
    reader = BitReader(data)
    assert read_values(reader) == tuple(without_last_zeros(values))
    reader.check_end()


def test_the_bits_of_an_example():
    """0 0 1 0 -3: two nonzero values, with 2 and 1 zeros before, magnitudes less 1 of 0 and 2."""
    text = "".join(written([0, 0, 1, 0, -3, 0]).parts)
    assert text == "0010" + "0000" + "001" + "01" + "0000" + "1" + "001" + "0" + "1"


@pytest.mark.parametrize("scale", [0.3, 1, 4])
def test_the_cost_is_close_to_the_entropy(scale):
    """Of a rounded Laplace distribution: the number of values and two codes cost some bits more."""
    rng = np.random.default_rng(7)
    values = rng.laplace(0, scale, 5000).round().astype(int)
    assert cost_in_bits(values) < 1.035 * entropy_in_bits(values)

    def cumulative(x):
        return 0.5 + 0.5 * np.sign(x) * -np.expm1(-np.abs(x) / scale)

    p = np.diff(cumulative(np.arange(-80.5, 81)))
    p = p[p > 0]
    few = [rng.laplace(0, scale, 64).round().astype(int) for _ in range(200)]
    # 8 bits of two codes, 8 of the number of nonzero values
    assert np.mean([cost_in_bits(v) for v in few]) < -64 * 1.05 * (p * np.log2(p)).sum() + 16


def test_no_values_cost_four_bits():
    assert cost_in_bits([]) == cost_in_bits([0] * 9) == 4
    assert written([0] * 9).to_bytes() == b"\0"


@pytest.mark.parametrize("values", [[2**15 + 1], [0, -(2**15) - 1], [0] * 2**20 + [1]])
def test_values_beyond_the_range_are_not_written(values):
    with pytest.raises(BitstreamError, match="can be coded"):
        written(values)


def test_values_at_the_ends_of_the_range_are_read():
    for values in ((2**15, -(2**15)), (0,) * (2**20 - 1) + (1,)):
        assert read_values(BitReader(written(values).to_bytes())) == values


# --- the whole adaptation -------------------------------------------------------------------------


def with_directions_if_needed(told):
    needed = any(KINDS[group.kind] == "directions" for group in told.groups)
    return told if needed else told._replace(directions=b"")


def file_with(adaptation, family):
    groups = (CodedGroup(b"string"),)
    told = to_bytes(adaptation)
    return write_bitstream(Bitstream(9, 9, family, b"abcd", 1, 2, groups, adaptation=told))


ADAPTATIONS = st.builds(
    Adaptation,
    lattice=st.integers(-128, 127),
    directions=st.binary(min_size=2, max_size=2),
    groups=st.lists(
        st.builds(
            Numbers,
            kind=st.integers(0, len(KINDS) - 1),
            step=st.integers(0, 255),
            values=VALUES.map(without_last_zeros).map(tuple),
        ),
        unique_by=lambda group: group.kind,
    ).map(lambda groups: tuple(sorted(groups))),
).map(with_directions_if_needed)


@settings(deadline=None, max_examples=60)
@given(ADAPTATIONS)
def test_an_adaptation_is_read_as_written(adaptation):
    data = to_bytes(adaptation)
    assert from_bytes(data) == adaptation
    whole = bool(adaptation.lattice) + len(adaptation.directions)
    rest = sum(8 + cost_in_bits(group.values) for group in adaptation.groups)
    expected = 0 if adaptation == Adaptation() else 1 + whole + math.ceil(rest / 8)
    assert len(data) == expected
    for family in ("mbt2018-mean", "own"):
        more = len(file_with(adaptation, family)) - len(file_with(Adaptation(), family))
        assert bits(adaptation) == 8 * more


def test_the_bits_count_the_length_before_the_bytes():
    """It has one byte, and two from 128 bytes on."""
    assert bits(Adaptation()) == 0
    assert bits(Adaptation(lattice=5)) == 8 * (2 + 1)
    sizes = set()
    for count in range(200, 300):
        told = Adaptation(groups=(Numbers(1, 0, (3,) * count),))
        size = len(to_bytes(told))
        sizes.add(size)
        more = len(file_with(told, "own")) - len(file_with(Adaptation(), "own"))
        assert bits(told) == 8 * more == 8 * (size + (1 if size < 128 else 2))
    assert {127, 128} <= sizes


def test_the_bytes_of_an_example():
    groups = Numbers(0, 180, (1, 0, -1)), Numbers(1, 200, (0, 0, 5))
    data = to_bytes(Adaptation(-3, b"\x12\x34", groups))
    assert data[:4] == bytes([1 | 2 | 4 | 8, 253, 0x12, 0x34])
    stream = iter(bits_of(data[4:]))
    for step, values in ((180, [1, 0, -1]), (200, [0, 0, 5])):
        assert take(stream, 8) == step
        assert take_values(stream) == values
    assert not any(stream)
    assert to_bytes(Adaptation()) == b""
    assert to_bytes(Adaptation(lattice=5)) == b"\x01\x05"


def test_zeros_at_the_end_are_not_kept():
    assert from_bytes(to_bytes(Adaptation(groups=(Numbers(1, 9, (0, 4, 0)),)))) == Adaptation(
        groups=(Numbers(1, 9, (0, 4)),)
    )


@pytest.mark.parametrize(
    ("adaptation", "message"),
    [
        (Adaptation(lattice=128), "lattice 128"),
        (Adaptation(directions=b"abc"), "directions of 3 bytes"),
        (Adaptation(groups=(Numbers(0, 256, ()),)), "step 256"),
        (Adaptation(groups=(Numbers(len(KINDS), 0, ()),)), "groups of kinds"),
        (Adaptation(groups=(Numbers(1, 0, ()), Numbers(0, 0, ()))), r"groups of kinds \[1, 0\]"),
        (Adaptation(groups=(Numbers(1, 0, ()),) * 2), r"groups of kinds \[1, 1\]"),
        (Adaptation(groups=(Numbers(1, 0, (2**16,)),)), "magnitudes up to 65536"),
        (Adaptation(directions=b"ab"), "both its directions' two bytes and their group"),
        (Adaptation(3, b"ab", (Numbers(1, 0, (1,)),)), "directions' two bytes and their group"),
        (Adaptation(groups=(Numbers(0, 0, (1,)),)), "directions' two bytes and their group"),
        (Adaptation(groups=(Numbers(1, 0, (2**15,) * 130_000),)), "at most 1048576 can be coded"),
    ],
)
def test_what_has_no_bytes_is_refused(adaptation, message):
    with pytest.raises(BitstreamError, match=message):
        to_bytes(adaptation)


def test_steps_have_their_codes():
    assert Adaptation().lattice_step == 1
    assert Adaptation(lattice=-8).lattice_step == pytest.approx(2**-0.5)
    assert Numbers(0, 184, ()).step_size == 0.25
    for code in range(-128, 128):
        assert lattice_code(Adaptation(lattice=code).lattice_step * 1.02) == code
    for code in range(256):
        assert step_code(Numbers(0, code, ()).step_size * 0.92) == code


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf, 2.0**20, 2.0**-60])
def test_a_step_without_a_code_is_refused(step):
    for code_of in (lattice_code, step_code):
        with pytest.raises(ValueError, match="can be coded"):
            code_of(step)


# --- forged bytes ---------------------------------------------------------------------------------


def packed(text):
    """The bytes of these bits, with zeros behind."""
    text = text.replace(" ", "")
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


GROUP = "00001000 00000000"  # flags of a group of the last layer, its step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("00010000", "flags 16, which this code does not know"),
        ("10000001 00000001", "flags 129"),
        ("00000000", "an empty field"),
        ("00000001 00000000", "an empty field"),
        ("00000001", "ends too early"),
        ("00000010 00000001", "ends too early"),
        ("00000001 00000001 00000000", "bits follow the end"),
        ("00000001 00000001 1", "bits follow the end"),
        (GROUP + "0000 0001", "bits follow the end"),
        (GROUP + "0000 0000 0000 0000", "bits follow the end"),
        (GROUP, "ends too early"),
        (GROUP + "0001 0000", "ends too early"),  # zeros without an end
        (GROUP + "0001 0000 1 0000 001", "ends too early"),  # no sign
        (GROUP + "1000" * 7, "counts of its adaptation make no sense"),
        (GROUP + "1111" * 6 + "0111", "more than 1048576 values"),
        (GROUP + "0001 1001" + "0" * 2048 + "1" + "0" * 9, "more than 1048576 values"),
        (GROUP + "0001 0000 1 1001" + "0" * 64 + "1" + "0" * 9 + "0", "beyond their range"),
        (GROUP + "0001 1010 011", "counts of its adaptation make no sense"),  # a run of 3
        (GROUP + "0001 1010 10 11", "counts of its adaptation make no sense"),  # runs of 0 and 1
        (GROUP + "1000 0001", "ends too early"),  # 8 values in no bits
        ("00000100 00000000 0000", "does not say which directions it needs"),
        ("00000010 00000001 00000010", "does not say which directions it needs"),
        ("00001010 00000001 00000010 00000000 0000", "does not say which directions it needs"),
    ],
)
def test_forged_bytes_are_refused(text, message):
    with pytest.raises(BitstreamError, match=message) as refused:
        from_bytes(packed(text))
    assert len(str(refused.value).splitlines()) == 1


def test_adaptations_of_more_bytes_than_allowed_are_refused():
    told = Adaptation(groups=(Numbers(1, 0, (2**15,) * 112_000),))
    data = to_bytes(told)
    assert 0.98 * MOST_BYTES < len(data) <= MOST_BYTES
    assert from_bytes(data) == told
    with pytest.raises(BitstreamError, match="damaged: its adaptation is too long"):
        from_bytes(data + bytes(MOST_BYTES + 1 - len(data)))


MANY = GROUP + "1000" * 6 + "0100"  # a group of 2^20 nonzero values


@pytest.mark.parametrize(
    ("start", "end"),
    [
        *itertools.product(["", GROUP], ["aa", "00", "ff", "random"]),
        (MANY + "0000", "ff"),  # 2^20 counts of 0
        (MANY + "1010", "aa"),  # runs of 0 to the end
        (MANY + "1111", "random"),
    ],
)
def test_a_megabyte_of_hostile_bytes_is_soon_refused(start, end):
    """The rows of counts and of runs that take longest to read, and bytes of all sorts."""
    random = np.random.default_rng(1).bytes(MOST_BYTES)
    data = random if end == "random" else bytes.fromhex(end) * MOST_BYTES
    data = (packed(start) + data)[:MOST_BYTES] if start else data
    began = time.process_time()
    with pytest.raises(BitstreamError, match="adaptation"):
        from_bytes(data)
    assert time.process_time() - began < 2


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda end: b"\x0e" + end))
def test_no_bytes_crash(data):
    """What is read can be written; it may have fewer bytes then, as a code may be a longer one."""
    try:
        adaptation = from_bytes(data)
    except BitstreamError as error:
        assert len(str(error).splitlines()) == 1
    else:
        again = to_bytes(adaptation)
        assert len(again) <= len(data)
        assert from_bytes(again) == adaptation


@settings(deadline=None, max_examples=40)
@given(ADAPTATIONS, st.data())
def test_truncated_bytes_are_refused(adaptation, data):
    whole = to_bytes(adaptation)
    if len(whole) > 1:
        with pytest.raises(BitstreamError):
            from_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
