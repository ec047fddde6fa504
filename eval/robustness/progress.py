"""A bar for all results, and one for the cell that is being measured."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Watch:
    """Shows how a bench goes on; a context manager."""

    def __init__(self, total: int) -> None:
        """Expect so many results: cells times models."""
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._all = self._progress.add_task("results", total=total)
        self._row = self._progress.add_task("", total=None, visible=False)
        self._counts: dict[str, int] = {}
        self._cell = ""
        self._kept = 0

    def __enter__(self) -> "Watch":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.update(self._row, visible=False)
        self._progress.stop()
        if self._kept:
            self._progress.console.print(f"{self._kept} results were on disk already", highlight=False)

    def begin(self, cell: str, count: int) -> None:
        """A cell of so many pictures will be measured."""
        self._counts[cell] = count

    def advance(self, cell: str, count: int) -> None:
        """So many more pictures of a cell are done."""
        if cell != self._cell:
            self._cell = cell
            title = cell.removeprefix("corruption/").replace("_", " ").replace("/", " ")
            self._progress.reset(self._row, total=self._counts[cell], description=f"  {title}", visible=True)
        self._progress.advance(self._row, count)

    def done(self, count: int, is_new: bool) -> None:
        """So many more results are there."""
        self._kept += 0 if is_new else count
        self._progress.advance(self._all, count)
