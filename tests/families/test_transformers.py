"""What holds for the controls of transformers alike: Stable Diffusion 3, 3.5 and Flux.1, with guidance and without."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import tiny_transformers as tt
import torch
from diffusers import FluxControlNetModel, SD3ControlNetModel
from PIL import Image
from torch import Tensor

from bridle.base.base import Base
from bridle.cache.build import build_cache
from bridle.cache.store import Cache
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.flux import pack
from bridle.data.annotate.canny import Canny
from bridle.data.settings import DataSettings
from bridle.data.sources import open_source
from bridle.errors import ConfigError, HintError, SampleError
from bridle.files.weights import load_control, save_control
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.train import checkpoint
from bridle.train.denoiser import Denoiser, trained_parts
from bridle.train.loop import CHECKPOINTS, Hands, Outcome, train
from bridle.train.memory import set_gradient_checkpointing
from bridle.train.settings import MachineSettings, ProbeSettings, TrainSettings

# diffusers' own `FluxControlNetModel` says so of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
# What is trained but always finds a gradient of zero: the questions that the text asks in a block whose text output
# nobody reads, and of Stable Diffusion 3 the weights behind pooled captions, which are zeros.
SILENT = re.compile(r"attn\.(add_q_proj|norm_added_q)|text_embedder\.linear_1\.weight")
# Drawing without classifier-free guidance, and with what Flux is told in training.
GUIDANCE = {SD3ControlNetModel: 1.0, FluxControlNetModel: 3.5}


@dataclass(frozen=True)
class Kind:
    """One family: its tiny denoiser and pipeline, and diffusers' class of its controls."""

    denoiser: Callable[..., Any]
    pipeline: Callable[..., Any]
    reference: Any
    changes: Mapping[str, Any]

    def make(self) -> Any:
        return self.pipeline(self.denoiser(**self.changes))

    def reference_links(self, reference: Any, call: dict[str, Any], hint: Tensor) -> list[Tensor]:
        """What diffusers' class makes of a call, given as its own pipelines give it."""
        if self.reference is SD3ControlNetModel:
            unpooled = call | {"pooled_projections": torch.zeros_like(call["pooled_projections"])}
            return list(reference(controlnet_cond=hint, **unpooled).controlnet_block_samples)
        told = call if reference.config.guidance_embeds else call | {"guidance": None}
        output = reference(controlnet_cond=pack(hint), **told)
        return [*output.controlnet_block_samples, *output.controlnet_single_block_samples]


