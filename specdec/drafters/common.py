"""What drafters share: the root of the next tree, and the two functions of a drafter that keeps no state."""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from specdec.types import DecodeState, StepInfo


def stateless(tokens: Tensor, length: Tensor, capacity: int) -> None:
    """`init` of drafters without a state."""
    return


def unchanged(state: DecodeState[Any, Any], info: StepInfo) -> Any:
    """`observe` of drafters that learn nothing from a round."""
    return state.drafter


def last_token(state: DecodeState[Any, Any]) -> Int[Tensor, " b"]:
    """The last committed token of each row: the root of the next tree."""
    return state.tokens.gather(1, state.length[:, None] - 1)[:, 0]
