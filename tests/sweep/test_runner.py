"""Sweeps on the toy: what rows hold, and what happens when something goes wrong."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from specdec import registry
from specdec.controllers import fixed
from specdec.models.toy import load_toy
from specdec.sampling import Sampling
from specdec.step import decode
from specdec.sweep import bench, runner
from specdec.sweep.config import Config
from specdec.sweep.contexts import read_contexts
from specdec.sweep.finish import finish_folder
from specdec.sweep.grid import expand
from specdec.sweep.journal import ROWS, Journal, read_rows
from specdec.sweep.manifest import Manifest, git_state, read_manifest, schema_text
from specdec.sweep.row import TIMING_FIELDS, Row, without_timing
from specdec.sweep.runner import run_sweep

Sweep = Callable[..., list[dict[str, Any]]]
MakeConfig = Callable[..., Config]
SCHEMAS = Path(bench.__file__).parent / "schemas"


def test_a_row_for_every_sample_with_what_was_decoded(sweep: Sweep, tmp_path: Path) -> None:
    rows = sweep(drafter=["suffix", "model"], k=[1, 3], iterations=2)
    assert len(rows) == 5 * 3 * 2
    contexts = read_contexts(tmp_path / "run")
    assert len(contexts) == 3
    toy = load_toy({"vocab_size": 40, "seed": 3, "sharpness": 3.0}, device="cpu")
    for row in rows:
        assert row["success"], row["traceback"]
        parts = {
            "drafter": registry.build_drafter(
                registry.parse_drafter(row["cell"].partition(" ")[0] if row["k"] else "none"),
                target=toy,
                sampling=Sampling(),
                policy="greedy",
                load_draft=lambda name: toy,
            ).drafter,
            "policy": registry.build_policy(registry.parse_policy("greedy")),
            "controller": fixed(row["k"]),
        }
        final = decode(
            [contexts[row["context"]].prompt_token_ids],
            model=toy.model,
            max_new_tokens=10,
            eos_ids=toy.eos_ids,
            seed=row["sample_seed"],
            **parts,
        )
        length = int(final.prompt_length[0])
        assert row["completion_token_ids"] == final.tokens[0, length : int(final.length[0])].tolist()
        assert row["completion_text"] == toy.tokenizer.decode(row["completion_token_ids"])
        assert sum(row["accept_lengths"]) == row["emitted"] == len(row["completion_token_ids"])
        assert len(row["accept_lengths"]) == row["rounds"]
        rounds = sum(row[f"{phase}_s"] for phase in ("draft", "verify", "accept", "other"))
        assert row["wall_s"] == pytest.approx(row["prefill_s"] + rounds)
        assert row["prefill_s"] < row["time_to_first_token_s"] <= row["wall_s"]
        assert row["tokens_per_sec"] == pytest.approx(row["emitted"] / row["wall_s"])
        assert row["memory_mib"]["rss_peak"] > 10
        assert row["dtype"] == "float64"
        assert row["synthetic"] is True


def test_fixed_k_drafts_k_tokens_in_every_round_that_can(sweep: Sweep) -> None:
    for row in sweep(drafter="model", k=[1, 2, 5], ignore_eos=True, max_new_tokens=17):
        left = 17
        for depth, emitted in zip(row["drafted_depths"], row["accept_lengths"], strict=True):
            assert depth == min(row["k"], left - 1)
            left -= emitted
        assert sum(row["drafted_depths"]) == row["drafted"]
        assert left == 0


def test_rows_and_manifest_satisfy_the_shipped_schemas(sweep: Sweep, tmp_path: Path) -> None:
    rows = sweep(temperature=[0, 1], detailed_metrics=True, drafter=["suffix", "model"])
    row_schema = json.loads((SCHEMAS / "row.schema.json").read_text())
    assert row_schema == json.loads(schema_text(Row))
    validator = jsonschema.Draft202012Validator(row_schema)
    for row in rows:
        validator.validate(row)
        assert len(row["round_seconds"]) == row["rounds"]
    manifest_schema = json.loads((SCHEMAS / "manifest.schema.json").read_text())
    assert manifest_schema == json.loads(schema_text(Manifest))
    jsonschema.validate(json.loads((tmp_path / "run" / "MANIFEST.json").read_text()), manifest_schema)
    manifest = read_manifest(tmp_path / "run")
    assert manifest.synthetic
    assert manifest.dtype == "float64"
    assert "torch==" in (tmp_path / "run" / "environment.txt").read_text()


def test_running_again_adds_nothing_and_other_settings_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    run_sweep(make_config(), tmp_path / "run")
    before = (tmp_path / "run" / ROWS).read_bytes()
    plan = run_sweep(make_config(), tmp_path / "run")
    assert plan.done == plan.total
    assert (tmp_path / "run" / ROWS).read_bytes() == before
    with pytest.raises(ValueError, match=r"made by another sweep \(k: \[2\] there, \[3\] here\)"):
        run_sweep(make_config(k=3), tmp_path / "run")


def test_changed_prompts_are_refused(make_config: MakeConfig, tmp_path: Path, prompt_file: Path) -> None:
    run_sweep(make_config(), tmp_path / "run")
    prompt_file.write_text("something else\n")
    with pytest.raises(ValueError, match=r"made by another sweep \(prompts"):
        run_sweep(make_config(), tmp_path / "run")


def test_a_failing_sample_becomes_a_row_and_the_sweep_goes_on(sweep: Sweep, prompt_file: Path) -> None:
    prompt_file.write_text("hello\nUPPER CASE IS UNKNOWN\nworld\n")
    rows = sweep(batch_size=3)
    failed = [row for row in rows if not row["success"]]
    assert {row["prompt_id"] for row in failed} == {"line-2"}
    assert len(failed) == 2
    assert len(rows) == 6
    for row in failed:
        assert row["error_type"] == "ValueError"
        assert "the toy model knows no" in row["error"]
        assert "Traceback" in row["traceback"]


def test_a_failure_in_the_middle_of_decoding_is_a_row(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    from specdec.sweep import measure

    honest, calls = measure.decode_rounds, Counter[str]()

    def broken(job: Any) -> Any:
        calls["decoded"] += 1
        if calls["decoded"] == 2:
            raise RuntimeError("out of\nluck")
        return honest(job)

    monkeypatch.setattr(measure, "decode_rounds", broken)
    rows = sweep()
    assert [row["success"] for row in rows] == [True, False, True, True, True, True]
    assert (rows[1]["error"], rows[1]["error_type"]) == ("out of luck", "RuntimeError")


def test_later_turns_see_the_cells_own_answers(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 7, "category": "c", "turns": ["hello", "again"]}\n')
    rows = sweep(prompts=str(tmp_path / "q.jsonl"), temperature=1, drafter="model", model="tabular:seed=3")
    by_key, contexts = {(row["cell"], row["turn"]): row for row in rows}, read_contexts(tmp_path / "run")
    for cell in ("plain", "model k=2"):
        first, second = by_key[cell, 0], by_key[cell, 1]
        given = contexts[second["context"]]
        assert given.prompt == "again"
        assert given.prompt_text.split() == f"hello {first['completion_text']} again".split()


def test_batches_give_the_tokens_of_single_prompts(sweep: Sweep) -> None:
    one = sweep("one", temperature=1, drafter="model")
    many = sweep("many", temperature=1, drafter="model", batch_size=2)
    tokens = {(row["is_baseline"], row["prompt_id"]): row["completion_token_ids"] for row in one}
    for row in many:
        assert row["completion_token_ids"] == tokens[row["is_baseline"], row["prompt_id"]]
        assert row["batch_tokens"] >= row["emitted"]
        assert row["wall_s"] <= row["batch_wall_s"]


def test_iterations_draw_anew_and_cells_share_their_seed(sweep: Sweep) -> None:
    rows = sweep(temperature=1, iterations=2, policy="coupled", drafter="model", k=3)
    seeds = {(row["iteration"], row["prompt_id"]): row["sample_seed"] for row in rows}
    assert len(set(seeds.values())) == len(seeds) == 6
    tokens = {(row["iteration"], row["prompt_id"], row["is_baseline"]): row["completion_token_ids"] for row in rows}
    for iteration, prompt in seeds:
        assert tokens[iteration, prompt, True] == tokens[iteration, prompt, False]
        assert tokens[0, prompt, True] != tokens[1, prompt, True]


def test_alpha_is_the_mean_acceptance_with_less_noise(sweep: Sweep) -> None:
    rows = sweep(
        temperature=1, drafter="model:agreement=0.5", k=3, iterations=2, ignore_eos=True, max_new_tokens=40, limit=2
    )
    drafting = [row for row in rows if not row["is_baseline"]]
    judged = sum(row["alpha_positions"] for row in drafting)
    alpha = sum(row["alpha"] * row["alpha_positions"] for row in drafting) / judged
    accepted = sum(row["accepted"] for row in drafting) / judged
    assert 0.5 <= alpha < 1
    # Five standard deviations of a share of so many judgements.
    assert abs(alpha - accepted) < 5 * (0.25 / judged) ** 0.5
    assert all(row["alpha"] is None for row in rows if row["is_baseline"])


def test_what_does_not_fit_together_is_refused_before_anything_runs(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cell 'suffix k=2'.*decodes at temperature 0"):
        run_sweep(make_config(policy="greedy", temperature=1), tmp_path / "run")
    assert not (tmp_path / "run" / "MANIFEST.json").exists()


def test_planning_by_measured_time_is_refused_in_deterministic_mode(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plans by measured time"):
        run_sweep(make_config(controller="expected", deterministic=True), tmp_path / "run")


def test_measured_costs_are_kept_for_resuming(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(controller="expected", k=4)
    run_sweep(config, tmp_path / "run")
    costs = read_manifest(tmp_path / "run").costs
    assert list(costs) == ["tabular float64"]
    prepared = bench.prepare(config, expand(config), costs=costs)
    assert prepared.costs == costs


def test_interrupt_leaves_whole_rows_and_resumes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = runner.decode_samples, Counter[str]()

    def interrupted(*args: Any) -> Any:
        calls["batches"] += 1
        if calls["batches"] == 4:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(runner, "decode_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(make_config(), tmp_path / "run")
    assert len(list(read_rows(tmp_path / "run" / ROWS))) == 3
    plan = run_sweep(make_config(), tmp_path / "run")
    assert (plan.done, plan.total) == (3, 6)
    assert len(list(read_rows(tmp_path / "run" / ROWS))) == 6


def test_a_row_that_cannot_be_written_ends_the_sweep(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, heard = Journal._write, list[Row]()

    def full(journal: Journal, rows: Sequence[str], contexts: Sequence[str]) -> None:
        if len(list(journal.rows())) == 2:
            raise OSError(28, "No space left on device")
        write(journal, rows, contexts)

    monkeypatch.setattr(Journal, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        run_sweep(make_config(), tmp_path / "run", finished=heard.append)
    assert len(heard) == len(list(read_rows(tmp_path / "run" / ROWS))) == 2


CHILD = """
import os, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from specdec.sweep.config import parse_config
from specdec.sweep.runner import run_sweep
import json
rows, more = Path(sys.argv[1], "rows.jsonl"), float(sys.argv[3])
def watch(end):
    # Kill without warning once the file has grown so far: at any byte of what follows.
    while rows.stat().st_size < end:
        time.sleep(0.001)
    os.kill(os.getpid(), 9)
