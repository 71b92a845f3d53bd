"""The dispatch rule as a table: what is asked for, where, and what comes out."""

import os
import subprocess
import sys

import pytest
import torch

from specdec_kernels import dispatch, linear
from specdec_kernels.dispatch import OPERATIONS, Choice, Implementation, choose, implementations, resolve

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
FORCED = {"SPECDEC_FORCE_PY": "1"}
INTERPRETED = {"TRITON_INTERPRET": "1"}
PRIORITY = ("cuda", "triton", "host", "torch")


@pytest.fixture
def everything(monkeypatch):
    """An operation with every kind of implementation, on a machine that has all they need."""
    wide = dispatch.floats(torch.float32, torch.bfloat16)
    rows = (
        Implementation("cuda", wide, lambda: lambda: "cuda"),
        Implementation("triton", lambda device, dtype, shape: "wants a row" if not shape else None, lambda: len),
        Implementation("torch", dispatch.anywhere, lambda: sum),
    )
    monkeypatch.setattr(dispatch, "OPERATIONS", {"op": rows})
    monkeypatch.setattr(dispatch, "_probe_triton", lambda interpreted: None)
    for name in ("TRITON_INTERPRET", "SPECDEC_FORCE_PY"):
        monkeypatch.delenv(name, raising=False)
    resolve.cache_clear()
    yield
    resolve.cache_clear()


def test_dispatch_lists_what_exists():
    assert [candidate.name for candidate in OPERATIONS["linear"]] == list(linear.IMPLEMENTATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_torch_definition_comes_last_and_runs_everywhere(operation):
    last = OPERATIONS[operation][-1]
    assert last.name == "torch"
    assert last.refuse(torch.device("meta"), torch.float16, ()) is None


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_devices_are_ordered_by_one_priority(operation):
    names = [candidate.name for candidate in OPERATIONS[operation] if candidate.name in PRIORITY]
    assert names == sorted(names, key=PRIORITY.index)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "decoder_stack"])
def test_what_is_chosen_can_be_loaded(operation):
    assert callable(resolve(operation, CPU, torch.float32))


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "requested", "environ", "expected"),
    [
        (CUDA, torch.float32, (1,), "auto", {}, Choice("cuda", "fastest that runs here")),
        (CUDA, torch.bfloat16, (), "auto", {}, Choice("cuda", "fastest that runs here")),
        (
            CUDA,
            torch.float16,
            (1,),
            "auto",
            {},
            Choice(
                "triton",
                "cuda is built for float32, bfloat16, not for float16",
                (("cuda", "is built for float32, bfloat16, not for float16"),),
            ),
        ),
        (
            CUDA,
            torch.float16,
            (),
            "auto",
            {},
            Choice(
                "torch",
                "cuda is built for float32, bfloat16, not for float16; triton wants a row",
                (("cuda", "is built for float32, bfloat16, not for float16"), ("triton", "wants a row")),
            ),
        ),
        (CUDA, torch.float32, (1,), "triton", {}, Choice("triton", "asked for")),
        (
            CUDA,
            torch.float32,
            (1,),
            "auto",
            FORCED,
            Choice(
                "torch",
                "SPECDEC_FORCE_PY=1",
                (("cuda", "is ruled out by SPECDEC_FORCE_PY=1"), ("triton", "is ruled out by SPECDEC_FORCE_PY=1")),
            ),
        ),
        (
            CPU,
            torch.float32,
            (1,),
            "auto",
            {},
            Choice(
                "torch",
                "cuda runs on NVIDIA GPUs, not on cpu; "
                "triton runs on GPUs, not on the CPU; TRITON_INTERPRET=1 interprets it",
                (
                    ("cuda", "runs on NVIDIA GPUs, not on cpu"),
                    ("triton", "runs on GPUs, not on the CPU; TRITON_INTERPRET=1 interprets it"),
                ),
            ),
        ),
        (
            CPU,
            torch.float32,
            (1,),
            "auto",
            INTERPRETED,
            Choice(
                "torch",
                "cuda runs on NVIDIA GPUs, not on cpu; "
                "triton is interpreted with TRITON_INTERPRET=1, which runs only by name",
                (
                    ("cuda", "runs on NVIDIA GPUs, not on cpu"),
                    ("triton", "is interpreted with TRITON_INTERPRET=1, which runs only by name"),
                ),
            ),
        ),
        (CPU, torch.float32, (1,), "triton", INTERPRETED, Choice("triton", "asked for")),
        (CPU, torch.float32, (1,), "torch", {}, Choice("torch", "asked for")),
        (
            MPS,
            torch.float32,
            (1,),
            "auto",
            INTERPRETED,
            Choice(
                "torch",
                "cuda runs on NVIDIA GPUs, not on mps; triton runs on GPUs, not on mps",
                (("cuda", "runs on NVIDIA GPUs, not on mps"), ("triton", "runs on GPUs, not on mps")),
            ),
        ),
    ],
)
def test_choice_among_all_kinds(everything, device, dtype, shape, requested, environ, expected):
    assert choose("op", device, dtype, shape, requested, environ) == expected


@pytest.mark.parametrize(
    ("device", "requested", "environ", "reason"),
    [
        (CPU, "cuda", {}, "op: cuda runs on NVIDIA GPUs, not on cpu; use auto"),
        (CPU, "triton", {}, "op: triton runs on GPUs, not on the CPU; TRITON_INTERPRET=1 interprets it; use auto"),
        (CUDA, "cuda", FORCED, "op: cuda is ruled out by SPECDEC_FORCE_PY=1; use auto"),
        (MPS, "triton", INTERPRETED, "op: triton runs on GPUs, not on mps; use auto"),
    ],
)
def test_a_name_that_cannot_run_raises_where_auto_falls_back(everything, device, requested, environ, reason):
    with pytest.raises(ValueError, match=reason):
        choose("op", device, torch.float32, (1,), requested, environ)
    assert choose("op", device, torch.float32, (1,), "auto", environ).implementation == "torch"


