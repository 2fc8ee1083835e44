"""Every setting, as frozen dataclasses that refuse what cannot be.

A config file in ``configs/`` returns a ``ConfigDict`` whose keys are exactly the fields of one of them (fields with a
default may be left out); it is read once, at the edge (``arrag_jax.parsing``), and nothing further in ever asks a
config for a key by name.
"""

import dataclasses
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.fields import LocalPath, Settings
from arrag_jax.ops.keys import KEY_KINDS


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")


def _in_range(name: str, value: int | float, low: int | float, high: int | float = float("inf")) -> None:
    if not low <= value <= high:
        raise UserError(f"{name}={value} is outside [{low:g}, {high:g}]")


def _given_source(source: str) -> None:
    if not source:
        raise UserError("source is empty; give a folder of images, a .tar or a data set's name")


def _seed(value: int) -> None:
    """Of an order or a draw: jax and grain take 32 bits of it, and no sign."""
    if not 0 <= value < 2**32:
        raise UserError(f"seed={value} is outside [0, 2^32)")


def _below_one(name: str, value: float) -> None:
    """Of the decay of a running mean: at 1 it would never move."""
    if not 0 <= value < 1:
        raise UserError(f"{name}={value} is outside [0, 1)")


# Numbers that are finite and yet make infinities of float32 logits and distances are refused, too.
LEAST_TEMPERATURE = 1e-30
MOST_GUIDANCE = 1e6


def require_temperature(name: str, value: float, mend: str = "") -> None:
    """Raises UserError unless logits or distances can be divided by a temperature."""
    if not value > 0:
        raise UserError(f"{name} = {value} must be above 0{mend}")
    if value < LEAST_TEMPERATURE:
        raise UserError(f"{name} = {value} is too small to divide by; give at least {LEAST_TEMPERATURE:g}{mend}")


def require_guidance(value: float | None) -> None:
    """Raises UserError unless logits can be guided by this scale (None: they are not)."""
    if value is not None:
        _in_range("cfg_scale", value, -MOST_GUIDANCE, MOST_GUIDANCE)


