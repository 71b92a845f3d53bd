"""Recording: what a policy saw in a round, reduced to the few numbers that its decisions hang on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.run import Job, Progress, stop_reason
from specdec.sampling import Sampling, residual, warp
from specdec.trace.records import DEFAULT_LIMIT, NODE, ROUND, Header, Table, Trace
from specdec.transforms import Parts
from specdec.types import DecodeState, Drafter, Draws, Plan, Policy, Proposal, Target, Verdict
from specdec_kernels.ops.verify import child_law, coins


class Choices(NamedTuple):
    """How the parts are spelled (`specdec.grammar`)."""

    drafter: str
    policy: str
    controller: str


class _Seen(NamedTuple):
    proposal: Proposal
    target: Target
    uniforms: tuple[Tensor, Tensor]
    draws: Draws
    verdict: Verdict
    sampling: Sampling


class Recorder:
    """The traces of a batch in the making. Decode `job` in place of the one it was made from, show every `Progress` to
    `observe`, and take `traces()` at the end. Holding on to what a round saw costs nothing; it is reduced in
    `observe`, outside the time that is measured.

    `limit`: rounds kept of each sample. Drafts of a model whose output cannot depend on randomness of the round are
    drafted one token deeper than planned and cut again before they are verified: the same tokens and rounds, and the
    draft's choice is known at every position (`what_if`).
    """

    def __init__(
        self,
        job: Job,
        choices: Choices,
        *,
        limit: int = DEFAULT_LIMIT,
        costs: Mapping[int, float] | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"the limit of a trace must be at least 1 round, got {limit}")
        rows = len(job.prompts)
        self._choices, self._limit, self._costs = choices, limit, costs
        self._seen: _Seen | None = None
        self._ahead: list[int] = [-1] * rows
        self._rounds: list[list[Table]] = [[] for _ in range(rows)]
        self._nodes: list[list[Table]] = [[] for _ in range(rows)]
        self._emitted: list[list[int]] = [[] for _ in range(rows)]
        self._left_out = [False] * rows
        self._shape = (True, True)
        self._before = [len(prompt) for prompt in job.prompts]
        self._last: Progress | None = None
        self.lookahead = looks_ahead(choices, job.sampling)
        model, drafter, policy, controller = job.parts
        drafter = self._look_ahead(drafter) if self.lookahead else drafter
        self.job = job._replace(parts=Parts(model, drafter, self._watch(policy), controller))

    def observe(self, progress: Progress) -> None:
        """Keep what the round of `progress` decided."""
        self._last = progress
        if progress.info is None or self._seen is None:
            return
        seen, self._seen = self._seen, None
        info, now = progress.info, progress.state.length.tolist()
        self._shape = (self._shape[0] and seen.proposal.chain, seen.proposal.replacement)
        laws: Tensor | None = None
        for row, ran in enumerate(info.running.tolist()):
            if not ran:
                continue
            count = now[row] - self._before[row]
            if len(self._rounds[row]) >= self._limit:
                self._left_out[row] = True
            elif count:
                laws = warp(seen.target.logits, seen.sampling) if laws is None else laws
                nodes, draw = _reduce(seen, laws, row, self._choices.policy.partition(":")[0])
                timing = info.timing or {}
                entry = np.zeros(1, ROUND)
                # The state is that after the round.
                entry["round"], entry["length"] = int(progress.state.round[row]) - 1, self._before[row]
                entry["depth"], entry["forwards"] = int(info.plan.depth[row]), info.draft_forwards
                entry["nodes"], entry["emitted"] = len(nodes), count
                entry["accepted"], entry["ahead"] = int(info.verdict.num_accepted[row]), self._ahead[row]
                entry["uniform"] = float(seen.uniforms[1][row])
                entry["draw"], entry["low"], entry["high"], entry["total"] = draw
                for name in ("draft", "verify", "accept", "total"):
                    entry[f"{name}_s"] = timing.get(name, 0.0)
                self._rounds[row].append(entry)
                self._nodes[row].append(nodes)
                self._emitted[row].extend(info.emitted[row, :count].tolist())
        self._before = now

    def traces(self) -> list[Trace]:
        """A trace of every sample."""
        if self._last is None:
            raise ValueError("nothing was decoded; show every progress to `observe`")
        return [self._trace(self._last, row) for row in range(len(self._rounds))]

    def _trace(self, last: Progress, row: int) -> Trace:
        job = self.job
        header = Header(
            model=job.parts.model.name,
            **self._choices._asdict(),
            sampling=dataclasses.asdict(job.sampling),
            dtype=str(job.parts.model.dtype).removeprefix("torch."),
            vocab_size=job.parts.model.vocab_size,
            seed=int(last.state.key.seed[row]),
            eos_ids=tuple(job.eos_ids),
            max_new_tokens=job.max_new_tokens,
            stop_reason=stop_reason(last, row),
            rows=len(job.prompts),
            chain=self._shape[0],
            replacement=self._shape[1],
            prefill_s=last.seconds["prefill"],
            lookahead=self.lookahead,
            complete=not self._left_out[row],
            synthetic=job.parts.model.adapter.startswith("tabular"),
            costs=None if self._costs is None else dict(self._costs),
        )
        return Trace(
            header,
            np.array(job.prompts[row], dtype=np.int32),
            _join(self._rounds[row], ROUND),
            _join(self._nodes[row], NODE),
            np.array(self._emitted[row], dtype=np.int32),
        )

    def _watch(self, policy: Policy) -> Policy:
        def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
            verdict = policy.verify(proposal, target, draws, sampling)
            self._seen = _Seen(proposal, target, _uniforms(draws, proposal), draws, verdict, sampling)
            return verdict

        return policy._replace(verify=verify)

    def _look_ahead(self, drafter: Drafter) -> Drafter:
        """`drafter`, asked for one token more than planned, of which the last is noted and cut off."""

        def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, Any, int]:
            deeper = dataclasses.replace(plan, depth=plan.depth + 1, max_depth=plan.max_depth + 1)
            found, after, forwards = drafter.propose(state, deeper, sampling)
            place = plan.depth[:, None] + 1
            self._ahead = found.tokens.gather(1, place)[:, 0].tolist()
            last = found.tokens.shape[1] - 1
            keep = torch.arange(last + 1, device=place.device) < place
            valid = found.valid & keep
            tokens = torch.where(valid, found.tokens, found.tokens[:, :1])
            probs = None if found.draft_probs is None else found.draft_probs[:, :last]
            cut = dataclasses.replace(
                found,
                tokens=tokens[:, :last],
                parents=found.parents[:, :last],
                valid=valid[:, :last],
                sampled=(found.sampled & valid)[:, :last],
                draft_probs=probs,
            )
            return cut, after, forwards

        # Its caches have room for one more: a plan never reaches the last place of a row.
        return drafter._replace(propose=propose)


def looks_ahead(choices: Choices, sampling: Sampling) -> bool:
    """Whether the drafts are a chain of a model's own choices, each a function of the text before it."""
    from specdec.registry import default_mode, parse_drafter

    drafter = parse_drafter(choices.drafter)
    if drafter.name not in ("model", "early_exit") or drafter.options.get("tree"):
        return False
    policy = choices.policy.partition(":")[0]
    mode = drafter.options.get("mode", default_mode(sampling.temperature, policy))
    return sampling.temperature == 0 or (policy == "coupled" and mode != "sample")


