"""What a base is told of captions, as one value: states per token, and for the larger bases one vector per caption."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """B encoded captions.

    Attributes:
        states: [B, L, D], the text encoder's; several encoders' are joined as the base's own pipeline joins them.
        pooled: [B, P], one vector per caption; None where the base takes none (Stable Diffusion 1 and 2).
    """

    states: Tensor
    pooled: Tensor | None = None

    @classmethod
    def of(cls, text: "Text | Tensor") -> "Text":
        """States alone are a text as well."""
        return cls(text) if isinstance(text, Tensor) else text

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, those that there are."""
        return {"states": self.states} | ({} if self.pooled is None else {"pooled": self.pooled})

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | Tensor) -> "Text":
        return Text(**{name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, *where: Any) -> "Text":
        """On another device, or of another type, as `Tensor.to` takes them."""
        return Text(**{name: tensor.to(*where) for name, tensor in self.tensors.items()})

    def where(self, chosen: Tensor, other: "Text") -> "Text":
        """The rows of this text where chosen [B] is true, the other's single one elsewhere."""
        theirs = other.tensors

        def pick(name: str, tensor: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (tensor.ndim - 1)), tensor, theirs[name])

        return Text(**{name: pick(name, tensor) for name, tensor in self.tensors.items()})


def join_texts(parts: list[Text]) -> Text:
    """Several texts as one, in order."""
    return Text(**{name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})
