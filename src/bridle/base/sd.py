"""Stable Diffusion 1 and 2: a U-Net and one text encoder; predicts noise, or velocity (2.x at 768 px)."""

from typing import Any

from bridle.base.family import Family
from bridle.control.text import Text


def encode(pipeline: Any, captions: list[str]) -> Text:
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    length = tokenizer.model_max_length
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return Text(encoder(tokens.input_ids.to(encoder.device))[0])


FAMILY = Family(
    name="Stable Diffusion",
    parts=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    encode=encode,
    text_to_image="StableDiffusionPipeline",
    image_to_image="StableDiffusionImg2ImgPipeline",
    inpaint="StableDiffusionInpaintPipeline",
    scheduler="ddim",
)
