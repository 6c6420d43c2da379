"""Ctrl-C and SIGTERM become a question that training asks at every moment it could stop at."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):  # noqa: N818 - it is no error
    """Training was asked to stop in the middle of something; what was begun is given up, nothing that was done is."""


class StopSignal:
    """True once a signal has arrived. A second Ctrl-C interrupts at once.

    Only a main thread hears signals: in any other (Ray trains in one) this stays False.
    """

    def __init__(self) -> None:
        self._arrived = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._arrived

    def check(self) -> None:
        """Raises: Stopped: a signal has arrived."""
        if self:
            raise Stopped

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._arrived = True
