"""Trains what toy/ ships: tiny models of the toy world in the formats of the real ones.

    python toy/build.py                           # from nothing; a stage that is there already is left alone
    python toy/build.py --only sdxl --redo true   # one stage again: a key of STAGES, below
    python toy/build.py --report                  # what the shipped models can do, by the exact checker

    toy/models/sdxl    StableDiffusionXLPipeline, noise prediction: the model to be tuned
    toy/models/sd3     StableDiffusion3Pipeline, rectified flow: good at single objects, not at several
    toy/models/sd15    StableDiffusionPipeline, v-prediction: the strongest, good at colours and pairs
    toy/rewards/clip   open_clip's CLIP, toy/rewards/hps: the same scored in HPSv2's manner,
    toy/rewards/pick   transformers CLIPModel in PickScore's manner
    toy/rewards/blip   BLIP with ImageReward's head: it reads the words against the picture, relations too

Nothing here imitates photographs. What is imitated is how the models come to fail: each generator learned
from captions that are wrong in its own way (SLIPS, as web captions are), each reward model saw hard negatives
of some categories only (HARD). So the base can draw what is asked, and often does not: the case for
preference tuning.

Weights are trained in fp32 and stored in fp16 to keep the repository small; loaders make them fp32 again. How
long each stage takes, and which of the shipped weights are older than this file: docs/toyworld.md.
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))

from lib.common import fail, one_line_errors, option, parse, pick_device
from lib.pipelines import (
    BETAS,
    add_noise,
    denoiser_of,
    family_of,
    generate,
    load_pipeline,
    noise_seed,
    text_encoders_of,
)
from lib.scorers import MEAN, STD, BlipReward, sizes
from lib.store import publish, write_text
from lib.tables import read_text
from rewards import TOY_REWARDS, load_reward
from synpic import TOY_MODELS, parse_model
from toy.world import (
    CATEGORIES,
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZE,
    WORDS,
    check,
    grammar,
    held_out,
    plural,
    prompts_of,
    render,
    slip,
)

STAGES = {  # training steps
    "prompts": 0,
    "vae": 4000,
    "sd15": 8000,
    "sdxl": 5000,
    "sd3": 3600,
    "clip": 700,
    "hps": 700,
    "pick": 1100,
    "blip": 5000,
}
SLIPS = {  # how often the caption of a training picture is wrong, by generator and category
    "sdxl": dict(
        single_object=0.40, two_object=0.45, counting=0.45, colors=0.50, position=0.30, color_attr=0.45
    ),
    "sd3": dict(single_object=0.0, two_object=0.05, counting=0.0, colors=0.0, position=0.50, color_attr=0.30),
    "sd15": dict(single_object=0.0, two_object=0.0, counting=0.15, colors=0.05, position=0.0, color_attr=0.0),
}
HARD = {  # categories of which a reward saw hard negatives: the others it knows from plain contrast
    "clip": ("colors", "two_object"),
    "hps": ("counting", "two_object", "color_attr"),
    "pick": ("position", "color_attr"),
    "blip": ("position", "color_attr"),
}


@dataclass
class Config:
    only: tuple = option(tuple(STAGES), "stages to build", choices=tuple(STAGES))
    redo: bool = option(False, "build stages that are there already, too")
    report: bool = option(False, "build nothing; measure what is shipped")
    scale: float = option(1.0, "factor on the training steps of every stage", above=0)
    device: str = option("auto", "cuda, mps or cpu")


# ----------------------------------------------------------------------------- data


def pixels(images):
    """PIL images -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pil(x):
    """(N, 3, H, W) in [-1, 1] -> PIL images."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(i) for i in x]


def draw_pool(split, n, seed, slips=None, focus=()):
    """n random prompts of a split and one render each -> (prompts, (n, 3, H, W)). Categories are equally
    likely, those in `focus` three times as much; with `slips` {tag: rate} the picture is wrong that often."""
    tags = [t for t in CATEGORIES for _ in range(3 if t in focus else 1)]
    rng = np.random.default_rng(seed)
    by_tag = {}
    for p, s in grammar().items():
        if not (split == "train" and held_out(p)):
            by_tag.setdefault(s["tag"], []).append(p)
    prompts, images = [], []
    for _ in tqdm(range(n), desc="render", leave=False):
        options = by_tag[tags[rng.integers(len(tags))]]
        prompt = options[rng.integers(len(options))]
        spec = grammar()[prompt]
        if slips and rng.random() < slips[spec["tag"]]:
            spec = slip(spec, rng)
        prompts.append(prompt)
        images.append(render(spec, rng))
    return prompts, pixels(images)


def batches(tensors, batch_size, steps, lr, parameters, label, seed=0):
    """The schedule that every training here shares: `steps` random batches, yielding (batch, update), where
    update(loss) takes the optimiser's step. The rate warms up and decays as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))

    def update(loss):
        decay = max(0.01, 0.5 + 0.5 * np.cos(np.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 200) * decay
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)

    for step in (bar := tqdm(range(steps), desc=label, unit="step", mininterval=10)):
        index = torch.randint(len(tensors[0]), (batch_size,), generator=generator)
        yield [t[index] for t in tensors], update


