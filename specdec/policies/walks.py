"""What the policies share: their draws, and what their operations take from the records."""

from jaxtyping import Float, Int
from torch import Tensor

from specdec.rng import Key
from specdec.types import Draws, Proposal, Verdict
from specdec_kernels.dispatch import OPERATIONS
from specdec_kernels.ops import verify
from specdec_kernels.ops.walk import follow


def choice_walk(proposal: Proposal, choice: Int[Tensor, "b n"]) -> Verdict:
    """Follow the target's choice: from each node go to the first child that carries `choice[node]`.

    The choice at the last node of the path is the next token. Every node is judged, so `accept_prob` is 0 or 1.
    """
    return Verdict(*follow(choice, proposal.tokens, proposal.parents, proposal.valid, chain=proposal.chain))


def no_draws(key: Key, round: Tensor, depth: Tensor, length: Tensor, vocab_size: int) -> Draws:
    """For rules without randomness."""
    return Draws()


def coin_draws(key: Key, round: Tensor, depth: Tensor, length: Tensor, vocab_size: int) -> Draws:
    """One uniform per node and one per row, of this round."""
    return Draws(*key.verification(round, depth.shape[1]))


def seed_draws(key: Key, round: Tensor, depth: Tensor, length: Tensor, vocab_size: int) -> Draws:
    """`coin_draws`, left to the operation to make; a key with uniforms of its own gives them."""
    if type(key) is Key:
        return Draws(seed=key.seed, round=round)
    return coin_draws(key, round, depth, length, vocab_size)


def coins(draws: Draws) -> dict[str, Tensor | None]:
    """What the operations take of `coin_draws` and `seed_draws`."""
    return {"accept": draws.accept, "token": draws.token, "seed": draws.seed, "round": draws.round}


def child_law(
    proposal: Proposal, node: Int[Tensor, " b"], index: int, like: Float[Tensor, "b v"]
) -> Float[Tensor, "b v"]:
    """The law that node `index` was drawn from given its parent `node`: a draft row, or a point mass."""
    return verify.child_law(proposal.tokens, proposal.sampled, proposal.draft_probs, node, index, like)


def check_kernels(operation: str, kernels: str) -> None:
    """Raise `ValueError` unless `kernels` is `auto` or names an implementation of `operation`.

    Whether that one can run is known, and said, when the first logits arrive.
    """
    names = [implementation.name for implementation in OPERATIONS[operation]]
    if kernels not in ("auto", *names):
        raise ValueError(f"{operation} has no implementation {kernels!r}; use auto, {', '.join(names)}")
