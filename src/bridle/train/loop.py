"""The training loop. In: a control, a base, a cache. Out: a run folder with checkpoints, logs and a control that obeys.

    probe where due ─> switch the regime where due ─> save where due ─> one optimiser step ─> again

Nothing here knows pictures: the caller hands in what draws previews, measures a few samples and saves the control.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from bridle.base.schedule import Schedule
from bridle.cache.store import Cache
from bridle.control.control import Control
from bridle.control.delta import apply_delta
from bridle.errors import ConfigError, TrainError
from bridle.kernels.precision import choose_precision
from bridle.train import checkpoint
from bridle.train.feed import Rows, Steps, feed
from bridle.train.log import RunLog
from bridle.train.memory import SAVE_MEMORY, is_out_of_memory
from bridle.train.parallel import ALONE, World, any_rank, gather
from bridle.train.probe import Obedience, Probe, interval
from bridle.train.regime import SMALL_DATA, Phase, next_switch
from bridle.train.settings import MachineSettings, ProbeSettings, TrainSettings
from bridle.train.signals import Stopped, StopSignal
from bridle.train.trainer import StepResult, Trainer
from bridle.train.watch import Watch

# Settings that may differ between a run and its continuation: they change how long, how often and what comes later.
FREE = {
    *("steps", "checkpoint_every", "preview_every", "log_every", "keep", "tensorboard", "skips", "patience"),
    *("batch", "accumulate"),  # their product may not
    *("regime", "reconnect", "unlock", "unlock_after", "unlock_lr"),
}

CHECKPOINTS = "checkpoints"
STOPPED = "asked to stop"
UNSAVED = -1
NAMES: dict[Phase, str] = {
    "middle": "the middle link alone",
    "connected": "all links connected",
    "unlocked": "the base unlocked",
}

Save = Callable[[Control, int], None]
Check = Callable[[], None]


class Progress(Protocol):
    """What shows a run to the person in front of it."""

    def __call__(self, step: int, row: dict[str, float] | None) -> None: ...


class Measure(Protocol):
    """Draws a few held-out pictures and measures how well they obey; None where there are none to draw."""

    def __call__(self, control: Control, check: Check) -> Obedience | None: ...


@dataclass(frozen=True, kw_only=True)
class Hands:
    """What the loop has others do.

    Args:
        save: called with the averaged control at every checkpoint.
        begun: called by the main process once nothing refuses the run any more, before its first step.
        save_best: called with it when held-out pictures obey better than ever before.
        preview: called with it at every preview step.
        measure: draws and measures a few held-out pictures.
        guidance: of these.
        progress: called after every step; with a row of metrics at every logged one.
        say: told, in one sentence, whatever the user should know.
    """

    save: Save
    save_best: Save = lambda control, step: None
    begun: Callable[[], None] = lambda: None
    preview: Callable[[Control, int, Check], None] | None = None
    measure: Measure | None = None
    guidance: float = 1.0
    progress: Progress = lambda step, row: None
    say: Callable[[str], None] = lambda message: None


@dataclass(frozen=True)
class Outcome:
    """Where training ended.

    Attributes:
        step: the last one done.
        finished: whether all steps were done, or patience ran out; else the same call goes on.
        reason: why it ended, in words.
        control: the averaged control.
    """

    step: int
    finished: bool
    reason: str
    control: Control


def train(
    control: Control,
    denoiser: Any,
    schedule: Schedule,
    cache: Cache,
    settings: TrainSettings,
    folder: Path,
    hands: Hands,
    *,
    probing: ProbeSettings = ProbeSettings(),  # noqa: B008 - frozen, so it can be shared
    machine: MachineSettings = MachineSettings(),  # noqa: B008
    world: World = ALONE,
    force: bool = False,
) -> Outcome:
    """Train a control, or go on where the run in `folder` stopped.

    Args:
        control: trained in place, float32.
        denoiser: the base's U-Net or transformer; stays locked unless the regime unlocks it.
        schedule: the base's.
        force: go on although settings or data changed; says what did.

    Raises: TrainError: the run in `folder` was another one, its checkpoint is damaged, memory does not suffice, or loss
        and gradients were not finite too often.
    """
    return _Run(control, denoiser, schedule, cache, settings, folder, hands, probing, machine, world).go(force)


class _Run:
    """One call of `train`: the trainer, what watches it, and where they stand."""

    def __init__(
        self,
        control: Control,
        denoiser: Any,
        schedule: Schedule,
        cache: Cache,
        settings: TrainSettings,
        folder: Path,
        hands: Hands,
        probing: ProbeSettings,
        machine: MachineSettings,
        world: World,
    ) -> None:
        self.folder, self.hands, self.denoiser, self.cache = folder, hands, denoiser, cache
        self.world, self.machine = world, machine
        self.watch, self.step, self.trained_s = Watch(), 0, 0.0
        self.log: RunLog | None = None
        self.unlogged: list[Callable[[RunLog], None]] = []
        self.settings = settings = self._decide_precision(settings, control)
        self.probe = Probe(cache, schedule, probing, settings) if len(cache.held_out_ids) > 1 else None
        if self.probe is None and (asks := asks_probe(settings)):
            raise ConfigError(f"setting {asks}, which asks held-out pairs; set data.held_out to 2 or more")
        self.every = interval(probing, settings, hands.guidance)
        self.trainer = Trainer(control, denoiser, schedule, cache, settings, machine, world, self._tell)

    def _decide_precision(self, settings: TrainSettings, control: Control) -> TrainSettings:
        """ "auto" becomes what the run began with, or what the first process finds to be faster: all compute alike."""
        if settings.precision != "auto":
            return settings
        began = checkpoint.newest_precision(self.folder / CHECKPOINTS)
        weights = next(self.denoiser.parameters()).dtype
        mine = began or choose_precision(settings.precision, control.device, weights)
        precision = gather(mine, self.world)[0]
        if precision == "fp32" and began is None:
            self._tell("kernels", "this machine computes faster in float32 than in bfloat16, so training does")
        if precision == "fp16" and began is None:
            self._tell("kernels", "this GPU has no bfloat16: training computes in float16, its loss scaled accordingly")
        return replace(settings, precision=precision)

    def go(self, force: bool) -> Outcome:
        try:
            return self._go(force)
        except (RuntimeError, MemoryError) as error:  # in a step it has an answer of its own
            if not is_out_of_memory(error):
                raise
            where = f"the last checkpoint is intact; {SAVE_MEMORY}"
            raise TrainError(f"out of memory after step {self.step}, outside of a forward pass: {where}") from error
        finally:
            self.trainer.give_back()

    def _go(self, force: bool) -> Outcome:
        try:
            self._begin(force)
            reason = self._until_the_end()
        except (
            OSError,
            SafetensorError,
        ) as error:  # of whatever is written beside checkpoints, which say so themselves
            why = f"{checkpoint.explain(error)}, and start again: the last checkpoint is intact"
            raise TrainError(f"training broke off after step {self.step}: {why}") from error
        finally:
            self.trainer.close()
        if self.log:
            self.log.ended(self.step, reason != STOPPED, reason)
        with self.trainer.averaged() as control:
            self.trainer.complete(control)
            return Outcome(self.step, reason != STOPPED, reason, control)

    def _begin(self, force: bool) -> None:
        forced = self._restore(force)
        self.saved = self.first = self.step
        known = self.step if checkpoint.newest(self.folder / CHECKPOINTS) else -1
        probed = {row["step"] for row in self.watch.rows}
        self.log = RunLog(self.folder, known, probed, self.settings.tensorboard) if self.world.main else None
        if self.log:
            self.hands.begun()
            for write in self.unlogged:
                write(self.log)
        if self.world.main and 0 < self.step < self.settings.steps:
            self.hands.say(f"going on from step {self.step}")
        if forced:
            self._tell("forced", f"going on although {forced}")
        after = self.settings.unlock_after
        if self.settings.regime == "large" and after != "auto" and after >= self.settings.steps > self.step:
            never = f"train.unlock_after is {after}, train.steps {self.settings.steps}: the base stays locked"
            self._tell("warning", f"train.regime is 'large', but {never}")
        self.hands.progress(self.step, None)

    def _until_the_end(self) -> str:
        """Returns: what ended it."""
        steps = Steps(self.cache, self.settings, len(self.trainer.schedule), self.world.rank, self.world.size)
        with StopSignal() as stop, closing(feed(steps, self.step, self.settings.steps, self.machine.workers)) as rows:
            try:
                return self._train(rows, stop)
            except Stopped:
                self._save()
                return STOPPED

    def _train(self, rows: Iterator[Rows], stop: StopSignal) -> str:
        """Until something ends it. Returns: what. Raises: Stopped: in the middle of what can be done again."""

        def check() -> None:  # asked by all processes together, so that none leaves the others waiting
            if any_rank(bool(stop), self.world):
                raise Stopped

        while True:
            self._probe(check)
            self._switch()
            reason = self._reason_to_end(stop)
            if reason or (self.step and self.step % self.settings.checkpoint_every == 0):
                self._save()
            if self.step and reason != STOPPED and (reason or self.step % self.settings.preview_every == 0):
                self._preview(stop, check)
            if reason:
                return reason
            started = time.monotonic()
            self._step(next(rows), check, started)

    def _step(self, rows: Rows, check: Check, started: float) -> None:
        """Args: started: when the rows began to be read."""
        result = self.trainer.step(self.step, rows, check)
        self.trained_s += time.monotonic() - started
        self.step += 1
        if result.bad:
            self._skipped(result)
        row = None
        if self.step % self.settings.log_every == 0 or self.step == self.settings.steps:
            row = self._figures(result)
            if self.log:
                self.log.metrics(row)
        self.hands.progress(self.step, row)

    def _figures(self, result: StepResult) -> dict[str, Any]:
        """A row of `metrics.jsonl`; speed is that of training alone, without probes, previews and saving."""
        speed = (self.step - self.first) * self.settings.effective_batch / self.trained_s
        figures = {"loss": result.loss, "grad_norm": result.norm, "lr": self.trainer.lr(self.step - 1)}
        return {"step": self.step, **figures, "samples_per_s": speed, "skipped": self.trainer.skipped}

    def _skipped(self, result: StepResult) -> None:
        """Raises: TrainError: too many steps in a row."""
        figures = f"loss {result.loss}, gradient norm {result.norm}"
        samples = ", ".join(result.bad[:4]) + (", ..." if len(result.bad) > 4 else "")
        self._tell("skipped", f"step {self.step} skipped: {figures}, with {samples}", samples=list(result.bad))
        if self.trainer.skipped_in_a_row >= self.settings.skips:
            remedy = "the last checkpoint is intact: lower train.lr, or look at these pairs"
            raise TrainError(
                f"{self.trainer.skipped_in_a_row} steps in a row up to {self.step} had no finite loss and gradient"
                f" ({figures}; samples {samples}); {remedy}"
            )

    def _probe(self, check: Check) -> None:
        """Measure on held-out pairs where that is due, and draw conclusions."""
        due = self.step % self.every == 0 or self.step == self.settings.steps
        if self.probe is None or not due or self.watch.step == self.step:
            return
        started = time.monotonic()
        self.probe.batch = min(self.settings.batch, self.trainer.fits or self.settings.batch)
        with self.trainer.averaged() as control:
            with ExitStack() as undo:
                undo.callback(apply_delta(self.denoiser, control.base_delta))
                reading = self.probe.read(control, self.denoiser, check)
            drawn = self.hands.measure(control, check) if self.hands.measure else None
            row = {"step": self.step, "phase": self.trainer.phase, **reading.row()}
            row["controllability"] = drawn.row() if drawn else None
            news = self.watch.add(gather(row, self.world)[0])
            self.saved = UNSAVED  # a run stopped in this probe has a checkpoint of this step that does not know of it
            if news.best:
                self.trainer.complete(control)
                if self.world.main:
                    self.hands.save_best(control, self.step)
        if self.log:
            self.log.probe(self.watch.rows[-1] | {"time_s": round(time.monotonic() - started, 2)})
        for kind, message in news.messages:
            self._tell(kind, message)

    def _switch(self) -> None:
        verdict = self.watch.verdict(max(self.trainer.joined.values()))
        switch = next_switch(self.settings, self.trainer.phase, self.step, verdict)
        if switch is None:
            return
        self.trainer.switch(switch.phase, self.step)
        self._tell("switch", f"step {self.step}: {NAMES[switch.phase]}, because {switch.reason}")
        pairs = len(self.cache.train_ids)
        if switch.phase == "unlocked" and pairs < SMALL_DATA:
            self._tell(
                "warning",
                f"the base is being trained on {pairs:,} pairs and will overfit; the paper advises "
                f"this from {SMALL_DATA:,} on. Compare best/ with control/, and keep the one that draws better",
            )

    def _reason_to_end(self, stop: StopSignal) -> str:
        if any_rank(bool(stop), self.world):
            return STOPPED
        if self.step > self.settings.steps:
            return f"train.steps is {self.settings.steps}, and more are done"
        if self.step == self.settings.steps:
            return f"all {self.settings.steps} steps are done"
        if self.settings.patience and self.watch.without_better >= self.settings.patience:
            return f"no better control in {self.settings.patience} probes"
        return ""

    def _save(self) -> None:
        """The control first: a run killed in between does these steps, and this, again."""
        if self.saved == self.step:
            return
        with self.trainer.averaged() as control:
            self.trainer.complete(control)
            if self.world.main:
                (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)  # tells such a kill from a loss of them
                self.hands.save(control, self.step)
        facts = {"watch": self.watch.rows, **self.trainer.facts()}
        checkpoint.save(
            self.folder / CHECKPOINTS, self.step, self.trainer.tensors(), facts, self.settings.keep, self.world
        )
        self.saved = self.step

    def _preview(self, stop: StopSignal, check: Check) -> None:
        if self.hands.preview is None:
            return
        with self.trainer.averaged() as control:
            if self.world.size == 1 or self.trainer.sharded:
                self.hands.preview(control, self.step, check)
            elif self.world.main:
                with suppress(Stopped):  # the others do not draw: they hear of it in the next step
                    self.hands.preview(control, self.step, stop.check)

    def _restore(self, force: bool) -> str:
        """Go on from the newest checkpoint. Returns: what has changed since, where that is forced."""
        newest = checkpoint.newest(self.folder / CHECKPOINTS)
        if newest is None:
            for old in (self.folder / CHECKPOINTS).glob("step-*.pt"):
                remedy = "this version cannot go on with it; start another run with --out"
                raise TrainError(f"{old} was written by Bridle 0.1.0: {remedy}")
            return ""
        facts = checkpoint.read_facts(newest)
        changed = list(changes(facts["settings"], asdict(self.settings)))
        if facts["cache"] != self.cache.fingerprint:
            changed.append("the data, its settings or the base changed")
        if changed and not force:
            raise TrainError(cannot_go_on(changed))
        self.trainer.restore(checkpoint.load(newest), facts)
        self.step = facts["step"]
        self.watch = Watch(facts["watch"])
        return "; ".join(changed)

    def _tell(self, kind: str, message: str, **facts: Any) -> None:
        if self.world.main:
            self.hands.say(message)
            if self.log:
                self.log.event(self.step, kind, message, **facts)
            else:
                self.unlogged.append(lambda log: log.event(self.step, kind, message, **facts))


def asks_probe(settings: TrainSettings) -> str:
    """The setting that cannot do without probes, if there is one."""
    if settings.regime == "auto":
        return "train.regime is 'auto'"
    if settings.regime == "small" and settings.reconnect == "auto":
        return "train.reconnect is 'auto'"
    if settings.regime == "large" and settings.unlock_after == "auto":
        return "train.unlock_after is 'auto'"
    return f"train.patience is {settings.patience}" if settings.patience else ""


def cannot_go_on(changed: Iterable[str]) -> str:
    """The message about a run whose settings or data are not what they were."""
    return f"this run cannot go on: {'; '.join(changed)}. Undo that, add --force, or start another run with --out"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Differences between two sets of training settings that a continuation may not have."""
    if before["batch"] * before["accumulate"] != now["batch"] * now["accumulate"]:
        product = "train.batch × train.accumulate"
        yield f"{product} was {before['batch'] * before['accumulate']}, is {now['batch'] * now['accumulate']}"
    for name, value in before.items():
        if name not in FREE and now[name] != value:
            yield f"train.{name} was {value}, is {now[name]}"
