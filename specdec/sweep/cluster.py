"""Decoding the batches of a sweep on Ray: on the cores or GPUs of this machine, or of a cluster.

The turns of a block of prompts in one cell are a task, because a turn needs the cell's answers before it. Workers hold
the models and give rows back; this process alone writes. A task whose worker dies is run again.
"""

import os
import socket
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from specdec.sweep.bench import Bench, Prepared, describe, prepare
from specdec.sweep.config import Config
from specdec.sweep.grid import expand
from specdec.sweep.prompts import Prompt
from specdec.sweep.runner import Answers, Done, Execute, Work, answer_of, decode_work, is_done, warm_up_cell

# Times that Ray runs a task again before it is put behind all others, and before it is given up.
_RETRIES = 3
# What must be alike wherever a cell is decoded.
_ALIKE = ("dtype", "device", "file_hashes", "tokenizer_sha256")


class Cluster(NamedTuple):
    """`address`: of a running cluster, `auto` to look for one, `local` to start one on this machine. A task takes
    `cpus` cores and `gpus` GPUs (a share below 1 lets several use one; `None`: one where the model is on one)."""

    address: str = "local"
    cpus: float = 1.0
    gpus: float | None = None


class _Setting(NamedTuple):
    """What a worker needs to make the parts of the cells. `models`: what is `_ALIKE`, as the sweep began."""

    config: Config
    costs: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    models: str
    first: Prompt


def on_ray(cluster: Cluster) -> Execute:
    """What decodes for `run_sweep` on a Ray cluster; raises `ValueError` when Ray is missing, cannot be reached, or has
    no machine large enough for a task.

    Rows of tasks that may have run beside others on their machine are marked `shared_machine`. Tokens are those of a
    run without Ray. A connection that is open already is used, and left open.
    """
    ray = _import_ray()

    def execute(
        bench: Bench, config: Config, prompts: Sequence[Prompt], works: Iterable[Work], answers: Answers
    ) -> Iterator[Done]:
        chunks = list(_chunks(bench, works, answers))
        if not chunks:
            return
        own = not ray.is_initialized()
        if own:
            _connect(ray, cluster.address)
        try:
            needs = _needs(cluster, bench)
            _check_room(ray.nodes(), needs)
            setting = ray.put(_setting(bench, config, prompts[0]))
            task = ray.remote(_decode_chunk).options(
                num_cpus=needs.get("CPU", 0), num_gpus=needs.get("GPU", 0), max_retries=_RETRIES
            )

            def submit(chunk: Sequence[Work]) -> Any:
                return task.remote(setting, chunk, _known(bench, chunk, answers))

            for address, done in _finish(ray, submit, chunks):
                # A machine that came and went is not known to have been empty.
                shared = _room(ray.nodes(), needs).get(address, 2) > 1
                for batch in done:
                    yield batch._replace(rows=[row.model_copy(update={"shared_machine": shared}) for row in batch.rows])
        finally:
            if own:
                ray.shutdown()

    return execute


def _import_ray() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'specdec-lab[ray]'") from None


def _connect(ray: Any, address: str) -> None:
    # Ray reports its use over the network unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"include_dashboard": False} if address == "local" else {}
    try:
        _knock(address)
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot use a Ray cluster at {address!r} ({reason}); give the address that 'ray start' printed, "
            "or --ray alone for one on this machine"
        ) from error


