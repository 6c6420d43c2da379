"""Which scheduler a base samples with: by a short name, or any class of diffusers."""

from typing import Any

import diffusers

from bridle.base.base import Base
from bridle.errors import SampleError
from bridle.sample.settings import SCHEDULERS


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
    base.pipeline.scheduler = adopt(made, base.pipeline.scheduler.config, options, name)
    return name


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
