# size: the laws of one benchmark, over golden files that they share
"""GenEval: verdicts equal the official ones; detectors, colours and the whole run against oracles."""

import collections
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arrag_jax import eval
from arrag_jax.errors import UserError
from arrag_jax.evaluation import line_log, measurements
from arrag_jax.evaluation.geneval import judge, known, yolox
from arrag_jax.evaluation.geneval.benchmark import open_detector
from arrag_jax.evaluation.geneval.colors import SENTENCES, Colors
from arrag_jax.evaluation.geneval.detectors import FileDetections, crop
from arrag_jax.evaluation.geneval.mask2former import Mask2Former, instances
from arrag_jax.evaluation.geneval.rules import COLORS, TAGS, Thresholds, asked_colors, iou, kept, relations
from arrag_jax.signals import Stop
from helpers.drawings import bytes_of
from helpers.golden import SHARED

FOLDER, DETECTOR = SHARED / "benchmarks" / "geneval", SHARED / "benchmarks" / "detector" / "yolox_nano.onnx"
NAMES = FOLDER / "object_names.txt"
ONE = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
PAIR = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a cat",
}
RED = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"}


def seen(name, score=0.9, box=(0, 0, 10, 10), **more):
    return {"class": name, "score": score, "box": list(box), **more}


@pytest.fixture(scope="module")
def lines():
    if not FOLDER.is_dir():
        pytest.skip("not committed, and absent beside this folder: shared/benchmarks/geneval")
    return [json.loads(line) for line in (FOLDER / "evaluation_metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def golden(lines):
    del lines
    return [json.loads(line) for line in (FOLDER / "golden_rules.jsonl").read_text().splitlines()]


def test_every_verdict_is_the_official_one(lines, golden):
    assert len(golden) == 553
    for each in golden:
        verdict = judge(lines[each["line"]], each["detections"])
        assert verdict == {name: each[name] for name in ("correct", "reason", "kept")}


def test_a_relation_and_its_reverse_are_mirrored():
    rng, seen_relations = np.random.default_rng(0), collections.Counter()
    for _ in range(300):
        a, b = (np.concatenate([x := rng.uniform(0, 200, 2), x + rng.uniform(1, 150, 2)]) for _ in range(2))
        here, there = relations(a, b), relations(b, a)
        mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        assert {mirror[name] for name in here} == set(there)
        seen_relations.update(here)
    assert set(seen_relations) == {"left of", "right of", "above", "below"}
    assert relations(np.array([0.0, 0, 9, 9]), np.array([0.0, 0, 9, 9])) == ()


def test_what_counts_as_a_detection():
    limits = Thresholds(score=0.3, counting=0.8, most=3, overlap=0.5)
    found = [seen("cat", 0.3), seen("cat", 0.31), seen("cat", 0.5, (1, 0, 11, 10)), seen("cat", 0.4, (50, 0, 60, 10))]
    assert [each["score"] for each in kept(ONE, found, limits)["cat"]] == [0.5, 0.4]
    assert [each["score"] for each in kept(ONE, found)["cat"]] == [0.5, 0.4, 0.31]
    counting = {**ONE, "tag": "counting", "exclude": [{"class": "cat", "count": 2}]}
    assert judge(counting, [seen("cat", 0.89)], limits)["correct"]
    assert judge(counting, [seen("cat", 0.9)])["reason"] == "expected cat>=1, found 0"
    assert judge(counting, [seen("cat", 0.95), seen("cat", 0.91)])["reason"] == "expected cat<2, found 2"
    assert [each["score"] for each in kept(ONE, [seen("cat", 0.4 + i / 99) for i in range(9)], limits)["cat"]] == [
        pytest.approx(0.4 + 8 / 99)
    ]
    assert iou([0, 0, 9, 9], [0, 0, 9, 9]) == 1 and iou([0, 0, 9, 9], [9, 9, 18, 18]) == 1 / 199


def test_colours_that_were_not_read_leave_the_verdict_open_and_nothing_else():
    assert judge(RED, [seen("cat", color=None)])["correct"] is None
    assert judge(RED, [])["correct"] is False
    assert judge(RED, [seen("cat", color="red")])["correct"] is True
    assert judge(RED, [seen("cat", color="blue")])["reason"] == "expected red cat>=1, found 0 red; and 1 blue"
    found = kept(RED, [seen("cat", 0.8), seen("cat", 0.9), seen("dog")])
    assert [(name, each["score"]) for name, each in asked_colors(RED, found)] == [("cat", 0.9)]
    assert asked_colors(ONE, found) == []


@pytest.mark.parametrize(
    ("line", "found", "message"),
    [
        ({**ONE, "tag": "dogs"}, [], "tag 'dogs' is none of GenEval's"),
        ({**ONE, "include": [{"class": "cat"}]}, [], "no object with a class and a count"),
        ({**PAIR, "include": PAIR["include"][1:]}, [], "is no relation and number of an earlier object"),
        ({**RED, "include": [{"class": "cat", "count": 1, "color": "teal"}]}, [], "color 'teal' is none of"),
        (ONE, [{"class": "cat", "score": 1}], "is no detection"),
        (ONE, [seen("cat", box=(1, 2, 3))], "is no detection"),
        (ONE, [seen("cat", float("nan"))], "is no detection"),
    ],
)
def test_what_is_no_line_and_no_detection(line, found, message):
    with pytest.raises(UserError, match=message):
        judge(line, found)


def write_images(folder, count):
    for number in range(count):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        Image.new("RGB", (6, 4), (number % 256, 7, 0)).save(folder / f"{number:05d}" / "samples" / "0000.png")


def score(folder, detector, prompts=FOLDER / "evaluation_metadata.jsonl", **flags):
    given = {"prompts": str(prompts), "copies": 1, "score_only": True, "detector": detector, **flags}
    eval.run(None, str(folder), "geneval", "test", 600, 1500, False, False, **given)


@pytest.mark.slow
def test_a_folder_scored_from_a_file_has_the_official_summary(lines, golden, tmp_path, capsys):
    """A stopped scoring goes on to the same bytes; results.jsonl is what the official summary reads."""
    for name in ("one", "two"):
        write_images(tmp_path / name, len(lines))
    file = tmp_path / "found.jsonl"
    rows = [{"filename": f"x/{g['line']:05d}/samples/0000.png", "detections": g["detections"]} for g in golden]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score(tmp_path / "one", f"file:{file}")
    expected = json.loads((FOLDER / "golden_summary.json").read_text())
    figures = measurements.read_results(str(tmp_path / "one"))["figures"]
    for tag, (right, count) in expected["tags"].items():
        assert figures[tag]["value"] == pytest.approx(right / count, abs=1e-12)
        assert figures[tag]["low"] < right / count < figures[tag]["high"]
    assert figures["overall"]["value"] == pytest.approx(expected["overall"], abs=1e-12)
    written = [json.loads(line) for line in (tmp_path / "one" / "results.jsonl").read_text().splitlines()]
    tags = collections.defaultdict(list)
    for row, line, verdict in zip(written, lines, golden, strict=True):
        assert json.loads(row["metadata"]) == line and json.loads(row["details"]) == verdict["kept"]
        tags[row["tag"]].append(row["correct"])
    assert {tag: [sum(x), len(x)] for tag, x in tags.items()} == expected["tags"]
    assert "not comparable with published GenEval: the detector is file" in capsys.readouterr().out

    whole = bytes_of(tmp_path / "one")
    real, calls = line_log.progress.bar, []

    class Stopping:
        def __init__(self, *words, **options):
            self.bar = real(*words, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.bar.close()

        def update(self, _):
            calls.append(1)
            if len(calls) in (3, 11):
                raise Stop(15)

    line_log.progress.bar = Stopping
    try:
        for _ in range(2):
            with pytest.raises(Stop):
                score(tmp_path / "two", f"file:{file}")
            with open(tmp_path / "two" / "detections.jsonl", "ab") as torn:
                torn.write(b'{"filename": "000')
        score(tmp_path / "two", f"file:{file}")
    finally:
        line_log.progress.bar = real
    assert bytes_of(tmp_path / "two") == whole and len(calls) == 35  # nothing is detected twice


def test_only_the_official_detector_is_comparable_and_missing_colours_are_told(tmp_path, capsys):
    prompts, file = tmp_path / "lines.jsonl", tmp_path / "found.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in (ONE, PAIR, RED)))
    write_images(tmp_path / "out", 3)
    head = {"detector": "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"}
    found = [[seen("cat")], [seen("cat", 0.9, (50, 0, 60, 10)), seen("dog")], [seen("cat")]]
    rows = [{"filename": f"{i:05d}/samples/0000.png", "detections": each} for i, each in enumerate(found)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    score(tmp_path / "out", f"file:{file}", prompts)
    out = capsys.readouterr().out
    assert "not comparable" not in out and "colors: not scored, because no colours were read; give --clip" in out
    table = dict(re.findall(r"^\| (\w+) +\| (.*?) +\|$", out, re.MULTILINE))
    assert table["overall"] == table["colors"] == "not scored" and table["position"] == "1 [1, 1]"
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2
    score(tmp_path / "out", f"file:{file}", prompts, threshold=0.2)
    assert "thresholds 0.2 and 0.9 for counting" in capsys.readouterr().out
    file.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows[:2]]))
    with pytest.raises(UserError, match=r"found\.jsonl has no line for 00002/samples/0000\.png"):
        score(tmp_path / "out", f"file:{file}", prompts)
    file.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], rows[0]]))
    with pytest.raises(UserError, match=r"found\.jsonl, line 2: 00000/samples/0000\.png has a line already"):
        FileDetections(file)


