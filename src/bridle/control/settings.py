"""How a control is built."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """Every field can be set in the run's TOML under [control].

    Args:
        hint_encoder: "official" loads in every other tool; "paper" is what the paper's text says, for Bridle only.
    """

    hint_encoder: Literal["official", "paper"] = "official"