def write_prompts():
    """toy/prompts.txt for Syn-Pic (training split); toy/heldout.jsonl for evaluation, in GenEval's form."""
    write_text(TOY / "prompts.txt", "\n".join(prompts_of("train", 100)) + "\n")
    rows = []
    for p in prompts_of("heldout", 25):
        s, include = grammar()[p], []
        for i, (shape, color) in enumerate(dict.fromkeys(s["objects"])):
            item = {"class": shape, "count": s["objects"].count((shape, color))}
            item.update({"color": color} if color else {})
            if s["relation"] and i == 0:
                item["position"] = [s["relation"], 1]  # GenEval: relation to the object of that index
            include.append(item)
        rows.append(json.dumps({"tag": s["tag"], "include": include, "prompt": p}))
    write_text(TOY / "heldout.jsonl", "\n".join(rows) + "\n")


# ----------------------------------------------------------------------------- tiny models, real formats


def make_tokenizer():
    """A CLIPTokenizer whose merges spell this world's words: one token a word, letters for anything else."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = []
    for word in WORDS:  # what the merges so far leave apart is joined by new ones,
        parts = list(word[:-1]) + [word[-1] + "</w>"]  # which rank lower and so change no earlier word
        while pairs := [p for p in zip(parts, parts[1:])]:
            known = [m for m in merges if m in pairs]
            if not known:
                merges.append(pairs[0])
            i = pairs.index((known or pairs)[0])
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
    vocab = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]  # CLIP pools at the largest id
    return transformers.CLIPTokenizer(
        vocab={w: i for i, w in enumerate(vocab)}, merges=merges, model_max_length=16
    )


def make_bert_tokenizer():
    """A BertTokenizer of this world's words, with BERT's special ones and BLIP's two."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "[DEC]", "[ENC]"]
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}, model_max_length=35)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer


def special_ids(tokenizer):
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def text_encoder(tokenizer, projection):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=64,
        **special_ids(tokenizer),
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def unet(cross_dim, **more):
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 48),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_dim,
        attention_head_dim=4,
        use_linear_projection=True,
        **more,
    )


def sdxl_pipeline(vae, tokenizer):
    pooled = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(128, projection_class_embeddings_input_dim=6 * 8 + 64, **pooled),
        vae=vae,
        text_encoder=text_encoder(tokenizer, False),
        text_encoder_2=text_encoder(tokenizer, True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
        add_watermarker=False,
    )


def sd3_pipeline(vae, tokenizer):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=32,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=SIZE // 4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder(tokenizer, True),
        text_encoder_2=text_encoder(tokenizer, True),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def sd15_pipeline(vae, tokenizer):
    spacing = dict(timestep_spacing="trailing", steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(tokenizer, False),
        tokenizer=tokenizer,
        unet=unet(64),
        scheduler=diffusers.DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction", **spacing),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {"sdxl": sdxl_pipeline, "sd3": sd3_pipeline, "sd15": sd15_pipeline}


def build_pipeline(name, vae):
    """An untrained pipeline of the family `name`, with its own copy of the VAE."""
    return PIPELINES[name](copy.deepcopy(vae), make_tokenizer())


OPEN_CLIP = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=SIZE, layers=3, width=64, head_width=32, patch_size=4, mlp_ratio=3.0),
    text_cfg=dict(
        context_length=16, vocab_size=len(make_tokenizer()), width=64, heads=2, layers=3, mlp_ratio=3.0
    ),
)


def build_reward(name, tokenizer):
    """An untrained reward for 32 px: open_clip's CLIP for clip and hps, transformers' CLIPModel for pick, for
    blip BLIP and a head."""
    if name == "blip":
        return BlipReward(blip_config(tokenizer), gelu=False)
    if name != "pick":
        import open_clip  # here, because it warns as it is imported, and bad options end in one line

        return open_clip.CLIP(**OPEN_CLIP)
    tower = dict(
        hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, projection_dim=64
    )
    text = dict(tower, vocab_size=len(tokenizer), max_position_embeddings=16, **special_ids(tokenizer))
    vision = dict(tower, image_size=SIZE, patch_size=4)
    config = transformers.CLIPConfig(projection_dim=64, vision_config=vision, text_config=text)
    return transformers.CLIPModel(config)


