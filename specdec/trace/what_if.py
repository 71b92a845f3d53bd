"""What another controller, depth, drafter or policy would have done with a traced sample, without its model.

Greedy and coupled decoding write one text whatever is drafted. A drafter that only reads text can then be run again
on the recorded one, and a model's chain of own choices is known at every place the trace looked: rounds are simulated,
and are those that decoding would take. Everything else is an estimate and says so.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from specdec import tree
from specdec.cache import KVCache, SlotStore
from specdec.grammar import Choice
from specdec.metrics import zero
from specdec.registry import build_controller, parse_controller, parse_drafter, parse_policy
from specdec.rng import seeded
from specdec.sampling import Sampling
from specdec.trace.records import Table, Trace
from specdec.trace.replay import rounds_of
from specdec.types import Controller, DecodeState, Drafter, Plan, Proposal, StepInfo, Verdict
from specdec_kernels.ops.commit import verified_tokens

TEXT_ONLY = {"none", "ngram", "suffix"}
# Replicas of the simulated sample; their 2.5 and 97.5 percentiles are the interval.
REPLICAS, _SEED = 400, 0


class Estimate(NamedTuple):
    """A figure with its 95 % interval; where it is exact, all three are the same."""

    value: float
    low: float
    high: float


class Outcome(NamedTuple):
    """What would have been. `kind`: `exact`, or `estimate` with the `reason`. `emitted`, `depths`, `accepted`: by round
    where exact (`accepted` counts committed drafts). `tokens_per_s`: a prediction in any case."""

    kind: Literal["exact", "estimate"]
    reason: str
    drafter: str
    policy: str
    controller: str
    tokens: int
    emitted: tuple[int, ...] | None
    depths: tuple[int, ...] | None
    accepted: tuple[int, ...] | None
    rounds: Estimate
    mean_accepted_length: Estimate
    tokens_per_s: Estimate | None
    recorded_rounds: int
    recorded_tokens_per_s: float | None


def what_if(
    trace: Trace,
    *,
    drafter: str | None = None,
    policy: str | None = None,
    controller: str | None = None,
    k: int | None = None,
    costs: Mapping[int, float] | None = None,
) -> Outcome:
    """The sample of `trace` with other parts; what is not named stays as it was, `k` alone is a fixed depth.

    Raises `ValueError` for what the trace cannot tell, with the reason.
    """
    header = trace.header
    if not len(trace.rounds):
        raise ValueError("the trace holds no round; record one with at least one new token")
    drafting, verifying = parse_drafter(drafter or header.drafter), parse_policy(policy or header.policy)
    given = None if controller is None and k is not None else parse_controller(controller or header.controller)
    chosen = _with_depth(given, k)
    if chosen.name == "expected" and "draft_cost" not in chosen.options and not set(drafting.names()) <= TEXT_ONLY:
        raise ValueError("controller 'expected' needs the seconds of a drafted token; give expected:draft_cost=SECONDS")
    build = _controller(chosen, costs or header.costs, header.model)
    before = parse_policy(header.policy).name
    if (reason := _why_not_exact(trace, drafting, verifying.name)) is None:
        played = _play(trace, drafting, build)
        kind: Literal["exact", "estimate"] = "exact"
    else:
        if str(drafting) != str(parse_drafter(header.drafter)):
            raise ValueError(f"another drafter cannot be told from this trace: {reason}; record it with {drafting}")
        if not header.chain:
            raise ValueError(f"trees cannot be estimated: {reason}; record the trace with a drafter of chains")
        played, kind = None, "estimate"
    seconds = _fit(trace)
    if played is not None:
        depths, emitted, accepted = played
        rounds = float(len(depths))
        spent = None if seconds is None else header.prefill_s + sum(seconds[0] + seconds[1] * depth for depth in depths)
        tokens = sum(emitted)
        count, length = Estimate(rounds, rounds, rounds), Estimate(*[tokens / rounds] * 3)
        speed = None if not spent else Estimate(*[tokens / spent] * 3)
    else:
        if verifying.name not in ("lossless", "block", "match", before):
            raise ValueError(
                f"{verifying.name} chooses otherwise than what was recorded with {before}; record a trace with it"
            )
        depths, emitted, accepted = [], [], []
        count, length, speed = _estimate(trace, verifying.name, build, seconds)
    total = float(trace.rounds["total_s"].sum()) + header.prefill_s
    return Outcome(
        kind=kind,
        reason=reason or "the output does not depend on what is drafted, and the drafts are known everywhere",
        drafter=str(drafting),
        policy=str(verifying),
        controller=build.name,
        tokens=len(trace.emitted),
        emitted=tuple(emitted) or None,
        depths=tuple(depths) or None,
        accepted=tuple(accepted) or None,
        rounds=count,
        mean_accepted_length=length,
        tokens_per_s=speed,
        recorded_rounds=len(trace.rounds),
        recorded_tokens_per_s=len(trace.emitted) / total if seconds is not None else None,
    )


def _with_depth(given: Choice | None, k: int | None) -> Choice:
    if k == 0:
        return Choice("fixed", {"k": 0})
    if given is None:
        return Choice("fixed", {"k": k})
    if k is None:
        return given
    return Choice(given.name, {**given.options, "max_k" if given.name == "expected" else "k": k})


def _controller(choice: Choice, costs: Mapping[int, float] | None, model: str) -> Controller:
    def known(_: Any) -> Mapping[int, float]:
        if costs is None:
            raise ValueError(f"controller 'expected' needs what forwards of {model} cost; give a cost curve (--costs)")
        return costs

    # Nothing of the model is looked at but its costs.
    nothing: Any = None
    return build_controller(choice, target=nothing, drafts=(), costs=known)


def _why_not_exact(trace: Trace, drafting: Choice, policy: str) -> str | None:
    """Why rounds cannot be simulated exactly, or `None`."""
    header = trace.header
    greedy = header.sampling["temperature"] == 0
    coupled = policy == parse_policy(header.policy).name == "coupled"
    if not greedy and not coupled:
        return "above temperature 0 only coupled decoding writes the same text whatever is drafted"
    if not header.complete:
        return "the trace was cut at its limit of rounds"
    if set(drafting.names()) <= TEXT_ONLY:
        return None
    if header.lookahead and str(drafting) == str(parse_drafter(header.drafter)):
        return None
    return f"the drafts of {drafting} are not known at every place of the text"


def _play(trace: Trace, drafting: Choice, controller: Controller) -> tuple[list[int], list[int], list[int]]:
    """Depths, committed tokens and committed drafts of the rounds that lead to the recorded text."""
    text, prompt = trace.text, len(trace.prompt)
    limit = prompt + trace.header.max_new_tokens
    propose = _known(trace) if trace.header.lookahead and drafting.name not in TEXT_ONLY else _rerun(trace, drafting)
    state, length = controller.init(1, torch.device("cpu")), prompt
    depths: list[int] = []
    emitted: list[int] = []
    accepted: list[int] = []
    tokens = torch.zeros(1, limit + 1 + controller.max_depth, dtype=torch.int64)
    tokens[0, : len(text)] = torch.tensor(text)
    while length < len(text):
        plan = controller.plan(state, torch.tensor([limit - length - 1]))
        proposal = propose(tokens, length, plan)
        verdict = _follow_text(proposal, text, length)
        path = int(verdict.num_accepted[0])
        count = min(path + 1, len(text) - length)
        depths.append(int(proposal.shape.deepest[0]))
        emitted.append(count)
        accepted.append(min(path, count))
        info = StepInfo(
            plan,
            proposal,
            verdict,
            _verified(proposal, verdict),
            torch.tensor([count]),
            torch.tensor([True]),
        )
        state, length = controller.update(state, info), length + count
    return depths, emitted, accepted


def _verified(proposal: Proposal, verdict: Verdict) -> torch.Tensor:
    return verified_tokens(proposal.tokens, verdict.path, verdict.num_accepted, verdict.next_token)


def _follow_text(proposal: Proposal, text: list[int], length: int) -> Verdict:
    """The verdict of a target that writes `text`; what it would say behind the text's end, nobody knows."""
    n = proposal.tokens.shape[1]
    node, nodes, path = 0, proposal.tokens[0].tolist(), []
    parents, valid = proposal.parents[0].tolist(), proposal.valid[0].tolist()
    for token in text[length:]:
        following = [i for i in range(1, n) if valid[i] and parents[i] == node and nodes[i] == token]
        if not following:
            break
        node = following[0]
        path.append(node)
    after = length + len(path)
    accept = torch.zeros(1, n)
    accept[0, path] = 1.0
    return Verdict(
        torch.tensor([path + [-1] * (n - len(path))]),
        torch.tensor([len(path)]),
        torch.tensor([text[after] if after < len(text) else text[-1]]),
        accept,
    )


