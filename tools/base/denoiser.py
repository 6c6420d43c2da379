"""Train the base's U-Net and text encoder together, on latents.

In: `frozen/` (autoencoder and latents) and `pictures.zip` (for the names). Out: `denoiser.pt` (resumable) and
`model/`, the whole base in diffusers format, float32, averaged weights. `export.py` makes the shipped copy of it.

    python tools/base/denoiser.py --steps 6000                  # two CPU cores: some hours; stop and resume at will
    python tools/base/denoiser.py --batch 512 --lr 1.8e-3 --ema 0.998 --steps 99999 --minutes 7 --finish   # a GPU
"""

import argparse
import copy
import json
import time
from collections import Counter
from pathlib import Path

import captions
import latents
import numpy as np
import pictures
import state
import tokenizer as words
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bridle.base.schedule import read_schedule
from bridle.kernels.record import Recorded
from bridle.train.memory import keep_freed_memory
from bridle.train.objective import loss_weights

EMPTY_SHARE = 0.12  # of the captions, for classifier-free guidance
PLAIN_SHARE = 0.25  # of the draws of an emoji that show the picture as it is
KIND_SHARES = {"fluent": 0.38, "noto": 0.08, "scene": 0.54}
TEXT_WIDTH = 256


def build_unet(channels: int) -> UNet2DConditionModel:
    """Four levels of two layers, as in SD 1, so 13 links; attention from 8x8 down, where it is cheap."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 96, 192, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=words.LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """A linear schedule that ends in far more noise than SD's; sampling starts there ("trailing", arXiv:2305.08891).

    SD's leaves 7% of the picture's amplitude in the last timestep, and the mean over 16x16 latents is 16 times clearer
    than one of them: the net read layout and colour off the noise, and drew the same blobs whatever the prompt. Here 2%
    is left.
    """
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.015,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


class Views:
    """Draws training batches: which view, which words, how much noise; keyed by the step."""

    def __init__(self, folder: Path, concepts: list[pictures.Concept]) -> None:
        self.mean, self.std, self.views = latents.load(folder)
        self.concepts = concepts
        count = Counter((view.kind, view.concept) for view in self.views)
        weights = np.array([self._weight(view, count[view.kind, view.concept]) for view in self.views])
        totals = Counter[str]()
        for view, weight in zip(self.views, weights, strict=True):
            totals[view.kind] += weight
        shares = np.array([KIND_SHARES[view.kind] / totals[view.kind] for view in self.views])
        self.odds = weights * shares / (weights * shares).sum()

    def _weight(self, view: latents.View, count: int) -> float:
        """How often a view is drawn, relative to the others of its kind."""
        if view.concept is None:
            return 1.0
        share = PLAIN_SHARE if view.number == 0 else (1 - PLAIN_SHARE) / max(count - 1, 1)
        return captions.GROUP_WEIGHTS[self.concepts[view.concept].group] * share

    def caption(self, row: int, rng: np.random.Generator) -> str:
        view = self.views[row]
        if view.scene is not None:
            return captions.scene_caption(view.scene, rng)
        said = captions.caption(self.concepts[view.concept], view.colour, view.ground, view.recoloured, rng)
        return captions.in_style(said, view.kind, rng)

    def draw(self, step: int, batch: int) -> tuple[Tensor, list[str], Tensor, Tensor]:
        """Returns: clean latents [B, C, 16, 16], B captions, noise like the latents, timesteps [B]."""
        rng = np.random.default_rng(step)
        rows = rng.choice(len(self.views), batch, p=self.odds)
        said = ["" if rng.random() < EMPTY_SHARE else self.caption(int(row), rng) for row in rows]
        generator = torch.Generator().manual_seed(step)
        mean, std = self.mean[rows], self.std[rows]
        clean = mean + std * torch.randn(mean.shape, generator=generator)
        # One timestep from each of B equal slices: the loss of a step depends less on luck.
        slices = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        return clean, said, torch.randn(mean.shape, generator=generator), (slices * 1000).long()


def make_optimizers(model: nn.Module) -> state.Optimizers:
    """Muon inside, AdamW for what reads and writes.

    Measured on this model from the same state: 90 steps of Muon lowered the loss as far as 300 of AdamW, at 1.7 times
    the time of a step (batch 32, two cores), so more than twice as fast; a larger batch pays for Muon's products.
    """
    inner = {
        name
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and not any(edge in name for edge in ("embedding", "conv_in", "conv_out"))
    }
    return state.Optimizers(model, inner, weight_decay=0.01, fused=True)


def learn_words(views: Views, folder: Path) -> CLIPTokenizer:
    if not (folder / "tokenizer.json").exists():
        rng = np.random.default_rng(0)
        spoken = [views.caption(row, rng) for row in range(len(views.views)) for _ in range(2)]
        words.learn(
            spoken + [" ".join((*captions.COLOURS, *captions.GROUNDS, *captions.ALIASES.values()))] * 20, folder
        )
    return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def begin_from(folder: Path, model: nn.ModuleDict, tokenizer: CLIPTokenizer) -> None:
    """Take over the weights of an earlier base.

    A token that it does not know begins as the mean of its pieces, a latent channel that it has not as nothing.
    """
    wanted = model["unet"].state_dict()
    for name, weight in UNet2DConditionModel.from_pretrained(folder / "unet").state_dict().items():
        wanted[name].zero_()[tuple(slice(size) for size in weight.shape)] = weight
    before, known = (
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )
    weights = before.state_dict()
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    old, vocabulary = weights.pop(name).float(), known.get_vocab()
    new = model["text_encoder"].get_input_embeddings().weight
    for word, index in tokenizer.get_vocab().items():
        whole = vocabulary.get(word)
        pieces = [whole] if whole is not None else known(word.removesuffix("</w>"), add_special_tokens=False).input_ids
        if pieces:
            new[index] = old[pieces].mean(0)
    missing, unexpected = model["text_encoder"].load_state_dict(weights, strict=False)
    assert set(missing) <= {name}, missing
    assert not unexpected, unexpected


def train(args: argparse.Namespace) -> None:
    device, started = state.pick_device(), time.time()
    concepts, _ = pictures.load(args.pictures)
    views = Views(args.out / "frozen", concepts)
    tokenizer = learn_words(views, args.out / "tokenizer")
    scheduler = build_scheduler()
    schedule = read_schedule(scheduler)

    torch.manual_seed(0)
    unet = build_unet(channels=views.mean.shape[1])
    model = nn.ModuleDict({"unet": unet, "text_encoder": build_text_encoder(tokenizer)}).to(device)
    if device.type == "cpu":
        # The backward pass of flash attention is 41% of the step on CPU; plain products are faster at this size.
        model["unet"].set_attn_processor(AttnProcessor())
        keep_freed_memory()
    saved = state.load(args.out / "denoiser.pt")
    if saved is None and args.start is not None:
        begin_from(args.start, model, tokenizer)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = make_optimizers(model)
    step = 0
    if saved is not None:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        print(f"resumed at step {step}", flush=True)

    def draw(step: int) -> tuple[Tensor, ...]:
        clean, said, noise, timesteps = views.draw(step, args.batch)
        ids = tokenizer(said, padding="max_length", truncation=True, return_tensors="pt").input_ids
        weights = loss_weights(timesteps, schedule, "balanced")
        return ids, scheduler.add_noise(clean, noise, timesteps), noise, timesteps, weights

    def move(ids: Tensor, noisy: Tensor, noise: Tensor, timesteps: Tensor, weights: Tensor) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            text = model["text_encoder"](ids)[0]
            output = denoise(noisy, timesteps, text).sample
        loss = (weights * (output.float() - noise).square().mean((1, 2, 3))).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return [loss.detach()]

    denoise = torch.compile(model["unet"], dynamic=False) if args.compile else model["unet"]
    first, losses, recorded = step, [], Recorded(move, print)
    pace = state.Pace(steps=args.steps, minutes=args.minutes, finish=args.finish, warmup=300)
    draws = state.ahead(draw, range(step, args.steps))
    while pace.goes_on(step):
        (loss,) = recorded(*[drawn.to(device, non_blocking=True) for drawn in next(draws)])
        optimizer.take(args.lr * pace.lr(step))
        state.average(ema, model, step, decay=args.ema)
        losses.append(loss.clone())
        step += 1
        if step % args.report == 0:
            speed = args.batch * (step - first) / (time.time() - started)
            mean = torch.stack(losses).mean().item()
            print(json.dumps({"step": step, "loss": round(mean, 4), "samples_per_s": round(speed, 1)}), flush=True)
            losses.clear()
        if step % args.save_every == 0:
            write(args.out, model, ema, optimizer, step, tokenizer, scheduler)
    write(args.out, model, ema, optimizer, step, tokenizer, scheduler)


def write(
    out: Path,
    model: nn.ModuleDict,
    ema: nn.ModuleDict,
    optimizer: state.Optimizers,
    step: int,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
) -> None:
    state.save(
        out / "denoiser.pt",
        {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
    )
    StableDiffusionPipeline(
        unet=ema["unet"],
        vae=AutoencoderKL.from_pretrained(out / "frozen" / "vae"),
        text_encoder=ema["text_encoder"],
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("work/base/pictures.zip"))
    parser.add_argument("--out", type=Path, default=Path("work/base"))
    parser.add_argument("--start", type=Path, help="a base to begin from, such as src/bridle/base/embedded/v2")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--ema", type=float, default=0.996)
    parser.add_argument("--minutes", type=float, default=1e9, help="leave, saved, after so long")
    parser.add_argument("--finish", action="store_true", help="let the learning rate fall towards the minutes' end")
    parser.add_argument("--compile", action="store_true", help="the U-Net, which takes a minute or two at first")
    parser.add_argument("--report", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=200)
    train(parser.parse_args())
