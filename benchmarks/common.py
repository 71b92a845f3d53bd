"""What the benchmark scripts share: prompts, the Hugging Face side, and where numbers come from."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
DEFAULT_QUESTIONS = ROOT.parent / "shared" / "data" / "spec_bench_dev.jsonl"


def read_questions(path: Path | None, count: int, *, spread: bool = False) -> list[dict[str, Any]]:
    """The first `count` questions of a Spec-Bench file, or `count` spread evenly over it (over all categories)."""
    path = path or Path(os.environ.get("SPECDEC_QUESTIONS", DEFAULT_QUESTIONS))
    if not path.is_file():
        raise SystemExit(f"no question file at {path}; name a Spec-Bench question.jsonl with --questions-file")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
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
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    packages = ("torch", "transformers", "specdec-lab")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "settings": settings,
    }
