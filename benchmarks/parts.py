"""Measures how well hidden positions of a picture are predicted: without retrieval, by one-sided and by two-sided keys.

python benchmarks/parts.py --store=demo/store [--scenes=100] [--photos=FILE.tar] [--tune=50] [--size=6]

A square of ``size`` x ``size`` positions in the middle of held-out pictures is hidden, and the rest is known. The table
has the bits per code of the hidden positions, teacher-forced, with 95 % intervals over pictures: of all of them, and of
the border, the hidden positions beside a known one. One-sided keys are the four codes before a position; two-sided keys
add the codes after it, where these are known. The last columns are how many bits two-sided keys save over one-sided
ones, picture by picture. λ and τ of each search are chosen on ``tune`` other pictures, by the border's bits.

The store is that of `arrag demo`; scenes are those of the test split that training has shown ("seen") or not
("unseen"). With --photos, photos of a tar are measured, too: its first 3,000 form a store, and its last ones are hidden
in part. The embedded prior never saw a photo, and draws without a prompt there.
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from arrag_jax.data.emoji.scenes import group, render, scene
from arrag_jax.data.registry import open_images
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.evaluation.intervals import bootstrap
from arrag_jax.evaluation.likelihood import Scored, bits_of_codes
from arrag_jax.figures.grids import table
from arrag_jax.models.checkpoint import load_model
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops import grid as grid_ops
from arrag_jax.retrieval.around import DenseAround
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import Patches
from arrag_jax.store.datastore import Datastore

MODEL = Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"
STORE = flags.DEFINE_string("store", None, "folder of a datastore with codebook keys", required=True)
SCENES = flags.DEFINE_integer("scenes", 100, "pictures of each group")
TUNE = flags.DEFINE_integer("tune", 50, "pictures of each group on which λ and τ are chosen")
PHOTOS = flags.DEFINE_string("photos", "", "tar of photos")
SIZE = flags.DEFINE_integer("size", 6, "height and width of the hidden square")
K, BATCH = 128, 25
STORED_PHOTOS, FIRST_TUNED = 3000, 20_000
WEIGHTS, TEMPERATURES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8), (0.003, 0.01, 0.03, 0.1, 0.3)


def main(_: list[str]) -> None:
    """Prints the table."""
    model, text = load_model(MODEL), PromptTokenizer.load(MODEL)
    store = Datastore.open(STORE.value)
    searches = _searches(store.codes, store.codebook)
    print(f"{jax.devices()[0].device_kind}, {store.num_images:,} scenes stored, a square of {SIZE.value}")
    columns = ["pictures", "search", "λ", "τ", "hidden", "border", "border, [95 %]", "saved, border", "[95 %]"]
    rows = []
    for name in ("seen", "unseen"):
        tune, test = _scenes(name, FIRST_TUNED, TUNE.value), _scenes(name, 0, SCENES.value)
        rows += _measured(name, model, text, searches, tune, test)
    if PHOTOS.value:
        photos = [{"image": image, "caption": b""} for image in _photos(model)]
        stored, tune, test = np.split(np.array(photos, object), [STORED_PHOTOS, STORED_PHOTOS + TUNE.value])
        codes = np.concatenate([_codes(model, part) for part in np.array_split(stored, -(-len(stored) // 50))])

        def nothing(captions):
            return jax.tree.map(np.asarray, model.unconditional(text(["a cat"] * len(captions))))

        searches = _searches(codes.reshape(-1, *model.grid), np.asarray(model.codebook))
        rows += _measured("photos", model, nothing, searches, list(tune), list(test[: SCENES.value]))
    print(table(columns, rows), flush=True)


def _searches(codes, codebook):
    contexts, values = grid_ops.contexts_of_grids(codes).reshape(-1, 4), grid_ops.next_codes_of_grids(codes).reshape(-1)
    before = DenseRetriever.of(Patches.deduplicate(contexts, values, codebook), codebook, K, "codes")
    return {"one-sided": before, "two-sided": DenseAround.of(codes, codebook, K)}


def _scenes(name, first, count):
    wanted = (each for each in (scene("test", i) for i in itertools.count(first)) if group(each) == name)
    return [{"image": render(x), "caption": x.caption.encode()} for x in itertools.islice(wanted, count)]


def _photos(model):
    files = open_images(PHOTOS.value, "train", "data", model.image_size)
    numbers = [*range(STORED_PHOTOS), *range(len(files) - TUNE.value - SCENES.value, len(files))]
    return [files[number]["image"] for number in numbers]


def _codes(model, examples):
    return np.asarray(model.encode_images(from_uint8(np.stack([x["image"] for x in examples])))[0])


def _measured(name, model, text, searches, tune, test):
    """Returns the rows of one group of pictures."""
    hidden, border = _places(model.grid)
    settings = [(weight, tau) for weight in WEIGHTS for tau in TEMPERATURES]
    scored, tuned = (_scored(model, text, searches, hidden, examples) for examples in (test, tune))
    plain = _bits(scored["one-sided"], Plain(), hidden)
    found = {"plain": (None, None, plain)}
    for key in searches:
        border_bits = [_bits(tuned[key], Daid(*each, "sum"), hidden)[:, border[hidden]].mean() for each in settings]
        best = settings[int(np.argmin(border_bits))]
        found[key] = (*best, _bits(scored[key], Daid(*best, "sum"), hidden))
    rows = []
    for key, (weight, tau, bits) in found.items():
        mean, *limits = bootstrap(bits[:, border[hidden]].mean(1)[None])
        row = [name, key, weight, tau, float(bits.mean()), mean, _interval(limits), None, None]
        if key == "two-sided":
            saved, *limits = bootstrap((found["one-sided"][2] - bits)[:, border[hidden]].mean(1)[None])
            row[-2:] = saved, _interval(limits)
        rows.append(row)
        print(*row, flush=True)
    return rows


def _interval(limits):
    return "[{:.3f}, {:.3f}]".format(*limits)


@functools.cache
def _places(grid):
    """Returns which positions are hidden, and which of these have a known neighbour."""
    hidden = np.zeros(grid, bool)
    top, left = ((side - SIZE.value) // 2 for side in grid)
    hidden[top : top + SIZE.value, left : left + SIZE.value] = True
    around = grid_ops.around_positions(*grid)
    border = hidden.reshape(-1) & ((around >= 0) & ~hidden.reshape(-1)[np.maximum(around, 0)]).any(1)
    return hidden.reshape(-1), border


def _scored(model, text, searches, hidden, examples):
    """Returns the hidden positions alone, with what each search finds for them."""
    around, scored = grid_ops.around_positions(*model.grid)[hidden], {name: [] for name in searches}
    for part in (examples[i : i + BATCH] for i in range(0, len(examples), BATCH)):
        codes = _codes(model, part)
        logits = model.score(text([each["caption"].decode() for each in part]), codes)[:, hidden]
        log_p, each = jax.nn.log_softmax(logits.reshape(-1, logits.shape[2])), len(around)
        known = np.repeat(np.where(hidden, -1, codes), each, axis=0)
        asked = grid_ops.around_codes(
            jnp.repeat(codes, each, axis=0), jnp.asarray(known), jnp.tile(around, (len(part), 1))
        )
        for name, search in searches.items():
            scored[name].append(Scored(jnp.asarray(codes[:, hidden].reshape(-1)), log_p, _search(search, asked)))
    return scored


@jax.jit
def _search(search, asked):
    if isinstance(search, DenseAround):
        return search.search_around(asked)
    return search.search(asked[:, : len(grid_ops.CONTEXT_OFFSETS)])


def _bits(scored, policy, hidden):
    """Returns the bits of the hidden positions of each picture."""
    return np.concatenate(bits_of_codes(scored, policy)).reshape(-1, hidden.sum())


if __name__ == "__main__":
    app.run(main)
