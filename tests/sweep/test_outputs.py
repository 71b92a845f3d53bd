"""What a run folder holds, what can be made of rows again, and what must never be mixed."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from specdec.sweep.contexts import whole_rows
from specdec.sweep.journal import ROWS, read_rows
from specdec.sweep.summary import LAB_COLUMNS, LAB_DETAILS
from specdec_cli.main import cli

TOY = "tabular:vocab_size=40,seed=3,sharpness=3"


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: two drafters, two depths, two categories, one question of two turns."""
    place = tmp_path_factory.mktemp("run")
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["hello", "again"]},
        {"question_id": 321, "category": "qa", "turns": ["abc abc abc"]},
    ]
    (place / "question.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    (place / "sweep.yaml").write_text(
        f"name: small\nmodel: {TOY}\ndrafter: [suffix, model]\nk: [1, 2]\nprompts: question.jsonl\nraw: 1\n".replace(
            "raw: 1\n", "max_new_tokens: 8\niterations: 1\nwarmup: 1\ndevice: cpu\nprofile: true\n"
        ).replace("vocab_size=40,", "")
    )
    result = invoke("sweep", place / "sweep.yaml", "--out", place / "run", "--metrics", "spec-bench")
    assert result.exit_code == 0, result.output
    assert "SYNTHETIC" in result.stdout
    assert "suffix k=2" in result.stdout
    assert "mean_accepted_tokens" in result.stdout
    assert "Report: " in result.stderr
    return place / "run"


def test_the_folder_is_complete(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "rows.jsonl",
        "contexts.jsonl",
        "summary.csv",
        "summary.json",
        "MANIFEST.json",
        "environment.txt",
        "config.yaml",
        "prompts.jsonl",
        "report.html",
        "results.md",
        "results.tex",
        "profile.json",
    }
    figures = ("throughput_vs_k", "acceptance_vs_k", "speedup_vs_k", "per_position_acceptance", "category_speedup")
    for name in figures:
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text()
    assert "booktabs" not in (folder / "results.tex").read_text()
    assert "\\toprule" in (folder / "results.tex").read_text()


def test_summaries_have_the_labs_names(folder: Path) -> None:
    with (folder / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0])[: len(LAB_COLUMNS)] == LAB_COLUMNS
    assert [line["k"] for line in lines] == ["0", "1", "2", "1", "2"]
    stored = json.loads((folder / "summary.json").read_text())
    assert {"system_info", "summary_results", "detailed_results", "detailed_metrics"} <= stored.keys()
    assert set(LAB_DETAILS) <= stored["detailed_results"][0].keys()
    assert len(stored["detailed_results"]) == 15
    assert {"timestamp", "pytorch_version", "kernel_info", "cuda_total_memory_gb"} <= stored["system_info"].keys()
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert {"export_created_at", "max_tokens", "iterations_per_k", "artifacts", "source_dir"} <= manifest.keys()
    assert manifest["models"].keys() == {"base", "draft"}
    profile = json.loads((folder / "profile.json").read_text())
    assert profile["metadata"].keys() == {"device", "dtype", "base_model", "draft_model", "k", "max_tokens"}
    assert len(profile["step_metrics"]) == profile["aggregated_metrics"]["total_steps"] > 15


def test_synthetic_is_written_everywhere(folder: Path) -> None:
    for name in ("rows.jsonl", "summary.csv", "summary.json", "MANIFEST.json", "report.html", "profile.json"):
        assert "synthetic" in (folder / name).read_text().lower(), name
    for name in ("results.md", "results.tex"):
        assert "SYNTHETIC" in (folder / name).read_text()


