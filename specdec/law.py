"""The judge: the exact law of what a step writes, found by enumeration and not by sampling.

A round is a deterministic function of its uniforms: piecewise constant, with finitely many pieces. The judge feeds
uniforms of its own (`ScriptedKey`), finds every break point by sectioning, and adds up the volumes of the pieces. It
looks at nothing but what the step returns, so it judges any drafter, policy and controller, a mistaken one included.

A break point is missed only if the outcome is the same on a grid of `GRID` points around it and for all probed values
of the later uniforms; for steps whose decisions are monotone in each uniform nothing can be missed.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec.records import map_rows, record, select_rows
from specdec.rng import Key, Purpose
from specdec.sampling import Sampling, penalize, seen_tokens, warp
from specdec.state import output_tokens
from specdec.types import DecodeState, Model, Step

Law = dict[tuple[int, ...], float]

# Break points are found to 2^-44: far below the 1e-9 to which laws are compared.
_EDGE = 2.0**-44
GRID = 7
_ROWS_AT_ONCE = 40_000


@record
class ScriptedKey(Key):
    """A key that answers with given uniforms: `script [b r m]`, for each round the n draft uniforms, the n acceptance
    uniforms and the token's, m = 2 n + 1. `first`: the round that `script[:, 0]` belongs to."""

    script: Float[Tensor, "b r m"]
    first: Int[Tensor, " b"]

    def _round(self, round: Tensor) -> Tensor:
        rows = torch.arange(len(round), device=round.device)
        return self.script[rows, (round - self.first).clamp(0, self.script.shape[1] - 1)]

    def uniforms(self, round: Int[Tensor, " b"], purpose: Purpose, n: int) -> Float[Tensor, "b n"]:
        if purpose is not Purpose.DRAFT:
            raise ValueError(f"the judge scripts draft and verification uniforms, {purpose!r} was asked for")
        return self._round(round)[:, :n]

    def verification(self, round: Int[Tensor, " b"], n: int) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        half = self.script.shape[2] // 2
        here = self._round(round)
        return here[:, half : half + n], here[:, -1]

    def gumbels(self, position: Int[Tensor, "b n"], vocab_size: int) -> Float[Tensor, "b n v"]:
        raise ValueError("Gumbel noise has no finite enumeration; compare coupled decoding token by token instead")


def output_law(step: Step[Any, Any], state: DecodeState[Any, Any], *, nodes: int, memoryless: bool = True) -> Law:
    """The law of the tokens that iterating `step` from `state` (one row) writes until the row is done.

    `nodes`: the most nodes of a round's tree. With `memoryless`, rounds are enumerated one after the other and states
    with equal tokens and equal drafter and controller states are merged, which supposes that rounds use independent
    randomness. Without it all rounds are enumerated at once: slower, and it finds randomness that is used twice.
    """
    if state.tokens.shape[0] != 1:
        raise ValueError(f"the judge takes a state of one row, got {state.tokens.shape[0]}")
    width = 2 * nodes + 1
    if not memoryless:
        return _law_of_all_rounds(step, state, width)
    law: Law = defaultdict(float)
    frontier, mass = state, torch.ones(1, dtype=torch.float64)
    while True:
        done = frontier.done
        for tokens, weight in zip(
            output_tokens(select_rows(frontier, done.nonzero()[:, 0])), mass[done].tolist(), strict=True
        ):
            law[tuple(tokens)] += weight
        running = (~done).nonzero()[:, 0]
        if not len(running):
            return dict(law)
        frontier, mass = select_rows(frontier, running), mass[running]
        frontier, mass = _merge(*_one_round(step, frontier, mass, width))


def target_law(
    model: Model,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int] = (),
) -> Law:
    """The law of plain decoding, by definition: the product of the model's warped laws along every sequence.

    Shares nothing with the step: every context is prefilled into a fresh cache.
    """
    law: Law = {}
    open_texts: Law = {(): 1.0}
    for _ in range(max_new_tokens):
        texts = list(open_texts)
        if not texts:
            break
        laws = _next_laws(model, [[*prompt, *text] for text in texts], sampling)
        following: Law = {}
        for text, row in zip(texts, laws.tolist(), strict=True):
            for token, probability in enumerate(row):
                if probability > 0:
                    home = law if token in eos_ids else following
                    home[(*text, token)] = open_texts[text] * probability
        open_texts = following
    return law | open_texts


def total_variation(first: Law, second: Law) -> float:
    """Half the L1 distance of two laws."""
    return sum(abs(first.get(key, 0.0) - second.get(key, 0.0)) for key in first.keys() | second.keys()) / 2


