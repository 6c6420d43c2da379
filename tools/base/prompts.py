"""Does a base draw what it is asked for? Forty prompts (prompts.toml), some of them pairs of thing and colour that no
training picture shows, drawn with several seeds and judged by machine. Each share stands beside its ceiling, which is
what the same judge says of real pictures.

Scenes are judged by tools/base/judge.py, which has to be trained first. Emoji: the concept whose picture is nearest by
Inception's features counts as what is shown, and the colour is named from the pixels that differ from the ground, as
captions are (`captions.name_colour`).

    python tools/base/prompts.py --base work/base/model --anchor work/base/v0 --out work/proof
"""

import argparse
import json
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captions
import judge
import kept
import latents
import numpy as np
import pictures
import proof
import real
from PIL import Image

from bridle import atomic
from bridle.errors import BridleError
from bridle.sample.picture import grid
from bridle.sample.settings import SampleSettings

LIST = Path(__file__).with_name("prompts.toml")
VIEWS = {style: latents.VIEWS[style] for style in (pictures.FLUENT, pictures.NOTO)}
DIFFERENT = 0.08  # from the ground, as a share of the range: what counts as the thing


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, and what is looked for. names: any of them is right. unseen: no training picture shows the pair."""

    text: str
    kind: str
    names: tuple[str, ...]
    colour: str
    floor: str
    unseen: bool


def scene_pairs(scenes: Sequence[real.Real]) -> set[tuple[str, str]]:
    """Each name with each colour, shades by their family, that a training scene shows."""
    things = [thing for scene in scenes if not scene.held_out for thing in scene.about["things"]]
    return {(thing["name"], thing["colour"].split()[-1]) for thing in things if thing["colour"]}


def emoji_pairs(pack: real.Pack, names: Collection[str]) -> set[tuple[str, str]]:
    """The same for emoji of these names, in every style and view that is trained on."""
    shown = [one for style, views in VIEWS.items() for one in pack.load(style, range(views), names)]
    return {(one.name, one.colour) for one in shown if one.colour and not one.held_out}


def read_prompts(path: Path, shown: Callable[[Collection[str]], set[tuple[str, str]]]) -> list[Prompt]:
    """The list. shown: of these names, the pairs of name and colour that training pictures show."""
    listed = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = [(kind, row, tuple(row.get("names", [row.get("name")]))) for kind in listed for row in listed[kind]]
    pairs = shown({name for _, _, names in rows for name in names})
    return [
        Prompt(
            text=row["prompt"], kind=kind, names=names, colour=row["colour"], floor=row.get("floor", ""),
            unseen=not any((name, row["colour"]) in pairs for name in names),
        )
        for kind, row, names in rows
    ]  # fmt: skip


def cut_out(picture: np.ndarray) -> np.ndarray:
    """What differs from the ground, which is the median of the outermost pixels, as opaque. [H, W, 4] uint8."""
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    away = np.abs(picture.astype(int) - np.median(edge, 0)).max(-1) > 255 * DIFFERENT
    return np.concatenate([picture, (255 * away[..., None]).astype(np.uint8)], -1)


class Gallery:
    """Every concept as it is, to find the nearest one to a picture."""

    def __init__(self, concepts: list[real.Real], keep: kept.Kept) -> None:
        self.names = np.array([one.name for one in concepts])
        self.rows = unit(keep.features([one.picture for one in concepts]))

    def nearest(self, features: np.ndarray, count: int) -> list[list[str]]:
        """The names of the nearest concepts to each picture, nearest first."""
        order = np.argsort(-(unit(features) @ self.rows.T), axis=1)[:, :count]
        return [[str(name) for name in self.names[row]] for row in order]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)


def judge_scenes(
    asked: list[Prompt], drawn: list[np.ndarray], seen: np.ndarray, verdicts: judge.Verdicts
) -> list[dict[str, bool]]:
    names = verdicts.name(seen)
    things, floors = verdicts.colours(drawn)
    return [
        {"name": name in prompt.names, "colour": thing == prompt.colour, "floor": floor == prompt.floor}
        for prompt, name, thing, floor in zip(asked, names, things, floors, strict=True)
    ]


def judge_emoji(
    asked: list[Prompt], drawn: list[np.ndarray], seen: np.ndarray, gallery: Gallery
) -> list[dict[str, bool]]:
    return [
        {
            "name": near[0] in prompt.names,
            "name in first five": any(name in prompt.names for name in near),
            "colour": captions.name_colour(cut_out(picture)) == prompt.colour,
        }
        for prompt, picture, near in zip(asked, drawn, gallery.nearest(seen, 5), strict=True)
    ]


def emoji_ceiling(gallery: Gallery, moved: list[real.Real], keep: kept.Kept) -> dict[str, float]:
    """The same judgement of real pictures: moved, recoloured views, looked for among the unmoved ones."""
    near = gallery.nearest(keep.features([one.picture for one in moved]), 5)
    coloured = [captions.name_colour(cut_out(one.picture)) == one.colour for one in moved if one.colour]
    return {
        "name": float(np.mean([names[0] == one.name for names, one in zip(near, moved, strict=True)])),
        "name in first five": float(np.mean([one.name in names for names, one in zip(near, moved, strict=True)])),
        "colour": float(np.mean(coloured)),
    }


def shares(found: list[dict[str, bool]]) -> dict[str, float]:
    """The share of each question that is right, and of pictures where all are."""
    if not found:
        return {}
    each = {what: float(np.mean([one[what] for one in found])) for what in found[0]}
    needed = [what for what in found[0] if what != "name in first five"]
    return each | {"all of it": float(np.mean([all(one[what] for what in needed) for one in found]))}


def test(args: argparse.Namespace, keep: kept.Kept) -> tuple[dict[str, Any], np.ndarray]:
    """Returns: what was found as JSON values, and a sheet of the first base's pictures."""
    scenes = real.load_scenes(args.scenes)
    pack = real.Pack(args.pictures)
    concepts, moved = pack.load(pictures.FLUENT, [0]), pack.load(pictures.FLUENT, [1])
    listed = read_prompts(args.prompts, lambda names: scene_pairs(scenes) | emoji_pairs(pack, names))
    verdicts, gallery = judge.Verdicts(args.out / judge.FILE), Gallery(concepts, keep)
    unknown = sorted({name for one in listed if one.kind == "scene" for name in one.names} - set(verdicts.names))
    if unknown:
        print(f"not among the names that the judge knows, so always wrong: {', '.join(unknown)}")
    asked = [one for one in listed for _ in range(args.seeds)]
    how = SampleSettings(steps=args.steps, guidance=args.guidance, batch=kept.CHUNK, precision=args.precision)
    results, sheet = {}, None
    for where in (args.base, *args.anchor):
        drawn = keep.samples(where, [one.text for one in asked], list(range(args.seeds)) * len(listed), how)
        seen = keep.features(drawn)
        results[where] = judge_all(asked, drawn, seen, verdicts, gallery)
        sheet = lay_out(listed, drawn, args.seeds) if sheet is None else sheet
    ceiling = {"scene": verdicts.scores, "emoji": emoji_ceiling(gallery, moved[:: args.ceiling_step], keep)}
    unseen = [one.text for one in listed if one.unseen]
    assert sheet is not None
    return {"unseen": unseen, "seeds": args.seeds, "ceiling": ceiling, "bases": results}, sheet


