"""A control of any model: it begins as nothing, learns in the order of its zero layers, and leaves the model alone."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.errors import BaseError, BridleError, ConfigError, FileError, HintError, TrainError
from bridle.files.module import load_module_control
from bridle.files.weights import WEIGHTS, load_control, save_control
from bridle.train.denoiser import Denoiser

TIMES = torch.tensor([3, 500])


@dataclass(frozen=True)
class Kind:
    """One model, what it is called with, and what its control is told."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    hint: tuple[int, ...]
    taps: Sequence[str]
    dropped: Sequence[str]  # modules of the model that the control has no use for
    more: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "pixel U-Net": Kind(models.SmallUNet, (3, 16, 16), (1, 16, 16), ["middle", "down.0", "down.1"], ["up", "conv_out"]),
    "blocks that return tuples": Kind(
        lambda: models.SmallUNet(pair=True), (3, 16, 16), (3, 32, 32), ["down.1", "middle"], ["up", "conv_out"]
    ),
    "DiT": Kind(models.SmallDiT, (3, 16, 16), (3, 16, 16), ["layers.0", "layers.1"], ["layers.2", "layers.3", "head"]),
    "3-D U-Net": Kind(
        lambda: models.SmallUNet(1, 8, axes=3),
        (1, 4, 8, 8),
        (2, 4, 16, 24),
        ["down.1"],
        ["middle", "up", "conv_out"],
        {"hint_at": "down.0"},
    ),
    "spectrogram U-Net": Kind(models.SoundUNet, (1, 20, 36), (2, 72), ["encoder.0", "encoder.1"], ["decoder", "out"]),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def make_model(kind: Kind, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind.make().requires_grad_(False).eval()


def make_inputs(kind: Kind, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two noisy samples and two hints."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(2, *kind.shape, generator=source), torch.rand(2, *kind.hint, generator=source)


def make_control(kind: Kind, model: nn.Module) -> Any:
    noisy, hint = make_inputs(kind)
    torch.manual_seed(2)
    return Control.for_module(model, kind.taps, example=(noisy, TIMES), hint=hint, **kind.more)


def wake(control: Any, seed: int = 3) -> Any:
    """Fill what is zero, in place."""
    torch.manual_seed(seed)
    for layer in (control.hint[-1], *control.zero_layers):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.2)
    return control


def predict(model: nn.Module, noisy: Tensor) -> Tensor:
    output = model(noisy, TIMES)
    return output["noise"] if isinstance(output, dict) else output


@torch.no_grad()
def steered(model: nn.Module, noisy: Tensor, hint: Tensor, scale: float = 1.0, **controls: Any) -> Tensor:
    with attach(model, **controls) as rig:
        for name in controls:
            rig[name].set(hint=hint, scale=scale)
        return predict(model, noisy)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_an_untrained_control_changes_not_one_bit_and_a_trained_one_does(kind: Kind) -> None:
    model, (noisy, hint) = make_model(kind), make_inputs(kind)
    control = make_control(kind, model)
    with torch.no_grad():
        without = predict(model, noisy)
    assert torch.equal(steered(model, noisy, hint, a=control), without)
    wake(control)
    there = steered(model, noisy, hint, a=control)
    assert not torch.allclose(there, without)
    assert not torch.allclose(steered(model, noisy, 1 - hint, a=control), there)
    assert torch.equal(steered(model, noisy, hint, scale=0.0, a=control), without)
    with torch.no_grad():
        assert torch.equal(predict(model, noisy), without)


def test_at_each_tap_the_copy_computes_what_the_model_does_until_a_hint_counts(kind: Kind) -> None:
    model, (noisy, hint) = make_model(kind), make_inputs(kind)
    control, seen = make_control(kind, model), []
    watched = [model.get_submodule(place.name) for place in control.places]
    assert sorted(place.name for place in control.places) == sorted(kind.taps)
    for block in watched:
        block.register_forward_hook(lambda block, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        predict(model, noisy)
        call = dict(zip(control.config["arguments"], (noisy, TIMES), strict=True))
        assert [torch.equal(a, b) for a, b in zip(control._run(call, control.encode(hint)), seen, strict=True)] == [
            True
        ] * len(watched)


class Steps:
    """Optimiser steps on one batch; each tells which parameters had a gradient and which moved."""

    def __init__(self, kind: Kind, model: nn.Module, control: Any) -> None:
        self.model, self.control = model, control
        self.noisy, self.hint = make_inputs(kind)
        self.optimizer = torch.optim.AdamW(control.parameters(), lr=1e-2, weight_decay=0)

    def __call__(self) -> tuple[set[str], set[str]]:
        before = {name: value.clone() for name, value in self.control.named_parameters()}
        with attach(self.model, a=self.control) as rig:
            rig["a"].set(hint=self.hint)
            (predict(self.model, self.noisy) - 1).square().mean().backward()
        parameters = dict(self.control.named_parameters())
        pulled = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return pulled, {name for name, value in parameters.items() if not torch.equal(value, before[name])}


def test_gradients_arrive_in_the_order_that_zero_layers_imply_and_the_model_stays_as_it_is(kind: Kind) -> None:
    model = make_model(kind)
    locked = {name: value.clone() for name, value in model.state_dict().items()}
    control = make_control(kind, model)
    step, names = Steps(kind, model, control), {name for name, _ in control.named_parameters()}
    out = {name for name in names if name.startswith("zeros.")}
    assert len(out) == 2 * len(kind.taps)
    assert step() == (out, out)
    last = f"hint.{len(control.hint) - 1}."
    second = {name for name in names if not name.startswith("hint.") or name.startswith(last)}
    assert step() == (second, second)
    assert step() == (names, names)
    assert all(torch.equal(value, locked[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert hooks(model) == 0
    assert not torch.equal(
        steered(model, step.noisy, step.hint, a=control), steered(model, step.noisy, 1 - step.hint, a=control)
    )


def test_making_one_leaves_the_model_as_it_is_and_copies_only_what_leads_to_the_taps(kind: Kind) -> None:
    model = make_model(kind)
    model.get_submodule(kind.taps[0]).train()  # modes that no single call restores
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    control = make_control(kind, model)
    assert [module.training for module in model.modules()] == modes
    assert hooks(model) == 0
    copied = {name.removeprefix("part.") for name in control.state_dict() if name.startswith("part.")}
    assert copied == {name for name in before if not name.startswith(tuple(f"{part}." for part in kind.dropped))}
    assert all(parameter.requires_grad for parameter in control.parameters())
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_saved_control_steers_alike(kind: Kind, tmp_path: Path) -> None:
    model, (noisy, hint) = make_model(kind), make_inputs(kind)
    control = wake(make_control(kind, model))
    save_control(control, tmp_path, {"steps": 7})
    loaded = load_module_control(tmp_path, make_model(kind, seed=9))  # its weights are in the file, not in the model
    assert {name: value.shape for name, value in loaded.state_dict().items()} == {
        name: value.shape for name, value in control.state_dict().items()
    }
    assert torch.equal(steered(model, noisy, hint, a=loaded), steered(model, noisy, hint, a=control))


def test_controls_sum_whether_attached_at_once_or_one_after_the_other(kind: Kind) -> None:
    model, (noisy, hint) = make_model(kind), make_inputs(kind)
    a, b = wake(make_control(kind, model)), wake(make_control(kind, model), seed=30)
    together = steered(model, noisy, hint, a=a, b=b)
    with attach(model, a=a) as rig:
        rig["a"].set(hint=hint)
        nested = steered(model, noisy, hint, b=b)
    assert torch.allclose(nested, together, atol=1e-5)
    assert not torch.allclose(steered(model, noisy, hint, a=a), together)
    assert hooks(model) == 0


def test_a_copy_of_a_control_is_one_of_its_own(kind: Kind) -> None:
    model, (noisy, hint) = make_model(kind), make_inputs(kind)
    control = wake(make_control(kind, model))
    average, before = copy.deepcopy(control), steered(model, noisy, hint, a=control)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.zero_()
    assert torch.equal(steered(model, noisy, hint, a=average), before)


DIT = KINDS["DiT"]


def test_training_as_the_families_do_it_gives_what_attaching_gives() -> None:
    model, (noisy, hint) = make_model(DIT), make_inputs(DIT)
    control = wake(make_control(DIT, model))
    with torch.no_grad():
        joined = Denoiser(control, model)(noisy, TIMES, Text(torch.zeros(2, 1, 1)), hint)
    assert torch.equal(joined, steered(model, noisy, hint, a=control))


def test_a_mask_keeps_a_control_of_tokens_in_its_region() -> None:
    model, (noisy, hint) = make_model(DIT), make_inputs(DIT)
    control = wake(make_control(DIT, model))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8, :] = 1
    with torch.no_grad():
        links = control(noisy, TIMES, torch.zeros(2, 1, 1), hint).masked(mask).links
    assert all(link[:, :32].any() and not link[:, 32:].any() for link in links)  # the upper half of 8x8 tokens


def test_channels_may_come_last_on_a_grid() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3)).requires_grad_(False)
    noisy, hint = torch.randn(2, 4, 6, 3), torch.rand(2, 1, 8, 6)
    control = Control.for_module(model, ["1"], example=(noisy,), hint=hint, channels="last")
    assert [type(layer) for layer in control.zero_layers] == [nn.Linear]
    with torch.no_grad(), attach(model, a=wake(control)) as rig:
        there, away = (
            model(noisy) if rig["a"].set(hint=hint) else None,
            model(noisy) if rig["a"].set(hint=1 - hint) else None,
        )
    assert not torch.allclose(there, away)


def test_a_model_of_diffusers_outside_the_families_can_be_steered() -> None:
    torch.manual_seed(0)
    unet: Any = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=3,
    )
    unet.requires_grad_(False).eval()
    call = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor(5), "class_labels": torch.tensor([0, 2])}
    hint = torch.rand(2, 3, 16, 16)
    control = wake(Control.for_module(unet, ["down_blocks.0", "mid_block"], example=call, hint=hint))
    with torch.no_grad(), attach(unet, a=control) as rig:
        there = unet(**call).sample if rig["a"].set(hint=hint) else None
        away = unet(**call).sample if rig["a"].set(hint=1 - hint) else None
    assert not torch.allclose(there, away)


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("DiT", {"taps": ["layer.0"]}, BaseError, r"SmallDiT has no block 'layer.0'; expected one such as layers.0"),
        ("DiT", {"taps": []}, ConfigError, r"taps are \[\]; expected one or more"),
        ("DiT", {"taps": ["head", "head"]}, ConfigError, "each once"),
        ("DiT", {"taps": ["positions"]}, BaseError, "block 'positions' ran 0 times in the example; expected once"),
        ("DiT", {"taps": ["layers.0"], "hint_at": "layers.1"}, BaseError, "hint_at 'layers.1' does not run before"),
        (
            "DiT",
            {"taps": ["layers.0"], "hint": (3, 20, 16)},
            HintError,
            "hint has positions 20x16, the features .* 64;",
        ),
        ("DiT", {"taps": ["layers.0"], "hint": (16,)}, HintError, r"hint has shape \[2, 16\]; expected \[B, K, N\]"),
        ("DiT", {"taps": ["layers.0"], "example": {"x": TIMES, "t": TIMES}}, BaseError, "holds no tensor of real"),
        ("spectrogram U-Net", {"taps": [""]}, BaseError, "has no block ''"),
    ],
)
def test_what_cannot_be_tapped_is_refused(name: str, options: dict[str, Any], error: type, said: str) -> None:
    kind = KINDS[name]
    model, (noisy, hint) = make_model(kind), make_inputs(kind)
    if "hint" in options:
        options = options | {"hint": torch.rand(2, *options["hint"])}
    with pytest.raises(BridleError, match=said) as raised:
        Control.for_module(model, **({"example": (noisy, TIMES), "hint": hint} | options))
    assert raised.type is error
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("name", "hint", "said"),
    [
        ("DiT", torch.rand(1, 3, 12, 12), "hint's features are 2x36x32, what they are added to is 2x64x32"),
        ("DiT", torch.rand(1, 3, 15, 16), r"hint has sizes \[15, 16\]; expected multiples of \[2, 2\]"),
        ("DiT", torch.rand(1, 1, 16, 16), "hint has 1 channels; this control was made for 3"),
        ("3-D U-Net", torch.rand(1, 2, 16, 24), r"hint has shape .* expected a tensor \[B, 2, D, H, W\] in \[0, 1\]"),
        ("spectrogram U-Net", "a sound", "hint is a str; expected a tensor"),
        ("spectrogram U-Net", 3 * torch.rand(1, 2, 72), "expected \\[0, 1\\]"),
    ],
)
def test_a_hint_that_does_not_fit_is_refused(name: str, hint: Any, said: str) -> None:
    kind = KINDS[name]
    model, (noisy, _) = make_model(kind), make_inputs(kind)
    control = make_control(kind, model)
    with pytest.raises(HintError, match=said):
        steered(model, noisy, hint, a=control)
    assert hooks(model) == 0


