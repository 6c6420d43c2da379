"""The paper's three regimes as one schedule of phases. In: settings, step, what the probes say. Out: a switch, or none.

    middle ──> connected ──> unlocked
    small, auto  standard, large starts here   large; auto where `unlock` asks for it

Nothing here touches a model: `Trainer.switch` carries out what is decided here.
"""

from dataclasses import dataclass
from typing import Literal

from bridle.train.settings import TrainSettings, Unlock

Phase = Literal["middle", "connected", "unlocked"]
# The middle link sees a picture at its coarsest and may never answer a fine hint; then it is not waited for.
LONGEST_MIDDLE = 0.05
SMALL_DATA = 1_000_000  # below this many pairs the paper's authors advise against unlocking


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the probes since the last switch say.

    Args:
        associated: results depend on the hint, however weakly.
        learned: pictures obey the hint.
        settled: they no longer obey better than some probes ago.
        because: the figures behind it, in words.
    """

    associated: bool = False
    learned: bool = False
    settled: bool = False
    because: str = ""


@dataclass(frozen=True)
class Switch:
    """To which phase, and why, in words."""

    phase: Phase
    reason: str


def first_phase(settings: TrainSettings) -> Phase:
    return "middle" if settings.regime in ("small", "auto") else "connected"


def next_switch(settings: TrainSettings, phase: Phase, step: int, verdict: Verdict) -> Switch | None:
    """What is due before the given step; at most one switch at a time."""
    if phase == "middle":
        reason = _reconnect(settings, step, verdict)
        return Switch("connected", reason) if reason else None
    if phase == "connected" and unlocks(settings):
        reason = _unlock(settings, step, verdict)
        return Switch("unlocked", reason) if reason else None
    return None


def unlocks(settings: TrainSettings) -> Unlock | None:
    """What of the base these settings train in the end, if anything."""
    return settings.unlock or ("decoder" if settings.regime == "large" else None)


def _reconnect(settings: TrainSettings, step: int, verdict: Verdict) -> str:
    if settings.regime in ("standard", "large"):  # a run that was begun in another regime
        return f"train.regime is {settings.regime!r}"
    if settings.regime == "small" and settings.reconnect != "auto":
        return f"train.reconnect is {settings.reconnect}" if step >= settings.reconnect else ""
    if verdict.associated:
        return f"results follow the hints ({verdict.because})"
    if step >= LONGEST_MIDDLE * settings.steps:
        return f"a twentieth of the {settings.steps} steps passed without an answer of the middle link alone"
    return ""


def _unlock(settings: TrainSettings, step: int, verdict: Verdict) -> str:
    if settings.regime == "auto":
        return f"the control is learned and no longer improves ({verdict.because})" if verdict.settled else ""
    if settings.unlock_after != "auto":
        return f"train.unlock_after is {settings.unlock_after}" if step >= settings.unlock_after else ""
    return f"the control is learned ({verdict.because})" if verdict.learned else ""
