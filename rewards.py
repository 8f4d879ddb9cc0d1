"""Reward models behind one function: load_reward(name, device) -> score(images, prompts) -> (N,) tensor.

    python rewards.py --image picture.png --prompt "a red circle"     # every toy reward on one picture
    python rewards.py --image a.png --prompt "a cat" --rewards imagereward hpsv2.1=HPS_v2.1_compressed.pt
    python rewards.py --score outputs/synpic --rewards mps vqascore   # a whole folder: its scores/NAME.jsonl

A reward is a name, or name=source: a FILE of weights is the published model and nothing else; a FOLDER (and
only that for vqascore) holds the weights and may bring a config and a tokenizer of its own; FILE.py:function,
under any other name, is a function of yours, (PIL images, prompts) -> scores. Larger is better.

    name         model, default source on the hub                     size    licence     score
    clip         open_clip ViT-H-14                                   3.9 GB  MIT         cosine, -1 to 1
                 laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    hpsv2.1      the same, xswu/HPSv2 HPS_v2.1_compressed.pt          2.0 GB  Apache-2.0  cosine, .2 to .35
    hpsv2        the same, xswu/HPSv2 HPS_v2_compressed.pt            2.0 GB  Apache-2.0  cosine, .2 to .3
    pickscore    CLIPModel ViT-H, yuvalkirstain/PickScore_v1          3.9 GB  MIT         15 to 25
    imagereward  BLIP-L + MLP, zai-org/ImageReward ImageReward.pt     1.8 GB  Apache-2.0  -2.3 to 2
    cyclereward  BLIP-L + MLP, carolineec/CycleReward-Combo           1.8 GB  MIT         unbounded
    mps          ViT-H + cross-attention, RE-N-Y/mpsv1                4.4 GB  not stated  0 to 15
    vqascore     CLIP-L/336 + Flan-T5-XXL, zhiqiulin/clip-flant5-xxl  23 GB   Apache-2.0  P("Yes"), 0 to 1
    vqascore-xl  the same with Flan-T5-XL, zhiqiulin/clip-flant5-xl   6.3 GB  Apache-2.0  P("Yes"), 0 to 1
    aesthetic    OpenAI ViT-L/14 + LAION v2 head                      1.7 GB  Apache-2.0  1 to 10, no prompt
                 trl-lib/ddpo-aesthetic-predictor
    hpsv3        Qwen2-VL-7B + MLP at a token, MizzenAI/HPSv3         17 GB   MIT (code)  5 to 11 on average
                 HPSv3.safetensors
    diversity    the image tower of clip, to evaluate only                                mean 1 - cosine to
                                                                                          the other pictures
    toyworld     the exact checker of toy/world.py, to evaluate only                       1 if shown, else 0

The weights of mps state no licence (their authors' code is MIT). PickScore and MPS are logit scale x cosine.
All run in fp32; vqascore-bf16, vqascore-xl-bf16 and hpsv3-bf16 take half the memory. Text beyond a model's
context (77 tokens for CLIP, 35 for ImageReward) is cut, and says so once. Alpha is dropped, before or after
the resize as in each original; 16-bit grey is scaled, where every original clips it to white. Nothing here
needs the scorers' own packages: they pin libraries of years ago. tests/test_rewards.py and test_hpsv3.py hold
each scorer against the original's own preprocessing and modules; docs/rewards.md says how far they agree.

Where a score could be wrong without a word, loading fails instead: weights must have exactly the tensors of
the published architecture (or of the folder's config) in its shapes, and a tokenizer must fit its model and
tell two sentences apart. Weights are read as safetensors or with weights_only=True.
"""

import hashlib
import json
import math
import os
import sys
import traceback
import types
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from common import (
    HERE,
    ahead,
    appending,
    ends_of,
    fail,
    one_line_errors,
    open_image,
    option,
    parallel_files,
    parse,
    parse_json,
    pick_device,
    read_text,
    whole_lines,
    writable_folder,
)
from lists import metadata_file, read_metadata

TOY_REWARDS = tuple(
    f"{name}={HERE / 'toy/rewards' / folder}"
    for name, folder in (("clip", "clip"), ("hpsv2.1", "hps"), ("pickscore", "pick"), ("imagereward", "blip"))
)


@dataclass
class Config:
    image: str = option("", "an image file to score")
    prompt: str = option("", "its prompt")
    score: str = option("", "a folder to score: an imagefolder, or pictures with .txt captions; resumes")
    rewards: tuple = option(TOY_REWARDS, "rewards, as name or name=source")
    batch_size: int = option(32, "images a forward pass", above=0)
    on_error: str = option("stop", "rows that cannot be scored", ("stop", "skip"))
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


# ----------------------------------------------------------------------------- pictures

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # of every CLIP, and of BLIP
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def check_area(width, height):
    """ValueError where a resize would make more pixels than PIL's limit, as of a picture of 30000 x 1."""
    if width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too elongated: it would be resized to {width} x {height} pixels")


def crop(image, size):
    """OpenAI CLIP's preprocessing -> (3, size, size): shorter side to `size` by PIL bicubic, centre crop,
    RGB, normalise. Alpha weighs the colours that the resize mixes; an odd margin is rounded half to even."""
    return crop_at(image, size, lambda margin: round(margin / 2))