def _rerun(trace: Trace, drafting: Choice) -> Any:
    """The proposals of a drafter that reads nothing but the committed text."""
    from specdec.drafters import first_hit, ngram, none, suffix, union

    def build(choice: Choice) -> Drafter:
        if choice.parts:
            combine = {"first": first_hit, "union": union}[choice.name]
            *before, joined = map(build, choice.parts)
            for part in reversed(before):
                joined = combine(part, joined)
            return joined
        known: dict[str, Any] = {"none": none, "ngram": ngram, "suffix": suffix}
        found: Drafter = known[choice.name](**choice.options)
        return found

    drafter = build(drafting)
    options: dict[str, Any] = dict(trace.header.sampling)
    sampling = Sampling(**options)
    begin = torch.tensor([len(trace.prompt)])
    memory: Any = None

    def propose(tokens: torch.Tensor, length: int, plan: Plan) -> Proposal:
        nonlocal memory
        end = torch.tensor([length])
        # As a decode has it, the buffer holds nothing behind the text.
        known = torch.where(torch.arange(tokens.shape[1]) < length, tokens, 0)
        memory = drafter.init(known, begin, tokens.shape[1]) if memory is None else memory
        state: DecodeState[Any, Any] = DecodeState(
            tokens=known,
            length=end,
            prompt_length=begin,
            limit=begin + trace.header.max_new_tokens,
            finish=torch.zeros_like(end),
            round=torch.zeros_like(end),
            key=seeded(0, 1),
            cache=KVCache(SlotStore(()), end - 1, 0, length - 1),
            drafter=memory,
            controller=None,
            metrics=zero(1, 0),
        )
        found, memory, _ = drafter.propose(state, plan, sampling)
        return tree.trim(found)

    return propose