def _join(parts: Sequence[Table], dtype: np.dtype[Any]) -> Table:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _reduce(seen: _Seen, laws: Tensor, row: int, policy: str) -> tuple[Table, tuple[int, float, float, float]]:
    """The nodes of a row's tree, and the draw of its round: token, interval and total."""
    proposal = seen.proposal
    kept = proposal.valid[row].nonzero()[:, 0].tolist()
    place = {index: at for at, index in enumerate(kept)}
    nodes = np.zeros(len(kept), NODE)
    parents = [place.get(index, -1) for index in proposal.parents[row, kept].tolist()]
    nodes["index"], nodes["parent"] = kept, parents
    nodes["token"] = proposal.tokens[row, kept].tolist()
    nodes["sampled"] = proposal.sampled[row, kept].tolist()
    nodes["accept"] = seen.uniforms[0][row, kept].double().tolist()
    nodes["p"], nodes["q"], nodes["block"] = 1.0, 1.0, np.nan
    nodes["choice"] = nodes["rival"] = -1
    if policy in ("lossless", "block"):
        correction = _block(seen, laws[row], kept, nodes, row) if policy == "block" else None
        behind = _siblings(seen, laws[row], kept, nodes, row)
        path = seen.verdict.path[row, : int(seen.verdict.num_accepted[row])].tolist()
        last = place[path[-1]] if path else 0
        return nodes, _interval(behind[last] if correction is None else correction[last], seen.uniforms[1][row])
    _choose(seen, laws[row], kept, nodes, row, policy)
    return nodes, (-1, 0.0, 0.0, 0.0)


