"""The generator is Philox4x32-10, and its streams do not meet."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.rng import Key, Purpose, philox, seeded

# The published known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds).
ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "seed", "words"), ANSWERS)
def test_philox_known_answers(counter, seed, words):
    made = philox(tuple(torch.tensor([[word]]) for word in counter), torch.tensor([seed]))
    assert tuple(int(word) for word in made) == words


@given(st.integers(0, 2**62), st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40))
def test_a_uniform_does_not_depend_on_how_many_are_drawn(seed, round, few, more):
    key, rounds = seeded(seed, 2), torch.tensor([round, round + 1])
    short, long = (key.uniforms(rounds, Purpose.ACCEPT, n) for n in sorted((few, few + more)))
    assert torch.equal(short, long[:, : short.shape[1]])
    accept, token = key.verification(rounds, few)
    assert torch.equal(accept, short[:, :few])
    assert torch.equal(token, key.verification(rounds, few + more)[1])


@given(st.integers(0, 2**62), st.integers(0, 2**31))
def test_streams_of_other_rows_rounds_and_purposes_differ(seed, round):
    key = seeded(seed, 2)
    drawn = torch.cat(
        [key.uniforms(torch.tensor([r, r]), p, 3) for r in (round, round + 1) for p in (Purpose.DRAFT, Purpose.ACCEPT)]
    ).flatten()
    assert len(set(drawn.tolist())) == drawn.numel()
    assert bool(((drawn >= 0) & (drawn < 1)).all())


def test_uniforms_and_gumbels_have_the_right_moments():
    key = seeded(7, 1)
    uniform = key.uniforms(torch.tensor([0]), Purpose.DRAFT, 200_000)
    assert abs(float(uniform.mean()) - 1 / 2) < 3e-3
    assert abs(float(uniform.var()) - 1 / 12) < 1e-3
    gumbel = key.gumbels(torch.tensor([[5]]), 200_001)
    assert gumbel.shape == (1, 1, 200_001)
    assert abs(float(gumbel.mean()) - 0.5772) < 1e-2
    assert abs(float(gumbel.var()) - 1.6449) < 3e-2


def test_gumbel_noise_is_fixed_by_position_and_seed_alone():
    one = Key(torch.tensor([3])).gumbels(torch.tensor([[9, 10]]), 11)
    batch = Key(torch.tensor([1, 3])).gumbels(torch.tensor([[0, 9], [10, 4]]), 11)
    assert torch.equal(batch[1, 0], one[0, 1])
    assert not torch.equal(batch[0, 1], one[0, 0])