def _next_laws(model: Model, texts: list[list[int]], sampling: Sampling) -> Tensor:
    """The law of the next token of texts of one length."""
    tokens = torch.tensor(texts, device=model.device)
    logits, _, _ = model.forward(model.init_cache(len(texts), tokens.shape[1]), tokens)
    assert logits is not None
    last = logits[:, -1]
    if sampling.repetition_penalty != 1:
        length = torch.full((len(texts),), tokens.shape[1], device=model.device)
        last = penalize(last, seen_tokens(tokens, length, model.vocab_size), sampling)
    return warp(last, sampling)


def _one_round(
    step: Step[Any, Any], states: DecodeState[Any, Any], mass: Tensor, width: int
) -> tuple[DecodeState[Any, Any], Tensor]:
    """The states after one more round, one row for each piece of each state's uniforms, and their masses."""

    def outcome(origin: Tensor, uniforms: Tensor) -> Tensor:
        _, info = step(_scripted(states, origin, uniforms[:, None, :]))
        return _signature(info)

    origin, uniforms, volume = pieces(outcome, rows=len(mass), width=width)
    after, _ = step(_scripted(states, origin, uniforms[:, None, :]))
    return after, mass[origin] * volume


def _law_of_all_rounds(step: Step[Any, Any], state: DecodeState[Any, Any], width: int) -> Law:
    rounds = int((state.limit - state.length).max())

    def run(uniforms: Tensor) -> tuple[DecodeState[Any, Any], Tensor]:
        origin = torch.zeros(len(uniforms), dtype=torch.int64)
        current = _scripted(state, origin, uniforms.view(len(uniforms), rounds, width))
        seen = []
        for _ in range(rounds):
            current, info = step(current)
            # Proposals of different widths must give signatures of one width.
            seen.append(_signature(info, pad_to=width))
        return current, torch.cat(seen, dim=1)

    _, uniforms, volume = pieces(lambda origin, values: run(values)[1], rows=1, width=rounds * width)
    law: Law = defaultdict(float)
    for tokens, weight in zip(output_tokens(run(uniforms)[0]), volume.tolist(), strict=True):
        law[tuple(tokens)] += weight
    return dict(law)


def _scripted(states: DecodeState[Any, Any], origin: Tensor, script: Tensor) -> DecodeState[Any, Any]:
    rows = select_rows(dataclasses.replace(states, key=Key(states.key.seed)), origin)
    return dataclasses.replace(rows, key=ScriptedKey(rows.key.seed, script, rows.round))


def _signature(info: Any, pad_to: int = 0) -> Tensor:
    """Everything a round decided, one row of integers each: proposal, path and emitted tokens."""
    proposal, verdict = info.proposal, info.verdict
    drafted = torch.where(proposal.valid, proposal.tokens, -1)
    # Of rows that are done nothing counts.
    parts = [drafted, verdict.path, verdict.next_token[:, None], info.emitted]
    joined = torch.cat([torch.where(info.running[:, None], part, -1) for part in parts], dim=1)
    return torch.nn.functional.pad(joined, (0, max(0, 4 * pad_to - joined.shape[1])), value=-1)


def _merge(states: DecodeState[Any, Any], mass: Tensor) -> tuple[DecodeState[Any, Any], Tensor]:
    """One row for all rows that continue alike."""
    columns: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        columns.append(tensor.reshape(len(mass), -1).double())
        return tensor

    live = torch.arange(states.tokens.shape[1]) < states.length[:, None]
    collect(torch.where(live, states.tokens, -1))
    collect(states.finish)
    map_rows(collect, (states.controller, states.drafter if not _holds_cache(states.drafter) else ()))
    table = torch.cat(columns, dim=1).nan_to_num(-7)
    _, group = torch.unique(table, dim=0, return_inverse=True)
    count = int(group.max()) + 1
    total = torch.zeros(count, dtype=torch.float64).scatter_add(0, group, mass)
    first = torch.full((count,), len(mass)).scatter_reduce(0, group, torch.arange(len(mass)), "amin")
    return select_rows(states, first), total


def _holds_cache(drafter: Any) -> bool:
    # A draft model's cache is a function of the committed tokens, except for scratch that nobody reads.
    found = False

    def look(value: Any) -> None:
        nonlocal found
        found = found or hasattr(value, "store")
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                look(getattr(value, field.name))

    look(drafter)
    return found


def pieces(
    outcome: Callable[[Tensor, Tensor], Tensor], *, rows: int, width: int
) -> tuple[Int[Tensor, " c"], Float[Tensor, "c m"], Float[Tensor, " c"]]:
    """The pieces on which `outcome(origin [r], uniforms [r m]) -> [r s]` is constant, coordinate after coordinate.

    Returns for each piece of each of `rows` origins: the origin, a point inside, and the volume.
    """
    origin, low, high = boxes(outcome, rows=rows, width=width)
    return origin, (low + high) / 2, (high - low).prod(1)


