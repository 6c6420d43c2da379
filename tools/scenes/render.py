"""Render scenes: one file each, finished ones are kept, so the same command goes on where it was stopped.

Out: `<number>.npz` (see `scene.py`). Everything follows from (seed, number): any scene can be rendered again alone.

    python tools/scenes/render.py --out work/scenes/cc0 --licence cc0 --first 0 --count 1500
"""

import argparse
import time
from pathlib import Path

import describe
import develop
import draws
import library
import llvm
import reject
import scene_file
import solids

ATTEMPTS = 20


def render(plan: draws.Plan, models: Path, size_px: int, samples: int) -> scene_file.Scene:
    """One scene of a plan. Raises: reject.RejectedError."""
    import stage  # loads Mitsuba, so only once its compiler is chosen

    parts = solids.place(plan, models)
    built = stage.build(plan, parts, size_px)
    maps = stage.look(built)
    reject.check_layout(plan, maps.labels)
    reject.check_paint(plan, maps)
    guides = stage.guides(built)
    light = stage.trace(built, samples, plan.number)
    reject.check_light(light)
    picture = develop.expose(develop.denoise(light, guides), guides)
    reject.check_picture(picture, maps.labels)
    said = describe.facts(plan, maps, models)
    return scene_file.Scene(
        picture=picture, depth=maps.depth, normals=maps.normals, labels=maps.labels,
        about=scene_file.about(plan, said, describe.caption(plan, said, maps)),
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    llvm.choose(args.scenes)
    models = library.load(args.scenes)
    numbers = [n for n in range(args.first, args.first + args.count) if not scene_file.path(args.out, n).exists()]
    print(f"{len(numbers)} of {args.count} scenes to render into {args.out}", flush=True)
    start_s = time.monotonic()
    for done, number in enumerate(numbers, 1):
        scene = first_good(models, number, args)
        if scene is not None:
            scene_file.save(scene_file.path(args.out, number), scene)
        if done % 20 == 0 or done == len(numbers):
            print(f"{done} of {len(numbers)}, {(time.monotonic() - start_s) / done:.2f} s a scene", flush=True)


def first_good(models: list[library.Model], number: int, args: argparse.Namespace) -> scene_file.Scene | None:
    """The first attempt at a scene that is not rejected, or None where all are."""
    for attempt in range(ATTEMPTS):
        plan = draws.draw_plan(models, args.licence, args.seed, number, attempt)
        try:
            return render(plan, args.scenes / "models", args.size, args.samples)
        except reject.RejectedError as reason:
            print(f"scene {number}, attempt {attempt}: {reason}", flush=True)
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("work/scenes"), help="where catalogue.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--licence", choices=("cc0", "all"), default="cc0")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--samples", type=int, default=96, help="light paths a pixel")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
