"""A probe measures what it says, moves nothing, can be ended at once, and its rules speak up when pictures obey."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from bridle.base.base import Base
from bridle.cache.build import build_cache
from bridle.cache.store import Cache
from bridle.control.control import Control
from bridle.data.annotate.canny import Canny
from bridle.data.settings import DataSettings
from bridle.data.sources import open_source
from bridle.errors import TrainError
from bridle.train import convergence
from bridle.train.convergence import learned, settled
from bridle.train.probe import (
    ARMS,
    BANDS,
    Estimate,
    Obedience,
    Probe,
    derange,
    draw_rows,
    interval,
    jackknife,
    mean_of,
    zero_conv_norms,
)
from bridle.train.settings import ProbeSettings, TrainSettings

# Step, advantage with its error, gain of six pictures with its error: as measured on the embedded base with the demo's
# pairs, 600 steps of 24; once as they are, once with the hints shuffled among the training pairs (its largest figures).
OBEYING = [
    (0, 0.0000, 0.0000, 0.000, 0.001),
    (60, -0.0002, 0.0002, 0.034, 0.015),
    (100, -0.0002, 0.0004, 0.041, 0.022),
    (120, 0.0011, 0.0004, 0.035, 0.021),
    (140, 0.0048, 0.0013, 0.019, 0.023),
    (160, 0.0437, 0.0095, 0.038, 0.017),
    (180, 0.1259, 0.0189, 0.099, 0.023),  # here pictures begin to obey
    (200, 0.2186, 0.0283, 0.143, 0.035),
    (600, 0.5582, 0.0272, 0.318, 0.073),
]
SHUFFLED = [
    (0, 0.0000, 0.0000, 0.000, 0.001),
    (60, -0.0003, 0.0003, 0.032, 0.016),
    (80, 0.0002, 0.0002, 0.017, 0.007),
    (200, 0.0002, 0.0003, 0.050, 0.031),
    (240, 0.0007, 0.0002, 0.043, 0.023),
    (500, 0.0004, 0.0003, 0.034, 0.019),
    (600, -0.0002, 0.0003, 0.024, 0.027),
]
PAIRS = 3
TRAIN = TrainSettings(batch=5, precision="fp32")


@pytest.fixture(scope="module")
def held_out(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Bars at different heights, all but one kept out of training."""
    folder = Path(tmp_path_factory.mktemp("held_out"))
    for number in range(PAIRS + 1):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[4 * number + 2 : 4 * number + 10, 8:24] = 40 * number
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"bar {number}")
    return encode(base, folder, PAIRS)


def encode(base: Base, folder: Path, count: int) -> Cache:
    settings = DataSettings(folder=folder, size_px=32, held_out=count)
    return build_cache(open_source(folder), settings, Canny(), base, folder / f"cache-{count}")


@pytest.fixture
def control(base: Base) -> Control:
    return tiny.wake(Control.from_base(base.pipeline)).eval()


def make_probe(base: Base, cache: Cache, train: TrainSettings = TRAIN, pairs: int = 16) -> Probe:
    return Probe(cache, base.schedule, ProbeSettings(pairs=pairs), train)


@torch.no_grad()
def errors_one_by_one(base: Base, cache: Cache, control: Control) -> dict[str, torch.Tensor]:
    """What a probe measures, told plainly: every row alone, hints encoded anew, noise added by diffusers."""
    ids = cache.held_out_ids
    shape = cache.batch(ids[:1]).mean.shape[1:]
    posterior, noise, timesteps = draw_rows(ids, TRAIN.seed, shape, len(base.schedule))
    other = derange(len(ids), TRAIN.seed).tolist()
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for row in range(BANDS * len(ids)):
        one = slice(row, row + 1)
        pair = cache.batch([ids[row % len(ids)]])
        hints = {"true": pair.hint, "shuffled": cache.batch([ids[other[row % len(ids)]]]).hint}
        noisy = base.pipeline.scheduler.add_noise(pair.mean + pair.std * posterior[one], noise[one], timesteps[one])
        for arm in ARMS:
            residuals = control(noisy, timesteps[one], pair.text, hints.get(arm, torch.zeros_like(pair.hint)))
            steered = {
                "down_block_additional_residuals": residuals.down,
                "mid_block_additional_residual": residuals.mid,
            }
            output = base.denoiser(noisy, timesteps[one], pair.text.states, **steered).sample
            found[arm].append(torch.nn.functional.mse_loss(output, noise[one]).item())
    return {arm: torch.tensor(errors).view(BANDS, len(ids)).double() for arm, errors in found.items()}


