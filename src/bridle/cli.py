"""The command line. Each verb parses, calls one function, prints one result; heavy imports wait until it is called."""

import json
import logging
import os
import sys
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from bridle.collector import uncollected
from bridle.errors import BridleError

if TYPE_CHECKING:
    from bridle.run.settings import RunSettings

INTERRUPTED = 130  # as shells have it: 128 and the number of the signal


class Verbs(TyperGroup):
    """Says that Ctrl-C ended it, which typer would swallow."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("bridle: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="bridle",
    cls=Verbs,
    help="Teach a pretrained text-to-image model your own control: train, sample, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

data_app = typer.Typer(help="Data sets.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set train.lr=1e-4")
]
RecipeOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a part of the recipe: --set controls.0.end=0.8"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Your own folder: pictures with .txt captions beside them.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder: demo, or demo-FOLDER with --data.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train an edge control on the embedded base, measure it, and write a report: a few minutes on two cores.

    Example: `bridle demo`, or `bridle demo --data my_pictures`
    """
    with uncollected(lasting=True):
        from bridle.demo.demo import run_demo

    # A run of its own for each data set: the same command goes on with it, another one does not collide with it.
    result = run_demo(data, out or Path(f"demo-{data.resolve().name}" if data else "demo"))
    lines = [result.sentence, f"Report: {result.report}", f"Pictures: {result.sheet}"]
    if result.colours:
        lines.append(f"One hint, four prompts: {result.colours}")
    say(result.summary, as_json, lines=lines)


