"""What a verdict adds to the text: which tokens are committed, whether a row has ended, and what is counted.

Shape letters as in `specdec.types`: b rows, n nodes, t tokens, v vocabulary.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec_kernels.arrays import iota

RUNNING, STOPPED_EOS, STOPPED_LENGTH, STOPPED_TEXT, FAILED = range(5)

# Where the counters of a row stand: the totals, then the histogram by depth and accepted drafts, row by row.
DRAFTED, EMITTED, TARGET_FORWARDS, DRAFT_FORWARDS, HISTOGRAM = range(5)


class Commit(NamedTuple):
    """`emitted`: committed tokens in order, padded with -1. `num_emitted`: their number. `tokens`, `length`, `finish`:
    those of the state, after them. `kept`: the nodes whose slots stay in the cache are the first `num_emitted`: the
    root and the path but for its end, since the cache ends one short of the text; `None` for a chain, where these
    come first anyway."""

    emitted: Int[Tensor, "b n"]
    num_emitted: Int[Tensor, " b"]
    tokens: Int[Tensor, "b t"]
    length: Int[Tensor, " b"]
    finish: Int[Tensor, " b"]
    kept: Int[Tensor, "b n"] | None


def commit(
    logits: Float[Tensor, "b n v"],
    nodes: Int[Tensor, "b n"],
    path: Int[Tensor, "b n"],
    num_accepted: Int[Tensor, " b"],
    next_token: Int[Tensor, " b"],
    tokens: Int[Tensor, "b t"],
    length: Int[Tensor, " b"],
    limit: Int[Tensor, " b"],
    finish: Int[Tensor, " b"],
    *,
    eos_ids: tuple[int, ...],
    argmax: bool,
    chain: bool = False,
) -> Commit:
    """Append a verdict's tokens, those of the tree's `nodes` on its `path` and the next one, to the running rows.

    The stop rule is applied after acceptance: the first EOS is kept and ends the row, nothing follows it, and the
    length never passes `limit`. A row whose next token was chosen from NaN logits commits nothing and fails. `tokens`
    must have room for n more in every row. `argmax`: next tokens are the largest logits, so that a look at these is
    enough; otherwise every logit of the path's last node counts. `chain`: the tree is one.
    """
    verified = verified_tokens(nodes, path, num_accepted, next_token)
    count, ended = _stop_rule(verified, num_accepted + 1, limit - length, eos_ids)
    running = finish == RUNNING
    broken = _is_broken(logits, path, next_token, argmax)
    count = count * (running & ~broken)
    finish = torch.where(running, ended.masked_fill(broken, FAILED), finish)
    emitted = verified.masked_fill(iota(verified.shape[1], verified.device) >= count[:, None], -1)
    text = append_tokens(tokens, length, emitted)
    kept = None if chain else torch.nn.functional.pad(path[:, :-1], (1, 0))
    return Commit(emitted, count, text, length + count, finish, kept)


def verified_tokens(
    nodes: Int[Tensor, "b n"], path: Int[Tensor, "b n"], num_accepted: Int[Tensor, " b"], next_token: Int[Tensor, " b"]
) -> Int[Tensor, "b n"]:
    """The accepted tokens followed by the next token, then -1; a path in an n-node tree never fills n places."""
    if nodes.shape[1] == 1:
        return next_token[:, None]
    accepted = torch.where(path >= 0, nodes.gather(1, path.clamp_min(0)), -1)
    return accepted.scatter(1, num_accepted[:, None], next_token[:, None])


def append_tokens(
    tokens: Int[Tensor, "b t"], length: Int[Tensor, " b"], emitted: Int[Tensor, "b n"]
) -> Int[Tensor, "b t"]:
    """`tokens` with `emitted` written behind `length` where it is not -1; the buffer must have room for all."""
    place = length[:, None] + iota(emitted.shape[1], emitted.device)
    return tokens.scatter(1, place, torch.where(emitted >= 0, emitted, tokens.gather(1, place)))


def _stop_rule(
    verified: Int[Tensor, "b n"], count: Int[Tensor, " b"], room: Int[Tensor, " b"], eos_ids: tuple[int, ...]
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """How many of the `count` verified tokens of a row are committed, and its `finish` if it was running."""
    # RUNNING is 0. Products of masks and numbers, because `where` makes a tensor of every number it is given.
    finish = (count >= room) * STOPPED_LENGTH
    count = torch.minimum(count, room)
    if eos_ids:
        is_eos = verified == eos_ids[0]
        for token in eos_ids[1:]:
            is_eos |= verified == token
        n = verified.shape[1]
        first = iota(n, verified.device).masked_fill(~is_eos, n).amin(1) if n > 1 else 1 - is_eos[:, 0].long()
        finish = finish.masked_fill(first < count, STOPPED_EOS)
        count = torch.minimum(count, first + 1)
    return count, finish


def _is_broken(
    logits: Float[Tensor, "b n v"], path: Int[Tensor, "b n"], next_token: Int[Tensor, " b"], argmax: bool
) -> Bool[Tensor, " b"]:
    """Rows whose next token was chosen from NaN logits: the largest of logits with a NaN is the NaN."""
    rows, last = iota(len(path), path.device), path.amax(-1).clamp_min(0)
    return logits[rows, last, next_token].isnan() if argmax else logits[rows, last].sum(-1).isnan()


def count_round(
    counts: Int[Tensor, "b c"],
    depth: Int[Tensor, " b"],
    accepted: Int[Tensor, " b"],
    drafted: Int[Tensor, " b"],
    emitted: Int[Tensor, " b"],
    running: Bool[Tensor, " b"],
    *,
    draft_forwards: int,
    max_depth: int,
) -> Int[Tensor, "b c"]:
    """The counters after a round of the rows that are `running`: the totals, and one more round in the histogram."""
    totals = torch.stack((drafted, emitted, running.long(), draft_forwards * running, running.long()), 1)
    place = (HISTOGRAM + depth * (max_depth + 1) + accepted)[:, None]
    index = torch.cat((iota(HISTOGRAM, counts.device).expand(len(counts), -1), place), 1)
    return counts.scatter_add(1, index, totals * running[:, None])
