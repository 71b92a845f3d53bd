"""Warping equals Hugging Face's processors, and drawing follows the law."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.sampling import Sampling, penalize, residual, sample, seen_tokens, warp
from specdec.testing import samplings


def theirs(logits, tokens, sampling):
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(chain(tokens, logits), -1)


@given(samplings(), st.integers(0, 2**31), st.integers(2, 40))
def test_warp_equals_hugging_face(sampling, seed, vocab_size):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, vocab_size, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, vocab_size, (2, 5), generator=generator)
    seen = seen_tokens(tokens, torch.tensor([5, 5]), vocab_size)
    ours = warp(penalize(logits, seen, sampling), sampling)
    assert torch.allclose(ours, theirs(logits.clone(), tokens, sampling), atol=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 30))
def test_sample_inverts_the_distribution_function(seed, vocab_size):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, vocab_size, generator=generator, dtype=torch.float64)
    weights = weights * (torch.rand(1, vocab_size, generator=generator) < 0.7)
    if not bool(weights.sum() > 0):
        weights[0, 0] = 1.0
    edges = (weights.cumsum(-1) / weights.sum())[0].tolist()
    for token, upper in enumerate(edges):
        lower = edges[token - 1] if token else 0.0
        if upper - lower > 1e-9:
            middle = torch.tensor([(lower + upper) / 2], dtype=torch.float64)
            assert int(sample(weights, middle)) == token
    largest = int(sample(weights, torch.tensor([1 - 2.0**-53], dtype=torch.float64)))
    assert float(weights[0, largest]) > 0
    assert float(weights[0, int(sample(weights, torch.tensor([0.0], dtype=torch.float64)))]) > 0


@given(st.integers(0, 2**31))
def test_residual_is_the_normalized_excess(seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.softmax(torch.randn(2, 1, 6, generator=generator, dtype=torch.float64), -1)
    excess = (p - q).clamp_min(0)
    assert torch.allclose(residual(p, q), excess / excess.sum())
    assert torch.equal(residual(p, p), p)


def test_temperature_zero_is_the_first_largest_logit():
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0]])
    assert warp(logits, Sampling()).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_laws_are_at_least_float32():
    logits = torch.randn(1, 5, dtype=torch.bfloat16)
    assert warp(logits, Sampling(temperature=1.0)).dtype == torch.float32