@app.command()
def train(
    settings: Annotated[Path | None, typer.Argument(help="A TOML file; see docs/settings.md.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data set's folder; the same as --set data.folder=...")] = None,
    out: Annotated[Path, typer.Option(help="The run's folder. The same command goes on with a stopped run.")] = Path(
        "run"
    ),
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option(help="Find the fastest way to train that fits, such as 8GB; see `bridle plan`.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Go on though settings or data changed; begin anew where checkpoints are gone."),
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine; one per GPU, or a few on a CPU.")] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help='Train on a Ray cluster, with --nproc processes: "auto".')
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a control on a folder of pictures. Ctrl-C stops it; the same command goes on.

    Example: `bridle train --data my_pictures --out runs/edges --set train.regime=auto --set train.steps=2000`
    """
    with uncollected(lasting=True):
        from bridle.run.start import start

    given = read_settings(settings, data, overrides)
    result = start(given, out, memory=memory, force=force, nproc=nproc, ray=ray, as_json=as_json)
    if result is None:  # it is one of several processes, and not the one that speaks
        return
    control = str(out / "control")
    lines = [
        f"Training {'finished' if result.finished else 'stopped'} at step {result.step}: {result.reason}.",
        result.verdict,
        f"Control: {'' if result.control else 'no longer in '}{control}"
        + (f", the best: {out / 'best'}" if result.best else ""),
    ]
    if not result.finished:
        lines.append("The same command goes on.")
    say({**asdict(result), "control": control if result.control else None}, as_json, lines=lines)


@app.command()
def plan(
    settings: Annotated[Path | None, typer.Argument(help="A TOML file, as for `bridle train`.")] = None,
    base: Annotated[str | None, typer.Option(help="The base; the same as --set base=...")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What may be taken, such as 8GB; what is free where not given.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure what training takes, in memory and time, in several ways, and name the fastest that fits.

    Example: `bridle plan --base embedded --memory 2GB`
    """
    with uncollected(lasting=True):
        from bridle.config import literal
        from bridle.run.plan import plan_run

    named = [*([f"base={literal(base, '--base')}"] if base else []), *(overrides or [])]
    found = plan_run(read_settings(settings, Path(), named), memory)
    say(found.summary, as_json, lines=found.lines)
    if found.chosen is None:
        raise typer.Exit(2)  # as `bridle train --memory` does


@app.command()
def sample(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, TOML or JSON; see docs/sampling.md.")] = None,
    picture: Annotated[Path | None, typer.Option("--from", help="A PNG drawn before: draw it again.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw.")] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    control: Annotated[Path | None, typer.Option(help="A control's folder or file, such as run/control.")] = None,
    hint: Annotated[Path | None, typer.Option(help="The hint as a picture.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to make the hint of, with --annotator.")] = None,
    annotator: Annotated[
        str | None, typer.Option(help="As in training where not given; `bridle annotate --help` lists them.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="How strongly the control pulls: 1 where not given.")] = None,
    half: Annotated[
        str | None,
        typer.Option(help="both, or conditional: guidance amplifies the hint too. The control's own where not given."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="As for training: embedded where not given.")] = None,
    init: Annotated[Path | None, typer.Option(help="A picture to begin from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far to go from it: 0.75 where not given.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where it is drawn anew: white. Elsewhere it is kept.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps: 20 where not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance: 4 where not given.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Such as ddim or dpm++; the base's where not given.")] = None,
    speed: Annotated[str | None, typer.Option(help="exact, fast or draft: exact where not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise, 0 where not given; the first with --count.")] = None,
    overrides: RecipeOverrides = None,
    count: Annotated[int, typer.Option(min=1, help="How many pictures, with seeds one after another.")] = 1,
    out: Annotated[Path, typer.Option(help="The PNG to write; numbered with --count.")] = Path("sample.png"),
    as_json: AsJson = False,
) -> None:
    """Draw a picture, steered by hints. The PNG carries its recipe; `--from` draws it again, with what else is given.

    Example: `bridle sample --control run/control --hint edges.png --prompt "a red apple" --out apple.png`
    """
    with uncollected(lasting=True):
        from bridle.run.recipes import read_recipe, warn_of_annotators, warn_of_changes
        from bridle.run.sampling import sample_to_files

    flags = {
        "prompt": prompt,
        "negative_prompt": negative,
        "base": base,
        "seed": seed,
        "control": control,
        "hint": hint,
        "image": image,
        "annotator": annotator,
        "scale": scale,
        "half": half,
        "init": init,
        "strength": strength,
        "mask": mask,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "speed": speed,
    }
    asked = read_recipe(recipe, picture, flags, overrides or [])
    for line in [*warn_of_changes(picture, asked), *warn_of_annotators(asked)]:
        print(f"bridle: {line}", file=sys.stderr)
    paths = sample_to_files(asked, out, count)
    say({"pictures": [str(path) for path in paths]}, as_json, lines=[str(path) for path in paths])


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The run's folder.")] = Path("run"),
    pairs: Annotated[int | None, typer.Option(min=1, help="How many held-out pairs; all where not given.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per pair.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda; as the run was trained where not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure on held-out pairs whether the pictures obey the hints; writes figures, a report and a picture sheet.

    Example: `bridle evaluate runs/edges --pairs 16`
    """
    with uncollected(lasting=True):
        from bridle.evaluate import sentence
        from bridle.run import evaluate_run

    measured = evaluate_run(run, pairs=pairs, seeds=seeds, device=device)
    said = sentence(measured.evaluation)
    summary = {"sentence": said, "report": str(measured.report), "figures": str(measured.evaluation.folder)}
    say(summary, as_json, lines=[said, f"Report: {measured.report}"])


@app.command()
def annotate(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    out: Annotated[Path, typer.Argument(help="The hint to write, as PNG.")],
    annotator: Annotated[
        str, typer.Option(help="canny, depth, normals, scribble, segmentation or soft_edge.")
    ] = "canny",
    as_json: AsJson = False,
) -> None:
    """Make a hint of a picture.

    Example: `bridle annotate photo.jpg edges.png --annotator canny`
    """
    from bridle.run.sampling import annotate_file

    annotate_file(image, out, annotator)
    say({"hint": str(out)}, as_json, lines=[str(out)])


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A weight file, or a diffusers folder.")],
    as_json: AsJson = False,
) -> None:
    """Say what a file is: kind, family, links, hint channels, parameters, precision, metadata, sha256.

    Example: `bridle info control_v11p_sd15_canny.pth`
    """
    from bridle.files.info import describe, lines_of

    about = describe(path)
    say(about, as_json, lines=lines_of(about))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A control: any file or folder that `bridle info` calls usable.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; for diffusers the folder.")],
    to: Annotated[str, typer.Option(help="official, diffusers, comfyui or difference.")],
    base: Annotated[
        str | None,
        typer.Option(help="For a difference: embedded, a folder or a checkpoint; for official: a checkpoint."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; unchanged where not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a control in the format of another tool; its metadata goes along.

    Example: `bridle convert run/control edges.safetensors --to comfyui --dtype float16`
    """
    from bridle.files.convert import convert as convert_file
    from bridle.files.show import byte_bar

    with byte_bar("converting") as progress:
        done = convert_file(source, out, to, base=base, dtype=dtype, progress=progress)
    written = f"{done.path}: {done.parameters:,} parameters, {done.size_bytes / 1e6:,.1f} MB"
    say(asdict(done), as_json, lines=[written, *done.notes])


@app.command()
def transfer(
    control: Annotated[Path, typer.Argument(help="A control: any file or folder that `bridle info` calls usable.")],
    out: Annotated[Path, typer.Argument(help="The control folder to write.")],
    source: Annotated[
        str, typer.Option(help="The base it was trained on: embedded, a folder, a checkpoint or a hub id.")
    ],
    target: Annotated[str, typer.Option(help="The fine-tuned variant of that base, likewise.")],
    as_json: AsJson = False,
) -> None:
    """Move a control to a fine-tuned variant of its base: control + target - source.

    Example: `bridle transfer run/control moved --source sd15.safetensors --target anime.safetensors`
    """
    from bridle.run.transferring import transfer_file

    moved = transfer_file(control, source, target, out)
    say({"control": str(out), "weights_moved": moved}, as_json, lines=[f"{out}: {moved:,} weights moved"])


@data_app.command()
def embedded(
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist, or be empty.")] = Path("scenes"),
    as_json: AsJson = False,
) -> None:
    """Write the rendered scenes that come with Bridle as a data set: pictures, captions, depth, normals, segmentation.

    Example: `bridle data embedded scenes`, then `bridle train --data scenes --set data.annotator=depth`
    """
    from bridle.data.scenes import write_scenes

    written = write_scenes(out)
    counted = f"{written.train} to train on, {written.held_out} of objects that these never show"
    result = {"folder": str(out), "train": written.train, "held_out": written.held_out}
    say(result, as_json, lines=[f"{out}: {written.train + written.held_out} scenes, {counted}"])


def read_settings(path: Path | None, data: Path | None, overrides: list[str] | None) -> "RunSettings":
    """The run's settings from a file, `--data` and `--set`."""
    from bridle import config
    from bridle.run.settings import RunSettings

    named = [f"data.folder={config.literal(data, '--data')}"] if data else []
    return config.read(RunSettings, path, [*named, *(overrides or [])])


def say(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """One result on stdout: lines for people, JSON for machines."""
    print(json.dumps(result) if as_json else "\n".join(lines))


def version(asked: bool) -> None:
    if asked:
        from bridle import __version__

        print(f"bridle {__version__}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def explain(error: BridleError | OSError) -> str:
    """What went wrong, in words."""
    if isinstance(error, BridleError) or not error.filename:
        return str(error)
    return f"{error.filename} cannot be read or written: {error.strerror}; give another path, or put that right"


def main() -> None:
    """Entry point: what the user can put right is one line and exit status 2, without a traceback."""
    # On import transformers asks for torchvision, which is left out on purpose; read once, so it is set before.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells of optional kernels that Bridle does not use
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a console may know fewer letters than a table has
            stream.reconfigure(errors="replace")
    try:
        app()
    except BrokenPipeError:  # nobody reads any more, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (BridleError, OSError) as error:
        print(f"bridle: {' '.join(explain(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
