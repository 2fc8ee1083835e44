"""Reads repositories of the Hugging Face hub by id, through the hub's own client and its cache.

An id is written ``hf:OWNER/NAME[@REVISION][:PART]`` for a model and ``hf:datasets/OWNER/NAME[@REVISION][:PART]`` for a
data set. The part is a folder of the repository, or a split of a data set. The client's variables apply: ``HF_TOKEN``,
``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``. It is imported at the first id that is read, not before.

An id without a revision means the newest commit. A process looks it up once, so that all of its reads see one commit.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from arrag_jax import console, progress
from arrag_jax.errors import UserError, printable

PREFIX = "hf:"
MODEL, DATASET = "model", "dataset"
FORMS = {MODEL: "hf:OWNER/NAME[@REVISION][:FOLDER]", DATASET: "hf:datasets/OWNER/NAME[@REVISION][:PART]"}
MAIN = "main"
ASKING = "asking for its files"
_ID = re.compile(r"hf:(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<part>.*))?")
_RECORDED = re.compile(r'"(hf:[^"\\]+@[0-9a-f]{40}(?::[^"\\]*)?)"')
_COMMIT = re.compile(r"[0-9a-f]{40}")
BESIDE = ("README.md", ".gitattributes")  # the hub's own files in a repository
LARGEST_RECORD = 2**24  # bytes of a record that is searched for ids
HASHED = 2**20  # bytes of a file that are hashed at a time


@dataclasses.dataclass(frozen=True)
class HubId:
    """The parts of an id.

    Attributes:
      kind: "model" or "dataset".
      repo: OWNER/NAME.
      revision: branch, tag or commit; "" = the newest commit.
      part: a folder of the repository, or a split; "" = all of it.
    """

    kind: str
    repo: str
    revision: str = ""
    part: str = ""

    def __str__(self) -> str:
        revision, part = self.revision and f"@{self.revision}", self.part and f":{self.part}"
        return f"{self.repository}{revision}{part}"

    @property
    def repository(self) -> str:
        """The id of the whole repository at no revision in particular."""
        return f"{PREFIX}{'datasets/' if self.kind == DATASET else ''}{self.repo}"


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """What the hub says about a file: size in bytes, and its SHA-256, or the SHA-1 that git gives it ("" = neither)."""

    size: int
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One commit of a repository.

    Attributes:
      id: the id with this commit as its revision.
      files: name in the repository → what is known about the file.
      root: the folder of the cache where the files are or will be.
    """

    id: HubId
    files: dict[str, RemoteFile]
    root: Path

    def below(self) -> dict[str, str]:
        """Returns the names of the files in the id's folder, relative to it → names in the repository."""
        prefix = f"{self.id.part}/" if self.id.part else ""
        return {name.removeprefix(prefix): name for name in self.files if name.startswith(prefix)}

    @property
    def folder(self) -> Path:
        """The folder of the cache that the id's part names."""
        return self.root / self.id.part


def is_id(path: str | os.PathLike) -> bool:
    """Returns whether a path is written as an id of the hub."""
    return os.fspath(path).startswith(PREFIX)


def parse_id(text: str, name: str, kind: str = "") -> HubId:
    """Returns the parts of an id.

    Args:
      name: name of the setting, for the message.
      kind: the kind that is expected; "" = any.

    Raises:
      UserError: if it is no id of that kind.
    """
    match = _ID.fullmatch(text)
    part = (match["part"] or "") if match else ""
    forms = " or ".join([FORMS[kind]] if kind else FORMS.values())
    if match is None or text.endswith(":") or {"", ".", ".."} & set(part.split("/") if part else ["-"]):
        raise UserError(f"{name}={text} is no id of the hub; write {forms}")
    found = HubId(DATASET if match["kind"] else MODEL, match["repo"], match["revision"] or "", part)
    if kind and found.kind != kind:
        raise UserError(f"{name}={text} names a {found.kind}, not a {kind}; write {forms}")
    return found


