"""How much of a caption the text encoders read. Out: tokens, and drawing and encoding without a warning a picture."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from bridle.base.family import Family

# The first also prints all the padding behind what it cut; both come again and again.
WARNINGS = ("The following part of your input was truncated", "Token indices sequence length is longer")
TRANSFORMERS = "transformers.tokenization_utils_base"


def longest_reader(pipeline: Any, family: Family) -> tuple[Any, int]:
    """The tokenizer whose encoder reads most, and how many tokens that are; (None, 0) where there is none."""
    encoders = [name for name in family.encoders if getattr(pipeline, name, None) is not None]
    names = [name.replace("text_encoder", "tokenizer") for name in encoders]
    readers = [(getattr(pipeline, name), family.limits.get(name)) for name in names]
    found = [(reader, limit or int(reader.model_max_length)) for reader, limit in readers]
    return max(found, key=lambda pair: pair[1], default=(None, 0))


def count_tokens(tokenizer: Any, captions: list[str]) -> list[int]:
    """Of each caption, uncut, those at its ends included."""
    return [len(tokens) for tokens in tokenizer(captions, verbose=False).input_ids]


@contextmanager
def quiet_about_cuts(pipeline: Any) -> Generator[None]:
    """Meanwhile a prompt that is too long is cut without a warning."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(WARNINGS)

    loggers = [logging.getLogger(name) for name in (type(pipeline).__module__, TRANSFORMERS)]
    for logger in loggers:
        logger.addFilter(other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(other)
