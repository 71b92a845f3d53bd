"""Packed linear layers against their definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from specdec_kernels import linear
from specdec_kernels.cpu import library
from specdec_kernels.linear import IMPLEMENTATIONS, ROWS, compare, formats_of, pack, refuse_library


def needs(name):
    reason = refuse_library(name, torch.device("cpu"), torch.float32)
    return pytest.mark.skipif(reason is not None, reason=f"{name} {reason}")


BUILT = pytest.mark.skipif(library.available() is not None, reason=f"the CPU kernels: {library.available()}")
MARKS = {"onednn": needs("onednn"), "fbgemm": needs("fbgemm"), "cpu": BUILT}
# Triton's runs on GPUs.
NAMES = [pytest.param(name, marks=MARKS.get(name, ())) for name in IMPLEMENTATIONS if name != "triton"]


def make(weight, bias, implementation):
    """The layer over weights that the implementation keeps exactly, and those weights."""
    kept = weight if "fp32" in formats_of(implementation) else weight.half().float()
    return pack(kept, bias, implementation, formats_of(implementation)[0]), kept


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (2, 5, 24), (1, 9, 24), (3, 40, 24)])
def test_every_implementation_agrees_with_the_definition(implementation, bias, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 24, generator=generator)
    offset = torch.randn(33, generator=generator) if bias else None
    x = torch.randn(shape, generator=generator)
    layer, weight = make(weight, offset, implementation)
    result = layer(x)
    # Sums of 24 products of unit normals, rounded in another order.
    torch.testing.assert_close(result, functional.linear(x, weight, offset), atol=1e-5, rtol=1e-5)
    assert result.is_contiguous()


@pytest.mark.parametrize("implementation", NAMES)
def test_inputs_and_weights_may_be_strided(implementation):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 33, generator=generator).T
    x = torch.randn(2, 24, 5, generator=generator).transpose(1, 2)
    layer, weight = make(weight, None, implementation)
    result = layer(x)
    torch.testing.assert_close(result, functional.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", NAMES)
def test_packing_and_running_work_in_inference_mode(implementation):
    weight = torch.ones(4, 3)
    with torch.inference_mode():
        result = make(weight, None, implementation)[0](torch.ones(2, 3))
    assert torch.equal(result, torch.full((2, 4), 3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_definition_takes_every_floating_type(dtype):
    weight, x = torch.ones(4, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    assert torch.equal(pack(weight, None, "torch")(x), torch.full((2, 4), 3, dtype=dtype))


def test_an_unknown_implementation_raises():
    with pytest.raises(ValueError, match="no implementation 'conv'"):
        pack(torch.ones(4, 3), None, "conv")


def test_a_format_that_an_implementation_does_not_have_raises():
    with pytest.raises(ValueError, match="onednn keeps weights in fp32, not in int8"):
        pack(torch.ones(4, 3), None, "onednn", "int8")
    with pytest.raises(ValueError, match="fbgemm keeps weights in fp16, not in fp32"):
        pack(torch.ones(4, 3), None, "fbgemm")


def test_comparison_times_every_implementation_and_tells_whose_rows_stand_alone(monkeypatch):
    def pack_leaky(weight, bias):
        return lambda x: functional.linear(x, weight) + x.sum()

    def pack_alone(weight, bias):
        return lambda x: torch.stack([(row * weight).sum(1) for row in x])

    monkeypatch.setattr(linear, "IMPLEMENTATIONS", {"leaky": pack_leaky, "alone": pack_alone})
    found = compare({(24, 16): 2, (8, 16): 1}, ("leaky", "alone"), "fp32", repeats=3)
    assert {name: timing.alone for name, timing in found.items()} == {"leaky": False, "alone": True}
    for timing in found.values():
        assert list(timing.turns) == list(timing.seconds) == list(ROWS)
        assert all(len(times) == 3 and min(times) > 0 for times in timing.turns.values())


def test_a_part_of_large_and_many_matrices_stands_for_all(monkeypatch):
    made = []
    monkeypatch.setattr(linear, "_COMPARED_BYTES", 4 * 16 * 20)
    monkeypatch.setattr(linear, "pack", lambda weight, *_: made.append(tuple(weight.shape)) or (lambda x: x @ weight.T))
    # A clock that ticks once per reading: every turn of two matrices out of seven, or of 20 rows out of 50, takes 1.
    ticks = iter(range(10**6))
    monkeypatch.setattr(linear.Clock, "now", lambda clock: next(ticks))
    assert compare({(10, 16): 7}, ("torch",), "fp32", repeats=1)["torch"].seconds == dict.fromkeys(ROWS, 3.5)
    assert compare({(50, 16): 1}, ("torch",), "fp32", repeats=1)["torch"].seconds == dict.fromkeys(ROWS, 2.5)
    assert made == [(10, 16), (10, 16), (20, 16)]


@BUILT
@given(rows=st.integers(2, 40), seed=st.integers(0, 2**20))
def test_rows_of_the_cpu_kernels_do_not_depend_on_each_other(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = pack(torch.randn(33, 24, generator=generator), torch.randn(33, generator=generator), "cpu")
    x = torch.randn(rows, 24, generator=generator)
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))
