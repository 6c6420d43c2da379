"""What one way of training takes, measured on some pairs. A process of its own, or its peak would be that of others.

    python -m bridle.run.worker SETTINGS.toml PHASE LIMIT_BYTES

In: a run's settings, the phase to measure, and what may be taken. Out: one line of JSON, {"peak_memory_bytes": ...,
"time_per_sample_s": ...}; the time is null where memory did not suffice. Pairs are random, for none of it depends on
what they show; everything else is what `bridle train` does.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bridle import config
from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.base.offload import offloaded
from bridle.cache.store import CachedBatch
from bridle.control.control import Control
from bridle.control.text import Text, join_texts
from bridle.errors import BridleError, TrainError
from bridle.run.pairs import RunData
from bridle.run.previews import PAIRS
from bridle.run.settings import RunSettings, base_weights
from bridle.run.training import like_base, new_control
from bridle.sample.sampler import generate
from bridle.train.denoiser import PARTS
from bridle.train.feed import Rows, Steps
from bridle.train.memory import is_out_of_memory, peak_memory_bytes, settle_freed_memory
from bridle.train.regime import Phase
from bridle.train.trainer import Trainer

PHASES: tuple[Phase, ...] = tuple(PARTS)
HINT_CHANNELS = 3  # what a picture has; more or fewer change only the first small convolution


class OutOfMemoryError(Exception):
    """The trainer would go on with smaller batches; here that is the answer."""


@dataclass(frozen=True)
class RandomCache:
    """Pairs made up on the spot, in the place of a `Cache`.

    Attributes:
        latents, hint: the shapes of one pair's: [C, h, w], and what the cache keeps of a hint.
        hint_type: of what it keeps.
        empty_text: of the empty caption.
    """

    latents: tuple[int, int, int]
    hint: tuple[int, ...]
    empty_text: Text
    hint_type: torch.dtype = torch.uint8
    train_ids: tuple[str, ...] = ("random#0",)
    fingerprint: str = "random"

    def batch(self, ids: list[str]) -> CachedBatch:
        source = torch.Generator().manual_seed(0)
        return CachedBatch(
            mean=torch.randn(len(ids), *self.latents, generator=source),
            std=torch.ones(len(ids), *self.latents),
            kept_hint=torch.rand(len(ids), *self.hint, generator=source).mul_(255).to(self.hint_type),
            captions=("",) * len(ids),
            text=join_texts([self.empty_text] * len(ids)),
        )


def random_cache(base: Base, size_px: int) -> Any:
    """Of the shapes that this base takes at this size."""
    size = size_px // base.size_factor
    hint = base.encode_hints(torch.zeros(1, HINT_CHANNELS, size_px, size_px, dtype=torch.uint8))
    latents = (base.latent_channels, size, size)
    text = base.encode_captions([""])
    return RandomCache(latents=latents, hint=tuple(hint.shape[1:]), hint_type=hint.dtype, empty_text=text)


def measure(settings: RunSettings, phase: Phase, limit_bytes: int) -> dict[str, Any]:
    """Train for some steps, through all phases up to the given one, time the last, and draw as a probe would.

    Raises: BridleError: the base cannot be loaded or trained at this size.
    """
    device, time_s = torch.device("cpu"), None
    try:
        base = load_base(settings.base, device=settings.device)
        device = base.device
        if device.type == "cuda":
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes))
        time_s = train_and_draw(settings, base, phase)
    except (OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, OutOfMemoryError) and not is_out_of_memory(error):
            raise
    return {"peak_memory_bytes": peak_memory_bytes(device), "time_per_sample_s": time_s}


def train_and_draw(settings: RunSettings, base: Base, phase: Phase) -> float:
    """What a run does, in its order. Returns: seconds per pair of training."""
    cache = random_cache(base, settings.data.size_px)
    settle_freed_memory(base.device, saving=settings.machine.gradient_checkpointing)
    kept = base_weights(settings, base.device)
    control = new_control(settings, base, RunData(settings.data, cast(Any, None), cache), kept)
    with offloaded(base, settings.machine.offload) as drawing:
        trainer = Trainer(control, base.denoiser, base.schedule, cache, settings.train, settings.machine, say=stop)
        time_s = time_per_sample(trainer, two_passes(settings, trainer, cache), phase)
        with drawing(), trainer.averaged() as average:
            draw(settings, base, like_base(average, base))
    return time_s


def two_passes(settings: RunSettings, trainer: Trainer, cache: Any) -> Rows:
    """Two micro-batches of a step: the second one finds gradients beside its activations."""
    whole = Steps(cache, settings.train, len(trainer.schedule))[0]
    two = slice(0, 2 * settings.train.batch)  # views, so that all pairs of the step stay in memory, as in a run
    return Rows(whole.ids[two], whole.batch[two], whole.draws[two])


def draw(settings: RunSettings, base: Base, control: Control) -> None:
    """As many pictures at once as previews and probes draw, in one denoising step, for all take the same memory."""
    count = min(settings.sample.batch, settings.data.held_out, max(PAIRS, settings.probe.samples))
    hint = np.zeros((settings.data.size_px, settings.data.size_px, HINT_CHANNELS), np.uint8)
    generate(base, control, [hint] * count, [""] * count, list(range(count)), replace(settings.sample, steps=1))


def stop(kind: str, message: str) -> None:
    """What a trainer that is measured says: that memory does not suffice is its answer."""
    if kind == "memory":
        raise OutOfMemoryError(message)


def time_per_sample(trainer: Trainer, rows: Rows, phase: Phase) -> float:
    """Seconds per pair of a step, once the optimiser has its state; of its equal passes but two are done."""
    for following in PHASES[PHASES.index(trainer.phase) + 1 : PHASES.index(phase) + 1]:
        trainer.step(0, rows)
        trainer.switch(following, 0)
    trainer.step(0, rows)
    marks: list[float] = []

    def mark() -> None:
        if trainer.control.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    if trainer.step(1, rows, mark).bad:
        raise TrainError("loss or gradient of random pairs is not finite; set train.precision to 'fp32'")
    mark()
    spans = [after - before for before, after in pairwise(marks)]
    settings = trainer.settings
    step_s = (settings.accumulate - 1) * spans[0] + spans[-1]  # the last span holds the optimiser's work
    return step_s / settings.effective_batch


def main() -> None:
    """Entry point; what the user can put right is one line on stderr and exit status 2."""
    path, phase, limit = sys.argv[1:]
    try:
        print(json.dumps(measure(config.read(RunSettings, Path(path)), cast(Phase, phase), int(limit))))
    except BridleError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
