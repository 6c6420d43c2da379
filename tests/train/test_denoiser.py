"""On a GPU a base in bfloat16 is computed in bfloat16 throughout, as the stock pipelines do it."""

from typing import Any

import pytest
import tiny
import torch

from bridle.control.control import Control
from bridle.control.text import Text
from bridle.train.denoiser import predict_plainly


def test_its_prediction_and_gradients_are_those_of_float32_but_for_rounding() -> None:
    exact, (noisy, timesteps, states, hint) = tiny.make_unet(), tiny.make_inputs()
    control, text = tiny.wake(Control.from_base(exact)), Text(states)

    def run(base: Any) -> tuple[torch.Tensor, torch.Tensor]:
        control.zero_grad()
        residuals = control(noisy, timesteps, text, hint)
        with torch.autocast("cpu", torch.bfloat16, enabled=base is not exact):
            predicted = predict_plainly(control, base, noisy, timesteps, text, residuals)
        predicted.float().square().mean().backward()
        gradients = [weight.grad.flatten() for weight in control.parameters() if weight.grad is not None]
        return predicted.detach().float(), torch.cat(gradients)

    low, seen = tiny.make_unet().to(torch.bfloat16), []
    low.conv_in.register_forward_pre_hook(lambda module, given: seen.append(torch.is_autocast_enabled("cpu")))
    (wanted, gradients), (got, same) = run(exact), run(low)
    assert seen == [False]  # which on a GPU would have normalisations in float32
    assert not torch.equal(got, wanted)
    assert (got - wanted).norm() < 0.02 * wanted.norm()
    assert torch.nn.functional.cosine_similarity(same, gradients, dim=0) > 0.999


def test_a_base_in_float32_stays_with_autocast() -> None:
    base, (noisy, timesteps, states, hint) = tiny.make_unet(), tiny.make_inputs()
    control, text = Control.from_base(base), Text(states)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        residuals = control(noisy, timesteps, text, hint)
        wanted = control.join(base, control.call(noisy, timesteps, text), residuals)
        assert torch.equal(predict_plainly(control, base, noisy, timesteps, text, residuals), wanted)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # diffusers asks for a version
def test_a_compiler_sees_it_as_one_graph() -> None:
    base, (noisy, timesteps, states, hint) = tiny.make_unet().to(torch.bfloat16), tiny.make_inputs()
    control, text = tiny.wake(Control.from_base(tiny.make_unet())), Text(states)
    compiled = torch.compile(predict_plainly, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        residuals = control(noisy, timesteps, text, hint)
        given = control, base, noisy, timesteps, text, residuals
        assert torch.equal(compiled(*given), predict_plainly(*given))
