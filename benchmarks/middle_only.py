"""What a training step costs with all links and with the middle link alone, by plain autograd and lightened.

In: nothing but a size. Out: a table, and JSON where a path is given. The four kinds of step take turns in one process
on one thread, so that whatever else the machine does slows all of them alike.

    python benchmarks/middle_only.py --size embedded --json middle-only.json
    python benchmarks/middle_only.py --size sd15 --rounds 9    # random weights; 10 GB of memory
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bridle.atomic import write_text
from bridle.base.load import load_base
from bridle.control.control import Control, Links
from bridle.kernels.attention import set_processors
from bridle.train.lighten import lighten_decoder

MIB = 2**20


@dataclass(frozen=True)
class Kind:
    """One way to take a step: which links, and whether the decoder is lightened."""

    links: Links
    light: bool

    @property
    def name(self) -> str:
        return ("standard" if self.links == "all" else "middle only") + (", lightened" if self.light else "")


KINDS = [Kind("all", False), Kind("all", True), Kind("middle", False), Kind("middle", True)]


@dataclass
class Costs:
    """Of one kind of step: what a pair takes, and CPU and wall seconds of each step by part."""

    gflop_per_pair: float = 0.0
    kept_mib: float = 0.0
    cpu_s: list[dict[str, float]] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def step_cpu_s(self) -> list[float]:
        return [sum(parts.values()) for parts in self.cpu_s]


class Bench:
    """A base, a control, an optimiser and one batch of noise.

    Args:
        unet: locked; its type is the precision that the base is kept in.
        batch: pairs in a step.
        width: of the square latents.
    """

    def __init__(self, unet: Any, batch: int, width: int, tokens: int, plain_attention: bool) -> None:
        self.unet = unet.requires_grad_(False).eval()
        self.control = Control.from_base(self.unet).float()
        if plain_attention:
            set_processors((self.control, self.unet), lambda attention: AttnProcessor())
        self.average = copy.deepcopy(self.control).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.control.parameters(), lr=1e-5, fused=True)
        self.batch, pixels = batch, width * self.control.size_factor
        text_width = int(unet.config.cross_attention_dim)
        self.latents, self.noise = torch.randn(2, batch, 4, width, width)
        self.timesteps = torch.randint(1000, (batch,))
        self.text, self.hint = torch.randn(batch, tokens, text_width), torch.rand(batch, 3, pixels, pixels)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            residuals = self.control(self.latents, self.timesteps, self.text, self.hint)
            given = {"down_block_additional_residuals": residuals.down, "mid_block_additional_residual": residuals.mid}
            output = self.unet(self.latents, self.timesteps, self.text, **given).sample
        return (output.float() - self.noise).square().mean()

    @torch.no_grad()
    def update(self) -> None:
        """Clip, AdamW, and the running average."""
        trained = [(name, weight) for name, weight in self.control.named_parameters() if weight.requires_grad]
        nn.utils.clip_grad_norm_([weight for _, weight in trained], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        averages = dict(self.average.named_parameters())
        for name, weight in trained:
            averages[name].lerp_(weight, 0.01)

    @contextmanager
    def entered(self, kind: Kind) -> Generator[None]:
        """Train as this kind does, then be as before."""
        self.control.links = kind.links
        self.control.controlnet_down_blocks.requires_grad_(kind.links == "all")
        undo = lighten_decoder(self.unet, skips=kind.links == "all") if kind.light else lambda: None
        try:
            yield
        finally:
            undo()

    def count(self, costs: Costs) -> None:
        """FLOPs and bytes; they are the same every time."""
        parameters = {weight.data_ptr() for module in (self.unet, self.control) for weight in module.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = self.loss()
            costs.kept_mib = sum(storage.nbytes() for storage in storages.values()) / MIB
            storages.clear()
            loss.backward()
        costs.gflop_per_pair = counter.get_total_flops() / self.batch / 1e9
        self.update()

    def time(self, costs: Costs) -> None:
        """One step."""
        started_s, parts = time.perf_counter(), {}
        loss, parts["forward"] = timed(self.loss)
        _, parts["backward"] = timed(loss.backward)
        _, parts["update"] = timed(self.update)
        costs.cpu_s.append(parts)
        costs.wall_s.append(time.perf_counter() - started_s)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the CPU seconds it took."""
    started_s = time.process_time()
    result = work()
    return result, time.process_time() - started_s


def make_bench(size: str) -> Bench:
    """The embedded base as it trains by default, or Stable Diffusion 1.5's architecture at 256 px.

    The latter's base is kept in bfloat16, or it would not fit.
    """
    torch.manual_seed(0)
    if size == "embedded":
        return Bench(load_base().denoiser, batch=24, width=16, tokens=32, plain_attention=True)
    unet: Any = UNet2DConditionModel(sample_size=32, cross_attention_dim=768)
    return Bench(unet.to(torch.bfloat16), batch=1, width=32, tokens=77, plain_attention=False)


def measure(bench: Bench, rounds: int) -> dict[str, Costs]:
    costs = {kind.name: Costs() for kind in KINDS}
    for kind in KINDS:
        with bench.entered(kind):
            bench.count(costs[kind.name])
            bench.time(Costs())  # the first one also fills caches
    for turn in range(rounds):
        for kind in KINDS if turn % 2 == 0 else reversed(KINDS):
            with bench.entered(kind):
                bench.time(costs[kind.name])
    return costs


def gains(costs: dict[str, Costs]) -> dict[str, list[float]]:
    """How many times faster than the standard step in each round, by CPU seconds."""
    standard = costs[KINDS[0].name].step_cpu_s()
    return {name: [a / b for a, b in zip(standard, cost.step_cpu_s(), strict=True)] for name, cost in costs.items()}


def show(costs: dict[str, Costs]) -> None:
    print(f"{'':24}{'GFLOP':>8}{'kept':>8}{'forward':>9}{'backward':>9}{'update':>8}{'CPU':>8}{'wall':>8}  speed")
    print(f"{'':24}{'a pair':>8}{'MiB':>8}{'s':>9}{'s':>9}{'s':>8}{'s':>8}{'s':>8}  (quartiles)")
    for name, ratios in gains(costs).items():
        cost, median = costs[name], statistics.median
        parts = [median(step[part] for step in cost.cpu_s) for part in ("forward", "backward", "update")]
        low, half, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:24}{cost.gflop_per_pair:8.2f}{cost.kept_mib:8.1f}{parts[0]:9.3f}{parts[1]:9.3f}{parts[2]:8.3f}"
            f"{median(cost.step_cpu_s()):8.3f}{median(cost.wall_s):8.3f}  {half:.3f}x ({low:.3f}-{high:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["embedded", "sd15"], default="embedded")
    parser.add_argument("--rounds", type=int, default=21, help="steps of each kind, 2 or more")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; expected 2 or more")
    torch.set_num_threads(1)
    costs = measure(make_bench(options.size), options.rounds)
    show(costs)
    if options.json:
        facts = {"size": options.size, "torch": torch.__version__, "threads": 1}
        table = {name: asdict(cost) for name, cost in costs.items()}
        write_text(options.json, json.dumps(facts | {"speed": gains(costs), "costs": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
