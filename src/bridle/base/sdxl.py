"""SDXL: a U-Net told of two text encoders' states, one vector per caption, and the size of the picture."""

from typing import Any

from bridle.base.family import Family
from bridle.control.text import Text


def encode(pipeline: Any, captions: list[str]) -> Text:
    states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    return Text(states, pooled)


FAMILY = Family(
    name="SDXL",
    parts=("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    encode=encode,
    text_to_image="StableDiffusionXLPipeline",
    image_to_image="StableDiffusionXLImg2ImgPipeline",
    inpaint="StableDiffusionXLInpaintPipeline",
    scheduler="ddim",
)
