"""Prints the provenance that a drawn image carries: prompt, seed, method, model, store, and what it repeats of it.

python -m arrag_jax.provenance --picture pictures/00_daid.png

"sources" are the stored images with the most positions of the image, with their licences and sources if these are
recorded (build_datastore --rights).
"""

import json
from pathlib import Path

from arrag_jax.command import Flag, main_with_config
from arrag_jax.evaluation.png_provenance import read_provenance


def run(picture: str) -> None:
    """Prints the provenance of --picture as JSON."""
    print(json.dumps(read_provenance(Path(picture)), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main_with_config(run, None, picture=Flag("PNG file that generate wrote", path=True))
