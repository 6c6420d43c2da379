"""On a GPU: a function's kernels, recorded once and from then on started all at once (a CUDA graph).

A training step is some thousand small kernels. Python takes longer to start one than a fast GPU takes to be through
with it: the GPU waits for the processor, and the faster it is the more.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Outputs = Sequence[Tensor | None]
WARM_UP = 3  # calls before it records: libraries settle on their ways, optimisers make their state


class Recorded:
    """A function of tensors, recorded at its fourth call with inputs of the same shapes.

    The recording reads and writes the memory that the function did: parameters may change in place but not move. What
    it returns is overwritten by the next call. On a CPU the function is called as it is.

    Args:
        function: tensors on one device to tensors there. It must not look at values, nor copy from the CPU.
        say: told once, in one sentence, that it could not be recorded; then it is called as it is.
    """

    def __init__(self, function: Callable[..., Outputs], say: Callable[[str], None] = lambda message: None) -> None:
        self.function, self.say = function, say
        self.shapes: list[torch.Size] = []
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.outputs: Outputs = ()
        self.refused = False
        self.side: torch.cuda.Stream | None = None  # one for all warm-ups: cuBLAS keeps memory for each it is used on

    def forget(self) -> None:
        """Give up the recording and its memory; calls that follow record anew."""
        self.shapes, self.calls, self.graph, self.inputs, self.outputs = [], 0, None, [], ()

    def __call__(self, *inputs: Tensor) -> Outputs:
        if inputs[0].device.type != "cuda" or self.refused:
            return self.function(*inputs)
        if [given.shape for given in inputs] != self.shapes:
            self.forget()
            self.shapes = [given.shape for given in inputs]
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._aside(inputs)
        if self.graph is None and not self._record(inputs):
            return self.function(*inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        assert self.graph is not None
        self.graph.replay()
        return self.outputs

    def _aside(self, inputs: Sequence[Tensor]) -> Outputs:
        """On a stream of its own, as it will be recorded."""
        self.side = self.side or torch.cuda.Stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.side)
        return outputs

    def _record(self, inputs: Sequence[Tensor]) -> bool:
        self.inputs = [given.clone() for given in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            # Loaders' threads may pin memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:  # or out of memory: unlike a recording, the plain call can have caches emptied
            self.forget()
            self.refused = True
            self.say(f"going on without a CUDA graph: {str(error).splitlines()[0]}")
            return False
        self.graph = graph
        return True
