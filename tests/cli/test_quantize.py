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
    done = decode("--quantize", weights, "--compare", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["implementations"] == {"stack": "cpu", "weights": weights}
    assert found["metrics"]["drafted"] > 0
    assert found["baseline"]["identical"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapter", "huggingface"), "quantize 'int8' needs the decoder adapter"),
        (("--dtype", "bfloat16"), "quantize 'int8' needs the CPU stack, which does not run here"),
    ],
)
def test_what_cannot_be_quantized_is_refused(smollm2, options, message):
    done = decode("--quantize", "int8", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
