"""Help, `doctor`, `models`, and `decode` on models with weights."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import specdec
from specdec import registry
from specdec.models.loading import Loaded
from specdec_cli.main import cli
from specdec_kernels.dispatch import OPERATIONS


def invoke(*args: str) -> Result:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == 0, result.stderr
    return result


def decode(*args: str) -> dict[str, Any]:
    found = json.loads(invoke("decode", "--json", *args).stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("args", [["--help"], ["decode", "--help"], ["models", "-h"], ["decode", "hi", "--k", "0"]])
def test_help_and_mistakes_load_nothing_heavy(args: list[str]) -> None:
    script = (
        "import sys, specdec_cli.main as main\n"
        f"try: main.cli({args!r})\n"
        "except SystemExit: pass\n"
        "loaded = {'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_help_names_everything_that_can_be_chosen() -> None:
    shown = invoke("decode", "--help").stdout
    for entries in (registry.DRAFTERS, registry.COMBINATIONS, registry.POLICIES, registry.CONTROLLERS):
        for name, entry in entries.items():
            assert name in shown
            assert entry.about in shown
            assert all(f"{key}=" in shown for key in entry.settings)
    assert "decode" in invoke().stdout
    assert "pull" in invoke("models").stdout
    assert specdec.__version__ in invoke("--version").stdout


def test_doctor_says_what_would_run() -> None:
    found = json.loads(invoke("doctor", "--json", "--device", "cpu").stdout)
    assert found["versions"]["torch"]
    assert found["cpu"]["threads"] >= 1
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["implementations"]["linear"].keys() == {"use", "because", "not"}
    for op, rows in OPERATIONS.items():
        entry = found["implementations"][op]
        # Of what does not run, each says why.
        assert {entry["use"], *entry["not"]} == {row.name for row in rows}
        assert all(entry["not"].values())
    assert found["cuda_compiler"].keys() in ({"name", "version", "path"}, {"problem"})
    assert "smollm2-135m" in found["models"]
    shown = invoke("doctor", "--device", "cpu").stdout
    assert "linear" in shown
    assert found["store"] in shown.replace("\n", "")


def test_doctor_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    monkeypatch.setenv("SPECDEC_DTYPE", "bfloat16")
    found = json.loads(invoke("doctor", "--json", "--device", "cpu").stdout)
    assert found["implementations"]["linear"]["use"] == "torch"
    assert found["dtype"] == "bfloat16"


def test_doctor_names_the_compiler_of_cuda_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 1.2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("SPECDEC_CUDA_COMPILER", "nvcc")
    found = json.loads(invoke("doctor", "--json", "--device", "cpu").stdout)["cuda_compiler"]
    assert found == {"name": "nvcc", "version": "1.2", "path": str(nvcc)}
    monkeypatch.setenv("SPECDEC_CUDA_COMPILER", "other")
    monkeypatch.setenv("COLUMNS", "50")
    shown = invoke("doctor", "--device", "cpu").stdout
    # In a narrow terminal, too, labels are whole, and what they say goes on in the next line.
    assert "\nCUDA C++ with   knows" in shown
    assert "…" not in shown
    assert "knows no compiler 'other'; set SPECDEC_CUDA_COMPILER to nvcc, nvrtc or auto" in " ".join(shown.split())


def test_doctor_profiles_a_model() -> None:
    args = ("doctor", "--profile", "tabular", "--device", "cpu")
    profile = json.loads(invoke(*args, "--json").stdout)["profile"]
    assert list(profile["seconds"]) == ["1", "2", "3", "5", "9", "17"]
    assert profile["round_s"] > 0
    assert "milliseconds" in invoke(*args).stdout


def test_doctor_shows_how_linear_layers_were_chosen(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPECDEC_FORCE_PY", raising=False)
    args = ("doctor", "--profile", str(make_folder("gpt2")), "--device", "cpu")
    found = json.loads(invoke(*args, "--json").stdout)["profile"]["linear"]
    assert found["use"] in found["seconds"]
    assert found["not"].keys() == found["seconds"].keys() - {found["use"]}
    assert all(min(costs.values()) > 0 for costs in found["seconds"].values())
    assert "chosen: measured fastest" in " ".join(invoke(*args).stdout.split())


def test_models_are_listed_found_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.models import store

    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
    assert "not fetched" in invoke("models", "list").stdout
    folder = store.install(tmp_path / "models" / "smollm2-135m", lambda work: {"file": str(work)})
    assert "not fetched" not in invoke("models", "list").stdout
    assert json.loads(invoke("models", "list", "--json").stdout)[0]["present"] is True
    assert invoke("models", "path", "smollm2-135m").stdout == f"{folder}\n"
    assert invoke("models", "pull", "smollm2-135m").stdout == f"{folder}\n"
    assert "removed smollm2-135m" in invoke("models", "remove", "smollm2-135m").stderr
    assert not folder.exists()


def test_chat_template_is_used_when_there_is_one(
    make_folder: Callable[..., Path], make_tokenizer: Callable[..., Any]
) -> None:
    folder = make_folder("llama", max_position_embeddings=256)
    args = ("--model", str(folder), "--max-new-tokens", "8", "--k", "2", "--ignore-eos")
    tokenizer = make_tokenizer("<end>")
    plain = decode("hi", *args)
    assert plain["prompt_token_ids"] == tokenizer("hi")["input_ids"]
    turns = "{% for turn in messages %}{{ turn.role }}:{{ turn.content }}<end>{% endfor %}"
    (folder / "chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}a:{% endif %}")
    assert decode("hi", *args)["prompt_token_ids"] == tokenizer("user:hi<end>a:")["input_ids"]
    system = decode("hi", "--system", "ok", *args)["prompt_token_ids"]
    assert system == tokenizer("system:ok<end>user:hi<end>a:")["input_ids"]
    assert decode("hi", "--raw", *args)["prompt_token_ids"] == plain["prompt_token_ids"]


def test_draft_models_and_early_exit_leave_the_output_alone(make_folder: Callable[..., Path]) -> None:
    target, draft = make_folder("llama"), make_folder("gpt2", vocab_size=272)
    args = ("hello", "--model", str(target), "--max-new-tokens", "20", "--ignore-eos", "--device", "cpu")
    plain = decode(*args, "--drafter", "none")
    for choice in (
        ("--draft-model", str(draft)),
        ("--drafter", f"model:name={draft},tree=2x2"),
        ("--drafter", "early_exit:layers=1"),
        ("--drafter", "first(suffix:min_match=2, early_exit)"),
    ):
        found = decode(*args, *choice, "--k", "3", "--compare")
        assert found["token_ids"] == plain["token_ids"]
        assert found["baseline"]["identical"]
        assert found["metrics"]["draft_forwards"] > 0
    hugging_face = decode(*args, "--adapter", "huggingface", "--k", "2")
    assert hugging_face["adapter"] == "huggingface"
    assert hugging_face["token_ids"] == plain["token_ids"]


def test_first_divergence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec import run

    honest = run.token_ids

    def altered(progress: run.Progress, row: int = 0) -> list[int]:
        tokens = honest(progress, row)
        # Only the speculative run drafts.
        return [*tokens[:5], 0, *tokens[6:]] if int(progress.state.metrics.drafted.sum()) else tokens

    args = ("hello", "--model", "tabular:vocab_size=28,sharpness=3", "--max-new-tokens", "30", "--k", "3", "--compare")
    monkeypatch.setattr(run, "token_ids", altered)
    difference = decode(*args)["baseline"]["first_divergence"]
    assert difference["position"] == 5
    assert difference["token"] == 0 != difference["other"]
    assert difference["margin"] > 0
    # Nothing rounds in the toy, so the altered token is told for what it is.
    assert not difference["numerics"]
    shown = invoke("decode", *args).stderr
    assert "the tokens differ first at new token 5: 'a' instead of" in shown
    assert "this is a bug" in shown


def test_built_in_model_decodes(smollm2: Loaded) -> None:
    args = ("Count from one to ten.", "--max-new-tokens", "24", "--k", "4", "--device", "cpu")
    found = decode(*args, "--compare")
    assert found["model"] == "smollm2-135m"
    assert found["adapter"] == "decoder"
    assert found["baseline"]["identical"]
    assert found["baseline"]["rounds"] == found["metrics"]["emitted"]
    assert smollm2.tokenizer.decode(found["token_ids"], skip_special_tokens=True) == found["text"]
    words = found["text"].split()
    stopped = decode(*args, "--stop", words[3])
    assert stopped["stop_reason"] == "stop_string"
    assert stopped["text"] == found["text"][: found["text"].index(words[3])]
