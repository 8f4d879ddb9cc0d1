"""RankDPO, BalancedDPO and their baselines on ranked lists of images: one file, read it top to bottom.

    python rankdpo.py                                          # the toy world: tunes toy/models/sdxl on outputs/synpic
    python rankdpo.py --loss dpo --beta 500                    # another objective of the family
    python rankdpo.py --loss balanced --ref_refresh 50         # BalancedDPO: majority vote, reference refresh
    torchrun --nproc_per_node 8 rankdpo.py --data synpic --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --resolution 1024 --beta 2500 --lr 2e-5 --steps 400 --global_batch_size 1024 --device_batch_size 1 \\
        --gradient_checkpointing true --save_every 20          # the paper's size; `bash train.sh sdxl` has the whole recipe
    python rankdpo.py ... --lora_rank 64 --images_per_forward 1            # adapters, one image at a time: one GPU
    python rankdpo.py --profile sdxl --gradient_checkpointing true         # FLOPs, time and memory of random weights, no download

Input is a folder that synpic.py wrote (metadata.jsonl and images), output a pipeline folder that
`DiffusionPipeline.from_pretrained` loads (with --lora_rank: a folder for `pipe.load_lora_weights`), log.jsonl, curves.png
and, with --sample_every, samples.png. A run that was killed goes on from its newest checkpoint when the same command is
given again. Stable Diffusion 1.x / 2.x (noise or v), SDXL and SD3 (rectified flow) differ in one spot, below. Losses and
weights: losses.py, with the scale of beta.

Where this departs from the paper (arXiv 2410.18013), which gives no beta, rate, optimiser or schedule:
  - one noise is shared by the k images of a list, as public DPO trainers share it over a pair;
    Algorithm 2 draws one each: --noise independent
  - errors are means over C, H, W, so beta is ~65,000 times the beta of a summed SDXL error
  - AdamW with a linear decay to zero: a constant rate ruins small models while loss and accuracy look fine
The curve is the same on 1 and on N processes, for any --device_batch_size and --images_per_forward: noise and timestep
depend on (seed, step, list) alone. One process runs plain, several shard policy, reference and optimiser (FSDP2).
"""
import argparse
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from losses import dcg_weights, denoising_error, dpo_weights, gain_weights, majority_vote, preference_loss, vote_weights

