"""A quickened model computes the same within rounding, learns the same, and is as it was once that is undone."""

import copy
from typing import Any

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from bridle.control.control import Control
from bridle.control.text import Text
from bridle.kernels import conv, native, norm, outer, winograd
from bridle.kernels.attention import WAYS, choose_attention, fits, set_processors
from bridle.kernels.quicken import quicken, turn_weights

Pair = tuple[Any, Control]
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


@pytest.fixture
def pair() -> Pair:
    """A locked base, and a control that pulls at every link."""
    unet = tiny.make_unet().requires_grad_(False)
    control = tiny.wake(Control.from_base(unet))
    set_processors((control, unet), lambda attention: AttnProcessor())
    return unet, control


def predict(pair: Pair, halved: bool = True) -> Tensor:
    unet, control = pair
    latents, timesteps, text, hint = tiny.make_inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=halved):
        residuals = control(latents, timesteps, text, hint)
        prediction: Tensor = control.join(unet, control.call(latents, timesteps, Text(text)), residuals)
    return prediction.float()


def learn(pair: Pair, halved: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    pair[1].zero_grad()
    prediction = predict(pair, halved)
    prediction.square().mean().backward()
    return prediction.detach(), {n: w.grad.clone() for n, w in pair[1].named_parameters() if w.grad is not None}


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat = [torch.cat([gradients[name].flatten() for name in expected]) for gradients in (found, expected)]
    return F.cosine_similarity(flat[0], flat[1], 0).item()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("halved", "off", "alike"), [(True, 0.02, 0.9995), (False, 5e-6, 0.9999999)])
def test_prediction_and_gradients_are_the_same_within_rounding(
    pair: Pair, last: bool, halved: bool, off: float, alike: float
) -> None:
    plain, expected = learn(pair, halved)
    for model in pair if last else ():
        model.to(memory_format=torch.channels_last)
    quicken(*pair)
    choose_attention(*pair)
    fast, found = learn(pair, halved)
    assert ((fast - plain).norm() / plain.norm()).item() < off
    assert found.keys() == expected.keys()
    assert cosine(found, expected) > alike
    assert all(gradient.dtype is torch.float32 for gradient in found.values())


@pytest.mark.parametrize("halved", [True, False])
def test_undoing_makes_the_models_what_they_were(pair: Pair, halved: bool) -> None:
    plain, expected = learn(pair, halved)
    before = [set(vars(module)) for model in pair for module in model.modules()]
    undo = quicken(*pair)
    learn(pair, halved)
    undo()
    undo()
    assert [set(vars(module)) for model in pair for module in model.modules()] == before
    again, found = learn(pair, halved)
    assert torch.equal(again, plain)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_float64_is_computed_by_the_modules_own_code(pair: Pair) -> None:
    unet = pair[0].double()
    latents, timesteps, text, _ = tiny.make_inputs()
    given = latents.double(), timesteps, text.double()
    expected = unet(*given).sample
    quicken(unet)
    assert torch.equal(unet(*given).sample, expected)


def test_weights_of_another_type_than_float32_features_are_pytorchs_error() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)).bfloat16()
    quicken(model)
    with pytest.raises(RuntimeError, match="BFloat16"):
        model(torch.ones(1, 4, 8, 8))


@pytest.mark.parametrize(("halved", "alike"), [(True, 0.9995), (False, 0.9999999)])
def test_where_memory_is_spared_the_same_is_learned_and_no_form_of_a_weight_is_left(
    pair: Pair, halved: bool, alike: float
) -> None:
    _, expected = learn(pair, halved)
    quicken(*pair, sparing=True)
    _, found = learn(pair, halved)
    assert cosine(found, expected) > alike
    assert made_of_weights(pair) == 0
    with torch.no_grad():
        predict(pair, halved)
    assert made_of_weights(pair[:1]) == 0


def made_of_weights(models: tuple[nn.Module, ...]) -> int:
    """Bytes of forms of convolutions' and linear layers' weights; what is a view of a weight is none."""
    found = 0
    for module in [module for model in models for module in model.modules()]:
        forms = vars(module).get("_bridle_working", {}).get("weight")
        for made in forms.made.values() if forms and type(module) in (nn.Conv2d, nn.Linear) else ():
            found += made.nbytes * (made.data_ptr() != module.weight.data_ptr())
    return found


