"""The published reward models: preprocessing, tokenizers and weights, one section for each model.

PUBLISHED holds a loader for each name; rewards.load_reward calls it. A loader gets (name, source, weights,
device) and returns a Scorer: `source` is the folder or file that the user named, or "", and `weights` is the
file that find_weights took for it. docs/rewards.md says how far each scorer agrees with its original.

A wrong score looks like a right one, so loading fails instead: weights must have exactly the tensors of the
published architecture (or of the folder's config) in its shapes, and a tokenizer must fit its model and tell
two sentences apart. Weights are read as safetensors or with weights_only=True. The scorers' own packages are
not used: they pin libraries of years ago. tests/test_rewards.py and test_hpsv3.py hold each scorer against
the original's own preprocessing and modules.
"""

import os
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, list_repo_files
from PIL import Image
from torch import nn

from lib.common import HERE, ahead, one_line
from lib.formats import read_weights
from lib.pictures import open_image
from lib.tables import parse_json, read_text

# ----------------------------------------------------------------------------- pictures

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # of every CLIP, and of BLIP
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def crop(size):
    """OpenAI CLIP's preprocessing, by open_clip: shorter side to `size` by PIL bicubic, centre crop, RGB,
    normalise -> (3, size, size). Alpha weighs the colours that the resize mixes."""
    from open_clip.transform import image_transform

    return image_transform(size, is_train=False)


def processed(processor):
    """An image processor of transformers as a function of a picture -> (3, H, W). It gets RGB: of old it
    dropped alpha, today's composites on white."""
    return lambda image: processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]


def letterbox(size):
    """HPSv2's preprocessing: LONGER side to `size` by bicubic with antialias on the float tensor, zero-padded
    to a centred square, then normalised -> (3, size, size)."""

    def prepare(image):
        x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()[None] / 255
        h, w = (max(1, round(n * (size / max(x.shape[-2:])))) for n in x.shape[-2:])
        if (h, w) != tuple(x.shape[-2:]):
            x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
        left, top = (size - w) // 2, (size - h) // 2
        x = F.pad(x, (left, size - w - left, top, size - h - top))[0]
        return (x - MEAN) / STD

    return prepare


# ----------------------------------------------------------------------------- text

CLIP_WORDS = 49408  # the size of CLIP's one published vocabulary, which comes with open_clip


def load_tokenizer(kind, source, size, hub="", extra=()):
    """The tokenizer of a folder that brings one, or the hub's, of the model's `size` words (0: the caller
    compares). transformers 5 does not fail where a tokenizer's files are not there: it returns one of 2 to 5
    words, and all prompts become the same. A file of weights brings none, whatever is beside it."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
    own = [Path(source) / name for name in names if source and (Path(source) / name).is_file()]
    try:
        tokenizer = kind.from_pretrained(source if own or not hub else hub)
        tokenizer.add_tokens(list(extra), special_tokens=True)
        tokenizer("a red circle")  # one of another kind fails only here, each in a way of its own
        if size and len(tokenizer) != size:
            raise ValueError(f"it has {len(tokenizer)} words and the model {size}")
        return tokenizer
    except Exception as e:
        where = own[0] if own else hub or source
        raise ValueError(
            f"no tokenizer at {where} for this model ({one_line(e)}); name a FOLDER that holds the weights "
            "and the tokenizer's files (tokenizer.json, or vocab.txt / vocab.json and merges.txt)"
        ) from None


def clip_tokenizer(source, size):
    """transformers' CLIPTokenizer, as PickScore and MPS use it. No folder's files replace CLIP's words."""
    from open_clip import SimpleTokenizer

    if size != CLIP_WORDS:
        return load_tokenizer(transformers.CLIPTokenizer, source, size)
    bpe = SimpleTokenizer()
    words = [*list(bpe.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks), model_max_length=77)


@lru_cache(maxsize=None)  # once a model
def warn_cut(name, limit):
    print(f"{name}: prompts of more than {limit} tokens are cut there; said once", file=sys.stderr)


