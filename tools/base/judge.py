"""What a picture of a scene shows, read off the picture: the thing's name, its colour, and the floor's.

Trained on the renders, whose facts are exact; for scoring samples, and not shipped. Two small parts: a linear
classifier of names on Inception's features, and a network that finds thing and floor and names the colour of each.
`scores` in the file are its own accuracies on renders that it has not seen: the ceiling for a base's samples.

    python tools/base/judge.py --scenes work/scenes/cc0 --out work/proof
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import proof
import real
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bridle import atomic
from bridle.errors import BridleError, DataError, FileError

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "beige", "white", "grey", "black",
    "turquoise",
)  # fmt: skip
NONE = -1  # no word for it
THING, FLOOR = 2, 1
SIDE_PX, GRID, BATCH = 64, 32, 32
FILE = "judge.safetensors"
KNOWN = 10  # every tenth training scene is kept from the judge


class Judge(nn.Module):
    """Pictures to segments (wall, floor, thing), and the colours of thing and floor."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(4, o), nn.SiLU())
            for i, o in ((3, 24), (24, 48), (48, 64), (64, 64))
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, side, 1, side // 2), nn.GroupNorm(4, o), nn.SiLU())
            for i, o, side in ((64 + 64, 48, 3), (48 + 48, 32, 3), (32 + 24, 32, 1))
        )
        self.segments = nn.Conv2d(32, 3, 1)
        self.shade = nn.Sequential(nn.Conv2d(3, 48, 1), nn.SiLU(), nn.Conv2d(48, 48, 1), nn.SiLU())
        self.words = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * 48, 64), nn.SiLU(), nn.Linear(64, len(COLOURS))) for _ in (FLOOR, THING)
        )

    def forward(self, pixels: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """pixels: [B, 3, 64, 64] in [0, 1]. masks: [B, 2, 32, 32], floor and thing; None: those found.

        Returns: segments [B, 3, 32, 32], and the colours of thing and floor [B, 13], all logits.
        """
        levels = [pixels * 2 - 1]
        for block in self.down:
            levels.append(block(levels[-1]))
        found = levels[-1]
        for block, skip in zip(self.up, (levels[3], levels[2], levels[1]), strict=True):
            found = block(torch.cat([F.interpolate(found, scale_factor=2), skip], 1))
        segments = self.segments(found)
        if masks is None:
            masks = F.one_hot(segments.argmax(1), 3).permute(0, 3, 1, 2)[:, (FLOOR, THING)].float()
        shade = self.shade(F.avg_pool2d(pixels, SIDE_PX // GRID) * 2 - 1)
        light = shade.mean((2, 3))
        colours = []
        for index, words in enumerate(self.words):
            mask = masks[:, index : index + 1]
            mean = (shade * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)
            colours.append(words(torch.cat([mean, light], 1)))
        return segments, colours[1], colours[0]


def to_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """[H, W, 3] uint8 each, to [N, 3, 64, 64] in [0, 1]."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(pixels, (SIDE_PX, SIDE_PX), mode="area")


def colour_index(word: str) -> int:
    """Of a colour's family: "dark blue" is blue. Metals, and what has no word, are `NONE`."""
    family = word.split()[-1] if word else ""
    return COLOURS.index(family) if family in COLOURS else NONE


def facts(scene: real.Real) -> tuple[int, int]:
    """The colours of thing and floor. A floor of two colours has no one word."""
    floor = scene.about["floor"]
    thing = colour_index(scene.about["things"][0]["colour"])
    return thing, NONE if floor["second"] else colour_index(floor["colour"])


def read_labels(folders: Sequence[Path], wanted: set[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
    """Label maps by (seed, number), reduced to 64 px. Packed scenes have them in `labels.zip`; without, they are not
    used for finding thing and floor."""
    found = {}
    for folder in folders:
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as arrays:
                about = json.loads(str(arrays["about"]))
                key = about["seed"], about["number"]
                if key in wanted:
                    found[key] = np.minimum(arrays["labels"][1::2, 1::2], THING)
    return found


def train_colours(scenes: list[real.Real], labels: list[np.ndarray], steps: int) -> Judge:
    """AdamW on random batches, every other one mirrored, for segments and colours together."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    judge = Judge()
    pixels = to_pixels([scene.picture for scene in scenes])
    maps = torch.from_numpy(np.stack(labels)).long()
    thing, floor = (torch.tensor(side) for side in zip(*map(facts, scenes), strict=True))
    optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for step in range(steps):
        rows = torch.randint(len(scenes), (BATCH,), generator=generator)
        x, y = pixels[rows], maps[rows]
        if step % 2:
            x, y = x.flip(-1), y.flip(-1)
        y = y[:, ::2, ::2]
        masks = torch.stack([y == FLOOR, y == THING], 1).float()
        segments, of_thing, of_floor = judge(x, masks)
        loss = F.cross_entropy(segments, y)
        loss = loss + F.cross_entropy(of_thing, thing[rows], ignore_index=NONE)
        loss = loss + F.cross_entropy(of_floor, floor[rows], ignore_index=NONE)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return judge.eval()


def train_names(features: np.ndarray, names: Sequence[int], classes: int) -> dict[str, Tensor]:
    """Softmax regression on Inception's features, each row of length 1 and centred; each name weighs alike."""
    x, y = torch.from_numpy(features), torch.tensor(names)
    x = F.normalize(x)
    mean = x.mean(0)
    x = (x - mean) * 30
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    shares = 1 / torch.bincount(y, minlength=classes).clamp(min=1).float().sqrt()
    solver = torch.optim.LBFGS([weight, bias], max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y, shares) + 3e-3 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return {"mean": mean, "weight": weight.detach(), "bias": bias.detach()}


def save(path: Path, judge: Judge, probe: dict[str, Tensor], names: list[str], scores: dict[str, object]) -> None:
    tensors = {f"colours.{key}": value for key, value in judge.state_dict().items()}
    tensors |= {f"names.{key}": value.contiguous() for key, value in probe.items()}
    words = {"names": json.dumps(names), "scores": json.dumps(scores)}
    atomic.write_with(path, lambda temporary: save_file(tensors, temporary, words))


class Verdicts:
    """A trained judge. names: those it tells apart. scores: its accuracies on renders it has not seen."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileError(f"judge {path} does not exist; train it with tools/base/judge.py")
        with safe_open(path, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - no mapping
            words = stored.metadata()
        self.names: list[str] = json.loads(words["names"])
        self.scores = json.loads(words["scores"])
        self.probe = {key: tensors[f"names.{key}"] for key in ("mean", "weight", "bias")}
        self.judge = Judge()
        self.judge.load_state_dict({k.removeprefix("colours."): v for k, v in tensors.items() if k[:7] == "colours"})
        self.judge.eval()

    def name(self, features: np.ndarray) -> list[str]:
        x = (F.normalize(torch.from_numpy(features)) - self.probe["mean"]) * 30
        return [self.names[i] for i in (x @ self.probe["weight"].T + self.probe["bias"]).argmax(1)]

    @torch.no_grad()
    def colours(self, pictures: Sequence[np.ndarray]) -> tuple[list[str], list[str]]:
        """The words for thing and floor."""
        _, thing, floor = self.judge(to_pixels(pictures))
        return [COLOURS[i] for i in thing.argmax(1)], [COLOURS[i] for i in floor.argmax(1)]


def accuracy(verdicts: Verdicts, scenes: list[real.Real], features: np.ndarray) -> dict[str, dict[str, float]]:
    """Share that is right, and of how many, among pictures that have a word and a name that the judge knows. Own looks
    are hard to name in one word, so painted things, which prompts ask for, are counted apart as well."""
    names = verdicts.name(features)
    things, floors = verdicts.colours([scene.picture for scene in scenes])
    right: dict[str, list[bool]] = {"name": [], "thing colour": [], "painted thing colour": [], "floor colour": []}
    for scene, name, thing, floor in zip(scenes, names, things, floors, strict=True):
        of_thing, of_floor = facts(scene)
        if scene.name in verdicts.names:
            right["name"].append(scene.name == name)
        if of_thing != NONE:
            right["thing colour"].append(COLOURS[of_thing] == thing)
        if of_thing != NONE and not scene.about["things"][0]["own_looks"]:
            right["painted thing colour"].append(COLOURS[of_thing] == thing)
        if of_floor != NONE:
            right["floor colour"].append(COLOURS[of_floor] == floor)
    return {what: {"share": round(float(np.mean(found or [0])), 3), "of": len(found)} for what, found in right.items()}


def split(scenes: list[real.Real]) -> dict[str, list[int]]:
    """Places of the scenes of one thing: to train on, and two sets to score on."""
    parts: dict[str, list[int]] = {"train": [], "known objects": [], "held-out objects": []}
    for place, scene in enumerate(scenes):
        if len(scene.about["things"]) == 1:
            kept_back = scene.about["number"] % KNOWN == KNOWN - 1
            parts["held-out objects" if scene.held_out else "known objects" if kept_back else "train"].append(place)
    return parts


def train(args: argparse.Namespace, scenes: list[real.Real], features: np.ndarray) -> None:
    """Both parts, from these scenes alone; writes the judge, not yet scored. Raises: DataError: too few scenes."""
    counted = Counter(scene.name for scene in scenes)
    names = [name for name, count in counted.most_common(args.names) if count >= args.least]
    if len(names) < 2:
        raise DataError(f"{len(scenes)} scenes show {len(names)} names {args.least} times; expected 2; render more")
    named = [place for place, scene in enumerate(scenes) if scene.name in names]
    probe = train_names(features[named], [names.index(scenes[place].name) for place in named], len(names))
    labels = read_labels(args.scenes, {key(scene) for scene in scenes})
    shown = [scene for scene in scenes if key(scene) in labels]
    network = train_colours(shown, [labels[key(scene)] for scene in shown], args.train_steps)
    save(args.out / FILE, network, probe, names, {})


def key(scene: real.Real) -> tuple[int, int]:
    return scene.about["seed"], scene.about["number"]


def main(args: argparse.Namespace) -> None:
    began, keep = time.monotonic(), proof.keep_of(args)
    everything = real.load_scenes(args.scenes)
    features = keep.features([scene.picture for scene in everything])
    parts = split(everything)
    if not args.score:
        train(args, [everything[place] for place in parts["train"]], features[parts["train"]])
    verdicts = Verdicts(args.out / FILE)
    scores: dict[str, object] = {}
    for part in ("known objects", "held-out objects"):
        scenes = [everything[place] for place in parts[part]]
        scores[part] = accuracy(verdicts, scenes, features[parts[part]])
        if args.decoded:
            pictures = keep.reconstructed(args.base, [scene.picture for scene in scenes])
            decoded = [replace(scene, picture=picture) for scene, picture in zip(scenes, pictures, strict=True)]
            scores[f"{part}, decoded by {args.base}"] = accuracy(verdicts, decoded, keep.features(pictures))
    save(args.out / FILE, verdicts.judge, verdicts.probe, verdicts.names, scores)
    print(json.dumps({"names": verdicts.names, "scores": scores, "seconds": round(time.monotonic() - began)}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    proof.add_shared(parser)
    parser.add_argument("--names", type=int, default=40, help="how many of the most frequent names to tell apart")
    parser.add_argument("--least", type=int, default=8, help="training renders that a name needs")
    parser.add_argument("--train-steps", type=int, default=700)
    parser.add_argument("--score", action="store_true", help="score the judge that is there, without training")
    parser.add_argument("--decoded", action="store_true", help="also score renders through the base's autoencoder")
    try:
        main(parser.parse_args())
    except BridleError as error:
        raise SystemExit(f"{error}") from None
