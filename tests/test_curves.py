"""Deltas between curves, classical codecs, published curves, each against a second way to them."""

import io
import math

import numpy as np
import pandas as pd
import pytest
import skimage
from PIL import Image

from common.errors import InputError
from common.finding import find_images
from common.images import CentreCrop, ImageFiles
from conftest import ROOT, to_x
from metrics import Curve, CurvesDoNotCompareError, bd_psnr, bd_rate, overlap
from reports.classical_codecs import codec_table, coded_by
from reports.comparison_tables import published_curves
from reports.equal_rate import equal_rate_table, quality_at
from reports.page_tables import equal_rate_cells

PUBLISHED = ROOT / "example_files/compare/published"


def _published(name):
    table = pd.read_csv(PUBLISHED / f"yang2020_{name}_kodak.csv", comment="#")
    return Curve(list(table["bpp"]), list(table["psnr"]))


@pytest.mark.parametrize("method", ["akima", "pchip"])
def test_bd_rate_of_the_published_curves(method):
    """-15.2 % is what follows from the figures of arXiv 2006.04240."""
    base, sga = _published("base"), _published("sga")
    assert bd_rate(base, sga, method) == pytest.approx(-15.2, abs=0.1)
    assert bd_psnr(base, sga, method) > 0.5
    shuffled = Curve(sga.bpp[::-1], sga.db[::-1])
    assert bd_rate(base, shuffled, method) == bd_rate(base, sga, method)
    # A tenth less rate everywhere is a BD-rate of -10 %; a dB more everywhere is 1 dB.
    cheaper = Curve([0.9 * bpp for bpp in base.bpp], base.db)
    assert bd_rate(base, cheaper, method) == pytest.approx(-10)
    better = Curve(base.bpp, [db + 1 for db in base.db])
    assert bd_psnr(base, better, method) == pytest.approx(1)


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        (Curve([0.1, 0.2], [30, 31]), "2 points: at least 3"),
        (Curve([0.1, 0.2, 0.3], [40, 41, 42]), "do not overlap: 26.47 to 38.33 dB and 40 to 42 dB"),
        (Curve([0.1, 0.2, 0.3], [30, 29, 32]), "does not rise"),
    ],
)
def test_curves_that_do_not_compare_are_refused(curve, reason):
    with pytest.raises(CurvesDoNotCompareError, match=reason):
        bd_rate(_published("base"), curve)


def test_overlap_is_the_common_part():
    assert overlap([0, 2], [1, 3]) == pytest.approx(1 / 3)
    assert overlap([0, 1], [2, 3]) == 0


def test_codecs_at_equal_rates_are_as_good_as_files_of_such_a_rate():
    """A file of a quality between the settings lies near the interpolated curve."""
    picture = Image.fromarray(skimage.data.chelsea())
    curve = pd.DataFrame(coded_by("WebP", "cat", to_x(skimage.data.chelsea())[0]))
    for quality in (17, 35, 55, 72):
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=quality, method=6)
        decoded = np.asarray(Image.open(file).convert("RGB"), dtype=float)
        mse = ((decoded - np.asarray(picture, dtype=float)) ** 2).mean()
        bpp = 8 * len(file.getvalue()) / (picture.width * picture.height)
        assert quality_at(curve, bpp) == pytest.approx(10 * math.log10(255**2 / mse), abs=0.06)
    assert math.isnan(quality_at(curve, 2 * curve["bpp"].max()))
    assert math.isnan(quality_at(curve, curve["bpp"].min() / 2))
    assert math.isnan(quality_at(None, 0.5))


def test_a_codec_that_reaches_no_rate_hides_no_other():
    """Neither does a curve with a column's name, nor an image that was decoded exactly."""
    points = pd.DataFrame({
        "model": "m", "curve": "c", "image": ["a", "b"], "bpp": [0.2, 0.4], "psnr": [31.0, 33.0],
        "ms_ssim_db": [None, None],
    })  # fmt: skip
    files = [("WebP", "a", 0.1, 29.0), ("WebP", "a", 0.4, 33.0), ("AVIF", "a", 1.0, 40.0),
             ("AVIF", "a", 2.0, None), ("AVIF", "b", 1.0, 40.0)]  # fmt: skip
    codecs = pd.DataFrame(files, columns=["method", "image", "bpp", "psnr"])
    published = pd.DataFrame({"curve": "bpp", "bpp": [0.1, 0.9], "psnr": [30.0, 30.0]})
    table = equal_rate_table(points, codecs, published)
    row, unknown = table.to_dict("records")
    assert unknown["quality"] == "ms_ssim_db" and math.isnan(unknown["lead over bpp"])
    assert (row["images"], row["bpp"], row["dB"]) == (2, pytest.approx(0.3), 32)
    assert (row["images of WebP"], row["lead over WebP"]) == (1, pytest.approx(0))
    assert row["images of AVIF"] == 0
    assert (row["images of bpp"], row["lead over bpp"]) == (2, pytest.approx(2))
    shown = equal_rate_cells(table)
    shown = dict(zip(shown.heads[6:], shown.rows[0][6:], strict=True))
    assert shown == {"WebP": "31.00 (+0.00), 1 of 2 images", "AVIF": "", "bpp": "30.00 (+2.00)"}
    assert equal_rate_table(points, codecs.iloc[:0], pd.DataFrame()).empty


def test_codecs_are_measured_on_their_whole_files():
    pixels = skimage.data.chelsea()[:200, :301]
    rows = coded_by("JPEG", "cat", to_x(pixels)[0])
    assert [row["model"] for row in rows][:2] == ["quality 5", "quality 10"]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=35, optimize=True)
    row = next(row for row in rows if row["model"] == "quality 35")
    assert row["bpp"] == pytest.approx(8 * len(file.getvalue()) / (200 * 301))
    decoded = np.asarray(Image.open(file))
    psnr = skimage.metrics.peak_signal_noise_ratio(pixels, decoded)
    assert row["psnr"] == pytest.approx(psnr, abs=1e-3)
    for codec in ("JPEG 2000", "WebP", "AVIF"):
        rates = [row["bpp"] for row in coded_by(codec, "cat", to_x(pixels)[0])]
        assert rates == sorted(rates) and rates[0] < 0.5 < rates[-1]


def test_wrong_published_curves_are_refused(tmp_path):
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("rate,psnr\n0.1,30\n")
    with pytest.raises(InputError, match="needs columns bpp and psnr, has rate, psnr"):
        published_curves({"mine": str(wrong)})
    wrong.write_text("bpp,psnr\n0.1,thirty\n")
    with pytest.raises(InputError, match="a value is no number"):
        published_curves({"mine": str(wrong)})
    with pytest.raises(InputError, match=r"published.mine none.csv: cannot be read"):
        published_curves({"mine": "none.csv"})


def test_rates_of_whole_images_are_not_those_of_crops(tmp_path):
    file = tmp_path / "cat.png"
    Image.fromarray(skimage.data.chelsea()).save(file)
    table, known = pd.DataFrame(), tmp_path / "codecs.csv"
    for crop in (None, CentreCrop(64), CentreCrop(64)):
        images = ImageFiles(find_images(file))
        images.crop = crop
        before, table = table, codec_table(images, ["cat.png"], ["JPEG"], known)
        table.to_csv(known, index=False)
    assert list(table["bpp"]) == list(before["bpp"])
    (x,) = (image.x for image in images.load(["cat.png"]))
    assert x.shape == (3, 64, 64)
    own = coded_by("JPEG", "cat.png", x)
    assert list(table["bpp"]) == [row["bpp"] for row in own]
