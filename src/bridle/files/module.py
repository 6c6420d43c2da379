"""The control of a model outside the families, read from its folder. In: the folder, and the model it was made of.

The files hold weights and names alone. What there is to compute comes from the model, so nothing in them is ever run.
"""

from pathlib import Path

from torch import nn

from bridle.control.module import ModuleControl
from bridle.errors import FileError
from bridle.files.read import read_facts
from bridle.files.tensors import CONFIG, open_weights, read_json
from bridle.files.weights import assign, read_delta


def load_module_control(folder: str | Path, model: nn.Module) -> ModuleControl:
    """Load what `save_control` wrote of a control by `Control.for_module`.

    Args:
        model: the one it was made of, or one built alike; left as it is. The control comes to its device and type.

    Raises: FileError: a file is missing or damaged, or was made of another model.
    """
    folder = Path(folder)
    config, weights = read_json(folder / CONFIG), open_weights(folder)
    facts = read_facts(weights)
    if config.get("_class_name") != ModuleControl.CLASS:
        raise FileError(f"{folder} holds a {config.get('_class_name')}; load it with load_control(folder)")
    if config.get("model") != type(model).__name__:
        asked = f"a control of a {config.get('model')}, not of a {type(model).__name__}"
        raise FileError(f"{folder} holds {asked}; give the model it was made of")
    try:
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        control = ModuleControl.rebuild(model, settings)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # it names what is not there
        reason = f"{folder / CONFIG} does not fit this {config['model']} ({type(error).__name__}: {error})"
        raise FileError(f"{reason}; give the model it was made of") from None
    assign(control, weights.checked())
    if "base_delta" in facts:
        control.base_delta = read_delta(folder, facts["base_delta"])
    return control.eval()
