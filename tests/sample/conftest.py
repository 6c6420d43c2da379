"""A stock pipeline, and a control of it that pulls at every link."""

from typing import Any

import pytest
import tiny

from bridle.control.control import Control


@pytest.fixture
def pipeline() -> Any:
    return tiny.make_pipeline()


@pytest.fixture
def control(pipeline: Any) -> Control:
    return tiny.wake(Control.from_base(pipeline))
