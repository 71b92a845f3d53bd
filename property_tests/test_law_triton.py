"""The law of one verification by the Triton kernels, by enumeration; interpreted where there is no GPU.

A whole decode takes the interpreter minutes, so only the drafts and the verification are enumerated: every draft with
its probability, and the pieces of every coin. The tokens must follow the target's law.
"""

from collections import defaultdict

import pytest
import torch

from specdec.law import pieces
from specdec_kernels.dispatch import implementations, resolve
from specdec_kernels.ops import law

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = implementations("verify_lossless", DEVICE, torch.float64)["triton"]
# Interpreted, one chain takes a minute or two and the others many.
compiled_only = pytest.mark.skipif(DEVICE.type == "cpu", reason="takes the interpreter too long")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"triton {REASON}")
TEMPERATURE = 0.8


def written(op, drafts, weights, parents, logits, laws, **options):
    """The law of the first token that verification writes: `drafts [r m]` are all draws, with their probabilities."""
    rows, m = drafts.shape
    tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), drafts], 1)
    alive = torch.ones_like(tokens, dtype=torch.bool)
    sampled = alive & (torch.arange(m + 1) > 0)

    def outcome(origin, uniforms):
        count = len(origin)
        tree = [tokens[origin]] if op == "verify_block" else [tokens[origin], parents.expand(count, -1)]
        # The root has no coin.
        accept = torch.cat([torch.zeros(count, 1, dtype=torch.float64), uniforms[:, :m]], 1)
        arguments = [logits.expand(count, -1, -1), *tree, alive[origin], sampled[origin], laws.expand(count, -1, -1)]
        arguments = [tensor.to(DEVICE) for tensor in (*arguments, accept, uniforms[:, m].contiguous())]
        run = resolve(op, DEVICE, torch.float64, (), "triton")
        path, _, next_token, _ = (tensor.cpu() for tensor in run(*arguments, temperature=TEMPERATURE, **options))
        first = torch.where(path[:, 0] < 0, next_token, tokens[origin].gather(1, path[:, :1].clamp_min(0))[:, 0])
        return torch.cat([path, next_token[:, None], first[:, None]], 1)

    origin, point, volume = pieces(outcome, rows=rows, width=m + 1)
    found = defaultdict(float)
    decided = outcome(origin, point)[:, -1].tolist()
    for token, weight in zip(decided, (weights[origin] * volume).tolist(), strict=True):
        found[token] += weight
    return found


def assert_is(found, wanted):
    assert sum(abs(found[token] - weight) for token, weight in enumerate(wanted.tolist())) / 2 < 1e-9


@pytest.mark.parametrize("op", ["verify_lossless", pytest.param("verify_block", marks=compiled_only)])
def test_a_sampled_draft_is_verified_exactly(op):
    logits = torch.tensor([[[0.3, -0.4], [1.0, -1.0]]], dtype=torch.float64)
    laws = torch.tensor([[[0.35, 0.65], [0.0, 0.0]]], dtype=torch.float64)
    options = {} if op == "verify_block" else {"replacement": True}
    parents = torch.tensor([[-1, 0]])
    found = written(op, torch.tensor([[0], [1]]), laws[0, 0], parents, logits, laws, **options)
    assert_is(found, law.warp(logits[0, 0], temperature=TEMPERATURE))


@compiled_only
def test_siblings_drawn_without_replacement_are_verified_exactly():
    logits = torch.tensor([[[0.3, -0.4, 0.9]] * 3], dtype=torch.float64)
    laws = torch.tensor([[[0.5, 0.3, 0.2], [0.0] * 3, [0.0] * 3]], dtype=torch.float64)
    q = laws[0, 0]
    drafts = torch.tensor([[i, j] for i in range(3) for j in range(3) if i != j])
    weights = q[drafts[:, 0]] * q[drafts[:, 1]] / (1 - q[drafts[:, 0]])
    found = written("verify_lossless", drafts, weights, torch.tensor([[-1, 0, 0]]), logits, laws, replacement=False)
    assert_is(found, law.warp(logits[0, 0], temperature=TEMPERATURE))
