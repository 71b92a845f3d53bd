"""The dispatch rule as a table: what is asked for, where, and what comes out."""

import pytest
import torch

from specdec_kernels import dispatch, linear
from specdec_kernels.dispatch import Choice, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FORCED = {"SPECDEC_FORCE_PY": "1"}


def test_dispatch_lists_what_exists():
    assert [name for name, _ in dispatch.OPERATIONS["linear"]] == list(linear.IMPLEMENTATIONS)


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_the_torch_definition_comes_last_and_runs_everywhere(operation):
    name, refuse = dispatch.OPERATIONS[operation][-1]
    assert name == "torch"
    assert refuse(torch.device("meta"), torch.float16) is None


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "environ", "expected"),
    [
        (CPU, torch.float32, "auto", {}, Choice("onednn", "fastest that runs here")),
        (CPU, torch.float32, "torch", {}, Choice("torch", "asked for")),
        (CPU, torch.float32, "onednn", {}, Choice("onednn", "asked for")),
        (CPU, torch.float32, "auto", {"SPECDEC_FORCE_PY": "0"}, Choice("onednn", "fastest that runs here")),
        (
            CPU,
            torch.float32,
            "auto",
            FORCED,
            Choice("torch", "SPECDEC_FORCE_PY=1", (("onednn", "is ruled out by SPECDEC_FORCE_PY=1"),)),
        ),
        (CPU, torch.float32, "torch", FORCED, Choice("torch", "asked for")),
        (
            CPU,
            torch.float64,
            "auto",
            {},
            Choice(
                "torch",
                "onednn is built for float32, not for float64",
                (("onednn", "is built for float32, not for float64"),),
            ),
        ),
        (
            CUDA,
            torch.float32,
            "auto",
            {},
            Choice("torch", "onednn runs on the CPU, not on cuda", (("onednn", "runs on the CPU, not on cuda"),)),
        ),
        (CUDA, torch.bfloat16, "torch", {}, Choice("torch", "asked for")),
    ],
)
def test_choice_of_linear(device, dtype, requested, environ, expected):
    if expected.implementation == "onednn" and linear.refuse_onednn(device, dtype):
        pytest.skip("this torch has no oneDNN linear")
    assert choose("linear", device, dtype, requested, environ) == expected


@pytest.mark.parametrize(
    ("device", "dtype", "environ", "reason"),
    [
        (CPU, torch.bfloat16, {}, "onednn is built for float32, not for bfloat16; use auto"),
        (CUDA, torch.float32, {}, "onednn runs on the CPU, not on cuda; use auto"),
        (CPU, torch.float32, FORCED, "onednn is ruled out by SPECDEC_FORCE_PY=1; use auto"),
    ],
)
def test_a_named_choice_that_cannot_run_raises_with_the_reason(device, dtype, environ, reason):
    with pytest.raises(ValueError, match=reason):
        choose("linear", device, dtype, "onednn", environ)


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="no implementation 'triton'; use auto, onednn, torch"):
        choose("linear", CPU, torch.float32, "triton", {})
    with pytest.raises(ValueError, match="unknown operation 'conv'; known: decoder_stack, linear"):
        choose("conv", CPU, torch.float32, "auto", {})


def test_the_environment_is_read_when_the_choice_is_made(monkeypatch):
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    assert choose("linear", CPU, torch.float32).implementation == "torch"
    monkeypatch.delenv("SPECDEC_FORCE_PY")
    assert choose("linear", CPU, torch.float32).reason != "SPECDEC_FORCE_PY=1"
