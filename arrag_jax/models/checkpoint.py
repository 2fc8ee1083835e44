"""A model's folder, of whichever family: ``config.json``, weights and what prompts need."""

from pathlib import Path

from arrag_jax.errors import UserError
from arrag_jax.files import sample_hash
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import ArrayLike, Backbone, ImageModel, ImageTokenizer, PromptEncoder
from arrag_jax.models.family import ModelConfig
from arrag_jax.models.registry import family_in, family_of
from arrag_jax.models.tensor_files import checkpoint_folder, stored_tensors
from arrag_jax.models.weights import DTYPES


def load_model(directory: str | Path, dtype: str = "float32", grid: ArrayLike = None) -> ImageModel:
    """Reads a checkpoint folder.

    Args:
      directory: holds config.json and the weights: safetensors or PyTorch's .bin, in one file or several with an
        index. A LoRA adapter beside them is kept apart in the model, as ``Attention.q_lora`` and ``v_lora``.
        A training run's --workdir stands for the export in it.
      dtype: of the parameters: float32, bfloat16 or float16; the tokenizer stays in float32.
      grid: height and width in codes of the pictures to be drawn; None = the config's, and where it is silent, as
        published ones are, that of its image size, else 24 x 24. The model's ``with_grid`` changes it later.

    Raises:
      UserError: the folder, its config or its weights are no model that is known; the message names what is wrong.
    """
    require_own_process()
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    directory = checkpoint_folder(Path(directory))
    return family_in(directory).load(directory, dtype, grid)


def load_tokenizer(directory: str | Path) -> ImageTokenizer:
    """Reads the image tokenizer alone from a checkpoint folder, in float32; arguments and errors as ``load_model``."""
    require_own_process()
    directory = checkpoint_folder(Path(directory))
    return family_in(directory).load_tokenizer(directory)


def load_prompts(directory: str | Path) -> PromptEncoder:
    """Reads what turns prompts into the condition of the model in a checkpoint folder; errors as ``load_model``."""
    directory = checkpoint_folder(Path(directory))
    return family_in(directory).prompts(directory)


def config_of(directory: str | Path) -> ModelConfig:
    """The shape of the model in a checkpoint folder, from its config alone; errors as ``load_model``."""
    directory = checkpoint_folder(Path(directory))
    return family_in(directory).read_config(directory)


def save_model(model: Backbone | ImageTokenizer, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors; the config comes last, so a killed save is no checkpoint.

    Raises:
      UserError: the model's LoRA is apart; merge it first.
    """
    family_of(model).save(model, Path(directory), dtype)


def sample_hashes(directory: str | Path) -> dict[str, str]:
    """``files.sample_hash`` of each of ``files_of``, by name.

    Raises:
      UserError: this is no checkpoint folder.
    """
    return {f"{directory}/{path.name}": sample_hash(path) for path in files_of(directory)}


def files_of(directory: str | Path) -> list[Path]:
    """The files that ``load_model`` and ``load_prompts`` read, in order; errors as ``sample_hashes``."""
    folder = checkpoint_folder(Path(directory))
    files = {tensor.file for tensor in stored_tensors(folder, family_in(folder).files).values()}
    return sorted(files | {path for path in folder.glob("*.json") if path.is_file()})
