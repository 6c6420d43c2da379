"""One control in training: what a step does, what a switch of the regime does, and the state between two steps.

All state is a flat table of named tensors and a few facts, so that a checkpoint is no pickle and any part of it can be
looked at:

    control.<parameter>    base.<parameter>              as trained; the base's only once it is unlocked
    average.<parameter>    base_average.<parameter>      their running averages, which are what is saved and shown
    optimizer.<parameter>.<entry>                        of whatever is trained
"""

import copy
import dataclasses
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bridle.base.schedule import Schedule
from bridle.cache.store import Cache, CachedBatch, as_taken
from bridle.control.control import Control
from bridle.control.delta import take_delta
from bridle.control.text import Text
from bridle.control.unet import UNetControl
from bridle.errors import TrainError
from bridle.kernels import native
from bridle.kernels.attention import choose_attention, restore_attention
from bridle.kernels.layout import keep_last, pays
from bridle.kernels.precision import TYPES, choose_precision, computing
from bridle.kernels.quicken import quicken, speeds_up, trained_products, turn_weights
from bridle.kernels.record import Recorded
from bridle.kernels.working import Working
from bridle.train.denoiser import PARTS, Denoiser, check_width, trained_parts
from bridle.train.draws import Draws
from bridle.train.feed import Rows
from bridle.train.lighten import channels_from_below, lighten_decoder, refuse_skips
from bridle.train.loss_scale import LossScale
from bridle.train.memory import SAVE_MEMORY, is_out_of_memory, set_gradient_checkpointing, settle_freed_memory
from bridle.train.objective import add_noise, loss_per_sample, loss_weights, sample_posterior, target
from bridle.train.optim import clip, halve_gradients, make_optimizer, optimizer_state, restore_optimizer
from bridle.train.parallel import ALONE, World, full, gather, mean, reducing, share, wrap
from bridle.train.regime import Phase, first_phase, unlocks
from bridle.train.settings import MachineSettings, TrainSettings

OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step gave.

    Attributes:
        loss: mean over the effective batch.
        norm: L2 norm of the gradient before clipping.
        bad: empty; or, where loss or gradient were not finite and the step was skipped, the samples that may be why.
    """

    loss: float
    norm: float
    bad: tuple[str, ...] = ()


class Trainer:
    """A control, the base it steers, and what trains them.

    Args:
        control: trained in place, float32.
        denoiser: the base's U-Net or transformer; stays locked until the regime unlocks it.
        schedule: the base's.
        say: told, in one sentence, what the user should know and need not act on.
    """

    def __init__(
        self,
        control: Control,
        denoiser: Any,
        schedule: Schedule,
        cache: Cache,
        settings: TrainSettings,
        machine: MachineSettings = MachineSettings(),  # noqa: B008 - frozen, so it can be shared
        world: World = ALONE,
        say: Callable[[str, str], None] = lambda kind, message: None,
    ) -> None:
        self.control, self.denoiser, self.cache, self.settings = control.train(), denoiser, cache, settings
        self.machine, self.world, self.say = machine, world, say
        self.inner = Denoiser(control, denoiser)
        self.sharded = self.world.size > 1 and self.machine.parallel == "fsdp"
        self.device = control.device
        settle_freed_memory(self.device, saving=machine.gradient_checkpointing)
        self.precision = choose_precision(settings.precision, self.device, next(denoiser.parameters()).dtype)
        if next(denoiser.parameters()).dtype not in TYPES.values():
            kind, remedy = next(denoiser.parameters()).dtype, "load the base in one of these"
            known = "float32, bfloat16 or float16"
            raise TrainError(f"base's weights are {kind}, which is not trained with; expected {known}: {remedy}")
        self.schedule = schedule.to(self.device)
        self.empty_text = cache.empty_text.to(self.device)
        shape = cache.batch(cache.train_ids[:1]).mean.shape
        self.lent = ExitStack()  # what gives both models back as they were
        self.mine = len(share(range(settings.effective_batch), world))
        self.fits: int | None = None  # pairs per forward pass, once memory was found to hold no more
        self.lies_last = self._lies_last()
        if control.device.type == "cpu":
            if self.precision == "bf16":
                check_width(control, shape[-1])
            if not self.sharded and (self.precision == "bf16" or self._has_kernels()):  # FSDP takes no turned ones
                self.lent.callback(turn_weights(control, denoiser))
            if not self._compiles():
                self.lent.callback(choose_attention(control, denoiser))
            if native.library() is None:
                self.say("kernels", "no C compiler (cc, gcc or clang) made the loops that would speed up the steps")
        elif self.lies_last:
            self.lent.callback(turn_weights(control, denoiser))
        self.average = copy.deepcopy(control).requires_grad_(False).eval()
        if self.machine.gradient_checkpointing:
            set_gradient_checkpointing(control, denoiser)
            self.lent.callback(partial(set_gradient_checkpointing, denoiser, on=False))
        self.scale = LossScale(self.device, on=self.precision == "fp16")
        self.skipped = self.skipped_in_a_row = 0
        self.undo: Callable[[], None] = lambda: None
        self.averages: dict[str, Tensor] = {}
        self.original: dict[str, Tensor] = {}  # the base's weights before they were unlocked
        self.phase, self.joined = first_phase(settings), {"copy": 0}
        try:
            self._open(0)
        except BaseException:
            self.close()
            raise

    @property
    def micro(self) -> int:
        """Pairs per forward pass: what is set, or fewer where this process has fewer or memory holds fewer."""
        return min(self.settings.batch, self.mine, self.fits or self.mine)

    def step(self, step: int, rows: Rows, check: Callable[[], None] = lambda: None) -> StepResult:
        """One optimiser step, or none where loss or gradient are not finite.

        Args:
            check: called between forward passes; what it raises ends the step without a trace.

        Raises: TrainError: memory does not suffice for a single pair.
        """
        began = self.scale.value
        while True:
            losses = self._fitting_gradients(rows, check)
            norm = clip(self.optimizer, list(self.trained.values()), self.settings.clip_norm, self.scale.value)
            loss = mean(losses.mean(), self.world).item()
            if isfinite(norm) or not isfinite(loss) or not self.scale.lower():
                break
        self.scale.settle(began, good=isfinite(norm))
        result = StepResult(loss, norm, self._find_bad(loss, norm, rows, losses))
        if result.bad:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        else:
            self.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(step, group["part"])
            self.optimizer.step()
            self._average(step)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _fitting_gradients(self, rows: Rows, check: Callable[[], None]) -> Tensor:
        """Run backward through all rows, with fewer at once where memory does not suffice. Returns: their losses."""
        losses = None
        while losses is None:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                with self._passing_on():
                    losses = self._gradients(rows, check)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if losses is None:  # only here, where the exception no longer holds the activations
                self._halve()
        return losses

    @contextmanager
    def _passing_on(self) -> Generator[None]:
        """Pass features on with channels last, where that pays; what is drawn in between has its own answer to that."""
        with ExitStack() as around:
            if self.lies_last:
                around.callback(keep_last(self.control, self.denoiser))
            yield

    def _gradients(self, rows: Rows, check: Callable[[], None]) -> Tensor:
        """Run backward through all rows, a micro-batch at a time. Returns: their losses."""
        losses, count = [], len(rows.ids)
        halve_gradients(self.optimizer, on=count == self.micro)
        for start in range(0, count, self.micro):
            check()
            part, last = slice(start, start + self.micro), start + self.micro >= count
            batch, draws = rows.batch[part], rows.draws[part]
            if self.recorded is not None and count == self.micro:
                loss, *gradients = self.recorded(self.scale.factor, *self._inputs(batch, draws))
                assert loss is not None
                for parameter, gradient in zip(self.trained.values(), gradients, strict=True):
                    parameter.grad = gradient
            else:
                with reducing(self.model, last):
                    loss = self.losses(batch, draws)
                    (loss.sum() / count * self.scale.factor).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _whole_step(self, scale: Tensor, *inputs: Tensor) -> list[Tensor | None]:
        """Errors and scaled gradients of all of a step's pairs, where they fit in one pass."""
        self.optimizer.zero_grad(set_to_none=True)  # a recording that was broken off may have left some
        errors = self._errors(*inputs)
        (errors.mean() * scale).backward()
        return [errors.detach(), *[parameter.grad for parameter in self.trained.values()]]

    def losses(self, batch: CachedBatch, draws: Draws) -> Tensor:
        """The weighted denoising error of each sample, with the hint and half of the captions: [B]."""
        return self._errors(*self._inputs(batch, draws))

    def _inputs(self, batch: CachedBatch, draws: Draws) -> list[Tensor]:
        """What the denoising error is a function of, on the device."""
        latents = sample_posterior(batch.mean, batch.std, draws.posterior)
        given = [
            latents,
            draws.noise,
            draws.timesteps,
            draws.drop_prompt,
            batch.kept_hint,
            *batch.text.tensors.values(),
        ]
        return [tensor.to(self.device) for tensor in given]

    def _errors(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, drop: Tensor, hint: Tensor, *text: Tensor
    ) -> Tensor:
        told = Text(*text).where(~drop, self.empty_text)
        noisy = add_noise(latents, noise, timesteps, self.schedule)
        wanted = target(latents, noise, timesteps, self.schedule)
        with self.autocast():
            output = self.model(noisy, self.schedule.times[timesteps], told, as_taken(hint))
        weights = loss_weights(timesteps, self.schedule, self.settings.weighting)
        return weights * loss_per_sample(output, wanted)

    def autocast(self) -> Any:
        """The precision that training computes in."""
        # Its cache would hold a second copy of all trained weights through the step: they are cast where they are used.
        return computing(self.precision, self.device, cached=False)

    def lr(self, step: int, part: str = "copy") -> float:
        """Of a step: a linear rise from when the part joined, then constant, then a linear fall where asked for."""
        settings = self.settings
        peak = settings.unlock_lr if part == "base" else settings.peak_lr
        rise = (step - self.joined[part] + 1) / max(1, settings.warmup)
        fall = (settings.steps - step) / (settings.decay * settings.steps) if settings.decay else 1.0
        return peak * min(1.0, rise, fall)

    def switch(self, phase: Phase, step: int) -> None:
        """Go on in another phase: what is trained already keeps its optimiser state, what joins starts afresh."""
        state = optimizer_state(self.optimizer, self.names)
        self.phase = phase
        self._open(step)
        restore_optimizer(self.optimizer, self.names, state)

    def _open(self, step: int) -> None:
        """Train what the phase asks for, and nothing else."""
        self.joined = {part: self.joined.get(part, step) for part in PARTS[self.phase]}
        self.control.links = self.average.links = "middle" if self.phase == "middle" else "all"
        self.control.requires_grad_(False)
        self.denoiser.requires_grad_(False)
        for part in self._parts().values():
            for parameter in part.values():
                parameter.requires_grad_(True)
        self.undo()
        self._end_optimizer()
        products: dict[nn.Parameter, Working] = {}  # trained weights whose gradients are products in bfloat16
        if isinstance(self.control, UNetControl):
            self.undo, products = self._speed_up()
        self.model: Any = wrap(self.inner, self.world, self.machine.parallel)
        if self._compiles():
            self.model = torch.compile(self.model, dynamic=False)
        parts = self._parts()  # again: sharding puts others in their place
        self.trained = {name: parameter for part in parts.values() for name, parameter in part.items()}
        self.names = {parameter: name for name, parameter in self.trained.items()}
        base = parts.get("base", {})
        self.original = {name: self.original.get(name, weight.detach().clone()) for name, weight in base.items()}
        self.averages = self._averaged_weights(base)
        lr = self.settings.peak_lr
        groups = [{"params": list(part.values()), "part": name, "lr": lr} for name, part in parts.items()]
        self.optimizer = make_optimizer(
            self.settings.optimizer, groups, weight_decay=self.settings.weight_decay, products=products
        )
        self.recorded = Recorded(self._whole_step, partial(self.say, "graph")) if self._can_record() else None
        if not self.sharded:
            self._collect()

    def _has_kernels(self) -> bool:
        """Whether our own kernels compute: of U-Nets on a CPU."""
        here = self.device.type == "cpu" and speeds_up(TYPES[self.precision]) and not self._compiles()
        return here and not self.sharded and isinstance(self.control, UNetControl)

    def _lies_last(self) -> bool:
        """Whether a GPU computes with channels last; for several processes it might differ from one to the other."""
        alone = self.world.size == 1 and not self._compiles() and isinstance(self.control, UNetControl)
        at_once = self._can_record() and self.mine == self.micro
        return alone and self.precision == "bf16" and pays(self.device, recorded=at_once)

    def _can_record(self) -> bool:
        """Whether a step's kernels are the same each time, and started here alone."""
        alone = self.world.size == 1 and not self.machine.gradient_checkpointing
        return (
            self.machine.cuda_graph and alone and self.device.type == "cuda" and isinstance(self.control, UNetControl)
        )

    def _compiles(self) -> bool:
        """Whether PyTorch's compiler makes the step's kernels."""
        alone = self.world.size == 1 and self.device.type == "cuda"
        # Not for a family made from U-Nets' that hooks its base anew at every step: each would be compiled.
        return self.machine.compile and alone and type(self.control) is UNetControl

    def _speed_up(self) -> tuple[Callable[[], None], dict[nn.Parameter, Working]]:
        """Compute the same with less. Returns: what ends that; and the trained weights that are cast once a step."""
        if self._has_kernels():
            with ExitStack() as undo:
                middle = self.phase == "middle"
                limits = dict(channels_from_below(self.denoiser)) if middle else {}
                sparing = not self.machine.pack_weights
                undo.callback(quicken(self.control, self.denoiser, channels=limits, sparing=sparing))
                if middle:
                    undo.callback(refuse_skips(self.denoiser))
                halved = self.precision == "bf16" and self.world.size == 1
                products = trained_products(self.inner) if halved else {}
                return undo.pop_all().close, products
        if self.phase == "unlocked" or self._compiles():  # the compiler keeps no more than it needs, either
            return lambda: None, {}
        return lighten_decoder(self.denoiser, skips=self.phase == "connected"), {}

    def close(self) -> None:
        """Leave the base without what training put into it, down to how its weights lie: another run rounds alike."""
        self.undo()
        self.lent.close()
        self.recorded = None
        self._end_optimizer()

    def give_back(self) -> None:
        """Leave the base's weights as they were found; what was learned of them is the averaged control's `base_delta`.

        After this nothing can be trained or averaged any more.
        """
        self.denoiser.requires_grad_(False)
        # Memory may have run out while the base was unlocked: then not all that was to be trained has an original.
        copy_into({name: self.trained[name] for name in self.original}, self.original)
        restore_attention(self.average)

    def _end_optimizer(self) -> None:
        """Gradients of its weights are float32 again, for whoever trains them next; before the first there is none."""
        if hasattr(self, "optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
            halve_gradients(self.optimizer, on=False)

    def _parts(self) -> dict[str, dict[str, nn.Parameter]]:
        return trained_parts(self.inner, self.phase, unlocks(self.settings))

    def _averaged_weights(self, base: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The averages by the names of what they average; of the control all, also what is not trained yet."""
        control = {f"control.{name}": parameter for name, parameter in self.control.named_parameters()}
        weights: dict[str, Tensor] = {**control, **base}
        if not self.settings.ema_decay:
            # Themselves, for an average of one takes no memory; as parameters, whose data may come to lie elsewhere.
            return weights
        before = self.averages
        if not self.sharded:
            before = {f"control.{name}": parameter for name, parameter in self.average.named_parameters()} | before
        return {name: before[name] if name in before else weight.detach().clone() for name, weight in weights.items()}

    def _halve(self) -> None:
        """Go on with half as many pairs per forward pass. Raises: TrainError: one is too many, or others wait."""
        if self.micro == 1:
            raise TrainError(f"out of memory with one pair per forward pass; {SAVE_MEMORY}")
        if self.world.size > 1:  # the other processes are in the middle of an exchange with this one
            least = f"train.batch to {self.micro // 2} and train.accumulate accordingly"
            raise TrainError(f"process {self.world.rank} ran out of memory; set {least}, and start again: it goes on")
        before, self.fits = self.micro, self.micro // 2
        self.recorded = None  # it holds a whole step's memory, and whole steps there are no more
        self.lies_last = self.lies_last and self._lies_last()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say("memory", f"out of memory with {before} pairs per forward pass: going on with {self.micro}, same step")

    def _find_bad(self, loss: float, norm: float, rows: Rows, losses: Tensor) -> tuple[str, ...]:
        """The samples behind a loss that is not finite; all of the step where only the gradient is not."""
        if torch.tensor([loss, norm]).isfinite().all():
            return ()
        mine = [id for id, fine in zip(rows.ids, losses.isfinite().tolist(), strict=True) if not fine]
        found = [id for some in gather(mine, self.world) for id in some]
        return tuple(found or [id for some in gather(rows.ids, self.world) for id in some])

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Move the averaged weights; while training is young the average is short, or it would remember the start."""
        weight = 1 - min(self.settings.ema_decay, (step + 1) / (step + 10))
        if self.settings.ema_decay:
            averages = [self.averages[name] for name in self.trained]
            torch._foreach_lerp_(averages, [trained.detach() for trained in self.trained.values()], weight)

    @contextmanager
    def averaged(self) -> Generator[Control]:
        """The averaged control as a user would load it, and meanwhile the base as that user has it.

        What an unlocked base has learned is the control's `base_delta`. Where the base is sharded it lies in the base
        instead: a stock pipeline then draws the same, and nothing has to be put together on one device.
        """
        if self.recorded is not None:
            self.recorded.forget()  # it would hold a step's memory while pictures are drawn
        base = self._unlocked()
        trained = {name: parameter.detach().clone() for name, parameter in base.items()}
        self._collect()
        self.average.base_delta = {} if self.sharded else self.base_delta()
        try:
            copy_into(base, self.averages if self.sharded else self.original)
            yield self.average
        finally:
            copy_into(base, trained)

    def _unlocked(self) -> dict[str, nn.Parameter]:
        """What is trained of the base."""
        return {name: parameter for name, parameter in self.trained.items() if name.startswith("base.")}

    def complete(self, control: Control) -> None:
        """Make the control that `averaged` gives ready for saving: all ranks must ask."""
        if self.sharded:
            control.base_delta = self.base_delta()

    def base_delta(self) -> dict[str, Tensor]:
        """What the averaged base differs by from the one that training began with; empty while it is locked."""
        original = {name.removeprefix("base."): full(weight) for name, weight in self.original.items()}
        return take_delta(original, {name: full(self.averages[f"base.{name}"].detach()) for name in original})

    @torch.no_grad()
    def _collect(self) -> None:
        """Let the averaged control hold what is averaged, where it does not anyway."""
        for name, parameter in self.average.named_parameters():
            averaged = self.averages[f"control.{name}"]
            if self.sharded:
                parameter.copy_(full(averaged))
            elif averaged.data_ptr() != parameter.data_ptr():
                parameter.data = averaged.detach()

    def tensors(self) -> dict[str, Tensor]:
        """All that is large in the state."""
        averages = {of_average(name): tensor.detach() for name, tensor in self._own_averages().items()}
        optimizer = optimizer_state(self.optimizer, self.names)
        return self._weights() | averages | {OPTIMIZER + name: tensor for name, tensor in optimizer.items()}

    def _weights(self) -> dict[str, Tensor]:
        """Of the control all, of the base what is trained."""
        control = {f"control.{name}": tensor for name, tensor in self.control.state_dict().items()}
        return control | {name: tensor.detach() for name, tensor in self._unlocked().items()}

    def _own_averages(self) -> dict[str, Tensor]:
        """Those that are not the weights themselves."""
        return self.averages if self.settings.ema_decay else {}

    def facts(self) -> dict[str, Any]:
        """All that is small in it. Random numbers are keyed by the step, so there are none."""
        return {
            "phase": self.phase,
            "joined": self.joined,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "fits": self.fits,
            "loss_scale": self.scale.state,
            "settings": dataclasses.asdict(self.settings),
            "cache": self.cache.fingerprint,
        }

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from a state. Raises: TrainError: the control was made otherwise."""
        if shapes(tensors, "control.") != shapes(self.control.state_dict()):
            raise TrainError(
                "this run cannot go on: the control was made otherwise, because its base, hint encoder or hint channels"
                " changed. Undo that, or start a run in another folder"
            )
        self.phase, self.joined = facts["phase"], dict(facts["joined"])
        self._open(max(self.joined.values()))
        self._check_trained(tensors, facts["settings"])
        self.skipped, self.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]
        self.fits = facts["fits"]
        if self.scale.on:
            self.scale.state = facts["loss_scale"]
        self.lies_last = self.lies_last and self._lies_last()
        copy_into(self._weights(), tensors)
        # Where there was none until now, it begins as the weights.
        averages = {name: tensors.get(of_average(name), tensors[name]) for name in self._own_averages()}
        copy_into(self._own_averages(), averages)
        optimizer = {name[len(OPTIMIZER) :]: tensor for name, tensor in tensors.items() if name.startswith(OPTIMIZER)}
        for name, tensor in optimizer.items():
            weight = self.trained[name.rpartition(".")[0]]
            optimizer[name] = spread(tensor, weight) if tensor.shape == weight.shape else tensor
        restore_optimizer(self.optimizer, self.names, optimizer)

    def _check_trained(self, tensors: Mapping[str, Tensor], began: Mapping[str, Any]) -> None:
        """Raises: TrainError: of the base other weights were trained than would be from now on."""
        wanted = self.trained if unlocks(self.settings) else ()
        before, now = ({name for name in names if name.startswith("base.")} for names in (tensors, wanted))
        if before != now:
            trained = f"{len(before)} of the base's weights, and would go on with {len(now)}"
            back = f"train.regime back to {began['regime']!r} and train.unlock back to {began['unlock']!r}"
            remedy = f"set {back}, or start a run in another folder"
            raise TrainError(f"this run cannot go on: it has trained {trained}; {remedy}")


def of_average(name: str) -> str:
    """Under which name the average of a weight is kept."""
    return (
        name.replace("control.", "average.", 1)
        if name.startswith("control.")
        else "base_average." + name.removeprefix("base.")
    )


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """Shared out over ranks as the other tensor is, if it is; all ranks must ask."""
    if isinstance(like, DTensor) and not isinstance(whole, DTensor):
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return whole


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Overwrite each target by the source of its name."""
    for name, tensor in targets.items():
        tensor.copy_(spread(sources[name], tensor))


def shapes(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, torch.Size]:
    """By name without the prefix; names without it are left out."""
    return {name.removeprefix(prefix): tensor.shape for name, tensor in weights.items() if name.startswith(prefix)}
