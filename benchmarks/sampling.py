"""What a picture costs, and how far it is from the stock pipeline's: StableDiffusionControlNetPipeline against Bridle.

In: a case. Out: a table, and JSON where a path is given. Same weights, scheduler, steps, noise and precision.
The kinds take turns in one process on one thread, so that whatever else the machine does slows all of them alike; a
speed is the median over rounds of the ratio of CPU seconds. On a GPU, where there is one, wall time counts instead.
What is done once per shape and machine (choosing kernels) is left out. Packing weights, done once per call of
`generate`, is left out of the cases sd15, which time the steps of a pipeline, and is part of the cases of the embedded
base, which time `generate` from prompt to pixels.

    python benchmarks/sampling.py embedded --batch 8 --json sampling.json
    python benchmarks/sampling.py requests --batch 8             # controls, prompts, strengths of their own: one pass
    python benchmarks/sampling.py sd15-256                       # random weights; 9 GB of memory
    python benchmarks/sampling.py sd15-512 --rounds 3 --steps 4
    python benchmarks/sampling.py sd15-512 --batch 4 --steps 20
    python benchmarks/sampling.py embedded --precision fp32      # as where the processor is no faster in bfloat16

With --float32, of one base and control, each is also compared to what the stock pipeline draws of the same weights in
float32: what the precision costs the stock pipeline, and what ours.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn

from bridle.atomic import write_text
from bridle.base.load import load_base, pick_device
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.strength import Strength
from bridle.kernels.precision import TYPES, Precision
from bridle.sample.hasten import hasten
from bridle.sample.recall import SPEEDS, recalled
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings, Speed
from bridle.sample.steering import Steering

Draw = Callable[[int], Tensor]  # steps to what was drawn
STOCK = "stock"
FLOAT32 = "float32"  # what the stock pipeline draws in it, of the same weights; not timed
SIZE = (128, 128)  # of the embedded base's pictures


@dataclass
class Costs:
    """Of one kind: seconds of each round, and the relative distance of its result to the stock pipeline's.

    And to that of the stock pipeline in float32, where that was drawn.
    """

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    deviation: float = 0.0
    from_float32: float | None = None


def wake(control: Control) -> Control:
    """Random weights for the zero convolutions, so that the control counts."""
    for layer in control.zero_layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.01)
    return control


def stock_control(control: Control, precision: Precision) -> Any:
    """The same control as diffusers' class, with weights of its own."""
    model: Any = ControlNetModel.from_config(control.config)
    model.load_state_dict({name: tensor.clone() for name, tensor in control.state_dict().items()})
    return model.to(TYPES[precision]).eval()


# --- Stable Diffusion 1.5's size: the steps of a pipeline


