"""A rein pulls in the half of the guidance, in the region and in the steps that it is told, beside other adapters."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import Tensor

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.hint import to_hint
from bridle.control.progress import Place
from bridle.control.rein import Rein
from bridle.control.residuals import Residuals
from bridle.errors import BaseError, ConfigError

HINT = tiny.make_hint()
HINTS = np.stack([HINT, tiny.make_hint(6)])
LEFT = np.zeros((64, 64), np.uint8)
LEFT[:, :32] = 255


class Guided:
    """What a rein asks of a pipeline."""

    do_classifier_free_guidance = True


class Unguided:
    do_classifier_free_guidance = False


@pytest.fixture
def stock() -> StableDiffusionPipeline:
    return tiny.make_pipeline()


@pytest.fixture
def control(stock: StableDiffusionPipeline) -> Control:
    return tiny.wake(Control.from_base(stock))


def draw(pipeline: Any, steps: int = 2, guidance: float = 5.0, **more: Any) -> np.ndarray:
    seed = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": seed, "output_type": "np"}
    pictures: np.ndarray = pipeline("a red apple", **given, **more).images
    return pictures


def call(rows: int) -> dict[str, Any]:
    latents, _, text, _ = tiny.make_inputs(rows)
    return {"sample": latents, "timestep": torch.tensor(500), "encoder_hidden_states": text}


def pull(rein: Rein, rows: int, pipeline: Any = Guided, place: Place = Place()) -> Residuals | None:  # noqa: B008
    with torch.no_grad():
        return rein.pull(call(rows), pipeline, place)


def rows_of(residuals: Residuals | None) -> list[bool]:
    """In which rows there is anything."""
    assert residuals is not None
    found = [link.flatten(1).abs().sum(1) > 0 for link in residuals.links]
    assert all(torch.equal(one, found[0]) for one in found)
    return found[0].tolist()


def close(left: Residuals | None, right: tuple[Tensor, ...]) -> bool:
    assert left is not None
    return all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(left.links, right, strict=True))


def test_each_half_is_pulled_at_alone_and_with_the_residuals_of_its_own_rows(control: Control) -> None:
    rein = Rein("edge", control).set(hint=HINTS)
    both = pull(rein, 4)
    assert rows_of(both) == [True] * 4
    assert both is not None
    above, below = pull(rein.set(half="unconditional"), 4), pull(rein.set(half="conditional"), 4)
    assert (rows_of(above), rows_of(below)) == ([True, True, False, False], [False, False, True, True])
    assert above is not None
    assert below is not None
    assert close(above + below, both.links)


def test_without_guidance_there_is_the_conditional_half_alone(control: Control) -> None:
    rein = Rein("edge", control).set(hint=HINT, half="conditional")
    assert rows_of(pull(rein, 2, Unguided)) == [True, True]
    assert pull(rein.set(half="unconditional"), 2, Unguided) is None
    # Flux guides by a second call of the same step.
    assert rows_of(pull(rein, 2, Unguided, Place(again=1))) == [True, True]
    assert pull(rein.set(half="conditional"), 2, Unguided, Place(again=1)) is None


def test_a_mask_confines_every_link_to_its_region(control: Control) -> None:
    free = pull(Rein("edge", control).set(hint=HINT), 2)
    masked = pull(Rein("edge", control).set(hint=HINT, mask=LEFT), 2)
    assert free is not None
    assert masked is not None
    for whole, part in zip(free.links[:9], masked.links[:9], strict=True):  # the last are 1x1: half of them
        middle = whole.shape[-1] // 2
        assert torch.equal(part[..., :middle], whole[..., :middle])
        assert not part[..., middle:].any()
    assert torch.equal(masked.mid, 0.5 * free.mid)


def test_keyframes_are_the_scale_of_each_step(stock: StableDiffusionPipeline, control: Control) -> None:
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT, keyframes=[(0, 1), (0.5, 1), (0.5, 0)])
        faded = draw(stock, steps=4)
        rig["edge"].set(keyframes=(), end=0.5)
        assert np.array_equal(draw(stock, steps=4), faded)
        rig["edge"].set(keyframes=[(0.5, 0.3)], end=1.0)
        constant = draw(stock)
        rig["edge"].set(keyframes=(), scale=0.3)
        assert np.array_equal(draw(stock), constant)
    assert not np.array_equal(draw(stock, steps=4), faded)


@pytest.mark.parametrize("guess_mode", [True, False])
def test_guess_mode_of_diffusers_is_the_stock_pipelines(
    stock: StableDiffusionPipeline, control: Control, guess_mode: bool
) -> None:
    net = ControlNetModel.from_unet(stock.unet)
    net.load_state_dict(control.state_dict())
    theirs: Any = StableDiffusionControlNetPipeline(**stock.components, controlnet=net, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    how = {"image": to_hint(HINT, 3), "guess_mode": guess_mode, "controlnet_conditioning_scale": 0.7}
    expected = draw(theirs, **how)
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT, scale=0.7, **({"guess": "diffusers"} if guess_mode else {}))
        assert np.allclose(draw(stock), expected, rtol=0, atol=1e-5)
        rig["edge"].set(guess="official")
        assert not np.allclose(draw(stock), expected, rtol=0, atol=1e-5)


def test_guess_mode_stands_for_weights_and_half_and_is_not_given_beside_them(control: Control) -> None:
    rein = Rein("edge", control).set(guess="paper")
    assert (rein.strength.weights, rein.strength.half) == ("paper", "conditional")
    before = rein.strength
    with pytest.raises(ConfigError, match="guess 'paper' stands for weights='paper', half='conditional'"):
        rein.set(guess="paper", half="both")
    with pytest.raises(ConfigError, match="guess is 'papr'; expected one of official, diffusers, paper"):
        rein.set(guess="papr", scale=2.0)  # type: ignore[arg-type]
    assert rein.strength == before  # what is refused changes nothing


# --- other adapters on the same pipeline


def add_lora(pipeline: Any, seed: int = 7) -> None:
    """A random one on the U-Net's attention, loaded as diffusers loads a file."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            down, up = (2, module.in_features), (module.out_features, 2)
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(down, generator=generator)
            weights[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(up, generator=generator)
    pipeline.load_lora_weights(weights, adapter_name="style", low_cpu_mem_usage=False)


def add_ip_adapter(pipeline: Any, width: int = 8, tokens: int = 4) -> dict[str, Any]:
    """A random one. Returns: what a call of the pipeline takes for its picture."""
    generator = torch.Generator().manual_seed(8)
    unet, to = pipeline.unet, tiny.WIDTH
    layers = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            wide = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{index}.{part}.weight"] = torch.randn(wide, to, generator=generator)
    projection = {
        "proj.weight": torch.randn(tokens * to, width, generator=generator),
        "proj.bias": torch.zeros(tokens * to),
        "norm.weight": torch.ones(to),
        "norm.bias": torch.zeros(to),
    }
    weights = {"image_proj": projection, "ip_adapter": layers}
    # Without an encoder of pictures: their embeddings are given.
    pipeline.load_ip_adapter(weights, "", "", image_encoder_folder=None, low_cpu_mem_usage=False)
    embeddings = torch.randn(2, 1, width, generator=generator)
    return {"ip_adapter_image_embeds": [embeddings]}


def test_a_lora_and_a_control_work_together_whichever_came_first(
    stock: StableDiffusionPipeline, control: Control
) -> None:
    pytest.importorskip("peft")
    before = draw(stock)
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT)
        steered = draw(stock)
        add_lora(stock)
        later = draw(stock)
    styled = draw(stock)
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT)
        assert np.array_equal(draw(stock), later)
        stock.unload_lora_weights()
        assert np.array_equal(draw(stock), steered)
    assert np.array_equal(draw(stock), before)
    assert len({picture.tobytes() for picture in (before, steered, later, styled)}) == 4