def test_report_makes_the_same_table_and_figures_from_rows_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / ROWS, tmp_path / "bare" / ROWS)
    result = invoke("report", tmp_path / "bare", "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert result.stdout == (folder / "results.md").read_text()
    for file in sorted((folder / "figures").glob("*.svg")):
        assert (tmp_path / "again" / "figures" / file.name).read_bytes() == file.read_bytes()


def test_report_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from specdec_cli.main import cli\n"
        f"cli(['report', {str(folder)!r}, '--out', {str(tmp_path / 'o')!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_page_stands_alone(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 5
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert all(source.startswith("data:") for source in sources)
    assert "<script" not in page
    assert "@import" not in page
    for text in ("small", "Definitions", "Speedup by category", "prompts_sha256"):
        assert text in page


@pytest.mark.parametrize(("form", "sign"), [("latex", "\\toprule"), ("csv", "speedup_low"), ("markdown", "| cell")])
def test_report_formats(form: str, sign: str, folder: Path) -> None:
    result = invoke("report", folder, "--no-files", "--format", form)
    assert sign in result.stdout
    projected = invoke("report", folder, "--no-files", "--format", form, "--metrics", "vllm")
    assert "spec_decode_acceptance_length" in projected.stdout.replace("\\_", "_")


def test_runs_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    result = invoke("report", folder, tmp_path / "other", "--out", tmp_path / "both")
    assert result.exit_code == 0, result.output
    assert "other: suffix k=1" in result.stdout
    assert "run: suffix k=1" in result.stdout
    assert (tmp_path / "both" / "report.html").exists()


def test_runs_of_the_same_name_are_told_apart_by_their_folders(folder: Path, tmp_path: Path) -> None:
    for place in ("x", "y"):
        shutil.copytree(folder, tmp_path / place / "run")
    files = (tmp_path / "x" / "run", tmp_path / "y" / "run")
    result = invoke("report", *files, "--no-files", "--csv", tmp_path / "r.csv")
    assert result.exit_code == 0, result.output
    assert "| x/run: suffix k=1" in result.stdout
    assert "| y/run: suffix k=1" in result.stdout
    projected = invoke("report", *files, "--no-files", "--metrics", "vllm").stdout
    assert projected.count("run: suffix k=1") == 2
    with (tmp_path / "r.csv").open(newline="") as file:
        assert {line["run"] for line in csv.DictReader(file)} == {"x/run", "y/run"}
    twice = invoke("report", folder, folder / ".." / folder.name, "--no-files")
    assert twice.exit_code == 2
    assert "given twice" in twice.stderr


def test_synthetic_rows_are_never_shown_among_real_ones(folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "synthetic": False} for row in read_rows(folder / ROWS)]
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("report", folder, tmp_path / "real")
    assert result.exit_code == 2
    assert "is synthetic (a dry run) and is never shown among real runs" in result.stderr
    (tmp_path / "real" / ROWS).write_text(
        "".join(json.dumps(row) + "\n" for row in [rows[0], {**rows[1], "synthetic": True}])
    )
    assert "mixes synthetic and real rows" in invoke("report", tmp_path / "real").stderr


