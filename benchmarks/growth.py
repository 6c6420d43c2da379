"""How cost grows with what users grow: resolution, batch, number of controls, pairs, hint channels.

In: nothing. Out: a table, JSON and a plot. Steps are those of Bridle's trainer on the embedded base, on random pairs
and one thread. Each axis is a process of its own; its values take turns, so that whatever else the machine does slows
all alike. Caches are written by the package's own writer, of random latents, hints and texts.

    python benchmarks/growth.py --json growth.json --plot docs/images/growth.png
    python benchmarks/growth.py --pairs 1000 10000 --rounds 3    # quicker; 100,000 pairs take 10 GB of disk
    python benchmarks/growth.py --draw growth.json --plot growth.png
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bridle.atomic import write_text, write_with
from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.cache.index import Index, Row, write_index
from bridle.cache.shards import PAIRS_PER_SHARD, PairWriter, write_captions
from bridle.cache.store import Cache
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.data.annotate import get_annotator
from bridle.data.example import Record
from bridle.data.load import load_example
from bridle.data.settings import DataSettings
from bridle.run.panels import ACCENT, CONTROL, DPI, GRID, INK, QUIET, SMALL, TEXT
from bridle.run.worker import HINT_CHANNELS, RandomCache
from bridle.train.feed import Steps
from bridle.train.settings import TrainSettings
from bridle.train.trainer import Trainer

SIZE_PX, BATCH = 128, 8
RESOLUTIONS_PX = (64, 128, 256, 384, 512)
BATCHES = (1, 2, 4, 8, 16, 32)
CONTROLS = (0, 1, 2, 3, 4)
CHANNELS = (1, 3, 6, 12, 24, 48)
PAIRS = (1_000, 10_000, 100_000)
TRAINED = 16  # pairs of a step by default, for the loader's share
READS = 60  # batches
FILES = 48  # pairs of pictures that are decoded
MARGIN = 1.25  # of a picture's file over what it is cut to, so that it is resized

Work = Callable[[], object]
Took = dict[str, float]


def timed(work: Work) -> Took:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    work()
    return {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}


def median(several: Sequence[Took]) -> Took:
    return {clock: statistics.median(took[clock] for took in several) for clock in several[0]}


def interleave(works: Mapping[Any, Work], rounds: int) -> dict[str, Took]:
    """Medians of each, in turns, forwards and backwards. What goes before untimed brings weights back near."""
    took: dict[Any, list[Took]] = {value: [] for value in works}
    for turn in range(rounds):
        for value in works if turn % 2 == 0 else reversed(works):
            works[value]()
            took[value].append(timed(works[value]))
    return {str(value): median(several) for value, several in took.items()}


# --- steps


def training(size_px: int = SIZE_PX, batch: int = BATCH, channels: int = HINT_CHANNELS) -> Work:
    """One step of a trainer of its own: it changes the base that it trains on."""
    base = load_base()
    width = size_px // base.size_factor
    cache = RandomCache(
        latents=(base.latent_channels, width, width),
        hint=(channels, size_px, size_px),
        empty_text=base.encode_captions([""]),
    )
    control = Control.from_base(base.pipeline, hint_channels=channels, size_factor=base.size_factor)
    settings = TrainSettings(batch=batch, precision="bf16")
    trainer = Trainer(control, base.denoiser, base.schedule, cast(Any, cache), settings)
    rows = Steps(cast(Any, cache), settings, len(trainer.schedule))[0]
    return partial(trainer.step, 0, rows)


def denoising(count: int) -> Work:
    """One denoising step of a stock pipeline's U-Net, with so many controls attached."""
    base = load_base()
    width = SIZE_PX // base.size_factor
    controls = {f"number_{number}": Control.from_base(base.pipeline) for number in range(count)}
    latents, text = torch.randn(BATCH, base.latent_channels, width, width), base.encode_captions([""] * BATCH).states

    @torch.inference_mode()
    def work() -> None:
        base.denoiser(latents, torch.tensor(500), text)

    if controls:
        rig = attach(base.pipeline, **{name: control.eval() for name, control in controls.items()})
        for name in controls:
            rig[name].set(hint=torch.rand(BATCH, HINT_CHANNELS, SIZE_PX, SIZE_PX))
    return work


# --- caches


class RandomTexts:
    """In the place of a base's text encoder."""

    def __init__(self, shape: Sequence[int], batch: int) -> None:
        self.states = torch.randn(batch, *shape)

    def encode_captions(self, captions: list[str]) -> Text:
        return Text(self.states[: len(captions)])