def judge_all(
    asked: list[Prompt], drawn: list[np.ndarray], seen: np.ndarray, verdicts: judge.Verdicts, gallery: Gallery
) -> dict[str, Any]:
    """Shares by kind, of all prompts, of seen and of unseen pairs; and how often each prompt came out right."""
    found: dict[str, Any] = {"each": {}}
    for kind in ("scene", "emoji"):
        rows = [i for i, one in enumerate(asked) if one.kind == kind]
        parts = [asked[i] for i in rows], [drawn[i] for i in rows], seen[rows]
        verdict = judge_scenes(*parts, verdicts) if kind == "scene" else judge_emoji(*parts, gallery)
        split = {
            "all": verdict,
            "seen pairs": [v for v, one in zip(verdict, parts[0], strict=True) if not one.unseen],
            "unseen pairs": [v for v, one in zip(verdict, parts[0], strict=True) if one.unseen],
        }
        found[kind] = {part: {"pictures": len(rows), **shares(rows)} for part, rows in split.items()}
        for text in dict.fromkeys(one.text for one in parts[0]):
            found["each"][text] = shares([v for v, one in zip(verdict, parts[0], strict=True) if one.text == text])
    return found


def lay_out(listed: list[Prompt], drawn: list[np.ndarray], seeds: int, across: int = 4) -> np.ndarray:
    """The first two seeds of every prompt; unseen pairs are marked with a star."""
    places = range(0, len(listed) - len(listed) % across, across)
    second = min(1, seeds - 1)
    rows = [[drawn[i * seeds + k] for i in range(start, start + across) for k in (0, second)] for start in places]
    said = [f"{one.text}{' *' if one.unseen else ''}" for one in listed]
    lines = [" | ".join(said[i : i + across]) for i in places]
    return grid(rows, ["seed 0", f"seed {second}"] * across, lines)


def table(found: dict[str, Any]) -> str:
    """The shares in per cent, as Markdown."""
    lines = [f"{len(found['unseen'])} of the prompts are pairs that no training picture shows.", ""]
    for kind in ("scene", "emoji"):
        columns = list(next(iter(found["bases"].values()))[kind]["all"])[1:]
        lines += [f"| {kind} prompts | pictures | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
        for where, result in found["bases"].items():
            for part, row in result[kind].items():
                if row["pictures"]:
                    cells = " | ".join(f"{100 * row[column]:.0f}%" for column in columns)
                    lines.append(f"| {where}, {part} | {row['pictures']} | {cells} |")
        lines.append("")
    return "\n".join([*lines, "Ceilings: the judges on real pictures:", "", f"    {json.dumps(found['ceiling'])}", ""])


def main(args: argparse.Namespace) -> None:
    found, sheet = test(args, proof.keep_of(args))
    atomic.write_text(args.out / "prompts.json", json.dumps(found, indent=1))
    atomic.write_text(args.out / "prompts.md", table(found))
    atomic.write_with(args.out / "prompts.png", Image.fromarray(sheet).save)
    print(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    proof.add_shared(parser)
    parser.add_argument("--anchor", nargs="*", default=[], help="other bases, such as the first one")
    parser.add_argument("--prompts", type=Path, default=LIST)
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument(
        "--ceiling-step", type=int, default=4, help="every so many concepts, one goes into the ceiling of emoji"
    )
    try:
        main(parser.parse_args())
    except BridleError as error:
        raise SystemExit(f"{error}") from None
