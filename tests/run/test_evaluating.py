"""Measuring a run: figures, a page and a sheet from what its folder holds."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_run import HELD_OUT, Done

from bridle.errors import BaseError, ConfigError, DataError
from bridle.run import evaluate_run, train_run
from bridle.run.settings import open_run


def test_a_run_is_measured_from_its_folder_alone(done: Done) -> None:
    measured = evaluate_run(done.run.folder, seeds=1)
    folder = done.run.folder / "evaluation"
    assert {"evaluation.json", "report.html", "sheet.png"} <= {path.name for path in folder.iterdir()}
    table = json.loads((folder / "evaluation.json").read_text())
    assert {pair["id"] for pair in table["pairs"]} == {id.rpartition("#")[0] for id in done.run.data.cache.held_out_ids}
    assert len(table["pairs"]) == HELD_OUT
    assert all((folder / pair["seeds"][0]["control_picture"]).is_file() for pair in table["pairs"])
    assert measured.evaluation.condition == "canny"
    page = measured.report.read_text(encoding="utf-8")
    assert "canny" in page
    assert f"{done.settings.train.steps} of {done.settings.train.batch} pairs" in page
    with Image.open(measured.sheet) as sheet:
        sheet.verify()


def test_a_run_that_holds_nothing_out_cannot_be_measured(done: Done, tmp_path: Path) -> None:
    data = replace(done.settings.data, held_out=0)
    train = replace(done.settings.train, steps=1)
    train_run(replace(done.settings, data=data, train=train), tmp_path)
    assert not (tmp_path / "previews").exists()
    with pytest.raises(DataError, match=r"train with data\.held_out of 5 or more"):
        evaluate_run(tmp_path)


def test_a_run_of_a_gpu_is_measured_without_one(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    folder = tmp_path / "run"
    shutil.copytree(done.run.folder, folder)
    open_run(folder, replace(done.settings, device="cuda"))
    with pytest.raises(BaseError, match="device 'cuda' is none that PyTorch can use"):
        evaluate_run(folder, pairs=1, seeds=1)
    assert evaluate_run(folder, pairs=1, seeds=1, device="cpu").report.is_file()


def test_where_the_data_set_has_moved_the_sentence_names_what_works(done: Done, tmp_path: Path) -> None:
    folder, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(done.run.folder, folder)
    open_run(folder, replace(done.settings, data=replace(done.settings.data, folder=gone)))
    said = (
        f"data folder {gone} of this run does not exist: put it back, or set data.folder in {folder / 'settings.toml'}"
    )
    with pytest.raises(DataError, match=re.escape(said)):
        evaluate_run(folder, pairs=1, seeds=1)
    text = (folder / "settings.toml").read_text(encoding="utf-8")
    assert str(gone) in text
    moved = text.replace(str(gone), str(done.settings.data.folder))
    (folder / "settings.toml").write_text(moved, encoding="utf-8")
    assert evaluate_run(folder, pairs=1, seeds=1).report.is_file()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run \(settings.toml is missing\)"):
        evaluate_run(tmp_path)