def _known(trace: Trace) -> Any:
    """The chains of a draft model, from its choices as they were recorded: right ones up to the first that is wrong.

    What follows a wrong draft is judged by nobody, so it may be any token: here the wrong one again.
    """
    first, text = len(trace.prompt), trace.text
    choice = [-1] * (len(text) + 1)
    for entry, nodes, emitted in rounds_of(trace):
        at = int(entry["length"])
        drafts = [*nodes["token"][1:].tolist(), int(entry["ahead"])]
        for place, token in enumerate(drafts[: len(emitted) + 1]):
            if at + place >= len(text):
                break
            choice[at + place] = token
            if token != text[at + place]:
                break
    missing = [at for at in range(first, len(text)) if choice[at] < 0]
    if missing:
        raise ValueError(f"the trace does not tell the draft at new token {missing[0] - first}; record it again")

    def propose(tokens: torch.Tensor, length: int, plan: Plan) -> Proposal:
        depth = int(plan.depth[0])
        drafts: list[int] = []
        wrong: int | None = None
        for place in range(length, length + depth):
            drafts.append(choice[place] if wrong is None and place < len(text) else wrong or 0)
            wrong = drafts[-1] if place < len(text) and drafts[-1] != text[place] else wrong
        root = torch.tensor([text[length - 1]])
        return tree.chain(root, torch.tensor([drafts], dtype=torch.int64), torch.tensor([depth]))

    return propose


def _fit(trace: Trace) -> tuple[float, float] | None:
    """Seconds of a round without drafts and of each token drafted: least squares over the recorded rounds.

    A trace whose rounds all drafted alike cannot tell the two apart; a round then costs the same at any depth.
    """
    seconds = trace.rounds["total_s"].astype(np.float64)
    if not seconds.sum():
        return None
    depth = np.maximum(trace.rounds["nodes"].astype(np.float64) - 1, 0)
    if trace.header.lookahead:
        # One draft in depth + 1 was the trace's own.
        seconds = seconds - trace.rounds["draft_s"] / (depth + 1)
    if np.ptp(depth) == 0:
        return float(seconds.mean()), 0.0
    slope, base = np.polyfit(depth, seconds, 1)
    return (float(base), float(slope)) if slope > 0 and base > 0 else (float(seconds.mean()), 0.0)


def acceptance(trace: Trace, policy: str, most: int) -> tuple[Table, Table]:
    """For each round and depth of its chain, cut to `most` drafts: the probability over the coins that a path reaches
    that deep, and whether the depth was drafted; given the recorded drafts."""
    deepest = max(1, min(most, int(trace.rounds["nodes"].max()) - 1))
    reach, drafted = np.zeros((len(trace.rounds), deepest)), np.zeros((len(trace.rounds), deepest), bool)
    for row, (_, whole, _) in enumerate(rounds_of(trace)):
        nodes = whole[: deepest + 1]
        count = len(nodes) - 1
        p, q = nodes["p"][1:], np.maximum(nodes["q"][1:], np.finfo(np.float32).tiny)
        drafted[row, :count] = True
        if policy == "block":
            reach[row, :count] = _block_reach(nodes)
        elif policy in ("greedy", "coupled"):
            parent = nodes["parent"][1:]
            reach[row, :count] = np.cumprod(nodes["choice"][parent] == nodes["token"][1:])
        else:
            reach[row, :count] = np.cumprod(p if policy == "match" else np.minimum(1, p / q))
    return reach, drafted


