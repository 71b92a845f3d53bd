"""One batch of one cell, decoded and measured: from prompts to rows."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.metrics import summarize
from specdec.models.report import one_line
from specdec.run import Progress, decode_rounds, split_seconds, stop_reason, token_ids
from specdec.sweep.bench import Prepared, sample_seed
from specdec.sweep.config import Config
from specdec.sweep.contexts import Context
from specdec.sweep.prompts import Prompt
from specdec.sweep.row import Row
from specdec.target import check_length, encode_messages
from specdec.text import text_of
from specdec.trace.recorder import Choices, Recorder
from specdec.trace.records import Trace
from specdec_kernels.memory import memory, reset_peaks


class Sample(NamedTuple):
    """A turn of a prompt that is to be decoded. `place`: of the prompt in its set. `earlier`: the answers to the turns
    before it."""

    place: int
    prompt: Prompt
    turn: int
    iteration: int
    earlier: tuple[str, ...] = ()


class Decoded(NamedTuple):
    """The row of a sample, and what the model was given."""

    row: Row
    context: Context


class _Round(NamedTuple):
    """What is kept of a round until the batch is decoded: [b] of each tensor, which stays on its device. `seconds`:
    since the beginning; `timing`: of the round; `alpha`: see `Laws.alpha`."""

    length: Tensor
    depth: Tensor
    running: Tensor
    accepted: Tensor
    seconds: Mapping[str, float]
    timing: Mapping[str, float]
    alpha: tuple[list[float], list[int]] | None


class _Course(NamedTuple):
    """A decoded batch: its last state, and by round and row what its rounds were."""

    last: Progress
    rounds: list[_Round]
    length: list[list[int]]
    depth: list[list[int]]
    running: list[list[bool]]
    accepted: list[list[int]]
    memory: dict[str, float]


def decode_samples(
    prepared: Prepared,
    samples: Sequence[Sample],
    config: Config,
    traced: Callable[[Sample, Trace], None] | None = None,
) -> list[Decoded]:
    """A row for every sample, decoded together as one batch. `traced` hears the trace of each, where `config` asks.

    A sample whose prompt cannot be encoded, or does not fit, fails alone; whatever else goes wrong fails the batch.
    Failures are rows, too.
    """
    detailed = config.detailed_metrics or config.profile
    rows: dict[int, Decoded] = {}
    encoded: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        try:
            encoded[place] = encode_sample(prepared, sample, config)
        except Exception as error:
            rows[place] = _failed(prepared, sample, error)
    if encoded:
        places = list(encoded)
        seeds = [_seed(prepared, samples[place]) for place in places]
        job = prepared.job._replace(prompts=[encoded[place] for place in places], seeds=seeds)
        try:
            recorder = _recorder(prepared._replace(job=job), config) if config.trace and traced else None
            job = job if recorder is None else recorder.job
            course = _follow(prepared._replace(job=job), recorder)
            if recorder is not None and traced is not None:
                for place, trace in zip(places, recorder.traces(), strict=True):
                    traced(samples[place], trace)
            for row, place in enumerate(places):
                rows[place] = _finished(prepared, samples[place], encoded[place], course, row, detailed=detailed)
        except Exception as error:
            rows.update({place: _failed(prepared, samples[place], error) for place in places})
    return [rows[place] for place in range(len(samples))]


def encode_sample(prepared: Prepared, sample: Sample, config: Config) -> list[int]:
    """The tokens of a conversation up to the turn of `sample`; raises `ValueError` when they leave no room."""
    messages = [{"role": "system", "content": config.system}] if config.system is not None else []
    for said, answer in zip(sample.prompt.turns, sample.earlier, strict=False):
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": sample.prompt.turns[sample.turn]})
    if config.dry_run:
        messages = [{**message, "content": _toy_text(message["content"])} for message in messages]
    tokens = encode_messages(prepared.loaded, messages, chat=config.chat)
    check_length(prepared.loaded, len(tokens), prepared.cell.max_new_tokens)
    return tokens


def _toy_text(text: str) -> str:
    """What the toy can read: its own characters, and not too many of them."""
    return "".join(character if " " <= character <= "~" or character == "\n" else "?" for character in text)[-256:]


def _recorder(prepared: Prepared, config: Config) -> Recorder:
    cell = prepared.cell
    return Recorder(prepared.job, Choices(cell.drafter, cell.policy, cell.controller), limit=config.trace_limit)


def _follow(prepared: Prepared, recorder: Recorder | None = None) -> _Course:
    """Decode the batch and note what happens round by round. Whatever can wait does: between two rounds the processor's
    caches hold the model, and Python takes several times as long."""
    rounds: list[_Round] = []
    last: Progress | None = None
    reset_peaks(prepared.job.parts.model.device)
    for progress in decode_rounds(prepared.job):
        if recorder is not None:
            recorder.observe(progress)
        if (info := progress.info) is not None:
            rounds.append(
                _Round(
                    progress.state.length,
                    info.proposal.shape.deepest,
                    info.running,
                    info.verdict.num_accepted,
                    progress.seconds,
                    info.timing or {},
                    prepared.laws.alpha() if prepared.laws is not None else None,
                )
            )
        last = progress
    assert last is not None

    def read(name: str) -> list[list[Any]]:
        values: list[list[Any]] = torch.stack([getattr(done, name) for done in rounds]).tolist()
        return values

    by_round = {name: read(name) for name in ("length", "depth", "running", "accepted")}
    return _Course(last, rounds, memory=memory(prepared.job.parts.model.device), **by_round)


def _finished(
    prepared: Prepared, sample: Sample, prompt: Sequence[int], course: _Course, row: int, *, detailed: bool
) -> Decoded:
    rounds = [place for place, ran in enumerate(course.running) if ran[row]]
    lengths = [len(prompt), *(course.length[place][row] for place in rounds)]
    laws = [law for place in rounds if (law := course.rounds[place].alpha) is not None]
    positions = sum(count[row] for _, count in laws)
    ended = course.rounds[rounds[-1]]
    tokens = token_ids(course.last, row)
    counts = summarize(course.last.state.metrics, [row])
    seconds = split_seconds(ended.seconds)
    wall, first = seconds["wall_s"], split_seconds(course.rounds[rounds[0]].seconds)["wall_s"]
    context = Context(sample.prompt.turns[sample.turn], prepared.loaded.tokenizer.decode(list(prompt)), tuple(prompt))
    later = len(tokens) - (lengths[1] - lengths[0])
    return _row(
        prepared,
        sample,
        context,
        success=True,
        completion_token_ids=tokens,
        completion_text=text_of(tokens, prepared.rule, prompt),
        stop_reason=stop_reason(course.last, row),
        **{name: counts[name] for name in _COUNTS},
        accept_lengths=[after - before for before, after in pairwise(lengths)],
        drafted_depths=[course.depth[place][row] for place in rounds],
        alpha=sum(overlap[row] for overlap, _ in laws) / positions if positions else None,
        alpha_positions=positions,
        batch_tokens=course.last.emitted,
        **{name: value for name, value in seconds.items() if name != "decode_s"},
        time_to_first_token_s=first,
        per_token_latency_s=(wall - first) / later if later else None,
        tokens_per_sec=course.last.emitted / course.last.wall_s,
        batch_wall_s=course.last.wall_s,
        memory_mib={name: round(size, 1) for name, size in course.memory.items()},
        # Those of the batch, once.
        round_seconds=_round_seconds(course) if detailed and row == 0 else None,
    )


def _round_seconds(course: _Course) -> list[dict[str, float]]:
    return [
        {"accepted": float(sum(accepted)), "proposed": float(sum(depth)), **done.timing}
        for done, accepted, depth in zip(course.rounds, course.accepted, course.depth, strict=True)
    ]


_COUNTS = (
    "rounds",
    "drafted",
    "accepted",
    "emitted",
    "target_forwards",
    "draft_forwards",
    "hist",
    "acceptance_rate",
)


def _failed(prepared: Prepared, sample: Sample, error: Exception) -> Decoded:
    return _row(
        prepared,
        sample,
        Context(sample.prompt.turns[sample.turn]),
        success=False,
        error=one_line(error),
        error_type=type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
    )


def _seed(prepared: Prepared, sample: Sample) -> int:
    return sample_seed(prepared.cell.seed, sample.iteration, sample.prompt.id, sample.turn)


def _row(prepared: Prepared, sample: Sample, context: Context, **fields: Any) -> Decoded:
    cell, parts, loaded = prepared.cell, prepared.job.parts, prepared.loaded
    row = Row(
        cell=cell.id,
        baseline=cell.baseline,
        is_baseline=cell.plain,
        synthetic=loaded.adapter == "tabular",
        iteration=sample.iteration,
        prompt_id=sample.prompt.id,
        prompt_idx=sample.place,
        category=sample.prompt.category,
        turn=sample.turn,
        model=loaded.name,
        drafter=parts.drafter.name,
        policy=parts.policy.name,
        controller=parts.controller.name,
        k=cell.k,
        temperature=cell.temperature,
        max_new_tokens=cell.max_new_tokens,
        batch_size=cell.batch_size,
        dtype=str(parts.model.dtype).removeprefix("torch."),
        device=str(parts.model.device),
        seed=cell.seed,
        sample_seed=_seed(prepared, sample),
        context=context.id,
        finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        **fields,
    )
    return Decoded(row, context)