def _siblings(seen: _Seen, laws: Tensor, kept: list[int], nodes: Table, row: int) -> list[Tensor]:
    """Fill p, q and residual of each node, all its earlier siblings rejected; the law behind every node's children."""
    proposal = seen.proposal
    one = slice(row, row + 1)
    behind = [laws[index : index + 1] for index in kept]
    struck = [torch.zeros_like(law, dtype=torch.bool) for law in behind]
    for at, index in enumerate(kept):
        if at == 0:
            continue
        parent = int(nodes["parent"][at])
        node = torch.tensor([kept[parent]], device=laws.device)
        probs = None if proposal.draft_probs is None else proposal.draft_probs[one]
        p = behind[parent]
        q = child_law(proposal.tokens[one], proposal.sampled[one], probs, node, index, p)
        drawn = bool(proposal.sampled[row, index])
        if not proposal.replacement and drawn:
            left = q.masked_fill(struck[parent], 0)
            mass = left.sum(-1, keepdim=True)
            q = torch.where(mass > 0, left / mass.clamp_min(torch.finfo(p.dtype).tiny), q)
        token = int(nodes["token"][at])
        nodes["p"][at], nodes["q"][at] = float(p[0, token]), float(q[0, token])
        nodes["residual"][at] = float((p - q).clamp_min(0).sum(dtype=torch.float64))
        behind[parent] = residual(p, q)
        if drawn:
            struck[parent] = struck[parent].index_fill(1, torch.tensor([token], device=laws.device), True)
    return behind


def _block(seen: _Seen, laws: Tensor, kept: list[int], nodes: Table, row: int) -> list[Tensor]:
    """Fill what block verification sums at each node of a chain; its correction where the path ends there."""
    proposal, ratio, found = seen.proposal, torch.ones((), dtype=torch.float64, device=laws.device), []
    one = slice(row, row + 1)
    for at, index in enumerate(kept):
        p = laws[index : index + 1]
        if at + 1 == len(kept):
            found.append(p)
            break
        probs = None if proposal.draft_probs is None else proposal.draft_probs[one]
        node = torch.tensor([index], device=laws.device)
        q = child_law(proposal.tokens[one], proposal.sampled[one], probs, node, kept[at + 1], p)
        scaled = ratio * p
        nodes["block"][at] = float((scaled - q).clamp_min(0).sum())
        found.append(residual(scaled, q.to(scaled.dtype)).to(p.dtype))
        token = int(nodes["token"][at + 1])
        step = p[0, token].to(ratio.dtype) / q[0, token].to(ratio.dtype).clamp_min(torch.finfo(p.dtype).tiny)
        ratio = (ratio * step).clamp_max(1)
    return found


def _choose(seen: _Seen, laws: Tensor, kept: list[int], nodes: Table, row: int, policy: str) -> None:
    """Fill the target's choice after each node, and what decided it."""
    if policy == "match":
        for at, index in enumerate(kept):
            nodes["choice"][at], nodes["low"][at], nodes["high"][at], nodes["total"][at] = _interval(
                laws[index : index + 1], seen.uniforms[0][row, index]
            )
    else:
        scores, told = seen.target.logits[row, kept], seen.target.logits[row, kept]
        if policy == "coupled" and seen.sampling.temperature > 0:
            told = laws[kept].log()
            scores = told + _noise(seen.draws, row, kept, told.shape[1])
        choice = scores.argmax(-1, keepdim=True)
        rival = scores.scatter(1, choice, -torch.inf).argmax(-1, keepdim=True)
        nodes["choice"], nodes["rival"] = choice[:, 0].tolist(), rival[:, 0].tolist()
        nodes["high"] = told.gather(1, choice)[:, 0].double().tolist()
        nodes["low"] = told.gather(1, rival)[:, 0].double().tolist()
    for at in range(1, len(kept)):
        parent, token = int(nodes["parent"][at]), int(nodes["token"][at])
        nodes["p"][at] = float(laws[kept[parent], token])
        if seen.proposal.draft_probs is not None and bool(seen.proposal.sampled[row, kept[at]]):
            nodes["q"][at] = float(seen.proposal.draft_probs[row, kept[parent], token])


def _uniforms(draws: Draws, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """The uniforms that a rule was given or made, of nodes and of rows; zeros for a rule that draws none."""
    accept, token = draws.accept, draws.token
    if accept is None and draws.round is None:
        accept = torch.zeros(proposal.tokens.shape, device=proposal.tokens.device)
        token = accept[:, 0]
    return coins("the trace", accept, token, draws.seed, draws.round, proposal.tokens.shape[1])


def _noise(draws: Draws, row: int, kept: list[int], vocab_size: int) -> Tensor:
    from specdec_kernels.ops.philox import gumbel

    if draws.noise is not None:
        return draws.noise[row, kept]
    assert draws.seed is not None
    assert draws.position is not None
    return gumbel(draws.seed[row : row + 1], draws.position[row : row + 1, kept], vocab_size)[0]


def _interval(law: Tensor, uniform: Tensor) -> tuple[int, float, float, float]:
    """The token that `sampling.sample` draws from `law [1 v]`, and its interval in the cumulative law."""
    wide = law[0] if law.device.type == "mps" else law[0].double()
    cumulative = wide.cumsum(-1)
    total = cumulative[-1]
    last = int((cumulative < total).sum())
    token = min(int((cumulative <= uniform * total).sum()), last)
    low = float(cumulative[token - 1]) if token else 0.0
    return token, low, float(cumulative[token]), float(total)
