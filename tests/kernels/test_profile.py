"""Phases add up to the round, events are read once, traces open, and memory is told."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from specdec import controllers, drafters, policies
from specdec.models.tabular import tabular, tabular_draft
from specdec.run import Job, decode_rounds, split_seconds
from specdec.sampling import Sampling
from specdec.text import TextRule
from specdec.transforms import Parts
from specdec_kernels.clock import Clock, EventTimer
from specdec_kernels.memory import memory, reset_peaks
from specdec_kernels.profile import profiled

TARGET = tabular(5, seed=1)


class Event:
    """An event of a device that takes two milliseconds for everything, and answers only when it was waited for."""

    made = 0
    now = 0.0

    def __init__(self):
        Event.made += 1
        self.at = -1.0
        self.waited = False

    def record(self):
        Event.now += 2.0
        self.at, self.waited = Event.now, False

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, other):
        assert other.at > self.at
        return other.at - self.at


def test_events_are_read_at_the_end_and_used_again():
    Event.made = 0
    timer = EventTimer(Event)
    clock = Clock("cpu", timer)
    for _ in range(3):
        with clock.span("total"):
            with clock.span("draft"):
                pass
            with clock.span("draft"):
                pass
        seconds = clock.drain()
        assert seconds == {"draft": pytest.approx(0.004), "total": pytest.approx(0.010)}
    assert Event.made == 6
    assert clock.drain() == {}
    assert len({id(event) for event in timer.free}) == 6


def test_only_the_last_event_of_a_round_is_waited_for():
    clock = Clock("cpu", EventTimer(Event))
    with clock.span("total"), clock.span("verify"):
        pass
    spans = list(clock._spans)
    clock.drain()
    assert [end.waited for _, _, end in spans] == [False, True]


def rounds():
    job = Job(
        parts=Parts(
            TARGET,
            drafters.draft_model(tabular_draft(TARGET, agreement=0.6), branching=(2, 1)),
            policies.lossless(),
            controllers.fixed(2),
        ),
        prompts=[[1, 2, 3]],
        sampling=Sampling(temperature=1.0),
        rule=TextRule(lambda ids: "".join(map(str, ids))),
        eos_ids=(),
        max_new_tokens=40,
    )
    return decode_rounds(job)


def test_the_phases_of_a_round_add_up_to_it():
    begin, last = time.perf_counter(), None
    for last in rounds():
        if last.info is not None:
            timing = dict(last.info.timing)
            total = timing.pop("total")
            assert {"draft", "verify", "accept", "cache", "sampling", "host"} <= timing.keys()
            assert all(seconds >= 0 for seconds in timing.values())
            assert sum(timing.values()) == pytest.approx(total, rel=0.05)
    split = split_seconds(last.seconds)
    assert split["wall_s"] <= time.perf_counter() - begin
    assert sum(split[f"{name}_s"] for name in ("draft", "verify", "accept", "other")) == pytest.approx(
        split["decode_s"], rel=0.05
    )


def test_a_trace_can_be_opened(tmp_path: Path):
    trace = tmp_path / "deep" / "trace.json"
    with profiled("cpu", trace) as profile:
        torch.randn(32, 32) @ torch.randn(32, 32)
    assert json.loads(trace.read_text())["traceEvents"]
    assert "aten::mm" in [row["name"] for row in profile.kernels]
    assert profile.kernels == sorted(profile.kernels, key=lambda row: -row["seconds"])
    with pytest.raises(OSError, match="trace"), profiled("cpu", tmp_path / "deep" / "trace.json" / "trace"):
        raise AssertionError("nothing may run")


def test_memory_is_told_from_where_its_peaks_began():
    reset_peaks("cpu")
    before = memory("cpu")["rss_peak"]
    kept = torch.ones(2**26)
    held = memory("cpu")["rss_peak"]
    # 256 MiB were written.
    assert held >= before + 200 > 200
    del kept
    # Linux adds up the counts of every core now and then, so sizes are off by tens of pages for each of them.
    assert memory("cpu")["rss_peak"] >= held - 20
    reset_peaks("cpu")
    if sys.platform == "linux":
        assert memory("cpu")["rss_peak"] < held - 200


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_time_the_device():
    device = torch.device("cuda")
    clock = Clock(device)
    x = torch.randn(4096, 4096, device=device)
    x @ x
    clock.now()
    begin = time.perf_counter()
    with clock.span("total"):
        for _ in range(20):
            x @ x
    launched = time.perf_counter() - begin
    seconds = clock.drain()["total"]
    assert seconds > launched, "the span must hold the work and not its launches"
    assert {"allocated_peak", "reserved_peak"} <= memory(device).keys()
