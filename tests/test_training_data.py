"""Crops to train on, from tfrecords and from folders."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from common.errors import InputError
from common.finding import find_images
from common.images import ImageFiles
from common.optional_packages import import_tensorflow, import_tensorflow_datasets
from config import PretrainConfig
from conftest import needs
from crops import (
    FIRST_DRAWS,
    SIZE,
    draw,
    encode,
    is_crop,
    numbers_of,
    picture,
    shrunk_by,
    write_tfrecord,
)  # fmt: skip
from datasets import clic_tfrecords, open_training_data
from pretraining.draws import READ_FAILED, TOO_SMALL, Draws
from pretraining.folder_crops import FolderCrops
from pretraining.tfrecord_crops import TfrecordCrops
from pretraining.tfrecord_index import INDEX_NAME, epoch_order, index_tfrecords

pytestmark = needs("tensorflow")


def test_an_epoch_has_every_example_once_as_a_crop_of_it(tfrecords):
    drawn, skipped = draw(tfrecords, 10, batch_size=2)
    assert drawn[0].x.shape == (2, 3, SIZE, SIZE)
    assert drawn[0].x.dtype == torch.uint8
    assert drawn[0].x.is_contiguous(memory_format=torch.channels_last)
    assert sorted(numbers_of(drawn)) == list(range(20))
    for batch in drawn:
        assert all(is_crop(x, int(x[2, 0, 0])) for x in batch.x)
    assert not skipped


def test_crops_lie_everywhere_and_half_are_mirrored(tfrecords):
    drawn, _ = draw(tfrecords, 200)
    crops = [batch.x[0] for batch in drawn]
    mirrored = sum(bool(x[0, 0, 0] > x[0, 0, -1]) for x in crops)
    assert 70 < mirrored < 130
    lefts = Counter(int(x[0, 0].min()) for x in crops)
    tops = Counter(int(x[1, 0, 0]) for x in crops)
    assert set(lefts) <= set(range(100 - SIZE + 1)) and len(lefts) > 28
    assert set(tops) <= set(range(90 - SIZE + 1)) and len(tops) > 22
    assert {0, 36} <= set(lefts) and {0, 26} <= set(tops)


def test_the_seed_decides_order_and_crops(tfrecords):
    first, _ = draw(tfrecords, 20)
    again, _ = draw(tfrecords, 20, num_workers=1)
    other, _ = draw(tfrecords, 20, Draws(1))
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    assert numbers_of(first) != numbers_of(other)
    later, _ = draw(tfrecords, 40)
    assert numbers_of(later)[20:] != numbers_of(later)[:20]


@pytest.mark.parametrize("start", [3, 7, 15])
def test_a_resumed_reading_goes_on_with_the_same_crops(tfrecords, start):
    unbroken, _ = draw(tfrecords, 20, batch_size=3)
    resumed, _ = draw(tfrecords, 20 - start, Draws(0, position=unbroken[start - 1].position), 3)
    for a, b in zip(unbroken[start:], resumed, strict=True):
        assert torch.equal(a.x, b.x)
        assert a.position == b.position


def test_ranks_share_an_epoch(tfrecords):
    parts = [numbers_of(draw(tfrecords, 10, Draws(0, rank, 2))[0]) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(20))
    alone = numbers_of(draw(tfrecords, 20)[0])
    assert alone[0::2] == parts[0]
    assert alone[1::2] == parts[1]


def test_cycle_length_files_are_open_at_a_time(tfrecords):
    index = index_tfrecords(tfrecords)
    order = epoch_order(index, 0, 0, cycle_length=1)
    files = index.file[order]
    assert sum(np.diff(files) != 0) == 2  # one file after the other
    assert sum(np.diff(index.file[epoch_order(index, 0, 0, cycle_length=3)]) != 0) > 4
    assert sorted(order) == list(range(20))


@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"),
                       ("PNG", "L"), ("PNG", "P"), ("PNG", "I;16"), ("BMP", "RGB")]
)  # fmt: skip
def test_every_form_of_example_looks_as_in_pillow(tmp_path, form, mode):
    base = np.add.outer(np.arange(SIZE), np.arange(SIZE)).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(base.astype(np.uint16) * 257 + np.uint16(100))
        expected = np.repeat(base[:, :, None], 3, axis=2)
    else:
        rgb = Image.fromarray(np.stack((base, base[::-1], base[:, ::-1] // 2), axis=-1))
        image = rgb.convert(mode)
        expected = None
    data = encode(image, form)
    if expected is None:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    write_tfrecord(tmp_path / "a.tfrecord", [data])
    ((batch,), skipped) = draw(tmp_path / "a.tfrecord", 1)
    pixels = batch.x[0].permute(1, 2, 0).numpy().astype(int)
    error = min(np.abs(pixels - expected).max(), np.abs(pixels[:, ::-1] - expected).max())
    # CMYK has no one conversion; tensorflow's rounds otherwise than Pillow's.
    assert error <= (2 if mode == "CMYK" else 0)
    assert not skipped


def test_damaged_and_small_examples_are_named_and_all_others_used(tmp_path):
    jpeg = encode(picture(0), "JPEG")
    images = [encode(picture(number)) for number in range(8)]
    images[2] = jpeg[: len(jpeg) // 3]
    images[3] = b"no picture"
    images[4] = encode(picture(4, width=SIZE - 1))
    path = tmp_path / "bad.tfrecord"
    write_tfrecord(path, images)
    index = index_tfrecords(path)
    data = bytearray(path.read_bytes())
    data[int(index.offset[6]) + 200] ^= 4  # breaks example 6's checksum alone
    path.write_bytes(data)
    drawn, skipped = draw(path, 9)
    assert set(numbers_of(drawn)) == {0, 1, 5, 7}
    assert skipped == {
        f"{path} record 2": READ_FAILED,
        f"{path} record 3": READ_FAILED,
        f"{path} record 4": TOO_SMALL,
        f"{path} record 6": READ_FAILED,
    }


def test_a_truncated_file_is_used_up_to_its_break(tmp_path):
    path = tmp_path / "cut.tfrecord"
    write_tfrecord(path, [encode(picture(number)) for number in range(4)])
    path.write_bytes(path.read_bytes()[:-40])
    drawn, skipped = draw(path, 6)
    assert sorted(numbers_of(drawn)[:3]) == [0, 1, 2]
    (message,) = skipped.values()
    assert list(skipped) == [str(path)]
    assert "truncated" in message


@pytest.mark.parametrize("images", [[picture(1, width=30)] * 3, [b"x"] * 3])
def test_data_without_one_usable_example_are_refused(tmp_path, images):
    encoded = [image if isinstance(image, bytes) else encode(image) for image in images]
    write_tfrecord(tmp_path / "a.tfrecord", encoded)
    with pytest.raises(InputError, match=r"not one image gives a crop of 64x64"):
        draw(tmp_path, 1)


def test_places_are_kept_until_a_file_changes(tfrecords):
    first = index_tfrecords(tfrecords)
    stamp = (tfrecords / INDEX_NAME).stat().st_mtime_ns
    again = index_tfrecords(tfrecords)
    assert (tfrecords / INDEX_NAME).stat().st_mtime_ns == stamp
    assert np.array_equal(first.offset, again.offset)
    write_tfrecord(tfrecords / "train-1.tfrecord", [encode(picture(50))])
    assert len(index_tfrecords(tfrecords).file) == len(first.file) - 6
    whole = (tfrecords / INDEX_NAME).read_bytes()
    for damaged in (b"", b"damaged", whole[:-30]):
        (tfrecords / INDEX_NAME).write_bytes(damaged)
        assert len(index_tfrecords(tfrecords).file) == len(first.file) - 6


def test_zeros_after_the_examples_are_no_examples(tfrecords):
    path = tfrecords / "train-0.tfrecord"
    path.write_bytes(path.read_bytes() + bytes(1600))
    index = index_tfrecords(tfrecords)
    assert len(index.file) == 20
    assert "1600 bytes left out" in index.damaged[str(path)]


def test_a_file_that_vanishes_is_skipped_and_all_of_them_end_the_data(tfrecords):
    data = TfrecordCrops(index_tfrecords(tfrecords), SIZE, 1, 2)
    (tfrecords / "train-2.tfrecord").unlink()
    skipped = {}
    batches = data.batches(Draws(0), skipped.__setitem__)
    assert max(numbers_of([next(batches) for _ in range(40)])) < 14
    assert set(skipped.values()) == {READ_FAILED}
    assert len(skipped) == 6
    for file in tfrecords.glob("*.tfrecord"):
        file.unlink()
    with pytest.raises(InputError, match="not readable"):
        for _ in range(1000):
            next(batches)


def test_every_rank_finds_the_only_usable_example(tmp_path):
    write_tfrecord(tmp_path / "a.tfrecord", [encode(picture(1))])
    for rank in (0, 1, 2):
        drawn, _ = draw(tmp_path, 2, Draws(0, rank, 3))
        assert numbers_of(drawn) == [1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "make-tfrecords"),
        (lambda path: path.write_bytes(b"these are no records"), "not one record"),
    ],
)
def test_what_is_no_tfrecord_is_refused(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        index_tfrecords(tmp_path / "data")


# --- CLIC -----------------------------------------------------------------------------------------


@pytest.fixture
def prepared_clic(tmp_path):
    """tensorflow-datasets' folder of a small `clic`: pictures 200 to 204 of 250x40 pixels."""
    tfds = import_tensorflow_datasets()
    builder = tfds.builder("clic", data_dir=tmp_path / "tfds")
    splits = {
        name: [{"image": picture(200 + number, 250, 40)} for number in range(count)]
        for name, count in (("train", 5), ("validation", 1), ("test", 2))
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="clic", version=str(builder.info.version), data_dir=tmp_path / "tfds",
        split_datasets={
            name: import_tensorflow().data.Dataset.from_generator(
                lambda images=images: iter(images),
                output_signature={
                    "image": import_tensorflow().TensorSpec((None, None, 3), "uint8")
                },
            )
            for name, images in splits.items()
        },
        features=builder.info.features,
    )  # fmt: skip
    return tmp_path / "tfds"


