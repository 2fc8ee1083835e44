"""Lists the images of a source in a fixed order, and reads them by number.

A source is a folder, with all folders, webdataset tars and Parquet files in it; one tar; one Parquet file; or a data
set of the Hugging Face hub, whose files are such files.

The id of an image is its path relative to the source, with slashes. In a tar it is the path of the tar, "!" and the
name of the member: "holiday/beach.jpg", "shards/00017.tar!000123.jpg". In a Parquet file it is the path, "!" and the
row's key, or else its number. If the source is one file, ids are relative to its folder ("00017.tar!…"). Images are
sorted by id, by code point; those of a Parquet file keep the order of its rows.

A file is an image if its ending belongs to one of PIL's formats. Links to files are followed. Things that may hold
images but are not opened (a link to a folder, a compressed tar, a tar or a link inside a tar) are listed as bad images.
Files that may be images but are not read (HEIC without its package, raw data of cameras, names without an ending) are
listed as passed over. Files that certainly hold no image, and names that begin with a dot, are only counted by ending;
rows that are empty are only counted, too.

If captions are requested, the caption of an image is in a file next to it (``sidecars``), or in its row.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arrag_jax import huggingface, object_storage
from arrag_jax.config import BY_HABIT, ColumnsConfig
from arrag_jax.data import parquet, pixels
from arrag_jax.data.endings import TAR
from arrag_jax.data.entries import Entry, Listing, with_clean_id
from arrag_jax.data.examples import LASTING, BadImage, caption_of
from arrag_jax.data.hub_sets import files_of, root_of_hub
from arrag_jax.data.lister import Lister
from arrag_jax.data.stated_rights import LICENCE, SOURCE, Rights
from arrag_jax.errors import UserError

LARGEST = 2**30  # bytes of an image file; PIL's limit of pixels needs no more
CHANGED = "its size is not what it was when the build began"
SINGLE = (TAR, parquet.SUFFIX)  # endings of files that are sources themselves


class FileImages:
    """Listed images as a random-access source of examples (``data.examples.Images``).

    Args:
      root: the folder that paths are relative to.
      entries: the images, in order.
      size: height and width of the images that are returned.
    """

    def __init__(self, root: Path, entries: list[Entry], size: tuple[int, int]):
        self.root, self.entries, self.size = root, entries, size

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [h, w, 3], "caption": str}, and "rights", if they were requested and are stated.

        Raises:
          BadImage: if the image cannot be read.
        """
        entry = self.entries[index]
        stated = {"rights": Rights(entry.licence, entry.source)} if entry.licence or entry.source else {}
        return {"image": pixels.decode(read_entry(self.root, entry), self.size), "caption": entry.caption, **stated}

    def source_id(self, index: int) -> str:
        """Returns the id of an image."""
        return self.entries[index].id

    def caption(self, index: int) -> str:
        """Returns an image's caption in one line; raises ``BadImage`` if the listing has a fault for the image."""
        if self.entries[index].fault:
            raise BadImage(self.entries[index].fault)
        return caption_of({"caption": self.entries[index].caption})

    @property
    def num_passed_over(self) -> int:
        """Number of entries that are passed over."""
        return sum(entry.is_passed_over for entry in self.entries)


def root_of(source: str) -> Path:
    """Returns the folder that a source's ids are relative to; the ending decides if the source no longer exists."""
    if huggingface.is_id(source):
        return root_of_hub(source)
    path = object_storage.snapshot(source, "source").place if object_storage.is_address(source) else Path(source)
    is_folder = path.is_dir() or not (path.exists() or source.lower().endswith(SINGLE))
    return path if is_folder else path.parent


def spelt_alike(source: str, known: Iterable[str]) -> str:
    """Returns the spelling of the first known source that is the same file or folder, else ``source`` itself."""
    return next((x for x in known if x == source or Path(x).resolve() == Path(source).resolve()), source)


def list_images(source: str, captions: bool = False) -> list[Entry]:
    """Returns the entries of ``list_source``."""
    return list_source(source, captions).entries


