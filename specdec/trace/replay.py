"""Replaying a trace: every verdict decided again from the recorded numbers, by plain arithmetic and no model."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from specdec.divergence import NOISE_FACTOR, Divergence
from specdec.rng import Key, Purpose, philox
from specdec.trace.records import Table, Trace

UNKNOWN = -1


class Decided(NamedTuple):
    """What a round decides: `path`, places of the accepted nodes; `next_token`, `UNKNOWN` where the recorded draw does
    not fit its uniform. `margin`, `noise`: of the closest decision, and how far rounding moves it."""

    path: tuple[int, ...]
    next_token: int
    margin: float
    noise: float


class Parting(NamedTuple):
    """The first place where replay and record differ. `reason`: what does not agree there."""

    round: int
    reason: str
    where: Divergence

    def __str__(self) -> str:
        kind = "numerics" if self.where.numerics else "a bug, or a damaged trace"
        one, other = ("nothing" if token is None else token for token in (self.where.token, self.where.other))
        return (
            f"round {self.round}, new token {self.where.position}: {self.reason} (recorded {one}, replayed {other}); "
            f"{kind}: the closest decision has a margin of {self.where.margin:.3g}, rounding moves it by "
            f"{self.where.noise:.3g}"
        )


def replay(trace: Trace) -> Parting | None:
    """Decide every round again; `None` when all tokens come out the same, else the first difference.

    A difference is numerics when the closest decision of its round lies within `NOISE_FACTOR` times the rounding of the
    model's type, as in `specdec.divergence`; it is a bug otherwise.
    """
    text, first = list(map(int, trace.prompt)), len(trace.prompt)
    for index, (entry, nodes, emitted) in enumerate(rounds_of(trace)):
        here = len(text) - first
        decided = decide(trace, entry, nodes)

        def part(
            reason: str,
            at: int = here,
            token: int | None = None,
            other: int | None = None,
            now: Decided = decided,
            number: int = index,
        ) -> Parting:
            fine = token is not None and other is not None and now.margin <= NOISE_FACTOR * now.noise
            return Parting(number, reason, Divergence(at, token, other, now.margin, now.noise, fine))

        if int(entry["length"]) != len(text) or int(nodes["token"][0]) != text[-1]:
            return part("the round does not begin where the one before ended")
        if (reason := _misdrawn(trace, entry, nodes)) is not None:
            return part(reason)
        wanted = [*(int(nodes["token"][node]) for node in decided.path), decided.next_token]
        for offset, token in enumerate(emitted):
            other = wanted[offset] if offset < len(wanted) else None
            if token != other:
                return part("other tokens", here + offset, token, other)
        last = index + 1 == len(trace.rounds)
        if (len(emitted) != _committed(trace, wanted, here)) and not (last and len(emitted) < len(wanted)):
            return part("another number of tokens", here + len(emitted), None, wanted[-1])
        if len(decided.path) != int(entry["accepted"]):
            return part("another number of accepted drafts")
        text += emitted
    return None


def rounds_of(trace: Trace) -> Iterator[tuple[Any, Table, list[int]]]:
    """Each round with its nodes and its committed tokens."""
    node = token = 0
    for entry in trace.rounds:
        count, emitted = int(entry["nodes"]), int(entry["emitted"])
        yield entry, trace.nodes[node : node + count], trace.emitted[token : token + emitted].tolist()
        node, token = node + count, token + emitted


def decide(trace: Trace, entry: Any, nodes: Table) -> Decided:
    """The verdict of a round, by the rule of the trace's policy."""
    policy = trace.header.policy.partition(":")[0]
    epsilon = torch.finfo(getattr(torch, trace.header.dtype)).eps
    if policy == "lossless":
        return _lossless(entry, nodes, epsilon)
    if policy == "block":
        return _block(entry, nodes, epsilon)
    return _follow(trace, entry, nodes, policy, epsilon)


def _lossless(entry: Any, nodes: Table, epsilon: float) -> Decided:
    node, closest = 0, (math.inf, 0.0)
    path: list[int] = []
    for at in range(1, len(nodes)):
        if int(nodes["parent"][at]) != node:
            continue
        p, bar = float(nodes["p"][at]), float(nodes["accept"][at] * nodes["q"][at])
        closest = _closer(closest, abs(p - bar), epsilon * max(p, bar))
        if bar < p:
            node = at
            path.append(at)
    return _draw(entry, path, closest, epsilon)