def crop_rgb(image, size):
    """The same as transformers' CLIPImageProcessor does it: RGB first, an odd margin rounded down."""
    return crop_at(image.convert("RGB"), size, lambda margin: margin // 2)


def crop_at(image, size, half):
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    check_area(w, h)
    left, top = half(w - size), half(h - size)
    image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return normalised(image.convert("RGB"))


def normalised(image):
    """An RGB image as (3, H, W), as every CLIP's vision transformer reads it."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - MEAN) / STD


def letterbox(image, size):
    """HPSv2's preprocessing: LONGER side to `size` by bicubic with antialias on the float tensor, zero-padded
    to a centred square, then normalised -> (3, size, size)."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()[None] / 255
    h, w = (max(1, round(n * (size / max(x.shape[-2:])))) for n in x.shape[-2:])
    if (h, w) != tuple(x.shape[-2:]):
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
    left, top = (size - w) // 2, (size - h) // 2
    x = F.pad(x, (left, size - w - left, top, size - h - top))[0]
    return (x - MEAN) / STD


def square(image, size):
    """VQAScore's (LLaVA's) preprocessing: padded to a centred square with the mean colour, then crop_rgb."""
    side, (w, h) = max(image.size), image.size
    check_area(side, side)
    canvas = Image.new("RGB", (side, side), tuple(int(255 * m) for m in MEAN.flatten().tolist()))
    canvas.paste(image.convert("RGB"), ((side - w) // 2, (side - h) // 2))
    return crop_rgb(canvas, size)


# ----------------------------------------------------------------------------- text

CLIP_WORDS = 49408  # the size of CLIP's one published vocabulary, which comes with open_clip
KNOWN = {  # what two published vocabularies, recognised by their size, make of "a photo of a cat"
    CLIP_WORDS: [49406, 320, 1125, 539, 320, 2368, 49407],
    30524: [101, 1037, 6302, 1997, 1037, 4937, 102],  # bert-base-uncased with BLIP's two special words
}


def check_tokenizer(tokenizer, size, where, ends=True):
    """ValueError unless it has the model's `size` words and tells two English sentences apart. transformers 5
    does not fail where a tokenizer's files are not there: it returns one of 2 to 5 words, and all prompts
    become the same."""
    special = set(tokenizer.all_special_ids)
    ids = [tokenizer(text).input_ids for text in ("a red circle", "two squares")]
    seen = [set(i) - special for i in ids]
    if len(tokenizer) != size:
        problem = f"it has {len(tokenizer)} words and the model {size}"
    elif not all(seen) or seen[0] == seen[1]:
        problem = "it knows no word of 'a red circle' or 'two squares'"
    elif ends and ids[0][-1] not in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        problem = "it sets no end token"
    elif size in KNOWN and tokenizer("a photo of a cat").input_ids != KNOWN[size]:
        problem = "it is not the published one: its numbers for 'a photo of a cat' are others"
    else:
        return tokenizer
    raise ValueError(
        f"no tokenizer for this model at {where} ({problem}); name a FOLDER that holds the weights and "
        "the tokenizer's files (tokenizer.json, or vocab.txt / vocab.json and merges.txt)"
    )


def load_tokenizer(kind, source, size, hub="", extra=(), ends=True):
    """The tokenizer of a folder that brings one, or the hub's: checked. A file of weights brings none,
    whatever lies beside it."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
    own = source and any((Path(source) / f).is_file() for f in files)
    where = source if own or not hub else hub
    try:
        tokenizer = kind.from_pretrained(where)
    except Exception as e:
        raise ValueError(f"no tokenizer at {where} ({one_line(e)}); put its files into the folder") from None
    tokenizer.add_tokens(list(extra), special_tokens=True)
    return check_tokenizer(tokenizer, size or len(tokenizer), where, ends)


def clip_tokenizer(source, size):
    """transformers' CLIPTokenizer, as PickScore and MPS use it. No folder's files replace CLIP's words."""
    from transformers import CLIPTokenizer

    if size != CLIP_WORDS:
        return load_tokenizer(CLIPTokenizer, source, size)
    from open_clip import SimpleTokenizer

    bpe = SimpleTokenizer()
    words = {word: i for word, i in bpe.encoder.items() if i < CLIP_WORDS - 2}
    words |= {"<|startoftext|>": CLIP_WORDS - 2, "<|endoftext|>": CLIP_WORDS - 1}
    tokenizer = CLIPTokenizer(vocab=words, merges=list(bpe.bpe_ranks), model_max_length=77)
    return check_tokenizer(tokenizer, size, "open_clip")


def warn_cut(lengths, limit, name):
    if max(lengths) > limit and name not in warn_cut.said:
        warn_cut.said.add(name)
        print(f"{name}: a prompt of {max(lengths)} tokens is cut at {limit}; said once", file=sys.stderr)


warn_cut.said = set()


def tokenize(tokenizer, texts, length, name):
    """transformers tokenizer -> ids and attention mask, both (N, length)."""
    warn_cut([len(t) for t in tokenizer(texts, truncation=False, verbose=False).input_ids], length, name)
    out = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return out.input_ids, out.attention_mask


def open_clip_ids(source, config, name):
    """prompts -> ids (N, length), as open_clip does it: its own tokenizer, which cleans the text (ftfy,
    HTML), for CLIP's vocabulary; for any other the folder's."""
    size, length = config.get("vocab_size", CLIP_WORDS), config.get("context_length", 77)
    if size != CLIP_WORDS:
        tokenizer = clip_tokenizer(source, size)
        return lambda texts: tokenize(tokenizer, texts, length, name)[0]
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=length)

    def ids(texts):
        warn_cut([len(tokenizer.encode(t)) + 2 for t in texts], length, name)
        return tokenizer(texts)

    return ids


# ------------------------------------------------------------ scoring: threads read, the model scores


class Scorer:
    """score(images, prompts) -> (N,) float tensor on the CPU, larger is better.

    prepare: PIL image -> tensor, in threads and two batches ahead; forward: (N, ...) tensor on the device, N
    prompts -> (N,)."""

    def __init__(self, name, prepare, forward, device="cpu"):
        self.name, self.prepare, self.forward, self.device = name, prepare, forward, device
        self.reserved = ()  # words that a prompt may not hold: the model takes them for something else

    def load(self, image, prompt):
        """(what forward takes, None), or (None, what is wrong)."""
        if not prompt.strip():
            return None, "an empty prompt cannot be scored"
        if odd := [word for word in self.reserved if word in prompt]:
            return None, f"{odd[0]} in the prompt would not be read as text"
        try:
            prompt.encode()  # half a surrogate pair is no text
            return self.prepare(open_image(image)), None
        except (OSError, ValueError) as e:
            return None, str(e)

    def score_batch(self, loaded, prompts):
        """[(score, None) or (None, problem)]. The first good pair stands in for what cannot be scored, so
        that the scores of the others do not depend on it: a forward pass rounds differently for another
        number of images."""
        good = next((n for n, (_, problem) in enumerate(loaded) if not problem), None)
        if good is None:
            return loaded
        x = [loaded[good if problem else n][0] for n, (_, problem) in enumerate(loaded)]
        texts = [prompts[good if problem else n] for n, (_, problem) in enumerate(loaded)]
        with torch.inference_mode():
            x = torch.stack(x).to(self.device) if torch.is_tensor(x[0]) else x
            scores = self.forward(x, texts).float().tolist()
        found = []
        for score, (_, problem) in zip(scores, loaded):
            if not problem and not np.isfinite(score).all():
                problem = f"the score is {score}"
            found.append((None if problem else score, problem))
        return found

    def of_row(self, results):
        """The results of the pictures of one prompt; diversity compares them here."""
        return results

    def stream(self, images, prompts, batch_size=32):
        """Yield (score, None), or (None, what is wrong with it), of each pair in order."""
        pairs, threads = list(zip(images, prompts)), min(8, os.cpu_count() or 1)
        loaded = ahead(lambda pair: self.load(*pair), pairs, depth=2 * batch_size, threads=threads)
        for n in range(0, len(pairs), batch_size):
            texts = [prompt for _, prompt in pairs[n : n + batch_size]]
            yield from self.score_batch([next(loaded) for _ in texts], texts)

    def __call__(self, images, prompts, batch_size=32):
        if len(images) != len(prompts):
            raise ValueError(f"{self.name}: {len(images)} images but {len(prompts)} prompts")
        out = []
        for value, problem in self.stream(images, prompts, batch_size):
            if problem:
                raise ValueError(f"{self.name}: pair {len(out)}: {problem}")
            out.append(value)
        return torch.tensor(out)


# ----------------------------------------------------------------------------- weights

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def one_line(error):
    return " ".join(str(error).split())[:400]


def from_hub(repo, file):
    """A file of a hub repository; without a name, its only weights."""
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        files = [f for f in ([file] if file else list_repo_files(repo)) if f.endswith(WEIGHTS)]
        return Path(hf_hub_download(repo, max(files, key=lambda f: f.endswith(".safetensors"))))
    except Exception as e:
        wanted = f"{repo} {file or ''}".strip()
        raise ValueError(
            f"{wanted} cannot be had from the hub ({type(e).__name__}); name a local copy"
        ) from None


def find_weights(source, repo, file):
    """The checkpoint: `source` itself, that folder's file of the usual name or its only one, or the hub's."""
    path = Path(source or from_hub(repo, file))
    if not path.is_dir():
        return path
    files = sorted(p for p in path.iterdir() if p.suffix in WEIGHTS)
    usual = [p for p in files if p.name == (file or "model.safetensors")]
    if not usual and len(files) != 1:
        found = ", ".join(p.name for p in files) or "nothing of the kind"
        raise ValueError(f"{path}: {file or 'model.safetensors'} is wanted there, found {found}")
    return (usual or files)[0]


def read_weights(path):
    """State dict of tensors from .safetensors, or from a torch file without code."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # each format has its own
        raise ValueError(f"{path}: no readable weights ({type(e).__name__})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path}: holds no state dict of tensors")
    return {k: v for k, v in state.items() if not k.endswith("position_ids")}  # 0, 1, 2, ...


def check_keys(path, missing, unexpected, shapes=()):
    if missing or unexpected or shapes:
        parts = [f"missing keys {sorted(missing)[:3]}"] * bool(missing)
        parts += [f"unexpected keys {sorted(unexpected)[:3]}"] * bool(unexpected)
        parts += [f"wrong shapes {sorted(shapes)[:3]}"] * bool(shapes)
        raise ValueError(f"{path} is not such a checkpoint: {', '.join(parts)}")


def load_strict(build, path, device, rename=lambda key: key, dtype=torch.float32):
    """build() with exactly the weights of a file: which tensors there are, the architecture says, not the
    file. rename: a key of the file -> as build() calls it, None for what is not used; no dtype: as built."""
    named = ((rename(key), tensor) for key, tensor in read_weights(path).items())
    state = {key: tensor for key, tensor in named if key}
    try:
        with torch.device("meta"):  # a wrong file fails before a billion weights are made
            wanted = {k: tuple(v.shape) for k, v in build().state_dict().items()}
    except Exception as e:
        raise ValueError(f"{path}: the config beside it describes no such model ({one_line(e)})") from None
    wanted = {k: shape for k, shape in wanted.items() if not k.endswith("position_ids")}
    shapes = [
        f"{k} {tuple(v.shape)} instead of {wanted[k]}"
        for k, v in state.items()
        if k in wanted and tuple(v.shape) != wanted[k]
    ]
    check_keys(path, wanted.keys() - state.keys(), state.keys() - wanted.keys(), shapes)
    with torch.device(device):  # initial values cost 16 s for a ViT-H on a CPU, nothing on a GPU
        model = build()
    model.load_state_dict(state, strict=False)
    return model.to(dtype).eval()


def pretrained(kind, source, unused=(), optional=(), **kwargs):
    """transformers' from_pretrained, which only warns of keys that do not fit -> (model, missing `optional`
    keys). `unused` parts may lie in the file."""
    kwargs = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
    try:
        model, info = kind.from_pretrained(source, **kwargs)
    except Exception as e:
        what = f"{source}: config.json or weights cannot be read ({type(e).__name__})"
        raise ValueError(f"{what}; a folder with all files of the repository is wanted") from None
    left_out = {k for k in info["missing_keys"] if k.startswith(optional)}
    unexpected = {k for k in info["unexpected_keys"] if "position_ids" not in k and not k.startswith(unused)}
    shapes = [f"{k} {tuple(a)} instead of {tuple(b)}" for k, a, b in info["mismatched_keys"]]
    check_keys(source, info["missing_keys"] - left_out, unexpected, shapes)
    return model.eval(), left_out


def read_json(path):
    """A dict from a JSON file; an empty one if there is no such file."""
    try:
        found = parse_json(read_text(path)) if path.is_file() else {}
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def folder_config(kind, source, published):
    """The config.json of a folder, if it is of this kind: sizes of its own. Otherwise the published sizes."""
    if source and read_json(Path(source) / "config.json").get("model_type") == kind.model_type:
        return kind.from_pretrained(source)
    return kind(**published)


def sizes(width, layers, heads=16):
    """A transformer as transformers' configurations name it."""
    return dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads
    )


