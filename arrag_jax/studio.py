"""Opens a page in the browser that draws, and shows where each patch of a picture comes from.

python -m arrag_jax.studio
python -m arrag_jax.studio --store runs/photos --method plain,daid --port 7860

Without --store and --config the page opens on the embedded checkpoint and the datastore of `arrag demo`, in demo/store,
which is built first if it is absent (two to three minutes on two CPU cores). The page listens on 127.0.0.1 unless
--host says otherwise. It knows no users: whoever reaches it can draw, and can read folders of pictures on this machine
into datastores.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from arrag_jax import allocator, demo, progress, signals
from arrag_jax.command import CONFIG, Flag, main_with_config
from arrag_jax.config import DrawConfig
from arrag_jax.decode.methods import BASELINE, METHODS
from arrag_jax.errors import UserError
from arrag_jax.store.shards import MANIFEST
from arrag_jax.web.ports import require_free, require_packages

EMBEDDED = "configs/emoji_knowledge.py"
METHOD = "plain,caption,gated+caption"  # what a store without an index can do


def run(
    config: DrawConfig,
    store: str = "",
    method: str = METHOD,
    workdir: str = "studio",
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
) -> None:
    """Shows the page until a signal ends it."""
    signals.begins_anew()
    allocator.share_one_arena()
    methods = tuple(method.split(","))
    if BASELINE not in methods or len(methods) < 2:
        raise UserError(f"--method={method} must name {BASELINE} and one method that retrieves")
    require_packages("gradio")
    require_free(host, port)
    shelf_config = dataclasses.replace(config, retrieval=dataclasses.replace(config.retrieval, store=_store(store)))
    from arrag_jax.web.page import Page, theme
    from arrag_jax.web.shelf import Shelf

    page = Page(Shelf(shelf_config, methods, Path(workdir)), _config_file(sys.argv))
    page.blocks.launch(
        server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True, theme=theme(),
        show_error=False, ssr_mode=False, footer_links=[],
    )  # fmt: skip
    progress.tell(f"the studio is at http://{host}:{port}")
    while True:  # signals end it
        time.sleep(3600)


def _config_file(argv: Sequence[str]) -> str:
    """Returns the config file that a command line names."""
    values = [
        word.partition("=")[2] or following
        for word, following in zip(argv, [*argv[1:], ""], strict=True)
        if word.lstrip("-").partition("=")[0] == "config"
    ]
    return values[-1] if values else EMBEDDED


def _store(store: str) -> str:
    """Returns the store to open; without one, the demo's, which is built if it is absent."""
    if store:
        return store
    folder = Path(demo.WORKDIR)
    if not (folder / "store" / MANIFEST).is_file():
        progress.tell(f"{folder / 'store'} is absent; building it")
        demo.build_store(str(folder))
    return str(folder / "store")


if __name__ == "__main__":
    main_with_config(
        run,
        DrawConfig,
        config=CONFIG._replace(default=EMBEDDED),
        store=Flag("datastore to open; empty = demo/store, which is built if it is absent", "", path=True),
        method=Flag(f"methods, with commas: plain and others of {', '.join(METHODS)}", METHOD),
        workdir=Flag("folder for datastores that visitors build", "studio", path=True),
        host=Flag("address to listen on; 0.0.0.0 = all, for everyone who can reach this machine", "127.0.0.1"),
        port=Flag("port to listen on", 7860),
        share=Flag("also open a public address by Gradio's own service", False),
    )
