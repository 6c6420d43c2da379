"""How far a step's gradients are from float32's: by the modules' own code in bfloat16, and by the kernels of a run.

In: a size. Out: the losses, and the cosines between the gradients of a control whose zero weights are random: of all
weights as one vector, and of each. Everything on one batch, from the same weights. CPU only, where the kernels are.

    python benchmarks/gradients.py --size embedded --batch 24
"""

import argparse
import copy
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from parts import modules_own_code
from peer import Batch, Models
from step import make_trainer
from torch import Tensor

Gradients = dict[str, Tensor]


def gradients(models: Any, batch: Any, precision: str) -> tuple[float, Gradients]:
    """The loss of a first step, and the gradients that its optimiser is given."""
    torch.manual_seed(1)  # a new control's hint encoder is drawn
    trainer, rows = make_trainer(copy.deepcopy(models), batch, precision=precision, halved=False)
    found: Gradients = {}

    def look(*_: Any) -> None:
        named = trainer.control.named_parameters()
        found.update({name: one.grad.double() for name, one in named if one.grad is not None})

    torch.manual_seed(2)  # whatever has been drawn since
    with torch.no_grad():
        for parameter in trainer.control.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape))  # in order, however its numbers lie in memory
    trainer.optimizer.register_step_pre_hook(look)
    return trainer.step(1, rows).loss, found


def cosine(found: Tensor, exact: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0).item()


def joined(found: Gradients) -> Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("embedded", "sd15"), default="embedded")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--latents", type=int, default=16, help="a side of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = getattr(Models, options.size)()
    batch = Batch.random(models, options.batch, options.latents)
    with modules_own_code():
        exact_loss, exact = gradients(models, batch, "fp32")
        plain = gradients(models, batch, "bf16")
    ours = gradients(models, batch, "bf16")
    print(f"float32: loss {exact_loss:.4f}")
    for name, (loss, found) in {"own code in bfloat16": plain, "Bridle in bfloat16": ours}.items():
        each = sorted(cosine(found[one], exact[one]) for one in exact)
        shown = ", ".join(f"{each[int(share * len(each))]:.5f}" for share in (0, 0.01, 0.05, 0.5))
        print(f"{name}: loss {loss:.4f}, cosine of all {cosine(joined(found), joined(exact)):.6f}; of each weight, the")
        print(f"    least, and of which 1%, 5% and half are below: {shown}")


if __name__ == "__main__":
    main()
