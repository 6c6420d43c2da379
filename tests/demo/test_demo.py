"""The demo on the embedded base, cut to two steps: everything it promises to leave behind is there."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bridle.data.load import share_out
from bridle.data.scenes import read_facts, write_scenes
from bridle.data.sources import open_source
from bridle.demo import demo
from bridle.errors import DataError
from bridle.files.weights import load_control
from bridle.run import RunSettings


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the package's scenes only some: 4 to train on, 14 of objects that these never show."""
    facts = read_facts()
    train, held_out = ([fact for fact in facts if fact["split"] == split] for split in ("train", "held_out"))
    monkeypatch.setattr("bridle.data.scenes.read_facts", lambda: [*train[:4], *held_out[:14]])


FLOOR = "on a green floor in front of a white wall"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a purple fish", "a {} fish"),
        ("an orange tie on a red background", "a {} tie on a red background"),
        (f"a blue plastic chair {FLOOR}", f"a {{}} plastic chair {FLOOR}"),
        (f"a light blue leather sofa {FLOOR}", f"a {{}} leather sofa {FLOOR}"),
        (f"a wooden armchair {FLOOR}", f"a {{}} armchair {FLOOR}"),
        (f"a pair of copper headphones {FLOOR}", f"a pair of {{}} headphones {FLOOR}"),
        ("a grey deer and an orange basketball on a red wall", "a {} deer and an orange basketball on a red wall"),
        ("a wooden armchair in front of a red striped wall", "a {} armchair in front of a red striped wall"),
    ],
)
def test_the_colour_that_changes_is_the_things_and_never_what_is_around_it(caption: str, expected: str) -> None:
    assert demo.recolour(caption) == [expected.format(colour) for colour in demo.COLOURS]


@pytest.mark.parametrize("caption", ["a fish", f"a phone {FLOOR}", "an orange", "a phone on a wooden floor"])
def test_a_thing_without_colour_or_material_is_left_out(caption: str) -> None:
    assert demo.recolour(caption) == []


def test_of_the_packages_scenes_most_can_be_recoloured() -> None:
    captions = [scene["caption"] for scene in read_facts()]
    assert sum(bool(demo.recolour(caption)) for caption in captions) > len(captions) / 2


def test_without_a_folder_it_learns_the_scenes_and_measures_on_other_objects(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[RunSettings] = []

    def stop(settings: RunSettings, *others: object) -> None:
        given.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_run", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(None, tmp_path / "demo")
    assert given[0].data.folder == tmp_path / "demo" / "scenes"
    records = open_source(given[0].data.folder).records
    train, held_out = share_out(records, given[0].data.held_out)
    assert len(held_out) == 12
    assert {record.split for record in held_out} == {"held_out"}
    assert {record.split for record in train} == {"train"}


@pytest.mark.parametrize(("pairs", "held_out"), [(4, 2), (12, 6), (40, 12), (3, None)])
def test_of_a_small_folder_half_is_held_out(tmp_path: Path, pairs: int, held_out: int | None) -> None:
    for number in range(pairs):
        (tmp_path / f"{number}.png").touch()
        (tmp_path / f"{number}.txt").touch()
    if held_out is None:
        with pytest.raises(DataError, match=r"has 3 pairs; .*: give 4 or more"):
            demo.settings_for(tmp_path, variants=2)
    else:
        assert demo.settings_for(tmp_path, variants=2).data.held_out == held_out


def test_it_leaves_a_control_a_report_and_pictures(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = write_scenes(tmp_path / "scenes").folder
    folder = tmp_path / "pairs"
    folder.mkdir()
    for record in open_source(scenes).records:
        picture = shutil.copy(record.image, folder)
        Path(picture).with_suffix(".txt").write_text(record.caption)
    whole = demo.settings_for(folder, variants=2)
    short = replace(
        whole,
        data=replace(whole.data, variants=1),
        train=replace(whole.train, steps=2, batch=2, preview_every=2),
        sample=replace(whole.sample, steps=1),
    )
    monkeypatch.setattr(demo, "settings_for", lambda folder, variants: short)
    result = demo.run_demo(folder, tmp_path / "out")
    assert result.report.exists()
    assert result.sheet.exists()
    assert 0 <= result.summary["f1_without_control"] <= result.summary["f1_ceiling"] <= 1
    assert load_control(tmp_path / "out" / "control").hint_channels == 3
