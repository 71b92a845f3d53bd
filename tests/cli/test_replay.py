"""`--trace`, `specdec replay` and `specdec what-if`, from end to end on the toy."""

import hashlib
import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from specdec.trace import read_trace, write_trace
from specdec_cli.main import cli


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


def decode(file: Path, *args: str) -> dict[str, object]:
    done = invoke("decode", "abc abc abc", "--model", "tabular", "--json", "--trace", str(file), *args)
    assert done.exit_code == 0, done.stderr
    assert "a round" in done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_decode_writes_a_trace_that_replays(tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    found = decode(file, "--temperature", "0.8", "--drafter", "model", "--k", "3", "--max-new-tokens", "20")
    assert read_trace(file).emitted.tolist() == found["token_ids"]
    done = invoke("replay", str(file))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("identical")
    assert json.loads(invoke("replay", str(file), "--json").stdout)["identical"] is True


def test_a_changed_trace_fails_with_its_first_divergence(tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    decode(file, "--drafter", "ngram", "--k", "3", "--max-new-tokens", "20")
    trace = read_trace(file)
    trace.emitted[4] += 1
    write_trace(trace, file)
    done = invoke("replay", str(file), "--json")
    assert done.exit_code == 1
    first = json.loads(done.stdout)["first_divergence"]
    assert first["position"] == 4
    assert {"round", "token", "other", "margin", "noise", "numerics", "reason"} <= first.keys()
    shown = invoke("replay", str(file))
    assert shown.exit_code == 1
    assert "DIFFERENT" in shown.stdout
    file.write_bytes(file.read_bytes()[:200])
    torn = invoke("replay", str(file))
    assert torn.exit_code == 2
    assert len(torn.stderr.strip().splitlines()) == 1


def test_what_if_tells_what_decode_then_does(tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    decode(file, "--drafter", "ngram", "--k", "3", "--max-new-tokens", "30")
    found = json.loads(invoke("what-if", str(file), "--k", "1", "--k", "6", "--json").stdout)
    for outcome, k in zip(found, ("1", "6"), strict=True):
        real = decode(tmp_path / "other.npz", "--drafter", "ngram", "--k", k, "--max-new-tokens", "30")
        assert outcome["kind"] == "exact"
        assert outcome["rounds"]["value"] == real["metrics"]["rounds"]  # type: ignore[index]
    shown = invoke("what-if", str(file), "--controller", "aimd", "--drafter", "suffix")
    assert "…" not in shown.stdout
    assert shown.exit_code == 0, shown.stderr
    assert "exact" in shown.stdout
    assert "predicted" in shown.stdout


def test_a_sweep_leaves_a_trace_a_sample(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("hello\nabc abc\n")
    folder = tmp_path / "run"
    args = ["--model", "tabular", "--prompts", str(prompts), "--max-new-tokens", "8", "--iterations", "1"]
    args += ["--drafter", "ngram", "--k", "2,3", "--batch-size", "2", "--out", str(folder), "--trace", "--warmup", "0"]
    done = invoke("sweep", *args)
    assert done.exit_code == 0, done.stderr
    files = sorted((folder / "traces").glob("*.npz"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(files) == len(rows) == 6
    assert invoke("replay", *map(str, files)).exit_code == 0
    listed = json.loads((folder / "MANIFEST.json").read_text())["artifacts"]
    for file in files:
        assert listed[f"traces/{file.name}"] == hashlib.sha256(file.read_bytes()).hexdigest()
    texts = {tuple(row["completion_token_ids"]) for row in rows}
    assert {tuple(np.asarray(read_trace(file).emitted).tolist()) for file in files} == texts
