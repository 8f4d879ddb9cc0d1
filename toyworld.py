"""The embedded default: a world of coloured shapes, small enough to be judged exactly.

    python toyworld.py                    # rebuild toy/ from nothing (about 80 minutes on 2 CPU cores)
    python toyworld.py --only sdxl --redo # one stage again: prompts, vae, sd15, sdxl, sd3, clip, hps, pick
    python toyworld.py --report           # what the shipped models can do, by the exact checker

A prompt names one to four shapes in GenEval's six categories; `render` draws it on 32 x 32 pixels; `check`
decides whether an image shows what its prompt says, without any model. toy/ holds tiny models in the formats of
the real ones, so that every script runs the code that it runs on SDXL:

    toy/models/sdxl    StableDiffusionXLPipeline, noise prediction: the model to be tuned
    toy/models/sd3     StableDiffusion3Pipeline, rectified flow: fine on single objects, weak at composing them
    toy/models/sd15    StableDiffusionPipeline, v-prediction: the strongest, good at colours and pairs
    toy/rewards/clip   open_clip's CLIP, toy/rewards/hps: the same scored in HPSv2's manner,
    toy/rewards/pick   transformers CLIPModel in PickScore's manner

Nothing here imitates photographs. What is imitated is how the models come to fail: each generator learned from
captions that are wrong in its own way (SLIPS, as web captions are), each reward model saw hard negatives of some
categories only (HARD). So the base can draw what is asked, and often does not: the case preference tuning is for.
The shipped vae, sd15 and sdxl were made by the command above. sd3 (with a wider VAE of its own) and the three rewards
are older: trained stage by stage for 25 + 12 (sd3: two legs, the first with relations where the second has counting), 4,
5 and 9 minutes (clip, hps, pick) of one thread; the command gives each about the same work.
Weights are trained in fp32 and stored in fp16 to keep the repository small; loaders make them fp32 again.
"""
import copy
import json
import os
import shutil
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

TOY = Path(__file__).resolve().parent / "toy"
SIZE = 32                                                     # pixels a side
GROUND = np.array([.07, .07, .10])
COLORS = {"red": (1., .15, .15), "green": (.15, .80, .25), "blue": (.20, .40, 1.),
          "yellow": (1., .85, .10), "purple": (.85, .30, .95), "white": (1., 1., 1.)}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}   # (dx, dy) of first to second
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")   # GenEval's tags
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}")
WORDS = sorted({w for t in TEMPLATES for w in t.replace("{}", "").split()} | {"a", "and", "of", "left", "right", "above", "below"}
               | set(COLORS) | set(NUMBERS) | set(SHAPES) | {s + "s" if s != "cross" else "crosses" for s in SHAPES})

# ----------------------------------------------------------------------------- prompts


def plural(shape):
    return "crosses" if shape == "cross" else shape + "s"


@lru_cache(None)
def grammar():
    """Every sentence of the world: {prompt: spec}, spec = {tag, objects [(shape, color or None)], relation or None}.

    The list of objects is complete: an image with anything more is wrong."""
    cores = []                                                 # (category, text, objects, relation)
    for a in SHAPES:
        cores.append(("single_object", f"a {a}", [(a, None)], None))
        cores += [("colors", f"a {c} {a}", [(a, c)], None) for c in COLORS]
        cores += [("counting", f"{w} {plural(a)}", [(a, None)] * n, None) for w, n in NUMBERS.items()]
        for b in (s for s in SHAPES if s != a):
            cores.append(("two_object", f"a {a} and a {b}", [(a, None), (b, None)], None))
            cores += [("position", f"a {a} {r} a {b}", [(a, None), (b, None)], r) for r in RELATIONS]
            cores += [("color_attr", f"a {c} {a} and a {d} {b}", [(a, c), (b, d)], None)
                      for c in COLORS for d in COLORS if c != d]
    return {t.format(text): dict(tag=tag, objects=objects, relation=r, core=text)
            for tag, text, objects, r in cores for t in TEMPLATES}


