"""Sweeps over the toy model, small enough to run in a second."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.sweep.config import Config, parse_config
from specdec.sweep.journal import ROWS, read_rows
from specdec.sweep.runner import run_sweep

TOY = "tabular:vocab_size=40,seed=3,sharpness=3"
PROMPTS = "hello world\nabc abc abc\nspeculative decoding\n"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The toy is too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS)
    return file


@pytest.fixture
def make_config(prompt_file: Path) -> Callable[..., Config]:
    """A configuration of the toy: `make_config(drafter="ngram", k=[1, 2])`."""

    def make(**values: Any) -> Config:
        settings = {
            "model": TOY,
            "drafter": "suffix",
            "k": 2,
            "prompts": str(prompt_file),
            "max_new_tokens": 10,
            "iterations": 1,
            "warmup": 0,
            "device": "cpu",
        }
        return parse_config({**settings, **values})

    return make


@pytest.fixture
def sweep(make_config: Callable[..., Config], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a sweep and give its rows: `sweep(k=[1, 2], folder="a")`."""

    def run(folder: str = "run", **values: Any) -> list[dict[str, Any]]:
        run_sweep(make_config(**values), tmp_path / folder)
        return list(read_rows(tmp_path / folder / ROWS))

    return run
