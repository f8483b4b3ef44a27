"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to save and leave.

Imports no torch: the handlers must stand before its slow import.
"""

from __future__ import annotations

import signal
from types import FrameType

_received: list[int] = []


class Cancelled(Exception):
    """The run leaves, and with it what was being fetched."""


class Stopped(Exception):
    """A signal asked the run to leave; it was saved first."""

    def __init__(self, signal_number: int, step: int, unit: str = "step") -> None:
        self.signal_number = signal_number
        super().__init__(
            f"stopped by signal {signal_number} after {unit} {step}; the same command goes on from there"
        )


def catch_stop_signals() -> None:
    """Note the first stop signal instead of dying from it; a second Ctrl-C ends the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    if _received and number == signal.SIGINT:
        raise KeyboardInterrupt
    _received.append(number)


def stop_signal() -> int:
    """The first stop signal received, or 0."""
    return _received[0] if _received else 0
