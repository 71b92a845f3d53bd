"""Packed linear layers against their definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from specdec_kernels.cpu import library
from specdec_kernels.linear import IMPLEMENTATIONS, pack, refuse_onednn

NEEDS = pytest.mark.skipif(
    refuse_onednn(torch.device("cpu"), torch.float32) is not None, reason="this torch has no oneDNN linear"
)
BUILT = pytest.mark.skipif(library.available() is not None, reason=f"the CPU kernels: {library.available()}")
MARKS = {"onednn": NEEDS, "cpu": BUILT}
# Triton's runs on GPUs.
NAMES = [pytest.param(name, marks=MARKS.get(name, ())) for name in IMPLEMENTATIONS if name != "triton"]


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (2, 5, 24), (1, 9, 24), (3, 40, 24)])
def test_every_implementation_agrees_with_the_definition(implementation, bias, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 24, generator=generator)
    offset = torch.randn(33, generator=generator) if bias else None
    x = torch.randn(shape, generator=generator)
    result = pack(weight, offset, implementation)(x)
    # Sums of 24 products of unit normals, rounded in another order.
    torch.testing.assert_close(result, functional.linear(x, weight, offset), atol=1e-5, rtol=1e-5)
    assert result.is_contiguous()


@pytest.mark.parametrize("implementation", NAMES)
def test_inputs_and_weights_may_be_strided(implementation):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 33, generator=generator).T
    x = torch.randn(2, 24, 5, generator=generator).transpose(1, 2)
    result = pack(weight, None, implementation)(x)
    torch.testing.assert_close(result, functional.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", NAMES)
def test_packing_and_running_work_in_inference_mode(implementation):
    weight = torch.ones(4, 3)
    with torch.inference_mode():
        result = pack(weight, None, implementation)(torch.ones(2, 3))
    assert torch.equal(result, torch.full((2, 4), 3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_definition_takes_every_floating_type(dtype):
    weight, x = torch.ones(4, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    assert torch.equal(pack(weight, None, "torch")(x), torch.full((2, 4), 3, dtype=dtype))


def test_an_unknown_implementation_raises():
    with pytest.raises(ValueError, match="no implementation 'conv'"):
        pack(torch.ones(4, 3), None, "conv")


@BUILT
@given(rows=st.integers(2, 40), seed=st.integers(0, 2**20))
def test_rows_of_the_cpu_kernels_do_not_depend_on_each_other(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = pack(torch.randn(33, 24, generator=generator), torch.randn(33, generator=generator), "cpu")
    x = torch.randn(rows, 24, generator=generator)
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))