def tokenize(tokenizer, texts, length, name):
    """transformers tokenizer -> ids and attention mask, both (N, length)."""
    if max(map(len, tokenizer(texts, truncation=False, verbose=False).input_ids)) > length:
        warn_cut(name, length)
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
        if max(len(tokenizer.encode(text)) + 2 for text in texts) > length:
            warn_cut(name, length)
        return tokenizer(texts)

    return ids


# ------------------------------------------------------------ scoring: threads read, the model scores


LONGEST = 1 << 14  # pixels a side: VQAScore makes a square of it


class Scorer:
    """score(images, prompts) -> (N,) float tensor on the CPU, larger is better.

    prepare: PIL image -> tensor, in threads and two batches ahead; forward: (N, ...) tensor on the device, N
    prompts -> (N,). reserved: words that a prompt may not hold, because the model gives them another meaning.
    of_row: the results of one prompt's pictures -> their scores, where pictures are compared."""

    def __init__(self, name, prepare, forward, device="cpu", reserved=(), of_row=lambda results: results):
        self.name, self.prepare, self.forward, self.device = name, prepare, forward, device
        self.reserved, self.of_row = reserved, of_row

    def load(self, image, prompt):
        """(what forward takes, None), or (None, what is wrong)."""
        if not prompt.strip():
            return None, "an empty prompt cannot be scored"
        if odd := [word for word in self.reserved if word in prompt]:
            return None, f"{odd[0]} in the prompt would not be read as text"
        try:
            prompt.encode()  # half a surrogate pair is no text
            image = open_image(image)
            if max(image.size) > min(LONGEST, 200 * min(image.size)):
                raise ValueError(f"too elongated: {image.width} x {image.height} pixels")
            return self.prepare(image), None
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
            scores = self.forward(x, texts)
        numbers, found = torch.is_tensor(scores), []
        for score, (_, problem) in zip(scores.float().tolist() if numbers else scores, loaded):
            if not problem and numbers and not np.isfinite(score).all():
                problem = f"the score is {score}"
            found.append((None if problem else score, problem))
        return found

    def stream(self, images, prompts, batch_size=32):
        """Yield (score, None), or (None, what is wrong with it), of each pair in order."""
        # a function of the user's may change the working folder while threads read files
        images = (i if isinstance(i, Image.Image) else Path(i).absolute() for i in images)
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
FOLDER = "config.json"  # in place of a file of weights: a folder of several files, which has a config.json


def from_hub(repo, file, kind="model"):
    """A file of a hub repository; without a name, its only weights."""
    try:
        files = [file] if file else [f for f in list_repo_files(repo) if f.endswith(WEIGHTS)]
        file = max(files, key=lambda f: f.endswith(".safetensors"))
        return Path(hf_hub_download(repo, file, repo_type=kind))
    except Exception as e:
        problem = f"cannot be had from the hub ({type(e).__name__}); name a local copy"
        raise ValueError(f"{repo} {file or 'weights'} {problem}") from None


def find_weights(source, repo, file):
    """The checkpoint: `source` itself, that folder's file of the usual name or its only one, or the hub's.
    Of a FOLDER of several files the folder, or its name on the hub."""
    if file == FOLDER:
        if source and not (Path(source) / FOLDER).is_file():
            raise ValueError(f"{source}: a FOLDER with config.json, weights and tokenizer is wanted")
        return source or repo
    path = Path(source or from_hub(repo, file))
    if not path.is_dir():
        return path
    files = sorted(p for p in path.iterdir() if p.suffix in WEIGHTS)
    usual = [p for p in files if p.name == (file or "model.safetensors")]
    if not usual and len(files) != 1:
        found = ", ".join(p.name for p in files) or "nothing of the kind"
        raise ValueError(f"{path}: {file or 'model.safetensors'} is wanted there, found {found}")
    return (usual or files)[0]


def check_keys(path, missing, unexpected, shapes):
    """ValueError unless no key is missing or unexpected and the shapes {key: (found, wanted)} agree."""
    wrong = [f"{k} {tuple(a)} instead of {tuple(b)}" for k, (a, b) in shapes.items() if a != b]
    found = {"missing keys": missing, "unexpected keys": unexpected, "wrong shapes": wrong}
    problems = [f"{what} {sorted(keys)[:3]}" for what, keys in found.items() if keys]
    if problems:
        raise ValueError(f"{path} is not such a checkpoint: {', '.join(problems)}")


