"""Files that are no images, each with what is to be said of it; made by ``write_all``, spoilt by ``spoil``."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def photo(mode: str = "RGB", size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """Noise that compresses badly, so that a half of its file is half of its pixels."""
    channels = {"RGB": (3,), "L": ()}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), np.uint8)
    return Image.fromarray(noise)


def encoded(form: str, image: Image.Image | None = None, **options) -> bytes:
    """An image as a file of this format."""
    file = io.BytesIO()
    (image or photo()).save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that claims this size and holds a few bytes of pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def half(form: str, **options) -> bytes:
    """The first half of an image file."""
    data = encoded(form, **options)
    return data[: len(data) // 2]


def flipped(data: bytes, where: int, count: int = 1) -> bytes:
    """With a few bytes inverted."""
    return data[:where] + bytes(255 - x for x in data[where : where + count]) + data[where + count :]


def numbers(values: np.ndarray) -> bytes:
    """A TIFF of these pixels."""
    return encoded("TIFF", Image.fromarray(values))


NOTHING, DAMAGED = "not an image that PIL reads", "damaged image: "
CUT, DECODER = DAMAGED + "image file is truncated", DAMAGED + "could not create decoder object"
# File name → its content and how the reason begins.
FILES = {
    "empty.jpg": (b"", "empty file"),
    "zeros.png": (bytes(1000), NOTHING),
    "text.jpg": (b"hello", NOTHING),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    "page.png": (b"<!doctype html><html></html>", NOTHING),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOTHING),
    "document.jpg": (b"%PDF-1.7\n%%EOF\n", NOTHING),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", NOTHING),
    "archive.png": (b"PK\x05\x06" + bytes(18), NOTHING),
    "noise.webp": (b"RIFF\x40\0\0\0WEBPVP8 " + bytes(50), DECODER),
    "signature.png": (encoded("PNG")[:8], NOTHING),
    "header.jpg": (encoded("JPEG")[:20], NOTHING),
    "half.jpg": (half("JPEG"), CUT),
    "half.png": (half("PNG"), CUT),
    "half.gif": (half("GIF"), CUT),
    "half.webp": (half("WEBP", lossless=True), DECODER),
    "half.tif": (half("TIFF"), CUT),
    "half.bmp": (half("BMP"), CUT),
    "half.ppm": (half("PPM"), CUT),
    "half.tga": (half("TGA"), CUT),
    "half.jp2": (half("JPEG2000"), DAMAGED + "broken data stream"),
    "sum.png": (flipped(encoded("PNG"), 30), NOTHING),
    "pixels.png": (flipped(encoded("PNG"), 60, 200), DAMAGED + "unrecognized data stream contents"),
    "flat.png": (png(0, 10), NOTHING),
    "short.png": (png(40, 30), CUT),
    "bomb.png": (png(50_000, 50_000), "too large: Image size (2500000000 pixels) exceeds limit"),
    "large.png": (png(10_000, 9_000), "too large: 10,000 x 9,000 pixels, more than 89,478,485"),
    "comment.png": (
        png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22)))),
        DAMAGED + "Decompressed data too large",
    ),
    "white.ppm": (b"P6 2 2 0\n" + bytes(12), DAMAGED + "maxval must be greater than 0"),
    "nan.tif": (numbers(np.full((9, 9), np.nan, np.float32)), "its pixels run from nan to nan: outside 0 to 65535"),
    "negative.tif": (numbers(np.full((9, 9), -3, np.int32)), "its pixels run from -3 to -3: outside 0 to 65535"),
    "line\nbreak.jpg": (encoded("JPEG"), "its name holds control characters"),
    b"latin\xe9.jpg": (encoded("JPEG"), "its name holds control characters or is not UTF-8"),
}
# What cannot be read as a file, or is a tar.
OTHERS = {
    "dangling.jpg": "unreadable: No such file or directory",
    "ring.jpg": "unreadable: Too many levels of symbolic links",
    "folder.jpg": "not a file but a folder or a device",
    "pipe.jpg": "not a file but a folder or a device",
    "noise.tar": "not a whole tar file (0 images found in it): invalid header",
    "packed.tar": "not a whole tar file (0 images found in it): invalid header",
    "cut.tar!last.jpg": "cut off: the tar ends before it",
    "cut.tar": "not a whole tar file (0 images found in it): unexpected end of data",
    "pipe.TAR": "not a file but a folder or a device",
    "packed.tar.gz": "a compressed tar, in which nothing can be looked up; unpack it",
    "packed.TGZ": "a compressed tar, in which nothing can be looked up; unpack it",
    "elsewhere": "a link to a folder, which is not followed",
    "nest.tar!inner.tar": "a tar inside a tar; unpack it",
    "nest.tar!alias.jpg": "a link inside a tar",
    "twice.tar!a.jpg": "the tar holds an earlier member of this name",
    "twice.tar!text.jpg": NOTHING,
}
# Good when they are listed, spoilt before they are read.
SPOILT = {
    "shorter.jpg": "its size is not what it was",
    "longer.jpg": "its size is not what it was",
    "gone.jpg": "unreadable: No such file or directory",
}


def expected() -> dict[str, str]:
    """Id → how its reason begins, of all that is bad."""
    names = {os.fsdecode(name): reason for name, (_, reason) in FILES.items()}
    return {name.encode("unicode_escape").decode(): reason for name, reason in names.items()} | OTHERS | SPOILT


def write_all(folder: Path) -> None:
    """Makes them all in a folder."""
    for name, (data, _) in FILES.items():
        with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as file:
            file.write(data)
    for name in SPOILT:
        (folder / name).write_bytes(encoded("JPEG"))
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "ring.jpg").symlink_to("ring.jpg")
    (folder / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "pipe.TAR"):
        os.mkfifo(folder / name)
    for name in ("packed.tar.gz", "packed.TGZ"):
        (folder / name).write_bytes(b"")
    (folder / "elsewhere").symlink_to(folder / "folder.jpg")
    with tarfile.open(folder / "nest.tar", "w") as tar:
        add(tar, "inner.tar", b"")
        alias = tarfile.TarInfo("alias.jpg")
        alias.type, alias.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(alias)
    (folder / "noise.tar").write_bytes(b"noise" * 200)
    with tarfile.open(folder / "packed.tar", "w:gz") as tar:
        add(tar, "a.jpg", encoded("JPEG"))
    with tarfile.open(folder / "cut.tar", "w") as tar:
        add(tar, "last.jpg", encoded("JPEG"))
    os.truncate(folder / "cut.tar", 700)
    with tarfile.open(folder / "twice.tar", "w") as tar:
        for name in ("a.jpg", "a.jpg", ".hidden.jpg", "a.txt"):
            add(tar, name, encoded("JPEG"))
        add(tar, "text.jpg", b"hello")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def spoil(folder: Path) -> None:
    """What happens to some of them after they were listed."""
    data = (folder / "shorter.jpg").read_bytes()
    (folder / "shorter.jpg").write_bytes(data[:-1])
    (folder / "longer.jpg").write_bytes(data + b"\0")
    (folder / "gone.jpg").unlink()
