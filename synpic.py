"""Syn-Pic: a ranked preference data set without human labels (RankDPO, Algorithm 1).

    python synpic.py                                           # the toy world -> outputs/synpic
    python synpic.py --prompts my.txt --out synpic --rewards hpsv2.1 pickscore clip --batch_size 8 \\
        --models sdxl sd3 pixart cascade                       # the paper's four generators, from the hub
    python synpic.py --models sdxl sdxl,seed=1 sdxl,seed=2     # one generator, several seeds ("only SDXL", Table 4)
    python synpic.py --stages label                            # phi and rank anew from the stored scores

Every model draws every prompt, every reward scores every image, and phi (the share of pairwise wins over images and
rewards) ranks the k images of a prompt. Three stages, each skipping what is done:

    generate   images/00000/sdxl_0.png ...       written whole or not at all; a batch is made by its index, so the
                                                 pictures do not depend on where a run was interrupted
    score      scores/pickscore.jsonl ...        appended as they come; a torn last line is scored again
    label      metadata.jsonl, preview.png       one row a prompt: prompt, file_names, models, seeds, scores, phi, rank

datasets.load_dataset("imagefolder", data_dir=...) reads the folder, rankdpo.py trains on it.
A model is a name of the table below, or name=path, with options after commas: seed, steps, guidance, resolution.
"""
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from losses import preference_probability, preference_rank
from rankdpo import HERE, fail, load_pipeline, option, parse, pick_device, pick_dtype, sequence_length, write_atomic
from rewards import TOY_REWARDS, check_reward, read_scores, reward_name, score_rows

# Sampling defaults of each generator's model card: (hub id, steps, guidance, side in pixels; 0 = the pipeline's own).
MODELS = {
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 40, 5.0, 1024),
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", 28, 7.0, 1024),
    "pixart": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 20, 4.5, 1024),
    "cascade": ("stabilityai/stable-cascade", 20, 4.0, 1024),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 50, 7.5, 512),
}
TOY_MODELS = tuple(f"{name}={HERE / 'toy/models' / name.split(',')[0]},steps=16,guidance={g}{seed}" for name, g, seed in
                   (("sdxl", 3, ""), ("sdxl", 3, ",seed=1"), ("sd3", 3, ""), ("sd15", 5, ""), ("sd15", 5, ",seed=1")))


