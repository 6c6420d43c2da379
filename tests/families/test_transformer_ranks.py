"""Two processes train the control of a transformer as one does, whichever way they share the work."""

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_transformers as tt
import torch
from torch import nn

from bridle.control.control import Control
from bridle.train.denoiser import Denoiser, trained_parts
from bridle.train.parallel import ALONE, World, full, mean, share, wrap

sys.path.append(str(Path(__file__).parents[1] / "train"))
from test_parallel import run_ranks

ROWS = 4


def learn(world: World, sharing: Any, family: str) -> list[tuple[float, float]]:
    """Three steps. Returns: loss and norm of the gradient of each."""
    denoiser: Any = getattr(tt, f"make_{family}")()
    pair = Denoiser(Control.from_base(denoiser), denoiser)
    pair.control.requires_grad_(False)
    for part in trained_parts(pair, "connected", None).values():
        for parameter in part.values():
            parameter.requires_grad_(True)
    model = wrap(pair, world, sharing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, figures = torch.optim.AdamW(trained, lr=1e-3), []
    latents, timesteps, text, hint = tt.make_inputs(ROWS)
    mine = torch.tensor(share(range(ROWS), world))
    for _ in range(3):
        loss = model(latents[mine], timesteps[mine], text[mine], hint[mine]).square().mean()
        loss.backward()
        norm = full(nn.utils.clip_grad_norm_(trained, 1.0)).item()
        figures.append((mean(loss.detach(), world).item(), norm))
        optimizer.step()
        optimizer.zero_grad()
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["ddp", "fsdp"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_two_processes_train_as_one_does(family: str, sharing: str) -> None:
    alone = learn(ALONE, sharing, family)
    for rank in run_ranks(2, learn, sharing, family):
        assert rank == [pytest.approx(figures, rel=1e-4) for figures in alone]
