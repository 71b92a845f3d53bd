"""`--quantize` on the real model: fewer bytes, and speculation is bit-exact for the rounded model."""

import json

import pytest
from click.testing import CliRunner

from specdec_cli.main import cli
from specdec_kernels.cpu import library

needs_kernels = pytest.mark.skipif(library.available() is not None, reason=f"CPU kernels: {library.available()}")
PROMPT = "Say it three times: red fish, blue fish."


def decode(*options):
    return CliRunner().invoke(cli, ["decode", PROMPT, "--max-new-tokens", "16", *options])


@needs_kernels
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_speculation_over_quantized_weights_changes_no_token(smollm2, weights):
    # A fixed depth: the default drafts only where this machine's timing says that it pays.
    done = decode("--quantize", weights, "--controller", "fixed", "--k", "4", "--compare", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["implementations"] == {"stack": "cpu", "weights": weights}
    assert found["metrics"]["drafted"] > 0
    assert found["baseline"]["identical"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapter", "huggingface"), "quantize 'int8' needs the decoder adapter"),
        (("--dtype", "bfloat16"), "quantize 'int8' needs the CPU kernels, which do not run here"),
    ],
)
def test_what_cannot_be_quantized_is_refused(smollm2, options, message):
    done = decode("--quantize", "int8", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@needs_kernels
def test_a_quantized_folder_is_written_listed_and_decoded(make_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "home"))
    source, run = make_folder("llama", max_position_embeddings=128), CliRunner().invoke
    done = run(cli, ["quantize", str(source), "--format", "int4"])
    assert done.exit_code == 0, done.stderr
    folder = done.stdout.strip()
    options = ["hello hello hello", "--max-new-tokens", "12", "--compare", "--json", "--device", "cpu"]
    found = json.loads(run(cli, ["decode", "--model", folder, *options]).stdout)
    assert found["implementations"] == {"stack": "cpu", "weights": "int4"}
    assert found["baseline"]["identical"]
    shown = run(cli, ["decode", "--model", folder, "hello", "--max-new-tokens", "4", "--device", "cpu"]).stderr
    assert "float32 over int4 weights on cpu" in shown
    rounded = json.loads(run(cli, ["decode", "--model", str(source), "--quantize", "int4", *options]).stdout)
    assert found["token_ids"] == rounded["token_ids"]
    assert f"quantized to int4 from {source}" in run(cli, ["models", "list"]).stdout


@needs_kernels
def test_a_quantize_command_that_makes_no_sense_is_one_line(make_folder, tmp_path):
    source = str(make_folder("gpt2"))
    for options in (["--format", "int8"], ["--format", "int8", "--calibrate"]):
        done = CliRunner().invoke(cli, ["quantize", source, *options, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@needs_kernels
def test_a_quantized_draft_leaves_a_full_precision_target_exact(make_folder, tmp_path):
    # Weights large enough that rounding them to four bits changes what the model says.
    target = str(make_folder("llama", max_position_embeddings=128, initializer_range=0.3))
    options = ["--draft-model", target, "--draft-quantize", "int4", "--controller", "fixed", "--k", "3"]
    options += ["--max-new-tokens", "24", "--ignore-eos", "--compare", "--json"]
    done = CliRunner().invoke(cli, ["decode", "--model", target, "hello hello", "--device", "cpu", *options])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["implementations"]["weights"] == "fp32"
    assert 0 < found["metrics"]["accepted"] < found["metrics"]["drafted"]
    assert found["baseline"]["identical"]