def pretrain_config(**values):
    return PretrainConfig.model_validate({
        "train_lambda": 0.01, "save_name": "x", "image_size": SIZE, "batch_size": 1, **values
    })  # fmt: skip


def test_clic_and_imagenet_are_mixed_by_their_sizes(tfrecords, prepared_clic):
    config = pretrain_config(
        path_train={"train_imagenet": str(tfrecords), "train_clic": str(prepared_clic)}
    )
    data = open_training_data(config)
    assert data.count == 25
    skipped = []
    batches = data.batches(Draws(0), lambda *what: skipped.append(what))
    for _ in range(2):
        numbers = Counter(int(x.float().mean((0, 2, 3))[2].round()) for x in
                          (next(batches).x for _ in range(25)))  # fmt: skip
        assert sorted(numbers) == [*range(20), *range(200, 205)]
        assert set(numbers.values()) == {1}
    batches.close()
    assert not skipped


def test_clic_crops_are_random_resized_ones(prepared_clic):
    """8 to 100 % of the area, aspect 3/4 to 4/3, enlarged to the crop's size."""
    data = TfrecordCrops(clic_tfrecords(str(prepared_clic)), SIZE, 1, 2)
    batches = data.batches(Draws(0), lambda *_: None)
    spans = []
    for _ in range(60):
        x = next(batches).x[0].int()
        assert x.shape == (3, SIZE, SIZE)
        spans.append((abs(int(x[0, 0, -1] - x[0, 0, 0])), abs(int(x[1, -1, 0] - x[1, 0, 0]))))
    batches.close()
    for width, height in spans:  # first to last pixel's place: the window's extent less about 1
        assert 0.68 < (width + 1) / (height + 1) < 1.48
        assert (width + 2) * (height + 2) > 0.08 * 250 * 40
        assert height < 40
    assert len(set(spans)) > 15


