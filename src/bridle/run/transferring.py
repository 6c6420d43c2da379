"""`bridle transfer`: a control folder for a fine-tuned variant of the base that a control was trained on."""

from pathlib import Path

from bridle.base.load import load_base
from bridle.control.transfer import transfer
from bridle.errors import FileError
from bridle.files.weights import load_control, read_metadata, save_control


def transfer_file(control: Path, source: str, target: str, out: Path) -> int:
    """Write the control, moved from one base to the other; its metadata goes along and says so.

    Args:
        control: any file or folder that `bridle info` calls usable.
        source, target: bases, as `load_base` takes them: what it was trained on, and the variant.
        out: the folder to write.

    Returns: the number of weights that differ from before.
    Raises: FileError: the folder is there already, or the control cannot be read. BaseError, ConfigError: a base cannot
        be found, or does not fit.
    """
    if out.exists():
        raise FileError(f"{out} exists already; give a name that is free")
    before = load_control(control, base=source)
    moved = transfer(before, load_base(source).pipeline, load_base(target).pipeline)
    facts = read_metadata(control)
    save_control(moved, out, facts | {"base": target, "transferred_from": facts.get("base", source)})
    weights = before.state_dict()
    return sum(int((value != weights[name]).sum()) for name, value in moved.state_dict().items())
