"""Lists the model families, one line each, and finds the family of a folder, a model or a preset."""

from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.models.config_json import read_json
from arrag_jax.models.family import Family, ModelConfig, Training
from arrag_jax.models.janus_files import JANUS
from arrag_jax.models.llamagen_files import LLAMAGEN
from arrag_jax.models.place import config_folder
from arrag_jax.parsing import shown

FAMILIES: tuple[Family, ...] = (
    JANUS,
    LLAMAGEN,
)  # fmt: skip

# The targets of ``convert``, for all families.
TARGETS = tuple(dict.fromkeys(target for family in FAMILIES for target in family.layouts))

# Name of a preset → its family and its shape, for all families.
PRESETS_OF_ALL = {name: (family, shape) for family in FAMILIES for name, shape in family.presets.items()}


def family_in(directory: Path) -> Family:
    """Returns the family of the model in a checkpoint folder.

    Raises:
      UserError: if this is no checkpoint folder, or its model belongs to no family.
    """
    directory = config_folder(directory)
    return family_of_config(read_json(directory), directory / "config.json")


def family_of_config(config: dict[str, Any], path: Path) -> Family:
    """Returns the family of the model that a ``config.json`` describes.

    Args:
      config: content of the file.
      path: the file, for the message.

    Raises:
      UserError: if the model belongs to no family.
    """
    given = config.get("model_type")
    known = [family for family in FAMILIES if given in family.model_types]
    known += [family for family in FAMILIES if family.recognises(config)]
    if not known:
        types = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise UserError(
            f"{path} is the config of another model (model_type {shown(given or 'unknown')}); known are {types}"
        )
    return known[0]


def family_of(model: object) -> Family:
    """Returns the family of a model."""
    return next(family for family in FAMILIES if isinstance(model, family.kind))


def preset_of(name: str) -> tuple[Training, ModelConfig]:
    """Returns how models of a preset's family are trained from scratch, and the shape of the preset.

    Raises:
      UserError: if no family that can be trained has such a preset.
    """
    trained = {key: (x.training, shape) for x in FAMILIES if x.training for key, shape in x.presets.items()}
    if name not in trained:
        raise UserError(f"preset={name!r} is unknown; choose one of {', '.join(trained)}")
    return trained[name]
