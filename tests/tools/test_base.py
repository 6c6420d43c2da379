"""How the embedded base is trained: what its captions say, what it is shown and how often. Nothing here trains."""

import io
import json
import zipfile
from collections import Counter
from dataclasses import asdict

import autoencoder
import captions
import denoiser
import latents
import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import structural_similarity

ABOUT = {
    "caption": "a blue leather armchair on a wooden floor in front of a red wall",
    "things": [{"name": "armchair", "colour": "blue", "material": "leather"}],
    "floor": {},
    "wall": {},
}


def concept(**changes):
    facts = {
        "hexcode": "1f34e", "style": pictures.FLUENT, "label": "apple", "tags": (), "group": "food-drink",
        "skin_tone": False, "held_out": False,
    }  # fmt: skip
    return pictures.Concept(**{**facts, **changes})


def pack_emoji(path, concepts):
    with zipfile.ZipFile(path, "w") as archive:
        for place, each in enumerate(concepts):
            buffer = io.BytesIO()
            Image.new("RGBA", (128, 128), (200, 10 * place, 0, 255)).save(buffer, "WEBP", lossless=True)
            archive.writestr(f"{each.style}/{each.hexcode}.webp", buffer.getvalue())
        archive.writestr("concepts.jsonl", "\n".join(json.dumps(asdict(each)) for each in concepts))
    return path


def test_a_scene_is_said_whole_or_in_fewer_words_but_never_in_others():
    rng = np.random.default_rng(0)
    said = {captions.scene_caption(ABOUT, rng) for _ in range(200)}
    assert said == {
        ABOUT["caption"],
        "a blue leather armchair",
        "a blue armchair on a wooden floor in front of a red wall",
        "a blue armchair",
    }


def test_without_its_material_a_thing_gets_the_right_article():
    about = {**ABOUT, "caption": "a leather armchair", "things": [{"name": "armchair", "material": "leather"}]}
    rng = np.random.default_rng(0)
    assert {captions.scene_caption(about, rng) for _ in range(100)} == {"a leather armchair", "an armchair"}


def test_flat_drawings_are_always_called_flat_and_others_never():
    rng = np.random.default_rng(0)
    flat, solid = (
        {captions.in_style("a pear", style, rng) for _ in range(50)} for style in (pictures.NOTO, pictures.FLUENT)
    )
    assert all("flat" in said for said in flat)
    assert "a pear" in solid
    assert not any("flat" in said for said in solid)


def test_what_is_held_out_is_not_encoded(tmp_path):
    kept, held_out, flat = concept(), concept(hexcode="1f350", held_out=True), concept(style=pictures.NOTO)
    views = [draw()[1] for draw in latents.emoji_views(pack_emoji(tmp_path / "p.zip", [kept, held_out, flat]))]
    assert Counter(view.concept for view in views) == {0: latents.VIEWS["fluent"], 2: latents.VIEWS["noto"]}


def test_held_out_scenes_are_not_encoded_and_the_others_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as archive:
        for number, _split in enumerate(("train", "held_out")):
            buffer = io.BytesIO()
            pixels = np.zeros((128, 128, 3), np.uint8)
            pixels[:, :64] = 255
            Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
            archive.writestr(f"{number:06}.webp", buffer.getvalue())
        rows = [{**ABOUT, "number": number, "split": split} for number, split in enumerate(("train", "held_out"))]
        archive.writestr("scenes.jsonl", "\n".join(json.dumps(row) for row in rows))
    (plain, first), (mirrored, second) = (draw() for draw in latents.scene_views(tmp_path / "scenes.zip"))
    assert first.scene["caption"] == second.scene["caption"] == ABOUT["caption"]
    assert np.array_equal(plain, mirrored[:, ::-1])
    assert plain[0, 0, 0] == 1


def test_each_kind_of_picture_is_drawn_as_often_as_it_should_be(tmp_path):
    concepts = [concept(), concept(hexcode="1f350", group="smileys-emotion"), concept(style=pictures.NOTO)]
    views = [latents.View(kind="fluent", number=n, concept=c) for c in (0, 1) for n in range(10)]
    views += [latents.View(kind="noto", number=n, concept=2) for n in range(4)]
    views += [latents.View(kind="scene", number=n, scene=ABOUT) for n in (0, 1)]
    blank = torch.zeros(len(views), 4, 2, 2)
    save_file({"mean": blank, "std": blank.clone()}, tmp_path / "latents.safetensors")
    (tmp_path / "views.jsonl").write_text("\n".join(json.dumps(asdict(view)) for view in views))
    drawn = denoiser.Views(tmp_path, concepts)
    for kind, share in denoiser.KIND_SHARES.items():
        assert sum(drawn.odds[[v.kind == kind for v in views]]) == pytest.approx(share)
    assert drawn.odds[0] == pytest.approx(drawn.odds[1] * 3)  # the picture as it is: a quarter of its concept's


def test_the_autoencoder_is_trained_on_the_similarity_that_is_measured():
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (32, 32)).astype(np.float32)
    b = np.clip(a + rng.normal(0, 0.3, a.shape), -1, 1).astype(np.float32)
    expected = structural_similarity(
        a + 1, b + 1, win_size=7, data_range=2.0, gaussian_weights=False, use_sample_covariance=False
    )
    tensors = [torch.from_numpy(x).expand(1, 3, -1, -1) for x in (a, b)]
    assert autoencoder.similarity(*tensors).mean().item() == pytest.approx(expected, abs=1e-5)
    assert autoencoder.similarity(tensors[0], tensors[0]).mean().item() == pytest.approx(1.0)
