"""Flux.1: a transformer told of T5's states and CLIP's vector per caption; predicts the flow from picture to noise."""

from typing import Any

from bridle.base.family import Family
from bridle.control.text import Text


def encode(pipeline: Any, captions: list[str]) -> Text:
    states, pooled, _ = pipeline.encode_prompt(captions, captions)
    return Text(states, pooled)


FAMILY = Family(
    name="Flux.1",
    parts=("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    encode=encode,
    text_to_image="FluxPipeline",
    image_to_image="FluxImg2ImgPipeline",
    inpaint="FluxInpaintPipeline",
    scheduler="flow-euler",
    limits={"tokenizer_2": 512},  # what encode_prompt has T5 read
    schedulers=("flow-euler",),  # its pipelines choose the noise levels themselves, which Heun's does not take
)
