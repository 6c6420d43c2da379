"""Train the network behind the depth, normals and segmentation annotators on rendered scenes.

In: folders of scenes (tools/scenes); those with held-out objects are only measured. Out, under `--out`: `state.pt`
(resumable) and `scene_maps.safetensors` (averaged weights, float16). The learning rate falls over `--minutes` of
training, however often it was interrupted.

    python tools/estimator/train.py --scenes work/scenes/cc0 --minutes 12
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import scenes
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bridle import atomic
from bridle.data.annotate.scene_net import LABELS, SceneMaps, SceneNet

sys.path.append(str(Path(__file__).parents[1] / "base"))
import state

FILE = "scene_maps.safetensors"
LEAST_LR = 0.02  # part of the learning rate that is left at the end


def make_optimizers(net: nn.Module) -> state.Optimizers:
    """Muon for the convolutions inside; AdamW for the rest."""
    inner = {n for n, w in net.named_parameters() if w.ndim == 4 and not n.startswith(("stem", "head"))}
    return state.Optimizers(net, inner, weight_decay=0.02, fused=False)


def loss_of(found: SceneMaps, wanted: scenes.Rows) -> Tensor:
    """Errors of depth and of its steps, of normals by their distance (about the angle), of labels by cross entropy."""
    error = found.depth - wanted.depth
    steps = (error[:, 1:] - error[:, :-1]).abs().mean() + (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    depth = error.abs().mean() + 2 * error.square().mean() + steps
    normals = ((found.normals - wanted.normals).square().sum(1) + 1e-4).sqrt().mean()
    return 3 * depth + normals + F.cross_entropy(found.labels, wanted.labels)


@torch.no_grad()
def measure(net: SceneNet, rows: scenes.Rows, device: torch.device) -> dict[str, float]:
    """Means over pictures: depth_rmse in 8-bit steps, normals_deg, miou over the classes of a picture."""
    figures = []
    for start in range(0, len(rows), 32):
        wanted = rows.at(slice(start, start + 32), device)
        found = net(wanted.pictures)
        rmse = 255 * (found.depth.clamp(0, 1) - wanted.depth).square().mean((1, 2)).sqrt()
        cosine = (found.normals * wanted.normals).sum(1).clamp(-1, 1)
        angle = torch.rad2deg(torch.acos(cosine)).mean((1, 2))
        figures.append(torch.stack([rmse, angle, overlap(found.labels.argmax(1), wanted.labels)], 1))
    means = torch.cat(figures).mean(0).tolist()
    return dict(zip(("depth_rmse", "normals_deg", "miou"), (round(mean, 3) for mean in means), strict=True))


def overlap(found: Tensor, wanted: Tensor) -> Tensor:
    """[B]: mean over the classes in either map of intersection over union."""
    a, b = (F.one_hot(labels.flatten(1), LABELS).bool() for labels in (found, wanted))
    both, either = (a & b).sum(1), (a | b).sum(1)
    return (both / either.clamp(min=1)).sum(1) / (either > 0).sum(1)


def train(args: argparse.Namespace) -> None:
    device, stopped = state.pick_device(), state.Stop()
    rows, held_out = scenes.load(args.scenes, "train"), scenes.load(args.scenes, "held_out")
    torch.manual_seed(0)
    net = SceneNet().to(device)
    ema, optimizers, step, spent = copy.deepcopy(net), make_optimizers(net), 0, 0.0
    if (saved := state.load(args.out / "state.pt")) is not None:
        net.load_state_dict(saved["net"])
        ema.load_state_dict(saved["ema"])
        optimizers.load_state_dict(saved["optimizers"])
        step, spent = saved["step"], saved["spent"]
        print(f"resumed at step {step}", flush=True)
    reported, total = spent, 60 * args.minutes
    while spent < total and not stopped:
        started = time.monotonic()
        generator = torch.Generator().manual_seed(step)
        places = torch.randint(len(rows), (args.batch,), generator=generator)
        wanted = scenes.vary(rows.at(places, device), generator)
        with torch.autocast(device.type, torch.bfloat16):
            found = net(wanted.pictures)
        loss = loss_of(found, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        warm = min(1, (step + 1) / 50)
        optimizers.step()
        optimizers.take(args.lr * warm * (LEAST_LR + (1 - LEAST_LR) * (1 + math.cos(math.pi * spent / total)) / 2))
        net.zero_grad()
        state.average(ema, net, step, decay=0.99)
        step += 1
        spent += time.monotonic() - started
        if spent - reported > args.report or spent >= total or stopped:
            reported = spent
            row = {"step": step, "minutes": round(spent / 60, 2), "loss": round(loss.item(), 4)}
            print(json.dumps({**row, **measure(ema, held_out, device)}), flush=True)
            save(args.out, net, ema, optimizers, step, spent)
    write(args.out / FILE, ema, about(rows, held_out, measure(ema, held_out, device), step, args))


def save(out: Path, net: SceneNet, ema: SceneNet, optimizers: state.Optimizers, step: int, spent: float) -> None:
    kept = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizers": optimizers.state_dict()}
    state.save(out / "state.pt", {**kept, "step": step, "spent": spent})


def about(
    rows: scenes.Rows, held_out: scenes.Rows, figures: dict[str, float], step: int, args: argparse.Namespace
) -> dict[str, str]:
    """What the file says of itself."""
    return {
        "what": "depth, normals and labels of simple scenes: one thing or two on a floor before a wall",
        "made_by": f"tools/estimator/train.py: {step} steps of {args.batch} pictures of 128 px",
        "data": f"{len(rows)} rendered scenes of CC0 models (tools/scenes); none shows the held-out objects",
        "held_out": json.dumps({"pictures": len(held_out), **figures}),
        "licence": "Apache-2.0",
    }


def write(path: Path, net: SceneNet, facts: dict[str, str]) -> None:
    weights = {name: weight.half().contiguous() for name, weight in net.cpu().state_dict().items()}
    atomic.write_with(path, lambda temporary: save_file(weights, temporary, facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, nargs="+", required=True, help="folders of rendered scenes")
    parser.add_argument("--out", type=Path, default=Path("work/estimator"))
    parser.add_argument("--minutes", type=float, default=12.0, help="of training, all starts together")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--report", type=float, default=60.0, help="seconds between two reports")
    train(parser.parse_args())