def load_strict(build, path, device, rename=lambda key: key, dtype=torch.float32):
    """build() with exactly the weights of a file: which tensors there are, the architecture says, not the
    file. rename: a key of the file -> as build() calls it, or None: not used. No dtype: that of the file."""
    named = ((rename(key), tensor) for key, tensor in read_weights(path).items())
    state = {key: tensor for key, tensor in named if key and not key.endswith("position_ids")}  # 0, 1, 2, ...
    with init_empty_weights():  # initial values would cost 16 s for a ViT-H
        model = build()
    wanted = model.state_dict()
    pairs = {key: (state[key].shape, wanted[key].shape) for key in wanted.keys() & state.keys()}
    check_keys(path, wanted.keys() - state.keys(), state.keys() - wanted.keys(), pairs)
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def pretrained(kind, source, unused=(), optional=(), **kwargs):
    """transformers' from_pretrained, which only warns of keys that do not fit -> (model, missing `optional`
    keys). `unused` parts may be in the file."""
    kwargs = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
    try:
        model, info = kind.from_pretrained(source, **kwargs)
    except Exception as e:
        for path in sorted(Path(source).glob("*model*")):  # one of several files may be torn
            if path.suffix in WEIGHTS:
                read_weights(path)
        what = f"{source}: config.json or weights cannot be read ({type(e).__name__}: {one_line(e)[:200]})"
        raise ValueError(f"{what}; a folder with all files of the repository is wanted") from None
    left_out = {k for k in info["missing_keys"] if k.startswith(optional)}
    unexpected = {k for k in info["unexpected_keys"] if "position_ids" not in k and not k.startswith(unused)}
    shapes = {key: shapes for key, *shapes in info["mismatched_keys"]}
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


def open_clip_model(source, weights, device):
    """(open_clip's CLIP, its text_cfg, pixels a side) of ViT-H-14 or of a folder's open_clip_config.json."""
    import open_clip

    own = read_json(Path(source) / "open_clip_config.json") if source else {}
    config = own.get("model_cfg", open_clip.get_model_config("ViT-H-14"))
    usual = dict(mean=[*open_clip.OPENAI_DATASET_MEAN], std=[*open_clip.OPENAI_DATASET_STD])
    usual.update(resize_mode="shortest", interpolation="bicubic")
    for key, value in own.get("preprocess_cfg", {}).items():
        if usual.get(key, value) != value:
            raise ValueError(f"{source}/open_clip_config.json: another {key} than CLIP's in preprocess_cfg")
    model = load_strict(lambda: open_clip.CLIP(**config), weights, device)
    size = np.ravel(config["vision_cfg"].get("image_size", 224))[0].item()  # some write [224, 224]
    return model, config["text_cfg"], size


def load_open_clip(name, source, weights, device, prepare):
    """CLIP score and HPSv2 (Wu et al. 2023): the cosine, unscaled."""
    model, text, size = open_clip_model(source, weights, device)
    ids = open_clip_ids(source, text, name)

    def forward(x, prompts):
        return cosine(1.0, model.encode_image(x), model.encode_text(ids(prompts).to(device)))

    return Scorer(name, prepare(size), forward, device)


def load_clip_model(kind, name, source, weights, device):
    """(model, prompts -> ids (N, length), picture -> pixels) of a `kind` that is built from a CLIPConfig."""
    config = folder_config(transformers.CLIPConfig, source, VIT_H)
    model, side = load_strict(lambda: kind(config), weights, device), config.vision_config.image_size
    tokenizer = clip_tokenizer(source, config.text_config.vocab_size)
    length = config.text_config.max_position_embeddings
    ids = lambda texts: tokenize(tokenizer, texts, length, name)[0].to(device)
    return model, ids, processed(transformers.CLIPImageProcessorPil(size=side, crop_size=side))


