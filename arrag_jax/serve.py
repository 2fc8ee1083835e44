"""Serves a model over HTTP, in the form of OpenAI's images API.

python -m arrag_jax.serve --config configs/emoji_knowledge.py --config.retrieval.store=demo/store \\
  --method plain,gated+caption

POST /v1/images/generations takes {"prompt": …, "n": 1, "size": "auto", "seed": 0, "stream": false, "partial_images": 0,
"arrag": {"method": …, "weight": λ, "temperature": τ, "provenance": false}} and returns PNG images as base64. With
"stream", partial images arrive as server-sent events. GET /health and GET /metrics tell how the server is. Requests
that wait are drawn in batches of up to config.batch_size images. The server listens on 127.0.0.1 unless --host says
otherwise; it knows no users, so put it behind a server that does before others can reach it.
"""

from arrag_jax import allocator, progress, signals
from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DrawConfig
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.web.ports import require_free, require_packages
from arrag_jax.web.requests import LIMITS, Limits


def run(
    config: DrawConfig,
    method: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    most_images: int = LIMITS.images,
    most_characters: int = LIMITS.prompt,
    most_bytes: int = LIMITS.body,
    most_waiting: int = LIMITS.waiting,
) -> None:
    """Serves the config's methods, or those of --method, until a signal ends it."""
    signals.begins_anew()
    allocator.share_one_arena()
    limits = Limits(most_images, most_characters, most_bytes, most_waiting)
    require_packages("fastapi", "uvicorn")
    require_free(host, port)
    import uvicorn

    from arrag_jax.web.endpoint import Server

    pipeline = open_pipeline(config, method.split(",") if method else [])
    server = Server(pipeline, limits)
    progress.tell(f"drawing {', '.join(pipeline.methods)} at http://{host}:{port}/v1/images/generations")
    # A slow client is ended by the endpoint; one that keeps an idle connection is ended here.
    uvicorn.run(server.app, host=host, port=port, log_level="error", timeout_keep_alive=5, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main_with_config(
        run,
        DrawConfig,
        method=Flag("methods to serve, with commas; the first one is the default; empty = the config's", ""),
        host=Flag("address to listen on; 0.0.0.0 = all, for everyone who can reach this machine", "127.0.0.1"),
        port=Flag("port to listen on", 8000),
        most_images=Flag("most images per request", LIMITS.images),
        most_characters=Flag("longest prompt, in characters", LIMITS.prompt),
        most_bytes=Flag("largest request, in bytes", LIMITS.body),
        most_waiting=Flag("images that may wait; further requests are refused with status 429", LIMITS.waiting),
    )