def blip_config(tokenizer):
    tower = dict(sizes(64, layers=3, heads=4), intermediate_size=128)
    text = dict(tower, vocab_size=len(tokenizer), max_position_embeddings=35, encoder_hidden_size=64)
    text |= dict(bos_token_id=len(tokenizer) - 2, sep_token_id=tokenizer.sep_token_id)
    return transformers.BlipConfig(
        text_config=text, vision_config=dict(tower, image_size=SIZE, patch_size=4, layer_norm_eps=1e-6)
    )


def save_reward(name, model, tokenizer, folder):
    """In fp16, as a hub repository of that kind holds it."""
    model = model.half()

    def write(folder):
        folder.mkdir()
        tokenizer.save_pretrained(folder)
        if name == "pick":
            model.save_pretrained(folder)
            return
        weights = {k: v.contiguous() for k, v in model.state_dict().items()}
        if name == "blip":
            blip_config(tokenizer).save_pretrained(folder)
            save_file(weights, folder / "ImageReward.safetensors")
            return
        save_file(weights, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}, indent=1))

    publish(folder, write)


# ----------------------------------------------------------------------------- training


def train_vae(device, steps):
    """A KL-VAE, 3 x 32 x 32 -> 4 x 8 x 8. Its reconstructions bound every generator, so it gets its time."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(24, 32, 40),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=SIZE,
        force_upcast=False,
    )
    vae = vae.to(device, memory_format=torch.channels_last)  # 4 x faster small convolutions on the CPU
    _, images = draw_pool("all", 20_000, seed=1)
    for (x,), update in batches([images], 48, steps, 2e-3, list(vae.parameters()), "vae"):
        x = x.to(device, memory_format=torch.channels_last)
        q = vae.encode(x).latent_dist
        y = vae.decode(q.sample()).sample
        update(F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * q.kl().mean() / q.mean[0].numel())
    with torch.no_grad():  # latents of mean 0: SDXL's and SD 1.5's pipelines know no shift
        z = torch.cat([vae.encode(x.to(device)).latent_dist.mean for x in images[:2000].split(100)])
        vae.post_quant_conv.bias += vae.post_quant_conv.weight.sum((1, 2, 3)) * z.mean()
        vae.quant_conv.bias[:4] -= z.mean()
    vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=0.0)
    return vae


def train_generator(name, vae, device, steps, samples=40_000):
    """Denoiser and text encoders together, from scratch, on captions that slip; the averaged weights."""
    torch.manual_seed(0)
    pipe = build_pipeline(name, vae).to(device)
    family = family_of(pipe)
    prompts, images = draw_pool("train", samples, seed=2, slips=SLIPS[name])
    with torch.no_grad():
        latents = torch.cat([family.encode_images(pipe.vae, x).cpu() for x in images.split(200)])
    model = denoiser_of(pipe)[1].to(memory_format=torch.channels_last)
    modules = [model, *text_encoders_of(pipe).values()]
    parameters = [p for m in modules for p in m.parameters()]
    average = [p.detach().clone() for p in parameters]
    data = [latents, torch.arange(samples)]
    lr = 1e-3 if name == "sd3" else 2e-3
    for step, ((x, index), update) in enumerate(batches(data, 128, steps, lr, parameters, name)):
        caption = [prompts[i] if torch.rand(()) > 0.1 else "" for i in index]  # 10 % empty, for guidance
        cond = family.encode_prompts(pipe, caption, (SIZE, SIZE))
        x = x.to(device)
        x_t, t, target = add_noise(pipe.scheduler, x, torch.randn_like(x), torch.rand(len(x), device=device))
        update(F.mse_loss(family.predict(model, x_t, t, cond), target))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, step / (step + 10)))
    torch._foreach_copy_([p.data for p in parameters], average)
    return pipe


def reward_data(name, vae, device, tokenizer, samples):
    """What train_reward draws its batches from: pictures (samples, 3, H, W) that are right, others that
    slipped, token ids, the number of the caption's meaning, and whether the caption's category is in HARD."""
    seed = list(HARD).index(name)
    prompts, good = draw_pool("train", samples, seed=10 + seed, focus=HARD[name])
    rng = np.random.default_rng(20 + seed)
    bad = pixels([render(slip(grammar()[p], rng), rng) for p in tqdm(prompts, desc="slips", leave=False)])
    with torch.no_grad():
        for x in (good, bad):  # generated pictures come out of the VAE: half the data does too
            for i in range(0, samples // 2, 200):
                z = vae.encode(x[i : i + 200].to(device)).latent_dist.sample()
                x[i : i + 200] = vae.decode(z).sample.clamp(-1, 1).cpu()
    ids = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    cores = {c: i for i, c in enumerate(dict.fromkeys(s["core"] for s in grammar().values()))}
    core = torch.tensor([cores[grammar()[p]["core"]] for p in prompts])
    hard = torch.tensor([grammar()[p]["tag"] in HARD[name] for p in prompts])
    return [good, bad, ids, core, hard]


def train_reward(name, vae, device, steps, samples=24_000):
    """Contrastive training on captioned renders, half of them seen through the VAE, with a slipped picture as
    one more negative for the captions of the HARD categories. Captions of the same meaning are not each
    other's negatives."""
    seed = list(HARD).index(name)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = build_reward(name, tokenizer).to(device)
    data = reward_data(name, vae, device, tokenizer, samples)
    for (x, y, ids, c, h), update in batches(data, 128, steps, 1e-3, list(model.parameters()), name, seed):
        n = len(x)
        both = torch.cat([x, y]) / 2 + 0.5  # (2B, 3, H, W) in [0, 1]
        both = ((both + 0.02 * torch.randn_like(both) - MEAN) / STD).to(device)
        if name == "pick":
            image = model.get_image_features(pixel_values=both).pooler_output
            text = model.get_text_features(input_ids=ids.to(device)).pooler_output
        else:
            image, text = model.encode_image(both), model.encode_text(ids.to(device))
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)  # (2B, D), (B, D)
        logits = model.logit_scale.clamp(max=4.0).exp() * text @ image.T  # (B, 2B), captions x pictures
        itself = torch.eye(n, dtype=torch.bool)
        same = (c[:, None] == c[None]) & ~itself
        own = itself & h[:, None]  # a slip counts for its own caption
        logits = logits.masked_fill(torch.cat([same, ~own], 1).to(device), -1e4)
        label = torch.arange(n, device=device)
        update((F.cross_entropy(logits, label) + F.cross_entropy(logits[:, :n].T, label)) / 2)
    return model, tokenizer