# ------------------------------------------------------------ clip, hpsv2.1, hpsv2, pickscore

LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_H = dict(  # as transformers names it
    projection_dim=1024,
    text_config=dict(sizes(1024, layers=24), hidden_act="gelu"),
    vision_config=dict(sizes(1280, layers=32), hidden_act="gelu", patch_size=14),
)


def cosine(scale, image, text):
    """The formula of every CLIP-type reward: scale * cos(image, text); (N, D), (N, D) -> (N,), fp32."""
    return scale * (F.normalize(image.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(-1)


def load_open_clip(name, source, device, *hub, prepare):
    """CLIP score and HPSv2 (Wu et al. 2023): cosine, unscaled, of ViT-H-14 or of a folder's own config."""
    import open_clip

    own = read_json(Path(source) / "open_clip_config.json") if source else {}
    config = own.get("model_cfg", open_clip.get_model_config("ViT-H-14"))
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise ValueError(
            f"{source}/open_clip_config.json: model_cfg has no embed_dim, vision_cfg and text_cfg"
        )
    for key, value in (("mean", MEAN), ("std", STD)):
        if not np.allclose(own.get("preprocess_cfg", {}).get(key, value.flatten()), value.flatten()):
            raise ValueError(f"{source}/open_clip_config.json: another {key} than CLIP's in preprocess_cfg")
    for key, value in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if own.get("preprocess_cfg", {}).get(key, value) != value:
            raise ValueError(f"{source}/open_clip_config.json: another {key} than {value} in preprocess_cfg")
    ids = open_clip_ids(source, config["text_cfg"], name)
    model = load_strict(lambda: open_clip.CLIP(**config), find_weights(source, *hub), device)

    def forward(x, prompts):
        return cosine(1.0, model.encode_image(x), model.encode_text(ids(prompts).to(device)))

    size = np.ravel(config["vision_cfg"].get("image_size", 224))[0].item()  # some write [224, 224]
    scorer = Scorer(name, partial(prepare, size=size), forward, device)
    scorer.embed = lambda x: F.normalize(model.encode_image(x), dim=-1)  # (N, D)
    return scorer


def load_diversity(name, source, device, *hub):
    """How far apart the pictures of one prompt are, by CLIP's image embeddings: of each mean 1 - cosine to
    the others, so that a row's mean is its mean pairwise distance."""
    clip = load_open_clip("clip", source, device, *hub, prepare=crop)
    scorer = Scorer(name, clip.prepare, lambda x, prompts: clip.embed(x), device)

    def distances(results):
        if len(results) < 2 or any(problem for _, problem in results):
            return [(None, problem or "another picture of the prompt is missing") for _, problem in results]
        e = torch.tensor([embedding for embedding, _ in results], dtype=torch.float64)  # (K, D)
        apart = (1 - e @ e.T).fill_diagonal_(0).sum(1) / (len(e) - 1)  # (K,)
        return [(distance, None) for distance in apart.tolist()]

    scorer.of_row = distances
    return scorer


def load_clip_model(kind, name, source, device, *hub):
    """(model, prompts -> ids (N, length), picture -> pixels) of a `kind` that is built from a CLIPConfig."""
    from transformers import CLIPConfig

    config = folder_config(CLIPConfig, source, VIT_H)
    tokenizer = clip_tokenizer(source, config.text_config.vocab_size)
    model = load_strict(lambda: kind(config), find_weights(source, *hub), device)
    length = config.text_config.max_position_embeddings
    ids = lambda texts: tokenize(tokenizer, texts, length, name)[0].to(device)
    return model, ids, partial(crop_rgb, size=config.vision_config.image_size)


def load_pickscore(name, source, device, *hub):
    """PickScore (Kirstain et al. 2023): exp(logit_scale) * cosine of a CLIPModel."""
    from transformers import CLIPModel

    model, ids, prepare = load_clip_model(CLIPModel, name, source, device, *hub)

    def forward(x, prompts):
        text = model.get_text_features(input_ids=ids(prompts)).pooler_output
        return cosine(model.logit_scale.exp(), model.get_image_features(pixel_values=x).pooler_output, text)

    return Scorer(name, prepare, forward, device)


# ------------------------------------------------------------ imagereward, cyclereward: BLIP and a head

BLIP_TEXT = dict(sizes(768, layers=12, heads=12), vocab_size=30524, encoder_hidden_size=1024)
BLIP_L = dict(
    text_config=dict(BLIP_TEXT, max_position_embeddings=512, layer_norm_eps=1e-12),
    vision_config=dict(sizes(1024, layers=24), image_size=224, patch_size=16, layer_norm_eps=1e-6),
)
BLIP_NAMES = (  # of the vision transformer in the checkpoints -> in transformers
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks", "encoder.layers"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.qkv", "self_attn.qkv"),
    ("attn.proj", "self_attn.projection"),
    ("norm", "post_layernorm"),
)


def blip_key(key):
    """A key of ImageReward's state dict as BlipReward calls it; None for what only pre-training used."""
    if key.startswith(("blip.vision_proj.", "blip.text_proj.")):
        return None
    if key.startswith("blip.visual_encoder."):
        key = f"{key}."
        for old, new in BLIP_NAMES:  # whole names only: norm is not norm1
            key = key.replace(f".{old}.", f".{new}.")
        key = key.strip(".")
    return key


def reward_head(width, gelu=False):
    """The multi-layer perceptron of ImageReward and of the aesthetic predictor, which has no activations (its
    dropout counts as a layer in the keys), or CycleReward's, which has GELUs."""
    between = nn.GELU if gelu else nn.Identity
    layers = []
    for inputs, outputs in ((width, 1024), (1024, 128), (128, 64)):
        layers += [nn.Linear(inputs, outputs), between()]
    last = [between()] if gelu else []
    return nn.Sequential(*layers, nn.Linear(64, 16), *last, nn.Linear(16, 1))


class BlipReward(nn.Module):
    """MLP(h_CLS) of BLIP's image-grounded text encoder."""

    def __init__(self, config, gelu):
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        text = BlipTextModel(config.text_config, add_pooling_layer=False)
        eye = BlipVisionModel(config.vision_config)
        self.blip = nn.ModuleDict(dict(visual_encoder=eye, text_encoder=text))
        self.mlp = nn.ModuleDict(dict(layers=reward_head(config.text_config.hidden_size, gelu)))

    def forward(self, x, ids, attention):
        seen = self.blip["visual_encoder"](pixel_values=x).last_hidden_state  # (N, 1 + patches, width)
        read = self.blip["text_encoder"](
            input_ids=ids, attention_mask=attention, encoder_hidden_states=seen, is_decoder=False
        )
        return self.mlp["layers"](read.last_hidden_state[:, 0])[:, 0]


def lower(text, keep):
    """Lower case as BERT's first tokenizer had it, by words: final sigmas differ from those inside words."""
    return " ".join(word if word in keep else word.lower() for word in text.split(" "))


def load_blip(name, source, device, *hub):
    """ImageReward (Xu et al. 2023) and CycleReward (Bahng et al. 2025).

    transformers' BLIP after renaming keys, not the `image-reward` package: under transformers 5 the package
    does not even import."""
    from transformers import BertTokenizer, BlipConfig

    cycle = name == "cyclereward"
    config = folder_config(BlipConfig, source, BLIP_L)
    size, length = config.text_config.vocab_size, 128 if cycle else 35
    mean, std = (0.0, 1.0) if cycle else (0.16717362830052426, 1.0333394966054072)
    path = find_weights(source, *hub)
    model = load_strict(lambda: BlipReward(config, gelu=cycle), path, device, blip_key)
    tokenizer = load_tokenizer(
        BertTokenizer, source, size, "google-bert/bert-base-uncased", ("[DEC]", "[ENC]")
    )

    def forward(x, prompts):
        texts = [lower(p, tokenizer.get_added_vocab()) for p in prompts]
        ids, attention = tokenize(tokenizer, texts, length, name)
        return (model(x, ids.to(device), attention.to(device)) - mean) / std

    return Scorer(name, partial(crop, size=config.vision_config.image_size), forward, device)


# ----------------------------------------------------------------------------- mps: CLIP and cross-attention

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
    "instance, texture, quantity, attributes, position, number, location, word, things."
)
TAU = 0.01  # of MPS's README and of RE-N-Y/mpsv1's code; its evaluation scripts have .3
LAYERS, HEADS, HEAD_WIDTH = 4, 16, 64


