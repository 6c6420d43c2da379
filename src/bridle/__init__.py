"""Bridle: put your own control on a pretrained text-to-image model, on your own machine, and use it everywhere."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from bridle.base.base import Base
    from bridle.base.load import load_base
    from bridle.control.attach import Rig, attach
    from bridle.control.block import ControlledBlock, zero_conv, zero_linear
    from bridle.control.control import Control
    from bridle.control.residuals import Residuals
    from bridle.control.strength import Strength
    from bridle.errors import BridleError
    from bridle.files.module import load_module_control
    from bridle.files.weights import load_control, save_control
    from bridle.run import RunSettings, evaluate_run, train_run
    from bridle.sample.sampler import generate
    from bridle.sample.settings import SampleSettings
    from bridle.sample.steering import Init, Steering

# Where each public name lives; it is imported when it is first asked for, so that `import bridle` costs nothing.
_HOMES = {
    "Base": "bridle.base.base",
    "BridleError": "bridle.errors",
    "Control": "bridle.control.control",
    "ControlledBlock": "bridle.control.block",
    "Init": "bridle.sample.steering",
    "Residuals": "bridle.control.residuals",
    "Rig": "bridle.control.attach",
    "RunSettings": "bridle.run",
    "SampleSettings": "bridle.sample.settings",
    "Steering": "bridle.sample.steering",
    "Strength": "bridle.control.strength",
    "attach": "bridle.control.attach",
    "evaluate_run": "bridle.run",
    "generate": "bridle.sample.sampler",
    "load_base": "bridle.base.load",
    "load_control": "bridle.files.weights",
    "load_module_control": "bridle.files.module",
    "save_control": "bridle.files.weights",
    "train_run": "bridle.run",
    "zero_conv": "bridle.control.block",
    "zero_linear": "bridle.control.block",
}

__all__ = [
    "Base",
    "BridleError",
    "Control",
    "ControlledBlock",
    "Init",
    "Residuals",
    "Rig",
    "RunSettings",
    "SampleSettings",
    "Steering",
    "Strength",
    "attach",
    "evaluate_run",
    "generate",
    "load_base",
    "load_control",
    "load_module_control",
    "save_control",
    "train_run",
    "zero_conv",
    "zero_linear",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bridle' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
