"""Ctrl-C and SIGTERM become a question the loop asks between two steps, so that a stopped run can go on."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignal:
    """True once a signal has arrived. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._arrived = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._arrived

    def __enter__(self) -> Self:
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