def test_every_implementation_is_listed_with_what_keeps_it_from_running(everything):
    assert implementations("op", CPU, torch.float32, (1,), INTERPRETED) == {
        "cuda": "runs on NVIDIA GPUs, not on cpu",
        "triton": None,
        "torch": None,
    }


def test_resolve_returns_the_function_and_remembers_it(everything, monkeypatch):
    assert resolve("op", CUDA, torch.float32)() == "cuda"
    assert resolve("op", CUDA, torch.float16, (1,)) is len
    assert resolve("op", CPU, torch.float32) is sum
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    assert resolve("op", CUDA, torch.float16, (1,)) is len
    resolve.cache_clear()
    assert resolve("op", CUDA, torch.float16, (1,)) is sum
    with pytest.raises(ValueError, match="ruled out by SPECDEC_FORCE_PY=1"):
        resolve("op", CUDA, torch.float32, (), "cuda")


def test_the_rules_of_a_row_object_in_order():
    both = dispatch.every(dispatch.floats(torch.float32), lambda device, dtype, shape: f"sees {len(shape)} axes")
    assert both(CPU, torch.float16, (1, 2)) == "is built for float32, not for float16"
    assert both(CPU, torch.float32, (1, 2)) == "sees 2 axes"
    assert dispatch.every()(CPU, torch.float32, ()) is None


def test_choosing_where_triton_does_not_run_imports_none_of_it():
    code = (
        "import sys, torch; from specdec_kernels.dispatch import OPERATIONS, choose\n"
        "for op in OPERATIONS: choose(op, torch.device('mps'), torch.float16)\n"
        "print([name for name in sys.modules if name == 'triton' or name.endswith('_triton')])"
    )
    environ = {name: value for name, value in os.environ.items() if name != "SPECDEC_FORCE_PY"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "environ", "expected"),
    [
        (CPU, torch.float32, "auto", {}, Choice("cpu", "fastest that runs here")),
        (CPU, torch.float32, "torch", {}, Choice("torch", "asked for")),
        (CPU, torch.float32, "onednn", {}, Choice("onednn", "asked for")),
        (CPU, torch.float32, "fbgemm", {}, Choice("fbgemm", "asked for")),
        (CPU, torch.float32, "auto", {"SPECDEC_FORCE_PY": "0"}, Choice("cpu", "fastest that runs here")),
        (CPU, torch.float32, "torch", FORCED, Choice("torch", "asked for")),
        (CUDA, torch.bfloat16, "torch", {}, Choice("torch", "asked for")),
    ],
)
def test_choice_of_linear(device, dtype, requested, environ, expected):
    problem = implementations("linear", device, dtype)[expected.implementation]
    if expected.implementation != "torch" and problem is not None:
        pytest.skip(f"{expected.implementation} {problem}")
    assert choose("linear", device, dtype, (), requested, environ) == expected


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
        choose("linear", device, dtype, (), "onednn", environ)


def test_unknown_names_raise():
    with pytest.raises(ValueError, match=r"no implementation .conv.; use auto, cpu, onednn, .*torch"):
        choose("linear", CPU, torch.float32, (), "conv", {})
    with pytest.raises(ValueError, match="unknown operation 'conv'; known: decoder_stack, linear, "):
        choose("conv", CPU, torch.float32)


def test_the_environment_is_read_when_the_choice_is_made(monkeypatch):
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    assert choose("linear", CPU, torch.float32).implementation == "torch"
    monkeypatch.delenv("SPECDEC_FORCE_PY")
    assert choose("linear", CPU, torch.float32).reason != "SPECDEC_FORCE_PY=1"


def test_one_launch_of_attention_is_for_one_row_a_few_nodes_and_short_caches():
    from specdec_kernels.ops.attend import pays

    # The same for all windows that promise the same bits.
    assert {pays(1, n, capacity) for n in range(1, 9) for capacity in (16, 2048)} == {True}
    assert not any((pays(2, 1, 512), pays(1, 9, 512), pays(1, 1, 2049)))


def test_one_launch_of_all_layers_is_for_one_row_a_few_nodes_and_caches_of_medium_length():
    from specdec_kernels.ops.layers import pays

    assert {pays(1, n, capacity) for n in range(1, 9) for capacity in (16, 4096)} == {True}
    assert not any((pays(2, 1, 512), pays(1, 9, 512), pays(1, 1, 4097)))


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        (torch.float32, (), "is built for float16 and bfloat16, not for float32"),
        (torch.bfloat16, (9, 2, 64, 96, 64), "is built for up to 8 nodes, not for 9"),
        (torch.bfloat16, (1, 2, 64, 96, 80), "is built for heads of 64 and 128 channels, not of 80"),
        (torch.float16, (1, 2, 8192, 96, 64), "norms up to 4096 channels, not 8192"),
        (torch.float16, (1, 2, 64, 100, 64), "reads 8 channels at a time, and 100 are no multiple of that"),
    ],
)
def test_what_one_launch_of_all_layers_cannot_take_is_refused(dtype, shape, reason):
    from specdec_kernels.ops.layers_cuda import refuse

    assert refuse(torch.device("cuda"), dtype, shape) == reason
