"""`bridle train`: settings in, a trained control in the run's folder out. The same call goes on with a stopped run."""

import copy
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bridle.base.base import Base
from bridle.base.load import load_base, pick_device
from bridle.base.offload import Drawing, offloaded
from bridle.control.control import Control
from bridle.control.unet import UNetControl
from bridle.data.annotate import get_annotator
from bridle.errors import TrainError
from bridle.files.weights import save_control
from bridle.kernels.precision import TYPES, Precision
from bridle.lock import holding
from bridle.run.controllability import Controllability
from bridle.run.pairs import RunData, load_data, open_data
from bridle.run.previews import Previews
from bridle.run.settings import CONTROL, RunSettings, base_weights, check_run, open_run
from bridle.run.show import Shown
from bridle.train.checkpoint import newest, newest_precision
from bridle.train.hint_start import first_hints, scale_hint_encoder
from bridle.train.loop import CHECKPOINTS, Check, Hands, Outcome, train
from bridle.train.memory import settle_freed_memory
from bridle.train.parallel import World, gather, join, leave, same_on_all
from bridle.train.probe import Obedience
from bridle.train.regime import unlocks

BEST = "best"
LOCK = ".lock"
PICTURE_CHANNELS = 3  # what an autoencoder takes


@dataclass(frozen=True)
class TrainedRun:
    """A run after training: where it ended, and what is still at hand for measuring.

    Attributes:
        base: as it was trained with: on a GPU in 16 bits, see `machine.base_weights`.
    """

    folder: Path
    outcome: Outcome
    base: Base
    data: RunData
    time_s: float

    @property
    def control(self) -> Control:
        """The averaged control in the base's type, to draw with."""
        return like_base(self.outcome.control, self.base)


def train_run(
    settings: RunSettings, folder: Path, console: Console | None = None, *, force: bool = False
) -> TrainedRun:
    """Train a control, or go on with the run in `folder`.

    One of several processes where the environment says so, as torchrun and Ray do. Writes `settings.toml`, `cache/`,
    `checkpoints/`, `metrics.jsonl`, `probes.jsonl`, `events.jsonl`, `progress.png`, `previews/`, `control/` and, once
    pictures obey, `best/`; while it runs it holds `.lock`.

    Args:
        force: go on although settings or data are not what the run began with, or begin anew where its checkpoints are
            gone.

    Raises: BridleError: anything the user can put right, before training starts where possible.
    """
    check_run(folder, settings, force)
    with processes(settings.device) as world, ExitStack() as until_done:
        console = console or Console(stderr=True, quiet=not world.main)
        base = load_base(settings.base, device=str(world.device))
        if world.main:
            until_done.enter_context(alone_in(folder))
        data = share_data(settings, base, folder, world, force)
        # Before a new control's hints are scaled: what that frees, the first step need not have mapped again.
        settle_freed_memory(base.device, saving=settings.machine.gradient_checkpointing)
        kept = gather(base_weights(settings, base.device, newest_precision(folder / CHECKPOINTS)), world)[0]
        control = new_control(settings, base, data, kept)
        started = time.monotonic()
        if settings.train.recipe == "scaled" and newest(folder / CHECKPOINTS) is None:
            scale_hints(control, data, settings, world)
        shown = Shown(console, settings.train.steps)
        with shown, offloaded(base, settings.machine.offload) as drawing:
            outcome = train(
                control,
                base.denoiser,
                base.schedule,
                data.cache,
                settings.train,
                folder,
                make_hands(settings, base, data, folder, shown, drawing),
                probing=settings.probe,
                machine=settings.machine,
                world=world,
                force=force,
            )
    return TrainedRun(folder, outcome, base, data, time.monotonic() - started)


@contextmanager
def processes(device: str) -> Generator[World]:
    """All processes of this run, joined for as long as it takes."""
    world = join(pick_device(device))
    try:
        yield world
    finally:
        leave(world)