HERE = Path(__file__).resolve().parent
LOSSES = ("rankdpo", "dpo", "gain", "balanced", "sft", "weighted")


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    data: str = option("outputs/synpic", "folder with metadata.jsonl and images, as synpic.py writes it")
    model: str = option(str(HERE / "toy/models/sdxl"), "diffusers pipeline to tune: a folder or a hub id")
    out: str = option("outputs/rankdpo", "where the tuned pipeline, log.jsonl and curves.png go")
    loss: str = option("rankdpo", "rankdpo (Eq. 7), dpo, gain (DPO + gain weights), balanced (majority vote), sft (on the winners), weighted (fine-tuning, phi as weight)", LOSSES)
    beta: float = option(100., "for the mean squared error without a factor 1/2; 2500 is usual for SDXL at 1024 px")
    lr: float = option(2e-4, "peak learning rate of AdamW; decays linearly to 0")
    steps: int = option(600, "optimiser steps")
    warmup_steps: int = option(10, "steps of linear warm-up")
    global_batch_size: int = option(32, "lists (prompts) an optimiser step, over all processes")
    device_batch_size: int = option(32, "lists a forward pass on one device; accumulation follows from it")
    images_per_forward: int = option(0, "images a pass with gradient, for the gradient of whole lists in the memory of few; 0 = all of the pass")
    lora_rank: int = option(0, "train adapters of this rank instead of all weights (needs peft); 0 = all weights")
    ref_refresh: int = option(0, "copy the policy into the reference every that many steps; 0 = never")
    timesteps: str = option("logit_normal", "how rectified flow draws them; diffusion draws uniformly", ("logit_normal", "uniform"))
    noise: str = option("shared", "one noise a list, or one an image (Algorithm 2)", ("shared", "independent"))
    labels: str = option("given", "controls: reversed or random labels must not help (RankDPO Table 4 has the random row)", ("given", "reversed", "random"))
    ties: str = option("drop", "what an even vote means for --loss balanced", ("drop", "literal", "random"))
    resolution: int = option(0, "side in pixels to which images are resized and cropped; 0 = as they are")
    precision: str = option("auto", "compute type; weights, errors and losses are fp32 always, or fp64 like all else, to check equalities", ("auto", "fp32", "bf16", "fp64"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    weight_decay: float = option(.01, "AdamW's")
    max_grad_norm: float = option(1., "gradient clipping")
    holdout: float = option(0., "share of the lists kept from training, for accuracy on unseen ones")
    eval_every: int = option(50, "steps between measurements on the held-out lists")
    ema: float = option(0., "decay of a moving average of the trained weights, which is then what is saved; 0 = none")
    sample_every: int = option(0, "steps between pictures of the first prompts, a row each in samples.png; 0 = never")
    sample_prompts: int = option(8, "prompts in samples.png")
    sample_steps: int = option(16, "sampling steps of samples.png")
    sample_guidance: float = option(2., "guidance scale of samples.png")
    save_every: int = option(0, "steps between checkpoints; 0 = only when told to stop (SIGTERM)")
    keep: int = option(1, "checkpoints to keep")
    resume: bool = option(True, "go on from the newest checkpoint in --out; false starts again")
    seed: int = option(0, "order of the lists, timesteps, noise")
    profile: str = option("", "only measure lists of 4 on a random-weight denoiser of the real size; counts FLOPs without a GPU too", ("", "sdxl", "sd3"))
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def parse(config, doc, argv=None):
    """A dataclass from the command line. Wrong options end in one line and exit status 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{parser.prog}: {message} (--help lists the options)", 2)
    for f in fields(config):
        multiple = isinstance(f.default, tuple)
        kind = type(f.default[0]) if multiple else type(f.default)
        flag = dict(nargs="?", const=True) if kind is bool else {}               # --flag, --flag true, --flag false
        kind = boolean if kind is bool else kind
        default = " ".join(map(str, f.default)) if multiple else f.default
        parser.add_argument(f"--{f.name}", type=kind, default=f.default, **(dict(nargs="+") if multiple else flag), choices=f.metadata["choices"],
                            metavar=f.name.upper() if f.metadata["choices"] is None else None,
                            help=f"{f.metadata['help']} (default: {default})".replace("%", "%%"))
    return config(**vars(parser.parse_args(argv)))


def fail(message, status=1):
    """End with one line on stderr: the last one, below any progress bar."""
    if status == 1:
        raise SystemExit(message)                              # python prints it at the very end and exits with 1
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)


def pick_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: {str(e).splitlines()[0]}")


def pick_dtype(precision, device):
    """The compute type that --precision names; auto is bf16 on a GPU, fp32 elsewhere."""
    precision = precision if precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[precision]


def write_atomic(path, text):
    """Write a text file so that a reader sees the old one or the new one, never half."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")                    # processes of one run may write the same file
    with open(tmp, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


# ----------------------------------------------------------------------------- what differs between model families
# SD 1.x / 2.x, SDXL and SD3 differ in this section; sampling differs in synpic.generate.


def load_pipeline(path, device="cpu", dtype=torch.float32):
    """Any diffusers text-to-image pipeline from a folder or a hub id; "base+folder" adds LoRA weights to it. A component that
    was saved as null (a safety checker, the T5 of SD3) stays None: some pipelines ask for that in so many words."""
    path, _, lora = str(path).partition("+")
    kwargs, index = {}, Path(path) / "model_index.json"
    if not index.is_file() and (Path(path).exists() or str(path).startswith((".", "/"))):
        fail(f"{path}: not a diffusers pipeline folder (no model_index.json in it)")
    if not hasattr(diffusers.pipelines, "wuerstchen"):         # where Stable Cascade's index looks for its VQGAN; diffusers moved it
        with suppress(ImportError):
            from diffusers.pipelines.deprecated import wuerstchen
            diffusers.pipelines.wuerstchen = wuerstchen
    try:
        if index.is_file():
            kwargs = {k: None for k, v in json.loads(index.read_text()).items() if isinstance(v, list) and v[0] is None}
        kwargs.update(dtype=dtype, use_safetensors=True)
        try:                                                   # the text-to-image pipeline of that family: Stable Cascade's has two halves
            pipe = AutoPipelineForText2Image.from_pretrained(path, **kwargs)
        except ValueError:                                     # a family for which diffusers has no such entry
            pipe = DiffusionPipeline.from_pretrained(path, **kwargs)
        if lora:
            pipe.load_lora_weights(lora)
            pipe.fuse_lora()                                   # into the weights: a model like any other, to tune or to save
            pipe.unload_lora_weights()
    except Exception as e:                                     # torn weights, no hub, another format: one line says which folder
        fail(f"{path}: could not load a pipeline: {(str(e).splitlines() or [type(e).__name__])[0]}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def denoiser_of(pipe):
    """("unet" or "transformer", the module that is trained)."""
    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    return name, getattr(pipe, name)


def sequence_length(pipe):
    """SD3's T5 length: 256 as its pipeline has it, unless the tokenizer is shorter than CLIP's 77 (the toy models)."""
    return 256 if pipe.tokenizer.model_max_length >= 77 else pipe.tokenizer.model_max_length


def encode_prompts(pipe, prompts, size):
    """Prompts -> {name: (N, ...) tensor}, all that the denoiser is conditioned on. `size` is (height, width) pixels."""
    device = pipe.text_encoder.device
    kind = type(pipe).__name__
    if kind.startswith("StableDiffusionXL"):
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        h, w = size                                            # micro-conditioning stays fp32: bf16 rounds 1023 to 1024
        time_ids = torch.tensor([h, w, 0, 0, h, w], dtype=torch.float32, device=device).repeat(len(prompts), 1)
        return {"embeds": embeds, "pooled": pooled, "time_ids": time_ids}
    if kind.startswith("StableDiffusion3"):
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False,
                                                  max_sequence_length=sequence_length(pipe))
        return {"embeds": embeds, "pooled": pooled}
    if kind.startswith("StableDiffusion"):
        embeds, _ = pipe.encode_prompt(prompts, device, 1, False)
        return {"embeds": embeds}
    fail(f"{kind}: this trainer knows Stable Diffusion 1.x / 2.x, SDXL and SD3 pipelines")


@torch.no_grad()
def sampler(pipe, prompts, size, device, dtype):
    """Prompts -> the arguments with which `pipe` draws them when its text encoders are gone; drops them."""
    encoders = {n: m for n, m in pipe.components.items() if n.startswith("text_encoder") and m is not None}
    for m in encoders.values():
        m.to(device, dtype)
    cond, nothing = encode_prompts(pipe, prompts, size), encode_prompts(pipe, [""] * len(prompts), size)
    zeros = pipe.config.get("force_zeros_for_empty_prompt", False)               # SDXL
    kwargs = {"height": size[0], "width": size[1]}
    for name, argument in (("embeds", "prompt_embeds"), ("pooled", "pooled_prompt_embeds")):
        if name in cond:
            kwargs[argument], kwargs[f"negative_{argument}"] = cond[name].float(), nothing[name].float() * (0 if zeros else 1)
    for name in [*encoders, "safety_checker"]:
        if hasattr(pipe, name):
            setattr(pipe, name, None)
    pipe.vae.enable_slicing()                                  # one image at a time: at 1024 px each takes gigabytes to decode
    return kwargs


def encode_images(vae, pixels):
    """(N, 3, H, W) in [-1, 1] -> scaled latents. The mean of the posterior, so that a cache has one answer."""
    z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
    return (z - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def add_noise(scheduler, x, noise, u, timesteps="logit_normal"):
    """x_t, the model's timestep and its target, for u (N,) uniform in [0, 1). x, noise: (N, C, h, w) fp32.

    Diffusion: t = floor(1000 u), x_t = alpha x + sigma eps, target eps or v = alpha eps - sigma x.
    Rectified flow: sigma = u or logit-normal, then the scheduler's shift, x_t = (1 - sigma) x + sigma eps, target eps - x."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if timesteps == "logit_normal":                        # (0, 1), as SD3 was trained; mps lacks ndtri
            u = torch.sigmoid(torch.special.ndtri(u.cpu().clamp(1e-4, 1 - 1e-4))).to(u)
        sigma = scheduler.config.shift * u / (1 + (scheduler.config.shift - 1) * u)
        s = sigma.view(shape)
        return (1 - s) * x + s * noise, 1000 * sigma, noise - x
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        fail(f"the scheduler predicts {scheduler.config.prediction_type!r}; only epsilon, v_prediction and rectified flow are known")
    t = (u * scheduler.config.num_train_timesteps).long()
    alpha_bar = scheduler.alphas_cumprod.to(x.device)[t].view(shape)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    target = alpha * noise - sigma * x if scheduler.config.prediction_type == "v_prediction" else noise
    return alpha * x + sigma * noise, t, target


def predict(model, x_t, t, cond):
    """The denoiser's prediction, (N, C, h, w), of x_t (N, C, h, w) at timesteps t (N,) given encode_prompts' tensors."""
    if "time_ids" in cond:                                                       # SDXL
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return model(x_t, t, encoder_hidden_states=cond["embeds"], added_cond_kwargs=added, return_dict=False)[0]
    if "pooled" in cond:                                                         # SD3
        return model(x_t, timestep=t, encoder_hidden_states=cond["embeds"], pooled_projections=cond["pooled"], return_dict=False)[0]
    return model(x_t, t, encoder_hidden_states=cond["embeds"], return_dict=False)[0]   # SD 1.x, 2.x


def save_pipeline(pipe, folder):
    publish(folder, lambda tmp: pipe.save_pretrained(tmp, safe_serialization=True))


def publish(folder, write):
    """write(temporary folder), then rename: the old folder stays whole until the new one is."""
    folder = Path(folder)
    tmp, old = Path(f"{folder}.tmp"), Path(f"{folder}.old")
    for p in (tmp, old):
        shutil.rmtree(p, ignore_errors=True)
    write(tmp)
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    shutil.rmtree(old, ignore_errors=True)


# ----------------------------------------------------------------------------- data: ranked lists, cached as latents


def read_lists(folder):
    """metadata.jsonl -> rows that can be trained on. Bad rows end the run with file, line and what to do."""
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        fail(f"{path}: no such file; make it with synpic.py, or name its folder with --data")
    rows = []
    for n, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            k = len(row["file_names"])
            if not isinstance(row["prompt"], str) or k < 2 or len(row["phi"]) != k or any(len(v) != k for v in row.get("scores", {}).values()):
                raise ValueError("needs prompt, at least two file_names, and as many phi and scores as files")
            row["phi"] = [float(p) for p in row["phi"]]
            if not all(0 <= p <= 1 for p in row["phi"]) or not all(np.isfinite(v).all() for v in row.get("scores", {}).values()):
                raise ValueError("phi must lie in [0, 1] and scores be finite")
            missing = [f for f in row["file_names"] if ".." in Path(f).parts or not (Path(folder) / f).is_file()]
            if missing:
                raise ValueError(f"image {missing[0]} is not in the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            what = f"key {e} is missing" if isinstance(e, KeyError) else str(e)
            fail(f"{path}, line {n}: {what}; mend or delete that row (synpic.py --stages label writes phi and rank anew)")
        rows.append(row)
    if not rows:
        fail(f"{path}: no rows; run synpic.py to the end first")
    return rows


def open_image(path, resolution):
    """An image file as (3, H, W) in [-1, 1]; with a resolution, its shorter side resized to that and centre-cropped."""
    try:
        image = Image.open(path).convert("RGB")
    except OSError as e:
        fail(f"{path}: not a readable image ({e}); delete it and run synpic.py again")
    if resolution and image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        w, h = (max(resolution, round(s * scale)) for s in image.size)
        left, top = (w - resolution) // 2, (h - resolution) // 2
        image = image.resize((w, h), Image.Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


CHUNK = 64                                                     # lists a cache file


@torch.no_grad()
def build_cache(cfg, rows, pipe, rank, world, device, dtype):
    """Latents and prompt embeddings of every list, computed once: chunk files that all processes share and read lazily.

    The name of a cache is a hash of what went into it, so a change of images, prompts or model makes a new one."""
    data = Path(cfg.data)
    stat = lambda p: [str(p), p.stat().st_size, p.stat().st_mtime_ns]
    images = [[r["prompt"], [stat(data / f) for f in r["file_names"]]] for r in rows]
    local = Path(cfg.model.partition("+")[0])
    encoders = [stat(p) for n in ("vae", "text_encoder*") for p in sorted(local.glob(f"{n}/*.safetensors"))]
    key = hashlib.sha256(json.dumps([images, cfg.model, encoders, cfg.resolution, str(dtype)]).encode()).hexdigest()[:16]
    folder = data / ".cache" / key
    folder.mkdir(parents=True, exist_ok=True)
    encoders = [m for n, m in pipe.components.items() if n.startswith("text_encoder") and m is not None]
    starts = [s for s in range(0, len(rows), CHUNK)][rank::world]
    todo = [s for s in starts if not (folder / f"{s:07d}.safetensors").is_file()]
    if todo:
        pipe.vae.to(device)                                    # fp32: SDXL's VAE overflows in fp16
        for m in encoders:
            m.to(device, dtype)
    size = None
    for start in tqdm(todo, desc="encode", unit="chunk", disable=rank > 0):
        chunk, tensors = rows[start:start + CHUNK], {}
        for n, row in enumerate(chunk, start):
            images = [open_image(data / f, cfg.resolution) for f in row["file_names"]]
            size = size or images[0].shape
            for f, image in zip(row["file_names"], images):
                if image.shape != size:
                    fail(f"{data / f}: {image.shape[2]} x {image.shape[1]} pixels, the first image has {size[2]} x {size[1]}; give --resolution")
            x = torch.stack(images)
            tensors[f"{n}.latents"] = encode_images(pipe.vae, x).float().cpu().contiguous()
            cond = encode_prompts(pipe, [row["prompt"]], x.shape[-2:])
            tensors.update({f"{n}.{name}": t[0].cpu().contiguous() for name, t in cond.items()})
        path = folder / f"{start:07d}.safetensors"
        tmp = f"{path}.{rank}-{os.getpid()}.tmp"               # two runs on the same lists may write the same file
        save_file(tensors, tmp)
        os.replace(tmp, path)
    return folder


def read_cached(folder, n, files):
    """{name: tensor} of list n; `files` keeps the opened chunk files."""
    start = n // CHUNK * CHUNK
    if start not in files:
        files[start] = safe_open(folder / f"{start:07d}.safetensors", "pt")
    names = [k for k in ("latents", "embeds", "pooled", "time_ids") if f"{n}.{k}" in files[start].keys()]
    return {k: files[start].get_tensor(f"{n}.{k}") for k in names}


def relabel(row, labels, seed, n):
    """The row with its labels turned around, or shuffled among its images; images stay where they are."""
    k = len(row["phi"])
    order = np.random.default_rng([seed, n]).permutation(k) if labels == "random" else np.arange(k)
    phi = [row["phi"][i] for i in order]
    scores = {name: [s[i] for i in order] for name, s in row.get("scores", {}).items()}
    if labels == "reversed":
        phi, scores = [1 - p for p in phi], {name: [-x for x in s] for name, s in scores.items()}
    return dict(row, phi=phi, scores=scores)


def pair_weights(loss, row, ties, seed, n):
    """What the labels of list n mean: (K, K) weights of pairs, or (K, K) with image weights on the diagonal for the two
    objectives without pairs (sft: the best image, ties shared; weighted: phi normalised)."""
    phi = torch.tensor([row["phi"]])                                            # (1, K)
    if loss == "balanced":
        if not row.get("scores"):
            fail("--loss balanced needs the scores of every reward in metadata.jsonl: run synpic.py's score stage")
        rewards = torch.tensor([list(v) for v in row["scores"].values()]).T[None]                  # (1, K, R)
        return vote_weights(majority_vote(rewards, ties, torch.Generator().manual_seed(seed * 1_000_003 + n)))[0]
    if loss == "sft":
        best = (phi == phi.max()).float()
        return torch.diag((best / best.sum())[0])
    if loss == "weighted":
        return torch.diag((phi / phi.sum().clamp(min=1e-6))[0])
    return {"rankdpo": dcg_weights, "dpo": dpo_weights, "gain": gain_weights}[loss](phi)[0]


def list_loss(cfg, policy_err, ref_err, weights, mask):
    """(B, K), (B, K), (B, K, K), (B, K) -> loss (B,), metrics. Fine-tuning uses the reference for its metrics only."""
    if cfg.loss in ("sft", "weighted"):
        own = weights.diagonal(dim1=1, dim2=2)                                  # (B, K)
        s = (policy_err - ref_err).detach()
        best, worst = own.argmax(1, keepdim=True), own.masked_fill(~mask, 2).argmin(1, keepdim=True)
        nan = torch.tensor(float("nan"))
        return (own * policy_err).sum(1), {"accuracy": nan, "best_s": s.gather(1, best).mean(), "worst_s": s.gather(1, worst).mean(),
                                           "weight": own[mask].mean(), "unweighted": nan}
    return preference_loss(policy_err, ref_err, weights, cfg.beta, mask)


def accuracy_by_time(cfg, policy_err, ref_err, weights, mask, u):
    """Implicit accuracy in ten bins of u, the lists' timesteps, from little noise to much; None where a bin is empty."""
    bins = []
    for i in range(10):
        mine = (u * 10).long().clamp(0, 9) == i                                 # (B,)
        accuracy = list_loss(cfg, policy_err[mine], ref_err[mine], weights[mine], mask[mine])[1]["accuracy"].item() if mine.any() else float("nan")
        bins.append(None if np.isnan(accuracy) else accuracy)
    return bins


def draw(cfg, position, n, shape):
    """(u, noise) of list n at a position of the run: u () uniform in [0, 1), noise (K, C, h, w). `position` counts lists
    over all steps. On the CPU and from (seed, step, list) alone, so any number of processes or micro-batches draw the same."""
    state = int(np.random.SeedSequence([cfg.seed, position, n]).generate_state(1, np.uint64)[0])
    g = torch.Generator().manual_seed(state % 2 ** 63)
    u = torch.rand((), generator=g)
    noise = torch.randn(shape if cfg.noise == "independent" else (1,) + shape[1:], generator=g)
    return u, noise.expand(shape)


# ----------------------------------------------------------------------------- training


def provenance(device):
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    import transformers
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return dict(commit=commit or "unknown", torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__, device=name)


def matrix_rate(device, n=8192, times=50):
    """bf16 FLOP/s of an (n, n) matrix product on a GPU: what "share of the peak" is a share of."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for i in range(times + 5):                                 # five to warm up
        if i == 5:
            torch.cuda.synchronize()
            start = time.time()
        a @ a
    torch.cuda.synchronize()
    return 2 * n ** 3 * times / (time.time() - start)


def profile(cfg, device, k=4, steps=5):
    """--profile: FLOPs of a list's step, counted on the meta device, and on a GPU its time, memory and share of the bf16
    matrix rate. The plain loop on one device: forward and backward of the policy, forward of the reference, AdamW."""
    if cfg.profile == "sdxl":                                  # the configuration files of the two models at 1024 px
        kind, latents, shapes = diffusers.UNet2DConditionModel, (4, 128, 128), {"embeds": (77, 2048), "pooled": (1280,), "time_ids": (6,)}
        config = dict(sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
                      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                      up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048, use_linear_projection=True,
                      addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    else:
        kind, latents, shapes = diffusers.SD3Transformer2DModel, (16, 128, 128), {"embeds": (333, 4096), "pooled": (2048,)}
        config = dict(num_layers=24, num_attention_heads=24, pos_embed_max_size=192, pooled_projection_dim=2048, caption_projection_dim=1536)

    def step(model, reference, where, optimizer=None):
        x_t, target = (torch.randn(k, *latents, device=where) for _ in range(2))
        t = torch.full((k,), 500, device=where)
        cond = {n: torch.randn(k, *shape, device=where) for n, shape in shapes.items()}
        with torch.autocast("cuda" if where.type == "cuda" else "cpu", torch.bfloat16, enabled=where.type == "cuda"):
            with torch.no_grad():
                ref_err = denoising_error(predict(reference, x_t, t, cond)[None], target[None])
            m = cfg.images_per_forward or k
            for i in range(0, k, m):                           # the gradient only: the extra forward of --images_per_forward is not in here
                part = slice(i, i + m)
                policy_err = denoising_error(predict(model, x_t[part], t[part], {n: c[part] for n, c in cond.items()})[None], target[None, part])
                (policy_err - ref_err[:, part]).sum().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def build(where, recompute):
        with torch.device(where):
            model, reference = kind(**config), kind(**config).requires_grad_(False)
        if recompute:
            model.enable_gradient_checkpointing()
        return model.eval(), reference.eval()
    flops = {}
    for recompute in (False, True):
        meta = build(torch.device("meta"), recompute)
        with FlopCounterMode(display=False) as counter:
            step(*meta, torch.device("meta"))
        flops[recompute] = counter.get_total_flops() / 1e12
    size = sum(p.numel() for p in meta[0].parameters())
    print(f"{cfg.profile}: {size / 1e9:.3f} G parameters; a list of {k} images at 1024 px takes {flops[False]:.1f} TFLOP, {flops[True]:.1f} with recomputation")
    for ranks in (1, 8):
        print(f"  full fine-tuning on {ranks} GPU(s): {size * (4 + 4 + 8 + 4) / ranks / 1e9:.1f} GB each for fp32 weights, gradients, "
              "AdamW and reference, activations not counted")
    if device.type != "cuda":
        return print("  time and peak memory: not measured, no GPU")
    rate = matrix_rate(device) / 1e12
    model, reference = build(device, cfg.gradient_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    for i in range(steps + 1):                                 # one to warm up
        if i == 1:
            torch.cuda.synchronize()
            start = time.time()
        step(model, reference, device, optimizer)
    torch.cuda.synchronize()
    seconds = (time.time() - start) / steps
    work = flops[False] / seconds                              # model FLOPs: recomputation is not work done
    print(f"  {seconds:.3f} s a list, {work:.0f} TFLOP/s of model work, {work / rate:.0%} of the {rate:.0f} TFLOP/s "
          f"that this device multiplies bf16 matrices with; peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


@torch.no_grad()
def draw_samples(cfg, pipe, prompts, kwargs, device, step, is_main):
    """Draw the fixed prompts from fixed noise: samples/000100.png, a row of pictures; samples.png, the rows of all steps.
    Sharded processes draw together, the first one writes."""
    pipe.vae.to(device)
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
    images = pipe(**kwargs, generator=generators, num_inference_steps=cfg.sample_steps, guidance_scale=cfg.sample_guidance, output_type="np").images
    pipe.vae.to("cpu")                                         # images (N, H, W, 3) in [0, 1]
    if not is_main:
        return
    folder = Path(cfg.out) / "samples"
    if step == 0:                                              # of an earlier run
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    images = np.pad(np.nan_to_num(images), ((0, 0), (0, 0), (0, images.shape[2] // 16), (0, 0)), constant_values=1)
    Image.fromarray((np.concatenate(list(images), axis=1) * 255).round().astype(np.uint8)).save(folder / f"{step:06d}.png")
    rows = sorted(p for p in folder.glob("??????.png") if int(p.stem) <= step)   # a killed run may have been further
    side, left, top = 128, 64, 48
    canvas = Image.new("RGB", (left + len(prompts) * side, top + len(rows) * side), "white")
    pen = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(prompts):
        pen.text((left + i * side, 2), "\n".join(textwrap.wrap(prompt, side // 6)[:3]), fill="black")
    for i, path in enumerate(rows):
        canvas.paste(Image.open(path).resize((len(prompts) * side, side - 6)), (left, top + i * side))
        pen.text((4, top + i * side + side // 2), f"step {int(path.stem)}", fill="black")
    canvas.save(Path(cfg.out) / "samples.png")


def plot_curves(log, path):
    """log.jsonl -> curves.png: loss, implicit accuracy, winner's and loser's error against the reference, gradient norm."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [r for r in map(json.loads, Path(log).read_text().splitlines()) if "loss" in r]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.2), constrained_layout=True)
    for axis, (title, keys) in zip(axes, {"loss": ["loss"], "implicit accuracy": ["accuracy"], "error against the reference": ["best_s", "worst_s"],
                                          "gradient norm": ["grad_norm"]}.items()):
        for key in keys:
            y = np.array([np.nan if r[key] is None else r[key] for r in rows])
            line, = axis.plot(y, alpha=.3)
            width = max(1, len(y) // 20)
            smooth = np.convolve(y, np.ones(width) / width, "valid")
            axis.plot(np.arange(len(smooth)) + width // 2, smooth, color=line.get_color(), label={"best_s": "winner", "worst_s": "loser"}.get(key))
        axis.set_title(title), axis.set_xlabel("step")
        if len(keys) > 1:
            axis.axhline(0, color="k", lw=.5), axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def shard(model, dtype, device):
    """FSDP2: every block that diffusers names as a unit, then the rest. Master weights and reductions are fp32, gathered
    weights `dtype`. Inputs stay as they are, because bf16 would round SDXL's time ids; autocast does the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))          # the device that was asked for, not the best one
    half = dtype if dtype == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
    for module in reversed(list(model.modules())):             # children before parents
        if module is model or type(module).__name__ in (model._no_split_modules or ()):
            # also the root, which FSDP would leave gathered after a forward: a refreshed reference must not use old weights
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def add_lora(model, rank, dtype, refreshed):
    """Adapters on the attention projections, in fp32, over frozen weights of the compute type. The reference is the model
    with adapters off, or, if it is to be refreshed, with a frozen second set of them."""
    from peft import LoraConfig
    model.requires_grad_(False).to(dtype)
    torch.manual_seed(0)                                       # of A; B starts at 0, so the policy starts as the reference
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    for name in ("reference", "default") if refreshed else ("default",):
        model.add_adapter(config, adapter_name=name)           # the last one is active
    adapters = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    for name, p in adapters.items():
        p.data = p.data.to(torch.promote_types(dtype, torch.float32))
        p.requires_grad_(".default." in name)
    trained, anchors = ({n: p for n, p in adapters.items() if p.requires_grad is wanted} for wanted in (True, False))
    refresh(trained, anchors)
    return trained, anchors


@torch.no_grad()
def refresh(trained, anchors):
    """Reference <- policy: each process copies its own shards, or the adapters their namesakes."""
    for name, p in anchors.items():
        p.copy_(trained[name.replace(".reference.", ".default.")])


@contextmanager
def reference_of(model, reference, lora_reference):
    """The network that gives reference errors: a copy, or the model itself with its adapters off or exchanged. They are on
    again before any backward pass: gradient checkpointing recomputes the forward there."""
    if reference is not None:
        yield reference
    elif lora_reference:
        trained = [p for p in model.parameters() if p.requires_grad]
        model.set_adapter("reference")
        yield model
        model.set_adapter("default")
        for p in model.parameters():                           # peft's switch touches requires_grad
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
    else:
        model.disable_adapters()
        yield model
        model.enable_adapters()


# what may change between the parts of one run: it does not change the curve
FREE = ("out", "device", "device_batch_size", "images_per_forward", "gradient_checkpointing", "sample_every", "sample_prompts", "sample_steps",
        "sample_guidance", "save_every", "keep", "resume")


def training_state(trained, optimizer, reference, average):
    """All that the next step depends on, as named tensors that torch.distributed.checkpoint saves and loads in place, on
    any number of processes. Data, noise and rate follow from the step."""
    for p in trained.values():
        if p not in optimizer.state:                           # AdamW makes its state at the first step; loading needs it before
            optimizer.state[p] = {"step": torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu"),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    state = {"weights": {n: p.detach() for n, p in trained.items()}, "reference": {n: p.detach() for n, p in reference.items()}, "average": average}
    return state | {k: {n: optimizer.state[p][k] for n, p in trained.items()} for k in ("step", "exp_avg", "exp_avg_sq")}


def save_checkpoint(cfg, state, step, rank, world):
    """out/checkpoints/step-000100: written under another name, published by a rename when all processes are done."""
    folder = Path(cfg.out) / "checkpoints"
    tmp, final = folder / f"step-{step:06d}.tmp", folder / f"step-{step:06d}"
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    if world > 1:
        dist.barrier()
    dcp.save(state, checkpoint_id=tmp)
    if rank == 0:
        write_atomic(tmp / "run.json", json.dumps({"step": step, "config": asdict(cfg)}))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(tmp, final)
        for old in sorted(folder.glob("step-??????"))[:-max(1, cfg.keep)]:
            shutil.rmtree(old)
    if world > 1:
        dist.barrier()


def find_checkpoint(cfg):
    """(folder, step) of the newest checkpoint of this run, or (None, 0). Another configuration is refused by name."""
    folders = sorted((Path(cfg.out) / "checkpoints").glob("step-??????"))
    if not folders or not cfg.resume:
        return None, 0
    run = json.loads((folders[-1] / "run.json").read_text())
    before = run["config"]
    if changed := [f"{k} ({before.get(k)}, now {v})" for k, v in asdict(cfg).items() if k not in FREE and before.get(k) != v]:
        fail(f"{folders[-1]} belongs to a run with another {', '.join(changed)}; "
             "choose another --out, or start again with --resume false")
    return folders[-1], run["step"]


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and cfg.device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            fail(f"{world} processes, but this machine has {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(local)                           # "cuda" is this process's own GPU from here on
    device = pick_device(cfg.device if torch.cuda.is_available() or world == 1 else "cpu")
    if cfg.profile:
        return profile(cfg, device)
    if world > 1:
        # the long timeout is for the cache: processes wait there for the slowest
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    is_main = rank == 0
    print0 = print if is_main else lambda *a, **k: None
    for name in ("steps", "global_batch_size", "device_batch_size", "lr", "beta", "eval_every", "sample_prompts", "sample_steps"):
        if not getattr(cfg, name) > 0:
            fail(f"--{name} must be positive, got {getattr(cfg, name)}")
    for name in ("seed", "ref_refresh", "warmup_steps", "images_per_forward", "lora_rank", "sample_every", "save_every", "holdout", "ema"):
        if getattr(cfg, name) < 0:
            fail(f"--{name} must not be negative, got {getattr(cfg, name)}")
    for name in ("holdout", "ema"):
        if getattr(cfg, name) >= 1:
            fail(f"--{name} must be below 1, got {getattr(cfg, name)}")
    if cfg.global_batch_size % world:
        fail(f"--global_batch_size {cfg.global_batch_size} does not divide by {world} processes")
    local_batch = cfg.global_batch_size // world
    micro = min(cfg.device_batch_size, local_batch)
    # a step's loss is the mean over the lists of all processes; FSDP averages gradients over processes, all_reduce adds them
    scale = (world if world > 1 and not cfg.lora_rank else 1) / cfg.global_batch_size
    dtype = pick_dtype(cfg.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    # ---- data, models
    rows = [relabel(row, cfg.labels, cfg.seed, n) for n, row in enumerate(read_lists(cfg.data))]
    if is_main:
        try:
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
            (Path(cfg.data) / ".cache").mkdir(exist_ok=True)
        except OSError as e:
            fail(f"--out {cfg.out} or {cfg.data}/.cache cannot be written: {e.strerror}")
    checkpoint, start_step = find_checkpoint(cfg) if is_main else (None, 0)
    if world > 1:
        dist.broadcast_object_list(found := [checkpoint, start_step])
        checkpoint, start_step = found
    pipe = load_pipeline(cfg.model)
    part, model = denoiser_of(pipe)
    wide = torch.promote_types(dtype, torch.float32)           # of weights, noise and errors
    model.to(wide)
    scheduler, family = pipe.scheduler, type(pipe)
    folder = build_cache(cfg, rows, pipe, rank, world, device, dtype)
    if world > 1:
        dist.barrier()
    if cfg.sample_every:                                       # the first prompts, encoded now
        size = [s * 2 ** (len(pipe.vae.config.block_out_channels) - 1) for s in read_cached(folder, 0, {})["latents"].shape[-2:]]
        sampled = list(dict.fromkeys(row["prompt"] for row in rows))[:cfg.sample_prompts]
        sample_kwargs = sampler(pipe, sampled, size, device, dtype)
    else:
        pipe = None                                            # the VAE and the text encoders have done their work
    weights = [pair_weights(cfg.loss, row, cfg.ties, cfg.seed, n) for n, row in enumerate(rows)]
    if not any(w.any() for w in weights):
        fail(f"{cfg.data}/metadata.jsonl: no list prefers any image to another, so there is nothing to learn")
    K = max(len(row["phi"]) for row in rows)
    shuffled = np.random.default_rng([cfg.seed, 2 ** 32 - 1]).permutation(len(rows)).tolist()
    held = sorted(shuffled[:round(cfg.holdout * len(rows))])   # lists for accuracy on unseen ones
    seen = sorted(set(range(len(rows))) - set(held))
    if not seen:
        fail(f"--holdout {cfg.holdout} leaves no list of {len(rows)} to train on")

    reference, sharded = None, world > 1 and not cfg.lora_rank
    if part == "unet" and not sharded:                         # faster convolutions; FSDP2 wants contiguous weights
        model = model.to(memory_format=torch.channels_last)
    model.eval()                                               # eval: s is exactly 0 where policy = reference
    if cfg.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if cfg.lora_rank:                                          # small enough to be whole on each process
        trained, anchors = add_lora(model.to(device), cfg.lora_rank, dtype, cfg.ref_refresh > 0)
    else:
        reference = copy.deepcopy(model).requires_grad_(False)
        model.requires_grad_(True)                             # fp32 weights, as loaded
        model, reference = (shard(m, dtype, device) if sharded else m.to(device) for m in (model, reference))
        trained, anchors = dict(model.named_parameters()), dict(reference.named_parameters()) if cfg.ref_refresh else {}
    average = {n: p.detach().clone() for n, p in trained.items()} if cfg.ema else {}
    parameters = list(trained.values())                        # a list: a generator would be used up by the optimiser
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    if checkpoint:
        dcp.load(training_state(trained, optimizer, anchors, average), checkpoint_id=checkpoint)        # in place
        print0(f"going on from {checkpoint}")
    if is_main:
        path = Path(cfg.out) / "log.jsonl"
        lines = path.read_text().splitlines() if checkpoint and path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line).get("step", -1) < start_step]
        head = json.dumps(dict(config=asdict(cfg), world=world, precision=str(dtype), lists=len(seen), held_out=len(held), **provenance(device)))
        write_atomic(path, "".join(line + "\n" for line in kept or [head]))
        if not checkpoint:                                     # half-written ones, or not wanted
            shutil.rmtree(Path(cfg.out) / "checkpoints", ignore_errors=True)
        log, board = open(path, "a"), None
        with suppress(ImportError):                            # where tensorboard is installed, it gets the same numbers
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(str(Path(cfg.out) / "tensorboard"))
    print0(f"{cfg.loss}: {len(seen)} lists of up to {K} images, {sum(p.numel() for p in parameters) / 1e6:.1f} M trained parameters, {world} process(es) "
           f"on {device}{', sharded' if sharded else ''}, {dtype}; {cfg.global_batch_size} lists a step = {world} x {-(-local_batch // micro)} x {micro}")

    files = {}

    def load_batch(lists):
        """[(position, list)] -> (x_t, t, target, cond) of all N images, mask (B, K), weights (B, K, K), u (B,)."""
        items = [read_cached(folder, n, files) for _, n in lists]
        k = [len(i["latents"]) for i in items]                                  # images of each list
        draws = [draw(cfg, position, n, tuple(i["latents"].shape)) for (position, n), i in zip(lists, items)]
        x = torch.cat([i["latents"] for i in items]).to(device, wide)             # (N, C, h, w), N = sum k
        noise = torch.cat([d[1] for d in draws]).to(device, wide)               # (N, C, h, w)
        u = torch.stack([d[0] for d in draws]).to(device)                       # (B,) one timestep a list
        cond = {c: torch.cat([i[c][None].repeat_interleave(n, 0) for i, n in zip(items, k)]).to(device) for c in items[0] if c != "latents"}
        if dtype == torch.float64:
            cond = {c: v.to(wide) for c, v in cond.items()}
        x_t, t, target = add_noise(scheduler, x, noise, u.repeat_interleave(torch.tensor(k, device=device)), cfg.timesteps)
        mask = torch.arange(K, device=device) < torch.tensor(k, device=device)[:, None]            # (B, K)
        w = torch.zeros(len(k), K, K, device=device)                            # (B, K, K)
        for b, (_, n) in enumerate(lists):
            w[b, :k[b], :k[b]] = weights[n]
        return (x_t, t, target, cond), mask, w, u

    def errors(network, images, part=slice(None)):
        """Denoising errors (n,) of some of a batch's images, fp32."""
        x_t, t, target, cond = images
        with autocast:
            prediction = predict(network, x_t[part], t[part], {c: v[part] for c, v in cond.items()})
        return denoising_error(prediction[None], target[None, part])[0]

    def padded(values, mask):                                                   # (N,) -> (B, K)
        return torch.zeros(mask.shape, device=device, dtype=values.dtype).masked_scatter(mask, values)

    def errors_in_parts(network, images, parts, mask):                          # -> (B, K), without gradient
        with torch.no_grad():
            return padded(torch.cat([errors(network, images, p) for p in parts])[:len(images[0])], mask)

    def reference_errors(images, parts, mask):
        with reference_of(model, reference, bool(anchors)) as network:
            return errors_in_parts(network, images, parts, mask)

    def in_parts(images, lists):
        """Slices of --images_per_forward images. Sharded processes must take equally many passes, also with shorter lists:
        passes beyond the last image look at the first one again, for nothing."""
        n, m = len(images[0]), cfg.images_per_forward or len(images[0])
        parts = [slice(i, min(i + m, n)) for i in range(0, n, m)]
        passes = -(-lists * K // m) if sharded and cfg.images_per_forward else len(parts)
        return parts + [slice(0, 1)] * (passes - len(parts))

    def gather(tensors):
        """Rows of every process, in the order of the lists."""
        if world == 1:
            return tensors
        whole = [[torch.empty_like(t) for _ in range(world)] for t in tensors]
        for rows, t in zip(whole, tensors):
            dist.all_gather(rows, t.contiguous())
        return [torch.cat(rows) for rows in whole]

    def lists_of(step):
        """[(position, list)] of this process: a fresh permutation an epoch, the same on every process."""
        positions = range(step * cfg.global_batch_size, (step + 1) * cfg.global_batch_size)
        order = {e: np.random.default_rng([cfg.seed, e]).permutation(seen) for e in {p // len(seen) for p in positions}}
        return [(p, int(order[p // len(seen)][p % len(seen)])) for p in positions][rank * local_batch:(rank + 1) * local_batch]

    def held_out_accuracy():
        """Implicit accuracy on the held-out lists, at noise and timesteps that stay the same; every process takes equally many."""
        share, results = [held[i % len(held)] for i in range(rank, -(-len(held) // world) * world, world)], []
        for begin in range(0, len(share), micro):
            images, mask, w, _ = load_batch([(2 ** 40, n) for n in share[begin:begin + micro]])
            w[[rank + world * i >= len(held) for i in range(begin, begin + len(w))]] = 0           # repeated: each list counts once
            parts = in_parts(images, len(mask))
            results.append((errors_in_parts(model, images, parts, mask), reference_errors(images, parts, mask), w, mask.float()))
        policy_err, ref_err, w, mask = gather([torch.cat(r) for r in zip(*results)])
        return list_loss(cfg, policy_err, ref_err, w, mask.bool())[1]["accuracy"].item()

    def record(row):
        """One line of log.jsonl, the progress bar, and a warning when the winner's error grows for long."""
        if peak:
            row.update(share_of_peak=row["tflops"] / peak, memory_gb=torch.cuda.max_memory_allocated() / 1e9)
        log.write(json.dumps({m: None if isinstance(v, float) and not np.isfinite(v) else v for m, v in row.items()}) + "\n")
        log.flush()
        for name, value in row.items() if board else ():
            if isinstance(value, float):
                board.add_scalar(name, value, row["step"])
        winners.append(row["best_s"])
        if row["step"] % 50 == 49 and np.mean(winners[-25:]) > max(0, np.mean(winners[-50:-25])):
            tqdm.write(f"step {row['step']}: the winner's error is above the reference and growing ({np.mean(winners[-25:]):+.1e}); "
                       "pictures may get worse although loss and accuracy improve: lower --lr or raise --beta")
        bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['accuracy']:.3f}", winner=f"{row['best_s']:+.1e}", loser=f"{row['worst_s']:+.1e}")

    # ---- model FLOPs of a list, from one image's forward: backward is twice that, or once where the weights are frozen
    image = load_batch([(0, seen[0])])[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        errors(model, image, slice(0, 1))
    tflop = (3 if cfg.lora_rank else 4) * K * counter.get_total_flops() / 1e12
    peak = matrix_rate(device) / 1e12 if device.type == "cuda" else None

    # ---- the training loop
    if cfg.sample_every and not start_step:
        with autocast:
            draw_samples(cfg, pipe, sampled, sample_kwargs, device, 0, is_main)
    winners, start, in_row, stop = [], time.time(), 0, []
    skipped = json.loads(kept[-1]).get("skipped", 0) if is_main and kept else 0
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    bar = tqdm(range(start_step, cfg.steps), desc="train", unit="step", disable=not is_main, initial=start_step, total=cfg.steps)
    for step in bar:
        if cfg.ref_refresh and step and step % cfg.ref_refresh == 0:            # BalancedDPO: ref <- theta
            refresh(trained, anchors)
        warmup, decay = min(1, (step + 1) / max(1, cfg.warmup_steps)), 1 - step / cfg.steps
        optimizer.param_groups[0]["lr"] = cfg.lr * warmup * decay

        mine, results = lists_of(step), []                                      # (policy_err, ref_err, weights, mask, u) of my lists
        for begin in range(0, local_batch, micro):
            images, mask, w, u = load_batch(mine[begin:begin + micro])
            parts = in_parts(images, len(mask))
            ref_err = reference_errors(images, parts, mask)                                        # (B, K), fp32
            if len(parts) == 1:
                policy_err = padded(errors(model, images), mask)                                   # (B, K), fp32
                loss, _ = list_loss(cfg, policy_err, ref_err, w, mask)          # (B,)
                (loss.sum() * scale).backward()
            else:                                               # the errors first, then dL / d error of each image for its own backward
                policy_err = errors_in_parts(model, images, parts, mask).requires_grad_()          # (B, K)
                loss, _ = list_loss(cfg, policy_err, ref_err, w, mask)          # (B,)
                slope = torch.autograd.grad(loss.sum() * scale, policy_err)[0][mask]               # (N,)
                for i, p in enumerate(parts):
                    again = i > 0 and p.start == 0              # a pass for nothing
                    (errors(model, images, p) * (0 * slope[p] if again else slope[p])).sum().backward()
            results.append((policy_err.detach(), ref_err, w, mask.float(), u))
        if world > 1 and not sharded:
            for p in parameters:
                dist.all_reduce(p.grad)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        grad_norm = grad_norm.full_tensor() if sharded else grad_norm
        if torch.isfinite(grad_norm):
            if step == 0 and not grad_norm > 0:
                fail("step 0: the gradient is zero; do the lists of this batch prefer anything? Raise --global_batch_size")
            optimizer.step()
            in_row = 0
            for name, p in average.items():
                p.lerp_(trained[name].detach(), 1 - cfg.ema)
        else:                                                                   # a step that would ruin the weights is not taken
            skipped, in_row = skipped + 1, in_row + 1
            if in_row == 3:
                fail(f"step {step}: the gradient was {grad_norm.item()} three times in a row; lower --lr or --beta, or try --precision fp32. "
                     "The last checkpoint is kept" + ("" if cfg.save_every else " if there is one: see --save_every"))
        optimizer.zero_grad(set_to_none=True)

        # metrics of the whole batch, computed once from everybody's errors
        policy_err, ref_err, w, mask, u = gather([torch.cat(r) for r in zip(*results)])
        unseen = {"held_out_accuracy": held_out_accuracy()} if held and (step + 1) % cfg.eval_every == 0 else {}   # by all processes
        if is_main:
            mask = mask.bool()
            loss, metrics = list_loss(cfg, policy_err, ref_err, w, mask)
            lists_per_s = (step + 1 - start_step) * cfg.global_batch_size / (time.time() - start)
            record({"step": step, "loss": loss.mean().item(), **{m: v.item() for m, v in metrics.items()},
                    "accuracy_by_time": accuracy_by_time(cfg, policy_err, ref_err, w, mask, u), "grad_norm": grad_norm.item(),
                    "lr": optimizer.param_groups[0]["lr"], "skipped": skipped, "lists_per_s": lists_per_s,
                    "tflops": lists_per_s * tflop / world, **unseen})           # of a device
        if cfg.sample_every and (step + 1) % cfg.sample_every == 0:
            with autocast:
                draw_samples(cfg, pipe, sampled, sample_kwargs, device, step + 1, is_main)
        told = torch.tensor(float(bool(stop)), device=device)
        if world > 1:
            dist.all_reduce(told)                                               # all stop if one is told to
        if told or (cfg.save_every and (step + 1) % cfg.save_every == 0):
            if is_main:
                os.fsync(log.fileno())
            save_checkpoint(cfg, training_state(trained, optimizer, anchors, average), step + 1, rank, world)
        if told:
            if is_main and board:
                board.close()
            fail(f"told to stop after step {step}; the same command goes on from there", 143)

    with torch.no_grad():
        for name, p in average.items():
            trained[name].copy_(p)
    # ---- save: the whole pipeline with the tuned denoiser, or the adapters, published by renames
    if sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        tuned = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_main:
        log.close()
        if board:
            board.close()
        out = Path(cfg.out) / "model"
        if cfg.lora_rank:
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft.utils import get_peft_model_state_dict
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name="default"))
            publish(out, lambda tmp: family.save_lora_weights(tmp, **{f"{part}_lora_layers": {n: p.cpu() for n, p in layers.items()}}))
        else:
            pipe, model = load_pipeline(cfg.model), model.to(torch.float32) if not sharded else model
            if sharded:
                getattr(pipe, part).load_state_dict(tuned)
            else:
                setattr(pipe, part, model.to("cpu").to(memory_format=torch.contiguous_format))
            save_pipeline(pipe, out)
        plot_curves(Path(cfg.out) / "log.jsonl", Path(cfg.out) / "curves.png")
        print(f"saved {out}; log.jsonl and curves.png beside it")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
