"""A progress bar on the worker's terminal while it loads; nothing where nobody looks."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from skynet.models.store.store import Progress as LoadProgress
from skynet.protocol.plan import Epoch


class LoadBars:
    """One bar for each shard under way, on stderr. Lives on the agent's loop."""

    def __init__(self, is_shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[sources]}", markup=False),
            console=Console(stderr=True),
            transient=True,
            disable=not is_shown,
        )
        self._tasks: dict[Epoch, TaskID] = {}

    def update(self, epoch: Epoch, progress: LoadProgress) -> None:
        """Show how far this load is, and where its bytes come from."""
        if epoch not in self._tasks:
            if not self._tasks:
                self._progress.start()
            self._tasks[epoch] = self._progress.add_task(f"shard {epoch}", total=None, sources="")
        sources = ", ".join(kind for kind, count in progress.bytes_by_source.items() if count)
        self._progress.update(
            self._tasks[epoch],
            completed=progress.bytes_done,
            total=progress.bytes_total,
            sources=f"from {sources}" if sources else "",
        )

    def end(self, epoch: Epoch) -> None:
        """This load is over, well or not."""
        task = self._tasks.pop(epoch, None)
        if task is not None:
            self._progress.remove_task(task)
            if not self._tasks:
                self._progress.stop()
