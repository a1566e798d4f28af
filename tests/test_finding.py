"""Which files of a folder are images, and what is said of the others."""

import os

import pytest
import skimage
from PIL import Image

from common.errors import InputError
from common.files import printable, short_enough, user_path, write_whole
from common.finding import find_by_suffix, find_images
from conftest import needs

PHOTO = Image.fromarray(skimage.data.chelsea()[:40, :60])


def names(found):
    return [file.relative_to(found.root).as_posix() for file in found.files]


# As Pillow names the formats; what has no suffix, or an unknown one, is known by how it begins.
KINDS = {
    "a.jfif": "JPEG", "a.jpe": "JPEG", "a.JPG": "JPEG", "a.j2k": "JPEG2000", "a.jpx": "JPEG2000",
    "a.tga": "TGA", "a.pbm": "PPM", "a.pgm": "PPM", "a.apng": "PNG", "a.dib": "DIB",
    "a.avif": "AVIF", "no_suffix": "JPEG", "scan.0001": "TIFF", "b.dat": "WEBP",
    "a.pcx": "PCX", "a.sgi": "SGI",
}  # fmt: skip


HEIC = pytest.param("a.heic", "HEIF", marks=needs("pillow_heif"))


@pytest.mark.parametrize(("name", "kind"), [*KINDS.items(), HEIC])
def test_every_kind_of_image_is_found_and_read(tmp_path, name, kind):
    from common.pictures import read_picture

    mode = {"a.pbm": "1", "a.pgm": "L"}.get(name, "RGB")
    PHOTO.convert(mode).save(tmp_path / name, kind)
    found = find_images(tmp_path)
    assert names(found) == [name]
    assert found.passed_over == ""
    assert read_picture(found.files[0]).image.size == (60, 40)


def test_a_line_counts_what_was_passed_over(tmp_path):
    for name in ("a.png", ".hidden.png", ".git/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PHOTO.save(tmp_path / name)
    for name in (
        "notes.txt",
        "list.csv",
        "README",
        "photo.nef",
        "x.dng",
        "b.png.part",
        ".DS_Store",
    ):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "no_folder.png").symlink_to("a.png/b.png")
    os.mkfifo(tmp_path / "pipe.png")
    PHOTO.save(tmp_path / "z.png")
    found = find_images(tmp_path)
    assert names(found) == ["a.png", "z.png"]
    parts = found.passed_over.removeprefix("passed over: ").split(", ")
    assert found.passed_over.startswith("passed over: ")
    for part in (
        "1 hidden folder", "1 hidden", "1 broken link",
        "1 broken link (itself.png: Too many levels of symbolic links)",
        "1 broken link (no_folder.png: Not a directory)", "1 no file", "2 camera raw (.dng",
        "3 no readable image (.csv", "1 unfinished or a copy (.part)",
    ):  # fmt: skip
        assert part in parts, found.passed_over


def test_where_there_is_none_the_line_says_what_there_is(tmp_path):
    (tmp_path / "photo.cr2").write_bytes(b"II*\0")
    with pytest.raises(InputError, match=r"no image in it; passed over: 1 camera raw \(\.cr2\)"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="no such folder or file"):
        find_images(tmp_path / "none")


def test_links_are_followed_and_no_folder_twice(tmp_path):
    inside, outside = tmp_path / "photos", tmp_path / "elsewhere"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (inside / "sub" / "a.png", outside / "b.png"):
        PHOTO.save(path)
    (inside / "linked").symlink_to(outside)
    (inside / "c.png").symlink_to(outside / "b.png")
    (inside / "sub" / "back").symlink_to(inside)  # a loop
    (inside / "again").symlink_to(inside / "sub")
    found = find_images(inside)
    assert names(found) == ["c.png", "linked/b.png", "sub/a.png"]
    assert found.passed_over == "passed over: 2 linked folder met before"
    assert names(find_images(inside / "linked")) == ["b.png"]


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    PHOTO.save(tmp_path / "a.png")
    scan = os.scandir

    def scandir(path):  # tests may run as root, whom nothing is locked for
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_images(tmp_path)
    assert names(found) == ["a.png"]
    assert found.passed_over == "passed over: 1 unreadable folder (locked: Permission denied)"


def test_by_suffix_only_names_count(tmp_path):
    PHOTO.save(tmp_path / "a.TIF", "TIFF")
    PHOTO.save(tmp_path / "b.png")
    found = find_by_suffix(tmp_path, frozenset((".tif", ".tiff")))
    assert names(found) == ["a.TIF"]
    assert found.passed_over == "passed over: 1 of another kind (.png)"


# --- names and paths ------------------------------------------------------------------------------


def test_names_fit_every_file_system(tmp_path):
    long = "日" * 83 + ".png"
    for name in ("a.png", "sub/a.png", long, f"sub/{long}", os.fsdecode(b"\xff" * 252), "x" * 255):
        path = tmp_path / short_enough(name, ".csv")
        write_whole(path, lambda file: file.write_text("x"))
        assert path.read_text() == "x"
    assert short_enough("sub/a.png", ".csv") == "sub/a.png.csv"
    assert short_enough("x" * 251, ".csv") == "x" * 251 + ".csv"
    assert short_enough(long + "1", ".csv") != short_enough(long + "2", ".csv")
    assert short_enough(long, ".csv") == short_enough(long, ".csv")


def test_a_long_suffix_of_a_name_is_no_matter(tmp_path):
    path = tmp_path / ("a." + "b" * 250)
    assert write_whole(path, lambda file: file.write_text("x")).read_text() == "x"
    assert list(tmp_path.iterdir()) == [path]


def test_printable_names():
    assert printable("日本 a.png") == "日本 a.png"
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    assert printable("a\nb\x1b[31m\u2028") == "a\\nb\\x1b[31m\\u2028"


def test_user_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/photos") == "/home/somebody/photos"
    assert user_path("~no_such_user_1/photos") == "~no_such_user_1/photos"
    assert user_path("zoo:mbt2018-mean:1") == "zoo:mbt2018-mean:1"
    with pytest.raises(ValueError, match="null"):
        user_path("a\0b")
