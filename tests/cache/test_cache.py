"""A cache is built once, reused as long as nothing changes, rebuilt when anything does, and gives back what went in."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bridle.cache import shards
from bridle.cache.build import build_cache
from bridle.cache.encode import to_pixels
from bridle.cache.store import Cache
from bridle.control.text import Text
from bridle.data.annotate.annotator import Annotator
from bridle.data.annotate.canny import Canny
from bridle.data.load import load_example
from bridle.data.settings import DataSettings
from bridle.data.sources import open_source
from bridle.errors import CacheError, ConfigError, DataError

Capture = pytest.CaptureFixture[str]
Change = Callable[["House"], None]


@dataclass
class FakeEncoders:
    """Latents are averages of 8 x 8 pixels; a caption's states are its length."""

    fingerprint: str = "fake 1"
    size_factor: int = 8
    images: int = 0
    captions: list[str] = field(default_factory=list)
    hint_scale: float | None = None  # where hints go through an encoder as well
    pooled: bool = False
    stop_after: int | None = None  # pictures, after which the machine is switched off

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.images += len(pixels)
        if self.stop_after is not None and self.images > self.stop_after:
            raise KeyboardInterrupt
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, torch.full_like(mean, 1e-7)

    def encode_hints(self, hints: Tensor) -> Tensor:
        return hints if self.hint_scale is None else hints.float() * self.hint_scale

    def encode_captions(self, captions: list[str]) -> Text:
        self.captions += captions
        lengths = torch.tensor([len(caption) for caption in captions]).float()
        return Text(lengths[:, None, None].expand(-1, 2, 5), lengths[:, None] if self.pooled else None)

    max_tokens: int = 3

    def count_tokens(self, captions: list[str]) -> list[int]:
        return [len(caption.split()) for caption in captions]


@dataclass
class House:
    """A data set of eight pairs and all that a cache of it depends on; tests change one thing at a time."""

    folder: Path
    cache: Path
    values: dict[str, Any] = field(default_factory=dict)
    annotator: Annotator = field(default_factory=Canny)
    encoders: FakeEncoders = field(default_factory=FakeEncoders)

    @property
    def settings(self) -> DataSettings:
        return DataSettings(**{"folder": self.folder, "size_px": 16, "held_out": 2, "variants": 2, **self.values})

    def write(self, number: int, caption: str, seed: int | None = None) -> None:
        pixels = np.random.default_rng(number if seed is None else seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.folder / f"{number}.png")
        (self.folder / f"{number}.txt").write_text(caption)

    def build(self) -> Cache:
        source = open_source(self.folder, self.annotator.name)
        return build_cache(source, self.settings, self.annotator, self.encoders, self.cache, batch=3)


@pytest.fixture
def house(tmp_path: Path) -> House:
    house = House(tmp_path / "data", tmp_path / "cache")
    house.folder.mkdir()
    for number in range(8):
        house.write(number, "fish " * (number % 4))
    return house


def test_each_pair_and_each_distinct_caption_is_encoded_once(house: House) -> None:
    cache = house.build()
    assert house.encoders.images == len(cache.train_ids) + len(cache.held_out_ids) == 6 * 2 + 2
    assert sorted(house.encoders.captions) == ["", "fish", "fish fish", "fish fish fish"]
    held_out = {id.split("#")[0] for id in cache.held_out_ids}
    assert len(held_out) == 2
    assert held_out.isdisjoint(id.split("#")[0] for id in cache.train_ids)


