"""The validation script runs where no GPU is, and keeps what it has when a section fails."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_validation.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_validation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    # A dataclass looks its module up.
    sys.modules["gpu_validation"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["gpu_validation"]


def invoke(script, *words):
    return CliRunner().invoke(script.main, list(map(str, words)))


def test_the_dry_run_reaches_every_section(script, tmp_path):
    names = [name for name in script.SECTIONS if name not in ("tests", "kernels")]
    done = invoke(script, "--dry", "--out", tmp_path, "--only", ",".join(names), "--seconds", 300)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "gpu_validation.json").read_text())["sections"]
    assert list(found) == names
    for name, entry in found.items():
        assert entry["rows"], name
        assert "error" not in entry, entry
        assert not [row for row in entry["rows"] if "error" in row], name
    assert all(row["tokens_identical"] for row in found["ablation"]["rows"])
    assert all(row["text_is_the_target's"] for row in found["synthetic"]["rows"] if "speedup" in row)
    assert all(row["same_tokens_as_graph"] for row in found["plain"]["rows"] if "same_tokens_as_graph" in row)
    page = (tmp_path / "gpu_validation.md").read_text()
    assert all(f"## {name}" in page for name in names)


def test_a_section_that_fails_leaves_the_others(script, tmp_path, monkeypatch):
    def failing(context):
        """Fails."""
        yield {"row": 1}
        raise RuntimeError("the device is gone")

    sections = {"first": (failing, 1.0), "second": (script.doctor, 1.0)}
    monkeypatch.setattr(script, "SECTIONS", sections)
    done = invoke(script, "--dry", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "gpu_validation.json").read_text())["sections"]
    assert found["first"]["rows"] == [{"row": 1}]
    assert "the device is gone" in found["first"]["error"]
    assert found["second"]["rows"]
    assert "1 with errors" in done.output


def test_time_that_has_run_out_is_said(script, tmp_path):
    invoke(script, "--dry", "--out", tmp_path, "--only", "machine,targets", "--seconds", 0)
    found = json.loads((tmp_path / "gpu_validation.json").read_text())["sections"]
    assert [entry["skipped"] for entry in found.values()] == ["no time left", "no time left"]


def test_unknown_sections_and_missing_devices_are_refused(script, tmp_path):
    done = invoke(script, "--dry", "--out", tmp_path, "--only", "speed")
    assert done.exit_code == 2
    assert "'speed' is no section" in done.output
    if not script.torch.cuda.is_available():
        assert "--dry" in invoke(script, "--out", tmp_path).output
