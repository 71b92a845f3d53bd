"""Every CPU kernel computes its definition, and a row's bits do not depend on what else is computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from specdec_kernels.cpu import library
from specdec_kernels.cpu.packed import FORMATS, GROUP, linear, pack, reference, unpack

pytestmark = pytest.mark.skipif(library.available() is not None, reason=f"the CPU kernels: {library.available()}")
SETS = library.load().instruction_sets if library.available() is None else ("portable",)

SIZES = st.integers(1, 70)


@given(
    format=st.sampled_from(FORMATS),
    instruction_set=st.sampled_from(SETS),
    out=SIZES,
    into=st.integers(1, 200),
    rows=st.integers(1, 70),
    threads=st.integers(1, 3),
    bias=st.booleans(),
    scale=st.floats(-6, 6),
    seed=st.integers(0, 2**20),
)
def test_a_row_is_the_same_bits_alone_and_in_company(
    format, instruction_set, out, into, rows, threads, bias, scale, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=generator)
    offset = torch.randn(out, generator=generator) if bias else None
    x = torch.randn(rows, into, generator=generator) * 10.0**scale
    packed = pack(weight, offset, format)
    together = linear(packed, x, threads=threads, instruction_set=instruction_set)
    row = seed % rows
    alone = linear(packed, x[row : row + 1], threads=1, instruction_set=instruction_set)
    assert torch.equal(alone[0], together[row])
    error = (together - reference(packed, x)).abs()
    # The worst order of float32 sums: each of the `into` terms is rounded at most `into` times by 2^-24.
    size = x.abs() @ terms(packed).T + (0 if offset is None else offset.abs())
    assert (error <= size * (into + 4) * 2.0**-24 + 1e-30).all()


def terms(packed):
    """The size of what is summed per input: the weight, or for int4 the largest of a level times its scale and the
    minimum, which are summed apart."""
    weight = unpack(packed).abs()
    if packed.format != "int4":
        return weight
    groups = functional.pad(weight, (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    # Minimum and range are at most twice the largest weight, unless a group has few of its levels.
    return (4 * groups.amax(2, keepdim=True)).expand_as(groups).flatten(1)[:, : weight.shape[1]]


@given(
    format=st.sampled_from(FORMATS),
    out=SIZES,
    into=SIZES,
    order=st.permutations(range(9)),
    seed=st.integers(0, 2**20),
)
def test_rows_may_be_computed_in_any_order(format, out, into, order, seed):
    generator = torch.Generator().manual_seed(seed)
    packed = pack(torch.randn(out, into, generator=generator), None, format)
    x = torch.randn(9, into, generator=generator)
    assert torch.equal(linear(packed, x[order]), linear(packed, x)[order])


# Not int4: a group that uses few of its levels may be fitted by others the second time.
@given(
    format=st.sampled_from([name for name in FORMATS if name != "int4"]),
    out=SIZES,
    into=SIZES,
    seed=st.integers(0, 2**20),
)
def test_packing_what_was_unpacked_changes_nothing(format, out, into, seed):
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    once = unpack(pack(weight, None, format))
    twice = unpack(pack(once, None, format))
    torch.testing.assert_close(twice, once, atol=1e-6, rtol=1e-6)