@pytest.mark.parametrize("rows_per_shard", [1, 4, 1000])
def test_a_batch_gives_back_what_went_in(house: House, rows_per_shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PAIRS_PER_SHARD", rows_per_shard)
    monkeypatch.setattr(shards, "TEXT_SHARD_BYTES", rows_per_shard * 40)  # of one caption: 2 states of 5, float32
    cache = house.build()
    ids = [*reversed(cache.train_ids), *cache.held_out_ids, cache.train_ids[0]]
    batch = cache.batch(ids)
    records = {record.id: record for record in open_source(house.folder).records}
    for row, sample in enumerate(ids):
        name, variant = sample.split("#")
        train = sample in cache.train_ids
        example = load_example(records[name], house.settings, house.annotator, int(variant), train)
        mean, std = FakeEncoders().encode_images(to_pixels([example.image]))
        assert torch.equal(batch.mean[row], mean[0])
        assert torch.equal(batch.std[row], std[0])
        assert torch.equal(batch.hint[row], torch.from_numpy(example.hint).permute(2, 0, 1) / 255)
        assert batch.captions[row] == example.caption
        assert batch.text.states[row].unique().tolist() == [len(example.caption)]
    assert batch.hint.shape == (len(ids), 3, 16, 16)
    assert batch.hint.max() == 1
    assert batch.kept_hint.dtype is torch.uint8  # a quarter of the memory, and of what goes to a GPU
    assert cache.empty_text.states.tolist() == torch.zeros(1, 2, 5).tolist()


def test_pixels_reach_the_encoder_in_minus_one_to_one() -> None:
    white_and_black = [np.full((2, 2, 3), value, np.uint8) for value in (255, 0)]
    assert to_pixels(white_and_black).flatten(1).unique(dim=1).tolist() == [[1], [-1]]


def touch(house: House) -> None:
    os.utime(house.folder / "0.png", (1, 1))


def move(house: House) -> None:
    house.folder = house.folder.rename(house.folder.with_name("moved"))


def forget_stamps(house: House) -> None:
    (house.cache / "stamps.json").write_text("[")


@pytest.mark.parametrize("change", [lambda house: None, touch, move, forget_stamps])
def test_an_unchanged_data_set_is_reused_without_an_encoder(house: House, change: Change, capsys: Capture) -> None:
    first = house.build()
    assert "cache built" in capsys.readouterr().err
    change(house)
    house.encoders = FakeEncoders()
    again = house.build()
    assert (house.encoders.images, house.encoders.captions) == (0, [])
    assert "cache reused" in capsys.readouterr().err
    assert again.fingerprint == first.fingerprint


def set_value(key: str, value: object) -> Change:
    return lambda house: house.values.update({key: value})


CHANGES: dict[str, Change] = {
    "changed: settings size_px 16 -> 24": set_value("size_px", 24),
    "changed: settings variants 2 -> 3": set_value("variants", 3),
    "changed: annotator low 100 -> 20": lambda house: setattr(house, "annotator", Canny(low=20)),
    "changed: the base": lambda house: setattr(house.encoders, "fingerprint", "fake 2"),
    "changed: pictures, hints, captions or splits": lambda house: house.write(0, "another caption"),
    "changed: pictures, hints, captions or splits ": lambda house: house.write(0, "", seed=99),
    "changed: pictures, hints, captions or splits  ": lambda house: house.write(8, "one more"),
    "pairs-00000.safetensors is missing": lambda house: (house.cache / "pairs-00000.safetensors").unlink(),
    "index.json cannot be read": lambda house: (house.cache / "index.json").write_text("{"),
    "index.json is not of version": lambda house: (house.cache / "index.json").write_text("{}"),
    "index.json lacks": lambda house: (house.cache / "index.json").write_text('{"version": 1}'),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_any_change_rebuilds_and_says_what_it_was(house: House, reason: str, capsys: Capture) -> None:
    house.build()
    CHANGES[reason](house)
    images = house.encoders.images
    house.build()
    assert house.encoders.images > images
    assert reason.strip() in capsys.readouterr().err
    images = house.encoders.images
    house.build()
    assert house.encoders.images == images


@pytest.mark.parametrize("finished_before", [False, True])
def test_a_build_killed_before_the_index_is_rebuilt(house: House, finished_before: bool) -> None:
    if finished_before:
        house.build()
        house.write(0, "changed")
    house.encoders = FakeEncoders(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        house.build()
    with pytest.raises(CacheError, match="no finished cache"):
        Cache.open(house.cache)
    house.encoders = FakeEncoders()
    assert len(house.build().train_ids) == house.encoders.images - 2 == 12


def test_every_unreadable_file_is_named_and_set_aside(house: House, capsys: Capture) -> None:
    (house.folder / "3.png").write_bytes(b"no picture")
    (house.folder / "5.txt").unlink()
    cache = house.build()
    assert len(cache.train_ids) + len(cache.held_out_ids) == 2 * 6 - len(cache.held_out_ids)
    lines = [json.loads(line) for line in (house.cache / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {"3.png", "5.png"}
    assert len(lines) == 2  # once, although there are two variants
    assert all(line["reason"] for line in lines)
    assert f"2 pairs were set aside; see {house.cache / 'quarantine.jsonl'}" in capsys.readouterr().err


def test_fewer_held_out_pairs_than_asked_for_are_told(house: House, capsys: Capture) -> None:
    cache = house.build()
    (house.folder / cache.held_out_ids[0].split("#")[0]).write_bytes(b"no picture")
    assert "in place of" not in capsys.readouterr().err
    house.build()
    assert "1 pair held out in place of 2: the rest could not be decoded" in capsys.readouterr().err


def test_captions_that_are_cut_are_counted_and_one_is_named(house: House, capsys: Capture) -> None:
    house.build()
    assert "tokens" not in capsys.readouterr().err
    house.encoders.max_tokens = 2
    house.encoders.fingerprint = "fake 2"
    house.build()
    cut = "1 of 3 captions is longer than 2 tokens; the rest is cut off, as the base does (such as "
    said = capsys.readouterr().err
    assert cut + "3.png)" in said or cut + "7.png)" in said


def test_a_reused_cache_still_names_what_was_set_aside(house: House, capsys: Capture) -> None:
    (house.folder / "3.png").write_bytes(b"no picture")
    house.build()
    shutil.copy(house.folder / "0.png", house.folder / "new.png")
    house.build()
    assert "cache reused" in capsys.readouterr().err
    lines = (house.cache / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["new.png", "3.png"]


def test_nothing_decoded_is_an_error_and_no_cache(house: House) -> None:
    for path in house.folder.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"could be decoded, such as \d\.png"):
        house.build()
    assert not (house.cache / "index.json").exists()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"held_out": 8}, DataError, "has 8 pairs .* --set data.held_out=N with N below 8"),
        ({"size_px": 24}, ConfigError, "setting data.size_px is 24; expected a multiple of 16"),
    ],
)
def test_settings_that_cannot_work_are_named(
    house: House, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    house.values = values
    house.encoders.size_factor = 16 if "size_px" in values else 8
    with pytest.raises(error, match=message):
        house.build()
    assert house.encoders.images == 0


def test_hints_from_files_need_no_annotator(house: House) -> None:
    rows = [{"file_name": f"{n}.png", "text": "x", "hint": f"{7 - n}.png"} for n in range(8)]
    (house.folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache = house.build()
    assert cache.annotator == "files"
    house.annotator = Canny(low=1)
    images = house.encoders.images
    house.build()
    assert house.encoders.images == images


def write_rows(house: House, *columns: dict[str, str]) -> None:
    rows = [{"file_name": f"{n}.png", "text": "x", **more} for n, more in enumerate(columns)]
    (house.folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_hints_from_the_conditions_column_are_told_and_need_no_annotator(house: House, capsys: Capture) -> None:
    write_rows(house, *({"canny": f"{7 - n}.png"} for n in range(8)))
    cache = house.build()
    assert cache.annotator == "canny"
    assert "hints: canny from files" in capsys.readouterr().err
    records = {record.id: record for record in open_source(house.folder, "canny").records}
    for id in cache.held_out_ids:
        example = load_example(records[id.split("#")[0]], house.settings, house.annotator, 0, train=False)
        hint = cache.batch([id]).hint[0]
        assert torch.equal(hint, torch.from_numpy(example.hint).permute(2, 0, 1) / 255)
    house.annotator, images = Canny(low=1), house.encoders.images
    house.build()
    assert house.encoders.images == images


@dataclass(frozen=True)
class Normals(Canny):
    """Only its name counts: the hints come from files."""

    name: ClassVar[str] = "normals"


@pytest.mark.parametrize("column", ["hint", "canny"])
def test_what_hint_files_show_is_part_of_the_fingerprint(house: House, column: str, capsys: Capture) -> None:
    write_rows(house, *({column: f"{n}.png", "normals": f"{n}.png"} for n in range(8)))
    first = house.build()
    house.annotator = Normals()  # mirrored in another way
    assert house.build().fingerprint != first.fingerprint
    assert "changed: annotator" in capsys.readouterr().err


def test_held_out_pairs_are_those_that_the_data_set_names(house: House, capsys: Capture) -> None:
    write_rows(house, *({"split": "test" if n % 2 else "train"} for n in range(8)))
    cache = house.build()
    assert {id.split("#")[0] for id in cache.train_ids} == {f"{n}.png" for n in (0, 2, 4, 6)}
    assert {int(id[0]) % 2 for id in cache.held_out_ids} == {1}
    assert len(cache.held_out_ids) == 2
    write_rows(house, *({"split": "test" if n % 2 == 0 else "train"} for n in range(8)))
    again = house.build()
    assert "changed: pictures, hints, captions or splits" in capsys.readouterr().err
    assert {int(id[0]) % 2 for id in again.train_ids} == {1}


def test_a_data_set_that_holds_out_everything_is_an_error(house: House) -> None:
    write_rows(house, *({"split": "val"} for _ in range(8)))
    with pytest.raises(DataError, match="holds out all of its 8 pairs; set the split of some to train"):
        house.build()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["pairs-00000.safetensors", "text-00000.safetensors"])
@pytest.mark.parametrize("harm", [Path.unlink, cut])
def test_a_missing_or_short_shard_is_noticed_when_opening(
    house: House, name: str, harm: Callable[[Path], None]
) -> None:
    house.build()
    harm(house.cache / name)
    with pytest.raises(CacheError, match=rf"{name}.*delete the folder"):
        Cache.open(house.cache)


@pytest.mark.parametrize("name", ["pairs-00000.safetensors", "text-00000.safetensors"])
def test_a_scrambled_shard_is_noticed_when_reading(house: House, name: str) -> None:
    cache = house.build()
    path = house.cache / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CacheError, match=rf"{name}.*delete the folder"):
        Cache.open(house.cache).batch(cache.train_ids[:1])


def test_an_unknown_sample_is_an_error(house: House) -> None:
    with pytest.raises(CacheError, match=r"'cat' is not in cache .* such as '\d\.png#0'"):
        house.build().batch(["cat"])


def test_a_cache_travels_to_another_machine(house: House, tmp_path: Path) -> None:
    cache = house.build()
    shutil.copytree(house.cache, tmp_path / "elsewhere")
    shutil.rmtree(house.folder)
    moved = Cache.open(tmp_path / "elsewhere")
    assert torch.equal(moved.batch(moved.train_ids).mean, cache.batch(cache.train_ids).mean)
    assert moved.summary().startswith("12 training and 2 held-out samples at 16 px, hints: canny, 3 captions")


def test_a_base_may_have_more_to_say_of_captions_and_see_hints_before_the_control_does(house: House) -> None:
    house.encoders = FakeEncoders(pooled=True, hint_scale=-2.0)
    plain, batch = house.build(), house.build().batch(house.build().train_ids[:3])
    assert batch.text.pooled is not None
    assert batch.text.pooled.tolist() == [[len(caption)] for caption in batch.captions]
    assert plain.empty_text.tensors.keys() == {"states", "pooled"}
    house.encoders, house.cache = FakeEncoders(), house.cache.with_name("other")
    assert torch.equal(batch.hint, house.build().batch(plain.train_ids[:3]).hint * 255 * -2)
