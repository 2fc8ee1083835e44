"""Laws of the provenance in drawn PNG files: what is written is printed, and other files are refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arrag_jax import provenance
from arrag_jax.errors import UserError
from arrag_jax.evaluation.png_provenance import KEY, provenance_text, read_provenance
from arrag_jax.store.rights import Rights

TEXTS = {"prompt": "a cat", "method": "daid", "seed": "3", "model": "m", "store": "s"}
RECORD = {
    "share_retrieved": 0.3, "share_copied": 0.2, "share_largest_copy": 0.1,
    "sources": [{"image": 4, "source": "a.png", "cells": 12}, {"image": 2, "source": "b.png", "cells": 3}],
}  # fmt: skip


def test_the_provenance_of_an_image_is_printed_with_the_rights_of_its_sources(tmp_path, capsys):
    path, info = tmp_path / "drawn.png", PngInfo()
    for key, text in provenance_text(TEXTS, RECORD, {"a.png": Rights("cc0", "https://example.org/a")}).items():
        info.add_text(key, text)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, pnginfo=info)
    provenance.run(str(path))
    told = json.loads(capsys.readouterr().out)
    assert told.items() >= TEXTS.items()
    assert told["share_copied"] == 0.2
    assert told["sources"] == [
        {"image": "a.png", "cells": 12, "licence": "cc0", "source": "https://example.org/a"},
        {"image": "b.png", "cells": 3, "licence": "", "source": ""},
    ]
    assert json.loads(provenance_text(TEXTS, None, {})[KEY]) == TEXTS


def test_other_files_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="holds no provenance"):
        read_provenance(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_provenance(tmp_path / "text.png")