def test_classes_and_detectors_that_are_none(tmp_path, lines):
    del lines
    write_images(tmp_path / "out", 1)
    for detector, flags, message in [
        ("", {}, "geneval needs a detector"),
        ("yolox", {}, "--detector='yolox' names none"),
        ("file:none.jsonl", {}, r"cannot read the detections of none\.jsonl"),
        ("onnx:none.onnx", {}, r"there is no file none\.onnx"),
        (f"onnx:{FOLDER / 'LICENSE'}", {}, "LICENSE cannot be read as an ONNX network"),
        (f"onnx:{DETECTOR}", {"object_names": str(FOLDER / "LICENSE")}, "different names of classes, and not 80"),
        (f"onnx:{DETECTOR}", {"object_names": ""}, "needs the names of its classes"),
    ]:
        with pytest.raises(UserError, match=message):
            score(tmp_path / "out", detector, limit=1, **{"object_names": str(NAMES), **flags})


class Planted:
    """An encoder whose images say their own colour: the vector of the crop's middle pixel."""

    def facts(self):
        return {}

    def images(self, images):
        return np.stack([self._unit(image[len(image) // 2, image.shape[1] // 2].astype(float)) for image in images])

    def texts(self, texts):
        return np.stack([self._unit(np.random.default_rng(list(text.encode())).normal(size=3)) for text in texts])

    @staticmethod
    def _unit(x):
        return x / np.linalg.norm(x)


def test_colours_are_the_nearest_of_ten_means_of_three_sentences():
    rng, encoder = np.random.default_rng(0), Planted()
    crops = [rng.integers(1, 255, (5, 7, 3)).astype(np.uint8) for _ in range(40)]
    names = ["wine glass" if i % 3 else "cat" for i in range(40)]
    for crop_, name, color in zip(crops, names, Colors(encoder)(crops, names), strict=True):
        score = {}
        for each in COLORS:
            mean = encoder.texts([sentence.format(color=each, name=name) for sentence in SENTENCES]).mean(0)
            score[each] = mean @ encoder.images([crop_])[0] / np.linalg.norm(mean)
        assert color == max(score, key=score.get)
    assert Colors(encoder)([], []) == []


def test_a_crop_is_grey_outside_the_mask_and_black_outside_the_image():
    image = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:4] = True
    found = crop(image, seen("cat", box=(1.4, 0.6, 4.4, 4.4), mask=mask))
    assert found.shape == (3, 3, 3)
    np.testing.assert_array_equal(found[:2, 1:], image[1:3, 2:4])
    assert (found[2] == 0x99).all() and (found[:, 0] == 0x99).all()
    np.testing.assert_array_equal(crop(image, seen("cat", box=(4, 3, 8, 6)))[:2, :2], image[3:, 4:])
    assert not crop(image, seen("cat", box=(4, 3, 8, 6)))[2:].any()


def test_rows_of_the_network_are_decoded_to_the_boxes_that_they_encode():
    rng, grid = np.random.default_rng(0), yolox.cells(64, 96)
    assert len(grid) == 8 * 12 + 4 * 6 + 2 * 3
    corner = rng.uniform(0, 30, (len(grid), 2))
    boxes = np.concatenate([corner, corner + rng.uniform(2, 60, corner.shape)], 1)
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    rows = np.concatenate(
        [center / grid[:, 2:] - grid[:, :2], np.log(size / grid[:, 2:]), rng.uniform(size=(len(grid), 4))], 1
    )
    found, scores = yolox.decoded(rows.astype(np.float32), grid)
    np.testing.assert_allclose(found, boxes, atol=1e-3)
    np.testing.assert_allclose(scores, rows[:, 4:5] * rows[:, 5:], rtol=1e-5)
    kept_rows = yolox.strongest(found, scores[:, 0])
    assert kept_rows == sorted(kept_rows, key=lambda row: -scores[row, 0]) and kept_rows[0] == scores[:, 0].argmax()

    def overlap(a, b):
        shared = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
        return shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared)

    for row in np.flatnonzero(scores[:, 0] > yolox.FLOOR):  # a row is kept, or a better kept one overlaps it
        better = [other for other in kept_rows if scores[other, 0] > scores[row, 0]]
        assert (row in kept_rows) == all(overlap(found[row], found[other]) <= yolox.OVERLAP for other in better)


def test_a_letterbox_is_scaled_top_left_in_blue_green_red():
    image = np.random.default_rng(0).integers(0, 255, (32, 64, 3)).astype(np.uint8)
    planes, ratio = yolox.letterbox(image, 64, 64)
    assert ratio == 1
    np.testing.assert_array_equal(planes[::-1, :32].transpose(1, 2, 0), image)
    assert (planes[:, 32:] == yolox.GREY).all()


@pytest.mark.slow
def test_the_known_images_tell_a_detector_from_a_broken_one(lines, tmp_path):
    pytest.importorskip("onnxruntime")
    del lines
    shifted = tmp_path / "shifted.txt"
    shifted.write_text("\n".join([*NAMES.read_text().splitlines()[1:], "person"]))
    detector = open_detector(f"onnx:{DETECTOR}", str(NAMES))
    assert known.check(detector) == 5
    with pytest.raises(UserError, match=r"the detector fails on known images: it finds .* for zebra"):
        known.check(open_detector(f"onnx:{DETECTOR}", str(shifted)))


@pytest.mark.slow
def test_real_photos_are_scored_from_the_file_to_the_table(photos, lines, tmp_path, capsys):
    """Three right ones, and the same three with other prompts; detections stand in the folder afterwards."""
    pytest.importorskip("onnxruntime")
    del lines
    files = ("1178705300_c224d9a4f1.jpg", "1319634306_816f21677f.jpg", "1378557186_4bd1da6834.jpg")
    right = [("dog", ["dog"]), ("horse", ["horse"]), ("a person and a dog", ["person", "dog"])]
    wrong = [("cat", ["cat"]), ("dog", ["dog"]), ("a person and a horse", ["person", "horse"])]
    with tarfile.open(photos / "flickr8k_dev_224.tar") as tar:
        found = {Path(member.name).name: member for member in tar if member.name.endswith(files)}
        images = [Image.open(tar.extractfile(found[name])).convert("RGB") for name in files]
    prompts = tmp_path / "lines.jsonl"
    with open(prompts, "w") as file:
        for text, names in right + wrong:
            include = [{"class": name, "count": 1} for name in names]
            tag = "single_object" if len(names) == 1 else "two_object"
            file.write(json.dumps({"tag": tag, "include": include, "prompt": f"a photo of {text}"}) + "\n")
    for number in range(6):
        folder = tmp_path / "out" / f"{number:05d}" / "samples"
        folder.mkdir(parents=True)
        images[number % 3].save(folder / "0000.png")
    score(tmp_path / "out", f"onnx:{DETECTOR}", prompts, object_names=str(NAMES))
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == [True] * 3 + [False] * 3
    figures = measurements.read_results(str(tmp_path / "out"))["figures"]
    assert figures["single_object"]["value"] == figures["two_object"]["value"] == 0.5
    assert "not comparable with published GenEval: the detector is yolox_nano.onnx" in capsys.readouterr().out


def test_instances_are_those_of_the_plain_rule():
    rng, classes = np.random.default_rng(0), [f"c{i}" for i in range(80)]
    logits, masks = 3 * rng.normal(size=(6, 81)), rng.normal(size=(6, 9, 11)) - 1
    masks[2] = -1
    found, expected = instances(logits, masks, classes), []
    for query in range(6):
        chances = np.exp(logits[query]) / np.exp(logits[query]).sum()
        expected += [(chances[number], query, number) for number in range(80)]
    expected = sorted(expected, reverse=True)[:100]
    assert len(found) == sum(query != 2 for _, query, _ in expected)
    table = {(query, number): chance for chance, query, number in expected}
    for each in found:
        query = next(q for q in range(6) if np.array_equal(masks[q] > 0, each["mask"]))
        y, x = np.nonzero(masks[query] > 0)
        assert each["box"] == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        inside = np.mean(1 / (1 + np.exp(-masks[query][masks[query] > 0])))
        assert each["score"] == pytest.approx(table[query, classes.index(each["class"])] * inside, rel=1e-12)


def test_tags_are_those_of_the_summary(lines):
    assert {line["tag"] for line in lines} == set(TAGS)


@pytest.mark.long
@pytest.mark.slow
def test_the_model_of_transformers_is_read_as_mmdet_reads_it(tmp_path):
    """A random Mask2Former: scores, classes and boxes are those of the plain rule on the model's own outputs."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=7, num_labels=80,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    size = {"shortest_edge": 64, "longest_edge": 96}
    transformers.Mask2FormerImageProcessor(size=size, size_divisor=32).save_pretrained(tmp_path)
    detector = Mask2Former(tmp_path, [str(number) for number in range(80)])
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)  # the processor leaves its size
    found = detector.detect("", image)
    mean, deviation = (np.array(x, np.float32) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = torch.from_numpy(((image / np.float32(255) - mean) / deviation).transpose(2, 0, 1)[None])
    with torch.no_grad():
        out = model(pixels)
        masks = torch.nn.functional.interpolate(out.masks_queries_logits, size=(64, 96), mode="bilinear")[0].double()
    chances, places = out.class_queries_logits[0].double().softmax(-1)[:, :-1].flatten().topk(100)
    scores = []
    for chance, place in zip(chances, places, strict=True):
        mask = masks[place // 80]
        if (mask > 0).any():
            scores.append((float(chance * mask[mask > 0].sigmoid().mean()), str(int(place % 80))))
    assert [each["score"] for each in found] == pytest.approx([x for x, _ in sorted(scores, reverse=True)], abs=1e-5)
    assert sorted(each["class"] for each in found) == sorted(name for _, name in scores)
    assert set(detector.facts()["sha256"]) >= {"model.safetensors", "config.json"}
    with pytest.raises(UserError, match="holds no Mask2Former that transformers reads"):
        Mask2Former(tmp_path / "absent", ["x"])
