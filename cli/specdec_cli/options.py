"""Options that commands share: types that parse what was typed, and checks that need no model."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from specdec import registry
from specdec.grammar import Choice
from specdec.models.report import one_line

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
ADAPTERS = ("auto", "decoder", "huggingface")
QUANTIZED = ("fp16", "bf16", "int8", "int4")

# Without temperature there is no law to truncate. The repetition penalty moves the most likely token, too.
_SAMPLING_ONLY = ("top_k", "top_p", "min_p")

F = TypeVar("F", bound=Callable[..., Any])


SPELLING = "NAME[:KEY=VALUE,...]"


def spelled(read: Callable[[str], Choice]) -> Callable[[click.Context, click.Parameter, str | None], Choice | None]:
    """The callback of an option that is spelled as in `specdec.grammar`."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Choice | None:
        try:
            return None if value is None else read(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return callback


def spellings() -> str:
    """What can be chosen, for the end of a help page."""
    lines = ["\b"]
    for title, entries in (
        ("Drafters", registry.DRAFTERS | registry.COMBINATIONS),
        ("Policies", registry.POLICIES),
        ("Controllers", registry.CONTROLLERS),
    ):
        lines.append(f"{title}:")
        for name, entry in entries.items():
            lines.append(f"  {name:11} {entry.about}")
            lines += [f"  {'':11} {name}:{','.join(f'{key}=' for key in entry.settings)}"] if entry.settings else []
    return "\n".join(lines)


class Refusal(click.ClickException):
    """A mistake of the user's that the library found; shown in one line."""

    exit_code = 2


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the library refuses into one line for the user."""
    try:
        yield
    except ValueError as error:
        raise Refusal(one_line(error, limit=600)) from error
    except (RuntimeError, MemoryError) as error:
        # Accelerators have a class of their own for it, the host a plain RuntimeError.
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError") and "can't allocate memory" not in str(
            error
        ):
            raise
        raise Refusal(f"out of memory ({one_line(error, limit=200)}); use a smaller model or --dtype") from error


def model_options(command: F) -> F:
    """Which model, and how it is run."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Let transformers run code that comes with the model."),
        click.option(
            "--adapter", type=click.Choice(ADAPTERS), default="auto", show_default=True, help="What runs the model."
        ),
        click.option(
            "--quantize",
            type=click.Choice(QUANTIZED),
            help="Keep the weights in this format (CPU kernels; the arithmetic stays exact for it).",
        ),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or mps."),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            envvar="SPECDEC_DTYPE",
            show_envvar=True,
            help="Type of the weights; auto is float32 on the CPU, else the checkpoint's.",
        ),
    ):
        command = option(command)
    return command


def device_options(command: F) -> F:
    """How a device is driven, and what is recorded of it."""
    for option in (
        click.option(
            "--trace-profile",
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            help="Write a Chrome trace of the decoding (for Perfetto); slows it down.",
        ),
        click.option(
            "--sync-mode",
            type=click.Choice(("event", "barrier")),
            default="event",
            show_default=True,
            envvar="SPECDEC_SYNC_MODE",
            help="How --parallel-streams keeps order.",
        ),
        click.option(
            "--parallel-streams/--one-stream",
            default=True,
            show_default=True,
            envvar="SPECDEC_PARALLEL_STREAMS",
            help="With --cuda-graph: draft while the target verifies.",
        ),
        click.option(
            "--cuda-graph",
            is_flag=True,
            envvar="SPECDEC_CUDA_GRAPH",
            show_envvar=True,
            help="Replay forwards and drafting loops as CUDA graphs.",
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: F) -> F:
    """How tokens are drawn."""
    for option in (
        click.option(
            "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of all randomness."
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            default=1.0,
            show_default=True,
            help="Divide the logits of tokens that stand in the text.",
        ),
        click.option(
            "--min-p", type=float, default=0.0, show_default=True, help="Keep tokens of this share of the best one's."
        ),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Keep the smallest set of this probability."
        ),
        click.option(
            "--top-k", type=int, default=0, show_default=True, help="Keep the k most likely tokens; 0 keeps all."
        ),
        click.option(
            "--temperature",
            type=float,
            default=0.0,
            show_default=True,
            callback=_check_temperature,
            help="0 takes the most likely token.",
        ),
    ):
        command = option(command)
    return command


def check_sampling(ctx: click.Context) -> None:
    """Refuse options that could not have an effect at temperature 0."""
    if ctx.params["temperature"] > 0:
        return
    for name in _SAMPLING_ONLY:
        if given(ctx, name):
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(
                f"{flag} has no effect at temperature 0; set --temperature, or leave {flag} out", ctx
            )


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user set a parameter, on the command line or in the environment."""
    source = ctx.get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def check_k(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise click.BadParameter(f"must be at least 1, got {value}; for plain decoding use --drafter none")
    return value


def read_prompt(ctx: click.Context, argument: str | None, file: Path | None) -> str:
    """The prompt: the argument, standard input for `-`, or the file; one final line break does not count."""
    if (argument is None) == (file is None):
        found = "none was given" if argument is None else "both were given"
        raise click.UsageError(f"give a prompt, - for standard input, or --prompt-file FILE ({found})", ctx)
    try:
        if file is not None:
            prompt = file.read_bytes().decode("utf-8")
        elif argument == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8")
        else:
            prompt = argument or ""
            prompt.encode("utf-8")
    except OSError as error:
        raise click.BadParameter(f"cannot read {file} ({error.strerror})", ctx, param_hint="'--prompt-file'") from error
    except UnicodeError as error:
        raise click.UsageError("the prompt is not UTF-8 text; convert it", ctx) from error
    if file is not None or argument == "-":
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt.strip():
        raise click.UsageError("the prompt is empty; give at least one word", ctx)
    return prompt


def _check_temperature(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise click.BadParameter(f"must be a finite number >= 0, got {value:g}")
    return value


def spec_bench_only(metrics: str | None) -> str:
    """The metrics to print with `--spec-bench-compat`; raises `ValueError` when others are asked for."""
    if metrics not in (None, "spec-bench"):
        raise ValueError(f"--spec-bench-compat prints Spec-Bench's metrics; leave out --metrics {metrics}")
    return "spec-bench"