def test_a_reading_is_what_going_through_every_row_alone_gives(base: Base, held_out: Cache, control: Control) -> None:
    reading, errors = (
        make_probe(base, held_out).read(control, base.denoiser),
        errors_one_by_one(base, held_out, control),
    )
    assert reading.losses == pytest.approx({arm: error.mean().item() for arm, error in errors.items()}, rel=1e-5)
    expected = 1 - errors["true"].sum(1) / errors["shuffled"].sum(1)
    assert [band.advantage.mean for band in reading.bands] == pytest.approx(expected.tolist(), abs=1e-5)
    assert reading.advantage.mean == pytest.approx(expected.mean().item(), abs=1e-5)
    assert [(band.start, band.end) for band in reading.bands] == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    losses = list(reading.losses.values())
    assert (
        min(abs(a - b) for a, b in zip(losses, losses[1:] + losses[:1], strict=True)) > 1e-4
    )  # else arms are mixed up


def test_before_the_first_step_hints_make_no_difference_at_all(base: Base, held_out: Cache) -> None:
    reading = make_probe(base, held_out).read(Control.from_base(base.pipeline), base.denoiser)
    assert reading.advantage == Estimate(0.0, 0.0)
    assert all(band.advantage == Estimate(0.0, 0.0) for band in reading.bands)
    assert len(set(reading.losses.values())) == 1
    assert reading.norms == (0.0,) * 13


def test_a_probe_moves_no_weight_no_mode_and_no_random_number_and_says_the_same_again(
    base: Base, held_out: Cache, control: Control
) -> None:
    control.train()
    before = {name: tensor.clone() for name, tensor in control.state_dict().items()}
    state = torch.get_rng_state()
    readings = [make_probe(base, held_out).read(control, base.denoiser) for _ in range(2)]
    assert readings[0] == readings[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in control.state_dict().items())
    assert control.training
    assert all(parameter.grad is None for parameter in control.parameters())


def test_no_forward_pass_is_larger_than_a_training_batch_and_each_can_be_the_last(
    base: Base, held_out: Cache, control: Control
) -> None:
    sizes: list[int] = []

    def stop() -> None:
        if len(sizes) == 4:
            raise InterruptedError

    hook = base.denoiser.register_forward_pre_hook(
        lambda module, args, named: sizes.append(len(named["sample"])), with_kwargs=True
    )
    try:
        with pytest.raises(InterruptedError):
            make_probe(base, held_out).read(control, base.denoiser, stop)
        assert sizes == [5, 5, 2, 5]
        sizes[:] = []
        make_probe(base, held_out).read(control, base.denoiser)
        assert sum(sizes) == len(ARMS) * BANDS * PAIRS
        assert max(sizes) == 5
    finally:
        hook.remove()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_probe_computes_as_training_does(
    base: Base, held_out: Cache, control: Control, precision: Any, dtype: torch.dtype
) -> None:
    seen: set[torch.dtype] = set()
    hook = base.denoiser.register_forward_hook(lambda module, args, output: seen.add(output.sample.dtype))
    try:
        make_probe(base, held_out, TrainSettings(batch=5, precision=precision)).read(control, base.denoiser)
    finally:
        hook.remove()
    assert seen == {dtype}


