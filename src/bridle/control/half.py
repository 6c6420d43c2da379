"""The halves of guidance in which a control can act: light, for settings name them before torch is loaded."""

from typing import Literal

Half = Literal["both", "conditional", "unconditional"]