def attend(q, k, v, mask=None):
    """Heads of q (N, L, heads * d) against one key and value (N, T, d) for all; scale 1 / sqrt(d)."""
    q = q.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)  # (N, heads, L, d)
    k, v = (t[:, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, -1)
        return F.silu(gate) * value


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, *context):
        return x + self.fn(x, *context)


class CrossAttention(nn.Module):
    """Image tokens read text tokens where mask (N, T) is true; a feed-forward stands beside, not behind."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, HEADS * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(dim, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_WIDTH, dim, bias=False)
        wide = nn.Linear(dim, 8 * dim, bias=False)
        self.ff = nn.Sequential(wide, SwiGLU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x, text, mask):
        x = self.norm(x)
        k, v = self.to_kv(text).chunk(2, -1)
        return self.to_out(attend(self.to_q(x), k, v, mask[:, None, None])) + self.ff(x)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH))

    def forward(self, t):  # (N, L, heads * d), the same angles for every head
        angle = torch.arange(t.shape[1], device=t.device)[:, None] * self.inv_freq
        angle = torch.cat([angle, angle], -1)  # (L, d)
        t = t.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
        a, b = t.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
        return (t * angle.cos() + turned * angle.sin()).transpose(1, 2).flatten(2)


class ParallelBlock(nn.Module):
    """PaLM's block: rotary self-attention and a feed-forward side by side, from one projection."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.rotary_emb = nn.LayerNorm(dim), Rotary()
        self.sizes = (HEADS * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 8 * dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(HEADS * HEAD_WIDTH, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x, *_):
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, -1)
        return self.attn_out(attend(self.rotary_emb(q), self.rotary_emb(k), v)) + self.ff_out(ff)


class MpsModel(nn.Module):
    """exp(logit_scale) * cos(text, image tokens after reading the text). Named as in the checkpoint.

    Text tokens that have nothing to do with the condition are masked out. The largest similarity is taken
    within each pair; the original takes it over the batch, so that its scores depend on the batch."""

    def __init__(self, config):
        from transformers import CLIPModel

        super().__init__()
        dim = config.projection_dim
        pair = lambda: nn.ModuleList([Residual(CrossAttention(dim)), Residual(ParallelBlock(dim))])
        layers = nn.ModuleList([pair() for _ in range(LAYERS)])
        cross = nn.ModuleDict(dict(layers=layers))
        self.mps = nn.ModuleDict(dict(model=CLIPModel(config), cross_model=cross))

    def tokens(self, ids):
        """Every text token, projected, (N, T, D)."""
        clip = self.mps["model"]
        return clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state)

    def forward(self, x, ids, condition):
        clip, text = self.mps["model"], self.tokens(ids)
        end = text[torch.arange(len(ids)), ids.argmax(-1)]  # (N, D): the end token has the largest id
        near = (text @ condition[0].T).amax(-1)  # (N, T)
        mask = near / near.amax(-1, keepdim=True) > TAU
        seen = clip.vision_model(pixel_values=x).last_hidden_state
        seen = clip.visual_projection(seen)  # (N, 1 + patches, D)
        for read, think in self.mps["cross_model"]["layers"]:
            seen = think(read(seen, text, mask))
        return cosine(clip.logit_scale.exp(), seen[:, 0], end)


