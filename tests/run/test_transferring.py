"""A control folder for another base is written from files alone, with its metadata."""

from pathlib import Path

import pytest
import tiny
import torch

from bridle.control.control import Control
from bridle.errors import FileError
from bridle.files.weights import load_control, read_metadata, save_control
from bridle.run.transferring import transfer_file


def test_a_control_is_moved_from_files_to_files(tmp_path: Path) -> None:
    source = tiny.make_pipeline()
    source.save_pretrained(tmp_path / "source")
    save_control(tiny.wake(Control.from_base(source)), tmp_path / "control", {"base": "somewhere", "hint": "canny"})
    with torch.no_grad():
        source.unet.conv_in.weight.add_(0.5)
    source.save_pretrained(tmp_path / "target")
    places = tmp_path / "control", str(tmp_path / "source"), str(tmp_path / "target"), tmp_path / "moved"
    assert transfer_file(*places) == source.unet.conv_in.weight.numel()
    before, after = load_control(tmp_path / "control").state_dict(), load_control(tmp_path / "moved").state_dict()
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["conv_in.weight"]
    assert torch.allclose(after["conv_in.weight"], before["conv_in.weight"] + 0.5, atol=1e-6)
    facts = read_metadata(tmp_path / "moved")
    assert (facts["base"], facts["transferred_from"], facts["hint"]) == (places[2], "somewhere", "canny")
    with pytest.raises(FileError, match="moved exists already; give a name that is free"):
        transfer_file(*places)
