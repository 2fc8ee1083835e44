"""DPG-Bench: the official figures of the toy, and the mended rule against an oracle."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from arrag_jax import eval
from arrag_jax.errors import UserError
from arrag_jax.evaluation import measurements
from arrag_jax.evaluation.dpg.answers import VqaModel
from arrag_jax.evaluation.dpg.benchmark import part_of
from arrag_jax.evaluation.dpg.rules import Question, read_questions, score_item, score_item_official
from helpers.drawings import bytes_of
from helpers.golden import SHARED

TOY = SHARED / "benchmarks" / "dpg" / "toy"
HEAD = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"


@pytest.fixture(scope="module")
def toy():
    if not TOY.is_dir():
        pytest.skip("not committed, and absent beside this folder: shared/benchmarks/dpg")
    return TOY


def write_grids(folder, names, size=(8, 6)):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size, (number, 0, 9)).save(folder / f"{name}.png")


def score(folder, csv, answers, **flags):
    given = {"prompts": str(csv), "questions": str(csv), "answers": answers, "score_only": True, **flags}
    eval.run(None, str(folder), "dpg", "test", 600, 1500, False, False, **given)
    return measurements.read_results(str(folder))


def test_the_official_mistakes_give_the_official_figures(toy, tmp_path):
    write_grids(tmp_path / "out", [f"toy{i}" for i in range(7)])
    record = score(tmp_path / "out", toy / "toy.csv", f"file:{toy / 'answers.json'}", official_bugs=True)
    text = (toy / "official_results.txt").read_text()
    expected = {name: float(x) for name, x in re.findall(r"^\t(.+): ([\d.]+)$", text, re.MULTILINE)}
    expected["DPG score"] = float(re.findall(r"^DPG-Bench score: ([\d.]+)$", text, re.MULTILINE)[0])
    assert {name: figure["value"] for name, figure in record["figures"].items()} == pytest.approx(expected, abs=1e-12)
    items = dict(re.findall(r"^IMGS/(\w+)\.png, (?:[\d.]+, ){4}([\d.]+)$", text, re.MULTILINE))
    values = {name: pair[0] for name, pair in record["values"]["prompts"].items()}
    assert values == pytest.approx({name: float(x) for name, x in items.items()}, abs=1e-12)
    assert record["figures"]["DPG score"]["low"] < expected["DPG score"] < record["figures"]["DPG score"]["high"]


def test_the_mended_rule_is_that_of_ancestors_and_of_no_order(toy, tmp_path):
    """A question counts 1 if it and all that it depends on, directly or not, are answered with yes."""
    items = read_questions(toy / "toy.csv")
    held = json.loads((toy / "answers.json").read_text())
    held |= {f"toy0/{i}/Is question 1 of 0 true?": "yes" if i else "no" for i in range(4)}  # skipped officially
    rng, means = np.random.default_rng(0), {}
    for name, questions in items.items():
        parents, counts = {q.number: q.parents for q in questions}, []
        answers = [{q.text: held[f"{name}/{i}/{q.text}"] for q in questions} for i in range(4)]

        def holds(number, given, parents=parents, questions=questions):
            text = next(q.text for q in questions if q.number == number)
            return given[text] == "yes" and all(holds(parent, given) for parent in parents[number])

        counts = [[float(holds(q.number, given)) for q in questions] for given in answers]
        found = score_item(questions, answers)
        assert found.images == pytest.approx([np.mean(row) for row in counts], abs=1e-15)
        for category, numbers in found.categories.items():
            expected = [row[i] for row in counts for i, q in enumerate(questions) if q.category == category]
            assert numbers == expected
        mixed = [questions[i] for i in rng.permutation(len(questions))]
        assert score_item(mixed, answers).images == found.images
        means[name] = found.mean
    (tmp_path / "answers.json").write_text(json.dumps(held))
    write_grids(tmp_path / "out", items)
    record = score(tmp_path / "out", toy / "toy.csv", f"file:{tmp_path / 'answers.json'}")
    assert record["figures"]["DPG score"]["value"] == pytest.approx(100 * np.mean(list(means.values())), abs=1e-12)
    whole = bytes_of(tmp_path / "out")
    log = tmp_path / "out" / "answers.jsonl"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    score(tmp_path / "out", toy / "toy.csv", f"file:{tmp_path / 'answers.json'}")
    assert bytes_of(tmp_path / "out") == whole
    again = tmp_path / "again"
    write_grids(again, items)
    assert score(again, toy / "toy.csv", f"file:{log}")["figures"] == record["figures"]  # a run's answers are a file


def test_each_official_mistake_shows():
    child, parent = Question(1, (2,), "entity - part", "a?"), Question(2, (3,), "entity - whole", "b?")
    root, answers = Question(3, (), "global", "c?"), [{"a?": "yes", "b?": "yes", "c?": "no"}]
    assert score_item([child, parent, root], answers).mean == 0
    official = score_item_official([child, parent, root], answers)
    assert official.mean == pytest.approx(1 / 3)  # the child's parent became 0 too late
    assert official.categories == {"entity - part": [1.0], "entity - whole": [1.0], "global": [0.0]}
    assert score_item_official([root, parent, child], answers).mean == 0
    assert score_item_official([child], answers) is None and score_item([child], answers).mean == 1
    yes = dict.fromkeys("abc", "yes")
    both = [{**yes, "a?": "yes", "b?": "yes", "c?": "yes"}, answers[0]]
    assert score_item_official([root], both).categories == {"global": [0.0]}  # of the last image alone
    assert score_item([root], [{"c?": "yes it is"}]).mean == 0


def test_rows_are_read_as_officially_on_request(tmp_path):
    path = tmp_path / "q.csv"
    rows = ["a,p,1,0,x (y),one?", 'a,p,2,"0, 1",x - z (y),two?', "b,p,1,0,g,three?", "a,p,3,2,x,four?"]
    path.write_text(HEAD + "\n".join(rows) + "\n")
    items = read_questions(path)
    assert items["a"][1] == Question(2, (1,), "x - z", "two?") and [q.number for q in items["a"]] == [1, 2, 3]
    assert [q.number for q in read_questions(path, official=True)["a"]] == [3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,p,x,0,t,q", "line 2: 'x' and '0' must be whole numbers"),
        ("a,p,1,0,t,q\na,p,2,one,t,q", "line 3: '2' and 'one' must be"),
        ("a,p,1,0,t", "line 2: it has not as many columns"),
        ("a,p,1,0,t,q,7", "line 2: it has not as many columns"),
        ("a,p,1,0,t,q\na,p,1,0,t,q", "line 3: a has a question 1 already"),
        ("a,p,1,0,,q", "line 2: item_id, tuple and question_natural_language must not"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, rows, message):
    (tmp_path / "q.csv").write_text(HEAD + rows + "\n")
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q.csv")


def test_what_is_missing_is_named(tmp_path):
    csv, answers = tmp_path / "q.csv", tmp_path / "answers.json"
    csv.write_text(HEAD + "a,p,1,0,t,q\nb,p,1,0,t,q\n")
    answers.write_text(json.dumps({f"{name}/{i}/q": "yes" for name in "ab" for i in range(4)} | {"b/3/q": "no"}))
    write_grids(tmp_path / "out", "ab")
    assert score(tmp_path / "out", csv, f"file:{answers}")["figures"]["DPG score"]["value"] == 87.5
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,prompt\na,p\nb,p\nc,p\n")
    with pytest.raises(UserError, match=r"q\.csv has no question about c"):
        score(tmp_path / "out", csv, f"file:{answers}", prompts=str(prompts))
    (tmp_path / "out" / "b.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 images: b\.png"):
        score(tmp_path / "out", csv, f"file:{answers}")
    record = score(tmp_path / "out", csv, f"file:{answers}", allow_missing=True)
    assert record["images"]["missing"] == ["b.png"] and record["figures"]["DPG score"]["value"] == 100
    write_grids(tmp_path / "out", "b", (7, 6))
    with pytest.raises(UserError, match=r"b\.png has \(7, 6\) pixels, others have \(8, 6\)"):
        score(tmp_path / "out", csv, f"file:{answers}")
    write_grids(tmp_path / "out", "ab", (7, 6))
    with pytest.raises(UserError, match=r"a\.png is no grid of 2 x 2"):
        score(tmp_path / "out", csv, f"file:{answers}")
    answers.write_text("{}")
    with pytest.raises(UserError, match="has no answer to 'a/0/q'"):
        score(tmp_path / "out", csv, f"file:{answers}", copies=1)
    for flags, message in [
        ({"copies": 3}, "--copies=3: a grid of DPG-Bench holds 4"),
        ({"questions": ""}, "dpg needs --questions"),
        ({"answers": "mplug"}, "--answers='mplug' names nothing"),
        ({"detector": "onnx:x"}, "--detector is no flag of dpg, which has --questions, --answers, --official_bugs"),
    ]:
        with pytest.raises(UserError, match=message):
            score(**{"folder": tmp_path / "out", "csv": csv, "answers": f"file:{answers}", **flags})


def test_parts_of_a_grid_are_counted_row_by_row():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    parts = [part_of(pixels, number, 4) for number in range(4)]
    np.testing.assert_array_equal(np.concatenate([np.concatenate(parts[:2], 1), np.concatenate(parts[2:], 1)]), pixels)


@pytest.mark.long
@pytest.mark.slow
def test_a_model_of_transformers_answers_as_it_does_alone(tmp_path):
    """A random ViLT: the answers are those of the library called for one question at a time."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "a", "cat", "red", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.ViltConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, max_position_embeddings=16, num_labels=5, initializer_range=2.0,
        id2label={i: f"Answer {i}" for i in range(5)}, label2id={f"Answer {i}": i for i in range(5)},
    )  # fmt: skip
    model = transformers.ViltForQuestionAnswering(config).eval()
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    scaled = transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8)
    processor = transformers.ViltProcessor(scaled, tokenizer)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    answerer = VqaModel(tmp_path / "model")
    questions, rng = ["is it a cat?", "red?", "is it red?", "a"], np.random.default_rng(0)
    answers = set()
    for _ in range(4):
        image = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        found = answerer.answer("", 0, image, questions)
        for question, answer in zip(questions, found, strict=True):
            with torch.no_grad():
                logits = model(**processor(images=image, text=question, return_tensors="pt")).logits
            assert answer == f"answer {int(logits.argmax())}"
        answers |= set(found)
    assert len(answers) > 1
    assert set(answerer.facts()["sha256"]) >= {"model.safetensors", "config.json"}
    with pytest.raises(UserError, match="holds no VQA model"):
        VqaModel(tmp_path)
