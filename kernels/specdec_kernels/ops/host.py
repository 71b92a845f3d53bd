"""The small operations of a round on the CPU, in Python and numpy, row by row.

A forward reads all weights of a model and leaves nothing of what ran before it in the CPU's caches. A torch operation
then takes some ten microseconds whatever it computes, a hundred of them a millisecond, and a reduction over the
vocabulary that wakes torch's threads several. The few numbers of a round are cheaper as plain Python.
"""

from collections.abc import Sequence
from math import isnan

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec_kernels.arrays import iota
from specdec_kernels.ops.commit import (
    DRAFT_FORWARDS,
    DRAFTED,
    EMITTED,
    FAILED,
    HISTOGRAM,
    RUNNING,
    STOPPED_EOS,
    STOPPED_LENGTH,
    TARGET_FORWARDS,
    Commit,
)
from specdec_kernels.ops.walk import TreeShape, Verification

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_greedy(
    logits: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b n"],
    parents: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    *,
    chain: bool = False,
) -> Verification:
    """`verify.verify_greedy`, walking from node to node."""
    choices = logits.numpy().argmax(-1).tolist()
    paths, following, judged = [], [], []
    columns = zip(choices, tokens.tolist(), parents.tolist(), valid.tolist(), strict=True)
    for choice, drafted, above, exists in columns:
        path = [0]
        # Children stand behind their parents, so one pass meets the first that agrees at every node of the path.
        for child in range(1, len(choice)):
            if above[child] == path[-1] and exists[child] and drafted[child] == choice[path[-1]]:
                path.append(child)
        following.append(choice[path[-1]])
        paths.append(path[1:])
        judged.append([float(node > 0 and node in path) for node in range(len(choice))])
    padded = [path + [-1] * (logits.shape[1] - len(path)) for path in paths]
    count = torch.tensor([len(path) for path in paths])
    return Verification(torch.tensor(padded), count, torch.tensor(following), torch.tensor(judged))


def tree_shape(parents: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"], *, chain: bool = False) -> TreeShape:
    """`walk.tree_shape`, node by node."""
    rows, n = parents.shape
    exists = valid.tolist()
    drafted = torch.tensor([sum(row) - 1 for row in exists])
    if chain:
        return TreeShape(None, iota(n, parents.device).expand(rows, n), drafted, drafted)
    visible = np.zeros((rows, n, n), bool)
    visible[:] = np.eye(n, dtype=bool)
    depth = np.zeros((rows, n), np.int64)
    for seen, levels, above in zip(visible, depth, parents.tolist(), strict=True):
        for node in range(1, n):
            seen[node] |= seen[above[node]]
            levels[node] = levels[above[node]] + 1
    deepest = (depth * valid.numpy()).max(-1)
    return TreeShape(torch.from_numpy(visible), torch.from_numpy(depth), drafted, torch.from_numpy(deepest))


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
    """`commit.commit`, token by token."""
    scores, text = logits.numpy(), tokens.clone()
    written = text.numpy()
    emitted: list[list[int]] = []
    after: list[tuple[int, int, int]] = []
    arguments = (nodes, path, num_accepted, next_token, length, limit, finish)
    for row, values in enumerate(zip(*(argument.tolist() for argument in arguments), strict=True)):
        drafted, walked, accepted, following, begin, end, ended = values
        fresh: list[int] = []
        if ended == RUNNING:
            last = walked[accepted - 1] if accepted else 0
            if isnan(scores[row, last, following] if argmax else scores[row, last].sum()):
                ended = FAILED
            else:
                verified = [*(drafted[node] for node in walked[:accepted]), following]
                fresh, ended = _stop(verified, end - begin, eos_ids)
                written[row, begin : begin + len(fresh)] = fresh
        emitted.append(fresh + [-1] * (len(drafted) - len(fresh)))
        after.append((len(fresh), begin + len(fresh), ended))
    count, total, state = (torch.tensor(column) for column in zip(*after, strict=True))
    kept = None if chain else torch.tensor([[0, *row[:-1]] for row in path.tolist()])
    return Commit(torch.tensor(emitted), count, text, total, state, kept)


def _stop(verified: list[int], room: int, eos_ids: tuple[int, ...]) -> tuple[list[int], int]:
    """The tokens that are committed, and the row's `finish` after them."""
    for place, token in enumerate(verified[:room]):
        if token in eos_ids:
            return verified[: place + 1], STOPPED_EOS
    return verified[:room], STOPPED_LENGTH if len(verified) >= room else RUNNING


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
    """`commit.count_round`, counter by counter."""
    after = counts.clone()
    columns = (argument.tolist() for argument in (running, depth, accepted, drafted, emitted))
    for totals, (ran, deep, passed, nodes, fresh) in zip(after.numpy(), zip(*columns, strict=True), strict=True):
        if ran:
            totals[DRAFTED] += nodes
            totals[EMITTED] += fresh
            totals[TARGET_FORWARDS] += 1
            totals[DRAFT_FORWARDS] += draft_forwards
            totals[HISTOGRAM + deep * (max_depth + 1) + passed] += 1
    return after


def keep(
    buffers: Sequence[Tensor], base: Int[Tensor, " b"], nodes: Int[Tensor, "b m"], count: Int[Tensor, " b"]
) -> None:
    """`keep.keep`, slot by slot, and only those that move."""
    # Bits are moved, whatever they mean: numpy knows no bfloat16.
    views = [buffer.view(_BITS[buffer.element_size()]).numpy() for buffer in buffers]
    columns = zip(base.tolist(), nodes.tolist(), count.tolist(), strict=True)
    for row, (first, path, kept) in enumerate(columns):
        for target, source in enumerate(path[:kept]):
            # A path ascends, so nothing is written that is still to be read.
            if source != target:
                for slots in views:
                    slots[:, row, first + target] = slots[:, row, first + source]


def best_depth(
    counts: Float[Tensor, "b 2 k"], seconds: Float[Tensor, " k"], room: Int[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """`depth.best_depth`, depth by depth."""
    times, found = seconds.tolist(), []
    for (accepted, tried), limit in zip(counts.tolist(), room.tolist(), strict=True):
        chance, tokens, speed, best = 1.0, 0.0, 0.0, 0
        for depth, time in enumerate(times):
            chance *= accepted[depth] / tried[depth]
            tokens += chance
            if tokens / time > speed:
                speed, best = tokens / time, depth
        found.append((min(best, limit), speed))
    depths, speeds = zip(*found, strict=True)
    return torch.tensor(depths), torch.tensor(speeds, dtype=counts.dtype)


def learn_depth(
    counts: Float[Tensor, "b 2 k"],
    prior: Float[Tensor, "2 k"],
    deepest: Int[Tensor, " b"],
    num_accepted: Int[Tensor, " b"],
    *,
    discount: float,
) -> Float[Tensor, "b 2 k"]:
    """`depth.learn_depth`, depth by depth."""
    start, after = prior.tolist(), counts.tolist()
    for row, (drew, passed) in enumerate(zip(deepest.tolist(), num_accepted.tolist(), strict=True)):
        for kind, last in enumerate((passed, min(passed + 1, drew))):
            after[row][kind] = [
                before + discount * (count - before) + (depth <= last and drew > 0)
                for depth, (before, count) in enumerate(zip(start[kind], after[row][kind], strict=True))
            ]
    return torch.tensor(after, dtype=counts.dtype)