def load_mps(name, source, device, *hub):
    """MPS (Zhang et al. 2024), overall preference."""
    model, ids, prepare = load_clip_model(MpsModel, name, source, device, *hub)
    with torch.inference_mode():
        condition = model.tokens(ids([CONDITION]))  # (1, T, D)

    def forward(x, prompts):
        return model(x, ids(prompts), condition)

    return Scorer(name, prepare, forward, device)


# ------------------------------------------------------------ vqascore: a question to a T5 that sees

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
CLIP_L_336 = dict(sizes(1024, layers=24), image_size=336, patch_size=14)


def clip_t5_class():
    """CLIP-FlanT5: a T5 with a vision tower and a two-layer projector beside it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5ForConditionalGeneration

    class ClipT5(T5ForConditionalGeneration):
        _tied_weights_keys = {  # without lm_head, which transformers would make up where it is missing
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        }

        def __init__(self, config):
            super().__init__(config)
            width, tower = config.d_model, config.mm_vision_tower
            first, second = nn.Linear(config.mm_hidden_size, width), nn.Linear(width, width)
            self.mm_projector = nn.Sequential(first, nn.GELU(), second)
            if tower == "openai/clip-vit-large-patch14-336":
                vision = CLIPVisionConfig(**CLIP_L_336)
            else:
                vision = CLIPVisionConfig.from_pretrained(tower)
            self.vision_tower = nn.ModuleDict(dict(vision_tower=CLIPVisionModel(vision)))
            self.post_init()

    return ClipT5


def load_clip_t5(source, device, dtype):
    """The model with every weight from its checkpoint, but for a vision tower that its config may name."""
    from transformers import CLIPVisionModel, T5Config

    config, kind = T5Config.from_pretrained(source), clip_t5_class()
    if config.scale_decoder_outputs:  # as in T5 1.0; Flan-T5 has a head of its own
        raise ValueError(f"{source}/config.json: tie_word_embeddings must be false, as in Flan-T5")
    if not hasattr(config, "mm_vision_tower"):
        raise ValueError(f"{source}/config.json: no CLIP-FlanT5, which has an mm_vision_tower")
    if torch.device(device).type == "cuda":
        with torch.device("meta"):
            need = kind(config).num_parameters() * dtype.itemsize / 1e9
        free = torch.cuda.mem_get_info(device)[0] / 1e9
        if need > free:
            advice = "-bf16 takes half of fp32, -xl a fourth of xxl"
            raise ValueError(f"{need:.0f} GB are needed, {free:.0f} GB are free; {advice}")
    renamed = {r"^vision_tower\.vision_tower\.vision_model\.": "vision_tower.vision_tower."}
    model, tower = pretrained(
        kind, source, "embed_tokens.", "vision_tower.", config=config, dtype=dtype, key_mapping=renamed
    )
    if len(tower) == len(model.vision_tower.state_dict()):  # the checkpoint brings the whole of it or nothing
        unused = ("text_model.", "text_projection", "visual_projection", "logit_scale")
        tower_model, _ = pretrained(CLIPVisionModel, config.mm_vision_tower, unused, dtype=dtype)
        model.vision_tower["vision_tower"] = tower_model
    else:
        check_keys(source, tower, ())
    return model.to(device)


def load_vqascore(name, source, device, repo, flan, dtype, question=QUESTION):
    """VQAScore (Lin et al. 2024): P("Yes" | image, 'Does this figure show "..."?') by CLIP-FlanT5.

    It is exp(-mean cross-entropy of the answer). The patches of CLIP-L/336's last but one layer stand,
    projected, among the words."""
    from transformers import AutoTokenizer

    dtype = getattr(torch, dtype)
    tokenizer = load_tokenizer(AutoTokenizer, source, 0, flan)
    model = load_clip_t5(source or repo, device, dtype)
    tower, surplus = model.vision_tower["vision_tower"], model.config.vocab_size - len(tokenizer)
    answer = tokenizer("Yes", return_tensors="pt").input_ids.to(device)  # (1, 2): Yes and the end token
    known = answer.shape[1] == 2 and tokenizer.unk_token_id not in answer[0]
    if not 0 <= surplus < 128 or not known:  # vocabularies are rounded up to a multiple of 128
        raise ValueError(f"{source or flan}: a tokenizer of {len(tokenizer)} words does not fit this model")
    words = model.get_input_embeddings()
    # each side of the image is tokenised for itself, so an end token stands before the image, as in training
    system = tokenizer(f"{SYSTEM} USER: ", return_tensors="pt").input_ids.to(device)

    def forward(x, prompts):
        n = len(prompts)
        questions = tokenizer([question.format(p) for p in prompts], padding=True, return_tensors="pt")
        ids, mask = questions.input_ids.to(device), questions.attention_mask.to(device)
        patches = tower(pixel_values=x.to(dtype), output_hidden_states=True).hidden_states[-2][:, 1:]
        patches = model.mm_projector(patches)  # (N, 576, D)
        embeds = torch.cat([words(system).expand(n, -1, -1), patches, words(ids)], 1)
        before = mask.new_ones(n, embeds.shape[1] - ids.shape[1])
        attention, labels = torch.cat([before, mask], 1), answer.repeat(n, 1)
        logits = model(inputs_embeds=embeds, attention_mask=attention, labels=labels).logits.float()
        logits = logits[..., : len(tokenizer)]  # (N, 2, words): rows of no word take no part in the softmax
        return (-F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)).exp()

    return Scorer(name, partial(square, size=tower.config.image_size), forward, device)


# ------------------------------------------------------------ hpsv3: Qwen2-VL and a token that is scored

QWEN = "Qwen/Qwen2-VL-7B-Instruct"  # whose tokenizer it has
QWEN2_VL_7B = dict(sizes(3584, layers=28, heads=28), num_key_value_heads=4, rms_norm_eps=1e-6)
QWEN2_VL_7B["intermediate_size"] = 18944
IMAGE, REWARD = "<|image_pad|>", "<|Reward|>"  # the second is HPSv3's own: its hidden state is scored
HPSV3_PIXELS = 256 * 28 * 28  # about so many: 256 tokens of 28 x 28 pixels
HPSV3_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
HPSV3_QUESTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give "
    "a overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being "
    "the worst and 10 being the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such "
    "as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy "
    "to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other "
    "visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a "
    "sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction score "
    "should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of "
    "number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance "
    "the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, "
    "clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured "
    "in the image. The generated content should not introduce elements that conflict with or distort the "
    "original description.\n"
    "Textual prompt - {text_prompt}\n\n\n\n"
    "Please provide the overall ratings of this image: <|Reward|>\n\n"
    "END\n"
)


def qwen_patches(image):
    """Qwen2-VL's preprocessing, PIL image -> (patches (h w, 3 * 2 * 14 * 14), (1, h, w)): both sides to
    multiples of 28 by PIL bicubic; patches of 14 x 14 in blocks of 2 x 2, which become one token; each patch
    twice, a film of two equal frames."""
    w, h = sides = image.size
    if max(sides) > 200 * min(sides):
        raise ValueError(f"too elongated: {w} x {h} pixels")
    near = [max(28, round(side / 28) * 28) for side in sides]
    if math.prod(near) > HPSV3_PIXELS:
        scale = math.sqrt(w * h / HPSV3_PIXELS)
        near = [math.floor(side / scale / 28) * 28 for side in sides]
    elif math.prod(near) < HPSV3_PIXELS:
        scale = math.sqrt(HPSV3_PIXELS / (w * h))
        near = [math.ceil(side * scale / 28) * 28 for side in sides]
    x = normalised(image.convert("RGB").resize(near, Image.Resampling.BICUBIC))
    w, h = near[0] // 28, near[1] // 28
    x = x.reshape(3, h, 2, 14, w, 2, 14).permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)  # (4 h w, 3, 14, 14)
    return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1), (1, 2 * h, 2 * w)


def hpsv3_key(key):
    """A key of the checkpoint, also in the form of before transformers 4.52, as Qwen2VLModel calls it."""
    if key.startswith("lm_head."):
        return None
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith(("model.embed_tokens.", "model.layers.", "model.norm.")):
        return key.replace("model.", "model.language_model.", 1)
    return key


def load_hpsv3(name, source, device, *hub, dtype):
    """HPSv3 (Ma et al. 2025): the first output, a mean, of an MLP on Qwen2-VL's hidden state at <|Reward|>.

    The published model runs with plain positions 0, 1, 2, ... in place of Qwen2-VL's of three axes, and with
    all of Qwen2-VL in bf16, rotary frequencies included: so it was trained."""
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

    config = folder_config(Qwen2VLConfig, source, dict(text_config=QWEN2_VL_7B))
    tokenizer = load_tokenizer(AutoTokenizer, source, 0, QWEN, (REWARD,), ends=False)
    image, reward = tokenizer.convert_tokens_to_ids([IMAGE, REWARD])
    if image != config.image_token_id or reward != len(tokenizer) - 1:
        raise ValueError(f"{source or QWEN}: a tokenizer of {len(tokenizer)} words does not fit this model")
    text = config.text_config
    text.vocab_size, text.dtype, config.vision_config.dtype = len(tokenizer), torch.bfloat16, torch.bfloat16

    def build():
        first, last = nn.Linear(text.hidden_size, 1024), nn.Linear(16, 2)
        head = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), last)
        return nn.ModuleDict(dict(model=Qwen2VLModel(config), rm_head=head))

    model = load_strict(build, find_weights(source, *hub), device, hpsv3_key, dtype=None)
    qwen, head = model["model"].bfloat16().to(dtype), model["rm_head"]

    def forward(x, prompts):
        texts = []
        for (patches, _), prompt in zip(x, prompts):
            question = HPSV3_QUESTION.format(text_prompt=prompt)
            texts.append(HPSV3_CHAT.format(image=IMAGE * (len(patches) // 4), question=question))
        rows = [torch.tensor(ids) for ids in tokenizer(texts).input_ids]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (N, T), padded on the right
        seen = qwen(  # causal, so that without a mask, too, no word sees the padding behind it
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=device)[None],
            pixel_values=torch.cat([patches for patches, _ in x]).to(device),
            image_grid_thw=torch.tensor([grid for _, grid in x], device=device),
            use_cache=False,
        ).last_hidden_state  # (N, T, D)
        return head(seen[ids == reward].float())[:, 0]

    scorer = Scorer(name, qwen_patches, forward, device)
    scorer.reserved = (IMAGE, REWARD)
    return scorer


# ------------------------------------------------------------ aesthetic (no prompt), toyworld (no model)


def load_aesthetic(name, source, device, *hub):
    """LAION aesthetic predictor v2 (Schuhmann 2022): MLP(e / |e|), e the image embedding of OpenAI's CLIP
    ViT-L/14. The MLP has no activation, so it is one affine map."""
    from transformers import CLIPVisionModelWithProjection

    unused = ("text_model.", "text_projection", "logit_scale")
    own = source and (Path(source) / "config.json").is_file()
    tower = source if own else "openai/clip-vit-large-patch14"
    build = lambda: nn.ModuleDict(dict(layers=reward_head(768)))
    head = load_strict(build, find_weights(source, *hub), device)["layers"]
    model = pretrained(CLIPVisionModelWithProjection, tower, unused)[0].to(device)

    def forward(x, prompts):
        return head(F.normalize(model(pixel_values=x).image_embeds, dim=-1))[:, 0]

    config = getattr(model.config, "vision_config", model.config)
    return Scorer(name, partial(crop, size=config.image_size), forward, device)


def load_toyworld(name, source, device):
    """The exact checker as a scorer. It is the truth of the toy world: never label training lists with it."""
    from toy import world

    def forward(images, prompts):
        try:
            return torch.tensor([float(world.check(p, i)) for i, p in zip(images, prompts)])
        except ValueError as e:
            fail(f"reward toyworld: {e}")

    return Scorer(name, lambda image: image.convert("RGB"), forward)


# ------------------------------------------------------------ name=FILE.py:function: one of your own


def function_of(spec):
    """(FILE.py, function) of "name=FILE.py:function"; ("", "") of any other spec."""
    source = spec.partition("=")[2]
    file, _, function = source.rpartition(":")
    fits = file.endswith(".py") and function.isidentifier() and not Path(source).exists()
    return (file, function) if fits else ("", "")


@lru_cache(maxsize=None)
def run_file(file, code):
    """The module that the bytes `code` of a file make, once a process. Not imported: Python's cache of
    compiled files takes an edit within the same second for the old file."""
    module = types.ModuleType(f"reward {file}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # where dataclasses look
    exec(compile(code, file, "exec"), module.__dict__)
    return module


def where(error, file):
    """An error as one line, with the last line of the file it passed: "own.py, line 3: KeyError: 'a'"."""
    lines = [n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    place = f"{file}, line {lines[-1]}" if lines else file
    return f"{place}: {type(error).__name__}: {one_line(error)}"


def user_function(file, function):
    """The function; ValueError where there is no such file or function, or the file does not run."""
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
    try:
        found = getattr(run_file(file, Path(file).read_bytes()), function, None)
    except (Exception, SystemExit) as e:
        raise ValueError(where(e, file)) from None
    if not callable(found):
        raise ValueError(f"{file} defines no function {function}")
    return found


def as_numbers(found, count):
    """Floats (count,) of a sequence, array or tensor of numbers; ValueError if it is something else."""
    values = found.tolist() if hasattr(found, "tolist") else list(found)
    values = [v.item() if hasattr(v, "item") else v for v in values] if isinstance(values, list) else [values]
    if len(values) != count:
        raise ValueError(f"{len(values)} scores for {count} pairs of image and prompt")
    if odd := [v for v in values if not isinstance(v, int | float)]:
        raise ValueError(f"a score is {one_line(repr(odd[0]))[:60]}, which is no number")
    return torch.tensor([float(v) for v in values])


def load_function(name, source, device, file, function):
    """A function of the user's as a scorer: it gets lists of RGB images and prompts, a batch at a time. An
    error in it ends the run; a score that is not finite is the problem of its own pair, as everywhere."""
    call = user_function(file, function)

    def forward(images, prompts):
        try:
            found = call(images, prompts)
        except (Exception, SystemExit) as e:
            fail(f"reward {name}: {where(e, file)}")
        try:
            return as_numbers(found, len(prompts))
        except (TypeError, ValueError, RuntimeError, OverflowError) as e:
            fail(f"reward {name}: {file}, {function} must return a number a pair: {one_line(e)}")

    return Scorer(name, lambda image: image.convert("RGB"), forward)


# ----------------------------------------------------------------------------- by name

FLAN = ("zhiqiulin/clip-flant5-xxl", "google/flan-t5-xxl")
FLAN_XL = ("zhiqiulin/clip-flant5-xl", "google/flan-t5-xl")
LOADERS = {  # name: (loader, then its default hub repository and file, ...)
    "clip": (partial(load_open_clip, prepare=crop), LAION_H, "open_clip_model.safetensors"),
    "hpsv2.1": (partial(load_open_clip, prepare=letterbox), "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "hpsv2": (partial(load_open_clip, prepare=letterbox), "xswu/HPSv2", "HPS_v2_compressed.pt"),
    "pickscore": (load_pickscore, "yuvalkirstain/PickScore_v1", "model.safetensors"),
    "imagereward": (load_blip, "zai-org/ImageReward", "ImageReward.pt"),
    "cyclereward": (load_blip, "carolineec/CycleReward-Combo", None),
    "mps": (load_mps, "RE-N-Y/mpsv1", "model.safetensors"),
    "vqascore": (load_vqascore, *FLAN, "float32"),
    "vqascore-xl": (load_vqascore, *FLAN_XL, "float32"),
    "vqascore-bf16": (load_vqascore, *FLAN, "bfloat16"),
    "vqascore-xl-bf16": (load_vqascore, *FLAN_XL, "bfloat16"),
    "hpsv3": (partial(load_hpsv3, dtype=torch.float32), "MizzenAI/HPSv3", "HPSv3.safetensors"),
    "hpsv3-bf16": (partial(load_hpsv3, dtype=torch.bfloat16), "MizzenAI/HPSv3", "HPSv3.safetensors"),
    "aesthetic": (load_aesthetic, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
    "diversity": (load_diversity, LAION_H, "open_clip_model.safetensors"),
    "toyworld": (load_toyworld,),
}


def reward_name(spec):
    return spec.partition("=")[0]


def check_reward(spec):
    """End with one line if "name", "name=source" or "name=FILE.py:function" can be no reward."""
    name, given, source = spec.partition("=")
    file, function = function_of(spec)
    if function:
        check_function(spec, name, file, function)
        return
    if name not in LOADERS:
        others = "each also as name=folder_or_file; one of your own is name=FILE.py:function"
        fail(f"unknown reward {spec!r}; there are {', '.join(LOADERS)}, {others}")
    if given and (not source or name == "toyworld"):
        fail(f"reward {spec}: {'it has no weights' if source else 'a folder or file is wanted after ='}")
    if source and not Path(source).exists():
        fail(f"{spec}: no such file or folder")
    if name.startswith("vqascore"):
        if source and not (Path(source) / "config.json").is_file():
            fail(f"{spec}: a FOLDER with config.json, weights and tokenizer is wanted")
    elif source:
        try:
            find_weights(source, *LOADERS[name][1:])
        except ValueError as e:
            fail(f"reward {name}: {e}")


def check_function(spec, name, file, function):
    if name in LOADERS:
        fail(f"reward {spec}: {name} is a reward that is there already; call yours by another name")
    if not name.replace("-", "_").replace(".", "_").isidentifier() or name.startswith("."):
        fail(f"reward {spec}: the name, which names a file of scores, must be a word, not {name!r}")
    try:
        user_function(file, function)
    except ValueError as e:
        fail(f"reward {name}: {e}")


def check_rewards(specs):
    """check_reward of each, and none twice: a name has one place in a row of scores."""
    for spec in specs:
        check_reward(spec)
        same = [s for s in specs if reward_name(s) == reward_name(spec)]
        if len(same) > 1:
            fail(f"--rewards: {reward_name(spec)} is named twice ({', '.join(same)})")


def load_reward(spec, device="cpu"):
    """A Scorer by name, "name=source" or "name=FILE.py:function"; where there is none, the program ends with
    one line."""
    check_reward(spec)
    name, _, source = spec.partition("=")
    own = function_of(spec)
    loader, *hub = (load_function, *own) if all(own) else LOADERS[name]
    try:
        return loader(name, source, device, *hub)
    except Exception as e:  # a missing file, a wrong format, no hub: one line says which
        kind = "" if type(e) is ValueError else f"{type(e).__name__}: "
        fail(f"reward {spec}: could not be loaded: {kind}{one_line(e)}")


# ----------------------------------------------------------------------------- stored scores

CONFIGS = ("config.json", "open_clip_config.json", "tokenizer.json", "tokenizer_config.json")
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model")


def reward_version(spec):
    """A short hash of what a score depends on: the reward, its weights, config and tokenizer, wherever they
    lie. Of a file, size and first and last megabyte count: hashing 23 GB takes longer than many a run. Of a
    function of the user's, the whole of its file counts."""
    name, _, source = spec.partition("=")
    file, function = function_of(spec)
    if function:
        whole = hashlib.sha256(Path(file).read_bytes() + f"\n{function}".encode())
        return whole.hexdigest()[:12]
    return files_version([name, 2, *LOADERS[name][1:]], source)  # 2: to be raised when a formula here changes


