"""How pictures are sampled."""

from dataclasses import dataclass

from bridle.errors import ConfigError

# Name on the command line, diffusers class, and what differs from its defaults.
SCHEDULERS: dict[str, tuple[str, dict[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Every field can be set in the run's TOML under [sample].

    Args:
        steps: denoising steps.
        guidance: classifier-free guidance; 1 turns it off.
        scheduler: one of `SCHEDULERS`.
        scale: of the control.
        batch: pictures denoised at once.

    Raises: ConfigError: a value is out of range.
    """

    steps: int = 20
    guidance: float = 4.0
    scheduler: str = "ddim"
    scale: float = 1.0
    batch: int = 16

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f"setting sample.scheduler is {self.scheduler!r}; expected one of {', '.join(SCHEDULERS)}")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"setting sample.{name} is {getattr(self, name)}; expected 1 or more")
        if self.guidance < 0 or self.scale < 0:
            raise ConfigError(f"sample.guidance is {self.guidance}, sample.scale {self.scale}; expected 0 or more")