def test_clic_that_cannot_be_prepared_says_what_to_do(monkeypatch, tfrecords):
    tfds = import_tensorflow_datasets()

    def no_network(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds, "builder", no_network)
    config = pretrain_config(path_train={"train_imagenet": str(tfrecords)})
    with pytest.raises(InputError, match=r"train_clic_imagenet: .*no route.*train_clic, or set"):
        open_training_data(config)


# --- folders --------------------------------------------------------------------------------------


def draw_files(root, count, draws=FIRST_DRAWS, num_workers=0, smallest_scale=1.0, batch_size=1):
    skipped = {}
    images = ImageFiles(find_images(root))
    data = FolderCrops(images, SIZE, batch_size, num_workers, smallest_scale)
    batches = data.batches(draws, skipped.__setitem__)
    return [next(batches) for _ in range(count)], skipped


def test_a_folder_gives_crops_without_tensorflow(numbered_folder):
    drawn, skipped = draw_files(numbered_folder, 12)
    assert sorted(numbers_of(drawn[:6])) == sorted(numbers_of(drawn[6:])) == list(range(6))
    assert all(is_crop(batch.x[0], int(batch.x[0, 2, 0, 0])) for batch in drawn)
    assert not skipped
    parts = [numbers_of(draw_files(numbered_folder, 3, Draws(0, rank, 2))[0]) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(6))