def test_a_base_delta_and_a_lora_go_on_and_come_off_in_any_order(
    stock: StableDiffusionPipeline, control: Control
) -> None:
    pytest.importorskip("peft")
    to_q = next(name for name, _ in stock.unet.named_parameters() if name.endswith("attn2.to_q.weight"))
    control.base_delta = {to_q: torch.full_like(stock.unet.get_parameter(to_q), 0.2)}
    before = draw(stock)
    rig = attach(stock, edge=control)
    rig["edge"].set(hint=HINT)
    add_lora(stock)
    both = draw(stock)
    rig.detach()
    styled = draw(stock)
    with attach(stock, edge=control) as rig:  # now the LoRA lies around the layers that the delta changes
        rig["edge"].set(hint=HINT)
        assert np.array_equal(draw(stock), both)
        rig["edge"].set(scale=0)
        assert not np.array_equal(draw(stock), styled)  # the delta is in force
        stock.unload_lora_weights()
    assert np.array_equal(draw(stock), before)


def test_an_ip_adapter_and_a_control_work_together(stock: StableDiffusionPipeline, control: Control) -> None:
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT)
        steered = draw(stock)
    picture = add_ip_adapter(stock)
    prompted = draw(stock, **picture)
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT)
        both = draw(stock, **picture)
        rig["edge"].set(half="conditional")
        assert not np.array_equal(draw(stock, **picture), both)
        rig["edge"].set(half="both")
        stock.set_ip_adapter_scale(0.0)
        assert np.allclose(draw(stock, **picture), steered, rtol=0, atol=1e-5)
        stock.set_ip_adapter_scale(1.0)
    assert np.array_equal(draw(stock, **picture), prompted)
    assert len({picture.tobytes() for picture in (steered, prompted, both)}) == 3


