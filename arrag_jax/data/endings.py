"""Tells from a file's name whether it is an image, stands beside images, or is passed over because it may be one."""

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
# Files that stand beside images and hold none: captions, labels, tables, features, pages, programs, sums, sounds.
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
    """Returns the ending that a name or an image's id is counted by: ".jpg", ".tar.gz"; ``NO_ENDING``, ``HIDDEN``."""
    base = PurePosixPath(name.lower().rpartition(f"{TAR}!")[2]).name
    if base.startswith("."):
        return HIDDEN
    compressed = next((x for x in COMPRESSED if base.endswith(x)), None)
    suffix = compressed or PurePosixPath(base).suffix
    if len(suffix) < 2:
        return NO_ENDING
    return suffix if re.fullmatch(r"[.\w+-]{2,12}", suffix) else "of another ending"


def is_image(name: str) -> bool:
    """Whether the ending is that of a format which is read."""
    return name.lower().endswith(pixels.SUFFIXES)


def is_beside(name: str) -> bool:
    """Whether a file obviously holds no image."""
    return ending(name) in BESIDE


def why_passed_over(name: str) -> str:
    """Returns the reason why a file that is neither an image nor beside one is passed over, and the mend."""
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