def test_a_row_is_json_with_the_parts_that_the_log_promises(base: Base, held_out: Cache, control: Control) -> None:
    row = json.loads(json.dumps(make_probe(base, held_out).read(control, base.denoiser).row(), allow_nan=False))
    assert row.keys() == {"advantage", "bands", "loss", "norms"}
    assert row["advantage"].keys() == {"mean", "error"}
    assert [band.keys() for band in row["bands"]] == [{"from", "to", "mean", "error"}] * BANDS
    assert row["loss"].keys() == {"true", "shuffled", "empty"}
    assert len(row["norms"]) == 13


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_held_out_pairs_are_refused(base: Base, held_out: Cache, count: int) -> None:
    few = encode(base, held_out.folder.parent, count)
    with pytest.raises(TrainError, match=rf"{count} pairs are held out; .* set data.held_out to 2 or more"):
        make_probe(base, few)


@pytest.mark.parametrize("count", [2, 3, 16, 33])
def test_shuffled_hints_are_all_others_and_each_is_given_once(count: int) -> None:
    given = derange(count, seed=count).tolist()
    assert sorted(given) == list(range(count))
    assert all(hint != pair for pair, hint in enumerate(given))


def test_draws_of_a_pair_depend_on_no_other_pair_and_lie_in_their_band() -> None:
    ids = [f"{number}.png#0" for number in range(40)]
    posterior, noise, timesteps = draw_rows(ids, 0, (4, 2, 2), 1000)
    alone = draw_rows(ids[7:8], 0, (4, 2, 2), 1000)
    assert torch.equal(noise[7::40], alone[1])
    assert torch.equal(timesteps[7::40], alone[2])
    assert not torch.equal(noise, posterior)
    for band, inside in enumerate(timesteps.view(BANDS, 40)):
        assert 250 * band <= inside.min() < 250 * band + 60
        assert 250 * band + 190 < inside.max() < 250 * (band + 1)