def sd15_kinds(size_px: int, batch: int, precision: Precision, device: str, around: ExitStack) -> dict[str, Draw]:
    """Latents to latents, guidance 7.5, random weights. What Bridle packs it packs here, once."""
    torch.manual_seed(0)
    kind = TYPES[precision]
    torch.set_default_dtype(kind)
    with torch.device(device):
        unet: Any = UNet2DConditionModel(sample_size=size_px // 8, cross_attention_dim=768)
    torch.set_default_dtype(torch.float32)
    unet.requires_grad_(False).eval()
    control = wake(Control.from_base(unet)).requires_grad_(False).eval().to(device)
    unet.to(device)
    nothing: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts = nothing | {"requires_safety_checker": False}
    stock: Any = StableDiffusionControlNetPipeline(
        unet=copy.deepcopy(unet), controlnet=stock_control(control, precision), scheduler=ddim(), **parts
    )
    ours: Any = StableDiffusionPipeline(unet=unet, scheduler=ddim(), **parts)
    hint = torch.rand(batch, 3, size_px, size_px)
    latents = torch.randn(batch, 4, size_px // 8, size_px // 8).to(device, kind)
    text, no_text = torch.randn(2, batch, 77, 768).to(device, kind)
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    told = {"prompt_embeds": text, "negative_prompt_embeds": no_text, "guidance_scale": 7.5, "output_type": "latent"}
    told |= {"height": size_px, "width": size_px}

    def by_stock(steps: int) -> Tensor:
        return stock(**told, image=hint, latents=latents.clone(), num_inference_steps=steps).images

    def in_float32(steps: int) -> Tensor:
        exact = {name: what.float() if isinstance(what, Tensor) else what for name, what in told.items()}
        return widened(stock)(**exact, image=hint, latents=latents.float(), num_inference_steps=steps).images

    def by_ours(steps: int, speed: str | None) -> Tensor:
        with ExitStack() as inside:
            rig = inside.enter_context(attach(ours, it=control))
            rig["it"].set(hint=hint)
            if speed in SPEEDS:
                inside.enter_context(recalled(ours, rig, SPEEDS[speed]))
            return ours(**told, latents=latents.clone(), num_inference_steps=steps).images

    around.enter_context(hasten(ours, control))
    ways = {speed: lambda steps, speed=speed: by_ours(steps, speed) for speed in ("exact", *SPEEDS)}
    return {STOCK: by_stock, FLOAT32: in_float32} | ways


def widened(stock: Any) -> Any:
    """The same pipeline in float32, with weights of its own, but the same as numbers."""
    exact = copy.copy(stock)
    for name, part in stock.components.items():
        if isinstance(part, nn.Module):
            setattr(exact, name, copy.deepcopy(part).float())
    return exact


def ddim() -> Any:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


# --- the embedded base: from prompt to pixels


def embedded_kinds(batch: int, precision: Precision, device: str) -> dict[str, Draw]:
    """Pictures of 128 px. Its own weights, and a control with random zero convolutions."""
    torch.manual_seed(0)
    base = load_base(device=device, dtype=TYPES[precision])
    control = wake(Control.from_base(base.pipeline)).requires_grad_(False).eval()
    hints = draw_hints(batch)
    prompts, seeds = ["a red wooden chair on a grey floor"] * batch, list(range(batch))
    stock = stock_pipeline(base, control, precision)

    def by_stock(steps: int, pipeline: Any = stock) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = [Image.fromarray(hint) for hint in hints]
        told = {"prompt": prompts, "image": images, "generator": generators, "guidance_scale": 4.0, "output_type": "np"}
        return torch.from_numpy(pipeline(**told, num_inference_steps=steps).images) * 255

    def by_ours(steps: int, speed: str) -> Tensor:
        how = SampleSettings(steps=steps, guidance=4.0, batch=batch, precision=precision, speed=cast(Speed, speed))
        return torch.from_numpy(np.stack(generate(base, control, hints, prompts, seeds, how))).float()

    ways = {speed: lambda steps, speed=speed: by_ours(steps, speed) for speed in ("exact", *SPEEDS)}
    return {STOCK: by_stock, FLOAT32: lambda steps: by_stock(steps, widened(stock))} | ways


def request_kinds(batch: int, precision: Precision, device: str) -> dict[str, Draw]:
    """As many requests, with one of two controls, a strength, a prompt and a hint each: no two are alike in both.

    Stock calls come one after the other, as its pipeline takes one control and strength for all; ours share each pass.
    """
    torch.manual_seed(0)
    base = load_base(device=device, dtype=TYPES[precision])
    controls = [wake(Control.from_base(base.pipeline)).requires_grad_(False).eval() for _ in range(2)]
    stocks = [stock_pipeline(base, control, precision) for control in controls]
    hints, seeds, scales = draw_hints(batch), list(range(batch)), np.linspace(0.5, 1.0, (batch + 1) // 2).tolist()
    prompts = [f"a {('red', 'blue', 'green')[number % 3]} chair on a grey floor" for number in range(batch)]
    asked = [(number % 2, number // 2) for number in range(batch)]  # which control, which strength

    def by_stock(steps: int) -> Tensor:
        drawn = []
        for number, (control, scale) in enumerate(asked):
            told = {"prompt": prompts[number], "image": Image.fromarray(hints[number]), "guidance_scale": 4.0}
            told |= {"controlnet_conditioning_scale": scales[scale], "num_inference_steps": steps, "output_type": "np"}
            drawn.append(stocks[control](**told, generator=torch.Generator().manual_seed(seeds[number])).images)
        return torch.from_numpy(np.concatenate(drawn)) * 255

    def by_ours(steps: int, speed: str) -> Tensor:
        how = SampleSettings(steps=steps, guidance=4.0, batch=batch, precision=precision, speed=cast(Speed, speed))
        steering = {}
        for kind in set(asked):
            mine = [number for number, own in enumerate(asked) if own == kind]
            strength = Strength(scale=scales[kind[1]])
            steering[f"{kind}"] = Steering(
                control=controls[kind[0]], hints=[hints[number] for number in mine], strength=strength, pictures=mine
            )
        return torch.from_numpy(np.stack(generate(base, steering, [], prompts, seeds, how, SIZE))).float()

    return {STOCK: by_stock} | {speed: lambda steps, speed=speed: by_ours(steps, speed) for speed in ("exact", *SPEEDS)}


def draw_hints(count: int) -> list[np.ndarray]:
    """Random squares, [128, 128, 3] uint8."""
    squares = [np.random.default_rng(seed).integers(0, 2, (16, 16, 3)) for seed in range(count)]
    return [(np.kron(one, np.ones((8, 8, 1))) * 255).astype(np.uint8) for one in squares]


def stock_pipeline(base: Any, control: Control, precision: Precision) -> Any:
    """The same base, with weights of its own, and the same control."""
    parts = {name: copy.deepcopy(part) for name, part in base.pipeline.components.items()}
    stock: Any = StableDiffusionControlNetPipeline(
        **parts, controlnet=stock_control(control, precision), requires_safety_checker=False
    )
    stock.to(TYPES[precision])
    stock.set_progress_bar_config(disable=True)
    return stock


# --- what is measured


def measure(kinds: dict[str, Draw], exact: Tensor | None, rounds: int, steps: int) -> dict[str, Costs]:
    """Args: exact: what is drawn in float32, or None."""
    costs = {name: Costs() for name in kinds}
    reference = kinds[STOCK](steps).float().cpu()
    for name, draw in kinds.items():  # the first call also chooses kernels and fills caches
        found = draw(steps).float().cpu()
        costs[name].deviation = distance(found, reference)
        print(f"{name}: deviation {costs[name].deviation:.4f}", flush=True)
        if exact is not None:
            costs[name].from_float32 = distance(found, exact)
            print(f"{name}: from float32 {costs[name].from_float32:.4f}", flush=True)
    for turn in range(rounds):
        for name in kinds if turn % 2 == 0 else reversed(kinds):
            started_s, cpu_s = time.perf_counter(), time.process_time()
            kinds[name](steps).cpu()  # waits for a GPU
            costs[name].cpu_s.append(time.process_time() - cpu_s)
            costs[name].wall_s.append(time.perf_counter() - started_s)
            print(f"round {turn + 1}, {name}: {costs[name].wall_s[-1]:.2f} s", flush=True)
    return costs


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def gains(costs: dict[str, Costs], what: str) -> dict[str, list[float]]:
    """How many times faster than the stock pipeline in each round."""
    standard = getattr(costs[STOCK], what)
    return {name: [a / b for a, b in zip(standard, getattr(cost, what), strict=True)] for name, cost in costs.items()}


def show(costs: dict[str, Costs], steps: int) -> None:
    speeds = gains(costs, "cpu_s"), gains(costs, "wall_s")
    print(f"{'':10}{'CPU s a step':>14}{'wall s a step':>15}{'deviation':>11}   speed by CPU, by wall (ranges)")
    for name, cost in costs.items():
        cpu, wall = statistics.median(cost.cpu_s), statistics.median(cost.wall_s)
        ratios = [by[name] for by in speeds]
        shown = [f"{statistics.median(own):.2f}x ({min(own):.2f}-{max(own):.2f})" for own in ratios]
        print(f"{name:10}{cpu / steps:14.4f}{wall / steps:15.4f}{cost.deviation:11.4f}   {', '.join(shown)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["embedded", "requests", "sd15-256", "sd15-512"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1, help="pictures or requests at once")
    parser.add_argument("--precision", choices=TYPES, default="bf16", help="of both sides")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, else the CPU")
    parser.add_argument("--float32", action="store_true", help="compare to float32 as well; not of requests")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = pick_device(options.device)
    with ExitStack() as around, torch.no_grad():
        if options.case in ("embedded", "requests"):
            make_kinds = embedded_kinds if options.case == "embedded" else request_kinds
            kinds = make_kinds(options.batch, options.precision, device)
        else:
            size_px = int(options.case.removeprefix("sd15-"))
            kinds = sd15_kinds(size_px, options.batch, options.precision, device, around)
        in_float32 = kinds.pop(FLOAT32, None)
        if options.float32 and in_float32 is None:
            parser.error(f"--float32 is not for the case {options.case}; leave it out")
        exact = in_float32(options.steps).cpu() if options.float32 and in_float32 else None
        costs = measure(kinds, exact, options.rounds, options.steps)
    show(costs, options.steps)
    if options.json:
        facts = {name: getattr(options, name) for name in ("case", "rounds", "steps", "batch", "precision")}
        speeds = {"cpu": gains(costs, "cpu_s"), "wall": gains(costs, "wall_s")}
        table = {name: asdict(cost) for name, cost in costs.items()}
        facts |= {"torch": torch.__version__, "threads": 1, "device": device, "speed": speeds, "costs": table}
        write_text(options.json, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
