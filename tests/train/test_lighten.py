"""A lightened decoder gives the same gradients, keeps and computes less, and can be made as it was again."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bridle.control.control import Control, Links
from bridle.train.lighten import channels_from_below, convolve, lighten_decoder, lying_as
from bridle.train.memory import set_gradient_checkpointing

Pair = tuple[Any, Control]


@pytest.fixture
def pair() -> Pair:
    """A base and a control that pulls at every link, in double precision."""
    unet = tiny.make_unet().double()
    return unet, tiny.wake(Control.from_base(unet))


def predict(pair: Pair, links: Links) -> Tensor:
    unet, control = pair
    control.links = links
    latents, timesteps, text, hint = (tensor.to(control.dtype) for tensor in tiny.make_inputs())
    residuals = control(latents, timesteps, text, hint)
    given = {"down_block_additional_residuals": residuals.down, "mid_block_additional_residual": residuals.mid}
    prediction: Tensor = unet(latents, timesteps, text, **given).sample
    return prediction


def learn(pair: Pair, links: Links) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction, and the gradient of every parameter that has one."""
    pair[1].zero_grad()
    prediction = predict(pair, links)
    prediction.square().sum().backward()
    gradients = {name: weight.grad for name, weight in pair[1].named_parameters() if weight.grad is not None}
    return prediction.detach(), gradients


@pytest.mark.parametrize(("kernel", "channels"), [(3, 8), (1, 8), (3, 5)])
def test_gradients_keep_channels_last_where_they_come_so(kernel: int, channels: int) -> None:
    conv = nn.Conv2d(8, 6, kernel, padding=kernel // 2).double().requires_grad_(False)
    last, found = torch.channels_last, []
    for lies in (torch.contiguous_format, last):
        conv.to(memory_format=lies)
        hidden = torch.linspace(-1, 1, 2 * 8 * 5 * 5).double().sin().view(2, 8, 5, 5).requires_grad_()
        output = convolve(conv, channels, hidden.contiguous(memory_format=lies))
        (gradient,) = torch.autograd.grad(output, hidden, output.detach().cos().contiguous(memory_format=lies))
        found.append(gradient)
    torch.testing.assert_close(*found)
    weight = lying_as(output, conv.weight)
    assert torch.equal(weight, conv.weight)
    assert weight.stride() == (kernel * kernel * 8, 1, kernel * 8, 8)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("links", "skips"), [("middle", False), ("all", True)])
def test_prediction_is_equal_and_gradients_are_those_of_autograd(
    pair: Pair, links: Links, skips: bool, checkpointing: bool
) -> None:
    plain, expected = learn(pair, links)
    lighten_decoder(pair[0], skips=skips)
    if checkpointing:
        set_gradient_checkpointing(pair[1], pair[0])
    light, gradients = learn(pair, links)
    assert torch.equal(light, plain)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert expected[name].any()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10 * expected[name].abs().max().item())


def test_a_group_that_straddles_the_boundary_is_needed_whole() -> None:
    """As in Stable Diffusion 1.5: 1280 channels from below and 640 of the skip, normalised in 32 groups."""
    with torch.device("meta"):
        unet = tiny.make_unet(block_out_channels=(320, 640, 1280, 1280), norm_num_groups=32)
    needed = dict(channels_from_below(unet))
    resnet = unet.up_blocks[1].resnets[2]
    assert resnet.conv1.in_channels == 1280 + 640
    assert needed[resnet.conv1] == 1320  # 22 groups of 60
    assert needed[resnet.conv_shortcut] == 1280  # which no normalisation precedes


def backward_flops(pair: Pair) -> int:
    prediction = predict(pair, "middle")
    with FlopCounterMode(display=False) as counter:
        prediction.sum().backward()
    return counter.get_total_flops()


def test_the_skips_share_of_the_gradient_is_not_computed(pair: Pair) -> None:
    convs = dict(channels_from_below(pair[0]))
    values: dict[nn.Module, int] = {}  # of each output
    for conv in convs:
        conv.register_forward_hook(lambda conv, args, output: values.update({conv: output.numel()}))
    plain = backward_flops(pair)
    lighten_decoder(pair[0], skips=False)
    spared = [2 * values[conv] * conv.weight[0, channels:].numel() for conv, channels in convs.items()]
    assert len(spared) == 24
    assert all(spared)
    assert plain - backward_flops(pair) == sum(spared)


def kept_bytes(pair: Pair) -> int:
    """What a forward pass in mixed precision keeps for the backward pass, beside parameters."""
    parameters = {weight.data_ptr() for module in pair for weight in module.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        predict(pair, "all")
    return sum(storage.nbytes() for storage in storages.values())


def test_no_input_of_a_convolution_and_no_copy_of_its_weight_is_kept(pair: Pair) -> None:
    unet = pair[0].float()
    pair[1].float()
    convs = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Conv2d)}
    convs = {name: conv for name, conv in convs.items() if name.startswith(("up_blocks", "conv_out"))}
    inputs: dict[str, int] = {}  # values in each
    for name, conv in convs.items():
        if "shortcut" not in name:  # the normalisation needs that one's input as well
            conv.register_forward_pre_hook(lambda conv, args, name=name: inputs.update({name: args[0].numel()}))
    plain = kept_bytes(pair)
    lighten_decoder(unet, skips=True)
    values = sum(inputs.values()) + sum(conv.weight.numel() for conv in convs.values())
    assert plain - kept_bytes(pair) == values * torch.bfloat16.itemsize


def test_undone_the_u_net_is_as_it_was(pair: Pair) -> None:
    before = [dict(vars(module)) for module in pair[0].modules()]
    hooks = [len(module._forward_pre_hooks) for module in pair[0].modules()]
    undo = lighten_decoder(pair[0], skips=False)
    undo()
    undo()  # harmless
    assert [dict(vars(module)) for module in pair[0].modules()] == before
    assert [len(module._forward_pre_hooks) for module in pair[0].modules()] == hooks


def test_a_link_connected_too_early_is_found(pair: Pair) -> None:
    lighten_decoder(pair[0], skips=False)
    with pytest.raises(AssertionError, match="skips=False"):
        predict(pair, "all")


def test_an_unlocked_decoder_is_found(pair: Pair) -> None:
    lighten_decoder(pair[0], skips=True)
    pair[0].up_blocks.requires_grad_(True)
    with pytest.raises(AssertionError, match="locked"):
        predict(pair, "all")
