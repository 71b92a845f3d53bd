"""Prompt sets and their formats."""

import json
from pathlib import Path

import pytest

from specdec.sweep.prompts import SUITE, hash_prompts, load_prompts, write_prompts


def test_the_suite_has_its_ten_prompts() -> None:
    prompts = load_prompts("builtin")
    assert [prompt.turns for prompt in prompts] == [(text,) for text in SUITE]
    assert len(prompts) == 10


def test_text_files_have_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    prompts = load_prompts(str(tmp_path / "p.txt"))
    assert [(prompt.id, prompt.turns) for prompt in prompts] == [("line-1", ("one",)), ("line-3", ("two",))]


def test_spec_bench_questions_keep_turns_and_categories(tmp_path: Path) -> None:
    records = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["x"]},
        {"question_id": 321, "category": "qa", "turns": ["c"]},
    ]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = load_prompts(str(tmp_path / "question.jsonl"))
    assert [tuple(prompt) for prompt in prompts] == [("81", "writing", ("a", "b")), ("321", "qa", ("c",))]


def test_jsonl_takes_the_usual_names(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": "x"}\n{"text": "b"}\n{"turns": "c"}\n')
    prompts = load_prompts(str(tmp_path / "p.jsonl"))
    assert [(prompt.id, prompt.turns) for prompt in prompts] == [("x", ("a",)), ("line-2", ("b",)), ("line-3", ("c",))]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no prompts"),
        ("{", "line 1 is not JSON"),
        ("3", "line 1 is no JSON object"),
        ('{"prompt": "a"}\n{"turns": []}', "line 2 has no text"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "uses the prompt id '1' twice"),
    ],
)
def test_mistakes_are_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=problem):
        load_prompts(str(tmp_path / "p.jsonl"))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read the prompts in nowhere"):
        load_prompts("nowhere")


def test_a_limit_takes_from_every_category_in_turn(tmp_path: Path) -> None:
    lines = [{"question_id": index, "category": "ab"[index >= 5], "turns": ["x"]} for index in range(10)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [prompt.id for prompt in load_prompts(str(tmp_path / "p.jsonl"), 4)] == ["0", "1", "5", "6"]


def test_a_stored_set_reads_back_with_the_same_hash(tmp_path: Path) -> None:
    prompts = load_prompts("builtin")
    write_prompts(prompts, tmp_path / "p.jsonl")
    again = load_prompts(str(tmp_path / "p.jsonl"))
    assert again == prompts
    assert hash_prompts(again) == hash_prompts(prompts) != hash_prompts(prompts[1:])
