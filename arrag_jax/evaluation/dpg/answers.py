"""Who answers questions about images: a file, or a VQA model of ``transformers``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from arrag_jax.errors import UserError
from arrag_jax.evaluation.pretrained import folder_hashes, pretrained
from arrag_jax.files import sha256_of
from arrag_jax.json_files import parse_json, read_object

OFFICIAL_NAME = "mplug_visual-question-answering_coco_large_en"  # of ModelScope, which published scores are made with
WORDS = 10  # tokens of an answer


@runtime_checkable
class Answerer(Protocol):
    """What answers questions.

    Attributes:
      from_images: whether it looks at images.
    """

    @property
    def from_images(self) -> bool: ...

    def facts(self) -> dict[str, Any]:
        """Returns what identifies it, as JSON values; ``name`` is among them."""
        ...

    def answer(self, name: str, number: int, image: Any, questions: Sequence[str]) -> list[str]:
        """Returns one answer per question about an image.

        Args:
          name: of the item.
          number: of the image within the item's grid.
          image: uint8 [h, w, 3]; None only if it is not ``from_images``.
        """
        ...


def open_answerer(given: str) -> Answerer:
    """Returns what a flag names: file:PATH or vqa:FOLDER.

    Raises:
      UserError: if it names neither, or the file or model cannot be read.
    """
    kind, _, path = given.partition(":")
    if kind == "file" and path:
        return FileAnswers(Path(path))
    if kind == "vqa" and path:
        return VqaModel(Path(path))
    raise UserError(f"--answers={given!r} names nothing that answers; give file:PATH or vqa:FOLDER")


class FileAnswers:
    """Answers that another program wrote.

    The file is one JSON object, "item/number of the image/question" → answer, or the ``answers.jsonl`` of a run. The
    key "model" or the first line may name the model.
    """

    from_images = False

    def __init__(self, path: Path):
        self._path, self._name = path, "file"
        self._answers: dict[str, Any] = {}
        if path.suffix == ".jsonl":
            self._read_lines()
        else:
            self._answers = read_object(path)
            self._name = str(self._answers.pop("model", self._name))
        if not all(isinstance(answer, str) for answer in self._answers.values()):
            raise UserError(f"{path}: every answer must be a text")

    def _read_lines(self) -> None:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the answers of {self._path} ({error}); give another --answers") from None
        for number, line in enumerate(lines, 1):
            held = parse_json(line, f"{self._path}, line {number}")
            if isinstance(held, Mapping) and "model" in held:
                self._name = str(held["model"])
                continue
            try:
                for place, answers in enumerate(held["answers"]):
                    name = Path(held["filename"]).stem
                    self._answers |= {f"{name}/{place}/{question}": answer for question, answer in answers.items()}
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"{self._path}, line {number}: no filename and answers of a run") from None

    def facts(self) -> dict[str, Any]:
        """Returns the name that the file gives, and the file's hash."""
        return {"name": self._name, "sha256": sha256_of(self._path)}

    def answer(self, name: str, number: int, image: Any, questions: Sequence[str]) -> list[str]:
        """Returns the answers in the file.

        Raises:
          UserError: if one is missing.
        """
        del image
        keys = [f"{name}/{number}/{question}" for question in questions]
        for key in keys:
            if key not in self._answers:
                raise UserError(f"{self._path} has no answer to {key!r}; every question needs one for every image")
        return [self._answers[key] for key in keys]


class VqaModel:
    """A model for visual question answering in a folder that ``transformers`` reads: BLIP, ViLT and the like.

    Raises:
      UserError: if torch or transformers is missing, or the folder holds no such model.
    """

    from_images = True

    def __init__(self, folder: Path):
        self._torch, self._prepare, self._model = pretrained(
            folder, "AutoProcessor", "AutoModelForVisualQuestionAnswering", "--answers=vqa:…", "VQA model"
        )
        self._folder = folder

    def facts(self) -> dict[str, Any]:
        """Returns the kind of model, and the hashes of the folder's files."""
        hashes = folder_hashes(self._folder, (".json", ".txt", ".safetensors"))
        return {"name": f"transformers' {self._model.config.model_type}", "sha256": hashes}

    def answer(self, name: str, number: int, image: Any, questions: Sequence[str]) -> list[str]:
        """Returns the model's answers, in lower case."""
        del name, number
        pixels: UInt8[np.ndarray, "h w 3"] = np.asarray(image)
        images = [pixels] * len(questions)
        given = self._prepare(images=images, text=list(questions), return_tensors="pt", padding=True)
        with self._torch.no_grad():
            if self._model.can_generate():
                out = self._model.generate(**given, max_new_tokens=WORDS, do_sample=False, num_beams=1)
                texts = self._prepare.batch_decode(out, skip_special_tokens=True)
            else:
                best = self._model(**given).logits.argmax(-1)
                texts = [self._model.config.id2label[int(label)] for label in best]
        return [text.strip().lower() for text in texts]
