"""Reads and writes checkpoint folders of every model family: ``config.json``, weights, and the files for prompts."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from arrag_jax.errors import UserError
from arrag_jax.files import sample_hash
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import ArrayLike, Backbone, ImageModel, ImageTokenizer, PromptEncoder
from arrag_jax.models.family import Family, ModelConfig
from arrag_jax.models.place import checkpoint_folder, config_folder
from arrag_jax.models.registry import PRESETS_OF_ALL, family_in, family_of
from arrag_jax.models.tensor_files import stored_tensors
from arrag_jax.models.vq_images import NAMED
from arrag_jax.models.weights import DTYPES, set_dtypes
from arrag_jax.nn.abstract import abstract


def load_model(
    directory: str | Path,
    dtype: str = "float32",
    grid: ArrayLike = None,
    mesh: Mesh | None = None,
    int8: bool = False,
) -> ImageModel:
    """Returns the model in a checkpoint folder.

    Args:
      directory: holds config.json and the weights (safetensors or PyTorch's .bin, in one file or in several with an
        index). If it is the --workdir of a training run, its export is read. "hf:OWNER/NAME[@REVISION][:FOLDER]" is a
        model of the Hugging Face hub. A LoRA adapter in the folder is not merged; the model holds it as
        ``Attention.q_lora`` and ``v_lora``.
      dtype: of the parameters: float32, bfloat16 or float16; the image tokenizer stays in float32.
      grid: height and width in codes of the images to generate. None = the grid of the config; published configs give
        none, so it follows from their image size, else it is 24 x 24. The model's ``with_grid`` changes it later.
      mesh: large parameters are split over its axis "fsdp"; no device ever holds more than its share of them. None =
        one device holds the model.
      int8: the linear layers of the decoder are held in int8 with a scale per output (``nn.linear.Int8Linear``), and
        computed in ``dtype``. Such a model draws and scores; it is neither trained nor saved.

    Raises:
      UserError: if the folder, its config or its weights are not those of a known model; the message says what is
        wrong.
    """
    require_own_process()
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    family = family_in(Path(directory))  # of an id of the hub, before its weights are downloaded
    return family.load(checkpoint_folder(Path(directory)), dtype, grid, mesh, int8)


def load_tokenizer(directory: str | Path) -> ImageTokenizer:
    """Returns the image tokenizer of a checkpoint folder, in float32; arguments and errors as in ``load_model``."""
    require_own_process()
    family = family_in(Path(directory))
    return family.load_tokenizer(checkpoint_folder(Path(directory)))


def load_prompts(directory: str | Path) -> PromptEncoder:
    """Returns the encoder that turns prompts into conditions of the model in a folder; errors as in ``load_model``."""
    directory = checkpoint_folder(Path(directory))
    return family_in(directory).prompts(directory)


def config_of(directory: str | Path) -> ModelConfig:
    """Returns the shape of the model in a checkpoint folder; reads its config only. Errors as in ``load_model``."""
    directory = config_folder(Path(directory))
    return family_in(directory).read_config(directory)


def shape_of(place: str) -> tuple[Family, Any]:
    """Returns family and shape of the model that a config names.

    If there is no such folder, but its last part is the name of a preset, as in "checkpoints/janus-pro-1b", this is the
    preset's shape.

    Raises:
      UserError: as in ``load_model``, if it is neither.
    """
    try:
        directory = config_folder(Path(place))
        family = family_in(directory)
        return family, family.read_config(directory)
    except UserError:
        if Path(place).exists() or Path(place).name not in PRESETS_OF_ALL:
            raise
        return PRESETS_OF_ALL[Path(place).name]


def shapes_of(place: str, dtype: str) -> Any:
    """Returns the model of ``shape_of`` with shapes in place of its arrays; ``dtype`` as in ``load_model``."""
    family, shape = shape_of(place)
    model = abstract(family.kind, config=shape)
    set_dtypes(model, dtype, next(iter(family.layouts.values())).exact)
    return model


def tokenizer_shapes_of(place: str) -> Any:
    """Returns the image tokenizer alone of the model of ``shape_of``, with shapes in place of its arrays."""
    family, shape = shape_of(place)
    return abstract(family.kind, config=shape, parts=(NAMED,))


def save_model(model: Backbone | ImageTokenizer, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors.

    The config is written last, so an interrupted save never looks like a checkpoint.

    Raises:
      UserError: if the model has a LoRA that is not merged.
    """
    family_of(model).save(model, Path(directory), dtype)


def sample_hashes(directory: str | Path) -> dict[str, str]:
    """Returns name → ``files.sample_hash`` for each file of ``files_of``.

    Raises:
      UserError: if this is no checkpoint folder.
    """
    return {f"{directory}/{path.name}": sample_hash(path) for path in files_of(directory)}


def files_of(directory: str | Path) -> list[Path]:
    """Returns the files that ``load_model`` and ``load_prompts`` read, sorted; errors as in ``sample_hashes``."""
    folder = checkpoint_folder(Path(directory))
    files = {tensor.file for tensor in stored_tensors(folder, family_in(folder).files).values()}
    return sorted(files | {path for path in folder.glob("*.json") if path.is_file()})
