"""Rewards: our score against the library's own modules on random weights, preprocessing, errors.

    pytest -q test_rewards.py
"""
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import toyworld
from rewards import crop, load_reward, pad, warn_cut


def picture(w=40, h=40, mode="RGB", seed=0):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8))
    return image if mode == "RGB" else image.convert(mode)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random-weight reward models in the layouts of the real ones."""
    root, tok, out = tmp_path_factory.mktemp("rewards"), toyworld.make_tokenizer(), {}
    for i, name in enumerate(("clip", "hps", "pick")):
        torch.manual_seed(i)
        toyworld.save_reward(name, toyworld.build_reward(name, tok), tok, root / name)
        out[name] = root / name
    return out


TEXTS = ["a red circle", "two squares", "a photo of a cross left of a circle"]


def test_open_clip_scores_are_open_clips_cosine(folders):
    images = [picture(seed=s) for s in range(3)]
    model = open_clip.CLIP(**json.loads((folders["clip"] / "open_clip_config.json").read_text())["model_cfg"]).eval()
    model.load_state_dict({k: v.float() for k, v in load_file(folders["clip"] / "open_clip_model.safetensors").items()})
    ids = toyworld.make_tokenizer()(TEXTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = model.encode_image(torch.stack([pad(i, 32) for i in images]), normalize=True), model.encode_text(ids, normalize=True)
    for name in ("clip", "hpsv2.1", "hpsv2"):
        score = load_reward(f"{name}={folders['clip']}")
        assert torch.allclose(score(images, TEXTS), (a * b).sum(-1), atol=1e-5)


def test_pickscore_is_the_diagonal_of_clipmodels_logits(folders):
    from transformers import CLIPModel
    images = [picture(seed=s) for s in range(3)]
    model = CLIPModel.from_pretrained(folders["pick"], dtype=torch.float32).eval()
    ids = toyworld.make_tokenizer()(TEXTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.stack([crop(i, 32) for i in images])).logits_per_image
    assert torch.allclose(load_reward(f"pickscore={folders['pick']}")(images, TEXTS), logits.diagonal(), atol=1e-4)


def test_an_hps_checkpoint_file_loads_by_its_state_dict(folders, tmp_path, monkeypatch):
    """HPSv2's file is {"state_dict": ...} for ViT-H-14; a small architecture stands in for that name here."""
    config = json.loads((folders["hps"] / "open_clip_config.json").read_text())["model_cfg"]
    torch.save({"state_dict": load_file(folders["hps"] / "open_clip_model.safetensors")}, tmp_path / "hps.pt")
    tok = toyworld.make_tokenizer()
    ids = lambda texts: tok(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    ids.encode = lambda text: tok(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(open_clip, "create_model", lambda name: open_clip.CLIP(**config))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: ids)
    images = [picture(seed=s) for s in range(3)]
    from_file = load_reward(f"hpsv2.1={tmp_path / 'hps.pt'}")(images, TEXTS)
    assert torch.allclose(from_file, load_reward(f"hpsv2.1={folders['hps']}")(images, TEXTS), atol=1e-6)
    torch.save({"state_dict": {"wrong": torch.zeros(1)}}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit, match="bad.pt.*missing"):
        load_reward(f"hpsv2.1={tmp_path / 'bad.pt'}")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "hps.pt").read_bytes()[:1000])
    with pytest.raises(SystemExit, match="torn.pt"):
        load_reward(f"hpsv2.1={tmp_path / 'torn.pt'}")


def test_batches_do_not_change_scores(folders):
    images, texts = [picture(seed=s) for s in range(7)], (TEXTS * 3)[:7]
    score = load_reward(f"pickscore={folders['pick']}")
    assert torch.allclose(score(images, texts, batch_size=1), score(images, texts, batch_size=7), atol=1e-4)


@pytest.mark.parametrize("size", [(40, 40), (64, 24), (24, 64), (32, 32), (200, 1), (33, 47)])
def test_crop_is_openais_preprocessing(size):
    """Against torchvision's transforms on PIL images, which open_clip and the original CLIP use."""
    from torchvision import transforms as T
    image = picture(*size)
    reference = T.Compose([T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(),
                           T.Normalize((.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711))])(image)
    ours = crop(image, 32)
    assert ours.shape == (3, 32, 32)
    if (max(size) * 32 // min(size) - 32) % 2 == 0:                             # odd margins: half a pixel is rounded by taste
        assert torch.allclose(ours, reference, atol=1e-6)


def test_pad_keeps_the_whole_picture():
    wide = pad(picture(64, 16), 32)                                             # 64 x 16 -> 32 x 8, centred
    black = -torch.tensor([.48145466, .4578275, .40821073]) / torch.tensor([.26862954, .26130258, .27577711])
    assert wide.shape == (3, 32, 32) and torch.allclose(wide[:, :12], black[:, None, None].expand(3, 12, 32)) and torch.allclose(wide[:, 20:], wide[:, :12])
    assert not torch.allclose(wide[:, 12:20], wide[:, :8])
    assert pad(picture(300, 1), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_image_mode_is_scored(folders, mode):
    s = load_reward(f"clip={folders['clip']}")([picture(mode=mode)], ["a circle"])
    assert s.shape == (1,) and s.isfinite().all()


def test_long_prompts_are_cut_and_said_so_once(folders, capsys):
    warn_cut.said.clear()
    score = load_reward(f"clip={folders['clip']}")
    for _ in range(2):
        score([picture()], ["circle " * 40])
    assert capsys.readouterr().err.count("cut at 16") == 1


def test_the_checker_is_a_scorer():
    rng = np.random.default_rng(0)
    prompts = ["two circles", "a red square"]
    images = [toyworld.render(p, rng) for p in prompts]
    assert load_reward("toyworld")(images, prompts).tolist() == [1, 1] and load_reward("toyworld")(images[::-1], prompts).tolist() == [0, 0]


def test_errors_are_one_clear_line(folders, tmp_path):
    for spec, says in (("beauty", "unknown reward"), ("clip=nowhere", "no such file"), (f"pickscore={tmp_path}", "pickscore="), (f"clip={tmp_path}", "open_clip_config")):
        with pytest.raises(SystemExit, match=says) as e:
            load_reward(spec)
        assert "\n" not in str(e.value)
    score = load_reward(f"clip={folders['clip']}")
    with pytest.raises(ValueError, match="empty prompt"):
        score([picture()], [" "])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        score([picture(), picture()], ["a circle"])