def pinned(text: str, name: str, recorded: Collection[str] = ()) -> str:
    """Returns an id with its commit as the revision.

    Args:
      name: name of the setting, for the message.
      recorded: ids with their commits; an id without a revision is that of them that names the same.

    Raises:
      UserError: as in ``snapshot``.
    """
    of = parse_id(text, name)
    same = [x for x in recorded if dataclasses.replace(parse_id(x, name), revision="") == of]
    return same[0] if same else str(snapshot(of).id)


def recorded_in(workdir: Path) -> list[str]:
    """Returns the ids with commits in the records of what a command has begun in a folder."""
    found: dict[str, None] = {}
    for path in sorted(itertools.chain(workdir.glob("*.json"), workdir.glob("*/*.json"))):
        if path.is_file() and path.stat().st_size < LARGEST_RECORD:
            found |= dict.fromkeys(_RECORDED.findall(path.read_text(encoding="utf-8", errors="replace")))
    return [text for text in found if _ID.fullmatch(text)]


def snapshot(of: HubId) -> Snapshot:
    """Returns the commit that an id means, and the names of its files; nothing is downloaded.

    If the hub cannot be reached, the commit is the one in the cache.

    Raises:
      UserError: if there is no such repository or revision, access is refused, or the hub cannot be reached and the
        cache does not hold it.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    if not progress.shown():
        disable_progress_bars()
    if console.is_quiet():
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    client = (constants.ENDPOINT, str(constants.HF_HUB_CACHE), huggingface_hub.is_offline_mode())
    commit, files, root = _looked_up(of.kind, of.repo, of.revision or MAIN, client)
    return Snapshot(dataclasses.replace(of, revision=commit), files, root)


def fetch(of: Snapshot, names: Collection[str]) -> None:
    """Downloads those of the named files that the cache lacks, and checks what has arrived against the hub's hashes.

    Files that have arrived stay in the cache when a later one fails, so that the same call continues.

    Raises:
      UserError: if a file cannot be downloaded, or is not what the hub says it is.
    """
    absent = [name for name in names if not (of.root / name).is_file()]
    if not absent:
        return
    import huggingface_hub
    from huggingface_hub import constants

    if huggingface_hub.is_offline_mode():
        raise UserError(f"{of.id}: the cache lacks {absent[0]}, and HF_HUB_OFFLINE is set; run once without it")
    with _explained(of.id, f"fetching {absent[0]}{' and more' if absent[1:] else ''}"):
        huggingface_hub.snapshot_download(
            of.id.repo,
            repo_type=of.id.kind,
            revision=of.id.revision,
            allow_patterns=[glob.escape(name) for name in absent],
            endpoint=constants.ENDPOINT,
            cache_dir=constants.HF_HUB_CACHE,
        )
    for name in progress.bar(absent, desc="checking what has arrived", unit="file"):
        _require_whole(of, name)


@functools.lru_cache(maxsize=64)
def _looked_up(
    kind: str, repo: str, revision: str, client: tuple[str, str, bool]
) -> tuple[str, dict[str, RemoteFile], Path]:
    """Returns the commit of a revision, its files, and where the cache keeps them.

    Args:
      client: the client's address of the hub, its cache, and whether it may not use the network.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.hf_api import RepoFile

    place = Path(client[1]) / repo_folder_name(repo_id=repo, repo_type=kind)
    of = HubId(kind, repo, "" if revision == MAIN else revision)
    if client[2]:
        return _cached(of, place, _commit_of(place, revision))
    api = huggingface_hub.HfApi(endpoint=client[0])
    try:
        with _explained(of, ASKING):
            commit = str(api.repo_info(repo, revision=revision, repo_type=kind).sha)
            tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
            files = {x.path: _remote(x) for x in tree if isinstance(x, RepoFile)}
    except UserError as error:
        cause = error.__cause__
        refused = isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code not in (429, *range(500, 600))
        if refused or not _commit_of(place, revision):
            raise
        progress.tell(f"{error}; going on with the copy in the cache")
        return _cached(of, place, _commit_of(place, revision))
    _note(place, revision, commit)
    return commit, files, place / "snapshots" / commit


