"""The earlier lab's files, with what their rows correct."""

import csv
import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from specdec.sweep.lab import read_lab
from specdec.sweep.summary import LAB_COLUMNS
from specdec_cli.main import cli


def detailed(k: int, proposed: int, accepted: int, tokens: int = 32, latency: float = 4000.0) -> dict[str, Any]:
    return {
        "k": k,
        "proposed": proposed,
        "accepted": accepted,
        "completion_token_count": tokens,
        "latency_ms": latency,
        "success": True,
    }


def write_json(folder: Path) -> None:
    stored = {
        "system_info": {"device": "mps", "dtype": "float16"},
        "summary_results": [
            {"k": k, "tokens_per_sec_mean": 8.0, "acceptance_rate_mean": 0.858, "n_samples": 2} for k in (1, 2)
        ],
        "detailed_results": [
            row for k in (1, 2) for row in (detailed(k, 24, 10), detailed(k, 28, 18), {"k": k, "success": False})
        ],
        "detailed_metrics": {},
    }
    (folder / "run.json").write_text(json.dumps(stored))


def test_our_own_summaries_are_no_results_of_the_lab(tmp_path: Path) -> None:
    write_json(tmp_path)
    (tmp_path / "summary.csv").write_text("k,tokens_per_sec_mean,cell\n1,2.0,suffix k=1\n")
    stored = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**stored, "metric_definitions": {}}))
    assert [run.file.name for run in read_lab(tmp_path)] == ["run.json"]
    shown = CliRunner().invoke(cli, ["import-lab", str(tmp_path)])
    assert f"## {tmp_path / 'run.json'} (" in shown.stdout


def test_rows_correct_the_stated_figures(tmp_path: Path) -> None:
    write_json(tmp_path)
    (run,) = read_lab(tmp_path)
    assert run.about == "mps · float16"
    line = run.lines[0]
    assert (line.k, line.used_k, line.samples, line.failures) == (1, 4, 3, 1)
    assert line.stated_acceptance == 0.858
    assert line.acceptance == 28 / 52
    assert line.tokens_per_sec == 8.0
    notes = " ".join(run.notes)
    assert "K = 1: all drafted counts are multiples of 4, so K = 4 was used" in notes
    assert "acceptance was stated as 85.8%; accepted / drafted over all rows is 53.8%" in notes
    assert "all requested K drafted alike" in notes
    assert "there is no plain baseline" in notes


def test_summaries_alone_are_shown_with_their_doubts(tmp_path: Path) -> None:
    with (tmp_path / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, LAB_COLUMNS)
        writer.writeheader()
        for k in (1, 2, 3):
            writer.writerow(
                {"k": k, "n_samples": 10, "tokens_per_sec_mean": 9, "proposed_mean": 32, "accepted_mean": 5}
            )
    (run,) = read_lab(tmp_path / "summary.csv")
    assert [line.k for line in run.lines] == [1, 2, 3]
    assert run.lines[0].tokens_per_sec is None
    assert run.lines[0].acceptance == 5 / 32
    assert "K did not reach the controller" in " ".join(run.notes)


def test_the_command_prints_table_and_corrections(tmp_path: Path) -> None:
    write_json(tmp_path)
    (tmp_path / "other.json").write_text("[]")
    result = CliRunner().invoke(cli, ["import-lab", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"## {tmp_path / 'run.json'} (mps · float16)" in result.stdout
    assert "53.8%" in result.stdout
    assert "- not recorded: model names" in result.stdout
