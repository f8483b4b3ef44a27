"""How far the work is: a bar with rate and time left on a terminal, a quiet line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Advance(Protocol):
    """Callable that adds `amount` units to the work done."""

    def __call__(self, amount: int) -> None: ...


@contextmanager
def progress(label: str, total: int | None, unit: str = "B", initial: int = 0) -> Iterator[Advance]:
    """Show work on stderr; `total` and amounts are in `unit`, `initial` was done by an earlier run."""
    if sys.stderr.isatty():
        with tqdm(
            total=total, initial=initial, unit=unit, unit_scale=True, desc=label, dynamic_ncols=True
        ) as bar:
            yield lambda amount: bar.update(amount) and None
    else:
        yield _line_writer(label, total, unit, initial)


def _line_writer(label: str, total: int | None, unit: str, initial: int) -> Advance:
    done = initial
    start = shown = time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, shown
        done += amount
        now = time.monotonic()
        if now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            print(_line(label, done, total, unit, (done - initial) / (now - start)), file=sys.stderr)

    return advance


def _line(label: str, done: int, total: int | None, unit: str, rate: float) -> str:
    head = f"{label}: {tqdm.format_sizeof(done)}{unit}, {tqdm.format_sizeof(rate)}{unit}/s"
    if not total:
        return head
    left = tqdm.format_interval(max(total - done, 0) / rate) if rate else "?"
    return f"{head}, {100 * done / total:.0f}%, {left} left"