def write_cache(folder: Path, pairs: int, size_px: int = SIZE_PX) -> None:
    """As a data set of so many pairs, each with a caption of its own, leaves it."""
    base = load_base()
    width, batch = size_px // base.size_factor, PAIRS_PER_SHARD
    writer, folder_name = PairWriter(folder), "pictures"
    mean, std = torch.randn(2, batch, base.latent_channels, width, width)
    hint = torch.randint(0, 256, (batch, HINT_CHANNELS, size_px, size_px), dtype=torch.uint8)
    for start in range(0, pairs, batch):
        numbers = range(start, min(start + batch, pairs))
        rows = [Row(id=f"{folder_name}/{number:06}.png#0", caption=number + 1, split="train") for number in numbers]
        writer.add(rows, mean[: len(rows)], std[: len(rows)], hint[: len(rows)])
    writer.flush()
    captions = ["", *(f"a photograph of thing number {number} on a table" for number in range(pairs))]
    texts = RandomTexts(base.encode_captions([""]).states.shape[1:], batch=64)
    text = write_captions(folder, captions, cast(Any, texts), batch=64)
    parts = {"base": "random", "annotator": {"name": "files"}, "settings": {"size_px": size_px}, "data": "random"}
    index = Index(
        fingerprint=parts, undecodable=(), captions=tuple(captions), pairs=tuple(writer.shards), text=tuple(text)
    )
    write_index(folder, index)


def read_cache(folder: Path) -> dict[str, Any]:
    """What opening costs, and a batch of pairs from all over it; run in a process of its own."""
    before = memory_mib()
    opening = timed(lambda: Cache.open(folder))
    cache = Cache.open(folder)
    ids, rng = cache.train_ids, random.Random(0)
    opened = memory_mib()
    batches = [rng.sample(ids, TRAINED) for _ in range(READS)]
    reads = [timed(partial(cache.batch, some)) for some in batches]
    disk = sum(path.stat().st_size for path in folder.iterdir())
    index, after = (folder / "index.json").stat().st_size, memory_mib()
    grown = {kind: after[kind] - opened[kind] for kind in after}
    return {
        "disk_bytes": disk,
        "index_bytes": index,
        "open": opening,
        "index_mib": opened["RssAnon"] - before["RssAnon"],
        "read": median(reads),
        "while_reading_mib": grown,
    }


