"""Running a decoding round by round, alone or beside plain decoding, and adding up what it took."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from specdec.cache import keep
from specdec.metrics import summarize
from specdec.sampling import Sampling
from specdec.state import init_state, output_tokens
from specdec.step import build_step, iterate
from specdec.text import TextRound, TextRule, iterate_text
from specdec.transforms import Parts, spanned_function, timed_parts, with_timing
from specdec.types import STOP_REASONS, DecodeState, StepInfo
from specdec_kernels.clock import Clock

_WARM_UP_ROUNDS = 3


class Job(NamedTuple):
    """What is to be decoded, and how: `prompts` are the rows of one batch, `seeds` one number or one a row. `rule`: how
    tokens become text round by round; `None` where nobody reads along."""

    parts: Parts
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    rule: TextRule | None
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    seeds: int | Sequence[int] = 0


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state after a round, what the round added to each row's text (nothing where the job has no rule for it), and
    the seconds by phase since the beginning.

    `info`: what happened in the round; `None` after the prefill.
    """

    state: DecodeState[Any, Any]
    pieces: Sequence[str]
    seconds: Mapping[str, float]
    info: StepInfo | None = None

    @property
    def emitted(self) -> int:
        """New tokens, all rows together."""
        return int((self.state.length - self.state.prompt_length).sum())

    @property
    def wall_s(self) -> float:
        """Seconds since the beginning: prefill and rounds."""
        return self.seconds["prefill"] + self.seconds.get("total", 0.0)


def decode_rounds(job: Job) -> Iterator[Progress]:
    """Decode a batch; the first item is the state after the prefill."""
    clock = Clock(job.parts.model.device)
    parts = timed_parts(job.parts, clock)
    timed_keep = spanned_function("cache", keep, clock.span)
    step = build_step(*parts, sampling=job.sampling, eos_ids=job.eos_ids, keep=timed_keep)
    step = with_timing(step, clock)
    begin = clock.now()
    state = init_state(
        job.prompts,
        model=parts.model,
        drafter=parts.drafter,
        controller=parts.controller,
        max_new_tokens=job.max_new_tokens,
        seed=job.seeds,
    )
    seconds = {"prefill": clock.now() - begin}
    silence = [""] * len(job.prompts)
    yield Progress(state, silence, seconds)
    rounds = (
        (TextRound(*after, silence) for after in iterate(step, state))
        if job.rule is None
        else iterate_text(step, state, job.rule)
    )
    for done in rounds:
        seconds = seconds.copy()
        for name, more in (done.info.timing or {}).items():
            seconds[name] = seconds.get(name, 0.0) + more
        yield Progress(done.state, done.pieces, seconds, done.info)


def warm_up(*jobs: Job, rounds: int = _WARM_UP_ROUNDS) -> None:
    """A few rounds of each job that nobody counts: pages, threads and kernels are then in place."""
    for job in jobs:
        for _ in islice(decode_rounds(job), 1 + rounds):
            pass


def decode_together(jobs: Sequence[Job]) -> Iterator[tuple[int, Progress]]:
    """The rounds of all jobs, always one of the job with the fewest tokens so far: yields (job, progress).

    Whatever slows the machine down for a while then hits all jobs at the same place of their text.
    """
    runs = [decode_rounds(job) for job in jobs]
    emitted = dict.fromkeys(range(len(jobs)), -1)
    while emitted:
        index = min(emitted, key=lambda job: emitted[job])
        progress = next(runs[index], None)
        if progress is None:
            del emitted[index]
        else:
            emitted[index] = progress.emitted
            yield index, progress


def stop_reason(progress: Progress, row: int = 0) -> str:
    """Why the decoding of a row ended."""
    return STOP_REASONS[int(progress.state.finish[row])]


def token_ids(progress: Progress, row: int = 0) -> list[int]:
    """The new tokens of a row."""
    return output_tokens(progress.state)[row]


def split_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """`wall_s` is `prefill_s` plus `decode_s`, and `decode_s` the sum of its phases, `other_s` being the rest."""
    prefill_s, decode_s = seconds["prefill"], seconds.get("total", 0.0)
    phases = {f"{name}_s": seconds.get(name, 0.0) for name in ("draft", "verify", "accept")}
    phases["accept_s"] += seconds.get("sampling", 0.0)
    return {
        "wall_s": prefill_s + decode_s,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        **phases,
        "other_s": max(0.0, decode_s - sum(phases.values())),
    }


def measured(progress: Progress) -> dict[str, Any]:
    """Counters, rates and seconds of the whole batch.

    `tokens_per_s` divides by the whole time, `decode_tokens_per_s` by that of the rounds alone.
    """
    counts, times = summarize(progress.state.metrics), split_seconds(progress.seconds)
    return {
        **counts,
        **times,
        "tokens_per_s": counts["emitted"] / times["wall_s"],
        "decode_tokens_per_s": counts["emitted"] / times["decode_s"] if times["decode_s"] else None,
    }
