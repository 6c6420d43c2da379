"""Which scheduler a base samples with: by a short name, or any class of diffusers."""

from typing import Any

import diffusers

from bridle.base.base import Base
from bridle.errors import SampleError
from bridle.sample.settings import SCHEDULERS

# What latents need where a base's configuration does not say: diffusers' own defaults are for pixels, and cut off most.
FOR_LATENTS = {"clip_sample": False, "set_alpha_to_one": False}


def set_scheduler(base: Base, name: str) -> str:
    """Sample with another scheduler, on the base's own noise schedule.

    Args:
        name: one of `SCHEDULERS`, "auto" for the one of the base's family, or a class of diffusers.

    Returns: its name. Raises: SampleError: there is none of that name, or it is for another kind of bases.
    """
    name = base.family.scheduler if name == "auto" else name
    kind, options = SCHEDULERS.get(name, (name, {}))
    made, flows = getattr(diffusers, kind, None), base.schedule.prediction == "flow"
    known = ", ".join(other for other, (kind, _) in SCHEDULERS.items() if for_flows(kind) == flows)
    known = ", ".join(base.family.schedulers) or known
    if not (isinstance(made, type) and issubclass(made, diffusers.SchedulerMixin)):
        raise SampleError(f"scheduler {name!r} is unknown; expected one of {known}, or a scheduler class of diffusers")
    if for_flows(kind) != flows or name not in (base.family.schedulers or (name,)):
        raise SampleError(f"scheduler {name!r} is not for {base.family.name}; expected one of {known}")
    schedule = base.pipeline.scheduler.config
    options = options if base.vae is None else {**unsaid(schedule), **options}
    base.pipeline.scheduler = adopt(made, schedule, options, name)
    return name


def unsaid(schedule: Any) -> dict[str, object]:
    """What `from_config` gets wrong for latents, as options; classes without them pass them over.

    A stock pipeline corrects it when it is made, not when it is given another scheduler.
    """
    defaults = schedule.get("_use_default_values", ())  # written down, but never said
    options = {name: value for name, value in FOR_LATENTS.items() if name not in schedule or name in defaults}
    return {**options, "steps_offset": schedule.get("steps_offset", 1)}  # as it stands: corrected, where it was


def adopt(made: Any, schedule: Any, options: dict[str, object], name: str) -> Any:
    try:
        return made.from_config(schedule, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SampleError(
            f"scheduler {name!r} does not take this base's noise schedule ({error}); use another"
        ) from None


def for_flows(kind: str) -> bool:
    """diffusers' classes for flows say so in their names."""
    return kind.startswith("FlowMatch")