def test_a_folder_goes_on_where_it_was(numbered_folder):
    unbroken, _ = draw_files(numbered_folder, 12)
    resumed, _ = draw_files(
        numbered_folder, 7, Draws(0, position=unbroken[4].position), num_workers=2
    )
    assert all(torch.equal(a.x, b.x) for a, b in zip(unbroken[5:], resumed, strict=True))


def test_a_folder_s_damaged_and_small_files_are_named(numbered_folder):
    (numbered_folder / "broken.png").write_bytes(encode(picture(9))[:100])
    (numbered_folder / "small.png").write_bytes(encode(picture(9, width=20)))
    drawn, skipped = draw_files(numbered_folder, 12)
    assert set(numbers_of(drawn)) == set(range(6))
    assert skipped.pop("small.png") == TOO_SMALL
    assert skipped.pop("broken.png").startswith(READ_FAILED)
    assert not skipped
    for file in numbered_folder.rglob("?.png"):
        file.unlink()
    with pytest.raises(InputError, match="not one image gives a crop"):
        draw_files(numbered_folder, 1)


def test_batches_are_the_crops_one_by_one_whatever_failed_between_them(numbered_folder):
    (numbered_folder / "broken.png").write_bytes(encode(picture(9))[:100])
    (numbered_folder / "small.png").write_bytes(encode(picture(9, width=20)))
    alone, _ = draw_files(numbered_folder, 24)
    expected = torch.cat([batch.x for batch in alone])
    for workers in (0, 2):
        batches, skipped = draw_files(numbered_folder, 8, num_workers=workers, batch_size=3)
        assert torch.equal(torch.cat([batch.x for batch in batches]), expected)
        assert [batch.position for batch in batches] == [batch.position for batch in alone[2::3]]
        assert skipped.keys() == {"broken.png", "small.png"}
    for done in (1, 4):
        rest, _ = draw_files(
            numbered_folder, 8 - done, Draws(0, position=batches[done - 1].position), batch_size=3
        )
        assert torch.equal(torch.cat([batch.x for batch in rest]), expected[3 * done :])


# --- shrunk photos --------------------------------------------------------------------------------


@pytest.mark.parametrize("draw_from", [draw_files, draw])
def test_photos_are_shrunk_by_random_factors_but_not_below_the_crop(
    tfrecords, numbered_folder, draw_from
):
    """The pictures are 100x90 or larger: at most 90 / 64 = 1.41 pixels become one."""
    source = tfrecords if draw_from is draw else numbered_folder
    drawn, skipped = draw_from(source, 60, smallest_scale=0.5)
    factors = np.array([shrunk_by(batch.x[0]) for batch in drawn])
    assert factors.min() > 0.97
    assert factors.max() < 90 / 64 + 0.03
    assert np.allclose(factors[:, 0], factors[:, 1], atol=0.05)
    assert ((factors > 1.05) & (factors < 1.35)).any(1).sum() > 10
    assert all(batch.x[0, 2].unique().numel() == 1 for batch in drawn)
    again, _ = draw_from(source, 60, smallest_scale=0.5)
    assert all(torch.equal(a.x, b.x) for a, b in zip(drawn, again, strict=True))
    assert not skipped


def test_folders_and_tfrecords_shrink_alike(tmp_path):
    """Pillow's and tensorflow's bicubic filters agree on a photo's centre to a few levels."""
    astronaut = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png")
    photo = astronaut.convert("RGB").crop((0, 0, 128, 128))
    (tmp_path / "files").mkdir()
    photo.save(tmp_path / "files" / "a.png")
    write_tfrecord(tmp_path / "a.tfrecord", [encode(photo)])
    expected = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=int)
    # Of 60 draws from 0.5, some take (nearly) the whole photo.
    for drawn, _ in (
        draw_files(tmp_path / "files", 60, smallest_scale=0.01),
        draw(tmp_path / "a.tfrecord", 60, smallest_scale=0.01),
    ):
        crops = [batch.x[0].permute(1, 2, 0).numpy().astype(int) for batch in drawn]
        whole = [min(abs(x - expected).max(), abs(x[:, ::-1] - expected).max()) for x in crops]
        assert sum(error <= 1 for error in whole) > 20
