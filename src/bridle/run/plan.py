"""`bridle plan`: settings and memory in; ways to train with measured peak and speed, and the fastest that fits, out.

    as set ─> + offload, bfloat16 base, on a CPU no packed weights, pictures drawn one by one ─> + 8-bit optimiser
           or gradient checkpointing ─> + both of these

On each rung the largest micro-batch that fits is looked for, among those larger than what fitted before. The ladder
ends with a micro-batch of all pairs of a step, or with a rung that trained slower. What is not in the table was not
measured, and nothing in it was reckoned from something else.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bridle.errors import ConfigError, TrainError
from bridle.kernels.precision import choose_precision
from bridle.run.measure import Measure, Measured, Plan, apply_plan, measure_plan, on_cpu, plan_of
from bridle.run.settings import RunSettings, base_weights, flatten
from bridle.train.memory import free_memory_bytes
from bridle.train.optim import has_eight_bits
from bridle.train.regime import Phase, unlocks

GIB = 2**30
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": GIB}
WIDTH = 120  # of the table, in characters
LINKS: dict[Phase, str] = {"middle": "middle alone", "connected": "all", "unlocked": "all, base unlocked"}


@dataclass(frozen=True)
class Found:
    """What `bridle plan` found out.

    Attributes:
        rows: every plan that was measured, in that order.
        middle: the chosen plan before `train.regime` "small" connects all links; None where nothing fits.
    """

    settings: RunSettings
    memory_bytes: int
    rows: tuple[Measured, ...]
    middle: Measured | None = None

    @property
    def chosen(self) -> Measured | None:
        return choose(self.rows, self.memory_bytes)

    @property
    def summary(self) -> dict[str, Any]:
        """For machines."""
        rows = [{**asdict(row), "fits": row.fits(self.memory_bytes)} for row in self.rows]
        given = {"chosen": self.chosen, "middle": self.middle}
        return {"memory_bytes": self.memory_bytes, "plans": rows} | {k: v and asdict(v) for k, v in given.items()}

    @property
    def lines(self) -> list[str]:
        """For people: the table, and how to train in the way that was chosen."""
        text = io.StringIO()
        Console(file=text, width=WIDTH).print(make_table(self))
        return [*(line.rstrip() for line in text.getvalue().splitlines()), describe(self)]


def plan_run(settings: RunSettings, memory: str | None, console: Console | None = None) -> Found:
    """Measure ways to train, each in a process of its own.

    Args:
        settings: of the run; its data set is not opened.
        memory: what may be taken, such as "8GB"; all that is free on the device where None.

    Raises: ConfigError: the memory is not understood. TrainError: training fails for another reason than memory.
    """
    memory_bytes, free_bytes = memory_to_use(settings, memory)
    measure = shown(settings, console or Console(stderr=True))
    found = Found(settings, memory_bytes, tuple(search(settings, memory_bytes, free_bytes, measure)))
    if found.chosen is None or found.chosen.plan.phase == "middle":
        return found
    middle = measure(replace(found.chosen.plan, phase="middle"), min(memory_bytes, free_bytes))
    return replace(found, middle=middle)


def fit(settings: RunSettings, memory: str, console: Console | None = None) -> RunSettings:
    """The settings of the fastest way to train that fits.

    Raises: ConfigError: the memory is not understood. TrainError: nothing fits, or training fails for another reason.
    """
    console = console or Console(stderr=True)
    memory_bytes, free_bytes = memory_to_use(settings, memory)
    rows = tuple(search(settings, memory_bytes, free_bytes, shown(settings, console)))
    found = Found(settings, memory_bytes, rows)
    if found.chosen is None:
        raise TrainError(describe(found))
    console.print(describe(found))
    plan = found.chosen.plan
    if plan.base_weights == plan_here(settings).base_weights:  # "auto" stays, or the run would be tied to this machine
        plan = replace(plan, base_weights=settings.machine.base_weights)
    return apply_plan(settings, plan)


def parse_memory(text: str) -> int:
    """Bytes in "8GB" (8 * 10^9), "7.5GiB" (7.5 * 2^30) or "900MB". Raises: ConfigError: it is none of these."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip(), re.IGNORECASE)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ConfigError(f"memory is {text!r}; expected a number with its unit, such as 8GB, 7.5GiB or 900MB")
    return int(float(found[1]) * unit)


def memory_to_use(settings: RunSettings, memory: str | None) -> tuple[int, int]:
    """What may be taken, and what is free on the device, in bytes."""
    free_bytes = free_memory_bytes(device_of(settings))
    return (free_bytes if memory is None else parse_memory(memory)), free_bytes


def choose(rows: Sequence[Measured], memory_bytes: int) -> Measured | None:
    """The fastest that fits; None where nothing does."""
    return min((row for row in rows if row.fits(memory_bytes)), key=time_s, default=None)


def time_s(row: Measured) -> float:
    return float("inf") if row.time_per_sample_s is None else row.time_per_sample_s


def search(settings: RunSettings, memory_bytes: int, free_bytes: int, measure: Measure) -> Iterator[Measured]:
    """Measure down the ladder as far as it is worth it; where nothing fits, also what the smallest plan would take."""
    pairs, limit_bytes = settings.train.effective_batch, min(memory_bytes, free_bytes)
    best: Measured | None = None
    for at, rung in enumerate(ladder(settings)):
        sizes = [size for size in range(1, pairs + 1) if pairs % size == 0 and size > (best.plan.batch if best else 0)]
        # Where even one pair did not fit before, one pair is what to try first.
        tried = list(largest(rung, sizes, 0 if at and best is None else len(sizes) - 1, limit_bytes, measure))
        yield from tried
        fitting = choose(tried, limit_bytes)
        slower = best is not None and fitting is not None and time_s(fitting) > time_s(best)
        best = best if slower else fitting or best
        if slower or (best is not None and best.plan.batch == pairs):
            return
    if best is None and limit_bytes < free_bytes:
        yield measure(with_batch(rung, 1), free_bytes)


