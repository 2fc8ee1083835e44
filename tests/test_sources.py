"""Sources of images: every kind of file gives the pixels its format means, or the reason why it has none."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from arrag_jax.data import pixels, sources
from arrag_jax.data.entries import load_listing, save_listing
from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError
from helpers import malformed

SIZE = (12, 12)
RAMP = np.linspace(0, 1, 144).reshape(SIZE)  # a picture of the very size, so that nothing is scaled


def decode(image: Image.Image, form: str, **options) -> np.ndarray:
    return pixels.decode(malformed.encoded(form, image, **options), SIZE)


def rgb(values: np.ndarray) -> np.ndarray:
    """Grey values 0 … 255 in three channels."""
    return np.repeat(np.round(values).astype(np.uint8)[..., None], 3, -1)


def test_every_malformed_image_gives_its_reason(tmp_path):
    malformed.write_all(tmp_path)
    entries = sources.list_images(str(tmp_path))
    malformed.spoil(tmp_path)
    images, reasons = sources.FileImages(tmp_path, entries, SIZE), {}
    for i in range(len(images)):
        try:
            assert images[i]["image"].shape == (*SIZE, 3)
            assert images.source_id(i) == "twice.tar!a.jpg"  # its first member of that name
        except BadImage as reason:
            reasons[images.source_id(i)] = str(reason)
    wanted = malformed.expected()
    assert len(wanted) >= 40
    assert reasons.keys() == wanted.keys()
    assert {name: reasons[name][: len(reason)] for name, reason in wanted.items()} == wanted
    assert not any("\n" in reason or "\t" in reason for reason in reasons.values())


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(form):
    deep = Image.fromarray(np.round(RAMP * 65535).astype(np.uint16))
    np.testing.assert_array_equal(decode(deep, form), rgb(RAMP * 255))


def test_numbers_are_scaled_by_the_white_they_fit():
    for white in (1, 255, 65535):
        np.testing.assert_array_equal(
            decode(Image.fromarray((RAMP * white).astype(np.float32)), "TIFF"), rgb(RAMP * 255)
        )
    whole = Image.fromarray(np.round(RAMP * 65535).astype(np.int32))
    np.testing.assert_array_equal(decode(whole, "TIFF"), rgb(RAMP * 255))


def test_transparent_pixels_are_white():
    """By an alpha channel (also beside grey, and in a palette), and by a colour that stands for nothing."""
    grey, alpha = np.full(SIZE, 100, np.uint8), np.zeros(SIZE, np.uint8)
    alpha[:, :6] = 255
    wanted = rgb(np.where(alpha == 255, 100, 255))
    beside = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    np.testing.assert_array_equal(decode(beside, "PNG"), wanted)
    np.testing.assert_array_equal(decode(beside.convert("RGBA"), "PNG"), wanted)
    indexed = Image.fromarray((alpha == 0).astype(np.uint8), mode="P")
    indexed.putpalette([100, 100, 100, 7, 8, 9])
    for form in ("PNG", "GIF"):
        np.testing.assert_array_equal(decode(indexed, form, transparency=1), wanted)
    named = Image.fromarray(np.where(alpha == 255, 100, 3).astype(np.uint8))
    np.testing.assert_array_equal(decode(named, "PNG", transparency=3), wanted)
    half = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(np.full(SIZE, 128, np.uint8))))
    np.testing.assert_allclose(decode(half, "PNG"), 100 * 128 / 255 + 255 * 127 / 255, atol=1)


def test_other_colour_spaces_become_rgb():
    red = np.zeros((*SIZE, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
    image = Image.fromarray(red)
    np.testing.assert_allclose(decode(image.convert("CMYK"), "TIFF"), red, atol=1)
    np.testing.assert_allclose(decode(image.convert("CMYK"), "JPEG", quality=100), red, atol=4)
    # Pillow 12.3 writes uncompressed TIFF files of YCbCr that it cannot read.
    np.testing.assert_allclose(decode(image.convert("YCbCr"), "TIFF", compression="tiff_lzw"), red, atol=3)
    np.testing.assert_allclose(pixels.to_rgb(image.convert("YCbCr")), red, atol=3)
    np.testing.assert_allclose(decode(Image.new("LAB", SIZE, (255, 128, 128)), "TIFF"), 255, atol=2)
    bits = Image.fromarray((RAMP > 0.5).astype(np.uint8) * 255).convert("1")
    np.testing.assert_array_equal(decode(bits, "PNG"), rgb((RAMP > 0.5) * 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_data_say(orientation):
    image, exif = malformed.photo(size=(12, 12)), Image.Exif()
    exif[0x0112] = orientation
    turned = Image.open(io.BytesIO(malformed.encoded("PNG", image, exif=exif)))
    np.testing.assert_array_equal(decode(image, "PNG", exif=exif), np.asarray(ImageOps.exif_transpose(turned)))


def test_unreadable_exif_data_are_none():
    image = malformed.photo(size=(12, 12))
    np.testing.assert_array_equal(decode(image, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), np.asarray(image))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_counts(form):
    frames = [Image.fromarray(rgb(np.full(SIZE, value))) for value in (40, 90, 140)]
    options = {"lossless": True} if form == "WEBP" else {}
    found = decode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(found, 40)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (61, 61), (5, 9), (13, 12), (1, 400)])
def test_the_shorter_side_is_scaled_and_the_middle_cut_out(size):
    """Against torchvision's Resize and CenterCrop as they are defined, on whole pictures."""
    image, (height, width) = malformed.photo(size=size), SIZE
    short, long = sorted(size)
    scaled_long = int(width * long / short)
    scaled = image.resize((width, scaled_long) if size[0] <= size[1] else (scaled_long, height), Image.BILINEAR)
    top, left = round((scaled.height - height) / 2), round((scaled.width - width) / 2)
    wanted = np.asarray(scaled)[top : top + height, left : left + width]
    np.testing.assert_array_equal(decode(image, "PNG"), wanted)


