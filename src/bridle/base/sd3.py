"""Stable Diffusion 3 and 3.5: a transformer told of three text encoders; predicts the flow from picture to noise.

The third, T5, is much the largest, and may be left out: the base is then told zeros in its place.
"""

from typing import Any

from bridle.base.family import Family
from bridle.control.text import Text


def encode(pipeline: Any, captions: list[str]) -> Text:
    states, _, pooled, _ = pipeline.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
    return Text(states, pooled)


FAMILY = Family(
    name="Stable Diffusion 3",
    parts=("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    optional=("text_encoder_3", "tokenizer_3"),
    encode=encode,
    text_to_image="StableDiffusion3Pipeline",
    image_to_image="StableDiffusion3Img2ImgPipeline",
    inpaint="StableDiffusion3InpaintPipeline",
    scheduler="flow-euler",
    limits={"tokenizer_3": 256},  # what encode_prompt has T5 read
)
