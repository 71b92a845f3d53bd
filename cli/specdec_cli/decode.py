"""`specdec decode`: continue a prompt, show the text as it is committed, and say what it took."""

import dataclasses
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from specdec import registry
from specdec.grammar import Choice
from specdec.registry import parse_controller, parse_drafter, parse_policy
from specdec_cli.options import (
    QUANTIZED,
    SPELLING,
    check_k,
    check_sampling,
    device_options,
    given,
    model_options,
    read_prompt,
    refusals,
    sampling_options,
    spelled,
    spellings,
)

if TYPE_CHECKING:
    from specdec.models.loading import Loaded
    from specdec.run import Job
    from specdec.trace.recorder import Recorder
    from specdec_cli.render import Monitor


# What a model says of the graphs it replays and the drafts made beside it.
_LOGS = ("graph", "draft_graph", "overlap")


class Request(NamedTuple):
    """What was asked for, checked as far as that goes without a model."""

    options: dict[str, Any]
    prompt: str
    drafter: Choice
    policy: Choice
    controller: Choice


@click.command(epilog=spellings())
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from a UTF-8 file.")
@click.option(
    "--model",
    default=registry.DEFAULT_MODEL,
    show_default=True,
    help="Folder, hub id, .gguf file, built-in name, or tabular, a toy.",
)
@click.option(
    "--drafter",
    metavar=SPELLING,
    callback=spelled(parse_drafter),
    help="none, ngram, suffix, model, early_exit; first(A, B) or union(A, B).  "
    f"[default: {registry.DEFAULT_DRAFTER}, or model with --draft-model]",
)
@click.option("--draft-model", metavar="NAME", help="The model of drafter 'model'.")
@click.option(
    "--draft-quantize", type=click.Choice(QUANTIZED), help="As --quantize, for the draft model; the output stays exact."
)
@click.option(
    "--policy",
    metavar=SPELLING,
    callback=spelled(parse_policy),
    help="greedy, lossless, block, match, coupled.  [default: greedy at temperature 0, else lossless]",
)
@click.option(
    "--controller",
    metavar=SPELLING,
    callback=spelled(parse_controller),
    help=f"fixed, adaptive, aimd, expected.  [default: {registry.DEFAULT_CONTROLLER}]",
)
@click.option("--k", type=int, callback=check_k, help="Tokens to draft in a round; the controller's depth, or fixed.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=registry.DEFAULT_MAX_NEW_TOKENS,
    show_default=True,
    help="Limit.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on behind the end of the text.")
