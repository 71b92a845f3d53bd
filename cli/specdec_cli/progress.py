"""What a person sees of a running sweep: how far it is, when it will end, and how fast every cell is so far."""

import math
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from specdec.sweep.row import Row
    from specdec.sweep.runner import Plan

# More cells than this would push the bar out of a usual window.
_MOST_LINES = 20


class SweepMonitor:
    """A bar, and a line for every cell, on standard error if that is a terminal. Calling it reports a phase."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._shown = console.is_terminal
        self._live = Live(console=console, transient=True, refresh_per_second=4, redirect_stdout=False)
        self._plain: dict[tuple[str, int, str, int], float] = {}
        # By cell: samples, failures, sum and number of the logarithms of the paired speedups.
        self._cells: dict[str, list[float]] = {}
        self.plan: Plan | None = None
        self.done = 0
        self.failed = 0

    def __enter__(self) -> Self:
        if self._shown:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the display away."""
        self._live.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=f"{stage} {100 * done // total} %" if total else stage)
        self._refresh()

    def started(self, plan: "Plan") -> None:
        """The sweep begins, or goes on."""
        self.plan, self.done = plan, plan.done
        self._bar.reset(self._task, total=plan.total, completed=plan.done, description="decoding")
        self._refresh()

    def finished(self, row: "Row") -> None:
        """A sample is on the disk."""
        self.done += 1
        self.failed += not row.success
        cell = self._cells.setdefault(row.cell, [0, 0, 0.0, 0])
        cell[0] += 1
        cell[1] += not row.success
        if row.success and row.tokens_per_sec:
            pair = (row.baseline, *row.key[1:])
            if row.is_baseline:
                self._plain[pair] = row.tokens_per_sec
            elif pair in self._plain:
                cell[2] += math.log(row.tokens_per_sec / self._plain[pair])
                cell[3] += 1
        self._bar.update(self._task, completed=self.done, description="decoding")
        self._refresh()

    def _refresh(self) -> None:
        if self._shown:
            self._live.update(Group(self._table(), self._bar) if self._cells else self._bar)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("cell", "samples", "speedup so far"):
            table.add_column(column, justify="left" if column == "cell" else "right")
        for name, (count, failed, logs, pairs) in list(self._cells.items())[:_MOST_LINES]:
            speed = f"{math.exp(logs / pairs):.2f}" if pairs else ""
            table.add_row(name, f"{count:.0f}{f' ({failed:.0f} failed)' if failed else ''}", speed)
        if len(self._cells) > _MOST_LINES:
            table.add_row(f"and {len(self._cells) - _MOST_LINES} more", "", "")
        return table