def test_what_drawing_made_of_weights_is_forgotten_though_they_are_trained_with(pair: Pair) -> None:
    """Or a training would hold a second set of forms from its first samples on."""

    def forms() -> list[set[str]]:
        kept = [vars(module).get("_bridle_working", {}).values() for module in pair[0].modules()]
        return [set(form.made) for forms in kept for form in forms]

    quicken(*pair)
    learn(pair)
    before = forms()
    undo = quicken(*pair, fixed=True)
    with torch.no_grad():
        predict(pair, halved=False)
    assert forms() != before
    undo()
    assert forms() == before


@needs_compiler
def test_all_that_is_compiled_is_there_where_there_is_a_compiler() -> None:
    """Or a fault in one file would only make things slow."""
    assert native.library(torch.float32) is not None
    assert winograd.library(torch.float32) is not None
    assert winograd.library(torch.bfloat16) is not None


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_float32_is_computed_by_the_modules_own_code(pair: Pair) -> None:
    expected = predict(pair, halved=False)
    quicken(*pair)
    assert torch.equal(predict(pair, halved=False), expected)


@needs_compiler
@pytest.mark.parametrize("most", [0, 2**22])
def test_large_forms_of_float32_weights_are_not_kept(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "MOST_KEPT", most)
    monkeypatch.setattr(conv, "pick", lambda key, ways: "winograd" if "winograd" in ways() else "direct")
    layer = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    quicken(layer)
    layer(torch.ones(1, 16, 8, 8))
    kept = vars(layer)["_bridle_working"]["weight"].made.values()
    assert any(form.shape[0] == winograd.planes(torch.float32) for form in kept) == (most > 0)


@pytest.mark.parametrize("halved", [True, False])
@pytest.mark.parametrize("kind", ["conv", "norm", "linear"])
def test_a_bias_beside_a_locked_weight_learns(kind: str, halved: bool) -> None:
    layers = {"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.GroupNorm(2, 8), "linear": nn.Linear(6, 8)}
    layer, hidden = layers[kind], torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    layer.weight.requires_grad_(False)
    quicken(layer)
    for wanted in (False, True):
        layer.bias.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            layer(hidden.clone().requires_grad_(wanted)).float().sum().backward()
        count = hidden.numel() / 8 if kind != "linear" else hidden.numel() / 6
        torch.testing.assert_close(layer.bias.grad, torch.full((8,), count))


def test_what_is_empty_or_alone_is_pytorchs() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4))
    quicken(model)
    assert model(torch.ones(0, 4, 8, 8)).shape == (0, 4, 8, 8)
    assert model[0](torch.ones(4, 8, 8)).shape == (4, 8, 8)


def test_weights_turned_in_inference_mode_can_be_trained_later() -> None:
    layer = nn.Conv2d(4, 4, 3)
    with torch.inference_mode():
        turn_weights(layer)()
    layer.weight.requires_grad_(True)
    assert not layer.weight.is_inference()


def test_weights_made_in_inference_mode_can_be_computed_with() -> None:
    with torch.inference_mode():
        layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    hidden = torch.ones(1, 4, 8, 8)
    expected = layer(hidden)
    quicken(layer)
    undo = turn_weights(layer)
    torch.testing.assert_close(layer(hidden), expected)
    undo()


@pytest.mark.parametrize("last", [False, True])
def test_weights_lie_as_they_did_once_that_is_undone(last: bool) -> None:
    conv = nn.Conv2d(4, 8, 3)
    if last:
        conv.to(memory_format=torch.channels_last)
    before, strides = conv.weight.clone(), conv.weight.stride()
    undo = turn_weights(conv)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv.weight, before)
    undo()
    assert conv.weight.stride() == strides


def test_a_weight_that_a_fused_optimiser_changed_is_seen(pair: Pair) -> None:
    """It counts no change: a cast that was kept by the count would never learn."""
    quicken(*pair)
    optimizer = torch.optim.AdamW(pair[1].parameters(), lr=1e-3, fused=True)
    before = predict(pair)
    before.square().mean().backward()
    optimizer.step()
    assert not torch.equal(predict(pair), before)


def test_a_locked_weight_that_is_changed_in_place_is_seen(pair: Pair) -> None:
    quicken(*pair)
    with torch.no_grad():
        before = predict(pair)
        pair[0].conv_out.weight.mul_(2)
        assert not torch.equal(predict(pair), before)


