"""One batch of one cell, decoded and measured: from prompts to rows."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from specdec.metrics import summarize
from specdec.models.report import one_line
from specdec.run import Progress, decode_rounds, split_seconds, stop_reason, token_ids
from specdec.sweep.bench import Prepared, sample_seed
from specdec.sweep.config import Config
from specdec.sweep.contexts import Context
from specdec.sweep.prompts import Prompt
from specdec.sweep.row import Row
from specdec.target import check_length, encode_messages
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


class _Course(NamedTuple):
    """What the rounds of a batch tell beyond the last state; by row."""

    last: Progress
    texts: list[str]
    lengths: list[list[int]]
    depths: list[list[int]]
    finished: list[Mapping[str, float]]
    first: list[float]
    alpha: list[float]
    positions: list[int]
    rounds: list[dict[str, float]]
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
            course = _follow(prepared._replace(job=job), recorder, detailed=config.detailed_metrics or config.profile)
            if recorder is not None and traced is not None:
                for place, trace in zip(places, recorder.traces(), strict=True):
                    traced(samples[place], trace)
            for row, place in enumerate(places):
                rows[place] = _finished(prepared, samples[place], encoded[place], course, row)
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


def _follow(prepared: Prepared, recorder: Recorder | None = None, *, detailed: bool) -> _Course:
    """Decode the batch and note what happens round by round."""
    rows = len(prepared.job.prompts)
    texts, lengths, depths = [""] * rows, [[] for _ in range(rows)], [[] for _ in range(rows)]  # type: ignore[var-annotated]
    finished: list[Mapping[str, float]] = [{}] * rows
    first, alpha, positions = [0.0] * rows, [0.0] * rows, [0] * rows
    rounds: list[dict[str, float]] = []
    before = [len(prompt) for prompt in prepared.job.prompts]
    last: Progress | None = None
    reset_peaks(prepared.job.parts.model.device)
    for progress in decode_rounds(prepared.job):
        if recorder is not None:
            recorder.observe(progress)
        if progress.info is not None:
            now, depth = progress.state.length.tolist(), _depths(progress)
            done, ran = progress.state.done.tolist(), progress.info.running.tolist()
            law, count = prepared.laws.alpha() if prepared.laws is not None else ([0.0] * rows, [0] * rows)
            for row in range(rows):
                texts[row] += progress.pieces[row]
                if not ran[row]:
                    continue
                lengths[row].append(now[row] - before[row])
                depths[row].append(depth[row])
                alpha[row] += law[row]
                positions[row] += count[row]
                first[row] = first[row] or progress.wall_s
                if done[row]:
                    finished[row] = progress.seconds
            before = now
            if detailed:
                rounds.append(
                    {
                        "accepted": float(progress.info.verdict.num_accepted.sum()),
                        "proposed": float(sum(depth)),
                        **(progress.info.timing or {}),
                    }
                )
        last = progress
    assert last is not None
    used = memory(prepared.job.parts.model.device)
    return _Course(last, texts, lengths, depths, finished, first, alpha, positions, rounds, used)


def _depths(progress: Progress) -> list[int]:

    assert progress.info is not None
    return list(progress.info.proposal.shape.deepest.tolist())


def _finished(prepared: Prepared, sample: Sample, prompt: Sequence[int], course: _Course, row: int) -> Decoded:
    tokens = token_ids(course.last, row)
    counts = summarize(course.last.state.metrics, [row])
    seconds = split_seconds(course.finished[row])
    wall, first = seconds["wall_s"], course.first[row]
    context = Context(sample.prompt.turns[sample.turn], prepared.loaded.tokenizer.decode(list(prompt)), tuple(prompt))
    later = len(tokens) - course.lengths[row][0]
    positions = course.positions[row]
    return _row(
        prepared,
        sample,
        context,
        success=True,
        completion_token_ids=tokens,
        completion_text=course.texts[row],
        stop_reason=stop_reason(course.last, row),
        **{name: counts[name] for name in _COUNTS},
        accept_lengths=course.lengths[row],
        drafted_depths=course.depths[row],
        alpha=course.alpha[row] / positions if positions else None,
        alpha_positions=positions,
        batch_tokens=course.last.emitted,
        **{name: value for name, value in seconds.items() if name != "decode_s"},
        time_to_first_token_s=first,
        per_token_latency_s=(wall - first) / later if later else None,
        tokens_per_sec=course.last.emitted / course.last.wall_s,
        batch_wall_s=course.last.wall_s,
        memory_mib={name: round(size, 1) for name, size in course.memory.items()},
        # Those of the batch, once.
        round_seconds=course.rounds if row == 0 and course.rounds else None,
    )


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
