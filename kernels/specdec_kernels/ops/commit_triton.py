"""`commit` and `count_round` in Triton: a launch for what are twenty small ones in torch, each as long as a launch
takes."""

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
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

# Tokens of a row that one program copies.
_BLOCK = 1024
_RUNNING, _EOS, _LENGTH, _FAILED = map(tl.constexpr, (RUNNING, STOPPED_EOS, STOPPED_LENGTH, FAILED))
_DRAFTED, _EMITTED, _TARGETS, _DRAFTS, _HISTOGRAM = map(
    tl.constexpr, (DRAFTED, EMITTED, TARGET_FORWARDS, DRAFT_FORWARDS, HISTOGRAM)
)


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
    """See `commit.commit`."""
    rows, n = nodes.shape
    path, device = path.contiguous(), tokens.device
    broken = path
    if not argmax:
        broken = logits[iota(rows, device), path.amax(-1).clamp_min(0)].sum(-1).isnan()
    emitted, kept = torch.empty((2, rows, n), dtype=torch.int64, device=device).unbind()
    after = torch.empty((3, rows), dtype=torch.int64, device=device)
    text = torch.empty(tokens.shape, dtype=torch.int64, device=device)
    _commit[(rows, triton.cdiv(tokens.shape[1], _BLOCK))](
        logits, *logits.stride(), nodes, *nodes.stride(), path, broken, tokens, *tokens.stride(),
        *(value.contiguous() for value in (num_accepted, next_token, length, limit, finish)),
        _ids(eos_ids, device), len(eos_ids), emitted, kept, after, text, rows, n, tokens.shape[1],
        ARGMAX=argmax, NODES=triton.next_power_of_2(n), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    count, total, ended = after.unbind()
    return Commit(emitted, count, text, total, ended, None if chain else kept)


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
    """See `commit.count_round`."""
    rows, cells = counts.shape
    counts, after = counts.contiguous(), torch.empty((rows, cells), dtype=torch.int64, device=counts.device)
    _count[(rows,)](
        counts, *(value.contiguous() for value in (depth, accepted, drafted, emitted, running)), after,
        cells, draft_forwards, max_depth + 1, CELLS=triton.next_power_of_2(cells), num_warps=4,
    )  # fmt: skip
    return after


@cache
def _ids(ids: tuple[int, ...], device: torch.device) -> Int[Tensor, " e"]:
    # Made once, outside any capture: a graph goes on reading it.
    with torch.inference_mode(False):
        return torch.tensor(ids or (0,), device=device)


@triton.jit(do_not_specialize=("eos_count", "rows", "n", "capacity"))
@no_type_check
def _commit(
    logits, logits_b, logits_n, logits_v, nodes, nodes_b, nodes_n, path, broken, tokens, tokens_b, tokens_t,
    num_accepted, next_token, length, limit, finish, eos, eos_count, emitted, kept, after, text, rows, n, capacity,
    ARGMAX: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, NODES)
    exists = node < n
    accepted = tl.load(num_accepted + row)
    following = tl.load(next_token + row)
    taken = tl.load(path + row * n + node, mask=exists, other=-1)
    token = tl.load(nodes + row * nodes_b + taken * nodes_n, mask=exists & (taken >= 0), other=-1).to(tl.int64)
    token = tl.where(node == accepted, following, token)

    begin = tl.load(length + row)
    room = tl.load(limit + row) - begin
    state = tl.load(finish + row)
    count = accepted + 1
    ended = tl.where(count >= room, _LENGTH, _RUNNING)
    count = tl.minimum(count, room)
    if eos_count > 0:
        ends = node < 0
        for place in range(eos_count):
            ends = ends | (token == tl.load(eos + place))
        first = tl.min(tl.where(ends & exists, node, n), 0)
        ended = tl.where(first < count, _EOS, ended)
        count = tl.minimum(count, first + 1)
    if ARGMAX:
        last = tl.maximum(tl.max(taken, 0), 0)
        value = tl.load(logits + row * logits_b + last * logits_n + following * logits_v)
        failed = value != value
    else:
        failed = tl.load(broken + row) != 0
    count = tl.where((state == _RUNNING) & (failed == 0), count, 0)

    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < capacity
    index = place - begin
    new = inside & (index >= 0) & (index < count)
    walked = new & (index != accepted)
    chosen = tl.load(path + row * n + index, mask=walked, other=0)
    fresh = tl.load(nodes + row * nodes_b + chosen * nodes_n, mask=walked, other=0).to(tl.int64)
    fresh = tl.where(index == accepted, following, fresh)
    old = tl.load(tokens + row * tokens_b + place * tokens_t, mask=inside & (new == 0), other=0)
    tl.store(text + row * capacity + place, tl.where(new, fresh, old), mask=inside)

    if tl.program_id(1) == 0:
        tl.store(emitted + row * n + node, tl.where(node < count, token, -1), mask=exists)
        before = tl.load(path + row * n + node - 1, mask=exists & (node > 0), other=0)
        tl.store(kept + row * n + node, before, mask=exists)
        tl.store(after + row, count)
        tl.store(after + rows + row, begin + count)
        ended = tl.where(failed, _FAILED, ended)
        tl.store(after + 2 * rows + row, tl.where(state == _RUNNING, ended, state))


@triton.jit(do_not_specialize=("draft_forwards",))
@no_type_check
def _count(
    counts, depth, accepted, drafted, emitted, running, after, cells, draft_forwards, side, CELLS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, CELLS)
    once = (tl.load(running + row) != 0).to(tl.int64)
    met = _HISTOGRAM + tl.load(depth + row) * side + tl.load(accepted + row)
    more = (cell == met).to(tl.int64)
    more += tl.where(cell == _DRAFTED, tl.load(drafted + row), 0)
    more += tl.where(cell == _EMITTED, tl.load(emitted + row), 0)
    more += tl.where(cell == _TARGETS, 1, 0)
    more += tl.where(cell == _DRAFTS, draft_forwards, 0)
    known = tl.load(counts + row * cells + cell, mask=cell < cells, other=0)
    tl.store(after + row * cells + cell, known + more * once, mask=cell < cells)
