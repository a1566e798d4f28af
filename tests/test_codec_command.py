"""The codec's command line: files and folders of every kind, and what goes wrong with them."""

import io
import os
import subprocess
import sys

import numpy as np
import skimage
import torch
from PIL import Image

import codec
from codec import main
from coding.coder import decode_picture
from conftest import ROOT, WEIGHTS, to_x
from pixels import png


def test_the_commands_make_pictures_into_files_and_back(coder, photos, tmp_path, capsys):
    coded, decoded = tmp_path / "coded", tmp_path / "decoded"
    Image.fromarray(skimage.data.rocket()[:40, :60]).save(photos / "d.jpg")
    assert main(["compress", str(photos), "--checkpoint", str(WEIGHTS), "-o", str(coded)]) == 0
    files = sorted(coded.iterdir())
    assert [file.name for file in files] == [
        "a_chelsea.png.olc", "b_coffee.png.olc", "c_rocket.png.olc", "d.jpg.olc"
    ]  # fmt: skip
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["file", *(f.name for f in files), "mean"]
    assert table[1].split()[1:3] == ["81x71", str(files[0].stat().st_size)]

    twin = tmp_path / "twin" / files[0].name
    twin.parent.mkdir()
    twin.write_bytes(files[0].read_bytes())
    assert main(["info", *map(str, files), str(twin)]) == 0
    said = capsys.readouterr().out
    assert f"{files[0]}: version 2, 81x71 pixels" in said
    assert f"  {files[0].stat().st_size} bytes: header 35, groups 36 + " in said

    assert main(["decompress", str(coded), "--checkpoint", str(WEIGHTS), "-o", str(decoded)]) == 0
    pictures = sorted(file.name for file in decoded.iterdir())
    assert pictures == ["a_chelsea.png", "b_coffee.png", "c_rocket.png", "d.jpg.png"]
    shown = to_x(np.asarray(Image.open(decoded / "a_chelsea.png")))
    x_hat = decode_picture(coder, files[0].read_bytes())
    assert torch.equal((x_hat * 255).round(), (shown * 255).round())


