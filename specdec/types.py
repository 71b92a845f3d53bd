"""Records and function types that every part of specdec shares.

Shape letters, batch first:

====  =======================================================================
b     rows of the batch (sequences)
n     nodes of a draft tree, root included
v     vocabulary
t     token capacity of a row
c     cache slots of a row
h     feature width (hidden size)
k     draft depths, 0 included
====  =======================================================================

In formulas `p` is the target's law and `q` the draft's. Node 0 of a tree is the last committed token; every other
node is a drafted token whose parent has a smaller index. A round proposes a tree, scores it with one target forward,
verifies it, and commits the accepted path plus exactly one token of the target's.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec.cache import KVCache
from specdec.metrics import Metrics
from specdec.records import record
from specdec.rng import Key
from specdec.sampling import Sampling
from specdec_kernels.dispatch import resolve
from specdec_kernels.ops import commit
from specdec_kernels.ops.walk import TreeShape

D = TypeVar("D")
C = TypeVar("C")


@record
class Proposal:
    """A batch of draft trees.

    `tokens`: token of each node; node 0 repeats the last committed token.
    `parents`: index of the parent, -1 at the root, smaller than the node's own index elsewhere.
    `valid`: nodes that exist; the others are padding that no path may contain.
    `sampled`: the token was drawn from its parent's row of `draft_probs`; otherwise it was chosen without looking
    at randomness (a point mass).
    `draft_probs`: row i is the law q of the children of node i, zero where node i has no sampled child.
    `replacement`: sampled siblings were drawn independently of each other (True) or without replacement (False).
    `chain`: every row is a chain, `parents[:, i] == i - 1`; a Python value because it selects cheaper code.
    """

    tokens: Int[Tensor, "b n"]
    parents: Int[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]
    sampled: Bool[Tensor, "b n"]
    draft_probs: Float[Tensor, "b n v"] | None = None
    replacement: bool = True
    chain: bool = False

    @cached_property
    def shape(self) -> TreeShape:
        """Depths, sizes and who is whose ancestor."""
        measure = resolve("tree_shape", self.parents.device, self.parents.dtype, self.parents.shape[:1])
        shape: TreeShape = measure(self.parents, self.valid, chain=self.chain)
        return shape

    @property
    def drafted(self) -> Int[Tensor, " b"]:
        """Drafts of each row: its valid nodes without the root."""
        return self.shape.drafted


@record
class Target:
    """What the target says after each node: `logits` (repetition penalty applied, temperature not) and features."""

    logits: Float[Tensor, "b n v"]
    features: Float[Tensor, "b n h"] | None = None


@record
class Draws:
    """Randomness as data: policies receive it and never draw.

    `accept`: one uniform in [0, 1) per node, `token`: one per row, `noise`: Gumbel noise per node and token. In their
    place may stand the row's `seed` with its `round`, or with the `position` of each node, from which the rule makes
    the same numbers where it needs them (`Key.verification`, `Key.gumbels`).
    """

    accept: Float[Tensor, "b n"] | None = None
    token: Float[Tensor, " b"] | None = None
    noise: Float[Tensor, "b n v"] | None = None
    seed: Int[Tensor, " b"] | None = None
    position: Int[Tensor, "b n"] | None = None
    round: Int[Tensor, " b"] | None = None


@record
class Verdict:
    """What a policy decided.

    `path`: accepted nodes in order, root excluded, padded with -1. `num_accepted`: their number.
    `next_token`: the one token that follows them. `accept_prob`: for each node the policy looked at, the probability
    over its own coin that it is accepted; 0 elsewhere.
    """

    path: Int[Tensor, "b n"]
    num_accepted: Int[Tensor, " b"]
    next_token: Int[Tensor, " b"]
    accept_prob: Float[Tensor, "b n"]


@record
class Plan:
    """What a controller asks for: draft at most `depth` tokens in each row; `max_depth` is their host-side bound.

    `worth`: the least chance of acceptance at which one more node pays for its share of the forward, where the
    controller knows costs; for drafters that know chances.
    """

    depth: Int[Tensor, " b"]
    max_depth: int
    worth: Float[Tensor, " b"] | None = None


RUNNING, STOPPED_EOS, STOPPED_LENGTH = commit.RUNNING, commit.STOPPED_EOS, commit.STOPPED_LENGTH
STOPPED_TEXT, FAILED = commit.STOPPED_TEXT, commit.FAILED
STOP_REASONS = {
    RUNNING: "running",
    STOPPED_EOS: "eos",
    STOPPED_LENGTH: "length",
    STOPPED_TEXT: "stop_string",
    FAILED: "nan_logits",
}


@record
class DecodeState(Generic[D, C]):
    """Everything the next round needs, and nothing else. Invariant: `cache.length == length - 1` in every row.

    `tokens`: prompt and output, anything past `length`. `prompt_length`, `length`: in tokens. `limit`: length at which
    the row stops. `finish`: 0 while running, else a key of `STOP_REASONS`. `round`: rounds done, which numbers the
    randomness. `features`: the target's hidden state at the last token it has seen, when the drafter asks for it.
    """

    tokens: Int[Tensor, "b t"]
    length: Int[Tensor, " b"]
    prompt_length: Int[Tensor, " b"]
    limit: Int[Tensor, " b"]
    finish: Int[Tensor, " b"]
    round: Int[Tensor, " b"]
    key: Key
    cache: KVCache
    drafter: D
    controller: C
    metrics: Metrics
    features: Float[Tensor, "b h"] | None = None

    @property
    def done(self) -> Bool[Tensor, " b"]:
        return self.finish != RUNNING


@record
class StepInfo:
    """What happened in a round; never fed back except through `observe` and `update`.

    `emitted`: committed tokens in order, padded with -1. `num_emitted`: their number (0 for rows already done).
    `running`: rows that took part. `draft_forwards`: forwards of a draft model. `timing`: seconds by phase.
    """

    plan: Plan
    proposal: Proposal
    verdict: Verdict
    emitted: Int[Tensor, "b n"]
    num_emitted: Int[Tensor, " b"]
    running: Bool[Tensor, " b"]
    draft_forwards: int = 0
    timing: Mapping[str, float] | None = None


@runtime_checkable
class Forward(Protocol):
    """Append `tokens` to the cache and score them; consumes `cache` and returns the next handle.

    `depth`: position of each node relative to `cache.length`. `visible [b n w]`, w >= n: which of the last w slots, the
    new ones being the last n, a node sees besides all earlier ones (its ancestors and itself); w > n continues a tree
    whose first nodes an earlier call has written. Both `None` for a chain. Returns `(logits [b n v] or None,
    features [b n h] or None, cache)`; row i of the logits is the law after node i. Asking for neither writes the cache
    and returns no tensors (prefill).
    """

    def __call__(
        self,
        cache: KVCache,
        tokens: Int[Tensor, "b n"],
        depth: Int[Tensor, "b n"] | None = None,
        visible: Bool[Tensor, "b n w"] | None = None,
        *,
        logits: bool = True,
        features: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, KVCache]: ...


class Model(NamedTuple):
    """A language model as two functions and what callers must know about it.

    `init_cache(rows, capacity)` makes an empty cache. `max_length` is the context in tokens. `adapter` names the
    implementation. `early_exit(layers)`, where the model has it, is the model of the first layers with the same final
    norm and head; it runs over any cache of the full model (`cache.borrow`).
    """

    name: str
    adapter: str
    vocab_size: int
    max_length: int
    device: torch.device
    dtype: torch.dtype
    init_cache: Callable[[int, int], KVCache]
    forward: Forward
    num_layers: int = 0
    early_exit: Callable[[int], "Model"] | None = None
    about: Mapping[str, Any] = {}


def implementations(model: Model) -> dict[str, str]:
    """What computes a model: the names in `Model.about` that dispatch chose, `torch` where nothing else is said."""
    found = {name: str(model.about[name]) for name in ("stack", "weights", "linear") if name in model.about}
    return found or {"linear": "torch"}


class Drafter(NamedTuple):
    """A bundle that proposes trees.

    `init(tokens, length, capacity)` makes the drafter's state for the prompts, with room for `capacity` tokens.
    `propose(state, plan, sampling)` returns the trees, the drafter's next state and the number of draft-model forwards;
    its own state is `state.drafter`. `observe(state, info)` sees the state after the commit and returns the drafter's
    state again. `chain`: proposes chains only. `max_nodes(depth)`: the most nodes, root included, of a tree planned
    `depth` deep. `features`: wants `state.features`. `vocab_size`: that of its laws; `None` when it has none.
    `capturable`: its `propose` and `observe` work on the device alone and ask it nothing (`specdec.graphs`).
    `shares_cache`: drafts in the target's own cache, so it cannot work while the target does.
    """

    name: str
    init: Callable[[Tensor, Tensor, int], Any]
    propose: Callable[["DecodeState[Any, Any]", Plan, Sampling], tuple[Proposal, Any, int]]
    observe: Callable[["DecodeState[Any, Any]", StepInfo], Any]
    chain: bool
    max_nodes: Callable[[int], int]
    features: bool = False
    vocab_size: int | None = None
    capturable: bool = False
    shares_cache: bool = False


class Policy(NamedTuple):
    """A verification rule.

    `draw(key, round, depth, length, vocab_size)` returns the randomness for trees whose node depths are `depth [b n]`.
    `verify(proposal, target, draws, sampling)` decides. `exact`: committed tokens follow the target's law.
    `chain_only`: cannot verify trees. `greedy_only`: decodes at temperature 0 and refuses any other.
    """

    name: str
    draw: Callable[[Key, Tensor, Tensor, Tensor, int], Draws]
    verify: Callable[[Proposal, Target, Draws, Sampling], Verdict]
    exact: bool
    chain_only: bool = False
    greedy_only: bool = False


class Controller(NamedTuple):
    """How much to draft.

    `init(rows, device)` makes its state, `plan(controller_state, room)` returns a `Plan` with
    `depth <= min(max_depth, room)`, `update(controller_state, info)` learns from the round. `room [b]` is how many
    drafts a row can still use. A plan may depend on the past only: a controller never sees the token it decides about.
    """

    name: str
    init: Callable[[int, torch.device], Any]
    plan: Callable[[Any, Tensor], Plan]
    update: Callable[[Any, StepInfo], Any]
    max_depth: int


Step = Callable[[DecodeState[D, C]], tuple[DecodeState[D, C], StepInfo]]
