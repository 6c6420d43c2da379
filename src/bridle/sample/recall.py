"""Steps that take over what an earlier step computed: the deep layers see much the same in neighbouring steps.

In a held step they give what they gave last, and so do all controls; only the first block of the encoder and the last
of the decoder are computed.

Source: DeepCache, arXiv:2312.00858.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from bridle.control.attach import Rig
from bridle.control.control import denoiser_of, read_call
from bridle.control.progress import Progress
from bridle.kernels.stand_in import Forward, stand_in
from bridle.sample.hasten import is_unet

# By the name in the settings: of so many steps all but the first are held.
SPEEDS = {"fast": 2, "draft": 5}


@contextmanager
def recalled(pipeline: Any, rig: Rig | None, every: int) -> Generator[None]:
    """Sample so inside the `with` block.

    Args:
        pipeline: any of diffusers'; one without a U-Net samples as ever.
        rig: the controls that are attached to it.
        every: of so many steps all but the first are held.
    """
    denoiser = denoiser_of(pipeline)
    if not is_unet(denoiser):
        yield
        return
    beat = Beat(pipeline, rig, every)
    with ExitStack() as around:
        # Before the rig's own hook, in which the controls are computed.
        around.callback(denoiser.register_forward_pre_hook(beat, with_kwargs=True, prepend=True).remove)
        around.callback(beat.release)
        for module in deep_layers(denoiser):
            around.callback(stand_in(module, beat.keep))
        yield


class Beat:
    """Tells from call to call whether it is held."""

    def __init__(self, pipeline: Any, rig: Rig | None, every: int) -> None:
        self.rig, self.every, self.progress = rig, every, Progress(pipeline)
        self.timestep = rig.first.timestep if rig is not None else lambda call: call["timestep"]
        self.begin, self.index, self.held = -1.0, 0, False

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin = self.progress.locate(self.timestep(read_call(denoiser, args, kwargs))).begin
        if begin <= 0 or begin < self.begin:
            self.index = 0
        elif begin != self.begin:
            self.index += 1
        self.held = self.index % self.every != 0
        self.begin = begin
        self.pass_on()

    def release(self) -> None:
        self.held = False
        self.pass_on()

    def pass_on(self) -> None:
        for rein in self.rig.reins.values() if self.rig is not None else ():
            rein.hold = self.held

    def keep(self, plain: Forward) -> Forward:
        """Answers with the last answer in a held step."""
        last: list[Any] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.held and last:
                return copied(last[0])
            last[:] = [plain(*args, **kwargs)]
            return last[0]

        return forward


def copied(answer: Any) -> Any:
    """What follows may write into a layer's output (FreeU does), but not into skip connections."""
    return answer.clone() if isinstance(answer, Tensor) else answer


def deep_layers(denoiser: Any) -> list[nn.Module]:
    """A U-Net's blocks but the outermost."""
    return [block for block in (*denoiser.down_blocks[1:], denoiser.mid_block, *denoiser.up_blocks[:-1]) if block]