@dataclasses.dataclass(frozen=True)
class DataSetConfig(Settings):
    """Which data set."""

    name: str = "emoji_scenes/full"  # TFDS name, with its config
    data_dir: LocalPath = "data"  # where TFDS keeps it; built there when absent


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Where a training run's examples come from: whatever a datastore can be built from."""

    source: LocalPath = "emoji_scenes/full"  # as ``DatastoreConfig.source``; task "prior" reads its captions, too
    data_dir: LocalPath = "data"  # where TFDS keeps it; built there when absent
    # Of a data set its splits, or slices of them such as "train[:1000]". The images of a folder or a tar, in the order
    # of their paths, are one split, "train", sliced alike: "train[:-512]" and "train[-512:]"
    train_split: str = "train"  # examples that are learned from
    eval_split: str = "valid"  # examples that the run is judged on
    eval_examples: int = 512  # how many of them at most, the first ones
    max_bad_fraction: float = 0.01  # share of a split's images that cannot be read above which the run ends
    min_bad: int = 10  # as ``DatastoreConfig.min_bad``

    def __post_init__(self):
        _given_source(self.source)
        _in_range("eval_examples", self.eval_examples, 1)
        _in_range("max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        _in_range("min_bad", self.min_bad, 0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """An optax chain: clip by global norm → AdamW on a warm-up / hold / decay schedule."""

    learning_rate: float = 1e-3  # after the warm-up and before the decay
    warmup_steps: int = 100  # first steps, in which the rate rises linearly from 0
    decay_fraction: float = 0.3  # last share of the steps, in which the rate falls linearly to 1 %
    weight_decay: float = 0.0  # of AdamW
    b1: float = 0.9  # of AdamW: decay of the mean of gradients
    b2: float = 0.99  # of AdamW: decay of the mean of squared gradients
    clip_norm: float = 1.0  # gradients of a larger global norm are scaled down to it

    def __post_init__(self):
        for name in ("learning_rate", "warmup_steps", "weight_decay"):
            _in_range(f"optimizer.{name}", getattr(self, name), 0)
        _in_range("optimizer.decay_fraction", self.decay_fraction, 0.0, 1.0)
        for name in ("b1", "b2"):
            _below_one(f"optimizer.{name}", getattr(self, name))
        if not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm={self.clip_norm} must be above 0; 1e9 clips nothing")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Settings):
    """Shape of the device mesh; -1 = every device that is left."""

    data: int = -1  # batch over this axis
    fsdp: int = 1  # large parameters over this one


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """One training run. ``task`` picks the task object, ``options`` are that task's own fields."""

    task: str  # what is trained: "tokenizer" | "prior" | "faid"
    steps: int  # updates, from the first one on
    batch_size: int  # examples a step, over all devices and microbatches
    options: Any  # keys of the task's own; parsed by the task into its dataclass
    data: DataConfig = DataConfig()  # task "faid" takes its examples from its options, and reads eval_examples alone
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0  # of initial parameters, of the order of examples and of each step
    log_every: int = 20  # steps between lines of figures
    eval_every: int = 500  # steps between evaluations on held-out examples
    checkpoint_every: int = 500  # steps between checkpoints; an evaluation makes one, too
    ema_decay: float = 0.0  # 0 = off; else the exported weights are the moving average
    accumulate: int = 1  # microbatches a step; memory falls with it, the update stays that of the whole batch
    compute_dtype: str = "float32"  # of the trained parameters in the loss: "float32" | "bfloat16"
    # Workdir of another run, whose best checkpoint gives the parameters to start from, or a model folder with them
    init_from: LocalPath = ""

    def __post_init__(self):
        _one_of("task", self.task, ("tokenizer", "prior", "faid"))
        _one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        for name in ("steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "accumulate"):
            _in_range(name, getattr(self, name), 1)
        _seed(self.seed)
        _below_one("ema_decay", self.ema_decay)


@dataclasses.dataclass(frozen=True)
class ScannOptions(Settings):
    """How a ScaNN index is built and searched; 0 = by the rule, measured on 1e5 to 1e7 patches.

    The rules go by entries: stored patches, those of equal context counted once (``retrieval.patches``).
    Only ``leaves_to_search`` can be changed without building the index again.
    """

    exhaustive_below: int = 20_000  # with fewer entries there is no tree: every key is scored, results are exact
    leaves: int = 0  # of the tree; by the rule 2·sqrt(entries)
    leaves_to_search: int = 0  # leaves whose members are scored; see ``retrieval.scann.num_leaves_to_search``
    bytes_a_number: int = 0  # 4 (float32) | 1 (int8; a tree alone); by the rule 4 where entries are few

    def __post_init__(self):
        for name in ("exhaustive_below", "leaves", "leaves_to_search"):
            _in_range(name, getattr(self, name), 0)
        if self.bytes_a_number not in (0, 1, 4):
            raise UserError(f"bytes_a_number={self.bytes_a_number}: choose 4 (float32), 1 (int8) or 0 (by the rule)")


@dataclasses.dataclass(frozen=True)
class DatastoreConfig(Settings):
    """One datastore and its indexes."""

    model: LocalPath  # checkpoint folder that holds the tokenizer
    # folder of images and tars, one .tar, "emoji_scenes/full", or any set that TFDS has prepared as ArrayRecord files:
    source: LocalPath  # "tfds:NAME[/config][:version]"
    split: str = "store"  # of a TFDS data set
    data_dir: LocalPath = "data"  # where TFDS keeps it; built there when absent
    num_images: int = 0  # the first ones; 0 = all
    max_bad_fraction: float = 0.01  # share of images that cannot be read above which the build fails
    min_bad: int = 10  # so many never fail it while they are at most one in twenty, or one in all
    batch_size: int = 64  # images a device encodes together
    shard_size: int = 16_384  # images a file
    keys: tuple[str, ...] = ("codebook",)  # kinds of key that can be had: "codebook", "latent" (8 times the size)
    captions: bool = False  # keep the images' captions (of files: the .txt or .json beside each), to search by them
    indexes: tuple[str, ...] = ("codebook",)  # kinds of key to build a ScaNN index over
    # Searchers an index, one a device of a search sharded over a mesh. Building holds the keys of one at a time in
    index_shards: int = 1  # float32, 128 bytes an entry (1.3 GB for 10^7), beside what ScaNN makes of them
    scann: ScannOptions = ScannOptions()

    def __post_init__(self):
        for name in ("batch_size", "shard_size", "index_shards"):
            _in_range(name, getattr(self, name), 1)
        _in_range("num_images", self.num_images, 0)
        _in_range("max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        _in_range("min_bad", self.min_bad, 0)
        _given_source(self.source)
        if not set(self.indexes) <= set(self.keys):
            raise UserError(f"indexes={list(self.indexes)} names kinds that are not among keys={list(self.keys)}")


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(Settings):
    """Which datastore is searched, and how."""

    store: LocalPath  # folder of the datastore
    k: int = 16  # neighbours a cell
    keys: str = "codebook"  # "codebook" | "latent"
    search: str = "scann"  # "scann" (host) | "dense" (device, exact)
    storage: str = (
        "float32"  # what "dense" holds of a key: "float32" | "bfloat16"; of codebook keys "codes" | "int8" too
    )
    num_images: int = 0  # only the first ones; 0 = all. A ScaNN index over fewer is built in memory
    scann: ScannOptions = ScannOptions()

    def __post_init__(self):
        _one_of("keys", self.keys, tuple(KEY_KINDS))
        _one_of("search", self.search, ("scann", "dense"))
        KEY_KINDS[self.keys].require_storage(self.storage)
        for name, low in (("k", 1), ("num_images", 0)):
            _in_range(name, getattr(self, name), low)


@dataclasses.dataclass(frozen=True)
class NeighborsConfig(Settings):
    """Neighbours of a training and a validation split, looked up ahead."""

    model: LocalPath  # checkpoint folder that holds the tokenizer
    retrieval: RetrievalConfig
    # Of a data set its splits, or TFDS slices of them such as "store[60000:84000]". The images of a folder or a tar, in
    # the order of their paths, are one split, "train", sliced alike: "train[:-512]" and "train[-512:]"
    train_split: str
    valid_split: str  # as train_split; held-out images
    source: LocalPath = "emoji_scenes/full"  # as ``DatastoreConfig.source``; with captions
    data_dir: LocalPath = "data"  # where TFDS keeps it; built there when absent
    max_bad_fraction: float = 0.01  # share of images without caption or that cannot be read above which a set fails
    min_bad: int = 10  # as ``DatastoreConfig.min_bad``
    batch_size: int = 64  # images encoded together
    shard_size: int = 4096  # images a file; they are searched for together

    def __post_init__(self):
        for name in ("batch_size", "shard_size"):
            _in_range(name, getattr(self, name), 1)
        _in_range("max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        _in_range("min_bad", self.min_bad, 0)
        _given_source(self.source)


@dataclasses.dataclass(frozen=True)
class DaidConfig(Settings):
    """Distribution-level mixing; see ``decode.policies.Daid``."""

    weight: float = 0.1  # λ
    temperature: float = 0.05  # τ, squared L2
    reduction: str = "max"  # "max" (the paper) | "sum"

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise UserError(f"DAiD's weight λ = {self.weight} is outside [0, 1]")
        require_temperature("DAiD's temperature τ", self.temperature)
        if self.reduction not in ("max", "sum"):
            raise UserError(f"DAiD's reduction = {self.reduction!r} is unknown; choose max (the paper) or sum")


@dataclasses.dataclass(frozen=True)
class CaptionConfig(Settings):
    """DAiD over the stored images alone whose captions are nearest to the prompt; see ``retrieval.captions``."""

    images: int = 256  # that method "caption" searches
    static_images: int = 4  # that method "static" does
    daid: DaidConfig = DaidConfig()

    def __post_init__(self):
        for name in ("images", "static_images"):
            _in_range(f"caption.{name}", getattr(self, name), 1)


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """How the model's distribution is made and drawn from; static in the compiled decode loop.

    Attributes:
      cfg_scale: guidance; None = off (and no unconditional rows are computed).
      temperature: of the model's logits after guidance, > 0.
      top_k, top_p: truncation of the model's distribution, before retrieval is mixed in; None = off.
      greedy: take the most probable code instead of drawing.
    """

    cfg_scale: float | None = 2.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self):
        require_guidance(self.cfg_scale)
        require_temperature("temperature", self.temperature, " (for the most probable code: greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} is outside (0, 1]")


@dataclasses.dataclass(frozen=True)
class DrawConfig(Settings):
    """What ``generate`` and ``eval`` draw with."""

    model: LocalPath  # checkpoint folder; draws "plain" and "daid"
    retrieval: RetrievalConfig  # where neighbours come from
    faid_model: LocalPath = ""  # folder of one tuned from it with blenders; draws "faid" and "faid+daid". "" = model
    lora_model: LocalPath = ""  # folder of one tuned without blenders; draws "lora"
    dtype: str = "float32"  # of the models' parameters: "float32" | "bfloat16"; the tokenizer stays in float32
    daid: DaidConfig = DaidConfig()
    caption: CaptionConfig = CaptionConfig()
    methods: tuple[str, ...] = ()  # what is drawn when no --method is given; () = all but those that search by caption
    sampling: SamplingConfig = SamplingConfig()
    data: DataSetConfig = DataSetConfig()  # what eval measures on, and whose prompts --test_prompts draws
    mesh: MeshConfig = MeshConfig()  # generate's: the batch over "data", the store's patches over "fsdp"
    batch_size: int = 32  # pictures drawn together
    seed: int = 0  # of the first picture; the next ones have the next seeds

    def __post_init__(self):
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _in_range("batch_size", self.batch_size, 1)
        _seed(self.seed)
