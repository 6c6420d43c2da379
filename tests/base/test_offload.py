"""What training does not need goes and comes back as it was."""

import tiny
import torch

from bridle.base.base import Base
from bridle.base.offload import offloaded


def held_bytes(base: Base) -> int:
    parts = (base.pipeline.vae, base.pipeline.text_encoder)
    return sum(p.untyped_storage().nbytes() for part in parts for p in part.parameters())


def test_encoders_give_their_memory_back_and_are_whole_whenever_something_is_drawn() -> None:
    base = tiny.make_base()
    image, before = torch.rand(1, 3, 64, 64) * 2 - 1, held_bytes(base)
    mean, text = base.encode_images(image)[0], base.encode_captions(["a red disc"]).states
    with offloaded(base) as drawing:
        assert held_bytes(base) == 0
        for _ in range(2):
            with drawing():
                assert torch.equal(base.encode_images(image)[0], mean)
                assert torch.equal(base.encode_captions(["a red disc"]).states, text)
            assert held_bytes(base) == 0
    assert held_bytes(base) == before
    assert torch.equal(base.encode_captions(["a red disc"]).states, text)


def test_where_it_is_not_wanted_nothing_moves() -> None:
    base = tiny.make_base()
    with offloaded(base, wanted=False) as drawing, drawing():
        assert held_bytes(base) > 0
