"""A step's kernels as one CUDA graph: what it computes is what the function computes. On a CPU there is none."""

import pytest
import torch

from bridle.kernels.record import WARM_UP, Recorded

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_the_function_is_called_as_it_is():
    calls = []

    def double(x):
        calls.append(x)
        return [2 * x]

    recorded = Recorded(double)
    for number in range(WARM_UP + 3):
        given = torch.full((2,), float(number))
        assert recorded(given)[0].tolist() == [2.0 * number] * 2
        assert calls[-1] is given
    assert recorded.graph is None


@on_gpu
def test_a_recorded_training_moves_as_the_plain_one_does():
    def train(record):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8).cuda()

        def move(x):
            loss = layer(x).square().mean()
            loss.backward()
            with torch.no_grad():
                for weight in layer.parameters():
                    weight -= 0.1 * weight.grad
            layer.zero_grad()
            return [loss.detach()]

        recorded = Recorded(move)
        source = torch.Generator().manual_seed(1)
        given = [torch.randn(4, 8, generator=source).cuda() for _ in range(8)]
        losses = [(recorded if record else move)(x)[0].item() for x in given]
        return losses, recorded.graph

    plain, _ = train(False)
    fast, graph = train(True)
    assert graph is not None
    assert fast == pytest.approx(plain, rel=1e-5)


@on_gpu
def test_what_looks_at_values_is_not_recorded_but_done():
    said = []
    recorded = Recorded(lambda x: [x * float(x.sum())], said.append)
    for _ in range(WARM_UP + 2):
        assert recorded(torch.ones(3, device="cuda"))[0].tolist() == [3.0] * 3
    assert len(said) == 1
    assert "without a CUDA graph" in said[0]