def test_a_control_is_refused_by_another_model_and_by_controls_that_join_elsewhere() -> None:
    model = make_model(DIT)
    control = make_control(DIT, model)
    with pytest.raises(ConfigError, match=r'control "a" does not fit this SmallUNet: patches\.weight is none of its'):
        attach(make_model(KINDS["pixel U-Net"]), a=control)
    with pytest.raises(ConfigError, match=r"patches\.weight has shape \[48, 3, 2, 2\], the control's \[32, 3, 2, 2\]"):
        attach(models.SmallDiT(48), a=control)
    with pytest.raises(ConfigError, match=r"on cpu torch.float32, the model on cpu torch.float64"):
        attach(copy.deepcopy(model).double(), a=control)
    noisy, hint = make_inputs(DIT)
    other = Control.for_module(model, ["layers.3"], example=(noisy, TIMES), hint=hint)
    with pytest.raises(ConfigError, match="controls a, b join the model at different blocks; attach them one after"):
        attach(model, a=control, b=other)


def test_a_file_says_what_it_needs(tmp_path: Path) -> None:
    model = make_model(DIT)
    save_control(make_control(DIT, model), tmp_path)
    with pytest.raises(FileError, match=r"a model of your own: load it with load_module_control\(folder, model\)"):
        load_control(tmp_path)
    with pytest.raises(FileError, match="a control of a SmallDiT, not of a SmallUNet"):
        load_module_control(tmp_path, make_model(KINDS["pixel U-Net"]))
    with pytest.raises(FileError, match=r"in_proj_bias in .* has shape \[96\], the configuration asks for \[144\]"):
        load_module_control(tmp_path, models.SmallDiT(48))
    with pytest.raises(FileError, match=r"does not fit this SmallDiT \(KeyError: .*give the model it was"):
        load_module_control(tmp_path, models.SmallDiT(depth=1))
    weights = load_file(tmp_path / WEIGHTS)
    weights.pop("zeros.0.bias")
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(FileError, match=r"1 missing \['zeros.0.bias'\]"):
        load_module_control(tmp_path, model)


def test_a_part_that_cannot_run_by_itself_is_refused() -> None:
    class Asks(models.SmallDiT):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x * (12 / self.head.out_features), t)  # asks what comes after the taps

    model, (noisy, hint) = Asks(), make_inputs(DIT)
    with pytest.raises(BaseError, match=r"does not run by itself .*: tap a later block"):
        Control.for_module(model, ["layers.0"], example=(noisy, TIMES), hint=hint)


def test_a_block_that_is_run_again_without_its_hint_says_so() -> None:
    class Saving(models.SmallDiT):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            time = self.time(models.embed(t, tokens.shape[-1]))
            for layer in self.layers:
                tokens = checkpoint(layer, tokens, time, use_reentrant=False)
            return self.head(tokens)

    model, (noisy, hint) = Saving().requires_grad_(False), make_inputs(DIT)
    control = wake(Control.for_module(model, DIT.taps, example=(noisy, TIMES), hint=hint))
    with attach(model, a=control) as rig:
        rig["a"].set(hint=hint)
        loss = model(noisy, TIMES).mean()
    with pytest.raises(TrainError, match=r"block 'layers.0' of a control was run by itself: turn off gradient checkp"):
        loss.backward()