def boxes(
    outcome: Callable[[Tensor, Tensor], Tensor], *, rows: int, width: int
) -> tuple[Int[Tensor, " c"], Float[Tensor, "c m"], Float[Tensor, "c m"]]:
    """The same pieces by their least and largest coordinates."""
    origin = torch.arange(rows)
    low = torch.zeros((rows, width), dtype=torch.float64)
    high = torch.ones_like(low)
    for axis in range(width):
        cell, below, above = _split(outcome, origin, (low + high) / 2, axis)
        origin, low, high = origin[cell], low[cell], high[cell]
        low[:, axis], high[:, axis] = below, above
    return origin, low, high


def _split(
    outcome: Callable[[Tensor, Tensor], Tensor], origin: Tensor, point: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut every cell along `axis` where the outcome changes: (cell, low, high) of the parts, in order."""
    probes = _probes(point.shape[1] - axis - 1)

    def signature(cell: Tensor, value: Tensor) -> Tensor:
        """An integer for each (cell, value) that tells outcomes over all probes apart."""
        codes = []
        step = max(1, _ROWS_AT_ONCE // len(probes))
        for begin in range(0, len(cell), step):
            part, at = cell[begin : begin + step], value[begin : begin + step]
            full = point[part][:, None, :].expand(-1, len(probes), -1).clone()
            full[:, :, axis] = at[:, None]
            full[:, :, axis + 1 :] = probes
            result = outcome(origin[part][:, None].expand(-1, len(probes)).flatten(), full.flatten(0, 1))
            codes.append(_fingerprint(result).view(len(part), len(probes)))
        joined = torch.cat(codes)
        return _fingerprint(joined)

    cells = len(origin)
    grid = torch.linspace(0, 1, GRID + 2, dtype=torch.float64).clamp(_EDGE, 1 - _EDGE)
    cell = torch.arange(cells).repeat_interleave(len(grid))
    seen = signature(cell, grid.repeat(cells)).view(cells, len(grid))
    changed = (seen[:, 1:] != seen[:, :-1]).nonzero()
    cell, low, high = changed[:, 0], grid[changed[:, 1]], grid[changed[:, 1] + 1]
    code_low, code_high = seen[changed[:, 0], changed[:, 1]], seen[changed[:, 0], changed[:, 1] + 1]
    while len(cell) and float((high - low).max()) > _EDGE:
        sections = 15 if len(cell) * len(probes) < _ROWS_AT_ONCE // 16 else 3
        share = torch.arange(1, sections + 1, dtype=torch.float64) / (sections + 1)
        inner = low[:, None] + (high - low)[:, None] * share
        codes = signature(cell.repeat_interleave(sections), inner.flatten()).view(len(cell), sections)
        codes = torch.cat([code_low[:, None], codes, code_high[:, None]], dim=1)
        edges = torch.cat([low[:, None], inner, high[:, None]], dim=1)
        change = (codes[:, 1:] != codes[:, :-1]).nonzero()
        row, place = change[:, 0], change[:, 1]
        cell, low, high = cell[row], edges[row, place], edges[row, place + 1]
        code_low, code_high = codes[row, place], codes[row, place + 1]
    cut = (low + high) / 2
    all_cells = torch.cat([torch.arange(cells), cell])
    starts = torch.cat([torch.zeros(cells, dtype=torch.float64), cut])
    order = torch.argsort(all_cells.double() * 2 + starts)
    all_cells, starts = all_cells[order], starts[order]
    ends = torch.cat([starts[1:], torch.ones(1, dtype=torch.float64)])
    is_last = torch.cat([all_cells[1:] != all_cells[:-1], torch.ones(1, dtype=torch.bool)])
    return all_cells, starts, torch.where(is_last, 1.0, ends)


def _probes(later: int) -> Tensor:
    """Values of the later uniforms at which a change must show: all corners if few, else a fixed choice of points."""
    low, high = _EDGE, 1 - _EDGE
    if later <= 3:
        corners = torch.cartesian_prod(*[torch.tensor([low, high], dtype=torch.float64)] * later) if later else None
        return torch.zeros(1, 0, dtype=torch.float64) if corners is None else corners.view(-1, later)
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(2, later, dtype=torch.float64, generator=generator)
    ends = torch.tensor([[low], [high]], dtype=torch.float64).expand(2, later)
    return torch.cat([ends, inside])


def _fingerprint(values: Tensor) -> Tensor:
    """A 63-bit hash of each row of integers."""
    code = torch.full((values.shape[0],), 1469598103934665603, dtype=torch.int64)
    for column in values.unbind(1):
        # FNV-1a with a finalizing shift; int64 arithmetic wraps.
        code = (code ^ (column + 1)) * 1099511628211
        code = code ^ ((code >> 29) & 0x7FFFFFFFF)
    return code
