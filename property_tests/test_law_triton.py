"""The law of one verification by the Triton kernels, by enumeration; interpreted where there is no GPU.

The interpreter is too slow to search for break points, so the definition's are taken: its pieces are boxes of uniforms,
which give the law. Then Triton must decide as the definition at every corner of every box, drawn in by 1e-10. Decisions
are monotone in each uniform, so inside they are the same, and the two laws differ by less than 1e-9.
"""

from collections import defaultdict
from itertools import product

import pytest
import torch

from specdec.law import boxes
from specdec_kernels.dispatch import implementations, resolve
from specdec_kernels.ops import law

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = implementations("verify_lossless", DEVICE, torch.float64)["triton"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"triton {REASON}")
TEMPERATURE, INSET = 0.8, 1e-10
LOGITS = torch.tensor([[0.3, -0.4, 0.9], [1.0, -1.0, 0.2], [-0.5, 0.6, 0.1]], dtype=torch.float64)
LAW = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CHAIN, SIBLINGS = [-1, 0], [-1, 0, 0]

# (operation, parents, which drafts are sampled, whether siblings were drawn with replacement)
CASES = {
    "one draft": ("verify_lossless", CHAIN, [True], True),
    "a point": ("verify_lossless", CHAIN, [False], True),
    "siblings with replacement": ("verify_lossless", SIBLINGS, [True, True], True),
    "siblings without replacement": ("verify_lossless", SIBLINGS, [True, True], False),
    "points": ("verify_lossless", SIBLINGS, [False, False], True),
    "a sample before a point": ("verify_lossless", SIBLINGS, [True, False], False),
    "a point before a sample": ("verify_lossless", SIBLINGS, [False, True], True),
    "block": ("verify_block", CHAIN, [True], None),
    "match": ("verify_match", SIBLINGS, [False, False], None),
}


def drafted(sampled, replacement):
    """All drafts with their probabilities; a point is the last token, the next one the token before."""
    vocabulary = range(len(LAW))
    found = []
    for tokens in product(*(vocabulary if drawn else [len(LAW) - 1 - i] for i, drawn in enumerate(sampled))):
        weight, left = 1.0, LAW.clone()
        for token, drawn in zip(tokens, sampled, strict=True):
            weight *= float(left[token] / left.sum()) if drawn else 1.0
            if drawn and replacement is False:
                left[token] = 0
        if weight > 0:
            found.append((tokens, weight))
    return torch.tensor([tokens for tokens, _ in found]), torch.tensor(
        [weight for _, weight in found], dtype=torch.float64
    )


def decisions(name, op, parents, sampled, replacement, drafts):
    """`outcome(origin, uniforms)` of an implementation: path, next token and the first token written."""
    n = len(parents)
    tokens = torch.nn.functional.pad(drafts, (1, 0))
    run = resolve(op, DEVICE, torch.float64, (), name)

    def outcome(origin, uniforms):
        count = len(origin)
        arguments = {
            "logits": LOGITS[:n].expand(count, -1, -1),
            "tokens": tokens[origin],
            "valid": torch.ones(count, n, dtype=torch.bool),
            # The root has no coin, unless it samples.
            "accept": uniforms if op == "verify_match" else torch.nn.functional.pad(uniforms[:, :-1], (1, 0)),
        }
        if op != "verify_block":
            arguments["parents"] = torch.tensor(parents).expand(count, -1)
        if op != "verify_match":
            arguments["token"] = uniforms[:, -1].contiguous()
            arguments["sampled"] = torch.tensor([False, *sampled]).expand(count, -1)
            arguments["draft_probs"] = LAW.expand(count, n, -1)
        options = {"temperature": TEMPERATURE} | ({"replacement": replacement} if op == "verify_lossless" else {})
        made = run(**{key: tensor.to(DEVICE) for key, tensor in arguments.items()}, **options)
        path, _, next_token, _ = (tensor.cpu() for tensor in made)
        first = torch.where(path[:, 0] < 0, next_token, tokens[origin].gather(1, path[:, :1].clamp_min(0))[:, 0])
        return torch.cat([path, next_token[:, None], first[:, None]], 1)

    return outcome


@pytest.mark.parametrize("case", CASES)
def test_verification_follows_the_targets_law(case):
    op, parents, sampled, replacement = CASES[case]
    drafts, weights = drafted(sampled, replacement)
    defined = decisions("torch", op, parents, sampled, replacement, drafts)
    origin, low, high = boxes(defined, rows=len(drafts), width=len(parents))
    wanted = defined(origin, (low + high) / 2)

    written = defaultdict(float)
    volume = weights[origin] * (high - low).prod(1)
    for token, share in zip(wanted[:, -1].tolist(), volume.tolist(), strict=True):
        written[token] += share
    target = law.warp(LOGITS[0], temperature=TEMPERATURE)
    assert sum(abs(written[token] - share) for token, share in enumerate(target.tolist())) / 2 < 1e-9

    inset = torch.minimum(torch.full_like(low, INSET), (high - low) / 4)
    upper = torch.tensor(list(product([False, True], repeat=len(parents))))
    corners = torch.where(upper[:, None], high - inset, low + inset).flatten(0, 1)
    made = decisions("triton", op, parents, sampled, replacement, drafts)(origin.repeat(len(upper)), corners)
    assert torch.equal(made, wanted.repeat(len(upper), 1))