def test_the_error_of_an_advantage_is_the_textbooks_where_the_textbook_has_one() -> None:
    true = torch.rand((1, 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    overall, band = jackknife(true, torch.ones_like(true))  # a ratio to a constant is a mean
    assert (overall, band) == (band, overall)
    plain = mean_of((1 - true[0]).tolist())
    assert (band.mean, band.error) == pytest.approx((plain.mean, plain.error))
    assert plain.error == pytest.approx(float(np.std(true.numpy(), ddof=1)) / 12**0.5)


def test_bands_of_a_pair_do_not_count_as_pairs() -> None:
    true = torch.rand((1, 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once, copied = (
        jackknife(true, torch.ones_like(true))[0],
        jackknife(true.repeat(9, 1), torch.ones(9, 12).double())[0],
    )
    assert (copied.mean, copied.error) == pytest.approx((once.mean, once.error))


def test_norms_are_those_of_the_links_in_order_the_middle_last(control: Control) -> None:
    with torch.no_grad():
        for place, link in enumerate([*control.controlnet_down_blocks, control.controlnet_mid_block]):
            torch.nn.init.zeros_(link.weight)
            link.weight[:2, 0] = float(place)
    assert zero_conv_norms(control) == pytest.approx([place * 2**0.5 for place in range(13)])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 4, 24, 256])
@pytest.mark.parametrize("values", [{}, {"samples": 0}, {"pairs": 64, "samples": 30, "steps": 50}])
def test_probes_take_at_most_four_hundredths_and_come_as_often_as_that_allows(
    guidance: float, batch: int, values: dict[str, Any]
) -> None:
    probing, settings = ProbeSettings(**values), TrainSettings(batch=batch, accumulate=2)
    passes = 3 * 4 * probing.pairs + probing.samples * probing.steps * (1 if guidance == 1 else 2)
    every = interval(probing, settings, guidance)
    assert passes <= 0.04 * 3 * 2 * batch * every
    assert every == 1 or passes > 0.04 * 3 * 2 * batch * (every - 1)
    assert interval(probing, TrainSettings(batch=2 * batch), guidance) == every  # a step counts, however it is cut


def test_an_interval_that_is_given_is_kept() -> None:
    assert interval(ProbeSettings(every=7), TRAIN, 3.0) == 7


def row(step: int, advantage: float, error: float, *gain: float) -> dict[str, Any]:
    drawn = {"gain": {"mean": gain[0], "error": gain[1]}} if gain else None
    return {"step": step, "advantage": {"mean": advantage, "error": error}, "controllability": drawn}


def first_learned(rows: list[dict[str, Any]]) -> int | None:
    return next((rows[place]["step"] for place in range(len(rows)) if learned(rows[: place + 1])), None)


@pytest.mark.parametrize("drawn", [True, False], ids=["pictures", "no pictures"])
def test_control_is_learned_at_the_probe_at_which_pictures_begin_to_obey(drawn: bool) -> None:
    assert first_learned([row(*(figures if drawn else figures[:3])) for figures in OBEYING]) == 180


@pytest.mark.parametrize("drawn", [True, False], ids=["pictures", "no pictures"])
def test_with_shuffled_training_hints_control_is_never_learned_although_pictures_look_better(drawn: bool) -> None:
    assert any(gain > 2 * error for *_, gain, error in SHUFFLED)
    assert first_learned([row(*(figures if drawn else figures[:3])) for figures in SHUFFLED]) is None


@pytest.mark.parametrize(
    "figures",
    [(0.15, 0.04, 0.15, 0.03), (0.15, 0.04), (0.15, 0.01, 0.03, 0.02), (0.01, 0.001, 0.15, 0.03), (0.01, 0.001)],
    ids=["a lucky probe", "the same without pictures", "no picture obeys", "too little", "the same without pictures"],
)
def test_neither_luck_nor_a_trace_of_the_hint_passes_for_control(figures: tuple[float, ...]) -> None:
    assert not learned([row(20, *figures)])


def drawing(step: int, *figures: float) -> dict[str, Any]:
    """The advantage rises for ever here: where pictures are drawn, they decide."""
    return {"step": step, "advantage": {"mean": step / 10, "error": 0.01}, "controllability": {"figures": figures}}


def test_control_is_settled_once_no_picture_obeys_better_than_three_probes_ago() -> None:
    rising = [drawing(step, 0.2 + 0.02 * step, 0.7 + 0.01 * step) for step in range(9)]
    flat = [drawing(9 + step, 0.36 + 0.01 * (-1) ** step, 0.78 - 0.01 * (-1) ** step) for step in range(6)]
    assert not any(settled(rising[:count]) for count in range(10))
    assert settled(rising + flat)
    assert not settled(flat[:5])
    assert not settled([*flat, drawing(15, 0.36, 0.78, 0.5)])  # other pictures: not to be compared


def test_where_lower_figures_are_better_control_is_settled_once_they_no_longer_fall() -> None:
    def errors(step: int, *figures: float) -> dict[str, Any]:
        made = drawing(step, *figures)
        return made | {"controllability": made["controllability"] | {"lower_is_better": True}}

    falling = [errors(step, 40 - 2.0 * step, 60 - 3.0 * step) for step in range(9)]
    flat = [errors(9 + step, 24 + (-1) ** step, 36 - (-1) ** step) for step in range(6)]
    assert not any(settled(falling[:count]) for count in range(10))
    assert settled(falling + flat)


def test_less_of_an_error_is_a_gain() -> None:
    made = Obedience("depth_rmse", (10.0, 14.0), (30.0, 36.0), "RMSE", lower_is_better=True).row()
    assert (made["mean"], made["without"]["mean"], made["gain"]["mean"]) == (12, 33, 21)
    said = convergence.figures(row(20, 0.1, 0.02) | {"controllability": made})
    assert said == "advantage 0.10 ± 0.02, RMSE 12.00 ± 2.00"


def test_without_pictures_the_advantage_tells_whether_control_is_settled() -> None:
    rising = [row(step, 0.1 * step, 0.03) for step in range(6)]
    assert not settled(rising)
    assert settled([*rising, *(row(6 + step, 0.5 + 0.01 * (step % 2), 0.03) for step in range(6))])
