"""The drafter that drafts nothing: plain decoding by the same step, the honest baseline."""

from typing import Any

from specdec import tree
from specdec.drafters.common import last_token, stateless, unchanged
from specdec.sampling import Sampling
from specdec.types import DecodeState, Drafter, Plan, Proposal


def none() -> Drafter:
    """Propose the root alone."""

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, None, int]:
        return tree.root_only(last_token(state)), None, 0

    return Drafter("none", stateless, propose, unchanged, chain=True, max_nodes=lambda depth: 1, capturable=True)