def list_source(
    source: str,
    captions: bool = False,
    key: str = "config.source",
    columns: ColumnsConfig = BY_HABIT,
    rights: bool = False,
) -> Listing:
    """Returns every image of a source, in order.

    Args:
      source: path or address of a folder, a tar or a Parquet file, or the id of a data set of the hub. What is not here
        is copied here.
      captions: whether to read captions.
      key: name of the setting, for error messages.
      columns: the columns of Parquet files.
      rights: whether to read licences and sources.

    Raises:
      UserError: if there is no such source, it holds no image, or captions or rights are requested and there are none.
    """
    path = object_storage.copied(source, key) if object_storage.is_address(source) else Path(source)
    if huggingface.is_id(source):
        root, names = files_of(source, key)
        lister = Lister(root, captions, columns, rights)
        found = lister.named(names)
    else:
        _require_source(path, source, key)
        lister = Lister(root_of(source), captions, columns, rights)
        found = lister.walk() if path.is_dir() else lister.named([path.name])
    entries = sorted(map(with_clean_id, found), key=lambda entry: entry.order)
    if lister.refused and all(entry.id in lister.refused for entry in entries):
        where, reason = next(iter(lister.refused.items()))
        raise UserError(f"{key}={source}: {where} cannot be read: {reason}")
    if all(entry.is_passed_over for entry in entries):
        others = "".join(f"; {entry.id}: {entry.fault}" for entry in entries[:3])
        others += f"; {lister.unused} (name one: config.columns.image)" if lister.unused else ""
        raise UserError(f"{key}={source} holds no image (endings are {', '.join(pixels.SUFFIXES)}) and no .tar{others}")
    if captions and not any(entry.caption for entry in entries):
        raise UserError(
            f"{key}={source} has no captions (a .txt or .json beside an image, or a column of a Parquet file: "
            "config.columns.caption); add them. A datastore can do without: config.captions=False"
        )
    if rights and not any(entry.licence or entry.source for entry in entries):
        raise UserError(
            f"{key}={source} states no licence or source of an image (keys {', '.join((*LICENCE, *SOURCE))} of a .json "
            "beside it, or such columns of a Parquet file); add them, or leave config.rights out"
        )
    return Listing(entries, dict(sorted(lister.beside.items())))


def _require_source(path: Path, source: str, key: str) -> None:
    """Raises UserError unless the path is a folder or a file that can be a source."""
    if not path.exists():
        hub = f"; for a data set of the hub write hf:datasets/{source}" if len(path.parts) == 2 else ""
        raise UserError(
            f"{key}={source} does not exist; give a folder of images, a .tar, a .parquet or a data set's name{hub}"
        )
    if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(SINGLE)):
        raise UserError(
            f"{key}={source} is neither a folder nor a plain .tar nor a .parquet; give one, or the folder it is in"
        )


def read_entry(root: Path, entry: Entry) -> bytes:
    """Returns the bytes of an image file.

    Raises:
      BadImage: if the file is missing, unreadable or too large, or its size has changed since it was listed.
      UserError: if reading failed for a reason that may be temporary.
    """
    if entry.fault:
        raise BadImage(entry.fault)
    if entry.size > LARGEST:
        raise BadImage(f"too large: {entry.size:,} bytes, more than {LARGEST:,}")
    if entry.column:
        data = parquet.read_row(root / entry.path, entry.column, entry.offset)
        if len(data) != entry.size:
            raise BadImage(CHANGED)
        return data
    try:
        with open(root / entry.path, "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
            longer = not entry.offset and os.fstat(file.fileno()).st_size > entry.size
    except LASTING as error:
        raise BadImage(f"unreadable: {error.strerror}") from error
    except OSError as error:
        raise UserError(f"cannot read {root / entry.path}: {error}; run the same command again to continue") from error
    if len(data) != entry.size or longer:
        raise BadImage(CHANGED)
    return data