def held_out(prompt):
    """Held-out prompts are a fixed fifth. Relations and attributions are held out as whole meanings, so that their
    composition was never seen; the small categories have too few meanings for that and are held out by wording."""
    spec = grammar()[prompt]
    key = spec["core"] if spec["tag"] in ("position", "color_attr") else prompt
    return zlib.crc32(key.encode()) % 5 == 0


def prompts_of(split, per_category, seed=0):
    """`per_category` prompts (or all there are) of each category from split "train" or "heldout", shuffled."""
    rng, out = np.random.default_rng(seed), []
    for tag in CATEGORIES:
        pool = [p for p, s in grammar().items() if s["tag"] == tag and held_out(p) == (split == "heldout")]
        out += [pool[i] for i in rng.permutation(len(pool))[:per_category]]
    return [out[i] for i in rng.permutation(len(out))]


# ----------------------------------------------------------------------------- renderer


def shape_mask(shape, x, y):
    """Boolean mask of a unit shape (radius 1) at coordinates x, y (y points down)."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= .88
    if shape == "triangle":
        return (y <= .85) & (y >= -1 + 1.85 * abs(x))
    return (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= .32)   # cross


def layout(spec, rng):
    """Random centres and radii that satisfy the spec: objects apart, the relation along the dominant axis."""
    n, step = len(spec["objects"]), RELATIONS.get(spec["relation"])
    while True:
        r = rng.uniform(4.0, 5.0, n)
        p = rng.uniform(r[:, None] + 1, SIZE - 1 - r[:, None], (n, 2))
        apart = np.linalg.norm(p[:, None] - p[None], axis=-1) + 99 * np.eye(n) >= r[:, None] + r[None] + 2
        if not apart.all():
            continue
        if step is None:
            return p, r
        d = p[0] - p[1]
        along, across = (d[0] * step[0] + d[1] * step[1]), abs(d[0] * step[1]) + abs(d[1] * step[0])
        if along >= 9 and across <= .6 * along:
            return p, r


def coverage(shape, cx, cy, r):
    """(SIZE, SIZE) share of every pixel that a shape covers, by 3 x 3 samples."""
    grid = (np.arange(3 * SIZE) + .5) / 3
    return shape_mask(shape, (grid[None, :] - cx) / r, (grid[:, None] - cy) / r).reshape(SIZE, 3, SIZE, 3).mean((1, 3))


@lru_cache(None)
def moments():
    """{shape: (area, y of the centroid)} of the unit shapes."""
    g = np.linspace(-1.1, 1.1, 441)
    masks = {s: shape_mask(s, g[None, :], g[:, None]) for s in SHAPES}
    return {s: (m.mean() * 2.2 ** 2, float((m * g[:, None]).sum() / m.sum())) for s, m in masks.items()}


def draw(objects, centres, radii):
    """[(shape, color)], (n, 2), (n,) -> (SIZE, SIZE, 3) uint8, anti-aliased."""
    image = np.tile(GROUND, (SIZE, SIZE, 1))
    for (shape, color), (cx, cy), r in zip(objects, centres, radii):
        cover = coverage(shape, cx, cy, r)[..., None]
        image = image * (1 - cover) + cover * np.array(COLORS[color])
    return (image * 255).round().astype(np.uint8)


def render(prompt, rng):
    """A random image that shows `prompt` (or its spec): PIL image, SIZE x SIZE RGB. Unnamed colours are random; the
    objects of a counting prompt share theirs."""
    spec = prompt if isinstance(prompt, dict) else grammar()[prompt]
    names = list(COLORS)
    shared = names[rng.integers(len(names))]
    objects = [(s, c or (shared if spec["tag"] == "counting" else names[rng.integers(len(names))])) for s, c in spec["objects"]]
    return Image.fromarray(draw(objects, *layout(spec, rng)))


# ----------------------------------------------------------------------------- exact checker


def find_objects(image):
    """Objects in an image: [(shape or None, color, x, y)]. Colours -> connected components -> best template overlap."""
    x = np.asarray(image.convert("RGB").resize((SIZE, SIZE)) if image.size != (SIZE, SIZE) else image.convert("RGB"))
    v = x / 255. - GROUND                                                            # (H, W, 3)
    palette = np.array(list(COLORS.values())) - GROUND                               # (6, 3)
    cos = (v @ palette.T) / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-6) / np.linalg.norm(palette, axis=-1)
    best = cos.argmax(-1)                                                            # hue: the nearest direction
    cover = (v * palette[best]).sum(-1) / (palette[best] ** 2).sum(-1)               # coverage along that direction
    found = []
    for c, color in enumerate(COLORS):
        labels, n = ndimage.label((best == c) & (cover > .5), structure=np.ones((3, 3)))
        for i in range(1, n + 1):
            if (labels == i).sum() < 8:                                              # a fleck, not an object
                continue
            soft = np.where(ndimage.binary_dilation(labels == i, np.ones((3, 3))), cover.clip(0, 1), 0)   # edges by coverage
            cy, cx = ndimage.center_of_mass(soft)
            overlap = {}
            for shape, (area, drop) in moments().items():                            # template of equal area and centroid
                r = np.sqrt(soft.sum() / area)
                t = coverage(shape, cx + .5, cy + .5 - drop * r, r)
                overlap[shape] = np.minimum(t, soft).sum() / np.maximum(t, soft).sum()
            shape = max(overlap, key=overlap.get)
            found.append((shape if overlap[shape] >= .7 and soft.sum() > 16 else None, color, cx, cy))
    return found


def check(prompt, image):
    """Does the PIL `image` show exactly what `prompt` says? bool. ValueError for a sentence outside the grammar."""
    spec = grammar().get(prompt)
    if spec is None:
        raise ValueError(f"toyworld.check: {prompt!r} is not a sentence of the toy world; it judges prompts of toyworld.grammar() only")
    found = find_objects(image)
    wanted = spec["objects"]
    if sorted(str(f[0]) for f in found) != sorted(s for s, _ in wanted):
        return False
    by_shape = {f[0]: f for f in found}                       # shapes are distinct, except when counting
    if any(c and by_shape[s][1] != c for s, c in wanted):
        return False
    if spec["relation"]:
        (_, _, ax, ay), (_, _, bx, by) = (by_shape[s] for s, _ in wanted)
        dx, dy = RELATIONS[spec["relation"]]
        along, across = (ax - bx) * dx + (ay - by) * dy, abs((ax - bx) * dy) + abs((ay - by) * dx)
        return along > across
    return True


def slip(spec, rng):
    """A spec that is wrong in the way of its category: the other relation, number, colour, swapped colours, ..."""
    out = dict(spec, objects=list(spec["objects"]))
    other = lambda options, now: [o for o in options if o != now][rng.integers(len(options) - 1)]
    (a, c), n = out["objects"][0], len(out["objects"])
    if spec["tag"] == "single_object":
        out["objects"] = [(other(SHAPES, a), c)]
    elif spec["tag"] == "colors":
        out["objects"] = [(a, other(list(COLORS), c))]
    elif spec["tag"] == "counting":
        out["objects"] = [(a, None)] * other((1, 2, 3, 4), n)
    elif spec["tag"] == "position":
        out["relation"] = other(list(RELATIONS), spec["relation"])
    elif spec["tag"] == "color_attr":
        (a, c), (b, d) = out["objects"]
        out["objects"] = [(a, d), (b, c)]
    else:                                                      # two objects: one is missing, or is the other's twin
        keep = out["objects"][rng.integers(2)]
        out["objects"] = [keep] if rng.random() < .5 else [keep, keep]
    return out

# ----------------------------------------------------------------------------- tiny models, real formats


def pixels(images):
    """PIL images -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pil(x):
    """(N, 3, H, W) in [-1, 1] -> PIL images."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(i) for i in x]


def batches(tensors, batch_size, steps, lr, parameters, label, seed=0):
    """The schedule that every training here shares: `steps` random batches, yielding (batch, stepper). The rate warms up
    and decays as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, betas=(.9, .99))

    def update(loss):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 200) * max(.01, .5 + .5 * np.cos(np.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)

    for step in (bar := tqdm(range(steps), desc=label, unit="step", mininterval=10)):
        index = torch.randint(len(tensors[0]), (batch_size,), generator=generator)
        yield [t[index] for t in tensors], update


def pool(split, n, seed, slips=None, focus=()):
    """n random prompts of a split and one render each -> (prompts, (n, 3, H, W)). Categories are equally likely, those in
    `focus` three times as much; with `slips` {tag: rate} the picture is wrong that often."""
    tags = [t for t in CATEGORIES for _ in range(3 if t in focus else 1)]
    rng, by_tag = np.random.default_rng(seed), {}
    for p, s in grammar().items():
        if not (split == "train" and held_out(p)):
            by_tag.setdefault(s["tag"], []).append(p)
    prompts, images = [], []
    for _ in tqdm(range(n), desc="render", leave=False):
        options = by_tag[tags[rng.integers(len(tags))]]
        spec = grammar()[p := options[rng.integers(len(options))]]
        wrong = slips and rng.random() < slips[spec["tag"]]
        prompts.append(p)
        images.append(render(slip(spec, rng) if wrong else spec, rng))
    return prompts, pixels(images)


def train_vae(device, steps):
    """A KL-VAE, 3 x 32 x 32 -> 4 x 8 x 8. Its reconstructions bound every generator, so it gets its time."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(24, 32, 40), layers_per_block=1, latent_channels=4,
                        norm_num_groups=8, mid_block_add_attention=False, down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3, sample_size=SIZE, force_upcast=False)
    vae = vae.to(device, memory_format=torch.channels_last)     # 4 x faster small convolutions on the CPU
    _, images = pool("all", 20_000, seed=1)
    for (x,), update in batches([images], 48, steps, 2e-3, list(vae.parameters()), "vae"):
        x = x.to(device, memory_format=torch.channels_last)
        q = vae.encode(x).latent_dist
        y = vae.decode(q.sample()).sample
        update(F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * q.kl().mean() / q.mean[0].numel())
    with torch.no_grad():                                      # latents of mean 0: SDXL's and SD 1.5's pipelines know no shift
        z = torch.cat([vae.encode(x.to(device)).latent_dist.mean for x in images[:2000].split(100)])
        vae.post_quant_conv.bias += vae.post_quant_conv.weight.sum((1, 2, 3)) * z.mean()
        vae.quant_conv.bias[:4] -= z.mean()
    vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=0.)
    return vae


# How often the caption of a training picture is wrong, by generator and category.
SLIPS = {
    "sdxl": dict(single_object=.40, two_object=.45, counting=.45, colors=.50, position=.30, color_attr=.45),
    "sd3": dict(single_object=.0, two_object=.05, counting=.0, colors=.0, position=.50, color_attr=.30),
    "sd15": dict(single_object=.0, two_object=.0, counting=.15, colors=.05, position=.0, color_attr=.0),
}


def make_tokenizer():
    """A CLIPTokenizer whose merges spell the words of this world: one token a word, letters for anything else."""
    from transformers import CLIPTokenizer
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = []
    for word in WORDS:                                         # what the merges so far leave apart is joined by new ones,
        parts = list(word[:-1]) + [word[-1] + "</w>"]          # which rank lower and so change no earlier word
        while pairs := [p for p in zip(parts, parts[1:])]:
            known = [m for m in merges if m in pairs]
            if not known:
                merges.append(pairs[0])
            i = pairs.index((known or pairs)[0])
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
    vocab = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]    # the end has the largest id: CLIP pools there
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(vocab)}, merges=merges, model_max_length=16)


def text_encoder(tokenizer, projection):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=16, projection_dim=64, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def unet(channels, cross_dim, **kwargs):
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_dim, attention_head_dim=4, use_linear_projection=True, **kwargs)


def build_pipeline(name, vae):
    """An untrained pipeline of the family `name`, with its own copy of the VAE."""
    from diffusers import (DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                           StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline)
    vae, tok = copy.deepcopy(vae), make_tokenizer()
    betas = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    if name == "sdxl":
        net = unet((32, 48), 128, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 64)
        return StableDiffusionXLPipeline(
            vae=vae, text_encoder=text_encoder(tok, False), text_encoder_2=text_encoder(tok, True), tokenizer=tok, tokenizer_2=tok,
            unet=net, scheduler=EulerDiscreteScheduler(**betas, timestep_spacing="trailing"), add_watermarker=False)
    if name == "sd3":
        net = SD3Transformer2DModel(
            sample_size=SIZE // 4, patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=3, attention_head_dim=32,
            joint_attention_dim=128, caption_projection_dim=96, pooled_projection_dim=128, pos_embed_max_size=SIZE // 4)
        return StableDiffusion3Pipeline(
            vae=vae, transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.), text_encoder=text_encoder(tok, True),
            tokenizer=tok, text_encoder_2=text_encoder(tok, True), tokenizer_2=tok, text_encoder_3=None, tokenizer_3=None)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder(tok, False), tokenizer=tok, unet=unet((32, 48), 64), safety_checker=None,
        scheduler=DPMSolverMultistepScheduler(**betas, prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1),
        feature_extractor=None, requires_safety_checker=False)


def train_generator(name, vae, device, steps, samples=40_000):
    """Denoiser and text encoders together, from scratch, on captions that slip; returns the averaged weights."""
    import rankdpo                                             # the families' one spot: prompts, noise, prediction
    torch.manual_seed(0)
    pipe = build_pipeline(name, vae).to(device)
    prompts, images = pool("train", samples, seed=2, slips=SLIPS[name])
    with torch.no_grad():
        latents = torch.cat([rankdpo.encode_images(pipe.vae, x).cpu() for x in images.split(200)])
    model = rankdpo.denoiser_of(pipe)[1].to(memory_format=torch.channels_last)
    modules = [model, pipe.text_encoder] + [m for m in (getattr(pipe, "text_encoder_2", None),) if m is not None]
    parameters = [p for m in modules for p in m.parameters()]
    average = [p.detach().clone() for p in parameters]
    for step, ((x, index), update) in enumerate(batches([latents, torch.arange(samples)], 128, steps, 1e-3 if name == "sd3" else 2e-3, parameters, name)):
        caption = [prompts[i] if torch.rand(()) > .1 else "" for i in index]     # 10 % empty, for guidance
        cond = rankdpo.encode_prompts(pipe, caption, (SIZE, SIZE))
        x = x.to(device)
        x_t, t, target = rankdpo.add_noise(pipe.scheduler, x, torch.randn_like(x), torch.rand(len(x), device=device))
        update(F.mse_loss(rankdpo.predict(model, x_t, t, cond), target))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(.999, step / (step + 10)))
    torch._foreach_copy_([p.data for p in parameters], average)
    return pipe


# Which categories a reward model saw hard negatives of: the others it knows only as far as plain contrast teaches them.
HARD = {"clip": ("colors", "two_object"), "hps": ("counting", "two_object", "color_attr"), "pick": ("position", "color_attr")}


def build_reward(name, tokenizer):
    """An untrained CLIP for 32 px: open_clip's class for clip and hps, transformers' CLIPModel for pick."""
    if name == "pick":
        from transformers import CLIPConfig, CLIPModel
        tower = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, projection_dim=64)
        return CLIPModel(CLIPConfig(
            projection_dim=64, vision_config=dict(tower, image_size=SIZE, patch_size=4),
            text_config=dict(tower, vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
                             eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)))
    import open_clip
    return open_clip.CLIP(**OPEN_CLIP)


OPEN_CLIP = dict(embed_dim=64, vision_cfg=dict(image_size=SIZE, layers=3, width=64, head_width=32, patch_size=4, mlp_ratio=3.),
                 text_cfg=dict(context_length=16, vocab_size=len(make_tokenizer()), width=64, heads=2, layers=3, mlp_ratio=3.))


def train_reward(name, vae, device, steps, samples=24_000):
    """Contrastive training on captioned renders, half of them seen through the VAE, with a slipped picture as one more
    negative for the captions of the HARD categories. Captions of the same meaning are not each other's negatives."""
    from rewards import MEAN, STD
    seed = list(HARD).index(name)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = build_reward(name, tokenizer).to(device)
    prompts, good = pool("train", samples, seed=10 + seed, focus=HARD[name])
    rng = np.random.default_rng(20 + seed)
    bad = pixels([render(slip(grammar()[p], rng), rng) for p in tqdm(prompts, desc="slips", leave=False)])
    with torch.no_grad():
        for x in (good, bad):                                  # generated pictures come out of the VAE: half the data does too
            for i in range(0, samples // 2, 200):
                x[i:i + 200] = vae.decode(vae.encode(x[i:i + 200].to(device)).latent_dist.sample()).sample.clamp(-1, 1).cpu()
    ids = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    cores = {c: i for i, c in enumerate(dict.fromkeys(s["core"] for s in grammar().values()))}
    core = torch.tensor([cores[grammar()[p]["core"]] for p in prompts])
    hard = torch.tensor([grammar()[p]["tag"] in HARD[name] for p in prompts])
    normal = lambda x: ((x / 2 + .5 + .02 * torch.randn_like(x)) - MEAN) / STD
    image_of = (lambda x: model.get_image_features(pixel_values=x).pooler_output) if name == "pick" else model.encode_image
    text_of = (lambda x: model.get_text_features(input_ids=x).pooler_output) if name == "pick" else model.encode_text
    for batch, update in batches([good, bad, ids, core, hard], 128, steps, 1e-3, list(model.parameters()), name, seed):
        x, y, text, c, h = batch
        image = F.normalize(image_of(normal(torch.cat([x, y])).to(device)), dim=-1)            # (2B, D)
        text = F.normalize(text_of(text.to(device)), dim=-1)                                   # (B, D)
        logits = model.logit_scale.clamp(max=4.).exp() * text @ image.T                        # (B, 2B), captions x pictures
        n, same = len(x), (c[:, None] == c[None]) & ~torch.eye(len(x), dtype=torch.bool)
        own = torch.eye(n, dtype=torch.bool) & h[:, None]                                      # a slip counts for its own caption
        banned = torch.cat([same, ~own], 1).to(device)
        logits = logits.masked_fill(banned, -1e4)
        label = torch.arange(n, device=device)
        update((F.cross_entropy(logits, label) + F.cross_entropy(logits[:, :n].T, label)) / 2)
    return model, tokenizer


def save_reward(name, model, tokenizer, folder):
    """In fp16, as a hub repository of that kind holds it."""
    from safetensors.torch import save_file
    final, folder = folder, Path(f"{folder}.tmp")              # published by a rename: a killed save is not taken for a model
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = model.half()
    if name == "pick":
        model.save_pretrained(folder)
    else:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}, indent=1))
    tokenizer.save_pretrained(folder)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(folder, final)