@contextmanager
def alone_in(folder: Path) -> Generator[None]:
    """Raises: TrainError: another process trains in this folder."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with holding(folder / LOCK, wait=False) as alone:
        if not alone:
            raise TrainError(f"another training writes to {folder}; wait for its end, or give this one another --out")
        try:
            yield
        finally:
            if new and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing came of it
                with suppress(OSError):  # Windows keeps files that are open
                    (folder / LOCK).unlink()
                    for path in new:
                        path.rmdir()


def share_data(settings: RunSettings, base: Base, folder: Path, world: World, force: bool) -> RunData:
    """One process encodes the data set, the others then find it encoded."""
    if not world.main:
        gather(None, world)
        return open_data(settings.data, folder)
    data = load_data(settings.data, base, folder, force=force)
    gather(None, world)
    return data


def new_control(settings: RunSettings, base: Base, data: RunData, kept: Precision) -> Control:
    """An untrained control for the hints of this data set; the hint encoder's weights are drawn from the seed.

    Args:
        kept: the type in which the base's weights are kept from now on. What is not copied takes it first, or memory
            would hold all of the base in full beside the copy.
    """
    if kept != "fp32":
        base.halve(TYPES[kept], but_copied=True)
    prepared = data.cache.batch(data.cache.train_ids[:1]).kept_hint
    channels = PICTURE_CHANNELS if base.control_class.PREPARES else prepared.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        control = Control.from_base(
            base.pipeline,
            hint_channels=channels,
            hint_encoder=settings.control.hint_encoder,
            size_factor=base.size_factor,
        )
    if kept != "fp32":
        base.halve(TYPES[kept])
    return control


def scale_hints(control: Control, data: RunData, settings: RunSettings, world: World) -> None:
    """Before the first step of a new run; a transformer's control has no such encoder."""
    if not isinstance(control, UNetControl):
        return
    if world.main:
        scale_hint_encoder(control, first_hints(data.cache).to(control.device), settings.train.seed)
    same_on_all(control.controlnet_cond_embedding, world)


def make_hands(settings: RunSettings, base: Base, data: RunData, folder: Path, shown: Shown, drawing: Drawing) -> Hands:
    """What the loop has done outside it: saving, drawing, measuring, showing."""

    def save(control: Control, step: int) -> None:
        from bridle.run.plot import write_plot  # here, because the first step need not wait for matplotlib

        save_control(control, folder / CONTROL, facts(settings, base, data, control, step))
        write_plot(folder)

    def save_best(control: Control, step: int) -> None:
        save_control(control, folder / BEST, facts(settings, base, data, control, step))

    pairs, probing = data.held_out(), settings.probe
    previews = Previews(base, pairs, settings.sample, folder / "previews") if pairs else None
    figures = None
    # Of hints that came as files nobody knows what made them, and another annotator's maps would mislead.
    if len(pairs) > 1 and probing.samples and data.cache.annotator != "files":
        annotator = get_annotator(settings.data.annotator)
        figures = Controllability(base, pairs, annotator, settings.sample, samples=probing.samples, steps=probing.steps)

    def preview(control: Control, step: int, check: Check) -> None:
        with drawing():
            if previews is not None:
                previews(like_base(control, base), step, check)

    def measure(control: Control, check: Check) -> Obedience | None:
        with drawing():
            return figures(like_base(control, base), check) if figures is not None else None

    return Hands(
        save=save,
        save_best=save_best,
        begun=partial(open_run, folder, settings),
        preview=preview,
        measure=measure,
        guidance=settings.sample.guidance,
        progress=shown.progress,
        say=shown.say,
    )


def like_base(control: Control, base: Base) -> Control:
    """The control in the base's type, which may have 16 bits; see machine.base_weights."""
    if control.dtype == base.denoiser.dtype:
        return control
    dtype = base.denoiser.dtype  # parameters are cast one by one: a second copy of all in float32 may be gigabytes
    halves: dict[int, Any] = {id(one): nn.Parameter(one.detach().to(dtype), False) for one in control.parameters()}
    return copy.deepcopy(control, halves).to(dtype)


def facts(settings: RunSettings, base: Base, data: RunData, control: Control, step: int) -> dict[str, Any]:
    """What a control file says about its making."""
    train = settings.train
    return {
        "base": base.name,
        "hint": data.cache.annotator,
        "size_px": settings.data.size_px,
        "pairs": len(data.cache.train_ids),
        "steps": step,
        "effective_batch": train.effective_batch,
        "lr": train.peak_lr,
        "weighting": train.weighting,
        "regime": train.regime,
        "unlock": unlocks(train) if control.base_delta else "nothing",
    }