@dataclass
class Config:
    prompts: str = option(str(HERE / "toy/prompts.txt"), "text file, one prompt a line")
    models: tuple = option(TOY_MODELS, "generators: name, or name=path, then options: sd3=toy/models/sd3,steps=16,guidance=3,seed=1")
    rewards: tuple = option(TOY_REWARDS, "reward models, as name or name=source; see rewards.py")
    out: str = option("outputs/synpic", "folder to write")
    stages: tuple = option(("generate", "score", "label"), "which stages to run")
    batch_size: int = option(64, "images a batch, in every stage")
    limit: int = option(0, "use the first that many prompts; 0 = all")
    on_error: str = option("stop", "prompts with an image that cannot be scored: stop, or leave them out", ("stop", "skip"))
    precision: str = option("auto", "of the generators; auto is bf16 on a GPU", ("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


def read_prompts(path, limit=0):
    """One prompt a line; blank lines and repetitions are dropped and counted."""
    if not os.path.isfile(path):
        fail(f"--prompts {path}: no such file")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        fail(f"--prompts {path}: not UTF-8 text ({e.reason} at byte {e.start})")
    prompts = list(dict.fromkeys(p for p in lines if p))
    if len(prompts) < len(lines):
        print(f"{path}: {len(lines)} lines, {len(prompts)} different prompts kept")
    if not prompts:
        fail(f"--prompts {path}: holds no prompt")
    return prompts[:limit] if limit > 0 else prompts


def parse_model(spec):
    """"name[=path][,key=value...]" -> dict(name, path, steps, guidance, resolution, seed)."""
    head, *options = spec.split(",")
    name, _, path = head.partition("=")
    if not path and name not in MODELS:
        fail(f"unknown model {name!r}: use one of {', '.join(MODELS)}, or {name}=folder_or_hub_id")
    hub, steps, guidance, resolution = MODELS.get(name, ("", 30, 5.0, 0))
    model = dict(name=name, path=path or hub, steps=steps, guidance=guidance, resolution=0 if path else resolution, seed=0)
    for o in options:
        key, _, value = o.partition("=")
        try:
            model[key] = {"steps": int, "guidance": float, "resolution": int, "seed": int}[key](value)
        except (KeyError, ValueError):
            fail(f"model {spec!r}: {o!r} is not an option; use steps=28, guidance=4.5, resolution=1024 or seed=1")
    return model


def noise_seed(prompt, model, seed):
    """The starting noise of (prompt, model, seed): the same in any order, batch or process."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{model}|{prompt}".encode()).digest()[:7], "big")


def generate(pipe, prompts, seeds, model):
    """One batch of PIL images; every image has its own generator. `model` is what parse_model returns."""
    kwargs, kind = dict(num_inference_steps=model["steps"], guidance_scale=model["guidance"]), type(pipe).__name__
    if kind.startswith("StableDiffusion3"):
        kwargs["max_sequence_length"] = sequence_length(pipe)
    if kind.startswith("StableCascade"):                       # steps and guidance belong to the prior; the decoder has its own
        kwargs = dict(prior_num_inference_steps=model["steps"], prior_guidance_scale=model["guidance"])
    if model["resolution"]:
        kwargs.update(height=model["resolution"], width=model["resolution"])
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]         # CPU noise: the same on every device
    return pipe(prompt=list(prompts), generator=generators, **kwargs).images


def picture_grid(rows, path, side=128):
    """[(title, [(image, caption), ...]), ...] -> a PNG, one row of captioned pictures a title."""
    columns = max(len(cells) for _, cells in rows)
    canvas = Image.new("RGB", (max(columns * (side + 8) + 8, 420), len(rows) * (side + 44) + 8), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (title, cells) in enumerate(rows):
        top = r * (side + 44) + 6
        pen.text((8, top), title, fill="black")
        for c, (image, caption) in enumerate(cells):
            resample = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            canvas.paste(image.convert("RGB").resize((side, side), resample), (8 + c * (side + 8), top + 14))
            pen.text((8 + c * (side + 8), top + side + 16), caption, fill="black")
    tmp = f"{path}.tmp"
    canvas.save(tmp, format="PNG")
    os.replace(tmp, path)


def file_name(i, model):
    return f"images/{i:05d}/{model['name']}_{model['seed']}.png"


# ----------------------------------------------------------------------------- stages


def generate_stage(cfg, prompts, models, device):
    out, pipe, loaded = Path(cfg.out), None, None
    for model in models:                                       # one generator in memory at a time
        starts = [s for s in range(0, len(prompts), cfg.batch_size)
                  if not all((out / file_name(i, model)).is_file() for i in range(s, min(s + cfg.batch_size, len(prompts))))]
        if not starts:
            continue
        if loaded != model["path"]:
            pipe, loaded = None, model["path"]                 # free the last one first
            pipe = load_pipeline(model["path"], device, pick_dtype(cfg.precision, device))
        for start in tqdm(starts, desc=f"generate {model['name']}_{model['seed']}", unit="batch"):
            batch = prompts[start:start + cfg.batch_size]
            images = generate(pipe, batch, [noise_seed(p, model["name"], model["seed"]) for p in batch], model)
            for i, image in enumerate(images, start):
                path = out / file_name(i, model)
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(f"{path}.tmp", format="PNG")
                    os.replace(f"{path}.tmp", path)


def rows_of(prompts, models):
    """[(prompt, file_names)]: what the score stage of rewards.py takes."""
    return [(p, [file_name(i, m) for m in models]) for i, p in enumerate(prompts)]


def label_stage(cfg, prompts, models):
    out = Path(cfg.out)
    stored = {reward_name(spec): read_scores(out, spec, rows_of(prompts, models)) for spec in cfg.rewards}
    complete = [i for i in range(len(prompts)) if all(i in done for done in stored.values())]
    if len(complete) < len(prompts):
        name = min(stored, key=lambda n: len(stored[n]))
        missing = f"{out}/scores/{name}.jsonl: scores of {len(prompts) - len(stored[name])} of {len(prompts)} prompts are missing"
        if cfg.on_error == "stop" or not complete:
            fail(f"{missing}; run --stages score first, or leave such prompts out with --on_error skip")
        print(f"{missing}; {len(prompts) - len(complete)} prompts are left out")
    rewards = torch.tensor([[done[i] for done in stored.values()] for i in complete]).transpose(1, 2)   # (N, K, R)
    phi = preference_probability(rewards)                      # (N, K), Algorithm 1
    rank = preference_rank(phi)                                # (N, K), 1 = best
    lines = []
    for n, i in enumerate(complete):
        lines.append(json.dumps(dict(
            prompt=prompts[i], file_names=[file_name(i, m) for m in models], models=[m["name"] for m in models], seeds=[m["seed"] for m in models],
            scores={name: done[i] for name, done in stored.items()}, phi=phi[n].tolist(), rank=rank[n].tolist())))
    write_atomic(out / "metadata.jsonl", "\n".join(lines) + "\n")

    rows = []
    for n in np.linspace(0, len(complete) - 1, min(6, len(complete))).astype(int):
        i, order = complete[n], phi[n].argsort(descending=True, stable=True).tolist()
        rows.append((prompts[i], [(Image.open(out / file_name(i, models[j])), f"{models[j]['name']}_{models[j]['seed']}  phi {phi[n, j]:.2f}") for j in order]))
    picture_grid(rows, out / "preview.png")
    wins = {f"{m['name']}_{m['seed']}": round(phi[:, j].mean().item(), 3) for j, m in enumerate(models)}
    print(f"mean phi by model: {wins}; share of tied pairs {((phi[:, :, None] == phi[:, None]).float().mean() * len(models) - 1).item() / max(1, len(models) - 1):.3f}")
    print(f"{len(complete)} lists of {len(models)} images in {out}/metadata.jsonl; look at {out}/preview.png (best to worst)")


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    prompts = read_prompts(cfg.prompts, cfg.limit)
    models = [parse_model(spec) for spec in cfg.models]
    if unknown := set(cfg.stages) - {"generate", "score", "label"}:
        fail(f"--stages {' '.join(unknown)}: there are generate, score and label")
    if len({file_name(0, m) for m in models}) < len(models) or len(models) < 2:
        fail("--models: at least two are needed, and a model that appears twice needs another seed, as in sdxl sdxl,seed=1")
    if len({reward_name(r) for r in cfg.rewards}) < len(cfg.rewards):
        fail("--rewards: a reward appears twice")
    if any(reward_name(r) == "toyworld" for r in cfg.rewards):
        fail("--rewards toyworld: the exact checker is for evaluation only, labels come from reward models")
    for spec in cfg.rewards:
        check_reward(spec)                                     # a wrong name fails now, not after hours of drawing
    if cfg.batch_size < 1:
        fail(f"--batch_size must be positive, got {cfg.batch_size}")
    device, out = pick_device(cfg.device), Path(cfg.out)

    # what an existing folder was made with must not change under it; rewards may be added at any time
    def identity(m):                                           # a local model by its weights, wherever it lies; others by hub id
        files = sorted([str(p.relative_to(m["path"])), p.stat().st_size] for p in Path(m["path"]).rglob("*.safetensors"))
        return dict(m, path=files or m["path"])
    settings = dict(prompts=hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16], models=[identity(m) for m in models])
    if "generate" in cfg.stages:
        settings.update(batch_size=cfg.batch_size, precision=cfg.precision)
    if (out / "settings.json").is_file():
        before = json.loads((out / "settings.json").read_text())
        if changed := [k for k in settings if before.get(k) != json.loads(json.dumps(settings[k]))]:
            fail(f"{out} was made with other {' and '.join(changed)}; choose another --out, or delete it to start again")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / "settings.json", json.dumps(settings, indent=1))
        except OSError as e:
            fail(f"--out {out}: cannot be written ({e.strerror})")

    if "generate" in cfg.stages:
        generate_stage(cfg, prompts, models, device)
    if "score" in cfg.stages:
        for spec in cfg.rewards:
            score_rows(out, spec, rows_of(prompts, models), device, cfg.batch_size, cfg.on_error)
    if "label" in cfg.stages:
        label_stage(cfg, prompts, models)


if __name__ == "__main__":
    main()
