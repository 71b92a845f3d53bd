"""Prompt sets: the built-in suite, text files, JSONL files, and Spec-Bench's `question.jsonl`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The suite of the lab that this system replaces, in its order.
SUITE = (
    "Explain KV cache simply.",
    "What is the capital of France?",
    "Write a short poem about coding.",
    "How does machine learning work?",
    "Describe the process of photosynthesis.",
    "What are the benefits of exercise?",
    "Explain quantum computing basics.",
    "How do neural networks learn?",
    "What is the meaning of life?",
    "Describe a typical day in the life of a programmer.",
)
# Where a record may hold its text, and its own name.
_TEXTS, _NAMES = ("prompt", "text", "question", "instruction"), ("question_id", "id", "name")


class Prompt(NamedTuple):
    """One conversation. `id` is unique in its set; `turns`: what the user says, in order."""

    id: str
    category: str
    turns: tuple[str, ...]


def load_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of `source`: `builtin`, a `.jsonl` file, or a text file with a prompt a line.

    A JSONL record holds `turns` (Spec-Bench), or one text as `prompt`, `text`, `question` or `instruction`; its name is
    `question_id`, `id` or `name`, else its line number; `category` is kept. `limit`: the first so many, spread over
    the categories in turn. Raises `ValueError` with file and line.
    """
    if source == "builtin":
        prompts = [Prompt(f"suite-{index}", "suite", (text,)) for index, text in enumerate(SUITE)]
    else:
        file = Path(source).expanduser()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(
                f"cannot read the prompts in {source} ({error.strerror}); name a text or JSONL file, or 'builtin'"
            ) from error
        except UnicodeError as error:
            raise ValueError(f"the prompts in {source} are not UTF-8 text; convert the file") from error
        read = _record if file.suffix in (".jsonl", ".json", ".ndjson") else _line
        prompts = [read(line, number, file.name) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{source} holds no prompts; write one a line")
    repeated = _first_repeat([prompt.id for prompt in prompts])
    if repeated is not None:
        raise ValueError(f"{source} uses the prompt id {repeated!r} twice; make ids unique")
    return prompts if limit is None else _spread(prompts, limit)


def write_prompts(prompts: Sequence[Prompt], file: Path) -> None:
    """The set as JSONL that `load_prompts` reads back."""
    lines = [json.dumps(_plain(prompt), ensure_ascii=False) + "\n" for prompt in prompts]
    file.write_text("".join(lines), encoding="utf-8")


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of ids, categories and turns, in order."""
    text = json.dumps([_plain(prompt) for prompt in prompts], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "category": prompt.category, "turns": list(prompt.turns)}


def _line(line: str, number: int, name: str) -> Prompt:
    return Prompt(f"line-{number}", "text", (line.strip(),))


def _record(line: str, number: int, name: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name}, line {number} is not JSON ({error})") from error
    if not isinstance(record, Mapping):
        raise ValueError(f"{name}, line {number} is no JSON object; write {{'prompt': '...'}}")
    turns = record.get("turns")
    if turns is None:
        turns = [record[key] for key in _TEXTS if isinstance(record.get(key), str)][:1]
    if isinstance(turns, str):
        turns = [turns]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{name}, line {number} has no text in 'turns' or {', '.join(map(repr, _TEXTS))}")
    own = next((str(record[key]) for key in _NAMES if key in record), f"line-{number}")
    return Prompt(own, str(record.get("category", "text")), tuple(turns))


def _spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """`limit` prompts, one of each category in turn, in the order of the file."""
    place: dict[str, int] = {}
    ranked = []
    for index, prompt in enumerate(prompts):
        place[prompt.category] = place.get(prompt.category, 0) + 1
        ranked.append((place[prompt.category], index))
    return [prompts[index] for index in sorted(index for _, index in sorted(ranked)[:limit])]


def _first_repeat(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