def largest(rung: Plan, sizes: Sequence[int], at: int, limit_bytes: int, measure: Measure) -> Iterator[Measured]:
    """Look for the largest micro-batch that fits, from `at` on; memory grows with it, so halving finds it."""
    fits, fails = -1, len(sizes)
    while fails - fits > 1:
        row = measure(with_batch(rung, sizes[at]), limit_bytes)
        yield row
        fits, fails = (at, fails) if row.fits(limit_bytes) else (fits, at)
        at = (fits + fails) // 2


def with_batch(plan: Plan, batch: int) -> Plan:
    """Of the same effective batch."""
    return replace(plan, batch=batch, accumulate=plan.batch * plan.accumulate // batch)


def ladder(settings: RunSettings) -> list[Plan]:
    """Ways to save, what costs little first; what the settings save already stays saved."""
    train = settings.train
    as_set = with_batch(plan_here(settings), train.effective_batch)
    fastest = choose_precision(train.precision, device_of(settings))
    # What is trained keeps float32: in 16 bits most updates would be rounded away.
    stays = train.precision == "fp32" or unlocks(train)
    pays = fastest != "fp32"  # elsewhere computing takes long with such a base
    halved = as_set.base_weights if stays else fastest if pays else "bf16"
    kept = halved if pays else as_set.base_weights
    packs = as_set.pack_weights and not on_cpu(settings)
    cheap = replace(as_set, offload=True, drawn=1, base_weights=kept, pack_weights=packs)
    small = replace(cheap, optimizer="adamw8bit") if has_eight_bits(on_cpu(settings)) else cheap
    again, both = (replace(rung, gradient_checkpointing=True) for rung in (cheap, small))
    return list(dict.fromkeys([as_set, cheap, small, again, both, replace(both, base_weights=halved)]))


def plan_here(settings: RunSettings) -> Plan:
    """The way in which a run with these settings trains on this machine."""
    return replace(plan_of(settings), base_weights=base_weights(settings, device_of(settings)))


def device_of(settings: RunSettings) -> torch.device:
    return torch.device("cpu" if on_cpu(settings) else "cuda")


def shown(settings: RunSettings, console: Console) -> Measure:
    """Measures, and says what while it does."""

    def measure(plan: Plan, limit_bytes: int) -> Measured:
        with console.status(f"measuring {name(plan)}"):
            return measure_plan(settings, plan, limit_bytes)

    return measure


def make_table(found: Found) -> Table:
    """The fastest first; what was stopped, last."""
    memory = f"{found.memory_bytes / GIB:.2f} GiB"
    table = Table(title=f"Measured at {found.settings.data.size_px} px with {memory}", title_justify="left")
    for column in ("pairs", "links", "optimiser", "checkpointing", "base", "packed", "offload", "drawn"):
        table.add_column(column)
    for column in ("peak GiB", "s/pair", "fits"):
        table.add_column(column, justify="right")
    for row in sorted(found.rows, key=time_s):
        table.add_row(*cells(row), "yes" if row.fits(found.memory_bytes) else "no")
    if found.middle:
        table.add_row(*cells(found.middle), "at first")
    return table


def cells(row: Measured) -> list[str]:
    plan, stopped = row.plan, row.time_per_sample_s is None
    chosen = ["yes" if on else "no" for on in (plan.gradient_checkpointing, plan.offload)]
    peak = f"{'> ' if stopped else ''}{row.peak_memory_bytes / GIB:.2f}"
    how = [f"{plan.batch} × {plan.accumulate}", LINKS[plan.phase], plan.optimizer, chosen[0]]
    return [
        *how,
        plan.base_weights,
        "yes" if plan.pack_weights else "no",
        chosen[1],
        str(plan.drawn),
        peak,
        "stopped" if stopped else f"{row.time_per_sample_s:.3g}",
    ]


def name(plan: Plan) -> str:
    """A plan in few words."""
    savers = {
        "8-bit optimiser": plan.optimizer == "adamw8bit",
        "gradient checkpointing": plan.gradient_checkpointing,
        "bfloat16 base": plan.base_weights == "bf16",
        "float16 base": plan.base_weights == "fp16",
        "no packed weights": not plan.pack_weights,
        "offload": plan.offload,
        "pictures one by one": plan.drawn == 1,
        "middle link alone": plan.phase == "middle",
    }
    return ", ".join([f"{plan.batch} × {plan.accumulate} pairs", *(saver for saver, on in savers.items() if on)])


def describe(found: Found) -> str:
    """What to do."""
    if found.chosen is None:
        least = min(found.rows, key=lambda row: (time_s(row) == float("inf"), row.peak_memory_bytes))
        more = "more than " if least.time_per_sample_s is None else ""
        takes = f"the smallest measured takes {more}{least.peak_memory_bytes / GIB:.2f} GiB ({name(least.plan)})"
        remedy = "give more, lower data.size_px, or take a smaller base"
        return f"nothing fits {found.memory_bytes / GIB:.2f} GiB: {takes}; {remedy}"
    before = dict(flatten(asdict(found.settings))) | plan_here(found.settings).settings()
    new = {key: value for key, value in found.chosen.plan.settings().items() if before[key] != value}
    sets = [f"--set {key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in new.items()]
    return f"fastest that fits: {name(found.chosen.plan)}; {' '.join(sets) or 'the settings as they are'}"
