"""A new drafter in twenty lines: repeat what followed the last token two occurrences ago, and have it checked.

python examples/write_a_drafter.py
"""

import torch

from specdec import controllers, decode, policies, tree
from specdec.drafters.common import last_token, stateless, unchanged
from specdec.metrics import summarize
from specdec.models.tabular import tabular
from specdec.testing import check_drafter
from specdec.types import Drafter


def second_last() -> Drafter:
    """Draft the continuation of the last but one earlier occurrence of the last token."""

    def propose(state, plan, sampling):
        root, index = last_token(state), torch.arange(state.tokens.shape[1])
        earlier = (state.tokens == root[:, None]) & (index < state.length[:, None] - 1)
        places = torch.where(earlier, index, -1).topk(2, dim=1).values[:, 1]
        offset = places[:, None] + 1 + torch.arange(plan.max_depth)
        drafts = state.tokens.gather(1, offset)
        known = torch.where(places >= 0, torch.minimum(plan.depth, state.length - 1 - places), 0)
        return tree.chain(root, drafts, known), None, 0

    return Drafter("second_last", stateless, propose, unchanged, chain=True, max_nodes=lambda depth: 1 + depth)


model = tabular(vocab_size=4, seed=0, sharpness=8.0)
check_drafter(second_last(), model, policies.greedy(), prompts=[[0, 1, 2], [3]])
state = decode(
    [[0, 1, 2, 3]],
    model=model,
    drafter=second_last(),
    policy=policies.greedy(),
    controller=controllers.fixed(4),
    max_new_tokens=60,
)
print("accepted per position:", summarize(state.metrics)["per_position"])
