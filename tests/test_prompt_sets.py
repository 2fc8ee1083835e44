"""Prompt sets in every format give the same prompts; what is wrong in one is named by its line."""

import csv
import json

import pytest

from arrag_jax.errors import UserError
from arrag_jax.evaluation.prompt_sets import read_prompts

PROMPTS = {"b": "two dogs, one cat", "a": 'a "red" car', "c10": "ein Hügel", "c9": "a cat"}


def write(folder, form):
    path = folder / f"set{form}"
    rows = [{"name": name, "prompt": prompt, "category": "x"} for name, prompt in PROMPTS.items()]
    if form == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif form == ".json":
        path.write_text(json.dumps({row["name"]: row for row in rows}))
    elif form == ".csv":
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            table = csv.DictWriter(file, ["name", "category", "prompt"])
            table.writeheader()
            table.writerows(rows)
    else:
        path.mkdir()
        for row in rows:
            (path / f"{row['name']}.txt").write_text(row["prompt"] + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv", ""])
def test_every_format_gives_the_same_prompts_sorted_by_name(tmp_path, form):
    found = read_prompts(str(write(tmp_path, form)))
    assert [(prompt.name, prompt.text) for prompt in found] == sorted(PROMPTS.items())
    assert {prompt.category for prompt in found} == ({"x"} if form else {""})
    assert [prompt.name for prompt in read_prompts(str(write(tmp_path / "..", form)), 2)] == ["a", "b"]


def test_lines_without_names_are_numbered_and_kept_byte_for_byte(tmp_path):
    lines = ['{"prompt": "a cat",  "tag": "x"}', '{"tag":"y","prompt":"two dogs"}']
    (tmp_path / "set.jsonl").write_text(lines[0] + "\r\n\n" + lines[1])
    found = read_prompts(str(tmp_path / "set.jsonl"))
    assert [(prompt.name, prompt.line) for prompt in found] == [("00000", lines[0]), ("00001", lines[1])]
    (tmp_path / "set.txt").write_text("a cat\n\n two dogs \n")
    assert [prompt[:2] for prompt in read_prompts(str(tmp_path / "set.txt"))] == [
        ("00000", "a cat"),
        ("00001", "two dogs"),
    ]


def test_rows_of_one_prompt_are_one_prompt(tmp_path):
    (tmp_path / "set.csv").write_text("item_id,text,question\n7,a cat,is it?\n7,a cat,is it big?\n3,a dog,?\n")
    assert [prompt[:2] for prompt in read_prompts(str(tmp_path / "set.csv"))] == [("3", "a dog"), ("7", "a cat")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt": "a"}\n{"prompt"', r"x\.jsonl, line 2 is not JSON"),
        ("x.jsonl", '{"prompt": "a"}\n{"text": 3}', r"x\.jsonl, line 2: no prompt"),
        ("x.jsonl", '{"prompt": "a", "name": "../b"}', r"line 1: the name '\.\./b' cannot name a file"),
        ("x.jsonl", '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', r"line 2: the name '1' is taken"),
        ("x.csv", "id,words\n1,a", r"x\.csv, line 1: no column prompt, caption, text among id, words"),
        ("x.csv", "id,prompt\n1,a\n2,b,c\n", r"x\.csv, line 3: 3 columns, where line 1 names 2"),
        ("x.csv", 'id,prompt\n1,a\n2,"b\n', r"x\.csv, line 3: not a CSV"),
        ("x.csv", "id,prompt\n1,a\n2,\n", r"x\.csv, line 3: no prompt"),
        ("x.json", '{"a": {"category": "c"}}', r"x\.json, entry 'a': no prompt"),
        ("x.json", "3", r"x\.json holds neither a list nor an object"),
        ("x.txt", "\n", r"x\.txt holds no prompt"),
        ("x.xlsx", "", r"x\.xlsx is no prompt set"),
        ("x.txt", b"a\nb\xff\n", r"x\.txt, line 2: not UTF-8"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / name))
    with pytest.raises(UserError, match="cannot read the prompts of"):
        read_prompts(str(tmp_path / "absent.txt"))
