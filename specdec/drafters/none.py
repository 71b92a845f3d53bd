"""The drafter that drafts nothing: plain decoding by the same step, the honest baseline."""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from specdec import tree
from specdec.sampling import Sampling
from specdec.types import DecodeState, Drafter, Plan, Proposal, StepInfo


def none() -> Drafter:
    """Propose the root alone."""

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, None, int]:
        return tree.root_only(last_token(state)), None, 0

    return Drafter("none", stateless, propose, unchanged, chain=True, max_nodes=lambda depth: 1)


def stateless(tokens: Tensor, length: Tensor, capacity: int) -> None:
    """`init` of drafters without a state."""
    return None


def unchanged(state: DecodeState[Any, Any], info: StepInfo) -> Any:
    """`observe` of drafters that learn nothing from a round."""
    return state.drafter


def last_token(state: DecodeState[Any, Any]) -> Int[Tensor, " b"]:
    """The last committed token of each row: the root of the next tree."""
    return state.tokens.gather(1, state.length[:, None] - 1)[:, 0]
