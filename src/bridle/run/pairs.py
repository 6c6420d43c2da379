"""A run's data: its cache, and the held-out pairs as pictures."""

from dataclasses import dataclass
from pathlib import Path

from bridle.base.base import Base
from bridle.cache.build import build_cache
from bridle.cache.store import Cache
from bridle.data.annotate import get_annotator
from bridle.data.load import load_example
from bridle.data.settings import DataSettings
from bridle.data.sources import Source, open_source
from bridle.evaluate.evaluate import HeldOutPair
from bridle.train.checkpoint import newest_data
from bridle.train.loop import CHECKPOINTS


@dataclass(frozen=True)
class RunData:
    """What training and measuring both need."""

    settings: DataSettings
    source: Source
    cache: Cache

    def held_out(self, count: int | None = None) -> list[HeldOutPair]:
        """The first so many pairs that training never sees, decoded."""
        records = {record.id: record for record in self.source.records}
        ids = [id.rpartition("#")[0] for id in self.cache.held_out_ids][:count]
        annotator = get_annotator(self.settings.annotator)
        examples = [load_example(records[id], self.settings, annotator, 0, train=False) for id in ids]
        return [HeldOutPair(id=e.id, image=e.image, hint=e.hint, caption=e.caption) for e in examples]


def load_data(settings: DataSettings, base: Base, folder: Path, *, force: bool = False) -> RunData:
    """Open the data set and encode it, or reuse the cache in `folder`.

    Args:
        folder: the run's.
        force: though the run has trained on something else.

    Raises: DataError: the run has trained on something else, of which some may be held out now. Nothing is touched.
    """
    source = open_source(settings.folder, settings.annotator)
    annotator, trained_on = get_annotator(settings.annotator), None if force else newest_data(folder / CHECKPOINTS)
    cache = build_cache(source, settings, annotator, base, folder / "cache", trained_on=trained_on)
    return RunData(settings, source, cache)


def open_data(settings: DataSettings, folder: Path) -> RunData:
    """The same, already encoded by another process. Raises: CacheError: it is not."""
    source = open_source(settings.folder, settings.annotator)
    return RunData(settings, source, Cache.open(folder / "cache"))
