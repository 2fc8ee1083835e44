"""The page of ``arrag studio`` in Gradio: widgets, and which function of ``studio`` and ``shelf`` each one calls."""

import dataclasses
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from arrag_jax.decode.methods import BASELINE, METHODS
from arrag_jax.decode.policies import mixture_of
from arrag_jax.errors import UserError, printable
from arrag_jax.evaluation.parts import SIDES
from arrag_jax.figures.canvas import RGBImage
from arrag_jax.web import studio
from arrag_jax.web.edit import MOST_VARIATIONS, EditAsk, edited, painted
from arrag_jax.web.shelf import Shelf
from arrag_jax.web.studio import Ask, Drawn, Forming, enlarged

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: nothing is sent anywhere
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # Gradio keeps the last 10,000 in memory otherwise
gr: Any = importlib.import_module("gradio")  # by name, because mypy would read all of it

WAITING = 16  # drawings that may wait; further ones are refused
KEPT = 600  # seconds for which files of pictures stay on disk
FONTS = ["system-ui", "sans-serif"]  # of the visitor's machine: the page loads nothing from other hosts


class Page:
    """The studio's page.

    Attributes:
      blocks: Gradio's own object, ready to be launched.
    """

    def __init__(self, shelf: Shelf, config: str):
        """Makes the page of a shelf; ``config`` is the config file that the command line of a picture names."""
        self.shelf, self.config = shelf, config
        self._choices: list[Any] = []  # widgets that choose a method
        self._stopped: set[str] = set()  # sessions whose visitor wants no more of the present drawing
        with gr.Blocks(title="arrag studio", analytics_enabled=False, delete_cache=(60, KEPT)) as self.blocks:
            drawn = gr.State(None)
            self._report = gr.Markdown(elem_id="report", render=False)
            with gr.Tab("Draw"):
                changed = self._draw_tab(drawn)
            with gr.Tab("Where from"):
                outputs = self._where_tab(drawn)
            with gr.Tab("Edit"):
                self._edit_tab(drawn)
            with gr.Tab("Store"):
                self._store_tab()
            with gr.Tab("Take away"):
                outputs |= self._take_tab()
            changed(self._told, outputs)
        self.blocks.queue(max_size=WAITING, default_concurrency_limit=1)

    def _draw_tab(self, drawn: Any) -> Callable[[Callable, dict[str, Any]], None]:
        base, methods = self.shelf.pipeline.config, self._offered
        mixed: Any = mixture_of(self.shelf.pipeline.policy(methods[-1]))
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", value="a red octopus and a purple car", scale=4, elem_id="prompt")
            method = gr.Dropdown(methods, value=methods[-1], label="Method", min_width=190, elem_id="method")
            self._choices.append(method)
            seed = gr.Number(base.seed, label="Seed", precision=0, elem_id="seed")
        with gr.Accordion("Settings", open=False), gr.Row():
            weight = gr.Slider(0, 1, mixed.weight if mixed else 0, label="λ, the share of retrieval")
            tau = gr.Number(mixed.temperature if mixed else 1, label="τ, in squared distance")
            k = gr.Number(self._k(methods[-1]), label="K, neighbours", precision=0, elem_id="k")
            guidance = gr.Number(base.sampling.cfg_scale or 1.0, label="Guidance")
            temperature = gr.Number(base.sampling.temperature, label="Temperature")
            top_p = gr.Slider(0.01, 1, base.sampling.top_p or 1.0, label="Top-p")
        with gr.Row():
            go = gr.Button("Draw", variant="primary", elem_id="draw")
            stop = gr.Button("Stop", elem_id="stop")
            again = gr.Button("Same again", elem_id="again")
            following = gr.Button("Next seed", elem_id="next")
        status = gr.Markdown("Ready.", elem_id="status")
        with gr.Row():
            plain = picture_of("plain", "plain")
            picture = picture_of("with retrieval", "picture")
        method.change(self._numbers, method, [weight, tau, k], queue=False)
        inputs = [prompt, method, seed, weight, tau, k, guidance, temperature, top_p]
        outputs = [plain, picture, status, drawn]
        pressed = [button.click(self._begin, None, status, queue=False) for button in (go, again)]
        pressed.append(prompt.submit(self._begin, None, status, queue=False))
        moved = following.click(lambda seed: int(seed or 0) + 1, seed, seed, queue=False)
        pressed.append(moved.then(self._begin, None, status, queue=False))
        events = [each.then(self._draw, inputs, outputs, concurrency_id="drawing") for each in pressed]
        stop.click(self._stop, None, None, queue=False)

        def when_drawn(function: Callable, shown: dict[str, Any]) -> None:
            for event in events:
                event.success(function, drawn, list(shown.values()), show_progress="hidden")

        return when_drawn

    @property
    def _offered(self) -> list[str]:
        return [name for name in self.shelf.pipeline.methods if name != BASELINE]

    def _k(self, method: str) -> int:
        opened = self.shelf.pipeline.searches.get(METHODS[method].search)
        return opened.config.k if opened else self.shelf.pipeline.config.retrieval.k

    def _numbers(self, method: str) -> tuple[float, float, int]:
        """Returns a method's own λ, τ and K."""
        mixed: Any = mixture_of(self.shelf.pipeline.policy(method))
        return (mixed.weight, mixed.temperature, self._k(method)) if mixed else (0.0, 1.0, self._k(method))

    def _begin(self, request) -> str:
        self._stopped.discard(request.session_hash)
        return "Waits for its turn …"

    def _stop(self, request) -> None:
        """Ends a drawing after its present row. Gradio's own cancelling can show an error in place of a picture."""
        self._stopped.add(request.session_hash)

    def _draw(self, prompt, method, seed, weight, tau, k, guidance, temperature, top_p, request) -> Iterator[tuple]:
        same = gr.skip()
        try:
            numbers = {"cfg_scale": guidance, "temperature": temperature, "top_p": top_p if top_p < 1 else None}
            sampling = dataclasses.replace(self.shelf.pipeline.config.sampling, **numbers)
            ask = Ask(prompt, method, int(seed), float(weight), float(tau), sampling, int(k))
            yield same, same, "Begins …", same
            for shown in studio.draw(self.shelf.pipeline, ask):
                if request.session_hash in self._stopped:
                    self._stopped.discard(request.session_hash)
                    yield same, same, "Stopped.", same
                    return
                if isinstance(shown, Forming):
                    left = "" if shown.seconds_left is None else f", {shown.seconds_left:.1f} s left"
                    words = f"Row {shown.rows} of {shown.height}{left}"
                    yield fresh(shown.plain), fresh(shown.picture), words, same
                else:
                    yield fresh(shown.plain), fresh(shown.picture), f"Done: seed {ask.seed}.", shown
        except (UserError, TypeError, OverflowError) as error:
            yield same, same, f"**{told(error)}**", same

    for function in (_begin, _stop, _draw):
        function.__annotations__["request"] = gr.Request  # by which Gradio knows what to pass

    def _where_tab(self, drawn: Any) -> dict[str, Any]:
        with gr.Row():
            picture = picture_of("Click a cell", "cells")
            stored = picture_of("Stored image", "stored")
        words = gr.Markdown("Draw a picture first.", elem_id="words")
        lose = gr.Button("Forget this stored image", size="sm", interactive=False, elem_id="forget_this")
        source = gr.State("")
        audited = gr.Markdown("", elem_id="audit")
        gr.Markdown("**Origins and effect of retrieval**")
        page = picture_of(None, "page", None)
        gallery = gr.Gallery(label="Top sources", columns=5, elem_id="sources", object_fit="contain", height=290)

        def clicked(last: Drawn | None, event: Any) -> tuple[Any, ...]:
            if last is None:
                return None, "Draw a picture first.", "", gr.skip()
            shape, grid = enlarged(last.picture).shape, last.pipeline.model.grid
            stored, words, name = studio.origin(last, studio.position_at(event.index[0], event.index[1], shape, grid))
            return stored if stored is None else fresh(stored), words, name, gr.Button(interactive=bool(name))

        def forgotten(last: Drawn, name: str) -> tuple[Any, ...]:
            try:
                report = self.shelf.forget(name, last.pipeline.search_of(last.ask.method).store.directory)
            except UserError as error:
                return f"**{told(error)}**", gr.skip(), gr.skip()
            return f"`{name}` is forgotten: no drawing from now on finds it.", gr.Button(interactive=False), report

        clicked.__annotations__["event"] = gr.SelectData  # by which Gradio knows what to pass
        picture.select(clicked, drawn, [stored, words, source, lose], show_progress="hidden")
        lose.click(forgotten, [drawn, source], [words, lose, self._report], concurrency_id="store")
        return {"cells": picture, "stored": stored, "words": words, "audit": audited, "page": page, "sources": gallery}

    def _edit_tab(self, drawn: Any) -> None:
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", value="a red octopus", scale=3, elem_id="edit_prompt")
            methods = self._offered
            method = gr.Dropdown(methods, value=methods[0], label="Method", min_width=190, elem_id="edit_method")
            self._choices.append(method)
            seed = gr.Number(0, label="Seed", precision=0, elem_id="edit_seed")
            number = gr.Slider(1, MOST_VARIATIONS, 3, step=1, label="Variations", elem_id="variations")
        with gr.Row():
            editor = gr.ImageEditor(
                label="Paint over what is to be drawn", type="numpy", image_mode="RGBA", format="png", height=470,
                sources=["upload"], transforms=[], layers=False, elem_id="editor",
                brush=gr.Brush(default_size=48, colors=["#ffffff"], color_mode="fixed"),
            )  # fmt: skip
            with gr.Column():
                take = gr.Button("Take the drawn picture", elem_id="take")
                fill = gr.Button("Fill", variant="primary", elem_id="fill")
                side = gr.Dropdown(list(SIDES), value="right", label="Side", elem_id="side")
                more = gr.Number(24, label="Pixels of the model's size", precision=0, elem_id="pixels")
                extend = gr.Button("Extend", elem_id="extend")
                status = gr.Markdown("Take a picture, paint, fill.", elem_id="edit_status")
        with gr.Row():
            results = [
                gr.Gallery(
                    label=label, columns=MOST_VARIATIONS, elem_id=name, object_fit="contain", height=240, format="png"
                )
                for label, name in (("plain", "filled_plain"), ("with retrieval, by all codes around", "filled"))
            ]

        def asked(prompt, method, seed, number, value, *side) -> Iterator[tuple[Any, ...]]:
            try:
                picture, mask = painted(value)
                what = {"side": (side[0], int(side[1]))} if side else {"mask": mask}
                ask = EditAsk(prompt, method, int(seed), int(number), picture, **what)
                yield "Draws …", gr.skip(), gr.skip()
                both = edited(self.shelf.pipeline, ask)
                yield f"Done: {number} pictures.", *([fresh(image) for image in images] for images in both)
            except (UserError, TypeError, OverflowError) as error:
                yield f"**{told(error)}**", gr.skip(), gr.skip()

        def taken(last: Drawn | None) -> tuple[Any, str]:
            return (gr.skip(), "Draw a picture first.") if last is None else (fresh(last.picture), "Paint, then fill.")

        take.click(taken, drawn, [editor, status], show_progress="hidden")
        given, outputs = [prompt, method, seed, number, editor], [status, *results]
        fill.click(asked, given, outputs, concurrency_id="drawing")
        extend.click(asked, [*given, side, more], outputs, concurrency_id="drawing")

    def _take_tab(self) -> dict[str, Any]:
        return {
            "files": gr.File(label="Pictures with what drew them, page, JSON", file_count="multiple", elem_id="files"),
            "command": gr.Code(label="Draws the same picture", language="shell", elem_id="command"),
        }

    def _told(self, last: Drawn | None) -> tuple[Any, ...]:
        """Returns what the tabs show of a finished drawing."""
        if last is None:
            return (gr.skip(),) * 8
        words = "Click a cell of the picture to see where it comes from."
        page, sources = fresh(last.page), [(fresh(image), caption) for image, caption in studio.sources(last)]
        pictures = fresh(last.picture), None, words, studio.audit(last.record), page, sources
        return (*pictures, studio.files(last), studio.command(last, self.config))

    def _store_tab(self) -> None:
        report = self._report.render()
        with gr.Row(equal_height=True):
            chosen = gr.Dropdown(self.shelf.stores(), label="Store", allow_custom_value=True, scale=4, elem_id="store")
            take = gr.Button("Open", elem_id="open")
        with gr.Row():
            with gr.Column():
                name = gr.Textbox(label="Name of a new store", elem_id="name")
                folder = gr.Textbox(label="Folder of pictures on this machine", elem_id="folder")
                begin = gr.Button("Build", variant="primary", elem_id="build")
            uploads = gr.File(label="or pictures of yours", file_count="multiple", height=230, elem_id="uploads")
        with gr.Row(equal_height=True):
            names = gr.Textbox(label="Names of stored images, one a line", lines=2, scale=4, elem_id="names")
            lose = gr.Button("Forget", elem_id="forget")

        shown = [report, chosen, *self._choices]

        def now(words: str = "") -> tuple[Any, ...]:
            stores, methods = self.shelf.stores(), self._offered
            choices = (gr.Dropdown(methods, value=methods[-1]), gr.Dropdown(methods, value=methods[0]))
            return words or self.shelf.report(), gr.Dropdown(stores, value=stores[0]), *choices

        def failed(error: UserError) -> tuple[Any, ...]:
            return f"**{told(error)}**", *(gr.skip() for _ in shown[1:])

        def in_words(does: Callable[[str], str]) -> Callable[[str | None], tuple[Any, ...]]:
            def done(given: str | None) -> tuple[Any, ...]:
                try:
                    return now(does(given or ""))
                except UserError as error:
                    return failed(error)

            return done

        def built(name: str, folder: str, uploads: list[str] | None) -> Iterator[tuple[Any, ...]]:
            try:
                for line in self.shelf.build(name or "", folder or "", uploads or ()):
                    yield line, *(gr.skip() for _ in shown[1:])
                yield now(line)
            except UserError as error:
                yield failed(error)

        self.blocks.load(now, None, shown, queue=False, show_progress="hidden")
        take.click(in_words(self.shelf.open), chosen, shown, concurrency_id="store")
        lose.click(in_words(self.shelf.forget), names, shown, concurrency_id="store")
        begin.click(built, [name, folder, uploads], shown, concurrency_id="store")


def picture_of(label: str | None, name: str, height: int | None = 400) -> Any:
    """Returns a widget that shows a picture; it has no button that sends it elsewhere."""
    about: dict[str, Any] = {"label": label, "show_label": label is not None, "elem_id": name, "height": height}
    return gr.Image(interactive=False, format="png", buttons=["download", "fullscreen"], **about)


_number = itertools.count()


def fresh(image: RGBImage) -> Image.Image:
    """Returns an image, enlarged if it is small, whose file nothing else is saved to.

    Gradio names a file by its content, and writes it again while it may be sending it. A number in the text makes each
    content different.
    """
    shown = Image.fromarray(np.ascontiguousarray(enlarged(image)))
    shown.info["number"] = str(next(_number))
    return shown


def told(error: Exception) -> str:
    """Returns an error as one line."""
    return " ".join(printable(error).split())


def theme() -> Any:
    """Returns Gradio's default theme with fonts that every machine has."""
    return gr.themes.Default(font=FONTS, font_mono=["monospace"])
