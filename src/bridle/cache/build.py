"""Encode a data set once. In: a source, settings and encoders. Out: a cache folder, reused until something changes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from bridle.atomic import write_text
from bridle.cache.encode import Encoders, to_channels_first, to_pixels
from bridle.cache.fingerprint import Fingerprint, describe_change, hash_fingerprint, take_fingerprint
from bridle.cache.index import INDEX, Index, Row, read_index, write_index
from bridle.cache.shards import PairWriter, write_captions
from bridle.cache.store import Cache
from bridle.data.annotate.annotator import Annotator
from bridle.data.example import HELD_OUT, TRAIN, Example, Quarantined, Record
from bridle.data.load import load_example, share_out
from bridle.data.settings import DataSettings
from bridle.data.sources import Source
from bridle.data.words import counted
from bridle.errors import CacheError, ConfigError, DataError

QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One draw of one pair, before it is decoded."""

    record: Record
    variant: int
    split: str

    @property
    def id(self) -> str:
        return f"{self.record.id}#{self.variant}"


def build_cache(
    source: Source,
    settings: DataSettings,
    annotator: Annotator,
    encoders: Encoders,
    folder: Path,
    batch: int = 16,
    trained_on: str | None = None,
) -> Cache:
    """Encode every pair and every distinct caption, or reuse what `folder` holds if nothing has changed.

    Says on stderr which of the two happened, and why. Pairs that cannot be decoded are listed in quarantine.jsonl.

    Args:
        source: the pairs.
        settings: how they are cut and drawn.
        annotator: makes the hints of a source that brings none.
        encoders: of the base.
        folder: of the cache; only files that a cache consists of are touched.
        batch: pictures, or captions, encoded at once.
        trained_on: the fingerprint of the cache that a run has trained on; no other is built in its place.

    Raises:
        ConfigError: the size does not fit the base.
        DataError: no pair could be decoded, or none is left to train on; or it would be another cache than was trained
            on: then the folder is as it was.
    """
    if settings.size_px % encoders.size_factor:
        raise ConfigError(f"setting data.size_px is {settings.size_px}; expected a multiple of {encoders.size_factor}")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    fingerprint = take_fingerprint(source, settings, annotator, encoders, folder)
    reason = _find_reason(folder, fingerprint)
    if trained_on is not None and hash_fingerprint(fingerprint) != trained_on:
        remedy = "put it back, or start a run in another folder (--out)"
        raise DataError(f"data is not what this run was trained on ({reason or 'the cache is not its own'}): {remedy}")
    if reason is None:
        console.print("cache reused: nothing has changed")
    else:
        console.print(f"cache built: {reason}")
        _build(source, settings, annotator, encoders, folder, batch, fingerprint, console)
    cache = Cache.open(folder)
    # Also when reused: a new picture without a caption changes no sample, but its owner wants to know.
    _write_quarantine(folder, [*source.quarantine, *cache.undecodable], console)
    console.print(cache.summary())
    return cache


def _find_reason(folder: Path, fingerprint: Fingerprint) -> str | None:
    """Why a cache has to be built; None: it need not be."""
    if not (folder / INDEX).exists():
        return f"{folder} holds no finished one"
    try:
        change = describe_change(read_index(folder).fingerprint, fingerprint)
    except CacheError as error:
        return str(error).split(";")[0]  # without the remedy: this is it
    return None if change is None else f"changed: {change}"


def _build(
    source: Source,
    settings: DataSettings,
    annotator: Annotator,
    encoders: Encoders,
    folder: Path,
    batch: int,
    fingerprint: Fingerprint,
    console: Console,
) -> None:
    samples = _list_samples(source, settings)
    if not any(sample.split == TRAIN for sample in samples):  # known before anything is encoded
        _write_quarantine(folder, list(source.quarantine), console)
        raise _nothing_left(source, settings, [])
    _clear(folder)
    rows = {"": 0}  # caption -> its row, in order of first use
    undecodable: list[Quarantined] = []
    writer = PairWriter(folder)
    with torch.inference_mode():
        for some in _show_progress(samples, batch, console):
            loaded = list(_load(some, settings, annotator, undecodable))
            if loaded:
                _encode(loaded, encoders, writer, rows)
        writer.flush()
        if not any(row.split == TRAIN for shard in writer.shards for row in shard.rows):
            _write_quarantine(folder, [*source.quarantine, *undecodable], console)
            raise _nothing_left(source, settings, undecodable)
        _say_what_is_held_out(samples, writer, console)
        _say_what_is_cut(list(rows), writer, encoders, console)
        text = write_captions(folder, list(rows), encoders, batch)
    index = Index(
        fingerprint=fingerprint,
        undecodable=tuple(undecodable),
        captions=tuple(rows),
        pairs=tuple(writer.shards),
        text=tuple(text),
    )
    write_index(folder, index)


