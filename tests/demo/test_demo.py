"""The demo on the embedded base, cut to two steps: everything it promises to leave behind is there."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bridle.data.sources import open_source
from bridle.demo import demo
from bridle.files.weights import load_control


def test_the_packaged_pairs_are_an_ordinary_data_set() -> None:
    source = open_source(demo.PAIRS)
    assert len(source.records) == 400
    assert not source.quarantine
    assert all(record.caption for record in source.records)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a purple fish", ["a red fish", "a yellow fish", "a green fish", "a blue fish"]),
        ("an orange tie on a red background", [f"a {c} tie on a red background" for c in demo.COLOURS]),
        ("a fish", []),
    ],
)
def test_the_first_colour_of_a_caption_is_the_one_that_changes(caption: str, expected: list[str]) -> None:
    assert demo.recolour(caption) == expected


def test_it_leaves_a_control_a_report_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for path in sorted(demo.PAIRS.iterdir())[: 2 * (demo.HELD_OUT + 4)]:
        shutil.copy(path, folder)
    whole = demo.settings_for(folder)
    short = replace(
        whole,
        data=replace(whole.data, variants=1),
        train=replace(whole.train, steps=2, batch=2, preview_every=2),
        sample=replace(whole.sample, steps=1),
    )
    monkeypatch.setattr(demo, "settings_for", lambda folder: short)
    result = demo.run_demo(folder, tmp_path / "out")
    assert result.report.exists()
    assert result.sheet.exists()
    assert 0 <= result.summary["f1_without_control"] <= result.summary["f1_ceiling"] <= 1
    assert load_control(tmp_path / "out" / "control").hint_channels == 3