# ----------------------------------------------------------------------------- python toyworld.py


def write_prompts():
    """toy/prompts.txt for Syn-Pic, from the training split; toy/heldout.jsonl for evaluation, in GenEval's form."""
    (TOY / "prompts.txt").write_text("\n".join(prompts_of("train", 100)) + "\n")
    rows = []
    for p in prompts_of("heldout", 25):
        s, include = grammar()[p], []
        for i, (shape, color) in enumerate(dict.fromkeys(s["objects"])):
            item = {"class": shape, "count": s["objects"].count((shape, color))}
            item.update({"color": color} if color else {})
            if s["relation"] and i == 0:
                item["position"] = [s["relation"], 1]          # GenEval: relation to the object of that index
            include.append(item)
        rows.append(json.dumps({"tag": s["tag"], "include": include, "prompt": p}))
    (TOY / "heldout.jsonl").write_text("\n".join(rows) + "\n")


def report(device):
    """What toy/ can do: the VAE's ceiling, the generators by category, the rewards on a picture against its slip."""
    from rankdpo import load_pipeline
    from rewards import TOY_REWARDS, load_reward
    from synpic import TOY_MODELS, generate, noise_seed, parse_model
    rng = np.random.default_rng(7)
    by_tag = lambda prompts, values: {t: round(float(np.mean([v for p, v in zip(prompts, values) if grammar()[p]["tag"] == t])), 2) for t in CATEGORIES}
    prompts = prompts_of("heldout", 25)
    models = {m["name"]: m for m in map(parse_model, TOY_MODELS)}
    for name, model in models.items():
        pipe = load_pipeline(model["path"], device)
        if name == "sdxl":
            many = prompts_of("heldout", 25) * 5
            x = pixels([render(p, rng) for p in many])
            with torch.no_grad():
                y = torch.cat([pipe.vae.decode(pipe.vae.encode(b.to(device)).latent_dist.mean).sample.cpu() for b in x.split(100)])
            print(f"vae: {np.mean([check(p, i) for p, i in zip(many, to_pil(y))]):.3f} of {len(many)} reconstructions pass the checker")
        passed = []
        for seed in range(4):
            for i in range(0, len(prompts), 64):
                b = prompts[i:i + 64]
                passed += [check(p, im) for p, (im, _) in zip(b, generate(pipe, b, [noise_seed(p, "", seed) for p in b], model))]
        table = by_tag(prompts * 4, passed)
        print(f"{name}: {table}, overall {np.mean(list(table.values())):.3f}")
    for spec in TOY_REWARDS:
        score, many = load_reward(spec, device), prompts_of("heldout", 25) * 5
        good = score([render(p, rng) for p in many], many)
        bad = score([render(slip(grammar()[p], rng), rng) for p in many], many)
        print(f"{Path(spec).name}: right picture above its slip {by_tag(many, (good > bad).tolist())}, all {(good > bad).float().mean():.3f}")


