"""`specdec decode` on the toy model: what it prints, and how choices meet."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from specdec_cli.main import cli

TOY = ("--model", "tabular:vocab_size=28,seed=3,sharpness=3", "--device", "cpu")
METRICS = {
    "rounds",
    "drafted",
    "accepted",
    "emitted",
    "target_forwards",
    "draft_forwards",
    "hist",
    "acceptance_rate",
    "mean_accepted_length",
    "tokens_per_forward",
    "per_position",
    "per_position_conditional",
    "wall_s",
    "prefill_s",
    "decode_s",
    "draft_s",
    "verify_s",
    "accept_s",
    "other_s",
    "tokens_per_s",
    "decode_tokens_per_s",
}


def invoke(*args: str, prompt: str | None = "hello", stdin: str | bytes | None = None) -> Result:
    prompts = [] if prompt is None else [prompt]
    return CliRunner().invoke(cli, ["decode", *prompts, *TOY, "--max-new-tokens", "40", *args], input=stdin)


def report(*args: str, **options: Any) -> dict[str, Any]:
    result = invoke("--json", *args, **options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_text_goes_to_stdout_and_figures_to_stderr() -> None:
    text = report("--k", "4")["text"]
    result = invoke("--k", "4")
    assert result.exit_code == 0
    assert result.stdout == text + "\n"
    for word in ("tokens/s", "rounds", "target forwards", "accepted drafts", "by position", "verify", "suffix"):
        assert word in result.stderr


def test_json_holds_everything() -> None:
    found = report("--k", "3")
    assert found["metrics"].keys() == METRICS
    assert "baseline" not in found
    assert found["prompt_token_ids"] == [7, 4, 11, 11, 14]
    assert len(found["token_ids"]) == found["metrics"]["emitted"]
    assert found["model"] == found["adapter"] == "tabular"
    assert (found["drafter"], found["policy"], found["controller"]) == ("suffix", "greedy", "fixed:k=3")
    assert (found["seed"], found["dtype"], found["device"]) == (0, "float64", "cpu")
    assert found["stop_reason"] in ("length", "eos")
    metrics = found["metrics"]
    assert metrics["wall_s"] == pytest.approx(metrics["prefill_s"] + metrics["decode_s"])
    phases = sum(metrics[f"{phase}_s"] for phase in ("draft", "verify", "accept", "other"))
    assert phases == pytest.approx(metrics["decode_s"])


@pytest.mark.parametrize(
    "drafter",
    [
        "ngram",
        "ngram:matches=3",
        "suffix:nodes=6",
        "model:agreement=0.9",
        "model:agreement=0.7,tree=3x2",
        "first(ngram:min_ngram=2, suffix, model)",
        "union(model:agreement=0.6, ngram)",
    ],
)
def test_greedy_output_is_that_of_plain_decoding(drafter: str) -> None:
    found = report("--drafter", drafter, "--controller", "fixed:k=4", "--compare")
    baseline = found["baseline"]
    assert baseline["identical"]
    assert baseline["identity_expected"]
    assert baseline["first_divergence"] is None
    assert baseline.keys() == METRICS | {"identical", "identity_expected", "first_divergence", "speedup"}
    assert baseline["rounds"] == baseline["emitted"] == found["metrics"]["emitted"]
    assert baseline["drafted"] == 0 < found["metrics"]["drafted"]
    assert baseline["speedup"] == pytest.approx(found["metrics"]["tokens_per_s"] / baseline["tokens_per_s"])
    assert found["text"] == report("--drafter", "none")["text"]


@pytest.mark.parametrize("controller", ["fixed", "adaptive:max_k=5", "aimd:min_k=2", "expected:max_k=4"])
def test_output_does_not_depend_on_the_controller(controller: str) -> None:
    found = report("--controller", controller)
    assert found["controller"].startswith(controller.partition(":")[0])
    assert found["text"] == report("--drafter", "none")["text"]


@pytest.mark.parametrize(
    ("policy", "expected"), [("lossless", False), ("block", False), ("match", False), ("coupled", True)]
)
def test_identity_is_claimed_only_where_it_holds(policy: str, expected: bool) -> None:
    args = ("--temperature", "1", "--policy", policy, "--drafter", "model", "--k", "3", "--seed", "5", "--compare")
    baseline = report(*args)["baseline"]
    assert baseline["identity_expected"] is expected
    assert baseline["identical"] or not expected
    talk = invoke(*args).stderr
    assert ("the tokens are identical" if expected else "draws from the same law") in talk
    assert "times the speed of plain decoding" in talk


def test_policy_and_draft_mode_fit_the_temperature() -> None:
    assert report("--drafter", "model")["policy"] == "greedy"
    assert "mode=greedy" in report("--drafter", "model")["drafter"]
    sampled = report("--drafter", "model", "--temperature", "0.8", "--top-p", "0.9")
    assert sampled["policy"] == "lossless"
    assert "mode=sample" in sampled["drafter"]
    assert sampled["sampling"]["top_p"] == 0.9
    assert "mode=coupled" in report("--drafter", "model", "--temperature", "1", "--policy", "coupled")["drafter"]
    assert "mode=greedy" in report("--drafter", "model:mode=greedy", "--temperature", "1")["drafter"]


def test_seed_decides_what_is_sampled() -> None:
    texts = [report("--temperature", "1", "--seed", seed, "--k", "2")["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_graphs_that_cannot_be_had_are_said() -> None:
    said = "Note: decoded without graphs: CUDA graphs run on NVIDIA GPUs, not on cpu"
    assert said in invoke("--cuda-graph").stderr
    assert said not in invoke().stderr


def test_k_is_the_depth_that_is_drafted() -> None:
    for k in (1, 3, 6):
        metrics = report("--drafter", "model:agreement=1", "--k", str(k))["metrics"]
        assert len(metrics["hist"]) == k + 1
        assert metrics["acceptance_rate"] == 1


def test_stop_string_ends_the_text_before_it() -> None:
    whole = report("--k", "4")["text"]
    stop = whole[17:20]
    for k in ("1", "5"):
        found = report("--k", k, "--stop", "NEVER", "--stop", stop)
        assert found["text"] == whole[: whole.index(stop)]
        assert found["stop_reason"] == "stop_string"
        assert len(found["token_ids"]) == whole.index(stop) + 3
        assert found["metrics"]["emitted"] == len(found["token_ids"])
    assert invoke("--k", "5", "--stop", stop).stdout == found["text"] + "\n"


def test_end_of_text_can_be_ignored() -> None:
    target = ("--model", "tabular:vocab_size=5,seed=1,sharpness=0")
    args = ("--temperature", "1", "--seed", "3", "--k", "2", *target)
    ended = report(*args, prompt="a")
    assert ended["stop_reason"] == "eos"
    assert ended["token_ids"][-1] == 4
    assert len(ended["text"]) == len(ended["token_ids"]) - 1
    onward = report(*args, "--ignore-eos", prompt="a")
    assert onward["stop_reason"] == "length"
    assert len(onward["token_ids"]) == 40
    assert onward["token_ids"][: len(ended["token_ids"])] == ended["token_ids"]


def test_prompt_comes_from_stdin_or_a_file(tmp_path: Path) -> None:
    expected = report()["text"]
    assert report(prompt="-", stdin="hello\n")["text"] == expected
    (tmp_path / "prompt").write_text("hello\r\n", newline="")
    assert report("--prompt-file", str(tmp_path / "prompt"), prompt=None)["text"] == expected


def test_environment_gives_way_to_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_DTYPE", "nonsense")
    assert invoke("--dtype", "float32").exit_code == 0
    refused = invoke()
    assert refused.exit_code == 2
    assert "SPECDEC_DTYPE" in refused.stderr


def test_deterministic_mode_reaches_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("SPECDEC_DETERMINISTIC", "1")
    try:
        assert report()["deterministic"] is True
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("SPECDEC_DETERMINISTIC")
    assert report()["deterministic"] is False