def test_a_line_of_pixels_does_not_fill_the_memory():
    """1 x 60,000 pixels: scaled whole, its longer side would have 720,000; the middle is what counts."""
    line = np.repeat(np.arange(60_000, dtype=np.uint32)[:, None] // 300, 3, 1).astype(np.uint8)[None]
    found = decode(Image.fromarray(line), "PNG")
    assert set(np.unique(found)) <= {99, 100}


def test_a_large_jpeg_is_nearly_as_if_decoded_whole():
    smooth = Image.fromarray(np.uint8(RAMP * 255)).resize((480, 480), Image.BICUBIC).convert("RGB")
    data = malformed.encoded("JPEG", smooth, quality=95)
    whole = Image.open(io.BytesIO(data)).convert("RGB").resize(SIZE, Image.BILINEAR)
    np.testing.assert_allclose(pixels.decode(data, SIZE), np.asarray(whole), atol=3)


def test_a_folder_is_listed_with_all_below_it_in_one_order(tmp_path):
    good = malformed.encoded("PNG", malformed.photo(size=(12, 12)))
    for name in ("b.PNG", "a/z.jpg", "a.png", ".hidden.png", ".hidden/c.png", "notes.txt", "ä ö.png", "a/b/c.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(good)
    (tmp_path / "link.png").symlink_to(tmp_path / "b.PNG")
    with tarfile.open(tmp_path / "a" / "web.TAR", "w") as tar:
        for name in ("2.png", "1.png", "1.txt", "./d/3.jpg"):
            malformed.add(tar, name, good)
    ids = [entry.id for entry in sources.list_images(str(tmp_path))]
    members = [f"a/web.TAR!{name}" for name in ("1.png", "2.png", "d/3.jpg")]
    assert ids == ["a.png", "a/b/c.webp", *members, "a/z.jpg", "b.PNG", "link.png", "ä ö.png"]
    alone = sources.list_images(str(tmp_path / "a" / "web.TAR"))
    assert [f"a/{entry.id}" for entry in alone] == members
    assert all(sources.read_entry(tmp_path / "a", entry) == good for entry in alone)


def test_captions_stand_beside_their_images(tmp_path):
    """In a folder and in a tar alike: a .txt's first line, else a .json's "caption", else nothing."""
    notes = {
        "1.txt": b"\n  a cat \nsecond line\n", "1.json": b'{"caption": "not this"}',
        "2.json": b'{"caption": "two d\xc3\xb6gs"}', "3.json": b'{"width": 4}', "4.txt": b"", "6.json": b"{",
        "7.json": b'{"caption": 7}', "8.txt": b"\xff", "9.json": b'{"caption": "\\ud800"}',
    }  # fmt: skip
    good = malformed.encoded("PNG")
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for name, data in {**notes, **{f"{i}.png": good for i in range(1, 10)}}.items():
            malformed.add(tar, name, data)
            (tmp_path / name).write_bytes(data)
    entries = {entry.id: entry for entry in sources.list_images(str(tmp_path), captions=True)}
    for where in ("", "web.tar!"):
        found = [entries[f"{where}{i}.png"] for i in range(1, 10)]
        assert [entry.caption for entry in found] == ["a cat", "two dögs", *[""] * 7]
        assert [entry.fault.partition(" cannot be read: ")[0] for entry in found] == [
            *[""] * 5,
            *(f"its caption in {where}{name}" for name in ("6.json", "7.json", "8.txt", "9.json")),
        ]
    assert not any(entry.caption or entry.fault for entry in sources.list_images(str(tmp_path)))
    images = sources.FileImages(tmp_path, list(entries.values()), SIZE)
    assert images[0]["caption"] == "a cat"


def test_a_source_that_does_not_do_is_told_before_work(tmp_path):
    """One photo, a pipe, a compressed tar; and captions asked for where there are none."""
    (tmp_path / "photo.jpg").write_bytes(malformed.encoded("JPEG"))
    (tmp_path / "x.tar.gz").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("photo.jpg", "x.tar.gz", "pipe.tar"):
        with pytest.raises(
            UserError, match=rf"source=.*{name} is neither a folder nor a plain \.tar nor a \.parquet; give"
        ):
            sources.list_images(str(tmp_path / name))
    with pytest.raises(
        UserError, match=r"has no captions \(a \.txt or \.json beside an image, or a column .*\); add them"
    ):
        sources.list_images(str(tmp_path), captions=True)


def test_sources_without_images_are_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        sources.list_images(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no image"):
        sources.list_images(str(tmp_path))


def test_a_failure_that_may_pass_is_no_bad_image(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(malformed.encoded("PNG"))
    entry = sources.list_images(str(tmp_path))[0]

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sources, "open", failing, raising=False)
    with pytest.raises(UserError, match="run the same command again") as caught:
        sources.read_entry(tmp_path, entry)
    assert not isinstance(caught.value, BadImage)


def test_a_listing_is_read_as_it_was_written(tmp_path):
    malformed.write_all(tmp_path)
    entries = sources.list_images(str(tmp_path))
    save_listing(tmp_path / "listing", entries)
    assert load_listing(tmp_path / "listing") == entries
    (tmp_path / "listing").write_text("[1")
    with pytest.raises(UserError, match="damaged"):
        load_listing(tmp_path / "listing")
