"""Draws the pictures of docs/studio.md: the page's tabs in a real browser.

python benchmarks/studio_pictures.py --store=demo/store [--photos=FOLDER] [--out=docs/pictures]

Starts ``arrag studio`` with the embedded checkpoint over the store of `arrag demo`, and drives a headless Chromium: a
drawing while it forms, the stored image behind a cell, a painted part and its fillings, and a store that is built from
a folder in which one file is broken and of which one image is forgotten. Nothing is selected: seed 0, the first
fillings. Without --photos that folder holds pictures that the studio has drawn.
"""

import io
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

STORE = flags.DEFINE_string("store", "demo/store", "datastore to draw with")
PHOTOS = flags.DEFINE_string("photos", "", "folder of pictures that a store is built from")
OUT = flags.DEFINE_string("out", "docs/pictures", "folder of the pictures")
PROMPT = "a red octopus and a purple car"
WIDTH, MARGIN = 1280, 20  # pixels


def main(_: list[str]) -> None:
    """Writes studio_draw.png, studio_where.png, studio_edit.png and studio_store.png."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with TemporaryDirectory() as scratch, sync_playwright() as driver:
        words = [f"--store={Path(STORE.value).absolute()}", f"--port={port}"]
        words = [sys.executable, "-m", "arrag_jax.studio", *words]
        process = subprocess.Popen(words, cwd=scratch, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            while "the studio is at" not in (line := process.stderr.readline()):
                if not line:
                    sys.exit("error: the studio did not start")
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": 900})
            page.set_default_timeout(240_000)
            page.goto(f"http://127.0.0.1:{port}")
            page.wait_for_selector("#draw")
            _draw(page)
            _where(page)
            _edit(page)
            _store(page, Path(scratch))
            browser.close()
        finally:
            process.terminate()
            process.wait()


def _draw(page: Any) -> None:
    page.locator("#prompt textarea").fill(PROMPT)
    for _ in range(2):  # the first one compiles
        page.locator("#draw").click()
        _wait(page, "#status", "Row [78] of")
        picture = page.screenshot(full_page=True)
        _wait(page, "#status", "Done")
    _save("draw", picture)


def _where(page: Any) -> None:
    page.get_by_role("tab", name="Where from").click()
    page.wait_for_selector("#cells img")
    page.wait_for_selector("#sources img")
    for at in range(180, 20, -32):  # the first position of a row through the car behind which there is a stored image
        page.locator("#cells img").first.click(position={"x": at, "y": 264})
        time.sleep(2)
        if page.locator("#stored img").count():
            break
    page.mouse.move(0, 0)
    time.sleep(1)
    _save("where", page.screenshot(full_page=True))


def _edit(page: Any) -> None:
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit_prompt textarea").fill(PROMPT)
    page.locator("#edit_method input").click()
    page.get_by_role("option", name="caption", exact=True).click()
    page.locator("#take").click()
    _wait(page, "#edit_status", "Paint, then fill")
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    time.sleep(2)
    box = canvas.bounding_box()
    x, y, w, h = (box[key] for key in ("x", "y", "width", "height"))
    page.mouse.move(x + 0.55 * w, y + 0.15 * h)
    page.mouse.down()
    for row in range(15, 51, 5):  # where the octopus is
        for column in (0.55, 0.82) if row % 2 else (0.82, 0.55):
            page.mouse.move(x + column * w, y + row / 100 * h, steps=4)
    page.mouse.up()
    page.locator("#fill").click()
    _wait(page, "#edit_status", "Done")
    page.wait_for_function("document.querySelectorAll('#filled img').length >= 3")
    page.mouse.move(0, 0)
    time.sleep(2)
    _save("edit", page.screenshot(full_page=True))


def _store(page: Any, scratch: Path) -> None:
    photos = scratch / "holidays"
    if PHOTOS.value:
        shutil.copytree(PHOTOS.value, photos)
    else:
        photos.mkdir()
        for number, image in enumerate(page.locator("#filled img").all()):
            (photos / f"{number}.png").write_bytes(page.request.get(image.get_attribute("src")).body())
    (photos / "broken.png").write_bytes(b"no picture")
    page.get_by_role("tab", name="Store").click()
    page.locator("#name textarea, #name input").fill("holidays")
    page.locator("#folder textarea, #folder input").fill(photos.name)
    page.locator("#build").click()
    _wait(page, "#report", "skipped")
    first = sorted(path.name for path in photos.iterdir() if path.name != "broken.png")[0]
    page.locator("#names textarea").fill(first)
    page.locator("#forget").click()
    _wait(page, "#report", "forgotten")
    time.sleep(1)
    _save("store", page.screenshot(full_page=True))


def _wait(page: Any, where: str, words: str) -> None:
    page.wait_for_function(
        "([where, words]) => document.querySelector(where).innerText.match(words)", arg=[where, words]
    )


def _save(name: str, screenshot: bytes) -> None:
    """Writes a screenshot without the empty part below it."""
    pixels = np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB"))
    used = int(np.flatnonzero((pixels != pixels[-1, :1]).any((1, 2))).max()) + MARGIN
    Image.fromarray(pixels[:used]).save(Path(OUT.value) / f"studio_{name}.png", optimize=True)


if __name__ == "__main__":
    app.run(main)
