"""Traces on disk and replayed: whole or refused, bounded, and any changed number is found."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec import registry
from specdec.graphs import graphed_parts
from specdec.models.loading import Loaded, load
from specdec.models.tabular import tabular
from specdec.run import Job, decode_rounds
from specdec.sampling import Sampling
from specdec.text import TextRule
from specdec.trace import Trace, read_trace, write_trace
from specdec.trace.recorder import Choices, Recorder
from specdec.trace.records import bytes_bound
from specdec.trace.replay import replay
from specdec.trace.what_if import what_if
from specdec.transforms import Parts
from specdec_kernels.graphs import eager_recorder


def toy() -> Loaded:
    from specdec.models.toy import load_toy

    return load_toy({"vocab_size": 8, "seed": 2, "sharpness": 2.0}, device="cpu")


def record(
    drafter: str = "model:agreement=0.7",
    policy: str = "lossless",
    controller: str = "fixed:k=3",
    *,
    temperature: float = 1.0,
    loaded: Loaded | None = None,
    new_tokens: int = 24,
    limit: int = 100,
    captured: bool = False,
) -> tuple[Trace, list[tuple[int, int]]]:
    """A trace, and committed tokens and drafted depth of each round as they were. `captured`: from parts that are
    replayed as CUDA graphs are, by a recorder that runs them eagerly."""
    loaded = toy() if loaded is None else loaded
    sampling = Sampling(temperature)
    drafting = registry.build_drafter(
        registry.parse_drafter(drafter), target=loaded, sampling=sampling, policy=policy, load_draft=lambda name: loaded
    )
    chosen = registry.build_controller(
        registry.parse_controller(controller), target=loaded.model, drafts=(), costs=lambda model: {1: 1.0}
    )
    parts = Parts(loaded.model, drafting.drafter, registry.build_policy(registry.parse_policy(policy)), chosen)
    if captured:
        parts = graphed_parts(parts, buckets=(1, 2, 4, 8), recorder=eager_recorder)
    job = Job(parts, [[1, 2, 3, 1, 2]], sampling, TextRule(lambda ids: "x" * len(ids)), (), new_tokens, 5)
    recorder = Recorder(job, Choices(drafter, policy, controller), limit=limit)
    rows = []
    for progress in decode_rounds(recorder.job):
        recorder.observe(progress)
        if progress.info is not None:
            rows.append((int(progress.info.num_emitted[0]), int(progress.info.proposal.drafted[0])))
    if captured:
        assert parts.model.about["graph"].replays > 0
        assert parts.model.about["graph"].reason is None
    return recorder.traces()[0], rows


@pytest.mark.parametrize("policy", ["lossless", "block", "match", "coupled"])
def test_a_trace_comes_back_from_its_file(policy: str, tmp_path: Path) -> None:
    trace, _ = record(policy=policy)
    again = read_trace(write_trace(trace, tmp_path / "a" / "t.npz"))
    assert again.header == trace.header
    for name in ("prompt", "rounds", "nodes", "emitted"):
        assert getattr(again, name).tobytes() == getattr(trace, name).tobytes()
    assert replay(again) is None
    assert not list(tmp_path.rglob("*.partial"))


SECONDS = ("draft_s", "verify_s", "accept_s", "total_s")


@pytest.mark.parametrize(("policy", "temperature"), [("greedy", 0.0), ("lossless", 1.0), ("coupled", 0.8)])
@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix:nodes=4", "model:agreement=0.7"])
def test_rounds_from_graphs_leave_the_trace_of_eager_ones(policy: str, temperature: float, drafter: str) -> None:
    eager, rows = record(drafter, policy, temperature=temperature)
    captured, again = record(drafter, policy, temperature=temperature, captured=True)
    assert rows == again
    assert captured.emitted.tolist() == eager.emitted.tolist()
    assert captured.nodes.tobytes() == eager.nodes.tobytes()
    told = [name for name in eager.rounds.dtype.names or () if name not in SECONDS]
    assert captured.rounds[told].tolist() == eager.rounds[told].tolist()
    assert replay(captured) is None
    if policy != "lossless":
        one, other = (what_if(trace, controller="fixed:k=2") for trace in (eager, captured))
        assert one.kind == other.kind == "exact"
        assert (one.emitted, one.depths, one.accepted) == (other.emitted, other.depths, other.accepted)


def changed(trace: Trace, table: str, field: str | None, change: Callable[[Any], Any], at: int = 5) -> Trace:
    values = getattr(trace, table).copy()
    column = values if field is None else values[field]
    column[at] = change(column[at])
    return dataclasses.replace(trace, **{table: values})


@pytest.mark.parametrize("policy", ["greedy", "lossless", "block", "match", "coupled"])
def test_replay_finds_a_changed_token(policy: str) -> None:
    trace, _ = record(policy=policy, temperature=0.0 if policy == "greedy" else 1.0)
    for at in range(len(trace.emitted)):
        found = replay(changed(trace, "emitted", None, lambda token: (token + 1) % 8, at))
        assert found is not None
        assert found.where.position == at
        assert found.where.token == (int(trace.emitted[at]) + 1) % 8
        assert found.where.other == int(trace.emitted[at])


@pytest.mark.parametrize("policy", ["lossless", "block", "match"])
def test_replay_finds_a_changed_uniform(policy: str) -> None:
    trace, _ = record(policy=policy)
    for at in range(len(trace.rounds)):
        assert "uniform" in str(replay(changed(trace, "rounds", "uniform", lambda one: 1 - one, at)))
    for at in range(1, len(trace.nodes)):
        assert "uniform" in str(replay(changed(trace, "nodes", "accept", lambda one: 1 - one, at)))


def test_replay_finds_other_noise() -> None:
    trace, _ = record(policy="coupled")
    header = dataclasses.replace(trace.header, seed=trace.header.seed + 1)
    assert replay(dataclasses.replace(trace, header=header)) is not None


def test_replay_finds_a_changed_probability_and_calls_rounding_rounding() -> None:
    trace, _ = record(policy="lossless")
    taken = next(
        at for at, node in enumerate(trace.nodes) if node["parent"] == 0 and node["accept"] * node["q"] < node["p"]
    )
    # Far below the bar, the draft is rejected; what is closest in that round then depends on its other decisions.
    found = replay(changed(trace, "nodes", "p", lambda p: 0.0, taken))
    assert found is not None
    bar = float(trace.nodes["accept"][taken] * trace.nodes["q"][taken])
    close = replay(changed(trace, "nodes", "p", lambda p: bar * (1 - 1e-16), taken))
    assert close is None or close.where.token is None or close.where.numerics


def test_a_torn_file_is_refused_in_one_line(tmp_path: Path) -> None:
    trace, _ = record()
    whole = write_trace(trace, tmp_path / "t.npz").read_bytes()
    torn = tmp_path / "torn.npz"
    for size in (0, 1, 30, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        torn.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no whole trace") as refused:
            read_trace(torn)
        assert "\n" not in str(refused.value)
    torn.write_text("# Not a trace")
    with pytest.raises(ValueError, match=r"no whole trace \(it is no archive of tables\); record it again"):
        read_trace(torn)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    torn.write_bytes(flipped)
    with pytest.raises(ValueError, match="no whole trace"):
        read_trace(torn)
    with pytest.raises(ValueError, match="cannot read"):
        read_trace(tmp_path / "none.npz")


def test_the_size_is_bounded_and_the_limit_kept(tmp_path: Path) -> None:
    trace, rows = record(new_tokens=300, limit=40)
    assert len(rows) > len(trace.rounds) == 40
    assert not trace.header.complete
    assert replay(trace) is None
    size = write_trace(trace, tmp_path / "t.npz").stat().st_size
    # The tables' names and types, the header and the prompt take 4 KiB.
    assert size < bytes_bound(40, len(trace.nodes)) + 4096
    with pytest.raises(ValueError, match="at least 1"):
        record(limit=0)


def test_a_vocabulary_costs_nothing() -> None:
    small, _ = record("ngram", "lossless")
    large, _ = record("ngram", "lossless", loaded=dataclasses.replace(toy(), model=tabular(4000, seed=1)))
    assert small.nodes.itemsize == large.nodes.itemsize
    assert large.nodes.nbytes + large.rounds.nbytes <= bytes_bound(len(large.rounds), len(large.nodes))


def test_what_if_equals_really_running_a_decoder(make_folder: Callable[..., Path]) -> None:
    loaded = load(str(make_folder("llama", vocab_size=257)), device="cpu")
    others = [("ngram", "fixed:k=5"), ("suffix", "aimd:k=2,max_k=8"), ("early_exit:layers=1", "fixed:k=2")]
    others += [("early_exit:layers=1", "adaptive:k=3"), ("early_exit:layers=1", "fixed:k=8")]
    for policy, temperature in (("greedy", 0.0), ("coupled", 0.8)):
        trace, _ = record("early_exit:layers=1", policy, "fixed:k=4", temperature=temperature, loaded=loaded)
        assert replay(trace) is None
        for drafter, controller in others:
            _, rows = record(drafter, policy, controller, temperature=temperature, loaded=loaded)
            found = what_if(trace, drafter=drafter, controller=controller)
            assert found.kind == "exact"
            assert found.emitted is not None
            assert found.depths is not None
            assert list(zip(found.emitted, found.depths, strict=True)) == rows


def test_what_cannot_be_told_is_refused_or_labelled() -> None:
    trace, _ = record(policy="lossless")
    found = what_if(trace, k=1)
    assert found.kind == "estimate"
    assert found.emitted is None
    with pytest.raises(ValueError, match="another drafter"):
        what_if(trace, drafter="suffix")
    with pytest.raises(ValueError, match="record a trace with it"):
        what_if(trace, policy="coupled")
    with pytest.raises(ValueError, match="block"):
        what_if(trace, policy="block")
    with pytest.raises(ValueError, match="costs"):
        what_if(trace, controller="expected:draft_cost=0.1")


def test_an_estimate_is_the_chance_of_the_recorded_laws() -> None:
    trace, _ = record(policy="match", controller="fixed:k=1", new_tokens=200)
    p = np.array([node["p"] for node in trace.nodes if node["parent"] == 0])
    found = what_if(trace)
    # A round commits one token and the draft with probability p; the last round of a sample drafts nothing.
    assert found.mean_accepted_length.value == pytest.approx(1 + p.mean(), abs=0.03)
    assert found.rounds.low < found.rounds.high
