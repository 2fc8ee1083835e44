"""The families of models, one line each, and which of them a folder, a model or a preset belongs to."""

from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.models.config_json import read_json
from arrag_jax.models.family import Family, ModelConfig, Training
from arrag_jax.models.janus_files import JANUS
from arrag_jax.models.llamagen_files import LLAMAGEN
from arrag_jax.models.tensor_files import checkpoint_folder
from arrag_jax.parsing import shown

FAMILIES: tuple[Family, ...] = (
    JANUS,
    LLAMAGEN,
)  # fmt: skip

# Targets of ``convert``, of all families.
TARGETS = tuple(dict.fromkeys(target for family in FAMILIES for target in family.layouts))


def family_in(directory: Path) -> Family:
    """The family of the model in a checkpoint folder.

    Raises:
      UserError: this is no checkpoint folder, or its model is of no family.
    """
    directory = checkpoint_folder(directory)
    return family_of_config(read_json(directory), directory / "config.json")


def family_of_config(config: dict[str, Any], path: Path) -> Family:
    """The family whose model a ``config.json`` describes; ``path`` names it in the UserError where there is none."""
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
    """The family of a model at hand."""
    return next(family for family in FAMILIES if isinstance(model, family.kind))


def preset_of(name: str) -> tuple[Training, ModelConfig]:
    """The preset of a name, and how its family's models begin to be trained.

    Raises:
      UserError: no family that can be trained has such a preset.
    """
    trained = {key: (x.training, shape) for x in FAMILIES if x.training for key, shape in x.presets.items()}
    if name not in trained:
        raise UserError(f"preset={name!r} is unknown; choose one of {', '.join(trained)}")
    return trained[name]
