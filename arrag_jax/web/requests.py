"""Requests for images in the form of OpenAI's ``/v1/images/generations``, checked within limits."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from arrag_jax.config import DaidConfig, DrawConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.fields import Settings
from arrag_jax.json_files import parse_json
from arrag_jax.parsing import in_range, parse

MOST_SEED = 2**32
BUCKET = 16  # tokens


@dataclasses.dataclass(frozen=True)
class Limits(Settings):
    """What one client may ask for."""

    images: int = 8  # images per request
    prompt: int = 1000  # characters of a prompt
    body: int = 16_384  # bytes of a request
    waiting: int = 64  # images that wait; further requests are refused

    def __post_init__(self):
        for field in dataclasses.fields(self):
            in_range(f"limits.{field.name}", getattr(self, field.name), 1, 2**31)


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Retrieval(Settings):
    """The part of a request that is this package's own; None = as the server's config says."""

    method: str = ""  # empty = the server's first method
    weight: float | None = None  # λ of DAiD
    temperature: float | None = None  # τ of DAiD
    provenance: bool = False  # also return where the codes came from


@dataclasses.dataclass(frozen=True)
class ImagesRequest(Settings):
    """The body of a request."""

    prompt: str
    n: int = 1
    size: str = "auto"
    seed: int = 0  # seed of the first image; each further image uses the next seed
    response_format: str = "b64_json"
    model: str = ""  # accepted and not read: the server has one model
    user: str = ""  # likewise
    stream: bool = False
    partial_images: int = 0  # with stream: pictures that are sent while they form, evenly spaced
    arrag: Retrieval = Retrieval()


def read_request(body: bytes, limits: Limits, pipeline: Pipeline) -> ImagesRequest:
    """Returns the request that a body holds, with its method filled in.

    Raises:
      UserError: if it is not valid, or beyond the limits; one line names the key.
    """
    asked = parse(ImagesRequest, parse_json(body, "the body"), "the request")
    if len(asked.prompt) > limits.prompt:
        raise UserError(f"prompt has {len(asked.prompt):,} characters, at most {limits.prompt:,}")
    in_range("n", asked.n, 1, limits.images)
    in_range("seed", asked.seed, 0, MOST_SEED - asked.n)
    in_range("partial_images", asked.partial_images, 0, pipeline.model.grid[0] - 1)
    height, width = pipeline.model.image_size
    if asked.size not in ("auto", f"{width}x{height}"):
        raise UserError(f"size={asked.size[:20]!r} is not drawn here; give {width}x{height} or auto")
    if asked.response_format != "b64_json":
        raise UserError(f"response_format={asked.response_format[:20]!r} is unknown; images are sent as b64_json")
    if asked.partial_images and not asked.stream:
        raise UserError("partial_images needs stream=true")
    method = asked.arrag.method or pipeline.methods[0]
    if method not in pipeline.methods:
        raise UserError(f"arrag.method={method[:40]!r} is not served; choose one of {', '.join(pipeline.methods)}")
    mixing(pipeline.config, asked.arrag.weight, asked.arrag.temperature)
    pipeline.text.length([asked.prompt])
    return dataclasses.replace(asked, arrag=dataclasses.replace(asked.arrag, method=method))


def seeds_of(asked: ImagesRequest) -> Int[np.ndarray, " n"]:
    """Returns the seeds of a request's images."""
    return asked.seed + np.arange(asked.n)


def mixing(config: DrawConfig, weight: float | None = None, temperature: float | None = None) -> DrawConfig:
    """Returns the config with this λ and τ for every method; None keeps the config's.

    Raises:
      UserError: if a number is out of range.
    """
    given = {name: value for name, value in (("weight", weight), ("temperature", temperature)) if value is not None}
    return _with_daid(config, given) if given else config


def _with_daid(settings, given):
    changed = given if isinstance(settings, DaidConfig) else {}
    sections = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    changed |= {name: _with_daid(x, given) for name, x in sections.items() if dataclasses.is_dataclass(x)}
    return dataclasses.replace(settings, **changed)


def placed(prompts: Sequence[str], pipeline: Pipeline) -> int | None:
    """Returns the length to which prompts are padded: few lengths serve all, because each needs its own program."""
    longest = getattr(pipeline.text, "max_length", None)
    return None if longest is None else min(longest, -(-pipeline.text.length(prompts) // BUCKET) * BUCKET)