@click.option("--chat/--raw", "chat", default=None, help="Use the chat template or not.  [default: if there is one]")
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@sampling_options
@model_options
@device_options
@click.option("--deterministic", is_flag=True, envvar="SPECDEC_DETERMINISTIC", help="Only deterministic operations.")
@click.option("--compare", is_flag=True, help="Decode without drafts, too, and compare.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write what every round decided, for specdec replay.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.pass_context
def decode(ctx: click.Context, /, **options: Any) -> None:
    """Continue PROMPT (- for standard input).

    The text goes to standard output as it is committed, the figures to standard error.
    """
    request = _check(ctx)
    # Only now, so that help and mistakes need not wait for torch.
    from specdec_cli import render

    with render.Monitor(quiet_text=options["as_json"]) as monitor, refusals():
        loaded, jobs = _prepare(request, monitor)
        _run(request, loaded, jobs, monitor)


def _check(ctx: click.Context) -> Request:
    """Everything that can be refused before a model is loaded."""
    options = ctx.params
    check_sampling(ctx)
    if "" in options["stop"]:
        raise click.BadParameter("is empty; give the text to stop at", ctx, param_hint="'--stop'")
    if options["system"] is not None and options["chat"] is False:
        raise click.UsageError("--system is part of the chat template; leave --raw out", ctx)
    policy = registry.choose_policy(options["policy"], options["temperature"])
    drafter = _choose_drafter(ctx, policy)
    default = parse_controller(registry.DEFAULT_CONTROLLER)
    if drafter.names() == ("none",):
        for name in ("k", "controller"):
            if given(ctx, name):
                raise click.UsageError(f"--{name} has no effect with --drafter none; leave it out", ctx)
        # Not a choice on the command line: a controller that has nothing to decide.
        controller = Choice("fixed", {"k": 0})
    else:
        with refusals():
            controller = registry.choose_controller(options["controller"], options["k"], default)
    prompt = read_prompt(ctx, options["prompt"], options["prompt_file"])
    return Request(options, prompt, drafter, policy, controller)


def _choose_drafter(ctx: click.Context, policy: Choice) -> Choice:
    drafter: Choice | None = ctx.params["drafter"]
    if ctx.params["draft_model"] is None:
        return registry.choose_drafter(drafter, policy, ctx.params["k"])
    if drafter is not None and "model" not in drafter.names():
        raise click.UsageError(f"--draft-model has no effect with drafter {drafter}; use --drafter model", ctx)
    return drafter or Choice("model")


def _prepare(request: Request, monitor: "Monitor") -> tuple["Loaded", list["Job"]]:
    """Load what is needed and put the parts together: the job, and that of plain decoding to compare with."""
    options = request.options
    monitor.phase("starting")
    import torch

    from specdec.graphs import with_cuda_graph
    from specdec.models.costs import cached_costs, measure_costs
    from specdec.overlap import accelerated
    from specdec.run import Job
    from specdec.sampling import Sampling
    from specdec.step import check_parts
    from specdec.target import check_length, encode_prompt, load_target
    from specdec.text import build_rule
    from specdec.transforms import Parts
    from specdec.types import Model

    if options["deterministic"]:
        # Read by cuBLAS when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    def costs(model: Model) -> dict[int, float]:
        monitor.phase(f"measuring {model.name}")
        # A toy takes no time to measure, and others of the same name may have another size.
        return measure_costs(model) if model.adapter.startswith("tabular") else cached_costs(model)

    sampling = Sampling(**{name: options[name] for name in Sampling.__dataclass_fields__})
    policy = registry.build_policy(request.policy)
    monitor.phase(f"loading {options['model']}")
    loaded = load_target(options["model"], options, monitor)
    if options["cuda_graph"]:
        loaded = dataclasses.replace(loaded, model=with_cuda_graph(loaded.model))
    prompt = encode_prompt(loaded, request.prompt, chat=options["chat"], system=options["system"])
    check_length(loaded, len(prompt), options["max_new_tokens"])
    drafting = registry.build_drafter(
        request.drafter,
        target=loaded,
        sampling=sampling,
        policy=policy.name,
        draft_name=options["draft_model"],
        load_draft=lambda name: load_target(name, {**options, "quantize": options["draft_quantize"]}, monitor),
    )
    check_parts(loaded.model, drafting.drafter, policy, sampling)
    controller = registry.build_controller(request.controller, target=loaded.model, drafts=drafting.models, costs=costs)
    switches = {name: options[name] for name in ("cuda_graph", "parallel_streams", "sync_mode")}
    job = Job(
        parts=accelerated(Parts(loaded.model, drafting.drafter, policy, controller), **switches),
        prompts=[prompt],
        sampling=sampling,
        rule=build_rule(loaded.tokenizer, stops=options["stop"], hidden=loaded.eos_ids),
        eos_ids=() if options["ignore_eos"] else loaded.eos_ids,
        max_new_tokens=options["max_new_tokens"],
        seeds=options["seed"],
    )
    if not options["compare"]:
        return loaded, [job]
    none = registry.build_drafter(
        Choice("none"), target=loaded, sampling=sampling, policy=policy.name, load_draft=lambda name: loaded
    )
    nothing = registry.build_controller(Choice("fixed", {"k": 0}), target=loaded.model, drafts=(), costs=costs)
    plain = accelerated(Parts(loaded.model, none.drafter, policy, nothing), **switches)
    return loaded, [job, job._replace(parts=plain)]


def _run(request: Request, loaded: "Loaded", jobs: list["Job"], monitor: "Monitor") -> None:
    from specdec import run
    from specdec_cli import render
    from specdec_kernels.profile import profiled

    trace = request.options["trace_profile"]
    recorder = None
    if request.options["trace"] is not None:
        from specdec.trace.recorder import Choices, Recorder

        recorder = Recorder(jobs[0], Choices(str(request.drafter), str(request.policy), str(request.controller)))
        jobs = [recorder.job, *jobs[1:]]
    if len(jobs) > 1:
        monitor.phase("warming up")
        run.warm_up(*jobs)
    monitor.phase("reading the prompt")
    last: dict[int, run.Progress] = {}
    parts: list[str] = []
    try:
        with nullcontext() if trace is None else profiled(loaded.model.device, trace):
            for index, progress in run.decode_together(jobs):
                last[index] = progress
                if index == 0:
                    if recorder is not None:
                        recorder.observe(progress)
                    parts.append(progress.pieces[0])
                    monitor.text(progress.pieces[0])
                    monitor.rounds(progress, request.options["max_new_tokens"])
    finally:
        monitor.end_text()
    if recorder is not None:
        _write_trace(recorder, request.options["trace"])
    graphs = loaded.model.about.get("graph")
    if graphs is not None and graphs.reason is not None:
        click.echo(f"Note: decoded without graphs: {graphs.reason}", err=True)
    report = _report(request, loaded, jobs, last, "".join(parts))
    if request.options["as_json"]:
        click.echo(json.dumps(report))
    else:
        render.print_report(report, loaded.tokenizer)


def _write_trace(recorder: "Recorder", file: Path) -> None:
    from specdec.trace import write_trace

    (trace,) = recorder.traces()
    try:
        write_trace(trace, file)
    except OSError as error:
        raise ValueError(f"cannot write {file} ({error.strerror}); choose another file for --trace") from error
    if len(trace.rounds):
        size = file.stat().st_size
        click.echo(f"Trace: {file}, {size} bytes, {size / len(trace.rounds):.0f} a round", err=True)


def _report(request: Request, loaded: "Loaded", jobs: list["Job"], last: dict[int, Any], text: str) -> dict[str, Any]:
    """The JSON object; the closing table shows the same figures."""
    from specdec import run
    from specdec.divergence import first_divergence
    from specdec.types import implementations
    from specdec_kernels.memory import memory

    job, options = jobs[0], request.options
    tokens = run.token_ids(last[0])
    report: dict[str, Any] = {
        "text": text,
        "prompt_token_ids": list(job.prompts[0]),
        "token_ids": tokens,
        "stop_reason": run.stop_reason(last[0]),
        "model": loaded.name,
        "revision": loaded.revision,
        "adapter": loaded.adapter,
        "adapter_reason": loaded.adapter_reason,
        "drafter": job.parts.drafter.name,
        "policy": job.parts.policy.name,
        "controller": job.parts.controller.name,
        "sampling": {name: options[name] for name in job.sampling.__dataclass_fields__},
        "seed": options["seed"],
        "dtype": str(job.parts.model.dtype).removeprefix("torch."),
        "device": str(job.parts.model.device),
        "deterministic": options["deterministic"],
        "implementations": implementations(job.parts.model),
        "acceleration": {name: str(log) for name, log in job.parts.model.about.items() if name in _LOGS},
        "memory_mb": memory(job.parts.model.device),
        "metrics": run.measured(last[0]),
    }
    if len(jobs) > 1:
        plain, baseline = run.measured(last[1]), run.token_ids(last[1])
        greedy = job.sampling.temperature == 0
        # What two logits are apart explains nothing where a draw decides between them.
        parting = first_divergence(job.parts.model, job.prompts[0], tokens, baseline, job.sampling) if greedy else None
        report["baseline"] = {
            **plain,
            "identical": tokens == baseline,
            # Greedy and coupled decoding choose the same token whatever was drafted. The others only draw from the
            # same law.
            "identity_expected": greedy or job.parts.policy.name == "coupled",
            "first_divergence": None if parting is None else parting._asdict(),
            "speedup": report["metrics"]["tokens_per_s"] / plain["tokens_per_s"],
        }
    return report