def test_a_control_is_not_made_of_a_base_that_carries_an_ip_adapter(stock: StableDiffusionPipeline) -> None:
    add_ip_adapter(stock)
    with pytest.raises(BaseError, match=r"carries an IP-Adapter, which would be copied along; call unload_ip_adapter"):
        Control.from_base(stock)


def test_a_control_is_not_made_of_a_base_that_carries_a_lora(stock: StableDiffusionPipeline) -> None:
    pytest.importorskip("peft")
    add_lora(stock)
    with pytest.raises(BaseError, match=r"carries a LoRA, which would be copied along; call pipeline.unload_lora"):
        Control.from_base(stock)
    stock.unload_lora_weights()
    Control.from_base(stock)


def test_reins_of_one_control_share_its_pass_and_add_what_they_would_alone(
    stock: StableDiffusionPipeline, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever pictures, halves, regions and strengths they have; another control has a pass of its own."""
    other = tiny.wake(Control.from_base(stock))
    how: dict[str, dict[str, Any]] = {
        "first": {"hint": HINT, "scale": 0.5},
        "second": {"hint": HINTS, "half": "conditional"},
        "third": {"hint": HINT, "mask": LEFT, "weights": "official"},
        "late": {"hint": HINT, "start": 0.9},
    }
    pictures = {"first": (0, 2), "second": (1, 2), "third": (2,)}
    controls = dict.fromkeys(how, control) | {"other": other}
    passes: list[int] = []
    residuals = type(control).residuals

    def counted(self: Control, call: Any, features: Tensor) -> Residuals:
        passes.append(len(features))
        return residuals(self, call, features)

    with attach(stock, **controls) as rig, torch.no_grad():
        for name, given in (how | {"other": {"hint": HINT}}).items():
            rig[name].set(**given).pictures = pictures.get(name)
        given, place = call(6), Place(0.0, 0.25)
        alone = [rein.pull(given, Guided, place) for rein in rig.reins.values()]
        monkeypatch.setattr(type(control), "residuals", counted)
        rig.pipeline, rig.progress.locate = Guided, lambda timestep: place
        found = rig._pull_all(given)
    wanted = [one for one in alone if one is not None]
    assert len(wanted) == 4
    assert passes == [4 + 2 + 2, 6]
    assert close(found, sum(wanted[1:], wanted[0]).links)


def test_where_nobody_says_at_which_step_a_call_is_a_schedule_is_refused(control: Control) -> None:
    nowhere = Place(known=False)
    assert pull(Rein("edge", control).set(hint=HINT), 2, Unguided, nowhere) is not None
    schedules: list[dict[str, Any]] = [{"end": 0.8}, {"start": 0.1}, {"keyframes": [(0, 1), (1, 0.5)]}]
    for schedule in schedules:
        with pytest.raises(ConfigError, match=r"nothing says where in the sampling .*attach to the pipeline"):
            pull(Rein("edge", control).set(hint=HINT, **schedule), 2, Unguided, nowhere)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_hint_is_encoded_again_once_the_control_has_learned(control: Control, replaced: bool) -> None:
    rein = Rein("edge", control).set(hint=HINT)
    before = pull(rein, 2)
    encoder = control.controlnet_cond_embedding
    if replaced:
        encoder.load_state_dict({name: 2 * weight for name, weight in encoder.state_dict().items()}, assign=True)
    with torch.no_grad():
        for weight in encoder.parameters() if not replaced else ():
            weight.mul_(2)
    after, fresh = pull(rein, 2), pull(Rein("edge", control).set(hint=HINT), 2)
    assert before is not None
    assert fresh is not None
    assert close(after, fresh.links)
    assert not close(after, before.links)


def test_a_control_of_an_unlocked_base_changes_it_once_however_often_it_is_attached(
    stock: StableDiffusionPipeline, control: Control
) -> None:
    control.base_delta = {"conv_out.weight": torch.ones_like(stock.unet.conv_out.weight)}
    before = stock.unet.conv_out.weight.detach().clone()
    with attach(stock, left=control, right=control):
        assert torch.equal(stock.unet.conv_out.weight, before + 1)
    assert torch.equal(stock.unet.conv_out.weight, before)
