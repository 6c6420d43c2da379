"""How the embedded base is trained: what its captions say, what it is shown and how often. Nothing here trains."""

import io
import json
import pickle
import zipfile
from collections import Counter
from dataclasses import asdict

import autoencoder
import captions
import denoiser
import latents
import numpy as np
import perceptual
import pictures
import pytest
import state
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from transformers import CLIPTokenizer

from bridle.base.load import embedded_folder, load_base

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


@torch.no_grad()
def test_an_autoencoder_with_more_latent_channels_begins_as_the_earlier_one(tmp_path):
    old, new, picture = autoencoder.build(4), autoencoder.build(6), torch.rand(1, 3, 64, 64) * 2 - 1
    torch.nn.init.normal_(old.quant_conv.bias)
    old.save_pretrained(tmp_path)
    autoencoder.begin_from(tmp_path, new)
    wanted, got = old.encode(picture).latent_dist, new.encode(picture).latent_dist
    for theirs, ours in ((wanted.mean, got.mean), (wanted.logvar, got.logvar)):
        torch.testing.assert_close(ours[:, :4], theirs)
        assert ours[:, 4:].any()
    torch.testing.assert_close(new.decode(got.mean).sample, old.decode(wanted.mean).sample)


@torch.no_grad()
def test_a_unet_with_more_latent_channels_begins_as_the_earlier_one():
    earlier = embedded_folder()
    tokenizer = CLIPTokenizer.from_pretrained(earlier / "tokenizer")
    model = torch.nn.ModuleDict(
        {"unet": denoiser.build_unet(channels=10), "text_encoder": denoiser.build_text_encoder(tokenizer)}
    )
    denoiser.begin_from(earlier, model, tokenizer)
    ids = tokenizer(["a red chair"], padding="max_length", return_tensors="pt").input_ids
    noisy, timesteps = torch.randn(1, 10, 16, 16), torch.tensor([500])
    old = load_base("embedded").pipeline
    wanted = old.unet(noisy[:, :8], timesteps, old.text_encoder(ids)[0]).sample
    got = model["unet"](noisy, timesteps, model["text_encoder"](ids)[0]).sample
    torch.testing.assert_close(got[:, :8], wanted, rtol=1e-4, atol=1e-4)
    assert not got[:, 8:].any()


def train_a_little(move):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 4))
    for step in range(4):
        net(torch.randn(3, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        move(net, step)
        net.zero_grad()
    return [weight.detach().clone() for weight in net.parameters()]


def test_a_share_of_a_full_move_is_a_move_at_that_rate():
    rates, ours, theirs = [0.1, 0.05, 0.02, 0.01], [], []

    def by_share(net, step):
        if not ours:
            ours.append(state.Optimizers(net, {"0.weight"}, weight_decay=0.1, fused=False))
        ours[0].step()
        ours[0].take(rates[step])

    def by_rate(net, step):
        if not theirs:
            matrix, *rest = net.parameters()
            how = {"lr": 1.0, "weight_decay": 0.1}
            theirs.append(torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw", **how))
            theirs.append(torch.optim.AdamW(rest, betas=(0.9, 0.99), **how))
        for optimizer in theirs:
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.step()

    for a, b in zip(train_a_little(by_share), train_a_little(by_rate), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_state_of_another_rate_and_device_goes_on_at_the_full_move():
    net = torch.nn.Linear(4, 3)
    net(torch.ones(2, 4)).sum().backward()
    first, second = (state.Optimizers(net, {"weight"}, weight_decay=0.1, fused=False) for _ in range(2))
    first.step()
    saved = first.state_dict()
    for one in saved:  # as an earlier version left it, and as a GPU does
        one["param_groups"][0] |= {"lr": 1e-5, "capturable": True}
    second.load_state_dict(saved)
    before = net.bias.detach().clone()
    second.step()
    assert (net.bias - before).abs().min() > 0.5
    assert [optimizer.param_groups[0]["lr"] for optimizer in second.all] == [1.0, 1.0]
    assert len(second.state_dict()[1]["state"]) == 1


def test_a_lent_machines_training_ends_with_a_small_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    pace = state.Pace(steps=10**6, minutes=1, finish=True, warmup=2)
    rates = []
    for step, now_s in enumerate((20.0, 21.0, 40.0, 59.9)):  # 20 s until the first step, for what is compiled
        now[0] = now_s
        assert pace.goes_on(step)
        rates.append(pace.lr(step))
    assert rates == pytest.approx([0.5, 0.998, 0.51, 0.02], abs=0.01)
    now[0] = 60.0
    assert not pace.goes_on(4)


def test_perceptual_weights_are_read_without_running_anything():
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    with pytest.raises(pickle.UnpicklingError, match="is no NumPy array"):
        perceptual.ArraysOnly(io.BytesIO(pickle.dumps(Harm()))).load()
    array = np.arange(3.0)
    found = perceptual.ArraysOnly(
        io.BytesIO(pickle.dumps({"a": array}, protocol=3).replace(b"numpy._core", b"numpy.core"))
    ).load()
    assert found["a"].tolist() == array.tolist()
