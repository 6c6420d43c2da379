"""How pictures are sampled."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from bridle.control.half import Half
from bridle.errors import ConfigError

Speed = Literal["exact", "fast", "draft"]

# Name on the command line, diffusers class, and what differs from its defaults.
SCHEDULERS: dict[str, tuple[str, dict[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Every field can be set in the run's TOML under [sample].

    Args:
        steps: denoising steps.
        guidance: classifier-free guidance; 1 turns it off.
        scheduler: one of `SCHEDULERS`, "auto" (the one of the base's family), or a class of diffusers, "...Scheduler".
        scale: of the control; of several it multiplies each.
        half: of guidance in which the control acts, where it is a single one: "both", as stock pipelines have it, or
            "conditional": guidance then amplifies what the hint says, as it does the prompt, and the hint is followed
            far more closely (arXiv:2302.05543, section 3.4). Where None the control's own, which is "both" but for
            those that pool. Several have each their own, see `Strength`.
        batch: pictures denoised at once.
        precision: "fp32"; "bf16" or, on GPUs that lack that, "fp16", the same picture but for fine grain, and faster
            where the machine has it; or "auto", whichever is fastest on the machine.
        pack_weights: on a CPU, keep weights a second time while pictures are drawn, in the order in which they are
            multiplied: faster, for up to 1.8 times their memory in bfloat16.
        speed: "exact"; or "fast" and "draft", which take over in some steps what an earlier one computed.

    Raises: ConfigError: a value is out of range.
    """

    steps: int = 20
    guidance: float = 4.0
    scheduler: str = "auto"
    scale: float = 1.0
    half: Half | None = None
    batch: int = 16
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    pack_weights: bool = True
    speed: Speed = "exact"

    def __post_init__(self) -> None:
        if self.scheduler not in ("auto", *SCHEDULERS) and not self.scheduler.endswith("Scheduler"):
            known = f"auto or one of {', '.join(SCHEDULERS)}, or a scheduler class of diffusers"
            raise ConfigError(f"setting sample.scheduler is {self.scheduler!r}; expected {known}")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"setting sample.{name} is {getattr(self, name)}; expected 1 or more")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            known = "'auto', 'fp32', 'bf16' or 'fp16'"
            raise ConfigError(f"setting sample.precision is {self.precision!r}; expected {known}")
        if self.speed not in get_args(Speed):
            raise ConfigError(f"setting sample.speed is {self.speed!r}; expected one of {', '.join(get_args(Speed))}")
        if self.half is not None and self.half not in get_args(Half):
            raise ConfigError(f"setting sample.half is {self.half!r}; expected one of {', '.join(get_args(Half))}")
        for name in ("guidance", "scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"setting sample.{name} is {getattr(self, name)}; expected 0 or more")