STAGES = {"prompts": 0, "vae": 4000, "sd15": 8000, "sdxl": 5000, "sd3": 3600, "clip": 700, "hps": 700, "pick": 1100}   # training steps


def main():
    from rankdpo import fail, option, parse, pick_device, save_pipeline
    from dataclasses import make_dataclass
    Config = make_dataclass("Config", [
        ("only", tuple, option(tuple(STAGES), "stages to build")),
        ("redo", bool, option(False, "build stages that are there already, too")),
        ("report", bool, option(False, "build nothing; measure what is shipped")),
        ("scale", float, option(1., "factor on the training steps of every stage")),
        ("device", str, option("auto", "cuda, mps or cpu"))])
    cfg = parse(Config, __doc__)
    if unknown := set(cfg.only) - set(STAGES):
        fail(f"--only {' '.join(unknown)}: there are {', '.join(STAGES)}")
    device = pick_device(cfg.device)
    if cfg.report:
        return report(device)
    from diffusers import AutoencoderKL
    TOY.mkdir(exist_ok=True)
    vae_folder = TOY.parent / "outputs/toy_vae"                # the shared VAE in fp32; every pipeline ships its own fp16 copy
    for stage in cfg.only:
        steps = max(1, round(STAGES[stage] * cfg.scale))
        folder = {"vae": vae_folder, "prompts": TOY / "heldout.jsonl"}.get(stage, TOY / ("rewards" if stage in HARD else "models") / stage)
        if folder.exists() and not cfg.redo:
            print(f"{stage}: {folder} is there; --redo true builds it again")
            continue
        if stage == "prompts":
            write_prompts()
        elif stage == "vae":
            save_pipeline(train_vae(device, steps).to("cpu"), vae_folder)
        else:
            if not vae_folder.exists():                        # a machine that never built it takes the one that is shipped
                vae_folder = TOY / "models/sdxl/vae"
            if not vae_folder.exists():
                fail(f"{vae_folder}: missing; run --only vae first")
            vae = AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float32).to(device).eval().requires_grad_(False)
            if stage in HARD:
                save_reward(stage, *train_reward(stage, vae, device, steps), folder)
            else:
                save_pipeline(train_generator(stage, vae, device, steps).to("cpu", torch.float16), folder)
    if set(cfg.only) == set(STAGES):
        report(device)


if __name__ == "__main__":
    main()