def memory_mib() -> dict[str, float]:
    """This process's own memory, and the pages of files that it holds mapped."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[0] in ("RssAnon:", "RssFile:")}


# --- a cached pair against its files


def draw_files(folder: Path, size_px: int) -> list[Record]:
    """Pairs of PNG files as large and as detailed as photographs: noise at three scales, and lines."""
    side, rng, records = round(size_px * MARGIN), np.random.default_rng(0), []
    for number in range(FILES):
        layers = [
            Image.fromarray(rng.integers(0, 256, (side // scale, side // scale, 3), dtype=np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
            for scale in (64, 16)
        ]
        picture = np.asarray(Image.blend(*layers, 0.3)).astype(np.int16) + rng.integers(-2, 3, (side, side, 3))
        edges = np.abs(np.diff(np.asarray(layers[1].convert("L")).astype(np.int16), axis=0, append=0)) > 12
        hint = np.repeat(edges[..., None].astype(np.uint8) * 255, 3, axis=2)
        paths = [folder / f"{kind}-{size_px}-{number}.png" for kind in ("picture", "hint")]
        for path, pixels in zip(paths, (picture.clip(0, 255).astype(np.uint8), hint), strict=True):
            Image.fromarray(pixels).save(path)
        records.append(Record(id=paths[0].name, image=paths[0], hint=paths[1], caption="a picture"))
    return records


def measure_decoding(size_px: int, folder: Path, rounds: int) -> dict[str, Took]:
    """CPU and wall seconds of a pair: from its files, and from the cache in batches of the default size."""
    records, settings = draw_files(folder, size_px), DataSettings(folder=folder, size_px=size_px)
    write_cache(folder / f"cache-{size_px}-px", FILES, size_px)
    cache, annotator = Cache.open(folder / f"cache-{size_px}-px"), get_annotator("canny")

    def decode() -> None:
        for record in records:
            load_example(record, settings, annotator, 0, train=True)

    def read() -> None:
        for start in range(0, FILES, TRAINED):
            cache.batch(cache.train_ids[start : start + TRAINED])

    took = interleave({"files": decode, "cache": read}, rounds)
    return {name: {clock: took_s / FILES for clock, took_s in times.items()} for name, times in took.items()}


def measure_loader(folder: Path, rounds: int) -> dict[str, Took]:
    """A step of the default batch, and what comes before it: reading its pairs, and drawing its noise."""
    base: Base = load_base()
    write_cache(folder / "cache-loader", 1024)
    cache, settings = Cache.open(folder / "cache-loader"), TrainSettings(batch=TRAINED, precision="bf16")
    control = Control.from_base(base.pipeline, size_factor=base.size_factor)
    trainer = Trainer(control, base.denoiser, base.schedule, cache, settings)
    steps, numbers = Steps(cache, settings, len(trainer.schedule)), iter(range(10**6))
    rows = steps[0]
    pairs = lambda: cache.batch(random.sample(steps.ids, TRAINED))  # noqa: E731
    works = {"rows": lambda: steps[next(numbers)], "of them pairs": pairs, "step": partial(trainer.step, 0, rows)}
    return interleave(works, rounds)


# --- all of it


AXES: dict[str, dict[Any, Callable[[], Work]]] = {
    "resolution": {size: partial(training, size_px=size, batch=2) for size in RESOLUTIONS_PX},
    "batch": {size: partial(training, batch=size) for size in BATCHES},
    "controls": {count: partial(denoising, count) for count in CONTROLS},
    "channels": {count: partial(training, channels=count) for count in CHANNELS},
}


def measure_axis(name: str, rounds: int) -> dict[str, Took]:
    return interleave({value: make() for value, make in AXES[name].items()}, rounds)


def measure_files(folder: Path, rounds: int) -> dict[str, Any]:
    decoding = {str(size): measure_decoding(size, folder, rounds) for size in (128, 512)}
    return {"decoding": decoding, "loader": measure_loader(folder, 5 * rounds)}


def apart(*arguments: object) -> Any:
    """What this file prints, as JSON, when it is run by itself with these arguments."""
    command = [sys.executable, __file__, *map(str, arguments)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(said if len(said) < 1000 else said[:1000] + " ...", end="", flush=True)
    return json.loads(said)


def measure(rounds: int, pairs: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": rounds}
    for name in AXES:
        found[name] = apart("--axis", name, "--rounds", rounds)
    found["pairs"] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found |= apart("--files", name, "--rounds", rounds)
        for count in pairs:
            write_cache(folder / str(count), count)
            os.sync()
            found["pairs"][str(count)] = apart("--read", folder / str(count))
            shutil.rmtree(folder / str(count))
    return found


def show(found: dict[str, Any]) -> None:
    for name in ("resolution", "batch", "controls", "channels"):
        print(f"\n{name:12}{'CPU s':>10}{'wall s':>10}")
        for value, took in found[name].items():
            print(f"{value:12}{took['cpu_s']:10.3f}{took['wall_s']:10.3f}")
    print(f"\n{'pairs':10}{'disk MB':>9}{'open s':>8}{'index MiB':>10}{'batch ms':>9}{'own MiB':>9}{'mapped MiB':>11}")
    for count, took in found["pairs"].items():
        grown = took["while_reading_mib"]
        print(
            f"{int(count):<10,}{took['disk_bytes'] / 1e6:9.0f}{took['open']['cpu_s']:8.3f}{took['index_mib']:10.1f}"
            f"{1e3 * took['read']['cpu_s']:9.2f}{grown['RssAnon']:9.1f}{grown['RssFile']:11.1f}"
        )
    for size, took in found["decoding"].items():
        files, cache = took["files"]["cpu_s"], took["cache"]["cpu_s"]
        print(f"a pair at {size} px: files {1e3 * files:.2f} ms, cache {1e3 * cache:.3f} ms: {files / cache:.1f}x")
    step = found["loader"]["step"]["cpu_s"]
    shares = [f"{name} {100 * took['cpu_s'] / step:.2f}%" for name, took in found["loader"].items() if name != "step"]
    print(f"loader, of a step of {TRAINED} pairs: {', '.join(shares)}")


# --- the plot


def draw(found: dict[str, Any]) -> Figure:
    """A panel for each axis, two for pairs. A dashed line is straight, through the first value and the middle one."""
    figure = Figure((10.0, 6.9), dpi=DPI, facecolor="white")
    panels: list[Axes] = list(figure.subplots(2, 3).flat)
    figure.subplots_adjust(left=0.055, right=0.945, top=0.79, bottom=0.075, hspace=0.62, wspace=0.3)
    title, below = "How cost grows, on the embedded base and one CPU thread", "dashed: were it a straight line"
    figure.text(0.055, 0.945, title, fontsize=14, fontweight="bold", color=INK)
    figure.text(0.055, 0.905, f"Processor seconds, medians of {found['rounds']} rounds; {below}",
                fontsize=TEXT, color=QUIET)  # fmt: skip
    steps = {name: [took["cpu_s"] for took in found[name].values()] for name in AXES}
    x = {name: [int(value) for value in found[name]] for name in (*AXES, "pairs")}
    head(panels[0], "Resolution", "s a step of 2 pairs, by area")
    line(panels[0], [size**2 for size in x["resolution"]], steps["resolution"])
    panels[0].set_xticks([size**2 for size in x["resolution"]], ["", "128", "256", "384", "512 px"])
    head(panels[1], "Batch", "s a step, by pairs in it")
    line(panels[1], x["batch"], steps["batch"])
    panels[1].set_xticks([1, 8, 16, 32])
    head(panels[2], "Controls", f"s a denoising step of {BATCH} pictures")
    line(panels[2], x["controls"], steps["controls"])
    panels[2].set_xticks(x["controls"])
    head(panels[3], "Hint channels", f"s a step of {BATCH} pairs")
    line(panels[3], x["channels"], steps["channels"], straight=False)
    panels[3].set_xticks([1, 6, 12, 24, 48])
    pairs = list(found["pairs"].values())
    head(panels[4], "Pairs: reading", f"ms a batch of {TRAINED}, from all over it")
    line(panels[4], x["pairs"], [1e3 * took["read"]["cpu_s"] for took in pairs], straight=False)
    head(panels[5], "Pairs: start and memory", "s to open the cache, MiB held")
    opens = [took["open"]["cpu_s"] for took in pairs]
    memory = [took["index_mib"] + sum(took["while_reading_mib"].values()) for took in pairs]
    line(panels[5], x["pairs"], opens, straight=False)
    beside = panels[5].twinx()
    line(cast(Axes, beside), x["pairs"], memory, straight=False, colour=ACCENT)
    beside.set_ylim(0, 2 * max(memory))  # apart from the other line
    beside.grid(visible=False)
    label(panels[5], x["pairs"], opens[-1], f"{opens[-1]:.2f} s", CONTROL)
    label(cast(Axes, beside), x["pairs"], memory[-1], f"{memory[-1]:.0f} MiB", ACCENT)
    panels[4].set_xscale("log")
    panels[4].set_xticks(x["pairs"], [f"{count:,}" for count in x["pairs"]])
    panels[4].set_xticks([], minor=True)
    panels[5].set_xticks(x["pairs"], ["", *(f"{count:,}" for count in x["pairs"][1:])])
    return figure


def line(axes: Any, x: list[int], y: list[float], *, straight: bool = True, colour: str = CONTROL) -> None:
    """What was measured, from zero."""
    quiet(axes)
    expected = y
    if straight:
        middle = len(x) // 2
        slope = (y[middle] - y[0]) / (x[middle] - x[0])
        expected = [y[0] + slope * (value - x[0]) for value in x]
        axes.plot(x, expected, color="#8a8f98", linewidth=1.2, linestyle=(0, (5, 3)))
    axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.8)
    axes.set_ylim(0, 1.2 * max(*y, *expected))


def label(axes: Axes, x: list[int], y: float, text: str, colour: str) -> None:
    """The last value's."""
    place = {"xytext": (4, 9), "textcoords": "offset points", "ha": "right"}
    axes.annotate(text, (x[-1], y), fontsize=SMALL, fontweight="bold", color=colour, **place)


def head(axes: Axes, title: str, meaning: str) -> None:
    """What a panel shows, above it."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(title, (0, 1), xytext=(0, 24), fontsize=TEXT, fontweight="bold", color=INK, **place)
    axes.annotate(meaning, (0, 1), xytext=(0, 9), fontsize=SMALL, color=QUIET, **place)


def quiet(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=1.0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=QUIET, labelsize=SMALL, pad=5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of each value")
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, help="caches to write")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them, as PNG")
    parser.add_argument("--draw", type=Path, help="figures measured before, to draw again")
    for name in ("--read", "--files", "--axis"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.axis or options.files or options.read:
        if options.axis:
            said = measure_axis(options.axis, options.rounds)
        elif options.files:
            said = measure_files(Path(options.files), options.rounds)
        else:
            said = read_cache(Path(options.read))
        print(json.dumps(said))
        return
    found = json.loads(options.draw.read_text()) if options.draw else measure(options.rounds, options.pairs)
    show(found)
    if options.json:
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    if options.plot:
        write_with(options.plot, lambda path: FigureCanvasAgg(draw(found)).print_png(path))


if __name__ == "__main__":
    main()
