"""Decides by a file's name whether it is an image, holds no image, or may be an image that cannot be read."""

import re
from pathlib import PurePosixPath

from arrag_jax.data import pixels


def _those(text: str) -> frozenset[str]:
    return frozenset(text.split())


TAR = ".tar"
COMPRESSED = (
    *(f".tar.{x}" for x in ("gz", "bz2", "xz", "zst", "lz4", "lzma", "lz", "br", "z")),
    *(".tgz", ".tbz", ".tbz2", ".txz", ".tlz", ".tzst", ".taz"),
)
NO_ENDING, HIDDEN = "without ending", "hidden"
# Files that hold no image: captions, labels, tables, features, web pages, programs, checksums, sounds.
BESIDE = _those(
    ".txt .text .caption .json .jsn .jsonl .ndjson .csv .tsv .xml .yaml .yml .toml .ini .cfg .db .log .md .rst .html "
    ".htm .url .npy .npz .pt .pth .pyd .ten .mp .msg .parquet .arrow .feather .h5 .hdf5 .pkl .pickle .mat .cls .cls2 "
    ".class .count .index .idx .inx .id .transcript .prompt .tags .srt .vtt .aae .xmp .thm .md5 .sha1 .sha256 .py .sh "
    ".lock .tmp .part .bak .swp .wav .mp3 .flac .ogg .m4a .aac"
)
RAW = _those(
    ".raw .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .rwl .pef .ptx .srw .x3f .3fr .fff .iiq .dcr "
    ".kdc .mrw .mef .mos .erf .gpr"
)
ARCHIVES = _those(".zip .rar .7z .gz .bz2 .xz .zst .lz4 .cab .iso .cbz .cbr")
FILMS = _those(".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv .flv .3gp .mts .m2ts .ts")
DRAWINGS = _those(".svg .svgz .eps .ps .ai .pdf .wmf .emf .cdr .dxf")


def ending(name: str) -> str:
    """Returns the ending under which a file name or an image's id is counted.

    It is an ending such as ".jpg" or ".tar.gz", or ``NO_ENDING``, ``HIDDEN`` or "of another ending".
    """
    base = PurePosixPath(name.lower().rpartition(f"{TAR}!")[2]).name
    if base.startswith("."):
        return HIDDEN
    compressed = next((x for x in COMPRESSED if base.endswith(x)), None)
    suffix = compressed or PurePosixPath(base).suffix
    if len(suffix) < 2:
        return NO_ENDING
    return suffix if re.fullmatch(r"[.\w+-]{2,12}", suffix) else "of another ending"


def is_image(name: str) -> bool:
    """Returns whether the ending is that of an image format that we read."""
    return name.lower().endswith(pixels.SUFFIXES)


def is_beside(name: str) -> bool:
    """Returns whether a file certainly holds no image."""
    return ending(name) in BESIDE


def why_passed_over(name: str) -> str:
    """Returns why a file that may be an image is not read, and what the user can do."""
    found = ending(name)
    if found in pixels.HEIF:
        return f"{found} is read where pillow-heif is installed: pip install {pixels.HEIF_PACKAGE}"
    if found in RAW:
        return f"{found} is the raw data of a camera; develop it to JPEG, PNG or TIFF"
    if found in ARCHIVES:
        return f"{found} is an archive that is not looked into; unpack it"
    if found in FILMS:
        return f"{found} is a film; save its frames as images"
    if found in DRAWINGS:
        return f"{found} is a drawing or a document; render it to PNG"
    if found == NO_ENDING:
        return "its name has no ending that tells what it is; rename it"
    return "its ending is none of an image format that is read; convert or rename it"