def _block(entry: Any, nodes: Table, epsilon: float) -> Decided:
    ratio, last, closest = 1.0, 0, (math.inf, 0.0)
    tiny = torch.finfo(torch.float32).tiny
    for at in range(len(nodes)):
        mass = float(nodes["block"][at])
        end = at + 1 == len(nodes)
        rest = mass + (1 - ratio)
        share = ratio if end else mass / max(rest, tiny) if rest > 0 else 1.0
        if at:
            coin = float(nodes["accept"][at])
            closest = _closer(closest, abs(share - coin), epsilon)
            last = at if coin < share else last
        if not end:
            ratio = min(1.0, ratio * float(nodes["p"][at + 1]) / max(float(nodes["q"][at + 1]), tiny))
    return _draw(entry, list(range(1, last + 1)), closest, epsilon)


def _draw(entry: Any, path: list[int], closest: tuple[float, float], epsilon: float) -> Decided:
    low, high, total = (float(entry[name]) for name in ("low", "high", "total"))
    point = float(entry["uniform"]) * total
    inside = low <= point < high
    closest = _closer(closest, min(abs(point - low) if low else math.inf, abs(high - point)), epsilon * total)
    return Decided(tuple(path), int(entry["draw"]) if inside else UNKNOWN, *closest)


def _follow(trace: Trace, entry: Any, nodes: Table, policy: str, epsilon: float) -> Decided:
    node, closest = 0, (math.inf, 0.0)
    path: list[int] = []
    while True:
        choice, margin, noise = _choice(trace, entry, nodes, node, len(path), policy, epsilon)
        closest = _closer(closest, margin, noise)
        children = (nodes["parent"] == node) & (nodes["token"] == choice)
        children[0] = False
        if not children.any():
            return Decided(tuple(path), choice, *closest)
        node = int(children.argmax())
        path.append(node)


def _choice(
    trace: Trace, entry: Any, nodes: Table, node: int, depth: int, policy: str, epsilon: float
) -> tuple[int, float, float]:
    """The target's choice after a node, its margin and its noise."""
    line = nodes[node]
    choice, rival, low, high = int(line["choice"]), int(line["rival"]), float(line["low"]), float(line["high"])
    if policy == "match":
        point = float(line["accept"] * line["total"])
        inside = low <= point < high
        margin = min(abs(point - low) if low else math.inf, abs(high - point))
        return choice if inside else UNKNOWN, margin, epsilon
    noise = epsilon * max(1.0, abs(high))
    if policy == "coupled" and trace.header.sampling["temperature"] > 0:
        one, other = _gumbels(trace.header.seed, int(entry["length"]) + depth, (choice, rival))
        high, low = high + one, low + other
    # A tie goes to the lower id.
    won = high > low or (high == low and choice < rival)
    return choice if won else rival, abs(high - low), noise


def _gumbels(seed: int, position: int, tokens: tuple[int, int]) -> tuple[float, float]:
    """`Key.gumbels` of two tokens."""
    token = torch.tensor([tokens])
    zero = torch.zeros_like(token)
    words = torch.stack(philox((token // 4, zero, zero + position, zero + Purpose.COUPLED), torch.tensor([seed])), -1)
    unit = (words.gather(-1, token[..., None] % 4)[0, :, 0].double() + 0.5) / 2**32
    one, other = (-torch.log(-torch.log(unit))).tolist()
    return one, other


def _misdrawn(trace: Trace, entry: Any, nodes: Table) -> str | None:
    """Why the recorded uniforms are not those of the seed; `None` when they are, or none were drawn."""
    if trace.header.policy.partition(":")[0] in ("greedy", "coupled"):
        return None
    key, round = Key(torch.tensor([trace.header.seed])), torch.tensor([int(entry["round"])])
    accept, token = key.verification(round, int(nodes["index"].max()) + 1)
    index = torch.from_numpy(nodes["index"].astype("int64"))
    same = accept[0, index].tolist() == nodes["accept"].tolist() and float(token[0]) == float(entry["uniform"])
    return None if same else "a uniform is not the one that its seed draws"


def _committed(trace: Trace, tokens: list[int], before: int) -> int:
    """How many of a round's tokens end of text and limit leave."""
    ends = [at + 1 for at, token in enumerate(tokens) if token in trace.header.eos_ids]
    return min([len(tokens), trace.header.max_new_tokens - before, *ends])


def _closer(found: tuple[float, float], margin: float, noise: float) -> tuple[float, float]:
    """The decision that rounding turns more easily."""
    return (margin, noise) if margin * max(found[1], 1e-300) < found[0] * max(noise, 1e-300) else found