def started(plan):
    if more >= 0:
        threading.Thread(target=watch, args=(rows.stat().st_size + more,), daemon=True).start()
run_sweep(parse_config(json.loads(sys.argv[2])), Path(sys.argv[1]), started=started)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_sweeps_resume_to_the_rows_of_an_undisturbed_one(make_config: MakeConfig, tmp_path: Path) -> None:
    kills = int(os.environ.get("SWEEP_TEST_KILLS", "4"))
    iterations = max(2, kills // 2)
    settings = {"temperature": 1, "drafter": ["suffix", "model"], "batch_size": 2, "iterations": iterations}
    config = make_config(**settings)
    run_sweep(config, tmp_path / "whole")
    share = (tmp_path / "whole" / ROWS).stat().st_size / (kills + 1)
    pick = random.Random(0)
    codes = []
    for _ in range(kills):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "killed"), json.dumps(config.effective())]
        done = subprocess.run([*command, str(pick.uniform(0.0, share))], check=False, capture_output=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        codes.append(done.returncode)
    assert -signal.SIGKILL in codes
    print(f"{codes.count(-signal.SIGKILL)} of {kills} processes were killed")
    plan = run_sweep(config, tmp_path / "killed")
    assert plan.total == len(list(read_rows(tmp_path / "killed" / ROWS)))
    assert stable(tmp_path / "killed") == stable(tmp_path / "whole")


def test_deterministic_processes_write_the_same_bytes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(temperature=1, drafter=["suffix", "model"], deterministic=True)
    for name in ("one", "two"):
        command = [sys.executable, "-c", CHILD, str(tmp_path / name), json.dumps(config.effective()), "-1"]
        subprocess.run(command, check=True)
    assert stable(tmp_path / "one", ordered=True) == stable(tmp_path / "two", ordered=True)
    assert read_manifest(tmp_path / "one").config["deterministic"]


def stable(folder: Path, *, ordered: bool = False) -> list[str]:
    """The rows as text without their times."""
    lines = [json.dumps(without_timing(row)) for row in read_rows(folder / ROWS)]
    return lines if ordered else sorted(lines)


def test_detailed_metrics_are_histograms_of_all_rounds_and_profiled_operations(
    sweep: Sweep, tmp_path: Path, make_config: MakeConfig
) -> None:
    rows = sweep(detailed_metrics=True, drafter="model", batch_size=2)
    finish_folder(tmp_path / "run")
    cells = json.loads((tmp_path / "run" / "detailed.json").read_text())["cells"]
    assert list(cells) == ["plain", "model k=2"]
    for name, found in cells.items():
        own = [row for row in rows if row["cell"] == name]
        # Two batches: two prompts, and one.
        assert [row["round_seconds"] is not None for row in own] == [True, False, True]
        lengths = Counter(length for row in own for length in row["accept_lengths"])
        assert found["accepted_length"] == {str(length): lengths[length] for length in sorted(lengths)}
        assert {"total", "draft", "verify", "accept", "sampling", "host"} <= found["seconds"].keys()
        times = [seconds for row in own for seconds in row["round_seconds"] or []]
        for phase, histogram in found["seconds"].items():
            values = [seconds.get(phase, 0.0) for seconds in times]
            assert sum(histogram["counts"]) == histogram["rounds"] == len(times)
            assert (histogram["edges"][0], histogram["edges"][-1]) == (min(values), max(values))
            assert histogram["quantiles"]["0.5"] == pytest.approx(statistics.median(values))
        assert 0 < found["profiled"]["rounds"] <= 16
        operations = {one["name"]: one for one in found["profiled"]["operations"]}
        assert operations["specdec.verify"]["calls"] == found["profiled"]["rounds"]
        assert any(name.startswith("aten::") for name in operations)
    before = (tmp_path / "run" / "operations.json").read_bytes()
    run_sweep(make_config(detailed_metrics=True, drafter="model", batch_size=2), tmp_path / "run")
    assert (tmp_path / "run" / "operations.json").read_bytes() == before


def test_only_changed_code_is_noted_beside_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True)

    code = tmp_path / "specdec" / "sweep"
    code.mkdir(parents=True)
    for file in (code / "__init__.py", tmp_path / "cli" / "a.py", tmp_path / "kernels" / "a.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "rows.jsonl").write_text("{}")
    found = git_state(code)
    assert found is not None
    assert found["dirty"] is False
    (code / "new.py").write_text("")
    assert git_state(code) == {**found, "dirty": True}


def test_timing_fields_are_fields_of_rows() -> None:
    assert set(Row.model_fields) >= TIMING_FIELDS