def _clear(folder: Path) -> None:
    """Remove an old cache, its index first: what is left of it when this is interrupted is not taken for a cache."""
    (folder / INDEX).unlink(missing_ok=True)
    for pattern in ("pairs-*.safetensors", "text-*.safetensors", ".pairs-*", ".text-*"):  # the last are left by kills
        for path in folder.glob(pattern):
            path.unlink()


def _list_samples(source: Source, settings: DataSettings) -> list[_Sample]:
    train, held_out = share_out(source.records, settings.held_out)
    return [
        *(_Sample(record=record, variant=0, split=HELD_OUT) for record in held_out),
        *(_Sample(record=r, variant=variant, split=TRAIN) for r in train for variant in range(settings.variants)),
    ]


def _load(
    samples: Sequence[_Sample], settings: DataSettings, annotator: Annotator, undecodable: list[Quarantined]
) -> Iterator[tuple[_Sample, Example]]:
    """Decode samples; a pair that fails is added to `undecodable` once, whatever its number of variants."""
    for sample in samples:
        try:
            yield sample, load_example(sample.record, settings, annotator, sample.variant, sample.split == TRAIN)
        except DataError as error:
            if sample.variant == 0:
                undecodable.append(Quarantined(id=sample.record.id, reason=str(error)))


def _encode(
    loaded: Sequence[tuple[_Sample, Example]], encoders: Encoders, writer: PairWriter, rows: dict[str, int]
) -> None:
    mean, std = encoders.encode_images(to_pixels([example.image for _, example in loaded]))
    hint = encoders.encode_hints(to_channels_first([example.hint for _, example in loaded]))
    entries = [
        Row(id=sample.id, caption=rows.setdefault(example.caption, len(rows)), split=sample.split)
        for sample, example in loaded
    ]
    writer.add(entries, mean, std, hint)


def _say_what_is_held_out(samples: list[_Sample], writer: PairWriter, console: Console) -> None:
    """One line where held-out pairs could not be decoded: others do not take their place."""
    chosen = sum(sample.split == HELD_OUT for sample in samples)
    held_out = sum(row.split == HELD_OUT for shard in writer.shards for row in shard.rows)
    if held_out < chosen:
        console.print(f"{counted(held_out, 'pair')} held out in place of {chosen}: the rest could not be decoded")


def _say_what_is_cut(captions: list[str], writer: PairWriter, encoders: Encoders, console: Console) -> None:
    """One line where captions are longer than the text encoder reads."""
    most = encoders.max_tokens
    cut = {row for row, count in enumerate(encoders.count_tokens(captions)) if count > most}
    if not cut:
        return
    name = next(row.id for shard in writer.shards for row in shard.rows if row.caption in cut).rpartition("#")[0]
    longer = f"{len(cut)} of {len(captions) - 1} captions {'is' if len(cut) == 1 else 'are'} longer than {most} tokens"
    console.print(f"{longer}; the rest is cut off, as the base does (such as {name})")


def _write_quarantine(folder: Path, quarantine: list[Quarantined], console: Console) -> None:
    lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in quarantine]
    write_text(folder / QUARANTINE, "".join(lines))
    if quarantine:
        verb = "was" if len(quarantine) == 1 else "were"
        console.print(f"{counted(len(quarantine), 'pair')} {verb} set aside; see {folder / QUARANTINE}")


def _nothing_left(source: Source, settings: DataSettings, undecodable: list[Quarantined]) -> DataError:
    pairs = counted(len(source.records), "pair")
    if all(record.split == HELD_OUT for record in source.records):
        return DataError(f"{source.folder} holds out all of its {pairs}; set the split of some to train")
    if not share_out(source.records, settings.held_out)[0]:
        return DataError(
            f"{source.folder} has {pairs} and held_out is {settings.held_out}, which leaves none to train on;"
            f" {_remedy(len(source.records))}"
        )
    shown = "; ".join(f"{item.id}: {item.reason}" for item in undecodable[:3])
    return DataError(f"none of the training pairs of {source.folder} could be decoded, such as {shown}")


def _remedy(pairs: int) -> str:
    """How some are left to train on."""
    more = "add pictures"
    return f"{more}, or hold out fewer: --set data.held_out=N with N below {pairs}" if pairs > 1 else more


def _show_progress(samples: list[_Sample], batch: int, console: Console) -> Iterator[list[_Sample]]:
    """Hand out the samples in batches and move a bar as they are used up."""
    with Progress(console=console) as progress:
        task = progress.add_task("encoding pairs", total=len(samples))
        for start in range(0, len(samples), batch):
            yield samples[start : start + batch]
            progress.advance(task, batch)
