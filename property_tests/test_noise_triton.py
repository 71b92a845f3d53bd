"""What `verify_coupled` skips could not have won: the cheap bound of the Gumbel noise is one, whatever the word."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec_kernels.dispatch import implementations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = implementations("gumbel", DEVICE, torch.int64)["triton"]
if REASON is not None:
    pytest.skip(f"triton {REASON}", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from specdec_kernels.ops import philox_triton  # noqa: E402

EDGES = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**8, 2**32 - 2, 2**32 - 1]


@triton.jit
def bounds(most, exact, words, block: tl.constexpr):
    place = tl.arange(0, block)
    word = tl.load(words + place).to(tl.uint32)
    tl.store(most + place, philox_triton.most_noise(word))
    tl.store(exact + place, philox_triton.noise(word))


@given(words=st.lists(st.integers(0, 2**32 - 1), max_size=256 - len(EDGES)))
def test_the_noise_of_a_word_is_at_most_its_bound_and_not_far_below(words):
    words = torch.tensor([*words, *EDGES, *[7] * 256], device=DEVICE)[:256]
    most, exact = torch.empty_like(words, dtype=torch.float32), torch.empty_like(words, dtype=torch.float64)
    bounds[(1,)](most, exact, words, block=256)
    slack = most.double() - exact
    assert bool((slack > 5e-5).all())
    assert bool((slack < 0.4).all())