def load_pickscore(name, source, weights, device, scale=None):
    """PickScore (Kirstain et al. 2023): the cosine of a CLIPModel, times `scale` or exp(logit_scale)."""
    model, ids, prepare = load_clip_model(transformers.CLIPModel, name, source, weights, device)
    scale = scale or model.logit_scale.exp().item()

    def forward(x, prompts):
        text = model.get_text_features(input_ids=ids(prompts)).pooler_output
        return cosine(scale, model.get_image_features(pixel_values=x).pooler_output, text)

    return Scorer(name, prepare, forward, device)


# ------------------------------------------------------------ imagereward, cyclereward: BLIP and a head

BERT, BLIP_WORDS = "google-bert/bert-base-uncased", ("[DEC]", "[ENC]")  # its tokenizer, and what BLIP adds
BLIP_L = dict(  # the rest is as transformers' BlipConfig has it
    text_config=dict(num_attention_heads=12, encoder_hidden_size=1024),
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
    key = f"{key}."
    for old, new in BLIP_NAMES:  # whole names only: norm is not norm1
        key = key.replace(f".{old}.", f".{new}.")
    return key.removesuffix(".")


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
        super().__init__()
        text = transformers.BlipTextModel(config.text_config, add_pooling_layer=False)
        vision = transformers.BlipVisionModel(config.vision_config)
        self.blip = nn.ModuleDict(dict(visual_encoder=vision, text_encoder=text))
        self.mlp = nn.ModuleDict(dict(layers=reward_head(config.text_config.hidden_size, gelu)))

    def forward(self, x, ids, attention):
        patches = self.blip["visual_encoder"](pixel_values=x).last_hidden_state  # (N, 1 + patches, width)
        text = self.blip["text_encoder"](
            input_ids=ids, attention_mask=attention, encoder_hidden_states=patches, is_decoder=False
        )
        return self.mlp["layers"](text.last_hidden_state[:, 0])[:, 0]


def lower(text, keep):
    """Lower case as BERT's first tokenizer had it, by words: final sigmas differ from those inside words."""
    return " ".join(word if word in keep else word.lower() for word in text.split(" "))


def load_blip(name, source, weights, device):
    """ImageReward (Xu et al. 2023) and CycleReward (Bahng et al. 2025).

    transformers' BLIP after renaming keys, not the `image-reward` package: under transformers 5 the package
    does not even import."""
    cycle = name == "cyclereward"
    config = folder_config(transformers.BlipConfig, source, BLIP_L)
    size, length = config.text_config.vocab_size, 128 if cycle else 35
    mean, std = (0.0, 1.0) if cycle else (0.16717362830052426, 1.0333394966054072)
    model = load_strict(lambda: BlipReward(config, gelu=cycle), weights, device, blip_key)
    tokenizer = load_tokenizer(transformers.BertTokenizer, source, size, BERT, BLIP_WORDS)

    def forward(x, prompts):
        texts = [lower(p, tokenizer.get_added_vocab()) for p in prompts]
        ids, attention = tokenize(tokenizer, texts, length, name)
        return (model(x, ids.to(device), attention.to(device)) - mean) / std

    return Scorer(name, crop(config.vision_config.image_size), forward, device)


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
    k, v = k[:, None], v[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, -1)
        return F.silu(gate) * value


class CrossAttention(nn.Module):
    """Image tokens read text tokens where mask (N, T) is true; the feed-forward is beside them, not
    behind."""

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
        angle = torch.arange(t.shape[1], device=t.device)[:, None, None] * self.inv_freq  # (L, 1, d / 2)
        a, b = t.unflatten(-1, (-1, 2, HEAD_WIDTH // 2)).unbind(-2)  # (N, L, heads, d / 2)
        turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
        return torch.stack(turned, -2).flatten(2)


class ParallelBlock(nn.Module):
    """PaLM's block: rotary self-attention and a feed-forward side by side, from one projection."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.rotary_emb = nn.LayerNorm(dim), Rotary()
        self.sizes = (HEADS * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 8 * dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(HEADS * HEAD_WIDTH, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x):
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, -1)
        return self.attn_out(attend(self.rotary_emb(q), self.rotary_emb(k), v)) + self.ff_out(ff)


class MpsModel(nn.Module):
    """exp(logit_scale) * cos(text, image tokens after reading the text). Named as in the checkpoint.

    Text tokens that have nothing to do with the condition are masked out. The largest similarity is taken
    within each pair; the original takes it over the batch, so that its scores depend on the batch."""

    def __init__(self, config):
        super().__init__()
        dim = config.projection_dim
        named = lambda block: nn.ModuleDict(dict(fn=block))  # as the checkpoint has it
        pair = lambda: nn.ModuleList([named(CrossAttention(dim)), named(ParallelBlock(dim))])
        cross = nn.ModuleDict(dict(layers=nn.ModuleList([pair() for _ in range(LAYERS)])))
        self.mps = nn.ModuleDict(dict(model=transformers.CLIPModel(config), cross_model=cross))

    def tokens(self, ids):
        """Every text token, projected, (N, T, D)."""
        clip = self.mps["model"]
        return clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state)

    def forward(self, x, ids, condition):
        clip, text = self.mps["model"], self.tokens(ids)
        end = text[torch.arange(len(ids)), ids.argmax(-1)]  # (N, D): the end token has the largest id
        near = (text @ condition[0].T).amax(-1)  # (N, T)
        mask = near / near.amax(-1, keepdim=True) > TAU
        patches = clip.vision_model(pixel_values=x).last_hidden_state
        patches = clip.visual_projection(patches)  # (N, 1 + patches, D)
        for cross_attention, block in self.mps["cross_model"]["layers"]:
            patches = patches + cross_attention["fn"](patches, text, mask)
            patches = patches + block["fn"](patches)
        return cosine(clip.logit_scale.exp(), patches[:, 0], end)


def load_mps(name, source, weights, device):
    """MPS (Zhang et al. 2024), overall preference."""
    model, ids, prepare = load_clip_model(MpsModel, name, source, weights, device)
    with torch.inference_mode():
        condition = model.tokens(ids([CONDITION]))  # (1, T, D)

    return Scorer(name, prepare, lambda x, prompts: model(x, ids(prompts), condition), device)


# ------------------------------------------------------------ vqascore: a question to a T5 that sees

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
CLIP_L_336 = dict(sizes(1024, layers=24), image_size=336, patch_size=14)


class ClipT5(transformers.T5ForConditionalGeneration):
    """CLIP-FlanT5: a T5 with a vision tower and a two-layer projector beside it."""

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
            vision = transformers.CLIPVisionConfig(**CLIP_L_336)
        else:
            vision = transformers.CLIPVisionConfig.from_pretrained(tower)
        self.vision_tower = nn.ModuleDict(dict(vision_tower=transformers.CLIPVisionModel(vision)))
        self.post_init()


def load_clip_t5(source, device, dtype):
    """The model with every weight from its checkpoint, but for a vision tower that its config may name."""
    config = transformers.T5Config.from_pretrained(source)
    if config.scale_decoder_outputs:  # as in T5 1.0; Flan-T5 has a head of its own
        raise ValueError(f"{source}/config.json: tie_word_embeddings must be false, as in Flan-T5")
    renamed = {r"^vision_tower\.vision_tower\.vision_model\.": "vision_tower.vision_tower."}
    how = dict(config=config, dtype=dtype, key_mapping=renamed)
    model, tower = pretrained(ClipT5, source, "embed_tokens.", "vision_tower.", **how)
    if len(tower) == len(model.vision_tower.state_dict()):  # the checkpoint brings the whole of it or nothing
        unused = ("text_model.", "text_projection", "visual_projection", "logit_scale")
        tower_model, _ = pretrained(transformers.CLIPVisionModel, config.mm_vision_tower, unused, dtype=dtype)
        model.vision_tower["vision_tower"] = tower_model
    else:
        check_keys(source, tower, (), {})
    return model.to(device)


def load_vqascore(name, source, weights, device, dtype, question=QUESTION):
    """VQAScore (Lin et al. 2024): P("Yes" | image, 'Does this figure show "..."?') by CLIP-FlanT5.

    It is exp(-mean cross-entropy of the answer). The patches of CLIP-L/336's last but one layer stand,
    projected, among the words."""
    flan = "google/flan-t5-xl" if "-xl" in name else "google/flan-t5-xxl"  # whose tokenizer it has
    tokenizer = load_tokenizer(transformers.AutoTokenizer, source, 0, flan)
    model = load_clip_t5(weights, device, dtype)
    tower, surplus = model.vision_tower["vision_tower"], model.config.vocab_size - len(tokenizer)
    answer = tokenizer("Yes", return_tensors="pt").input_ids.to(device)  # (1, 2): Yes and the end token
    special = tokenizer.pad_token_id, tokenizer.unk_token_id
    known = answer.shape[1] == 2 and None not in special and tokenizer.unk_token_id not in answer[0]
    if not 0 <= surplus < 128 or not known:  # vocabularies are rounded up to a multiple of 128
        raise ValueError(f"{source or flan}: a tokenizer of {len(tokenizer)} words does not fit this model")
    words = model.get_input_embeddings()
    # each side of the image is tokenised for itself, so an end token precedes the image, as in training
    system = tokenizer(f"{SYSTEM} USER: ", return_tensors="pt").input_ids.to(device)

    def forward(x, prompts):
        n = len(prompts)
        questions = [question.format(prompt) for prompt in prompts]
        ids = tokenizer(questions, padding=True, return_tensors="pt").input_ids.to(device)
        mask = ids.ne(tokenizer.pad_token_id).long()  # as in the original, also where a prompt says <pad>
        patches = tower(pixel_values=x.to(dtype), output_hidden_states=True).hidden_states[-2][:, 1:]
        patches = model.mm_projector(patches)  # (N, 576, D)
        embeds = torch.cat([words(system).expand(n, -1, -1), patches, words(ids)], 1)
        before = mask.new_ones(n, embeds.shape[1] - ids.shape[1])
        attention, labels = torch.cat([before, mask], 1), answer.repeat(n, 1)
        logits = model(inputs_embeds=embeds, attention_mask=attention, labels=labels).logits.float()
        logits = logits[..., : len(tokenizer)]  # (N, 2, words): rows of no word take no part in the softmax
        return (-F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)).exp()

    side = tower.config.image_size  # to which LLaVA's square around the picture is resized
    prepare = processed(transformers.LlavaImageProcessorPil(size=side, crop_size=side, do_pad=True))
    return Scorer(name, prepare, forward, device)


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
HPSV3_QUESTION = (HERE / "lib/templates/hpsv3.txt").read_text("utf-8")


def hpsv3_key(key):
    """A key of the checkpoint, of transformers before 4.52, as today's Qwen2VLModel calls it."""
    if key.startswith("lm_head."):
        return None
    if key.startswith("visual."):
        return f"model.{key}"
    return key.replace("model.", "model.language_model.", 1)


def load_hpsv3(name, source, weights, device, dtype):
    """HPSv3 (Ma et al. 2025): the first output, a mean, of an MLP on Qwen2-VL's hidden state at <|Reward|>.

    The published model runs with plain positions 0, 1, 2, ... in place of Qwen2-VL's of three axes, and with
    all of Qwen2-VL in bf16, rotary frequencies included: so it was trained."""
    config = folder_config(transformers.Qwen2VLConfig, source, dict(text_config=QWEN2_VL_7B))
    tokenizer = load_tokenizer(transformers.AutoTokenizer, source, 0, QWEN, (REWARD,))
    image, reward = tokenizer.convert_tokens_to_ids([IMAGE, REWARD])
    if image != config.image_token_id or reward != len(tokenizer) - 1:
        raise ValueError(f"{source or QWEN}: a tokenizer of {len(tokenizer)} words does not fit this model")
    config.text_config.vocab_size = len(tokenizer)

    def build():
        first, last = nn.Linear(config.text_config.hidden_size, 1024), nn.Linear(16, 2)
        head = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), last)
        return nn.ModuleDict(dict(model=transformers.Qwen2VLModel(config), rm_head=head))

    model = load_strict(build, weights, device, hpsv3_key, dtype=None)
    qwen, head = model["model"].bfloat16().to(dtype), model["rm_head"].float()
    sides = dict(shortest_edge=HPSV3_PIXELS, longest_edge=HPSV3_PIXELS)  # it calls an area an "edge"
    processor = transformers.Qwen2VLImageProcessorPil(size=sides)

    def prepare(image):
        """(patches (h w, 3 * 2 * 14 * 14), [1, h, w]); 2 x 2 patches become one token."""
        read = processor(image.convert("RGB"), return_tensors="pt")
        return read.pixel_values, read.image_grid_thw[0].tolist()

    def forward(x, prompts):
        texts = []
        for (patches, _), prompt in zip(x, prompts):
            question = HPSV3_QUESTION.format(text_prompt=prompt)
            texts.append(HPSV3_CHAT.format(image=IMAGE * (len(patches) // 4), question=question))
        rows = [torch.tensor(ids) for ids in tokenizer(texts).input_ids]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (N, T), padded on the right
        states = qwen(  # causal: without a mask, too, no word reads the padding behind it
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=device)[None],
            pixel_values=torch.cat([patches for patches, _ in x]).to(device),
            image_grid_thw=torch.tensor([grid for _, grid in x], device=device),
            use_cache=False,
        ).last_hidden_state  # (N, T, D)
        return head(states[ids == reward].float())[:, 0]

    return Scorer(name, prepare, forward, device, reserved=(IMAGE, REWARD))


# ------------------------------------------------------------ aesthetic: reads no prompt


def load_aesthetic(name, source, weights, device):
    """LAION aesthetic predictor v2 (Schuhmann 2022): MLP(e / |e|), e the image embedding of OpenAI's CLIP
    ViT-L/14. The MLP has no activation, so it is one affine map."""
    unused = ("text_model.", "text_projection", "logit_scale")
    own = source and (Path(source) / "config.json").is_file()
    tower = source if own else "openai/clip-vit-large-patch14"
    build = lambda: nn.ModuleDict(dict(layers=reward_head(768)))
    head = load_strict(build, weights, device)["layers"]
    model = pretrained(transformers.CLIPVisionModelWithProjection, tower, unused)[0].to(device)

    def forward(x, prompts):
        return head(F.normalize(model(pixel_values=x).image_embeds, dim=-1))[:, 0]

    config = getattr(model.config, "vision_config", model.config)
    return Scorer(name, crop(config.image_size), forward, device)


# ----------------------------------------------------------------------------- by name

PICK = "yuvalkirstain/PickScore_v1", "model.safetensors"
XXL, XL = "zhiqiulin/clip-flant5-xxl", "zhiqiulin/clip-flant5-xl"
FP32, BF16 = dict(dtype=torch.float32), dict(dtype=torch.bfloat16)
PUBLISHED = {  # name: (loader, its default hub repository, the file of weights there; None: its only one)
    "clip": (partial(load_open_clip, prepare=crop), LAION_H, "open_clip_model.safetensors"),
    "hpsv2.1": (partial(load_open_clip, prepare=letterbox), "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "hpsv2": (partial(load_open_clip, prepare=letterbox), "xswu/HPSv2", "HPS_v2_compressed.pt"),
    "pickscore": (load_pickscore, *PICK),
    "pickscore-cosine": (partial(load_pickscore, scale=1.0), *PICK),
    "imagereward": (load_blip, "zai-org/ImageReward", "ImageReward.pt"),
    "cyclereward": (load_blip, "carolineec/CycleReward-Combo", None),
    "mps": (load_mps, "RE-N-Y/mpsv1", "model.safetensors"),
    "vqascore": (partial(load_vqascore, **FP32), XXL, FOLDER),
    "vqascore-xl": (partial(load_vqascore, **FP32), XL, FOLDER),
    "vqascore-bf16": (partial(load_vqascore, **BF16), XXL, FOLDER),
    "vqascore-xl-bf16": (partial(load_vqascore, **BF16), XL, FOLDER),
    "hpsv3": (partial(load_hpsv3, **FP32), "MizzenAI/HPSv3", "HPSv3.safetensors"),
    "hpsv3-bf16": (partial(load_hpsv3, **BF16), "MizzenAI/HPSv3", "HPSv3.safetensors"),
    "aesthetic": (load_aesthetic, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
}
