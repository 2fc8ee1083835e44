"""Files that a source passes over: each is read, or listed with its reason, or counted by its ending; none is lost."""

import io
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from arrag_jax import build_datastore
from arrag_jax.data import endings, pixels, sources
from arrag_jax.data.examples import DUPLICATE, PASSED_OVER, BadImage
from arrag_jax.errors import UserError
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.skipped import SkipLimit
from helpers import children, folders, malformed

ODD = ("a.CR2", "b.nef", "c.zip", "d.mov", "e.svg", "noend", "f.jxl", "g.unheard-of-and-long", "h.jpg.gz", "i.")
BESIDE = ("a.txt", "b.JSON", "c.caption", "d.npy", "list.csv", ".DS_Store", "Thumbs.db", "._a.png")


def shown(number: int) -> bytes:
    return malformed.encoded("PNG", malformed.photo(seed=number))


def packed(path, form: int, **files: bytes) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            malformed.add(tar, name, data)


def test_every_file_is_an_image_or_listed_or_counted(tmp_path):
    """In a folder and in a tar alike."""
    names = ["good.png", *ODD, *BESIDE]
    for name in names:
        (tmp_path / name).write_bytes(shown(0))
    packed(tmp_path / "web.tar", tarfile.GNU_FORMAT, **{name: shown(0) for name in names})
    entries, beside = sources.list_source(str(tmp_path))
    assert len(entries) + sum(beside.values()) == 2 * len(names)
    assert [entry.id for entry in entries if not entry.fault] == ["good.png", "web.tar!good.png"]
    assert {x.id for x in entries if x.is_passed_over} == {f"{tar}{name}" for name in ODD for tar in ("", "web.tar!")}
    assert beside == {x: 2 for x in (".txt", ".json", ".caption", ".npy", ".csv", ".db")} | {"hidden": 4}
    assert all(len(entry.fault) > len(PASSED_OVER) + 20 for entry in entries if entry.fault)


def test_only_what_is_passed_over_is_told_before_work(tmp_path):
    (tmp_path / "phone.cr3").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no image .*phone\.cr3: passed over: \.cr3 is the raw data of a camera"):
        sources.list_images(str(tmp_path))


@pytest.mark.slow
def test_they_stand_in_the_store_and_on_the_closing_line(tmp_path, capsys):
    """They are no bad images, however many they are; appended again, they are not listed twice."""
    config = folders.config(tmp_path)
    for name in (*ODD, *BESIDE):
        (tmp_path / "photos" / name).write_bytes(b"x")
    build_datastore.run(config, str(tmp_path / "store"))
    told = capsys.readouterr()
    assert "2 that cannot be read are left out; passed over, see bad-*.txt: 2 without ending, 1 .cr2, 1 .gz" in told.out
    assert "not images: 2 hidden, 1 .caption" in told.out
    assert "skipped scene_05.png: empty file" in told.err and "noend" not in told.err
    store = Datastore.open(tmp_path / "store")
    store.verify()
    assert (store.num_images, store.num_bad) == (21, 2)
    assert {name for name, reason in store.bad if reason.startswith(PASSED_OVER)} == set(ODD)
    (tmp_path / "photos" / "another").write_bytes(b"x")
    build_datastore.run(config, str(tmp_path / "store"), append=True)
    assert "nothing to add" in capsys.readouterr().out
    assert Datastore.open(tmp_path / "store").bad == store.bad