def _remote(file: Any) -> RemoteFile:
    """Returns what the hub's listing says about a file."""
    return RemoteFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id or "")


def _commit_of(place: Path, revision: str) -> str:
    """Returns the commit that a revision had when the cache last saw it; "" if the cache holds nothing of it."""
    noted = place / "refs" / revision
    commit = revision if _COMMIT.fullmatch(revision) else noted.read_bytes().decode().strip() if noted.is_file() else ""
    return commit if commit and (place / "snapshots" / commit).is_dir() else ""


def _note(place: Path, revision: str, commit: str) -> None:
    """Notes the commit of a branch or tag where the hub's cache keeps it, for later runs without a network."""
    if not _COMMIT.fullmatch(revision):
        path = place / "refs" / revision
        with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(commit.encode())


def _cached(of: HubId, place: Path, commit: str) -> tuple[str, dict[str, RemoteFile], Path]:
    """Returns what ``_looked_up`` does, from the cache alone: its list of files is that of the last download."""
    if not commit:
        raise UserError(f"{of} is not in the hub's cache, and HF_HUB_OFFLINE is set; run the command once without it")
    import huggingface_hub
    from huggingface_hub import errors

    root = place / "snapshots" / commit
    try:
        tree = huggingface_hub.get_cached_repo_tree(
            of.repo, repo_type=of.kind, revision=commit, cache_dir=str(place.parent)
        )
        return commit, {file.path: _remote(file) for file in tree}, root
    except errors.CachedRepoTreeNotFoundError:
        if of.kind == DATASET:  # some of its files would be taken for all of them
            raise UserError(
                f"{of}: the hub's cache does not list its files; run the command once with a network"
            ) from None
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return commit, {name: RemoteFile(path.stat().st_size) for name, path in sorted(files.items())}, root


def _require_whole(of: Snapshot, name: str) -> None:
    """Removes a downloaded file from the cache and raises UserError if its content is not what the hub says."""
    path, expected = of.root / name, of.files[name]
    digest = hashlib.sha256() if len(expected.digest) == 64 else hashlib.sha1()
    if len(expected.digest) != 64:
        digest.update(f"blob {expected.size}\0".encode())  # git hashes this before the content
    with open(path, "rb") as file:
        while data := file.read(HASHED):
            digest.update(data)
    if expected.digest in ("", digest.hexdigest()):
        return
    blob = path.resolve()
    for each in {path, blob}:
        each.unlink(missing_ok=True)
    raise UserError(f"{of.id}: {name} has arrived with another hash than the hub lists; run the same command again")


@contextlib.contextmanager
def _explained(of: HubId, doing: str) -> Iterator[None]:
    """Turns the errors of the hub's client into a UserError of one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.HTTPError, OSError) as error:  # the client's own errors derive from these two
        cause: Any = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        if isinstance(cause, OSError) and cause.errno is not None:  # of the disk: the command explains these
            raise
        raise UserError(f"{of}: {_reason(of, cause or error, constants.ENDPOINT, doing)}") from cause


def _reason(of: HubId, error: Exception, endpoint: str, doing: str) -> str:
    """Returns why the hub's client failed, and what the user can do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{endpoint}/{'datasets/' if of.kind == DATASET else ''}{of.repo}"
        return f"it is gated; accept its terms at {page}, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {of.revision}; give one of its branches, tags or commits, or none"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} has no such {of.kind}; check the id, or set HF_TOKEN if it is private"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"access is refused ({status}); set HF_TOKEN to a token that may read it"
        if status == 429:
            return "the hub takes no more requests for now (429); wait a few minutes, or set HF_TOKEN"
        return f"{endpoint} answers {status} when {doing}; run the same command again later"
    if isinstance(error, errors.HTTPError) and doing == ASKING:
        return f"{endpoint} cannot be reached; check the network, or copy the files here and give their folder"
    said = printable(" ".join(str(error).split())[:120])
    return f"the download has stopped ({doing}: {said}); run the same command again, it keeps what has arrived"
