"""Reward models behind one function: load_reward(name, device) -> score(images, prompts) -> (N,) float tensor.

    python rewards.py --image picture.png --prompt "a red circle"          # every toy reward on one picture
    python rewards.py --image a.png --prompt "a cat" --rewards pickscore hpsv2.1=HPS_v2.1_compressed.pt

A reward is a name, or name=source with a local folder or file. Larger is better, always.

    name       model, default source                                    licence     score
    clip       open_clip ViT-H-14, laion2b_s32b_b79k                    MIT         cosine, -1 to 1
    hpsv2.1    open_clip ViT-H-14, xswu/HPSv2 HPS_v2.1_compressed.pt    Apache-2.0  cosine, about .2 to .35
    hpsv2      the same, HPS_v2_compressed.pt                           Apache-2.0  cosine, about .2 to .3
    pickscore  transformers CLIPModel, yuvalkirstain/PickScore_v1       MIT         exp(logit_scale) * cosine, about 15 to 25
    toyworld   the exact checker of toyworld.py, for evaluation only                1 = the image shows the prompt, else 0

Text beyond a model's context (77 tokens for CLIP) is cut, and says so once. Everything runs in fp32.
"""
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

MEAN = torch.tensor([.48145466, .4578275, .40821073])[:, None, None]           # of every CLIP
STD = torch.tensor([.26862954, .26130258, .27577711])[:, None, None]
HERE = Path(__file__).resolve().parent
TOY_REWARDS = tuple(f"{name}={HERE / 'toy/rewards' / folder}" for name, folder in (("clip", "clip"), ("hpsv2.1", "hps"), ("pickscore", "pick")))

# ----------------------------------------------------------------------------- images and text


def crop(image, size):
    """OpenAI CLIP's preprocessing: shorter side to `size` by PIL bicubic, centre crop, normalise -> (3, size, size)."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = (w - size) // 2, (h - size) // 2
    image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - MEAN) / STD


def pad(image, size):
    """HPSv2's preprocessing: LONGER side to `size` by bicubic with antialias on the float tensor, zero-padded to a
    centred square, then normalised -> (3, size, size). open_clip's own crop would cut non-square images."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None] / 255
    h, w = x.shape[-2:]
    h, w = (size, max(1, int(size * w / h))) if h >= w else (max(1, int(size * h / w)), size)
    if (h, w) != tuple(x.shape[-2:]):
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
    left, top = (size - w) // 2, (size - h) // 2
    x = F.pad(x, (left, size - w - left, top, size - h - top))[0]
    return (x - MEAN) / STD


def warn_cut(lengths, limit, name):
    if max(lengths) > limit and name not in warn_cut.said:
        warn_cut.said.add(name)
        print(f"{name}: a prompt of {max(lengths)} tokens is cut at {limit}; said once", file=sys.stderr)


warn_cut.said = set()

# ----------------------------------------------------------------------------- the CLIP family


def clip_scorer(name, encode_image, encode_text, tokenize, prepare, size, device, scale=1.):
    """score(images, prompts) = scale * cosine(image, text): the formula of every CLIP-type reward.

    encode_image: (N, 3, size, size) -> (N, D); tokenize: list of str -> (N, L) ids; prepare: PIL image -> (3, size, size)."""
    @torch.inference_mode()
    def score(images, prompts, batch_size=64):
        if len(images) != len(prompts):
            raise ValueError(f"{name}: {len(images)} images but {len(prompts)} prompts")
        if any(not p.strip() for p in prompts):
            raise ValueError(f"{name}: an empty prompt cannot be scored")
        out = []
        for i in range(0, len(images), batch_size):
            x = torch.stack([prepare(im.convert("RGB"), size) for im in images[i:i + batch_size]]).to(device)
            image = F.normalize(encode_image(x).float(), dim=-1)                # (N, D)
            text = F.normalize(encode_text(tokenize(prompts[i:i + batch_size]).to(device)).float(), dim=-1)   # (N, D)
            out.append(scale * (image * text).sum(-1).cpu())
        return torch.cat(out) if out else torch.zeros(0)
    return score