def test_wrong_things_are_one_line_each_and_the_rest_goes_on(photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"\x89PNG not one")
    arguments = ["--checkpoint", str(WEIGHTS), "-o", str(tmp_path / "coded")]
    assert main(["compress", str(photos), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    damaged = tmp_path / "coded" / "b_coffee.png.olc"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    arguments[-1] = str(tmp_path / "decoded")
    assert main(["decompress", str(tmp_path / "coded"), *arguments]) == 2
    assert capsys.readouterr().err == (
        f"error: {damaged}: truncated or damaged: its checksum does not match its bytes\n"
    )
    assert sorted(f.name for f in (tmp_path / "decoded").iterdir()) == [
        "a_chelsea.png", "c_rocket.png"
    ]  # fmt: skip


def test_nothing_is_overwritten_unasked(photos, tmp_path, capsys):
    """Least of all the originals, beside which files are made and decoded."""
    arguments = [str(photos), "--checkpoint", str(WEIGHTS), "-o", str(photos)]
    before = (photos / "a_chelsea.png").read_bytes()
    assert main(["compress", *arguments]) == 0
    for command in ("compress", "decompress"):
        assert main([command, *arguments]) == 2
        assert "is there already: see --overwrite" in capsys.readouterr().err
    assert (photos / "a_chelsea.png").read_bytes() == before
    assert main(["decompress", *arguments, "--overwrite"]) == 0
    assert (photos / "a_chelsea.png").read_bytes() != before


def test_a_large_file_is_not_read_in_vain(small_file, tmp_path, capsys):
    """A terabyte of holes behind a header, and behind none."""
    for start in (small_file[0], b"anything"):
        with (tmp_path / "a.olc").open("wb") as file:
            file.write(start)
            file.truncate(2**40)
        assert main(["info", str(tmp_path / "a.olc")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_two_files_of_one_name_are_refused_before_anything_is_read(photos, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (photos / "a_chelsea.png").rename(other / "b_coffee.png")
    paths = [str(photos), str(other)]
    arguments = ["--checkpoint", "no", "-o", str(tmp_path / "coded")]
    assert main(["compress", *paths, *arguments]) == 2
    assert "would both become b_coffee.png.olc" in capsys.readouterr().err
    assert not (tmp_path / "coded").exists()


def test_names_of_every_kind_there_and_back(photos, tmp_path, monkeypatch):
    """No text in UTF-8, a line end, as long as a name can be; on a console of ASCII."""
    names = [os.fsdecode(b"caf\xe9.png"), "a\nb.png", "日" * 83 + ".png"]
    for old, new in zip(sorted(photos.iterdir()), names, strict=True):
        old.rename(photos / new)
    folders = [str(photos), str(tmp_path / "coded"), str(tmp_path / "decoded")]
    for command, source, target in (("compress", *folders[:2]), ("decompress", *folders[1:])):
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
        assert main([command, source, "--checkpoint", str(WEIGHTS), "-o", target]) == 0
        assert b"caf\\xe9.png" in shown.getvalue() and b"a\\nb.png" in shown.getvalue()
    decoded = [os.fsencode(file.name) for file in (tmp_path / "decoded").iterdir()]
    assert len(decoded) == 3
    assert {b"caf\xe9.png", b"a\nb.png"} < {*decoded}


def test_files_whose_pictures_would_have_one_name_come_back_apart(coder, tmp_path, capsys):
    photos, coded, decoded = (tmp_path / name for name in ("photos", "coded", "decoded"))
    photos.mkdir()
    crops = {
        "a.jpg": skimage.data.coffee()[:48, :48], "a.jpg.png": skimage.data.rocket()[200:264, :48],
        "b": skimage.data.chelsea()[:32, :48], "b.png": skimage.data.chelsea()[:48, :32],
    }  # fmt: skip
    for name, pixels in crops.items():
        kind = "JPEG" if name == "a.jpg" else "PNG"
        Image.fromarray(pixels).save(photos / name, kind)
    assert main(["compress", str(photos), "--checkpoint", str(WEIGHTS), "-o", str(coded)]) == 0
    assert main(["decompress", str(coded), "--checkpoint", str(WEIGHTS), "-o", str(decoded)]) == 0
    comes_back_as = {
        "a.jpg": "a.jpg.png.png", "a.jpg.png": "a.jpg.png", "b": "b.png.png", "b.png": "b.png"
    }  # fmt: skip
    for name, picture in comes_back_as.items():
        x_hat = decode_picture(coder, (coded / f"{name}.olc").read_bytes())
        shown = to_x(np.asarray(Image.open(decoded / picture)))
        assert torch.equal((x_hat * 255).round(), (shown * 255).round())
    assert len(list(decoded.iterdir())) == 4


def test_what_cannot_be_written_is_to_blame_not_what_is_read(photos, tmp_path, capsys, monkeypatch):
    arguments = ["--checkpoint", str(WEIGHTS), "-o", "/proc/coded"]  # where nobody can write
    assert main(["compress", str(photos), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: /proc/coded: ") and error.count("\n") == 1
    arguments[-1] = str(tmp_path / "coded")

    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    first = codec.write_whole
    monkeypatch.setattr(
        codec, "write_whole", lambda path, w: (full if path.suffix == ".olc" else first)(path, w)
    )
    assert main(["compress", str(photos), *arguments]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"error: {tmp_path}/coded/")
        assert line.endswith(".png.olc: No space left on device")


def test_the_home_folder_in_every_path(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(photos)
    (tmp_path / "weights").symlink_to(WEIGHTS)
    options = ["--checkpoint", "~/weights", "-o", "~/coded"]
    assert main(["compress", "~/photos/a_chelsea.png", *options]) == 0
    assert main(["info", "~/coded"]) == 0
    assert not list(photos.glob("~*"))
    assert (tmp_path / "coded" / "a_chelsea.png.olc").is_file()


def test_a_reader_that_has_seen_enough_is_no_error(photos, tmp_path):
    coded = str(tmp_path / "coded")
    assert main(["compress", str(photos), "--checkpoint", str(WEIGHTS), "-o", coded]) == 0
    process = subprocess.Popen(
        [sys.executable, "codec.py", "info", *[coded] * 3], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + 13


def test_large_pictures_are_refused_before_they_are_decoded(photos, tmp_path, capsys):
    """Of 200 megapixels, by a header alone; the others go on."""
    (photos / "huge.png").write_bytes(png(20_000, 10_000, 2, b""))
    arguments = ["--checkpoint", str(WEIGHTS), "-o", str(tmp_path / "coded")]
    assert main(["compress", str(photos), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "huge.png: 200000000 pixels: at most 178956970 can be coded" in error
    assert len(list((tmp_path / "coded").iterdir())) == 3