def test_heic_is_read_with_its_package(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    image = Image.fromarray(np.full((12, 12, 3), (200, 30, 90), np.uint8))
    for ending in pixels.HEIF:
        (tmp_path / f"a{ending.upper()}").write_bytes(malformed.encoded("HEIF", image, quality=100))
    images = sources.FileImages(tmp_path, sources.list_images(str(tmp_path)), (12, 12))
    assert len(images) == len(pixels.HEIF)
    for i in range(len(images)):
        np.testing.assert_allclose(images[i]["image"], np.asarray(image), atol=6)


@pytest.mark.slow
def test_without_its_package_heic_is_passed_over_with_the_mend(tmp_path):
    (tmp_path / "phone.HEIC").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")
    program = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from arrag_jax.data import sources\n"
        f"print(sources.list_images({str(tmp_path)!r})[1].fault)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=children.alone(), capture_output=True, text=True)
    assert "passed over: .heic is read where pillow-heif is installed: pip install pillow-heif" in done.stdout, done


def test_archives_behind_the_first_and_any_names_are_read(tmp_path):
    """Members above the folder, of whole paths, of long names in either format; three archives in one file."""
    long = f"{'d' * 180}/{'ü' * 70}.png"
    names = [("../up.png", "/whole/path.png", long), (f"x{long}", "./here.png"), ("last.png",)]
    forms, data = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT), b""
    for form, members in zip(forms, names, strict=True):
        packed(tmp_path / "one.tar", form, **{name: shown(len(name)) for name in members})
        data += (tmp_path / "one.tar").read_bytes()
    (tmp_path / "one.tar").write_bytes(data)
    entries = sources.list_images(str(tmp_path))
    wanted = {f"one.tar!{name.removeprefix('./')}": shown(len(name)) for members in names for name in members}
    assert {entry.id: sources.read_entry(tmp_path, entry) for entry in entries} == wanted


@pytest.mark.parametrize("form", ["gnu", "posix --sparse-version=1.0", "posix --sparse-version=0.1", "oldgnu"])
def test_sparse_members_are_refused_with_the_reason(tmp_path, form):
    """As GNU tar writes them; what stands behind them is read."""
    with open(tmp_path / "holes.png", "wb") as file:
        for place in range(0, 2**24, 2**20):  # more than one header holds in the old format
            file.seek(place)
            file.write(b"x" * 5000)
    (tmp_path / "whole.png").write_bytes(shown(1))
    command = ["tar", *f"--format={form}".split(), "-S", "-cf", "one.tar", "holes.png", "whole.png"]
    try:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("GNU tar is not on this machine")
    holes, whole = sources.list_images(str(tmp_path / "one.tar"))
    assert (holes.id, whole.id) == ("one.tar!holes.png", "one.tar!whole.png")
    with pytest.raises(BadImage, match="stored with holes"):
        sources.read_entry(tmp_path, holes)
    assert sources.read_entry(tmp_path, whole) == shown(1)


def test_endings_are_told_apart():
    assert all(endings.is_image(f"x{suffix.upper()}") for suffix in pixels.SUFFIXES)
    for kinds in (endings.BESIDE, endings.RAW, endings.ARCHIVES, endings.FILMS, endings.DRAWINGS):
        assert all(re.fullmatch(r"\.\w+", kind) and not endings.is_image(f"x{kind}") for kind in kinds)
    wanted = {"a.tar!b/c": "without ending", "a.TAR!b.X": ".x", "a.tar.GZ": ".tar.gz", "d/.x.png": "hidden"}
    assert {name: endings.ending(name) for name in wanted} == wanted


FEW = [(60, 1), (60, 3), (8, 1), (200, 10), (2000, 20)]
MANY = [(60, 4), (8, 2), (400, 11), (2000, 21), (3, 3), (1, 1)]


@pytest.mark.parametrize("images, bad", [*FEW, *MANY])
def test_a_few_bad_images_fail_no_build(tmp_path, images, bad):
    """The least number is ten while they are one in twenty at most, and one in all; a whole source of them fails."""
    lines = [*(f"{i}\tempty file\n" for i in range(bad)), f"x\t{PASSED_OVER}a film\n"]
    lines += [f"y\t{DUPLICATE}0\n"] if bad < images else []
    (tmp_path / "bad-0.txt").write_text("".join(lines))
    limit, all_images = SkipLimit(0.01, 10), images + 1  # what is passed over does not count
    if (images, bad) in FEW:
        limit.require_few(tmp_path, all_images)
    else:
        with pytest.raises(UserError, match=f"{bad} of .*{images:,} images cannot|none of the {images} images can"):
            limit.require_few(tmp_path, all_images)


def test_a_film_of_frames_is_one_image():
    """Endings that PIL takes for images stay images."""
    frames = [Image.new("RGB", (12, 12), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert pixels.decode(file.getvalue(), (12, 12))[0, 0].tolist() == [255, 0, 0]
