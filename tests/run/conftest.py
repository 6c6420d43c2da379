"""A data set of drawn pictures, a tiny base on disk, and one run of four steps that the tests look at."""

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from small_run import COLOURS, HELD_OUT, PAIRS, STEPS, Done
from tiny import SIZE_PX, make_pipeline

from bridle.data.settings import DataSettings
from bridle.run import RunSettings, train_run
from bridle.sample.settings import SampleSettings
from bridle.train.settings import TrainSettings


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs on white, each with its caption."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(PAIRS):
        name = list(COLOURS)[index % len(COLOURS)]
        image = np.full((SIZE_PX, SIZE_PX, 3), 255, np.uint8)
        cv2.circle(image, (20 + 2 * index, 32), 8 + index, COLOURS[name], -1)
        Image.fromarray(image).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {name} disc")
    return folder


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in diffusers format."""
    folder = tmp_path_factory.mktemp("base")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(pictures: Path, base_folder: Path) -> RunSettings:
    return RunSettings(
        base=str(base_folder),
        data=DataSettings(folder=pictures, size_px=SIZE_PX, held_out=HELD_OUT),
        train=TrainSettings(steps=STEPS, batch=4, lr=1e-3, warmup=0, log_every=2, precision="fp32"),
        sample=SampleSettings(steps=1, guidance=1.0),
    )


@pytest.fixture(scope="module")
def done(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Four steps of training."""
    with redirect_stdout(StringIO()) as stdout:
        run = train_run(settings, tmp_path_factory.mktemp("run"))
    return Done(run, settings, stdout.getvalue())


@pytest.fixture(scope="module")
def longer(settings: RunSettings) -> Callable[[int], RunSettings]:
    """The same settings with more steps."""
    return lambda steps: replace(settings, train=replace(settings.train, steps=steps))
