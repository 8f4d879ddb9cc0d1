"""Reward models behind one function: load_reward(name, device) -> score(images, prompts) -> (N,) float tensor.

    python rewards.py --image picture.png --prompt "a red circle"            # every toy reward on one picture
    python rewards.py --image a.png --prompt "a cat" --rewards imagereward pickscore hpsv2.1=HPS_v2.1_compressed.pt
    python rewards.py --score outputs/synpic --rewards mps vqascore          # a whole folder -> its scores/NAME.jsonl

A reward is a name, or name=source with a local folder or file in the layout of the original. Larger is better, always.

    name         model, default source on the hub                                size      licence      score
    clip         open_clip ViT-H-14, laion/CLIP-ViT-H-14-laion2B-s32B-b79K       3.9 GB    MIT          cosine, -1 to 1
    hpsv2.1      open_clip ViT-H-14, xswu/HPSv2 HPS_v2.1_compressed.pt           2.0 GB    Apache-2.0   cosine, about .2 to .35
    hpsv2        the same, HPS_v2_compressed.pt                                  2.0 GB    Apache-2.0   cosine, about .2 to .3
    pickscore    CLIPModel ViT-H, yuvalkirstain/PickScore_v1                     3.9 GB    MIT          logit scale x cosine, about 15 to 25
    imagereward  BLIP-L + MLP, zai-org/ImageReward ImageReward.pt                1.8 GB    Apache-2.0   about -2.3 to 2
    cyclereward  BLIP-L + MLP, carolineec/CycleReward-Combo                      1.8 GB    MIT          unbounded
    mps          ViT-H + cross-attention, RE-N-Y/mpsv1                           4.4 GB    not stated   logit scale x cosine, about 0 to 15
    vqascore     CLIP-L/336 + Flan-T5-XXL, zhiqiulin/clip-flant5-xxl             23 GB     Apache-2.0   P("Yes"), 0 to 1
    vqascore-xl  the same with Flan-T5-XL, zhiqiulin/clip-flant5-xl              6.3 GB    Apache-2.0   P("Yes"), 0 to 1
    aesthetic    OpenAI ViT-L/14 + LAION v2 head, trl-lib/ddpo-aesthetic-predictor   1.7 GB   Apache-2.0   about 1 to 10, ignores the prompt
    toyworld     the exact checker of toyworld.py, for evaluation only                                  1 = shows the prompt, else 0

The weights of mps state no licence (their authors' code is MIT); only the paper's recipe in train.sh names it. Text beyond a model's context (77 tokens for CLIP, 35 for
ImageReward) is cut, and says so once. Everything runs in fp32 but VQAScore, which is bf16 as in its own code. Every
picture becomes 8-bit RGB before anything else: alpha is dropped as the originals do, 16-bit grey is scaled.
Weights are read as safetensors or with weights_only=True. Nothing here needs the scorers' own packages: they pin
libraries of years ago. test_rewards.py holds each scorer against its original modules on random weights.
"""
import hashlib
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

MEAN = torch.tensor([.48145466, .4578275, .40821073])[:, None, None]           # of every CLIP, and of BLIP
STD = torch.tensor([.26862954, .26130258, .27577711])[:, None, None]
HERE = Path(__file__).resolve().parent
TOY_REWARDS = tuple(f"{name}={HERE / 'toy/rewards' / folder}" for name, folder in (("clip", "clip"), ("hpsv2.1", "hps"), ("pickscore", "pick")))
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# ----------------------------------------------------------------------------- images and text


