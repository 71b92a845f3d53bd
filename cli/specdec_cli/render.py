"""What a person sees: text on standard output; on standard error a line while they wait, and figures at the end."""

import os
import stat
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import click
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from specdec.run import Progress


class Monitor:
    """The text, and one transient line about what is going on.

    The line is there only if standard error is a terminal, and makes room for the text if that may go there, too.
    Calling the monitor reports progress of a download or conversion (`specdec.models.report.Progress`).
    """

    def __init__(self, *, quiet_text: bool = False) -> None:
        console = Console(stderr=True)
        # Redirecting would send the text to standard error.
        self._line = Live(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._shown = console.is_terminal
        self._quiet_text = quiet_text
        self._shares_terminal = not quiet_text and _may_reach_terminal(sys.stdout)
        self._ends_line = True
        # A text may hold characters that the terminal's encoding lacks.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")

    def __enter__(self) -> Self:
        if self._shown:
            self._line.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.phase(f"{stage} {100 * done // total} %" if total else stage)

    def phase(self, text: str) -> None:
        """Say what is being done."""
        if self._shown:
            self._line.update(Spinner("dots", Text(text, style="dim")))

    def text(self, piece: str) -> None:
        """Print the next piece of the text at once."""
        if not piece or self._quiet_text:
            return
        if self._shares_terminal:
            self._line.stop()
            self._shown = False
        click.echo(piece, nl=False)
        self._ends_line = piece.endswith("\n")

    def rounds(self, progress: "Progress", limit: int) -> None:
        """Say how far the decoding is."""
        emitted, seconds = progress.emitted, progress.seconds.get("total", 0.0)
        if self._shown and seconds:
            rounds = max(1, int(progress.state.round[0]))
            self.phase(
                f"{emitted}/{limit} tokens · {emitted / seconds:.1f} tok/s · {emitted / rounds:.2f} tokens a round"
            )

    def end_text(self) -> None:
        """End the last line of the text, and take the line about it away."""
        self._line.stop()
        if not self._ends_line:
            click.echo()
            self._ends_line = True


def _may_reach_terminal(stream: TextIO) -> bool:
    """Whether what is written may show up in a terminal: at once, or behind a pipe (`| head`)."""
    try:
        return stream.isatty() or stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def print_report(report: Mapping[str, Any], tokenizer: Any) -> None:
    """The closing table of `specdec decode`."""
    metrics, baseline = report["metrics"], report.get("baseline")
    table = _figures(["", *(["speculative", "plain"] if baseline else [""])])
    runs = [metrics, *([baseline] if baseline else [])]
    for label, cells in zip(_LABELS, zip(*map(_cells, runs), strict=True), strict=True):
        if any(cells):
            table.add_row(label, *cells)
    console = Console(stderr=True, highlight=False)
    console.print()
    console.print(table)
    weights = report["implementations"].get("weights", "fp32")
    kept = "" if weights == "fp32" else f" over {weights} weights"
    setup = (
        f"{report['model']} · {report['adapter']} · {report['dtype']}{kept} on {report['device']} · "
        f"drafter {report['drafter']} · policy {report['policy']} · controller {report['controller']} · "
        f"{_ENDINGS[report['stop_reason']]}"
    )
    console.print(Text(setup, style="dim"), soft_wrap=True)
    if baseline:
        for line in _verdict(baseline, tokenizer):
            console.print(line, soft_wrap=True)


_LABELS = (
    "tokens",
    "tokens/s",
    "  rounds alone",
    "rounds",
    "target forwards",
    "accepted drafts",
    "  by position",
    "time",
    "  prefill",
    "  draft",
    "  verify",
    "  accept",
    "  other",
)


def _cells(run: Mapping[str, Any]) -> tuple[str, ...]:
    """One run's column."""
    rate, wall = run["acceptance_rate"], run["wall_s"]
    positions = " ".join(f"{share:.0%}" for share in run["per_position"])
    return (
        str(run["emitted"]),
        f"{run['tokens_per_s']:.1f}",
        _format(run["decode_tokens_per_s"], ".1f"),
        f"{run['rounds']} ({_format(run['mean_accepted_length'], '.2f')} tokens each)",
        f"{run['target_forwards']} ({_format(run['tokens_per_forward'], '.2f')} tokens each)",
        "" if rate is None else f"{run['accepted']} of {run['drafted']} ({rate:.0%})",
        positions,
        f"{wall:.2f} s",
        *(f"{run[f'{phase}_s']:.2f} s ({run[f'{phase}_s'] / wall:.0%})" for phase in _PHASES),
    )


_ENDINGS = {"eos": "ended by the model", "length": "ended by the limit", "stop_string": "ended by a stop string"}
_PHASES = ("prefill", "draft", "verify", "accept", "other")


def _verdict(baseline: Mapping[str, Any], tokenizer: Any) -> list[Text]:
    """How the two outputs and their speeds compare."""
    speed = Text(f"{baseline['speedup']:.2f} times the speed of plain decoding", style="bold")
    parting = baseline["first_divergence"]
    if baseline["identical"]:
        return [speed, Text("the tokens are identical", style="green")]
    if not baseline["identity_expected"]:
        return [speed, Text("the tokens differ, as they may: both are draws from the same law")]
    if parting is None:
        return [speed, Text("the tokens differ: rounding has turned a choice between two close noisy logits")]
    one, other = (
        "the end" if token is None else repr(tokenizer.decode([token]))
        for token in (parting["token"], parting["other"])
    )
    found = (
        f"the tokens differ first at new token {parting['position']}: {one} instead of {other}; the two largest logits "
        f"are {parting['margin']:.2g} apart there, and rounding moves them by {parting['noise']:.2g}: "
    )
    if parting["numerics"]:
        return [speed, Text(found + "either is right", style="yellow")]
    return [speed, Text(found + "this is a bug", style="red")]


def _figures(columns: Sequence[str]) -> Table:
    table = Table(box=None, show_header=any(columns), padding=(0, 2, 0, 0))
    # A label stays in its line; what is long beside it goes on in the next, and nothing is left out.
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    return table


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def print_findings(findings: Mapping[str, Any]) -> None:
    """What `specdec doctor` found, for people. It is the answer, so it goes to standard output."""
    cpu = findings["cpu"]
    table = _figures(["", ""])
    for package, version in findings["versions"].items():
        table.add_row(package, version or "not installed")
    table.add_row("platform", findings["platform"])
    table.add_row("processor", f"{cpu['name']}, {cpu['threads']} threads, {cpu['capability']}")
    table.add_row("  instructions", " ".join(cpu["flags"]) or "unknown")
    table.add_row("devices", ", ".join(findings["devices"]))
    table.add_row("would use", f"{findings['device']}, {findings['dtype']}")
    compiler = findings["cuda_compiler"]
    table.add_row("CUDA C++ with", compiler.get("problem") or "{name} {version}, {path}".format(**compiler))
    table.add_row("models in", findings["store"])
    for name, present in findings["models"].items():
        table.add_row(f"  {name}", "present" if present else f"not fetched (specdec models pull {name})")
    console = Console(highlight=False)
    console.print(table)
    console.print()
    console.print(_implementations(findings["implementations"]))
    if "profile" in findings:
        _print_profile(console, findings["profile"])


def _implementations(found: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("operation", "runs", "and not"):
        table.add_column(column)
    for op, choice in found.items():
        others = "\n".join(f"{name}: {problem}" for name, problem in choice["not"].items())
        table.add_row(op, choice["use"], others or choice["because"])
    return table


def _print_profile(console: Console, profile: Mapping[str, Any]) -> None:
    costs: Mapping[int, float] = profile["seconds"]
    console.print()
    console.print(f"a forward of {profile['model']} ({profile['adapter']}), medians:")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("tokens", "milliseconds", "of one token's"):
        table.add_column(column, justify="right")
    for n, seconds in costs.items():
        table.add_row(str(n), f"{1000 * seconds:.2f}", f"{seconds / costs[1]:.2f}")
    console.print(table)
    console.print(f"a plain round takes {1000 * profile['round_s']:.2f} milliseconds besides")
    if "linear" in profile:
        console.print()
        console.print(_linears(profile["linear"]))


def _linears(found: Mapping[str, Any]) -> Table:
    """What each implementation of the linear layers took, and why it was chosen or not."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("linear layers", *(f"{rows} rows, ms" for rows in found["seconds"][found["use"]]), ""):
        table.add_column(column)
    for name, costs in found["seconds"].items():
        verdict = found["not"].get(name, f"chosen: {found['because']}")
        table.add_row(name, *(f"{1000 * seconds:.2f}" for seconds in costs.values()), verdict)
    return table