def _block_reach(nodes: Table) -> Table:
    """P(the path is at least j deep) of block verification: one minus all coins from j on failing."""
    ratio, tiny = 1.0, float(np.finfo(np.float32).tiny)
    shares: list[float] = []
    for at in range(1, len(nodes)):
        ratio = min(1.0, ratio * float(nodes["p"][at]) / max(float(nodes["q"][at]), tiny))
        mass = float(nodes["block"][at])
        rest = mass + 1 - ratio
        shares.append(ratio if at + 1 == len(nodes) else mass / rest if rest > 0 else 1.0)
    fails = np.cumprod(1 - np.array(shares[::-1]))[::-1]
    return np.asarray(1 - fails)


def _estimate(
    trace: Trace, policy: str, controller: Controller, seconds: tuple[float, float] | None
) -> tuple[Estimate, Estimate, Estimate | None]:
    """Simulate `REPLICAS` samples of the recorded length. Each resamples the rounds, takes from them the chance of
    every depth given the one before, the last known chance for deeper ones, and plays the controller against coins."""
    if policy == "block" and parse_policy(trace.header.policy).name != "block":
        raise ValueError("block verification needs sums that only a trace of policy block holds; record one with it")
    reach, drafted = acceptance(trace, policy, controller.max_depth)
    if not drafted.any():
        raise ValueError("no round drafted anything, so acceptance is unknown; record a trace with a drafter")
    generator = torch.Generator().manual_seed(_SEED)
    rates = _resampled_rates(reach, drafted, controller.max_depth, generator)
    wanted = len(trace.emitted)
    # How much a drafter has to offer: its depth where it was asked for more than it had.
    offered = _offers(trace, generator)
    state, length = controller.init(REPLICAS, torch.device("cpu")), torch.zeros(REPLICAS, dtype=torch.int64)
    rounds, time = torch.zeros(REPLICAS), torch.full((REPLICAS,), trace.header.prefill_s)
    root = torch.zeros(REPLICAS, dtype=torch.int64)
    while bool((running := length < wanted).any()):
        room = (trace.header.max_new_tokens - length - 1).clamp_min(0) * running
        plan = controller.plan(state, room)
        depth = torch.minimum(plan.depth, offered(plan.depth))
        most = int(depth.max())
        coins = torch.rand(REPLICAS, most, generator=generator, dtype=torch.float64) < rates[:, :most]
        count = (coins & (torch.arange(most) < depth[:, None])).long().cumprod(-1).sum(-1)
        proposal = tree.chain(root, torch.zeros(REPLICAS, most, dtype=torch.int64), depth)
        path = torch.arange(1, most + 2)
        verdict = Verdict(torch.where(path <= count[:, None], path, -1), count, root, torch.zeros(REPLICAS, most + 1))
        emitted = torch.minimum(count + 1, wanted - length) * running
        info = StepInfo(
            plan,
            proposal,
            verdict,
            _verified(proposal, verdict),
            emitted,
            running,
        )
        state, length, rounds = controller.update(state, info), length + emitted, rounds + running
        if seconds is not None:
            time = time + running * (seconds[0] + seconds[1] * depth)
    speed = None if seconds is None else _interval(time.reciprocal() * wanted)
    return _interval(rounds), _interval(rounds.reciprocal() * wanted), speed


def _resampled_rates(reach: Table, drafted: Table, max_depth: int, generator: torch.Generator) -> torch.Tensor:
    """[replicas, depth]: P(depth accepted | the one before was), of rounds drawn with replacement."""
    pick = torch.randint(len(reach), (REPLICAS, len(reach)), generator=generator)
    reached, there = torch.from_numpy(reach)[pick].double(), torch.from_numpy(drafted)[pick].double()
    before = torch.cat([torch.ones_like(reached[:, :, :1]), reached[:, :, :-1]], 2)
    passed, tried = reached.sum(1), (before * there).sum(1)
    overall = (passed.sum(1) / tried.sum(1).clamp_min(1e-12))[:, None]
    rates = torch.where(tried > 0, passed / tried.clamp_min(1e-12), overall)
    deeper = max(0, max_depth - rates.shape[1])
    return torch.cat([rates, rates[:, -1:].expand(-1, deeper)], 1).clamp(0, 1)


def _offers(trace: Trace, generator: torch.Generator) -> Any:
    depth, asked = trace.rounds["nodes"] - 1, trace.rounds["depth"]
    # A round that drafted less than planned says how much there was; one that drafted all has no such limit.
    limits = torch.from_numpy(np.where(depth < asked, depth, np.iinfo(np.int16).max).astype(np.int64))

    def offered(planned: torch.Tensor) -> torch.Tensor:
        return limits[torch.randint(len(limits), planned.shape, generator=generator)]

    return offered


def _interval(values: torch.Tensor) -> Estimate:
    mean = float(values.double().mean())
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    # Few different counts of rounds: the mean can lie beside both percentiles.
    return Estimate(mean, min(low, mean), max(high, mean))