KINDS = {
    "sd3": Kind(tt.make_sd3, tt.sd3_pipeline, SD3ControlNetModel, {}),
    "sd3.5": Kind(tt.make_sd3, tt.sd3_pipeline, SD3ControlNetModel, tt.SD35),
    "flux": Kind(tt.make_flux, tt.flux_pipeline, FluxControlNetModel, {}),
    "schnell": Kind(tt.make_flux, tt.flux_pipeline, FluxControlNetModel, {"guidance_embeds": False}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=["sd3", "flux"])
def main_kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


# --- the control itself


def test_it_begins_as_the_base_bit_for_bit(kind: Kind) -> None:
    denoiser = kind.denoiser(**kind.changes)
    control = Control.from_base(denoiser)
    latents, timesteps, text, hint = tt.make_inputs()
    with torch.no_grad():
        residuals = control(latents, timesteps, text, hint)
        steered = control.join(denoiser, control.call(latents, timesteps, text), residuals)
        plain = control.join(denoiser, control.call(latents, timesteps, text), residuals.scaled(0.0))
    assert not any(link.any() for link in residuals.links)
    assert not control.encode(hint).any()
    assert torch.equal(steered, plain)
    assert steered.shape == latents.shape


def test_gradients_arrive_in_the_order_that_zero_layers_imply(kind: Kind) -> None:
    denoiser = kind.denoiser(**kind.changes)
    model = Denoiser(Control.from_base(denoiser), denoiser)
    inputs = tt.make_inputs()
    trained = {
        name: parameter for part in trained_parts(model, "connected", None).values() for name, parameter in part.items()
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    goal, pulled = torch.randn_like(inputs[0]), []
    for _ in range(3):
        optimizer.zero_grad()
        (model(*inputs) - goal).square().mean().backward()
        pulled.append({name for name, p in trained.items() if p.grad is not None and p.grad.any()})
        optimizer.step()
    out = {name for name in trained if ".controlnet_blocks." in name or ".controlnet_single_blocks." in name}
    assert pulled[0] == out
    assert pulled[1] == pulled[2] > out
    assert all(parameter.grad is not None for parameter in trained.values())  # or "ddp" would wait for it
    assert all(SILENT.search(name) for name in trained.keys() - pulled[2])
    idle = {name for name, parameter in model.control.named_parameters() if parameter.grad is None}
    assert idle == {name for name, _ in model.control.named_parameters() if name.startswith(model.control.idle)}


def test_residuals_and_files_are_those_of_diffusers(kind: Kind, tmp_path: Path) -> None:
    control = tt.wake(Control.from_base(kind.denoiser(**kind.changes), layers=2))
    inputs = tt.make_inputs()
    call, hint = control.call(*inputs[:3]), inputs[3]
    with torch.no_grad():
        ours = control(*inputs).links
        save_control(control, tmp_path / "ours")
        reference = kind.reference.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False).eval()
        theirs = kind.reference_links(reference, call, hint)
        assert all(link.any() for link in ours)
        assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * len(ours)
        reference.save_pretrained(tmp_path / "theirs")
        for folder in ("ours", "theirs"):
            again = load_control(tmp_path / folder)(*inputs).links
            assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_the_base_is_left_as_it_is_and_shares_no_memory_with_the_copy(main_kind: Kind) -> None:
    denoiser = main_kind.denoiser()
    before = copy.deepcopy(denoiser.state_dict())
    control = Control.from_base(denoiser)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert all(parameter.requires_grad for parameter in control.parameters())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_links_serve_the_blocks_that_the_base_would_have_them_serve(kind: Kind, layers: int) -> None:
    denoiser = kind.denoiser(**kind.changes)
    control = tt.wake(Control.from_base(denoiser, layers=layers))
    inputs = tt.make_inputs()
    call = control.call(*inputs[:3])
    if not denoiser.config.get("guidance_embeds"):
        call.pop("guidance", None)
    with torch.no_grad():
        residuals = control(*inputs)
        placed = control.place(residuals, denoiser)
        assert len(placed.links) == len(blocks_of(denoiser))
        by_us, by_base = (denoiser(**call, **control.keywords(r)).sample for r in (placed, residuals))
        assert torch.equal(by_us, by_base)
        assert not torch.equal(by_us, denoiser(**call).sample)


def test_checkpointing_computes_blocks_again_and_changes_no_gradient(main_kind: Kind) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        denoiser = main_kind.denoiser()
        model = Denoiser(tt.wake(Control.from_base(denoiser)), denoiser)
        if checkpointing:
            set_gradient_checkpointing(model.control, denoiser)
        calls.append(0)
        for block in blocks_of(model.control):
            block.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        model(*tt.make_inputs()).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls == [len(model.control.zero_layers), 2 * len(model.control.zero_layers)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def blocks_of(model: Any) -> list[Any]:
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def test_what_transformers_have_not_is_refused(main_kind: Kind) -> None:
    denoiser = main_kind.denoiser()
    for options, said in (
        ({"hint_channels": 1}, "hint_channels is 1, but of this base its autoencoder sees the hint"),
        ({"hint_encoder": "paper"}, "hint_encoder is 'paper', but of this base the autoencoder encodes hints"),
        ({"links": "middle"}, "links is 'middle', but this base has no middle block"),
        ({"layers": 9}, "layers is 9; of this base 1 to"),
        ({"layers": 0}, "layers is 0; of this base 1 to"),
    ):
        with pytest.raises(ConfigError, match=said):
            Control.from_base(denoiser, **options)
    control = Control.from_base(denoiser)
    latents, timesteps, text, hint = tt.make_inputs()
    with pytest.raises(HintError, match="hint is 64x48 px; the picture asks for 48x64 px"):
        control(latents, timesteps, text, hint.transpose(2, 3))
    with pytest.raises(HintError, match="prepare it first"):
        control(latents, timesteps, text, torch.zeros(2, 3, 64, 48))
    with pytest.raises(HintError, match="hint is 72x64 px; this base takes multiples of 16"):
        control.fit_hint(torch.zeros(1, 3, 64, 72), main_kind.make())


def test_a_control_of_another_width_is_refused(main_kind: Kind) -> None:
    control = Control.from_base(wide(main_kind))
    with pytest.raises(ConfigError, match="num_attention_heads 4, the pipeline 2"):
        attach(main_kind.make(), edge=control)


def wide(kind: Kind) -> Any:
    changes = {"caption_projection_dim": 32} if kind.reference is SD3ControlNetModel else {}
    return kind.denoiser(num_attention_heads=4, **changes)


# --- drawing with stock pipelines


PICTURE = Image.fromarray(tiny.make_hint(8))
MASK = Image.fromarray(np.kron(np.array([[255, 0], [255, 0]], np.uint8), np.ones((32, 32), np.uint8)))
TASKS: dict[str, dict[str, Any]] = {
    "text_to_image": {},
    "image_to_image": {"image": PICTURE, "strength": 0.8},
    "inpaint": {"image": PICTURE, "mask_image": MASK, "strength": 0.8},
}


def draw(pipeline: Any, **more: Any) -> np.ndarray:
    images: np.ndarray = pipeline(
        "a bar",
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **more,
    ).images
    return images


@pytest.mark.parametrize("task", TASKS)
def test_stock_pipelines_are_steered_and_set_free_again(kind: Kind, task: str) -> None:
    base = Base(kind.make())
    pipeline = getattr(diffusers, getattr(base.family, task))(**base.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    fresh, awake = Control.from_base(pipeline), tt.wake(Control.from_base(pipeline))
    before = draw(pipeline, **TASKS[task])
    with attach(pipeline, edge=fresh) as rig:
        rig["edge"].set(hint=tiny.make_hint())
        assert np.array_equal(draw(pipeline, **TASKS[task]), before)
    with attach(pipeline, edge=awake) as rig:
        rig["edge"].set(hint=tiny.make_hint())
        steered = draw(pipeline, **TASKS[task])
        rig["edge"].set(hint=tiny.make_hint(9))
        other = draw(pipeline, **TASKS[task])
    assert not np.array_equal(steered, before)
    assert not np.array_equal(other, steered)
    assert np.array_equal(draw(pipeline, **TASKS[task]), before)


def test_several_controls_of_different_depth_act_at_once(main_kind: Kind) -> None:
    pipeline = main_kind.make()
    short, long = (tt.wake(Control.from_base(pipeline, layers=layers), layers) for layers in (1, 2))
    drawn = []
    for controls in ({"a": short, "b": long}, {"b": long, "a": short}, {"a": short}, {"b": long}):
        with attach(pipeline, **controls) as rig:
            for name in controls:
                rig[name].set(hint=tiny.make_hint())
            drawn.append(draw(pipeline))
    assert np.array_equal(drawn[0], drawn[1])
    assert not any(np.array_equal(drawn[0], alone) for alone in drawn[2:])


def test_a_region_mask_reaches_the_tokens_of_its_region(main_kind: Kind) -> None:
    """Half a mask: the residuals of the tokens outside are zero, those inside are as they were."""
    control = tt.wake(Control.from_base(main_kind.denoiser()))
    mask = torch.zeros(1, 1, 64, 48)
    mask[..., :32, :] = 1
    with torch.no_grad():
        plain = control(*tt.make_inputs())
    assert plain.grid == (4, 3)
    for link, masked in zip(plain.links, plain.masked(mask).links, strict=True):
        rows, kept = link.unflatten(1, (4, 3)), masked.unflatten(1, (4, 3))
        assert torch.equal(kept[:, :2], rows[:, :2])
        assert not kept[:, 2:].any()


def test_start_and_end_hold_although_pipelines_hand_timesteps_as_tensors(main_kind: Kind) -> None:
    pipeline = main_kind.make()
    control = tt.wake(Control.from_base(pipeline))
    calls: list[float] = []
    real = control.residuals
    control.residuals = lambda call, features: calls.append(float(control.timestep(call))) or real(call, features)  # type: ignore[method-assign]
    with attach(pipeline, edge=control) as rig:
        rig["edge"].set(hint=tiny.make_hint(), start=0.25, end=0.75)
        draw(pipeline)
    expected = pipeline.scheduler.timesteps[1:3].tolist()
    assert calls == pytest.approx(expected, rel=1e-5)


def test_training_calls_the_denoiser_as_drawing_does(kind: Kind) -> None:
    """The same captions, times, places and guidance, under the same names."""
    base = Base(kind.make())
    seen: list[dict[str, Any]] = []
    hook = base.denoiser.register_forward_pre_hook(lambda _, args, told: seen.append(told), with_kwargs=True)
    base.pipeline("a bar", height=64, width=48, num_inference_steps=2, guidance_scale=GUIDANCE[kind.reference])
    hook.remove()
    told = {name: value for name, value in seen[1].items() if isinstance(value, Tensor)}
    control = Control.from_base(base.pipeline)
    latents = torch.zeros(1, tt.CHANNELS, 8, 6)
    made = control.call(latents, base.pipeline.scheduler.timesteps[1], base.encode_captions(["a bar"]))
    if not base.denoiser.config.get("guidance_embeds"):
        made.pop("guidance", None)
    assert made.keys() == told.keys()
    assert made["hidden_states"].shape == told["hidden_states"].shape
    for name in told.keys() - {"hidden_states"}:
        assert torch.equal(made[name], told[name]), name


def test_training_draws_the_noise_levels_of_the_base_s_own_scheduler(main_kind: Kind) -> None:
    """Shifted as it is made, and not by what it would do for one size of pictures alone."""
    base = Base(main_kind.make())
    levels = base.pipeline.scheduler.sigmas[:1000].flip(0)
    assert torch.equal(base.schedule.spread, levels)
    assert (levels[499].item() > 0.7) == (main_kind.reference is SD3ControlNetModel)
    generate(base, None, [], ["a"], [0], SampleSettings(steps=2, precision="fp32"), (64, 64))
    assert torch.equal(base.schedule.spread, levels)


def test_pictures_are_generated_with_the_family_s_own_scheduler(main_kind: Kind) -> None:
    base = Base(main_kind.make())
    control = tt.wake(Control.from_base(base.pipeline))
    settings = SampleSettings(steps=2, batch=2, precision="fp32")
    hints = [tiny.make_hint(seed) for seed in (1, 2)]
    both = generate(base, control, hints, ["a", "b"], [3, 4], settings)
    assert type(base.pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    alone = generate(base, control, hints[1:], ["b"], [4], settings)
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(both[1], generate(base, None, [], ["b"], [4], settings, (64, 64))[0])
    with pytest.raises(SampleError, match="picture is 72x64 px; expected multiples of 16"):
        generate(base, None, [], ["b"], [4], settings, (64, 72))
    with pytest.raises(SampleError, match="scheduler 'ddim' is not for"):
        generate(base, None, [], ["b"], [4], SampleSettings(scheduler="ddim"), (64, 64))


# --- training through the real cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Base, Cache]]:
    """Three pairs to train on and two held out, encoded by each of the two families."""
    folder = Path(tmp_path_factory.mktemp("pairs"))
    for number in range(5):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[2 * number + 4 : 2 * number + 12, 8:24] = 20 * number
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"bar {number}")
    settings = DataSettings(folder=folder, size_px=32, held_out=2)
    made = {}
    for name in ("sd3", "flux"):
        base = Base(KINDS[name].make())
        made[name] = base, build_cache(open_source(folder), settings, Canny(), base, folder / name)
    return made


@pytest.fixture(params=["sd3", "flux"])
def trained_on(request: pytest.FixtureRequest, caches: dict[str, tuple[Base, Cache]]) -> tuple[Base, Cache]:
    return caches[request.param]


def go(on: tuple[Base, Cache], folder: Path, machine: MachineSettings = MachineSettings(), **values: Any) -> Outcome:  # noqa: B008
    base, cache = on
    settings = {"batch": 2, "lr": 1e-3, "warmup": 1, "precision": "fp32", "log_every": 1, "checkpoint_every": 1}
    hands = Hands(
        save=lambda control, step: None,
        save_best=lambda control, step: None,
        preview=lambda control, step, check: None,
        progress=lambda step, row: None,
        say=lambda message: None,
    )
    return train(
        Control.from_base(base.pipeline),
        base.denoiser,
        base.schedule,
        cache,
        TrainSettings(**(settings | values)),
        folder,
        hands,
        probing=ProbeSettings(every=3, pairs=2),
        machine=machine,
    )


def test_the_cache_holds_hints_as_the_control_takes_them(trained_on: tuple[Base, Cache]) -> None:
    _, cache = trained_on
    batch = cache.batch(cache.train_ids[:1])
    assert batch.hint.shape == batch.mean.shape == (1, tt.CHANNELS, 4, 4)
    assert batch.text.pooled is not None
    assert batch.text.pooled.shape == (1, tt.WIDTH)


def test_three_steps_train_the_control_and_a_run_that_was_stopped_ends_alike(
    trained_on: tuple[Base, Cache], tmp_path: Path
) -> None:
    base, _ = trained_on
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    whole = go(trained_on, tmp_path / "whole", steps=3)
    assert (whole.step, whole.finished) == (3, True)
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())
    fresh = Control.from_base(base.pipeline)
    still = {n for n, p in fresh.named_parameters() if torch.equal(p, dict(whole.control.named_parameters())[n])}
    assert all(name.startswith(fresh.idle) or SILENT.search(name) for name in still)
    go(trained_on, tmp_path / "halves", steps=2)
    go(trained_on, tmp_path / "halves", steps=3)
    one, other = (checkpoint.load(checkpoint.newest(tmp_path / name / CHECKPOINTS)) for name in ("whole", "halves"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_unlocked_base_comes_along_as_a_delta(trained_on: tuple[Base, Cache], tmp_path: Path) -> None:
    base, _ = trained_on
    machine = MachineSettings(gradient_checkpointing=True)
    values = {"steps": 3, "regime": "large", "unlock": "all", "unlock_after": 1, "unlock_lr": 1e-3}
    control = go((Base(copy.deepcopy(base.pipeline)), trained_on[1]), tmp_path, machine, **values).control
    assert control.base_delta
    save_control(control, tmp_path / "control")
    again = load_control(tmp_path / "control")
    pipeline = copy.deepcopy(base.pipeline)
    before = draw(pipeline)
    with attach(pipeline, edge=again) as rig:
        rig["edge"].set(hint=tiny.make_hint(), scale=0.0)
        assert not np.array_equal(draw(pipeline), before)
    assert np.array_equal(draw(pipeline), before)


def test_regimes_that_need_a_middle_link_or_a_decoder_are_refused(
    trained_on: tuple[Base, Cache], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no middle link.*train\.regime"):
        go(trained_on, tmp_path, steps=3, regime="small")
    with pytest.raises(ConfigError, match=r"train\.unlock is 'decoder'"):
        go(trained_on, tmp_path, steps=3, regime="large", unlock="decoder")
