"""The kernel benchmark on a machine without a GPU: what it says, and what a run that is cut short leaves."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kernels.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_on_the_cpu_the_definitions_are_timed_and_it_says_so(tmp_path):
    done = run("--op", "suffix_match", "--quick", "--out", str(tmp_path / "table"))
    assert done.returncode == 0, done.stderr
    assert "on cpu the torch definitions alone are timed" in done.stderr
    report = json.loads((tmp_path / "table.json").read_text())
    assert (report["done"], report["cases"]) == (2, 2)
    assert {row["implementation"] for row in report["rows"]} == {"torch"}
    for row in report["rows"]:
        assert row["note"] == ""
        assert row["calls"] >= 5
        assert 0 < row["low_us"] <= row["us"] <= row["high_us"]
        assert row["floor_us"] == pytest.approx(1e6 * 8 * row["b"] * row["c"] / (1e9 * report["copy_gb_s"]))
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["op"] for row in rows] == ["suffix_match"] * 2
    assert (tmp_path / "table.md").read_text() == done.stdout


def test_a_run_without_time_leaves_a_table_that_says_how_far_it_came(tmp_path):
    done = run("--seconds", "0", "--out", str(tmp_path / "table"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "table.json").read_text())
    assert report["done"] == 0 < report["cases"]
    assert report["rows"] == []
    assert f"0 of {report['cases']} cases" in done.stdout


def test_an_operation_without_cases_is_refused_in_one_line():
    done = run("--op", "conv")
    assert done.returncode == 2
    assert "no cases for conv; there are verify_greedy, " in done.stderr


def test_a_device_that_is_not_there_is_refused_in_one_line():
    done = run("--device", "cuda:999")
    assert done.returncode == 2
    assert "device 'cuda:999' is not available (" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tree_without_history_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_COMMIT", "0123abc")
    done = run("--seconds", "0", "--out", str(tmp_path / "table"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "table.json").read_text())["provenance"]
    # Whether it was changed nobody knows: git would speak of another tree.
    assert (found["commit"], found["dirty"]) == ("0123abc", None)