def read_image(image):
    """A file or a PIL image -> 8-bit RGB. 16-bit grey keeps its high byte: PIL's own conversion would clip it to white."""
    image = image if isinstance(image, Image.Image) else Image.open(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def crop(image, size, floor=False):
    """OpenAI CLIP's preprocessing: shorter side to `size` by PIL bicubic, centre crop, normalise -> (3, size, size).
    An odd margin is rounded half to even by torchvision, down by transformers (`floor`)."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = ((m // 2 if floor else round(m / 2)) for m in (w - size, h - size))
    image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - MEAN) / STD


def pad(image, size):
    """HPSv2's preprocessing: LONGER side to `size` by bicubic with antialias on the float tensor, zero-padded to a
    centred square, then normalised -> (3, size, size). open_clip's own crop would cut non-square images."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None] / 255
    h, w = (max(1, round(n * (size / max(x.shape[-2:])))) for n in x.shape[-2:])
    if (h, w) != tuple(x.shape[-2:]):
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
    left, top = (size - w) // 2, (size - h) // 2
    x = F.pad(x, (left, size - w - left, top, size - h - top))[0]
    return (x - MEAN) / STD


def square(image, size):
    """VQAScore's (LLaVA's) preprocessing: padded to a centred square with the mean colour, then as CLIP's."""
    side, (w, h) = max(image.size), image.size
    canvas = Image.new("RGB", (side, side), tuple(int(255 * m) for m in MEAN.flatten().tolist()))
    canvas.paste(image, ((side - w) // 2, (side - h) // 2))
    return crop(canvas, size, floor=True)


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


# ----------------------------------------------------------------------------- scoring: threads read, the model scores


class Scorer:
    """score(images, prompts) -> (N,) float tensor on the CPU, larger is better.

    prepare: PIL image -> tensor, in threads and two batches ahead; forward: (N, ...) tensor on the device, N prompts -> (N,)."""

    def __init__(self, name, prepare, forward, device="cpu"):
        self.name, self.prepare, self.forward, self.device = name, prepare, forward, device

    def stream(self, images, prompts, batch_size=32):
        """Yield (score, problem) of each pair in order: (float, None), or (None, what is wrong with this one)."""
        def load(image, prompt):
            if not prompt.strip():
                return None, "an empty prompt cannot be scored"
            try:
                return self.prepare(read_image(image)), None
            except (OSError, ValueError, Image.DecompressionBombError) as e:
                return None, f"not a readable image ({e})"
        images, prompts, ahead = list(images), list(prompts), deque()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for start in range(0, len(images) + 2 * batch_size, batch_size):
                ahead.append([(p, threads.submit(load, i, p)) for i, p in zip(images[start:start + batch_size], prompts[start:start + batch_size])])
                if len(ahead) < 3:
                    continue
                batch = [(p, *future.result()) for p, future in ahead.popleft()]
                good = [(p, x) for p, x, problem in batch if problem is None]
                if good:
                    x = [x for _, x in good]
                    with torch.inference_mode():
                        scores = iter(self.forward(torch.stack(x).to(self.device) if torch.is_tensor(x[0]) else x, [p for p, _ in good]).float().tolist())
                for _, _, problem in batch:
                    value = None if problem else next(scores)
                    if value is not None and not np.isfinite(value):
                        value, problem = None, f"the score is {value}"
                    yield value, problem

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


def from_hub(repo, file):
    """A file of a hub repository; without a name, its only weights."""
    from huggingface_hub import hf_hub_download, list_repo_files
    file = file or max((f for f in list_repo_files(repo) if f.endswith((".safetensors", ".pt", ".pth", ".bin"))), key=lambda f: f.endswith(".safetensors"))
    return Path(hf_hub_download(repo, file))


def find_weights(source, repo, file):
    """The checkpoint: `source` itself, the file of the usual name in that folder (or its only one), or the hub's."""
    path = Path(source or from_hub(repo, file))
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".safetensors"))
        path = files[0] if len(files) == 1 else path / (file or "model.safetensors")
    return path


def read_weights(path):
    """State dict of fp32 tensors from .safetensors, or from a torch file without pickled code ({"state_dict": ...} too)."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    return {k: v.float() for k, v in state.items()}


def check_keys(path, missing, unexpected):
    if missing or unexpected:
        raise ValueError(f"{path} is not such a checkpoint: missing keys {sorted(missing)[:3]}, unexpected keys {sorted(unexpected)[:3]}")


def pretrained(kind, source, unused=(), **kwargs):
    """transformers' from_pretrained, which only warns of keys that do not fit; `unused` parts may lie in the file."""
    kwargs.setdefault("dtype", torch.float32)
    model, info = kind.from_pretrained(source, output_loading_info=True, **kwargs)
    check_keys(source, info["missing_keys"] | {k for k, *_ in info["mismatched_keys"]},
               {k for k in info["unexpected_keys"] if "position_ids" not in k and not k.startswith(tuple(unused))})
    return model.eval()


def has(source, *names):
    """The folder `source` if it holds one of these files: local checkpoints may bring their own configuration and tokenizer."""
    folder = Path(source) if source and Path(source).is_dir() else Path(source or "").parent
    return folder if source and any((folder / n).is_file() for n in names) else None


# ----------------------------------------------------------------------------- the CLIP family: clip, hpsv2.1, hpsv2, pickscore


def cosine(scale, image, text):
    """The formula of every CLIP-type reward: scale * cos(image, text); (N, D), (N, D) -> (N,), fp32."""
    return scale * (F.normalize(image.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(-1)


def load_open_clip(name, source, device, repo, file):
    """CLIP score and HPSv2 (Wu et al. 2023): cosine, unscaled. From an open_clip folder (open_clip_config.json,
    open_clip_model.safetensors, a tokenizer) or a ViT-H-14 checkpoint."""
    import open_clip
    if folder := has(source, "open_clip_config.json"):
        from transformers import CLIPTokenizer
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        model, hf, length = open_clip.CLIP(**config), CLIPTokenizer.from_pretrained(folder), config["text_cfg"]["context_length"]
        path, ids = folder / "open_clip_model.safetensors", lambda texts: tokenize(hf, texts, length, name)[0]
        state = read_weights(path)
    else:
        path = find_weights(source, repo, file)
        state = read_weights(path)                             # first: a wrong file fails before a billion weights are made
        model, tokenizer = open_clip.create_model("ViT-H-14"), open_clip.get_tokenizer("ViT-H-14")

        def ids(texts):
            warn_cut([len(tokenizer.encode(t)) + 2 for t in texts], 77, name)
            return tokenizer(texts)
    problems = model.load_state_dict(state, strict=False)
    check_keys(path, problems.missing_keys, problems.unexpected_keys)
    model = model.float().eval().to(device)
    size = model.visual.image_size[0] if isinstance(model.visual.image_size, (tuple, list)) else model.visual.image_size
    return Scorer(name, partial(pad, size=size), lambda x, prompts: cosine(1., model.encode_image(x), model.encode_text(ids(prompts).to(device))), device)


def load_pickscore(name, source, device):
    """PickScore (Kirstain et al. 2023): exp(logit_scale) * cosine of a CLIPModel."""
    from transformers import CLIPModel, CLIPTokenizer
    model = pretrained(CLIPModel, source or "yuvalkirstain/PickScore_v1", use_safetensors=True).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(has(source, "tokenizer_config.json", "vocab.json") or LAION_H)
    length = model.config.text_config.max_position_embeddings

    def forward(x, prompts):
        text = model.get_text_features(input_ids=tokenize(tokenizer, prompts, length, name)[0].to(device)).pooler_output
        return cosine(model.logit_scale.exp(), model.get_image_features(pixel_values=x).pooler_output, text)
    return Scorer(name, partial(crop, size=model.config.vision_config.image_size, floor=True), forward, device)


# ----------------------------------------------------------------------------- BLIP with a head: imagereward, cyclereward


def head_of(state, prefix, activation=None):
    """A multi-layer perceptron from its state dict: `prefix`0.weight, ... applied in order -> function (N, D) -> (N, 1)."""
    layers = [(state[f"{prefix}{i}.weight"], state[f"{prefix}{i}.bias"])
              for i in sorted(int(k[len(prefix):].split(".")[0]) for k in state if k.startswith(prefix) and k.endswith(".weight"))]
    if not layers:
        raise ValueError(f"missing keys {prefix}*.weight")

    def head(x):
        for n, (w, b) in enumerate(layers):
            x = F.linear(x, w.to(x.device), b.to(x.device))
            x = activation(x) if activation and n + 1 < len(layers) else x
        return x
    return head


def load_blip(name, source, device, repo, file):
    """ImageReward (Xu et al. 2023) and CycleReward (Bahng et al. 2025): MLP(h_CLS) of BLIP's image-grounded text encoder.

    transformers' BLIP after renaming keys, not the `image-reward` package: under transformers 5 the package does not
    even import. Sizes are read off the tensors; attention heads are 64 wide, as in BLIP-L and BERT-base."""
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
    path = find_weights(source, repo, file)
    state = read_weights(path)
    names = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding", "patch_embed.proj": "embeddings.patch_embedding",
             "blocks": "encoder.layers", "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv",
             "attn.proj": "self_attn.projection", "norm": "post_layernorm"}
    vision, text = {}, {}
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            new = f".{key.removeprefix('blip.visual_encoder.')}."
            for old, here in names.items():                    # whole names only: norm is not norm1
                new = new.replace(f".{old}.", f".{here}.")
            vision[new.strip(".")] = value
        elif key.startswith("blip.text_encoder."):
            text[key.removeprefix("blip.text_encoder.")] = value
    count = lambda keys, at: 1 + max((int(k.split(".")[at]) for k in keys if k.startswith("encoder.layer")), default=-1)
    patch, words = vision.get("embeddings.patch_embedding.weight"), text.get("embeddings.word_embeddings.weight")
    if patch is None or words is None:
        check_keys(path, {"blip.visual_encoder.patch_embed.proj.weight", "blip.text_encoder.embeddings.word_embeddings.weight"} - set(state), set(state))
    width, size = patch.shape[0], patch.shape[-1] * round((vision["embeddings.position_embedding"].shape[1] - 1) ** .5)
    encoder = BlipVisionModel(BlipVisionConfig(
        hidden_size=width, intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0], num_hidden_layers=count(vision, 2),
        num_attention_heads=width // 64, image_size=size, patch_size=patch.shape[-1], layer_norm_eps=1e-6))
    reader = BlipTextModel(BlipTextConfig(
        vocab_size=words.shape[0], hidden_size=words.shape[1], encoder_hidden_size=width, intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=count(text, 2), num_attention_heads=words.shape[1] // 64, layer_norm_eps=1e-12, is_decoder=True,
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0]), add_pooling_layer=False)
    for model, part in ((encoder, vision), (reader, text)):
        problems = model.load_state_dict(part, strict=False)
        check_keys(path, [k for k in problems.missing_keys if "position_ids" not in k], [k for k in problems.unexpected_keys if "position_ids" not in k])
        model.eval().to(device)
    cycle = name == "cyclereward"
    head, length = head_of(state, "mlp.layers.", F.gelu if cycle else None), 128 if cycle else 35
    mean, std = (0., 1.) if cycle else (0.16717362830052426, 1.0333394966054072)
    tokenizer = BertTokenizer.from_pretrained(has(source, "vocab.txt", "tokenizer.json") or "google-bert/bert-base-uncased")

    def forward(x, prompts):
        ids, attention = (t.to(device) for t in tokenize(tokenizer, prompts, length, name))
        seen = encoder(pixel_values=x).last_hidden_state                                           # (N, 1 + patches, width)
        h = reader(input_ids=ids, attention_mask=attention, encoder_hidden_states=seen, is_decoder=False).last_hidden_state[:, 0]
        return (head(h)[:, 0] - mean) / std
    return Scorer(name, partial(crop, size=size), forward, device)


# ----------------------------------------------------------------------------- CLIP with cross-attention: mps

CONDITION = ("light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity, "
             "attributes, position, number, location, word, things.")
TAU = .01                                                      # of its README and of the port; its evaluation scripts have .3


def mps_cross(state, x, context, mask):
    """MPS's cross-attention model: image tokens x (N, L, D) read text tokens context (N, T, D) where mask (N, T) is true.

    Each layer: multi-query cross-attention with a parallel SwiGLU, then a PaLM block (multi-query self-attention with
    rotary positions, parallel SwiGLU), both pre-norm and residual. `state` has the keys after "mps.cross_model.layers."."""
    swiglu = lambda h: F.silu(h.chunk(2, -1)[1]) * h.chunk(2, -1)[0]

    def attend(q, k, v, mask=None):                            # heads share one key and value; scale 1 / sqrt(head width)
        q = q.unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)                                     # (N, heads, L, d)
        k, v = (t[:, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def rotate(t, d):                                          # (N, L, heads * d), the same angles for every head
        angle = torch.arange(t.shape[1], device=t.device)[:, None] / 10000 ** (torch.arange(0, d, 2, device=t.device) / d)
        angle = torch.cat([angle, angle], -1)                                                      # (L, d)
        t = t.unflatten(-1, (-1, d)).transpose(1, 2)
        a, b = t.chunk(2, -1)
        return (t * angle.cos() + torch.cat([-b, a], -1) * angle.sin()).transpose(1, 2).flatten(2)
    for n in range(1 + max(int(k.split(".")[0]) for k in state)):
        w = lambda name: state[f"{n}.{name}"]
        norm = lambda x, block: F.layer_norm(x, x.shape[-1:], w(f"{block}.fn.norm.weight"), w(f"{block}.fn.norm.bias"))
        h = norm(x, 0)
        k, v = F.linear(context, w("0.fn.to_kv.weight")).chunk(2, -1)
        h_cross = attend(F.linear(h, w("0.fn.to_q.weight")), k, v, mask[:, None, None])
        x = x + F.linear(h_cross, w("0.fn.to_out.weight")) + F.linear(swiglu(F.linear(h, w("0.fn.ff.0.weight"))), w("0.fn.ff.2.weight"))
        inner, d = w("1.fn.attn_out.weight").shape[1], k.shape[-1]
        fused = F.linear(norm(x, 1), w("1.fn.fused_attn_ff_proj.weight"))
        q, k, v, ff = fused.split((inner, d, d, fused.shape[-1] - inner - 2 * d), -1)
        x = x + F.linear(attend(rotate(q, d), rotate(k, d), v), w("1.fn.attn_out.weight")) + F.linear(swiglu(ff), w("1.fn.ff_out.1.weight"))
    return x


def load_mps(name, source, device, repo, file):
    """MPS (Zhang et al. 2024), overall preference: exp(logit_scale) * cos(text, image tokens after reading the text).

    Text tokens that have nothing to do with CONDITION are masked out. The largest similarity is taken within each pair;
    the original takes it over the batch, so that its scores depend on the batch."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    path = find_weights(source, repo, file)
    state = read_weights(path)
    model = CLIPModel(CLIPConfig.from_pretrained(has(source, "config.json") or LAION_H)).eval()
    problems = model.load_state_dict({k.removeprefix("mps.model."): v for k, v in state.items() if k.startswith("mps.model.") and "position_ids" not in k}, strict=False)
    cross = {k.removeprefix("mps.cross_model.layers."): v.to(device) for k, v in state.items() if k.startswith("mps.cross_model.layers.")}
    missing = [k for k in problems.missing_keys if "position_ids" not in k] + ([] if cross else ["mps.cross_model.layers"])
    check_keys(path, missing, problems.unexpected_keys + [k for k in state if not k.startswith(("mps.model.", "mps.cross_model.layers."))])
    model.to(device)
    tokenizer = CLIPTokenizer.from_pretrained(has(source, "tokenizer_config.json", "vocab.json") or LAION_H)
    length = model.config.text_config.max_position_embeddings

    def tokens(ids):                                           # every token, projected, (N, T, D)
        return model.text_projection(model.text_model(input_ids=ids.to(device)).last_hidden_state)
    with torch.inference_mode():
        condition = tokens(tokenizer([CONDITION], padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids)   # (1, T, D)

    def forward(x, prompts):
        ids = tokenize(tokenizer, prompts, length, name)[0]
        text = tokens(ids)                                                                         # (N, T, D)
        end = text[torch.arange(len(ids)), ids.argmax(-1).to(device)]                              # (N, D): the end token has the largest id
        image = model.visual_projection(model.vision_model(pixel_values=x).last_hidden_state)      # (N, 1 + patches, D)
        near = (text @ condition[0].T).amax(-1)                                                    # (N, T)
        mask = near / near.amax(-1, keepdim=True) > TAU
        return cosine(model.logit_scale.exp(), mps_cross(cross, image, text, mask)[:, 0], end)
    return Scorer(name, partial(crop, size=model.config.vision_config.image_size, floor=True), forward, device)


# ----------------------------------------------------------------------------- a question to a vision-language model: vqascore

SYSTEM = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."


def load_vqascore(name, source, device, repo, dtype=torch.bfloat16):
    """VQAScore (Lin et al. 2024): P("Yes" | image, 'Does this figure show "..."?') = exp(-mean cross-entropy of the answer)
    by CLIP-FlanT5: the patches of CLIP-L/336's last but one layer, through a two-layer projector, stand among the words."""
    from transformers import AutoTokenizer, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    class ClipT5(T5ForConditionalGeneration):                  # its checkpoint is a T5 with `mm_projector.{0,2}` beside it
        def __init__(self, config):
            super().__init__(config)
            self.mm_projector = torch.nn.Sequential(torch.nn.Linear(config.mm_hidden_size, config.d_model), torch.nn.GELU(),
                                                    torch.nn.Linear(config.d_model, config.d_model))
            self.post_init()
    config = T5Config.from_pretrained(source or repo)
    model = pretrained(ClipT5, source or repo, unused=("vision_tower.", "embed_tokens."), config=config, dtype=dtype, weights_only=True).to(device)
    if model.config.scale_decoder_outputs:                     # transformers derives it; true would divide the logits by sqrt(d)
        raise ValueError(f"{source or repo}: the decoder's outputs would be scaled: tie_word_embeddings must be false, as in Flan-T5")
    tower = pretrained(CLIPVisionModel, config.mm_vision_tower, unused=("text_model.", "text_projection", "visual_projection", "logit_scale"), dtype=dtype).to(device)
    flan = f"google/flan-t5-{'xl' if name == 'vqascore-xl' else 'xxl'}"
    tokenizer = AutoTokenizer.from_pretrained(has(source, "tokenizer.json", "spiece.model") or flan)
    answer = tokenizer("Yes", return_tensors="pt").input_ids.to(device)                            # (1, 2): Yes and the end token

    def forward(x, prompts):
        # each side of the image is tokenised for itself, so an end token stands before the image, as in training
        before = tokenizer(f"{SYSTEM} USER: ", return_tensors="pt").input_ids.to(device).expand(len(prompts), -1)
        after = tokenizer([f'\nDoes this figure show "{p}"? Please answer yes or no. ASSISTANT: ' for p in prompts], padding=True, return_tensors="pt").to(device)
        patches = model.mm_projector(tower(pixel_values=x.to(dtype), output_hidden_states=True).hidden_states[-2][:, 1:])   # (N, 576, D)
        words = model.get_input_embeddings()
        embeds = torch.cat([words(before), patches, words(after.input_ids)], 1)
        attention = torch.cat([torch.ones(embeds.shape[0], embeds.shape[1] - after.input_ids.shape[1], device=device, dtype=torch.long), after.attention_mask], 1)
        labels = answer.repeat(len(prompts), 1)
        logits = model(inputs_embeds=embeds, attention_mask=attention, labels=labels).logits.float()                         # (N, 2, vocabulary)
        return (-F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)).exp()
    return Scorer(name, partial(square, size=tower.config.image_size), forward, device)


# ----------------------------------------------------------------------------- no prompt: aesthetic; no model: toyworld


def load_aesthetic(name, source, device, repo, file):
    """LAION aesthetic predictor v2 (Schuhmann 2022): MLP(e / |e|), e the image embedding of OpenAI's CLIP ViT-L/14. The MLP
    has no activation, so it is one affine map."""
    from transformers import CLIPVisionModelWithProjection
    model = pretrained(CLIPVisionModelWithProjection, has(source, "config.json") or "openai/clip-vit-large-patch14",
                       unused=("text_model.", "text_projection", "logit_scale")).to(device)
    path = Path(source) / file if has(source, file) and Path(source).is_dir() else find_weights(source, repo, file)
    state = read_weights(path)
    check_keys(path, {"layers.0.weight", "layers.7.bias"} - set(state), {k for k in state if not k.startswith("layers.")})
    head = head_of(state, "layers.")
    return Scorer(name, partial(crop, size=model.config.vision_config.image_size if hasattr(model.config, "vision_config") else model.config.image_size),
                  lambda x, prompts: head(F.normalize(model(pixel_values=x).image_embeds, dim=-1))[:, 0], device)


def load_toyworld(name, source, device):
    """The exact checker as a scorer. It is the truth of the toy world: never label training lists with it."""
    import toyworld
    return Scorer(name, lambda image: image, lambda images, prompts: torch.tensor([float(toyworld.check(p, i)) for i, p in zip(images, prompts)]))


LOADERS = {                                                    # name: (loader, then its default hub repository and file)
    "clip": (load_open_clip, LAION_H, "open_clip_model.safetensors"),
    "hpsv2.1": (load_open_clip, "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "hpsv2": (load_open_clip, "xswu/HPSv2", "HPS_v2_compressed.pt"),
    "pickscore": (load_pickscore,),
    "imagereward": (load_blip, "zai-org/ImageReward", "ImageReward.pt"),
    "cyclereward": (load_blip, "carolineec/CycleReward-Combo", None),
    "mps": (load_mps, "RE-N-Y/mpsv1", "model.safetensors"),
    "vqascore": (load_vqascore, "zhiqiulin/clip-flant5-xxl"),
    "vqascore-xl": (load_vqascore, "zhiqiulin/clip-flant5-xl"),
    "aesthetic": (load_aesthetic, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
    "toyworld": (load_toyworld,),
}


def reward_name(spec):
    return spec.partition("=")[0]


def check_reward(spec):
    """End with one line if "name" or "name=source" can be no reward: an unknown name, a source that is not there."""
    name, _, source = spec.partition("=")
    if name not in LOADERS:
        raise SystemExit(f"unknown reward {name!r}; there are {', '.join(LOADERS)}, each also as name=folder_or_file")
    if source and not Path(source).exists():
        raise SystemExit(f"{name}={source}: no such file or folder")


def load_reward(spec, device="cpu"):
    """A Scorer by name or "name=source". Ends the program with one line if the name is unknown or nothing can be loaded."""
    check_reward(spec)
    name, _, source = spec.partition("=")
    loader, *hub = LOADERS[name]
    try:
        return loader(name, source, device, *hub)
    except Exception as e:                                     # a missing file, a wrong format, no hub: one line says which
        raise SystemExit(f"reward {spec}: could not be loaded: {type(e).__name__}: {' '.join(str(e).split())[:400]}")


# ----------------------------------------------------------------------------- stored scores


def reward_version(spec):
    """A short hash of what a score depends on: the reward and its weights, wherever these lie. Weights are recognised by
    size and by their first and last megabyte: hashing 23 GB would take longer than many a run."""
    name, _, source = spec.partition("=")
    parts, path = [name, 1, *LOADERS[name][1:]], Path(source)  # 1: to be raised when a formula here changes
    for file in sorted(path.rglob("*")) if path.is_dir() else [path] if source else []:
        if file.suffix in (".pt", ".pth", ".bin", ".safetensors"):
            with open(file, "rb") as f:
                head = f.read(1 << 20)
                f.seek(max(0, file.stat().st_size - (1 << 20)))
                parts.append([file.name, file.stat().st_size, hashlib.sha256(head + f.read()).hexdigest()])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def read_scores(folder, spec, rows, any_version=False):
    """{row index: [k floats]} of the rows [(prompt, file_names)] that this reward scored in folder/scores/NAME.jsonl, and in
    NAME@0of8.jsonl ... of parallel runs. What another version scored does not count, nor does a torn last line."""
    name, version, stored = reward_name(spec), None if any_version else reward_version(spec), {}
    files = [Path(folder) / "scores" / f"{name}.jsonl", *sorted((Path(folder) / "scores").glob(f"{name}@*.jsonl"))]
    for line in (line for path in files if path.is_file() for line in path.read_text().splitlines()):
        try:
            row = json.loads(line)
            if (any_version or row["version"] == version) and row["scores"] and len(row["scores"]) == len(row["file_names"]):
                stored[row["prompt"], *row["file_names"]] = row["scores"]
        except (ValueError, KeyError, TypeError):
            continue
    return {i: stored[prompt, *names] for i, (prompt, names) in enumerate(rows) if (prompt, *names) in stored}


def score_rows(folder, spec, rows, device="cpu", batch_size=32, on_error="stop", part=""):
    """Score what is not yet scored and append it to folder/scores/NAME.jsonl, one line a row as it comes. `part` keeps the
    files of processes that work side by side apart.

    A row with an unreadable image, an empty prompt or a score that is not finite ends the run (on_error="stop"), or is
    stored as a row without scores and tried again next time ("skip"). Returns how many rows were scored, and
    {row index: problem} of the skipped."""
    done = read_scores(folder, spec, rows)
    todo = [i for i in range(len(rows)) if i not in done]
    if not todo:
        return 0, {}
    name, version, skipped = reward_name(spec), reward_version(spec), {}
    scorer, path = load_reward(spec, device), Path(folder) / "scores" / f"{name}{part}.jsonl"
    path.parent.mkdir(exist_ok=True)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    stream = scorer.stream([Path(folder) / file for i in todo for file in rows[i][1]], [rows[i][0] for i in todo for _ in rows[i][1]], batch_size)
    with open(path, "a") as f, tqdm(total=sum(len(rows[i][1]) for i in todo), desc=f"score {name}", unit="image") as bar:
        f.write("\n" if torn else "")                          # ends a torn line, so that the next row stands alone
        for i in todo:
            prompt, files = rows[i]
            results = [next(stream) for _ in files]
            problems = [f"{Path(folder) / file}, prompt {prompt!r}: {problem}" for file, (_, problem) in zip(files, results) if problem]
            if problems and on_error == "stop":
                raise SystemExit(f"reward {spec}: {problems[0]}; mend that row, or leave such rows out with --on_error skip")
            if problems:
                skipped[i] = problems[0]
            f.write(json.dumps({"version": version, "prompt": prompt, "file_names": files, "scores": None if problems else [s for s, _ in results],
                                **({"problem": problems[0]} if problems else {})}) + "\n")
            f.flush()
            bar.update(len(files))
    if skipped:
        print(f"reward {spec}: {len(skipped)} of {len(rows)} rows skipped, the first: {next(iter(skipped.values()))}", file=sys.stderr)
    return len(todo) - len(skipped), skipped


def read_folder(folder):
    """[(prompt, file_names)] of an imagefolder (metadata.jsonl with prompt, text or caption and file_names or file_name),
    or of pictures with their caption in a .txt of the same name."""
    folder = Path(folder)
    if (folder / "metadata.jsonl").is_file():
        rows = []
        for n, line in enumerate((folder / "metadata.jsonl").read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                prompt = next(row[k] for k in ("prompt", "text", "caption") if k in row)
                files = row["file_names"] if "file_names" in row else [row["file_name"]]
                if not isinstance(prompt, str) or not files or not all(isinstance(f, str) and ".." not in Path(f).parts for f in files):
                    raise ValueError
            except (ValueError, KeyError, TypeError, StopIteration):
                raise SystemExit(f"{folder / 'metadata.jsonl'}, line {n}: needs prompt (or text, caption) and file_names (or file_name); mend or delete that row")
            rows.append((prompt, files))
    else:
        rows = [(p.with_suffix(".txt").read_text().strip(), [p.name]) for p in sorted(folder.glob("*"))
                if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and p.with_suffix(".txt").is_file()]
    if not rows:
        raise SystemExit(f"{folder}: neither metadata.jsonl nor pictures with a .txt caption beside them")
    return rows


def main(argv=None):
    from rankdpo import fail, option, parse, pick_device

    @dataclass
    class Config:
        image: str = option("", "an image file to score")
        prompt: str = option("", "its prompt")
        score: str = option("", "a folder to score: an imagefolder, or pictures with .txt captions; resumes")
        rewards: tuple = option(TOY_REWARDS, "rewards, as name or name=source")
        batch_size: int = option(32, "images a forward pass")
        on_error: str = option("stop", "rows that cannot be scored", ("stop", "skip"))
        device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")

    cfg = parse(Config, __doc__, argv)
    for spec in cfg.rewards:
        check_reward(spec)
    if cfg.batch_size < 1:
        fail(f"--batch_size must be positive, got {cfg.batch_size}")
    if cfg.score:
        rows = read_folder(cfg.score)
        for spec in cfg.rewards:
            score_rows(cfg.score, spec, rows, pick_device(cfg.device), cfg.batch_size, cfg.on_error)
            values = np.concatenate([s for s in read_scores(cfg.score, spec, rows).values()] or [[]])
            print(f"{reward_name(spec):12s} mean {values.mean() if len(values) else float('nan'):.4f} over {len(values)} images; {cfg.score}/scores/{reward_name(spec)}.jsonl")
        return
    if not cfg.prompt.strip() or not os.path.isfile(cfg.image):
        fail(f"rewards.py: --image {cfg.image!r} must be a file and --prompt not empty, or name a folder with --score (--help shows examples)")
    for spec in cfg.rewards:
        try:
            print(f"{reward_name(spec):12s} {load_reward(spec, pick_device(cfg.device))([cfg.image], [cfg.prompt]).item():.4f}")
        except ValueError as e:
            fail(f"{cfg.image}: {e}")


if __name__ == "__main__":
    main()