def load_open_clip(name, source, device, prepare, hub):
    """clip and hpsv2: an open_clip folder (open_clip_config.json, open_clip_model.safetensors, a tokenizer), a ViT-H-14
    checkpoint file, or the default from the hub."""
    import open_clip
    if source and Path(source).is_dir():
        from safetensors.torch import load_file
        from transformers import CLIPTokenizer
        config = json.loads((Path(source) / "open_clip_config.json").read_text())["model_cfg"]
        model, state = open_clip.CLIP(**config), load_file(Path(source) / "open_clip_model.safetensors")
        hf, length = CLIPTokenizer.from_pretrained(source), config["text_cfg"]["context_length"]
        ids = lambda texts: hf(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        count = lambda texts: [len(t) for t in hf(texts).input_ids]
    else:
        model, tokenizer = open_clip.create_model("ViT-H-14"), open_clip.get_tokenizer("ViT-H-14")
        path = source or hub()
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        ids, length = tokenizer, 77
        count = lambda texts: [len(tokenizer.encode(t)) + 2 for t in texts]
    problems = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise ValueError(f"{source or path}: not a {name} checkpoint; missing {problems.missing_keys[:3]}, unexpected {problems.unexpected_keys[:3]}")
    model = model.float().eval().to(device)
    size = model.visual.image_size[0] if isinstance(model.visual.image_size, (tuple, list)) else model.visual.image_size

    def tokenize(texts):
        warn_cut(count(texts), length, name)
        return ids(texts)
    return clip_scorer(name, model.encode_image, model.encode_text, tokenize, prepare, size, device)


def load_pickscore(source, device):
    """PickScore (Kirstain et al. 2023): a CLIPModel, score = exp(logit_scale) * cosine; preprocessing as OpenAI's CLIP."""
    from transformers import CLIPModel, CLIPTokenizer
    model = CLIPModel.from_pretrained(source or "yuvalkirstain/PickScore_v1", dtype=torch.float32, use_safetensors=True).eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(source or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    length = model.config.text_config.max_position_embeddings

    def tokenize(texts):
        warn_cut([len(t) for t in tokenizer(texts).input_ids], length, "pickscore")
        return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return clip_scorer("pickscore", lambda x: model.get_image_features(pixel_values=x).pooler_output,
                       lambda ids: model.get_text_features(input_ids=ids).pooler_output, tokenize, crop,
                       model.config.vision_config.image_size, device, model.logit_scale.exp().item())


def from_hub(repo, file):
    def get():
        from huggingface_hub import hf_hub_download
        return hf_hub_download(repo, file)
    return get


NAMES = ("clip", "hpsv2.1", "hpsv2", "pickscore", "toyworld")


def check_reward(spec):
    """End with one line if "name" or "name=source" can be no reward: an unknown name, a source that is not there."""
    name, _, source = spec.partition("=")
    if name not in NAMES:
        raise SystemExit(f"unknown reward {name!r}; there are {', '.join(NAMES)}, each also as name=folder_or_file")
    if source and not Path(source).exists():
        raise SystemExit(f"{name}={source}: no such file or folder")


def load_reward(name, device="cpu"):
    """A scorer by name or "name=source" -> score(images, prompts) -> (N,) float tensor on the CPU, larger is better.

    images: N PIL images, prompts: N strings. Ends the program with one line if the name is unknown or nothing can be
    loaded from the source."""
    check_reward(name)
    name, _, source = name.partition("=")
    loaders = {
        "clip": lambda: load_open_clip(name, source, device, pad, from_hub("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_model.safetensors")),
        "hpsv2.1": lambda: load_open_clip(name, source, device, pad, from_hub("xswu/HPSv2", "HPS_v2.1_compressed.pt")),
        "hpsv2": lambda: load_open_clip(name, source, device, pad, from_hub("xswu/HPSv2", "HPS_v2_compressed.pt")),
        "pickscore": lambda: load_pickscore(source, device),
        "toyworld": load_toyworld,
    }
    try:
        return loaders[name]()
    except Exception as e:                                     # a missing file, a wrong format, no hub: one line says which
        raise SystemExit(f"reward {name}{'=' + source if source else ''}: could not be loaded: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")


def load_toyworld():
    """The exact checker as a scorer. It is the truth of the toy world: never label training lists with it."""
    import toyworld
    return lambda images, prompts: torch.tensor([float(toyworld.check(p, im)) for im, p in zip(images, prompts, strict=True)])


def reward_name(spec):
    return spec.partition("=")[0]


if __name__ == "__main__":
    from rankdpo import fail, option, parse, pick_device

    @dataclass
    class Config:
        image: str = option("", "an image file")
        prompt: str = option("", "its prompt")
        rewards: tuple = option(TOY_REWARDS, "rewards, as name or name=source")
        device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")

    cfg = parse(Config, __doc__)
    if not cfg.prompt.strip() or not os.path.isfile(cfg.image):
        fail(f"rewards.py: --image {cfg.image!r} must be a file and --prompt not empty (--help shows an example)")
    try:
        image = Image.open(cfg.image).convert("RGB")
    except OSError as e:
        fail(f"{cfg.image}: not a readable image ({e})")
    for spec in cfg.rewards:
        print(f"{reward_name(spec):10s} {load_reward(spec, pick_device(cfg.device))([image], [cfg.prompt]).item():.4f}")
