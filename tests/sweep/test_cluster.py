"""Sweeps on Ray: the rows of a plain run, whatever happens to the workers."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from specdec.sweep import runner
from specdec.sweep.cluster import Cluster, _connect, _finish, on_ray
from specdec.sweep.config import Config
from specdec.sweep.journal import ROWS, read_rows
from specdec.sweep.measure import Sample
from specdec.sweep.prompts import Prompt
from specdec.sweep.row import without_timing
from specdec.sweep.runner import Work, run_sweep
from specdec.sweep.samples import read_run
from specdec.sweep.stats import summarize_run
from specdec.sweep.traces import TRACES
from specdec_cli.main import cli

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a worker leaves word of its death; the first worker to decode kills itself while this is missing."""
    return tmp_path_factory.mktemp("cluster") / "killed"


@pytest.fixture(scope="module")
def ray(marker: Path) -> Iterator[Any]:
    """Two workers on this machine."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = str(marker)

    # Defined here, so that it travels by value: workers cannot import tests.
    def die_once() -> None:
        import os
        import signal

        from specdec.sweep import runner

        honest = runner.decode_samples

        def decode(*args: Any) -> Any:
            rows = honest(*args)
            try:
                # Exclusive, so that one worker dies and not two; in the middle of its task, which has two turns.
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return rows
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        runner.decode_samples = decode

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=80 * 2**20,
        runtime_env={"worker_process_setup_hook": die_once},
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> Config:
    questions = [{"question_id": place, "category": "c", "turns": ["hello", "again"]} for place in range(5)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    return make_config(
        model="tabular:seed=3",
        drafter=["suffix", "model"],
        temperature=1,
        prompts=str(tmp_path / "q.jsonl"),
        trace=True,
    )


def stable(folder: Path) -> list[str]:
    return sorted(json.dumps(without_timing(row)) for row in read_rows(folder / ROWS))


def test_rows_are_those_of_a_plain_run_though_a_worker_was_killed(
    ray: Any, config: Config, tmp_path: Path, marker: Path
) -> None:
    marker.unlink(missing_ok=True)
    plan = run_sweep(config, tmp_path / "ray", execute=on_ray(Cluster()))
    assert marker.exists()
    run_sweep(config, tmp_path / "plain")
    assert plan.total == 30 == len(list(read_rows(tmp_path / "ray" / ROWS)))
    assert stable(tmp_path / "ray") == stable(tmp_path / "plain")
    traces = [sorted(path.name for path in (tmp_path / name / TRACES).iterdir()) for name in ("ray", "plain")]
    assert traces[0] == traces[1]
    assert len(traces[0]) == 30


def test_times_on_a_shared_machine_make_no_speedups(
    ray: Any, make_config: MakeConfig, tmp_path: Path, marker: Path
) -> None:
    marker.touch()
    for name, cpus in (("shared", 1.0), ("alone", 2.0)):
        run_sweep(make_config(), tmp_path / name, execute=on_ray(Cluster(cpus=cpus)))
    shared, alone = (summarize_run(read_run(tmp_path / name))[1] for name in ("shared", "alone"))
    assert (shared.shared, shared.speedup, shared.tokens_per_sec.n) == (3, None, 0)
    assert all(category.speedup is None for category in shared.categories.values())
    assert shared.counts == alone.counts
    assert (alone.shared, alone.tokens_per_sec.n) == (0, 3)
    assert alone.speedup is not None


def test_a_sweep_goes_on_with_or_without_a_cluster(
    ray: Any, make_config: MakeConfig, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker.touch()
    honest, config = runner.decode_samples, make_config(batch_size=2)
    batches: list[object] = []

    def interrupted(*args: Any) -> Any:
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(runner, "decode_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, tmp_path / "run")
    plan = run_sweep(config, tmp_path / "run", execute=on_ray(Cluster()))
    rows = list(read_rows(tmp_path / "run" / ROWS))
    assert (plan.done, len(rows)) == (4, 6)
    assert [row["shared_machine"] for row in rows] == [False] * 4 + [True] * 2


def test_a_task_that_keeps_losing_its_worker_is_tried_again_last_and_then_named(ray: Any) -> None:
    prompts = [Prompt(name, "c", (name,)) for name in ("good", "large", "never")]
    chunks = [(Work(0, (Sample(0, prompt, 0, 0),)),) for prompt in prompts]
    tried: list[str] = []

    def submit(chunk: Any) -> Any:
        name = chunk[0].samples[0].prompt.id
        tried.append(name)
        lost = name == "never" or (name == "large" and tried.count(name) == 1)
        return died.remote() if lost else ray.put(name)

    @ray.remote(max_retries=0)
    def died() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    found: list[Any] = []
    with pytest.raises(ValueError, match=r"^1 tasks lost their workers.*prompt 'never', iteration 0"):
        found.extend(_finish(ray, submit, chunks))
    assert sorted(found) == ["good", "large"]
    assert (tried[:3], sorted(tried[3:])) == (["good", "large", "never"], ["large", "never"])


def test_a_task_that_no_machine_can_hold_is_refused(ray: Any, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no machine of the cluster has the 3 CPU of a task; lower --ray-cpus"):
        run_sweep(make_config(), tmp_path / "run", execute=on_ray(Cluster(cpus=3.0)))


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with socket.socket() as taken:
        # Bound and not listening: connections are refused.
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match=r"cannot use a Ray cluster at '127.0.0.1:.*give the address"):
            _connect(import_module("ray"), f"127.0.0.1:{taken.getsockname()[1]}")


def test_without_ray_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(cli, ["sweep", "--dry-run", "--ray"])
    assert result.exit_code == 2
    assert result.stderr == "Error: --ray needs Ray: pip install 'specdec-lab[ray]'\n"