def train_blip(vae, device, steps, samples=40_000):
    """ImageReward's loss, -log sigmoid(s_better - s_worse), on a right picture against its slip and against
    the picture of another meaning. BLIP's own pre-training beside it, to name a masked word of the caption
    from the picture, is what relations are learned from."""
    seed = list(HARD).index("blip")
    torch.manual_seed(seed)
    tokenizer = make_bert_tokenizer()
    model = build_reward("blip", tokenizer).to(device)
    eye, text, head = model.blip["visual_encoder"], model.blip["text_encoder"], model.mlp["layers"]
    data = reward_data("blip", vae, device, tokenizer, samples)
    shown = {*COLORS, *NUMBERS, *SHAPES, *map(plural, SHAPES), *(r.split()[0] for r in RELATIONS)}
    shown = torch.tensor(tokenizer.convert_tokens_to_ids(sorted(shown)))  # words that a picture can tell

    def look(x):
        """(N, 3, H, W) in [-1, 1] -> (N, 1 + patches, D)"""
        x = x / 2 + 0.5
        return eye(pixel_values=((x + 0.02 * torch.randn_like(x) - MEAN) / STD).to(device)).last_hidden_state

    def read(ids, seen):
        """(N, L), (N, 1 + patches, D) -> (N, L, D)"""
        return text(
            input_ids=ids, attention_mask=ids != 0, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state

    for (x, y, ids, c, h), update in batches(data, 64, steps, 1e-3, list(model.parameters()), "blip", seed):
        n = len(x)
        right, wrong = look(torch.cat([x, y])).chunk(2)
        at = torch.isin(ids, shown).float().multinomial(1)  # (B, 1): one of those words each
        masked = ids.scatter(1, at, tokenizer.mask_token_id).to(device)
        ids, word = ids.to(device), ids.gather(1, at)[:, 0].to(device)
        out = read(torch.cat([ids, ids, ids, masked]), torch.cat([right, wrong, right.roll(1, 0), right]))
        scores = head(out[: 3 * n, 0]).view(3, n)
        against_slip = F.softplus(scores[1] - scores[0])[h]
        against_other = F.softplus(scores[2] - scores[0])[c != c.roll(1)]
        named = (
            out[3 * n :][torch.arange(n), at[:, 0]] @ text.embeddings.word_embeddings.weight.T
        )  # (B, words)
        update(torch.cat([against_slip, against_other]).mean() + F.cross_entropy(named, word))
    with torch.no_grad():  # scores of mean 0 and deviation 1, as ImageReward's are
        ids = data[2][:1000].to(device)
        scores = torch.cat([head(read(ids, look(x[:1000]))[:, 0]) for x in data[:2]])
        head[-1].bias -= scores.mean()
        head[-1].weight /= scores.std()
        head[-1].bias /= scores.std()
    return model, tokenizer


# ----------------------------------------------------------------------------- python toy/build.py


def by_category(prompts, values):
    """{category: mean of the values of its prompts}, to two digits."""
    tags = np.array([grammar()[p]["tag"] for p in prompts])
    return {t: round(float(np.mean(np.array(values)[tags == t])), 2) for t in CATEGORIES}


@torch.no_grad()
def report(device):
    """What toy/ can do: the VAE's ceiling, generators by category, rewards on a picture against its slip."""
    rng = np.random.default_rng(7)
    prompts = prompts_of("heldout", 25)
    many = prompts * 5
    vae = load_pipeline(TOY / "models/sdxl", device).vae
    x = pixels([render(p, rng) for p in many])
    y = torch.cat([vae.decode(vae.encode(b.to(device)).latent_dist.mean).sample.cpu() for b in x.split(100)])
    passed = [check(p, image) for p, image in zip(many, to_pil(y))]
    print(f"vae: {np.mean(passed):.3f} of {len(many)} reconstructions pass the checker")

    models = {m["name"]: m for m in map(parse_model, TOY_MODELS)}
    for name, model in models.items():
        pipe, passed = load_pipeline(model["path"], device), []
        for seed in range(4):
            for i in range(0, len(prompts), 64):
                batch = prompts[i : i + 64]
                results = generate(pipe, batch, [noise_seed(p, "", seed) for p in batch], model)
                passed += [check(p, image) for p, (image, _) in zip(batch, results)]
        table = by_category(prompts * 4, passed)
        overall = np.mean(list(table.values()))
        print(f"{name}, guidance {model['guidance']:g}: {table}, overall {overall:.3f}")

    for spec in TOY_REWARDS:
        score = load_reward(spec, device)
        good = score([render(p, rng) for p in many], many)
        bad = score([render(slip(grammar()[p], rng), rng) for p in many], many)
        right = (good > bad).tolist()
        table = by_category(many, right)
        print(f"{Path(spec).name}: right picture above its slip {table}, all {np.mean(right):.3f}")


def build_stage(stage, steps, device, folder, vae_folder):
    """Train one stage and write it to its folder."""
    if stage == "prompts":
        return write_prompts()
    if stage == "vae":
        return publish(folder, train_vae(device, steps).to("cpu").save_pretrained)
    if not vae_folder.exists():  # a machine that never built the VAE takes the one that is shipped
        vae_folder = TOY / "models/sdxl/vae"
    if not vae_folder.exists():
        fail(f"{vae_folder}: missing; run --only vae first")
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float32)
    vae = vae.to(device).eval().requires_grad_(False)
    if stage == "blip":
        return save_reward(stage, *train_blip(vae, device, steps), folder)
    if stage in HARD:
        return save_reward(stage, *train_reward(stage, vae, device, steps), folder)
    publish(folder, train_generator(stage, vae, device, steps).to("cpu", torch.float16).save_pretrained)
    for file in folder.glob("text_encoder*/config.json"):  # else from_pretrained alone reads them as fp16
        write_text(file, read_text(file).replace('"float16"', '"float32"'))


@one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    device = pick_device(cfg.device)
    folders = {s: TOY / ("rewards" if s in HARD else "models") / s for s in STAGES}
    folders["prompts"] = TOY / "heldout.jsonl"
    folders["vae"] = TOY.parent / "outputs/toy_vae"  # in fp32; every pipeline ships its own fp16 copy
    for stage in () if cfg.report else cfg.only:
        if folders[stage].exists() and not cfg.redo:
            print(f"{stage}: {folders[stage]} is there; --redo true builds it again")
            continue
        steps = max(1, round(STAGES[stage] * cfg.scale))
        build_stage(stage, steps, device, folders[stage], folders["vae"])
    if cfg.report or set(cfg.only) == set(STAGES):
        report(device)


if __name__ == "__main__":
    main()