def test_a_copy_of_a_quickened_model_stands_alone(pair: Pair) -> None:
    unet, control = pair
    quicken(unet, control)
    predict(pair)
    other = copy.deepcopy(control)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
        assert not torch.equal(predict((unet, other)), predict(pair))
        assert control.conv_in.weight.any()


@pytest.mark.parametrize("wanted_way", ["the first", "winograd"])
def test_it_learns_as_the_plain_path_does(pair: Pair, monkeypatch: pytest.MonkeyPatch, wanted_way: str) -> None:
    """Twelve steps from the same start: the same losses but for rounding, and they fall.

    By named ways, the same on every machine: how far roundings carry over twelve steps is a matter of chance.
    """

    def pick(shape: Any, make_ways: Any) -> str:
        ways = list(make_ways())
        return wanted_way if wanted_way in ways else ways[0]

    for module in (conv, norm, outer):
        monkeypatch.setattr(module, "pick", pick)
    wanted = torch.randn(predict(pair).shape, generator=torch.Generator().manual_seed(1))

    def curve(models: Pair) -> Tensor:
        optimizer = torch.optim.AdamW(models[1].parameters(), lr=2e-3, fused=True)
        losses = []
        for _ in range(12):
            loss = (predict(models) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    other = copy.deepcopy(pair)
    plain = curve(pair)
    quicken(*other)
    fast = curve(other)
    assert plain[-1] < plain[0]
    torch.testing.assert_close(fast, plain, rtol=0.01, atol=0)


@pytest.mark.parametrize("shape", [(2, 32, 8, 8), (3, 64, 4, 4), (2, 32, 1, 1)])
@pytest.mark.parametrize(
    ("name", "kind", "off"),
    [
        ("native", torch.bfloat16, 0.004),
        ("sums", torch.bfloat16, 0.004),
        ("native", torch.float32, 2e-4),
        pytest.param("compiled", torch.float32, 2e-5, marks=needs_compiler),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_group_normalisation_is_pytorchs(
    shape: tuple[int, ...], name: str, kind: torch.dtype, off: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a mean is large beside its deviation."""
    from bridle.kernels import norm as kernels

    monkeypatch.setattr(kernels, "pick", lambda key, make_ways: name)
    monkeypatch.setattr(kernels, "able", lambda ways, norm, kind: ways)
    norm = nn.GroupNorm(8, shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    hidden = (torch.randn(shape) + offset).to(kind).to(memory_format=torch.channels_last)
    gradient = torch.randn(shape).to(kind)
    reference, exact = copy.deepcopy(norm).double(), hidden.double().requires_grad_()
    right = reference(exact)
    expected = torch.autograd.grad(right, (exact, *reference.parameters()), gradient.double())
    hidden.requires_grad_()
    output = kernels.normalise(norm, hidden)
    found = torch.autograd.grad(output, (hidden, norm.weight, norm.bias), gradient)
    assert ((output - right).norm() / right.norm()).item() < off
    for ours, theirs in zip(found, expected, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < off


@pytest.mark.parametrize("name", ["sums", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("offset", [100.0, 300.0])
def test_group_normalisation_of_many_pixels_far_from_zero_is_as_exact_as_numbers_are(
    name: str, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bridle.kernels import norm as kernels

    monkeypatch.setattr(kernels, "pick", lambda key, make_ways: name)
    monkeypatch.setattr(kernels, "able", lambda ways, norm, kind: ways)
    torch.manual_seed(0)
    norm, hidden = nn.GroupNorm(8, 64), (torch.randn(1, 64, 96, 96) + offset).bfloat16()
    expected = copy.deepcopy(norm).double()(hidden.double())
    found = kernels.normalise(norm, hidden.to(memory_format=torch.channels_last))
    assert ((found - expected).norm() / expected.norm()).item() < 0.003


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [16, 64])
def test_too_many_or_too_few_channels_are_pytorchs_error(channels: int, kind: torch.dtype) -> None:
    norm = nn.GroupNorm(8, 32).to(kind)
    quicken(norm)
    with pytest.raises(RuntimeError, match="weight"):
        norm(torch.ones(1, channels, 4, 4, dtype=kind).to(memory_format=torch.channels_last))


def test_modules_take_their_input_by_name_as_before() -> None:
    conv, hidden = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 8, 8)
    expected = conv(hidden)
    quicken(conv)
    assert torch.equal(conv(input=hidden), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_made_of_others_can_be_trained() -> None:
    conv = nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    quicken(conv)
    conv(torch.randn(1, 4, 8, 8)).sum().backward()
    assert all(weight.grad is not None for weight in conv.parameters())


@needs_compiler
def test_group_normalisation_is_exact_beside_an_outlier() -> None:
    torch.manual_seed(0)
    norm, hidden = nn.GroupNorm(2, 16), torch.randn(1, 16, 32, 32)
    hidden[..., 0, 0] = 100.0
    expected = copy.deepcopy(norm).double()(hidden.double())
    quicken(norm)
    found = norm(hidden.to(memory_format=torch.channels_last))
    assert ((found - expected).norm() / expected.norm()).item() < 3e-7


@pytest.mark.parametrize("name", ["flash", "kept", pytest.param("again", marks=needs_compiler)])
@pytest.mark.parametrize("tokens", [64, 7])
@pytest.mark.parametrize(("kind", "off"), [(torch.bfloat16, 0.01), (torch.float32, 3e-6)])
def test_attention_is_the_same_by_every_way(name: str, tokens: int, kind: torch.dtype, off: float) -> None:
    query = torch.randn(2, 64, 4, 24).to(kind).transpose(1, 2)
    key, value = (torch.randn(2, tokens, 4, 24).to(kind).transpose(1, 2) for _ in range(2))
    given = [part.detach().requires_grad_() for part in (query, key, value)]
    exact = [part.detach().float().requires_grad_() for part in given]
    output, expected = WAYS[name](*given), F.scaled_dot_product_attention(*exact)
    gradient = torch.randn_like(expected)
    found = torch.autograd.grad(output, given, gradient.to(kind))
    theirs = torch.autograd.grad(expected, exact, gradient)
    assert ((output.float() - expected).norm() / expected.norm()).item() < off
    for ours, right in zip(found, theirs, strict=True):
        assert ((ours.float() - right).norm() / right.norm()).item() < off


@pytest.mark.parametrize(("shared", "size"), [(40.0, 1.5), (0.0, 3.0), (0.0, 1.0)])
@pytest.mark.parametrize(("name", "off"), [("kept", 0.035), pytest.param("again", 0.016, marks=needs_compiler)])
def test_attention_is_the_same_where_scores_are_large(name: str, off: float, shared: float, size: float) -> None:
    """Their rounding to bfloat16 is not to be seen: neither in what all keys share, nor in rows that look at few."""
    torch.manual_seed(0)
    towards = F.normalize(torch.randn(40), dim=0) * (shared * 40**0.5) ** 0.5
    query, key = ((torch.randn(1, 2, 512, 40) * size + towards).bfloat16() for _ in range(2))
    value, gradient = (torch.randn(1, 2, 512, 40).bfloat16() for _ in range(2))
    given = [part.requires_grad_() for part in (query, key, value)]
    exact = [part.detach().double().requires_grad_() for part in given]
    output, expected = WAYS[name](*given), F.scaled_dot_product_attention(*exact)
    found = torch.autograd.grad(output, given, gradient)
    theirs = torch.autograd.grad(expected, exact, gradient.double())
    assert ((output - expected).norm() / expected.norm()).item() < off
    for ours, right in zip(found, theirs, strict=True):
        assert ((ours - right).norm() / right.norm()).item() < off


def test_attention_with_a_mask_is_left_to_diffusers(pair: Pair) -> None:
    attention = next(module for module in pair[0].modules() if fits(module))
    hidden, mask = torch.randn(2, 9, attention.to_q.in_features), torch.zeros(2, 1, 9)
    mask[:, :, 4:] = -10_000.0
    text = torch.randn(2, 9, attention.to_k.in_features)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = attention(hidden, text, attention_mask=mask)
        choose_attention(pair[0])
        assert torch.equal(attention(hidden, text, attention_mask=mask), expected)
        assert not torch.equal(attention(hidden, text), expected)


def test_the_last_one_decides_which_channels_get_a_gradient_until_it_is_undone() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    hidden = torch.randn(1, 8, 4, 4).bfloat16().requires_grad_()

    def reached() -> int:
        (gradient,) = torch.autograd.grad(conv(hidden).float().sum(), hidden)
        return int(gradient.flatten(2).any(2).sum())

    model = nn.Sequential(conv)
    end_first = quicken(model, channels={conv: 3})
    end_second = quicken(model)
    assert reached() == 8
    end_second()
    assert reached() == 3
    end_first()
    assert "forward" not in vars(conv)