def test_rows_are_exported(folder: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    result = invoke("report", folder, "--no-files", "--parquet", tmp_path / "r.parquet", "--csv", tmp_path / "r.csv")
    assert result.exit_code == 0, result.output
    rows = list(whole_rows(folder))
    table = parquet.read_table(tmp_path / "r.parquet").to_pylist()
    for row, stored in zip(rows, table, strict=True):
        parsed = {name: json.loads(stored[name]) for name in ("round_seconds", "memory_mib")}
        assert {**stored, **parsed} == {
            **row,
            "prompt_token_ids": list(row["prompt_token_ids"]),
            "run": "run",
        }
    with (tmp_path / "r.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [json.loads(line["hist"]) for line in lines] == [row["hist"] for row in rows]


def test_spec_bench_files_have_the_benchmarks_schema(folder: Path, tmp_path: Path) -> None:
    invoke("report", folder, "--no-files", "--spec-bench-out", tmp_path / "answers")
    files = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert files == ["model-k=1.jsonl", "model-k=2.jsonl", "plain.jsonl", "suffix-k=1.jsonl", "suffix-k=2.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "answers" / "plain.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 321]
    for line in lines:
        choice = line["choices"][0]
        # As the benchmark's speed.py sums them.
        assert sum(choice["new_tokens"]) == sum(choice["accept_lengths"]) == len(choice["accept_lengths"])
        assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
        assert len(choice["turns"]) == len(choice["wall_time"]) == (2 if line["question_id"] == 81 else 1)
        assert isinstance(line["tstamp"], float)


def test_spec_bench_compat_prints_the_speedup_of_the_benchmarks_script(folder: Path, tmp_path: Path) -> None:
    result = invoke(
        "report", folder, "--out", tmp_path, "--spec-bench-compat", "--format", "csv", "--spec-bench-out", tmp_path
    )
    assert result.exit_code == 0, result.output
    found = {line["cell"]: line for line in csv.DictReader(result.stdout.splitlines())}

    # What speed.py does with the answer files, in its words; the toy has a token for every character.
    def speed(name: str, *, plain: bool = False) -> float:
        speeds = []
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines():
            choice = json.loads(line)["choices"][0]
            tokens = sum(len(answer) - 1 for answer in choice["turns"]) if plain else sum(choice["new_tokens"])
            speeds.append(tokens / sum(choice["wall_time"]))
        return sum(speeds) / len(speeds)

    for cell in ("suffix k=1", "model k=2"):
        name = cell.replace(" ", "-")
        assert float(found[cell]["speedup_retokenised"]) == pytest.approx(speed(name) / speed("plain", plain=True))
        assert float(found[cell]["speedup"]) == pytest.approx(speed(name) / speed("plain"))
        assert found[cell]["speedup"] != found[cell]["speedup_retokenised"]
    refused = invoke("report", folder, "--no-files", "--spec-bench-compat", "--metrics", "vllm")
    assert refused.exit_code == 2
    assert "leave out --metrics vllm" in refused.stderr
    table = invoke("report", folder, "--no-files", "--spec-bench-compat").stdout
    assert "speedup_retokenised counts the tokens of plain decoding as its script does" in table


def test_spec_bench_compat_without_a_manifest_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / ROWS, tmp_path / ROWS)
    result = invoke("report", tmp_path, "--no-files", "--spec-bench-compat")
    assert result.exit_code == 2
    assert "has no MANIFEST.json, which names the tokenizer" in result.stderr


def test_reproducing_finds_identical_tokens(folder: Path, tmp_path: Path) -> None:
    result = invoke("reproduce", folder, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert "15 of 15 samples have identical tokens; median time x" in result.stdout
    assert "DIFFERENT" not in result.stdout


def test_reproducing_says_where_tokens_differ(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "altered")
    rows = list(read_rows(folder / ROWS))
    rows[2]["completion_token_ids"][3] += 1
    (tmp_path / "altered" / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("reproduce", tmp_path / "altered")
    assert result.exit_code == 1
    assert "14 of 15 samples have identical tokens" in result.stdout
    assert result.stdout.count("DIFFERENT") == 1
    assert result.stdout.count("outputs part at new token 3 ") == 1
    assert "in round " in result.stdout
    assert "a bug" in result.stdout


def test_changed_prompts_cannot_be_reproduced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "altered")
    (tmp_path / "altered" / "prompts.jsonl").write_text('{"id": "x", "turns": ["y"]}\n')
    result = invoke("reproduce", tmp_path / "altered")
    assert result.exit_code == 2
    assert "its hash is not the manifest's" in result.stderr


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["sweep", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["sweep", "--drafter", "sufix"], "unknown drafter 'sufix'; did you mean 'suffix'"),
        (["sweep", "--k", "x"], "k cannot be"),
        (["report", "."], "is no run folder"),
        (["reproduce", "nowhere"], "is no run folder"),
        (["import-lab", "."], "holds no result of the lab"),
    ],
)
def test_mistakes_are_one_line(args: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_dry_runs_read_any_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_DRY_RUN", "1")
    monkeypatch.setenv("SPECDEC_CUDA_GRAPH", "1")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Grüße, 世界! " * 200}) + "\n")
    args = ("--drafter", "early_exit:layers=3", "--max-new-tokens", "4", "--iterations", "1", "--out", tmp_path / "dry")
    result = invoke("sweep", "--prompts", tmp_path / "p.jsonl", *args)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("cuda_graph has no effect") == 1
    rows: list[dict[str, Any]] = list(read_rows(tmp_path / "dry" / ROWS))
    assert all(row["success"] and row["synthetic"] for row in rows)


def test_rows_keep_no_round_times_unless_asked(sweep: Callable[..., list[dict[str, Any]]]) -> None:
    assert all(row["round_seconds"] is None for row in sweep())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "specdec_cli", "sweep", "--model", TOY.replace("vocab_size=40,", "")]
    command += ["--k", "2", "--iterations", "500", "--device", "cpu", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        rows = tmp_path / "run" / ROWS
        while process.poll() is None and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, talk = process.communicate()
    assert process.returncode == 130
    assert text == ""
    assert "the same command goes on from there" in talk
    assert f"Stopped: {len(list(read_rows(rows)))} of 10000 samples" in talk
    assert "Traceback" not in talk


def test_a_sweep_of_failures_is_a_report_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("UPPER\n")
    args = ("--model", TOY.replace("40", "28"), "--device", "cpu", "--iterations", "1", "--k", "2")
    result = invoke("sweep", *args, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "1 (1 failed)" in result.stdout
    assert "2 samples failed; their rows say why" in result.stderr
    assert (tmp_path / "run" / "report.html").exists()
