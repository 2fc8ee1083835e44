"""The studio in a real browser: pictures that form, cells that tell where they come from, visitors who interrupt."""

import re
import subprocess
import sys
import time

import pytest

from helpers import browser, children, studios

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
]
pytest.importorskip("gradio", reason="gradio is not installed (the extra web)")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A studio over a small store, in a process of its own."""
    with studios.started(tmp_path_factory) as studio:
        yield studio.address


@pytest.fixture(scope="module")
def context():
    with browser.opened() as context:
        yield context


@pytest.fixture
def page(context, address):
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#draw")
    yield page
    page.close()


def status(page) -> str:
    return page.locator("#status").inner_text()


def wait_for(page, words: str) -> None:
    page.wait_for_function("words => document.querySelector('#status').innerText.match(words)", arg=words)


def ask(page, prompt: str, button: str = "#draw") -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator(button).click()


def shown(page, where: str) -> str:
    return page.locator(f"{where} img").first.get_attribute("src")


def click_a_cell(page) -> None:
    page.locator("#cells img").first.click(position={"x": 150, "y": 150})
    page.wait_for_function("document.querySelector('#words').innerText.startsWith('Row ')")


def test_rows_appear_a_cell_tells_its_origin_and_the_picture_can_be_taken_away(page):
    ask(page, "a cat")
    seen = set()
    while not status(page).startswith("Done"):
        if re.match(r"Row \d+ of 12", status(page)):
            seen.add(shown(page, "#picture"))
        time.sleep(0.02)
    assert len(seen) >= 3
    page.get_by_role("tab", name="Where from").click()
    page.wait_for_selector("#cells img")
    click_a_cell(page)
    assert "log p" in page.locator("#words").inner_text()
    assert "positions" in page.locator("#audit").inner_text()
    page.wait_for_selector("#page img")
    page.get_by_role("tab", name="Take away").click()
    page.wait_for_selector("#files a")
    assert "arrag_jax.generate" in page.locator("#command").inner_text()


def test_a_drawing_stops_and_another_one_follows(page):
    ask(page, "two dogs")
    wait_for(page, "Row [2-9] of")
    page.locator("#stop").click()
    wait_for(page, "Stopped")
    time.sleep(1)
    assert status(page) == "Stopped."
    ask(page, "two dogs")
    wait_for(page, "Done: seed 0")
    page.locator("#next").click()
    wait_for(page, "Done: seed 1")


def test_two_visitors_draw_in_turn(context, address, page):
    other = context.new_page()
    other.goto(address)
    other.wait_for_selector("#draw")
    ask(page, "a cat")
    ask(other, "a dog")
    for each in (page, other):
        wait_for(each, "Done")
    assert shown(page, "#picture") != shown(other, "#picture")
    other.close()


@pytest.mark.parametrize(("prompt", "line"), [("", "a prompt is empty"), ("cat " * 2500, "10,000 characters")])
def test_a_prompt_that_cannot_be_drawn_gets_one_line(page, prompt, line):
    ask(page, prompt)
    wait_for(page, line)
    ask(page, "a cat")
    wait_for(page, "Done")


def test_a_reload_in_the_middle_leaves_a_page_that_draws(page):
    ask(page, "three cats")
    wait_for(page, "Row [2-9] of")
    page.reload()
    page.wait_for_selector("#draw")
    ask(page, "a cat")
    wait_for(page, "Done")


def test_a_forgotten_picture_is_gone(page):
    ask(page, "a cat")
    wait_for(page, "Done")
    page.get_by_role("tab", name="Where from").click()
    page.wait_for_selector("#sources img")
    name = page.locator("#audit code").first.inner_text()
    page.get_by_role("tab", name="Store").click()
    page.locator("#names textarea").fill("no such picture")
    page.locator("#forget").click()
    page.wait_for_function("document.querySelector('#report').innerText.includes('nothing was forgotten')")
    page.locator("#names textarea").fill(name)
    page.locator("#forget").click()
    page.wait_for_function(
        "name => document.querySelector('#report').innerText.includes('forgotten: ' + name)", arg=name
    )
    page.get_by_role("tab", name="Draw").click()
    page.locator("#again").click()
    wait_for(page, "Row [1-9]")
    wait_for(page, "Done")
    page.get_by_role("tab", name="Where from").click()
    page.wait_for_function("name => document.querySelector('#audit code').innerText != name", arg=name)
    assert name not in page.locator("#sources").inner_text()


def test_the_stored_image_behind_a_cell_is_forgotten_where_it_is_shown(page, context, address):
    ask(page, "two cats")
    wait_for(page, "Done")
    page.get_by_role("tab", name="Where from").click()
    assert page.locator("#forget_this").is_disabled()
    name = ""
    for at in range(20, 380, 30):  # common ground and codes that no neighbour holds have no image
        page.locator("#cells img").first.click(position={"x": at, "y": at})
        page.wait_for_function("document.querySelector('#words').innerText.startsWith('Row ')")
        time.sleep(0.5)
        if page.locator("#forget_this").is_enabled():
            name = page.locator("#words code").first.inner_text()
            break
    page.locator("#forget_this").click()
    page.wait_for_function("document.querySelector('#words').innerText.includes('is forgotten')")
    assert name in page.locator("#words").inner_text() and page.locator("#forget_this").is_disabled()
    page.get_by_role("tab", name="Store").click()
    assert f"forgotten: {name}" in page.locator("#report").inner_text()
    other = context.new_page()
    other.goto(address)
    other.get_by_role("tab", name="Store").click()
    other.wait_for_function("name => document.querySelector('#report').innerText.includes(name)", arg=name)
    other.close()


def edit_status(page, words: str) -> None:
    page.wait_for_function("words => document.querySelector('#edit_status').innerText.match(words)", arg=words)


def test_a_painted_part_is_filled_and_a_side_is_extended(page):
    page.get_by_role("tab", name="Edit").click()
    page.locator("#fill").click()
    edit_status(page, "there is no picture")
    page.get_by_role("tab", name="Draw").click()
    ask(page, "a cat")
    wait_for(page, "Done")
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit_prompt textarea").fill("a dog")
    page.locator("#take").click()
    edit_status(page, "Paint, then fill")
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    page.locator("#fill").click()
    edit_status(page, "nothing is painted over")
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] - 60, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1], steps=12)
    page.mouse.up()
    page.locator("#fill").click()
    edit_status(page, "Done: 3 pictures")
    page.wait_for_function("document.querySelectorAll('#filled img').length >= 3")
    assert page.locator("#filled_plain img").count() >= 3
    page.locator("#extend").click()
    edit_status(page, "Draws")
    edit_status(page, "Done: 3 pictures")
    wide = "[...document.querySelectorAll('#filled img')].some(image => image.naturalWidth > image.naturalHeight)"
    page.wait_for_function(wide)


def test_a_taken_port_is_one_line(address):
    port = address.rpartition(":")[2]
    words = [sys.executable, "-m", "arrag_jax.studio", f"--port={port}"]
    done = subprocess.run(words, env=children.alone(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "choose another --port" in done.stderr
