"""`bridle info` and `bridle convert`: what a file is, in lines and in JSON, and one line for what is wrong."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import made
import pytest
import torch
from safetensors.torch import save_file

from bridle.cli import main
from bridle.files.architecture import from_config
from bridle.files.convert import hash_file
from bridle.files.info import describe, lines_of
from bridle.files.layout import layout
from bridle.files.tensors import WEIGHTS

NET = made.make_net()
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `bridle ...` in this process. Returns: exit status, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bridle", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_a_control_is_described_in_full(tmp_path: Path) -> None:
    source = made.write_folder(tmp_path, NET, made.FACTS | {"links": "middle"}, **{"modelspec.license": "CC0"})
    about = describe(source)
    expected = {
        "kind": "diffusers",
        "usable": True,
        "family": "other",
        "links": 13,
        "connected": "middle",
        "hint_channels": 1,
        "hint_encoder": "official",
        "parameters": sum(parameter.numel() for parameter in NET.parameters()),
        "precision": "float32",
        "size_bytes": (source / WEIGHTS).stat().st_size,
        "sha256": {WEIGHTS: hash_file(source / WEIGHTS)},
        "metadata": {"format": "pt", "modelspec.license": "CC0"},
        "bridle": made.FACTS | {"links": "middle"},
    }
    assert {key: about[key] for key in expected} == expected
    lines = "\n".join(lines_of(about))
    for said in ("13, middle connected", "1 channels, official encoder", expected["sha256"][WEIGHTS], '"canny"', "CC0"):
        assert said in lines


@pytest.mark.parametrize(("name", "family", "links"), [("sd15", "sd1", 13), ("sd21", "sd2", 13), ("sdxl", "sdxl", 10)])
def test_the_family_is_told_from_the_names_alone(name: str, family: str, links: int, tmp_path: Path) -> None:
    shapes = layout(from_config(made.FULL_SIZE[name], tmp_path))
    made.write_hollow(tmp_path / "a.safetensors", shapes, "F16")
    about = describe_without_hash(tmp_path / "a.safetensors")
    assert (about["family"], about["links"], about["precision"]) == (family, links, "float16")
    assert about["parameters"] == sum(math.prod(shape) for shape in shapes.values())


def describe_without_hash(path: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridle.files.info.hash_file", lambda _: "")
        return describe(path)


def test_what_is_no_control_is_described_too(call: Call, tmp_path: Path) -> None:
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2)}, tmp_path / "a.safetensors", {"ss_network_dim": "4"})
    status, out, err = call("info", tmp_path / "a.safetensors")
    assert (status, err) == (0, "")
    assert "a LoRA: give a control" in out
    assert "ss_network_dim" in out
    assert json.loads(call("info", tmp_path / "a.safetensors", "--json")[1])["usable"] is False


def test_a_damaged_file_is_one_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    status, out, err = call("info", tmp_path / "a.safetensors")
    assert (status, out) == (2, "")
    assert err.startswith(f"bridle: {tmp_path / 'a.safetensors'} is damaged")
    assert err.count("\n") == 1


def test_converting_answers_with_what_was_written(call: Call, tmp_path: Path) -> None:
    made.write_folder(tmp_path / "control", NET, made.FACTS)
    status, out, err = call("convert", tmp_path / "control", tmp_path / "a.safetensors", "--to", "comfyui", "--json")
    assert status == 0
    assert "100%" in err or "converting" in err  # the bar, apart from the result
    assert json.loads(out)["path"] == str(tmp_path / "a.safetensors")
    assert "know the sizes of Stable Diffusion only" in json.loads(out)["notes"][0]
    _, out, _ = call("info", tmp_path / "a.safetensors")
    assert "without prefix" in out
    status, _, err = call("convert", tmp_path / "control", tmp_path / "a.safetensors", "--to", "comfyui")
    assert status == 2
    assert "exists already" in err.splitlines()[-1]