def _knock(address: str) -> None:
    """Raise `OSError` when nobody listens at a host and port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


def _finish(
    ray: Any, submit: Callable[[Sequence[Work]], Any], chunks: Sequence[Sequence[Work]]
) -> Iterator[tuple[str, list[Done]]]:
    """The results of all chunks as they come, with the address of their machine.

    A chunk that keeps losing its worker gets another chance when the others are done: what a full machine could not
    hold, an empty one may. Raises `ValueError` for what is lost even then, after all the rest.
    """
    lost = list(chunks)
    for _ in range(2):
        pending, lost = {submit(chunk): chunk for chunk in lost}, []
        try:
            while pending:
                (ready,), _ = ray.wait(list(pending), num_returns=1)
                chunk = pending.pop(ready)
                try:
                    found = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except (
                    ray.exceptions.WorkerCrashedError,
                    ray.exceptions.NodeDiedError,
                    ray.exceptions.OutOfMemoryError,
                    ray.exceptions.ObjectLostError,
                ):
                    lost.append(chunk)
                else:
                    yield found
        finally:
            for reference in pending:
                ray.cancel(reference)
    if lost:
        sample = lost[0][0].samples[0]
        raise ValueError(
            f"{len(lost)} tasks lost their workers again and again (the first: prompt {sample.prompt.id!r}, iteration "
            f"{sample.iteration}); all other rows are stored. Give tasks more with --ray-cpus and run the same command"
        )


def _chunks(bench: Bench, works: Iterable[Work], answers: Answers) -> Iterator[tuple[Work, ...]]:
    """The batches that belong to one cell and block of prompts, in order, unless all of them are done."""
    widest = max(prepared.cell.batch_size for prepared in bench.cells)
    chunks: dict[Hashable, list[Work]] = {}
    for work in works:
        first = work.samples[0]
        chunks.setdefault((work.cell, first.iteration, first.place // widest), []).append(work)
    for chunk in chunks.values():
        cell = bench.cells[chunk[0].cell].cell
        if not all(is_done(work, cell, answers) for work in chunk):
            yield tuple(chunk)


def _known(bench: Bench, chunk: Sequence[Work], answers: Answers) -> Answers:
    """The stored answers to the turns of a chunk."""
    cell = bench.cells[chunk[0].cell].cell.id
    keys = [(cell, sample.iteration, sample.prompt.id, sample.turn) for work in chunk for sample in work.samples]
    return {key: answers[key] for key in keys if key in answers}


def _decode_chunk(setting: _Setting, chunk: Sequence[Work], answers: Answers) -> tuple[str, list[Done]]:
    """The task: what is missing of a chunk, and the address of the machine that decoded it."""
    prepared = _ready(setting, chunk[0].cell)
    known, found = dict(answers), []
    for work in chunk:
        if not is_done(work, prepared.cell, known):
            done = decode_work(prepared, work, setting.config, known)
            known |= {row.key: answer_of(row) for row in done.rows if row.key not in known}
            found.append(done)
    return _import_ray().util.get_node_ip_address(), found


@cache
def _ready(setting: _Setting, index: int) -> Prepared:
    """A warm cell; once in a worker."""
    prepared = _bench(setting).cells[index]
    for _ in range(setting.config.warmup):
        warm_up_cell(prepared, setting.first, setting.config)
    return prepared


@cache
def _bench(setting: _Setting) -> Bench:
    """The parts of all cells, loaded once in a worker; raises `ValueError` when they are not those of the sweep."""
    costs = {name: dict(seconds) for name, seconds in setting.costs}
    bench = prepare(setting.config, expand(setting.config), costs=costs)
    if (found := _models(bench)) != setting.models:
        raise ValueError(
            f"a worker has other weights, another device or another type ({found}) than the sweep began with "
            f"({setting.models}); give all machines the same files, and state --device and --dtype"
        )
    return bench


def _setting(bench: Bench, config: Config, first: Prompt) -> _Setting:
    costs = tuple((name, tuple(seconds.items())) for name, seconds in bench.costs.items())
    return _Setting(config, costs, _models(bench), first)


def _models(bench: Bench) -> str:
    facts = {name: describe(loaded) for name, loaded in bench.models.items()}
    return "; ".join(f"{name}: {', '.join(str(fact[key]) for key in _ALIKE)}" for name, fact in facts.items())


def _needs(cluster: Cluster, bench: Bench) -> dict[str, float]:
    """What a task takes of a machine."""
    on_gpu = any(loaded.model.device.type == "cuda" for loaded in bench.models.values())
    gpus = cluster.gpus if cluster.gpus is not None else float(on_gpu)
    return {name: amount for name, amount in (("CPU", cluster.cpus), ("GPU", gpus)) if amount}


def _room(nodes: Iterable[Mapping[str, Any]], needs: Mapping[str, float]) -> dict[str, int]:
    """How many tasks each machine can hold at a time, by its address."""
    room: dict[str, int] = {}
    for node in nodes:
        if node["Alive"]:
            fits = min(int(node["Resources"].get(name, 0) / amount) for name, amount in needs.items())
            room[node["NodeManagerAddress"]] = room.get(node["NodeManagerAddress"], 0) + fits
    return room


def _check_room(nodes: Sequence[Mapping[str, Any]], needs: Mapping[str, float]) -> None:
    if not any(_room(nodes, needs).values()):
        asked = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
        raise ValueError(f"no machine of the cluster has the {asked} of a task; lower --ray-cpus or --ray-gpus")