def files_version(parts, source):
    """The hash of `parts` and of the weights, config and tokenizer of a local file or folder."""
    parts, path = list(parts), Path(source)
    if not source:  # Path("") would be the working directory
        files = []
    else:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file == path or file.suffix in WEIGHTS or file.name in CONFIGS + VOCABULARIES:
            parts.append([file.name, *ends_of(file, 1 << 20)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def picture_version(path):
    """A short hash by which a picture that was replaced is noticed: its size and both ends, where PNG keeps a
    checksum of all pixels. None if it is not there."""
    try:
        stat = os.stat(path)
        return picture_hash(path, stat.st_ctime_ns, stat.st_size)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=None)
def picture_hash(path, changed, size):
    return hashlib.sha256(repr(ends_of(path, 4096)).encode()).hexdigest()[:12]


def stored_row(line):
    """A line of scores/NAME.jsonl as a dict; None if it is no row of scores."""
    try:
        row = json.loads(line)
        files, scores = row["file_names"], row["scores"]
        lengths = {len(v) for v in (files, scores, row.get("pictures")) if v is not None}
        names = [row["prompt"], *files]
        fits = len(lengths) == 1 and all(isinstance(name, str) for name in names)
        fits &= all(type(s) in (int, float) and math.isfinite(s) for s in scores or [])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return row if fits else None


def stored_lines(folder, name):
    """Yield (file, line number, row or None) of folder/scores/NAME.jsonl, and of those of parallel runs."""
    for path in parallel_files(Path(folder) / "scores", name):
        for n, line in enumerate(whole_lines(path), 1):
            yield path, n, stored_row(line)


def version_there(folder, name, lines, spec):
    """Whose scores count where labels are made of what lies there, the stored_lines: those of `spec`, if it
    is given and scored here, else the only ones."""
    versions = {row.get("version") for _, _, row in lines if row and row["scores"]}
    own = reward_version(spec) if spec else None
    if len(versions) > 1 and own not in versions:
        which = f"--rewards {name} or {name}=source, with all others that count"
        fail(
            f"{folder}/scores/{name}.jsonl: scores of {len(versions)} versions of {name}; say whose: {which}"
        )
    return own if own in versions else next(iter(versions), None)


def read_scores(folder, spec, rows):
    """{row index: [k floats]} of the rows [(prompt, file_names)] that this reward scored, as stored. What
    another version scored does not count, nor does a torn last line, nor a score of a picture that was
    replaced since."""
    name = reward_name(spec)
    return stored_scores(folder, name, stored_lines(folder, name), rows, reward_version(spec))[0]


def stored_scores(folder, name, lines, rows, version):
    """The same of a version, from stored_lines; and the indices of rows whose scores do not count: another
    version's, or of pictures that were replaced since."""
    stored, others, foreign, found, replaced, outdated = {}, set(), [], {}, [], []
    for path, n, row in lines:
        if row is None:
            foreign.append(f"{path}, line {n}")
        elif row["scores"] and row.get("version") == version:
            stored[(row["prompt"], *row["file_names"])] = row
        elif row["scores"]:
            others.add((row["prompt"], *row["file_names"]))
    for i, (prompt, files) in enumerate(rows):
        row = stored.get((prompt, *files))
        if row is None:
            outdated += [i] if (prompt, *files) in others else []
            continue
        now = [picture_version(f"{folder}/{f}") for f in files]
        if any(b not in (a, None) for a, b in zip(row.get("pictures") or now, now)):
            replaced.append(i)
        else:
            found[i] = row["scores"]
    if foreign:
        print(f"{foreign[0]}: no row of scores; {len(foreign)} such lines are not counted", file=sys.stderr)
    if replaced:
        what = f"pictures of {len(replaced)} rows were replaced since {name} scored them"
        first = rows[replaced[0]][1][0]
        print(f"{folder}/scores: {what}, which does not count (the first: {first})", file=sys.stderr)
    return found, [*outdated, *replaced]


def stream_rows(scorer, folder, rows, todo, batch_size):
    """Yield (row index, [(score, problem)]) of the rows in `todo`. Batches are cut by position among all
    images, whatever is done already: a resumed run computes what an unbroken one does, to the bit."""
    places = [(i, file) for i, (_, files) in enumerate(rows) for file in files]
    batches = [places[n : n + batch_size] for n in range(0, len(places), batch_size)]
    places = [place for batch in batches if any(i in todo for i, _ in batch) for place in batch]
    images, prompts = [Path(folder) / file for _, file in places], [rows[i][0] for i, _ in places]
    results = []
    for (i, _), result in zip(places, scorer.stream(images, prompts, batch_size)):
        if i in todo:
            results.append(result)
            if len(results) == len(rows[i][1]):
                yield i, scorer.of_row(results)
                results = []


def score_rows(
    folder, spec, rows, device="cpu", batch_size=32, on_error="stop", part="", load=None, bar=None
):
    """Score what is not yet scored and append it to folder/scores/NAME.jsonl, one line a row as it comes.
    `part` goes into the file's name, so that processes side by side do not share one. `load` stands in for
    load_reward where one scorer serves several folders, `bar` for a progress bar of this folder alone.

    A row with an unreadable image, an empty prompt or a score that is not finite ends the run
    (on_error="stop"), or is stored as a row without scores and tried again next time ("skip"). Returns how
    many rows were scored, and {row index: problem} of the skipped."""
    todo = set(range(len(rows))) - read_scores(folder, spec, rows).keys()
    if not todo:
        return 0, {}
    name, version, skipped = reward_name(spec), reward_version(spec), {}
    path, total = Path(folder) / "scores" / f"{name}{part}.jsonl", sum(len(rows[i][1]) for i in todo)
    scorer = (load or load_reward)(spec, device)
    bar = tqdm(total=total, desc=f"score {name}", unit="image") if bar is None else nullcontext(bar)
    try:
        with appending(path, "another run is scoring there", keep=stored_row) as f, bar as bar:
            for i, results in stream_rows(scorer, folder, rows, todo, batch_size):
                row = row_of_scores(folder, *rows[i], results, version)
                if row["scores"] is None and on_error == "stop":
                    advice = "mend that row, or leave such rows out with --on_error skip"
                    fail(f"reward {spec}: {row['problem']}; {advice}")
                if row["scores"] is None:
                    skipped[i] = row["problem"]
                f.write(json.dumps(row).encode() + b"\n")
                f.flush()
                bar.update(len(results))
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk has no name
        raise
    if skipped:
        first = next(iter(skipped.values()))
        print(
            f"reward {spec}: {len(skipped)} of {len(rows)} rows skipped, the first: {first}", file=sys.stderr
        )
    return len(todo) - len(skipped), skipped


def row_of_scores(folder, prompt, files, results, version):
    """A line of scores/NAME.jsonl, as a dict."""
    row = dict(version=version, prompt=prompt, file_names=files, scores=[score for score, _ in results])
    row["pictures"] = [picture_version(f"{folder}/{f}") for f in files]
    problems = [
        f"{Path(folder) / f}, prompt {prompt!r}: {problem}"
        for f, (_, problem) in zip(files, results)
        if problem
    ]
    if problems:
        row.update(scores=None, problem=problems[0])
    return row


# ----------------------------------------------------------------------------- the command line


def read_folder(folder):
    """[(prompt, file_names)] of an imagefolder (metadata.jsonl with prompt, text or caption and file_names or
    file_name), or of pictures with their caption in a .txt of the same name."""
    folder = Path(folder)
    if metadata_file(folder):
        return [(row["prompt"], row["file_names"]) for row in read_metadata(folder)]
    pictures = (p for p in sorted(folder.glob("*")) if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    captioned = [p for p in pictures if p.with_suffix(".txt").is_file()]
    if not captioned:
        fail(f"{folder}: neither metadata.jsonl nor pictures with a .txt caption beside them")
    return [(read_text(p.with_suffix(".txt")).strip(), [p.name]) for p in captioned]


def score_folder(cfg):
    rows, device = read_folder(cfg.score), pick_device(cfg.device)
    writable_folder("score", Path(cfg.score) / "scores")
    for spec in cfg.rewards:
        score_rows(cfg.score, spec, rows, device, cfg.batch_size, cfg.on_error)
        values = [score for scores in read_scores(cfg.score, spec, rows).values() for score in scores]
        name, mean = reward_name(spec), sum(values) / len(values) if values else float("nan")
        print(f"{name:12s} mean {mean:.4f} over {len(values)} images; {cfg.score}/scores/{name}.jsonl")


@one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    check_rewards(cfg.rewards)
    if cfg.score:
        score_folder(cfg)
        return
    if not cfg.prompt.strip() or not os.path.isfile(cfg.image):
        fail(
            f"rewards.py: --image {cfg.image!r} must be a file and --prompt not empty, "
            "or name a folder with --score (--help shows examples)"
        )
    if "diversity" in map(reward_name, cfg.rewards):
        fail("--rewards diversity: compares the pictures of a prompt; name a folder with --score")
    for spec in cfg.rewards:
        try:
            score = load_reward(spec, pick_device(cfg.device))([cfg.image], [cfg.prompt]).item()
            print(f"{reward_name(spec):12s} {score:.4f}")
        except ValueError as e:
            fail(f"{cfg.image}: {e}")


if __name__ == "__main__":
    main()
