"""What the benchmark scripts share: prompts, the Hugging Face side, and where numbers come from."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# The environment variable that says the commit of a tree without its history.
COMMIT = "SPECDEC_COMMIT"
DEFAULT_QUESTIONS = ROOT.parent / "shared" / "data" / "spec_bench_dev.jsonl"


def questions_path(path: Path | None) -> Path:
    """A Spec-Bench file: `path`, else that of the environment, else the development set beside the repository."""
    path = path or Path(os.environ.get("SPECDEC_QUESTIONS", DEFAULT_QUESTIONS))
    if not path.is_file():
        raise SystemExit(f"no question file at {path}; name a Spec-Bench question.jsonl with --questions-file")
    return path


def read_questions(path: Path | None, count: int, *, spread: bool = False) -> list[dict[str, Any]]:
    """The first `count` questions of a Spec-Bench file, or `count` spread evenly over it (over all categories)."""
    rows = [json.loads(line) for line in questions_path(path).read_text().splitlines() if line.strip()]
    if spread:
        return [rows[(2 * index + 1) * len(rows) // (2 * count)] for index in range(count)]
    return rows[:count]


def chat_prompt(tokenizer: Any, text: str, limit: int = 512) -> list[int]:
    """The chat template around one user turn; a prompt of more than `limit` tokens keeps its end."""
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return ids[-limit:]


def huggingface_model(path: Path) -> Any:
    """The checkpoint as transformers itself runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


def huggingface_greedy(module: Any, prompt: Sequence[int], new_tokens: int, **options: Any) -> list[int]:
    """The new tokens of `generate`, greedy; `options` such as prompt_lookup_num_tokens are passed on."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = module.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, **options
        )
    new: list[int] = out[0, len(prompt) :].tolist()
    return new


def provenance(**settings: Any) -> dict[str, Any]:
    """Commit, versions, hardware and settings: what a number needs to be believed."""

    def git(*words: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    def installed(package: str) -> str | None:
        # A tree that was copied to a machine with a GPU is not installed there.
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    packages = ("torch", "transformers", "specdec-lab")
    # A tree that was copied without its history is told its commit; git would speak of a folder around it, and whether
    # the copy was changed nobody knows.
    told = os.environ.get(COMMIT)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": told or git("rev-parse", "HEAD"),
        "dirty": None if told else bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in packages},
        "settings": settings,
    }


class Rows:
    """Results as JSON lines, appended as they come, so that an interrupted run goes on where it stopped.

    The first line says where the numbers come from. Rows of other settings are refused: numbers of two kinds do not
    belong into one table.
    """

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        found = [json.loads(line) for line in lines]
        if not found:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = [json.loads(json.dumps(provenance(**settings)))]
            path.write_text(json.dumps(found[0]) + "\n")
        self.about, self.rows = found[0], found[1:]
        if self.about["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{path} has rows of other settings ({self.about['settings']}); name another file")

    def has(self, **key: Any) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Provenance and rows of a file that `Rows` wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[0], lines[1:]


def origin(about: Mapping[str, Any]) -> str:
    """One sentence on where rows come from."""
    packages = ", ".join(f"{name} {found}" for name, found in about["packages"].items())
    state = f"{about['commit'][:10]}{' with changes' if about['dirty'] else ''}"
    return f"{about['cpu']}, {about['threads']} threads, Python {about['python']}, {packages}, commit {state}."


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the comments `<!-- name -->` and `<!-- end name -->` of a Markdown file, in place."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    content = path.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"{path} has no section {begin} ... {end}")
    before, _, rest = content.partition(begin)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.partition(end)[2]}")
