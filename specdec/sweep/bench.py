"""The parts behind the cells: models loaded once, a job for every cell, and the exact acceptance probability."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from specdec import registry
from specdec.grammar import Choice
from specdec.graphs import with_cuda_graph
from specdec.models.loading import Loaded
from specdec.models.report import Progress, silent
from specdec.overlap import accelerated
from specdec.run import Job
from specdec.sampling import Sampling, warp
from specdec.step import check_parts
from specdec.sweep.config import Config
from specdec.sweep.grid import Cell
from specdec.target import load_target
from specdec.text import TextRule, build_rule
from specdec.transforms import Parts
from specdec.types import Draws, Model, Policy, Proposal, Target, Verdict, implementations

# The toy of a dry run: every printable character, and laws sharp enough for drafts to be accepted.
DRY_MODEL = "tabular:sharpness=4"


class Prepared(NamedTuple):
    """A cell ready to run: `job` lacks its prompts, and a rule for text, which `rule` makes of the tokens afterwards.
    `laws`: where the policy leaves what it judged, when asked to."""

    cell: Cell
    loaded: Loaded
    job: Job
    rule: TextRule
    laws: "Laws | None"


class Bench(NamedTuple):
    """All cells of a sweep, the models behind them (targets and draft models), and the costs that were measured."""

    cells: tuple[Prepared, ...]
    models: Mapping[str, Loaded]
    costs: Mapping[str, Mapping[int, float]]


class Laws:
    """The last proposal and target that a policy saw. Holding on to them costs nothing; `alpha` computes afterwards,
    outside the time that is measured."""

    def __init__(self) -> None:
        self.seen: tuple[Proposal, Target, Verdict, Sampling] | None = None

    def watch(self, policy: Policy) -> Policy:
        """`policy`, leaving what it sees here."""

        def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
            verdict = policy.verify(proposal, target, draws, sampling)
            self.seen = (proposal, target, verdict, sampling)
            return verdict

        return policy._replace(verify=verify)

    def alpha(self) -> tuple[list[float], list[int]]:
        """For each row, the sum over the judged positions of sum min(p, q), and their number.

        A position is judged when all drafts before it were accepted; sum min(p, q) is the probability that its draft
        is accepted too, over the draft and the coin (Leviathan et al., arXiv:2211.17192, theorem 3.5): the same mean
        as the share of accepted drafts, with less noise. Only for chains that were sampled from a law.
        """
        seen, self.seen = self.seen, None
        if seen is None:
            return [], []
        proposal, target, verdict, sampling = seen
        rows, n = proposal.tokens.shape
        if proposal.draft_probs is None or not proposal.chain or n == 1 or sampling.temperature == 0:
            return [0.0] * rows, [0] * rows
        p, q = warp(target.logits[:, :-1], sampling), proposal.draft_probs[:, :-1]
        overlap = torch.minimum(p, q.to(p.dtype)).sum(-1)
        index = torch.arange(n - 1, device=overlap.device)
        judged = (index <= verdict.num_accepted[:, None]) & proposal.valid[:, 1:] & proposal.sampled[:, 1:]
        return (overlap * judged).sum(-1).tolist(), judged.sum(-1).tolist()


def prepare(
    config: Config,
    cells: Sequence[Cell],
    *,
    costs: Mapping[str, Mapping[int, float]] | None = None,
    progress: Progress = silent,
) -> Bench:
    """Load every model once and put the parts of every cell together; raises `ValueError` naming the cell that does
    not fit.

    `costs`: what forwards took when the run folder was made; the controller `expected` plans by them, so that resuming
    and reproducing plan the same.
    """
    _set_process(config)
    loaded: dict[str, Loaded] = {}
    known: dict[str, Mapping[int, float]] = dict(costs or {})

    def load(name: str, dtype: str) -> Loaded:
        name = DRY_MODEL if config.dry_run else name
        key = f"{name} {dtype}"
        if key not in loaded:
            options = {
                "adapter": config.adapter,
                "dtype": dtype,
                "device": config.device,
                "trust_remote_code": config.trust_remote_code,
            }
            found = load_target(name, options, progress)
            if config.cuda_graph:
                found = dataclasses.replace(found, model=with_cuda_graph(found.model))
            loaded[key] = found
        return loaded[key]

    def measure(model: Model) -> Mapping[int, float]:
        from specdec.models.costs import cached_costs, measure_costs

        key = f"{model.name} {str(model.dtype).removeprefix('torch.')}"
        if key not in known:
            if config.deterministic:
                raise ValueError(
                    "controller 'expected' plans by measured time, which differs between processes; "
                    "use fixed, adaptive or aimd in deterministic mode"
                )
            progress(f"measuring {model.name}", 0, 0)
            known[key] = measure_costs(model) if model.adapter.startswith("tabular") else cached_costs(model)
        return known[key]

    prepared = []
    for cell in cells:
        try:
            prepared.append(_prepare(config, cell, load, measure))
        except ValueError as error:
            raise ValueError(f"cell {cell.id!r}: {error}") from error
    return Bench(tuple(prepared), loaded, known)


def _prepare(
    config: Config,
    cell: Cell,
    load: Callable[[str, str], Loaded],
    measure: Callable[[Model], Mapping[int, float]],
) -> Prepared:
    loaded = load(cell.model, cell.dtype)
    sampling = Sampling(cell.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
    policy = registry.build_policy(registry.parse_policy(cell.policy))
    drafting = registry.build_drafter(
        _dry_drafter(registry.parse_drafter(cell.drafter)) if config.dry_run else registry.parse_drafter(cell.drafter),
        target=loaded,
        sampling=sampling,
        policy=policy.name,
        draft_name=None if config.dry_run else config.draft_model,
        load_draft=lambda name: load(name, cell.dtype),
    )
    check_parts(loaded.model, drafting.drafter, policy, sampling)
    chosen = Choice("fixed", {"k": 0}) if cell.plain else registry.parse_controller(cell.controller)
    controller = registry.build_controller(chosen, target=loaded.model, drafts=drafting.models, costs=measure)
    laws = Laws() if config.alpha and not cell.plain and cell.temperature > 0 else None
    parts = Parts(loaded.model, drafting.drafter, laws.watch(policy) if laws else policy, controller)
    job = Job(
        parts=accelerated(
            parts,
            cuda_graph=config.cuda_graph,
            parallel_streams=config.parallel_streams,
            sync_mode=config.sync_mode,
        ),
        prompts=(),
        sampling=sampling,
        rule=None,
        eos_ids=() if config.ignore_eos else loaded.eos_ids,
        max_new_tokens=cell.max_new_tokens,
    )
    return Prepared(cell, loaded, job, build_rule(loaded.tokenizer, hidden=loaded.eos_ids), laws)


def _dry_drafter(choice: Choice) -> Choice:
    """What stands for `choice` on the toy: its own draft model for drafters that run a model."""
    if choice.parts:
        return Choice(choice.name, {}, tuple(map(_dry_drafter, choice.parts)))
    if choice.name not in ("model", "early_exit"):
        return choice
    kept = {key: value for key, value in choice.options.items() if key in ("mode", "tree", "replacement")}
    return Choice("model", kept)


def _set_process(config: Config) -> None:
    """What holds for the whole process: determinism, and which kernels may run."""
    if config.force_py:
        os.environ["SPECDEC_FORCE_PY"] = "1"
    if config.deterministic:
        # Read by cuBLAS when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def sample_seed(seed: int, iteration: int, prompt_id: str, turn: int) -> int:
    """The seed of a sample, the same in every cell: 63 bits of a hash, so that no two samples share randomness."""
    digest = hashlib.sha256(f"{seed}/{iteration}/{prompt_id}/{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def describe(loaded: Loaded) -> dict[str, Any]:
    """What identifies a model in a manifest."""
    synthetic = loaded.adapter == "tabular"
    return {
        "name": loaded.name,
        "revision": loaded.revision,
        "source": loaded.source,
        "adapter": loaded.adapter,
        "adapter_reason": loaded.adapter_reason,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "vocab_size": loaded.model.vocab_size,
        "max_length": loaded.model.max_length,
        "eos_ids": list(loaded.eos_ids),
        "implementations": implementations(loaded.model),
        "file_hashes": {} if synthetic else loaded.file_hashes(),
        "tokenizer_sha256": _hash_tokenizer(loaded.tokenizer),
    }


def _hash_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(getattr(tokenizer, "alphabet", ""))
    template = getattr(tokenizer, "chat_template", None) or ""
    return hashlib.sha256(f"{text}\n{template}".encode()).hexdigest()
