"""RankDPO, BalancedDPO, Diffusion-DRO and their baselines on ranked lists: one file, read it top to bottom.

    python rankdpo.py                                    # the toy world: toy/models/sdxl on outputs/synpic
    python rankdpo.py --loss dpo --beta 500              # another objective of the family
    python rankdpo.py --loss balanced --ref_refresh 50   # BalancedDPO: majority vote, reference refresh
    python rankdpo.py --loss dro --sampler_refresh 20    # Diffusion-DRO: experts against its own pictures
    torchrun --nproc_per_node 8 rankdpo.py --data synpic --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --resolution 1024 --beta 2500 --lr 2e-5 --steps 400 --global_batch_size 1024 --device_batch_size 1 \\
        --gradient_checkpointing true --save_every 20    # the paper's size; bash train.sh sdxl is the recipe
    python rankdpo.py ... --lora_rank 64 --images_per_forward 1      # adapters, one image at a time: one GPU
    python rankdpo.py --model random:sdxl --data random --steps 5    # time and memory at real size

Input is a folder that synpic.py wrote (metadata.jsonl and images), output a pipeline folder that diffusers'
`from_pretrained` loads (with --lora_rank: a folder for `pipe.load_lora_weights`), log.jsonl, curves.png and,
with --sample_every, samples.png. A run that was killed goes on from its newest checkpoint when the same
command is given again. Model families differ in pipelines.py; losses.py holds losses and the scale of beta.

Where this departs from the papers, or they say nothing:
  RankDPO (arXiv 2410.18013) gives no beta, rate, optimiser or schedule
  - one noise is shared by the k images of a list, as public DPO trainers share it over a pair;
    Algorithm 2 draws one each: --noise independent
  - rectified flow has logit-normal timesteps, as SD3 was trained; Algorithm 2: --timesteps uniform
  - errors are means over C, H, W, so beta is ~65,000 times the beta of a summed SDXL error
  - AdamW with a linear decay to zero: a constant rate ruins small models while loss and accuracy look fine
  - weighted fine-tuning (Table 5) weighs by the score itself, score / k; one below 0 weighs 0
  - --rank_by model takes the rank in Eq. 6 from the model (LambdaLoss); where s ties, the labels decide
  BalancedDPO (2503.12575)
  - its printed p_theta / p_theta is read as p_theta / p_ref; an even vote has no gradient: --ties literal
  - Eq. 10 has unknown weights: equal ones; lists of any length, where the paper has pairs
  Diffusion-DRO (2510.18353)
  - its sampler is a copy of the policy every --sampler_refresh steps; its public defaults copy at each step,
    where the negatives' gradient is exactly zero
  - rectified flow: the same solver at alpha = 1 - sigma, the same twenty levels before the scheduler's shift
  - a dropped caption is what guidance leads away from, of SDXL zeros; the same AdamW and decay as above
  in none of them: --label_smoothing, --sft_weight, --caption_dropout of the pairwise losses, --ema
The curve is the same on 1 and on N processes, for any --device_batch_size and --images_per_forward: noise and
timestep depend on (seed, step, list) alone. One process runs plain, several shard what is trained (FSDP2).
"""

import copy
import hashlib
import json
import math
import os
import signal
import time
import warnings
from collections import namedtuple
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from tqdm import tqdm

import common
import losses
import pipelines
from common import HERE, fail, option, process_rank

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves for itself: on purpose

VOTES = ("balanced", "direct", "random_scorer")  # they look at scores, at no phi
PAIRWISE = ("rankdpo", "dpo", "gain", *VOTES)
LOSSES = (*PAIRWISE, "sft", "weighted", "dro")
STORED = ("given", "reversed")  # labels that need no scores: the phi that is there
UNSEEN = 2**40  # the position of held-out lists: no step has it
SUITS = {  # (--beta, --lr, --lr of adapters) where they are not given, by the scale of the model
    "toy": (100.0, 2e-4, 2e-4),
    "noise": (2500.0, 2e-5, 1e-4),  # of public DPO trainers of SDXL at 1024 px, with batches of 1024 and 2048
    "flow": (50.0, 2e-5, 1e-4),  # public SD3 trainers' 100 has the factor 1/2
}


@dataclass
class Method:
    """What a run is: with another value of one of these it is another run."""

    # data
    data: str = option("outputs/synpic", "folder that synpic.py wrote, or random")
    model: str = option(
        f"{HERE}/toy/models/sdxl", "what to tune: folder, hub id, base+adapters or random:sdxl"
    )
    resolution: int = option(0, "resize and crop images to this side in pixels; 0 = as they are", at_least=0)
    label: str = option(
        "given", f"phi as stored, reversed, or from stored scores: {', '.join(losses.LABELS)}"
    )
    label_rewards: tuple = option((), "which stored scores --label and --loss balanced count (default: all)")
    holdout: float = option(0.0, "share of the lists kept for accuracy on unseen ones", at_least=0, below=1)
    seed: int = option(0, "order of the lists, timesteps, noise", at_least=0)
    # objective
    loss: str = option("rankdpo", "the objective; losses.py has the table", LOSSES)
    beta: float = option(
        None, "for mean squared errors without a half (default: what suits the model)", above=0
    )
    rank_by: str = option(
        "labels", "whose ranks weigh pairs in Eq. 6; model: LambdaLoss", ("labels", "model")
    )
    ties: str = option("drop", "an even vote of --loss balanced", ("drop", "literal", "random"))
    weight_by: str = option("hpsv2.1", "the reward whose scores weigh the images of --loss weighted")
    label_smoothing: float = option(0.0, "share of wrong labels (conservative DPO)", at_least=0, below=0.5)
    sft_weight: float = option(0.0, "add this times the error of each list's best image", at_least=0)
    loser_weight: float = option(1.0, "scales the gradient through the loser of a pair", at_least=0)
    ref_refresh: int = option(
        0, "steps between copies of the policy into the reference; 0 = never", at_least=0
    )
    noise: str = option("shared", "one a list, or one an image (Algorithm 2)", ("shared", "independent"))
    timesteps: str = option(
        "logit_normal", "how rectified flow draws its noise level", ("logit_normal", "uniform")
    )
    experts: int = option(500, "--loss dro: best images of --data, against the policy's own", above=0)
    expert_by: str = option("phi", "--loss dro: what experts are best by, phi or a reward")
    margin: float = option(0.001, "--loss dro: margin of the hinge", above=0)
    sampler_steps: int = option(20, "--loss dro: steps of the sampling path, a divisor of 1000", above=1)
    sampler_refresh: int = option(
        20, "--loss dro: steps between copies of the policy into its sampler", above=0
    )
    caption_dropout: float = option(
        None, "share of lists without caption (default: 0, .2 for dro)", at_least=0, below=1
    )
    # optimiser
    lr: float = option(None, "peak learning rate of AdamW (default: what suits the model)", above=0)
    schedule: str = option(
        "linear", "of the rate after the warm-up: decay to 0, or constant", ("linear", "constant")
    )
    steps: int = option(600, "optimiser steps", above=0)
    warmup_steps: int = option(10, "steps of linear warm-up", at_least=0)
    global_batch_size: int = option(32, "lists a step, over all processes", above=0)
    weight_decay: float = option(0.01, "AdamW's", at_least=0)
    max_grad_norm: float = option(1.0, "gradient clipping; 0 = none", at_least=0)
    adam_8bit: bool = option(False, "AdamW's moments in 8 bits: bitsandbytes, for one process or adapters")
    ema: float = option(0.0, "decay of an average of the weights, which is then saved", at_least=0, below=1)
    lora_rank: int = option(0, "train adapters of this rank; 0 = all weights", at_least=0)
    precision: str = option(
        "auto", "of the forward pass; fp64: of all else, too", ("auto", "fp32", "bf16", "fp64")
    )


@dataclass
class Config(Method):
    """How it is computed and recorded: this may change between the parts of one run."""

    # memory
    device: str = option("auto", "cuda, mps or cpu; meta counts FLOPs and memory, and ends")
    # the fastest that fits a GPU is taken where these four are not given
    device_batch_size: int = option(None, "lists a forward pass on one device; accumulation follows", above=0)
    images_per_forward: int = option(None, "images a pass, where memory is short; 0 = all", at_least=0)
    gradient_checkpointing: bool = option(None, "recompute activations in the backward pass")
    keep_gathered: bool = option(None, "sharded: weights are gathered, gradients reduced once a step")
    compile: bool = option(False, "compile the repeated blocks")
    # record
    out: str = option("outputs/rankdpo", "where the tuned pipeline, log.jsonl and curves.png go")
    eval_every: int = option(50, "steps between measurements on the held-out lists", above=0)
    sample_every: int = option(0, "steps between rows of pictures in samples.png; 0 = never", at_least=0)
    sample_prompts: int = option(8, "prompts in samples.png", above=0)
    sample_steps: int = option(None, "sampling steps of samples.png (default: what suits the model)", above=0)
    sample_guidance: float = option(
        None, "guidance scale of samples.png (default: what suits the model)", at_least=0
    )
    export_every: int = option(
        0, "steps between models beside the last, OUT/model-000200, ...; 0 = none", at_least=0
    )
    save_every: int = option(0, "steps between checkpoints; 0 = only at a SIGTERM", at_least=0)
    keep: int = option(1, "checkpoints to keep", above=0)
    resume: bool = option(True, "go on from the newest checkpoint in --out; false starts again")


# ----------------------------------------------------------------------------- what does not fit together


def check_options(cfg):
    """What is wrong whatever the data holds."""
    world = process_rank()[1]
    if cfg.device == "meta" and cfg.data != "random":
        fail("--device meta: counts and reads no lists; give --data random, with --model as it is")
    if cfg.global_batch_size % world:
        fail(f"--global_batch_size {cfg.global_batch_size} does not divide by {world} processes")
    common.check_label(cfg.label, (*STORED, *losses.LABELS))
    if cfg.loss in VOTES and cfg.label in ("phi", "sum", "normalized_sum", "majority"):
        fail(f"--loss {cfg.loss} looks at the scores, at no phi: take --label {cfg.label} with another loss")
    looks = not cfg.label.startswith(("single:", "random")) and (cfg.label not in STORED or cfg.loss in VOTES)
    if cfg.label_rewards and not looks:
        fail(f"--label_rewards: --label {cfg.label} does not look at them; name --label phi, sum or majority")
    if cfg.label == "reversed" and cfg.loss == "weighted":
        fail("--label reversed: turns scores negative, and those cannot weigh an error; take another --loss")
    if cfg.rank_by == "model" and cfg.loss != "rankdpo":
        fail(f"--rank_by model is of --loss rankdpo; {cfg.loss} has no rank in its weights")
    if cfg.label_smoothing and cfg.loss not in PAIRWISE:
        fail(f"--label_smoothing needs pairs: --loss {', '.join(PAIRWISE)}")
    if cfg.loss == "dro" and cfg.ref_refresh:
        fail("--ref_refresh: Diffusion-DRO's reference stays the base; --sampler_refresh is its own")
    if cfg.loss == "dro" and 1000 % cfg.sampler_steps:
        fail(f"--sampler_steps {cfg.sampler_steps}: must divide 1000, so that every timestep is on a path")


def check_scores(cfg, rows):
    """The scores that --loss looks at are there."""
    names = {frozenset(row["scores"]) for row in rows}
    if cfg.loss in VOTES and (len(names) > 1 or not rows[0]["scores"]):
        wanted = "needs the scores of every reward for every list"
        fail(f"--loss {cfg.loss} {wanted}: run synpic.py's score stage")
    if cfg.loss == "weighted":
        there = ", ".join(sorted(frozenset.intersection(*names))) or "none"
        if lacking := [n for n, row in enumerate(rows, 1) if cfg.weight_by not in row["scores"]]:
            missing = f"{cfg.data}/metadata.jsonl, list {lacking[0]}: no scores of {cfg.weight_by}"
            fail(f"{missing}; name another reward with --weight_by (every list has {there})")
        unusable = np.mean([x <= 0 for row in rows for x in row["scores"][cfg.weight_by]])
        if unusable >= 0.5:
            share = f"{unusable:.0%} of the scores are not positive and cannot weigh an error"
            fail(f"--weight_by {cfg.weight_by}: {share}; name another reward (there are {there})")


# ----------------------------------------------------------------------------- data: ranked lists


def read_lists(cfg):
    """Rows of metadata.jsonl with the phi that --label asks for, and the scores that count."""
    if cfg.data == "random":
        phi = [1.0, 2 / 3, 1 / 3, 0.0]
        return [{"prompt": "", "phi": phi, "scores": {"random": phi}}] * cfg.global_batch_size
    stored = cfg.label in STORED
    rows = common.read_metadata(cfg.data, lists=True, labelled=stored)
    if cfg.label_rewards or not stored:
        names, rewards = common.stored_rewards(cfg.data, rows, cfg.label, cfg.label_rewards)
        rows = [dict(row, scores={name: row["scores"][name] for name in names}) for row in rows]
    if not stored:
        every_phi = losses.preference_labels(cfg.label, rewards, cfg.seed)
        rows = [dict(row, phi=phi.tolist()) for row, phi in zip(rows, every_phi)]
    return [control(row, cfg.label) for row in rows]


def control(row, label):
    """The row, with all that a loss may look at turned around or random if the label is: it must not help."""
    if label == "reversed":
        scores = {name: [-x for x in values] for name, values in row["scores"].items()}
        return dict(row, phi=[1 - p for p in row["phi"]], scores=scores)
    return dict(row, scores={"random": row["phi"]}) if label == "random" else row


def list_weights(cfg, row, n):
    """What the labels of list n mean to --loss: weights of its pairs (K, K), for random_scorer those of each
    reward (R, K, K), or weights of its images (K,)."""
    phi = torch.tensor([row["phi"]])  # (1, K)
    if cfg.loss == "rankdpo":
        return losses.dcg_weights(phi)[0]
    if cfg.loss in ("dpo", "dro"):
        return losses.dpo_weights(phi)[0]
    if cfg.loss == "gain":
        return losses.gain_weights(phi)[0]
    if cfg.loss == "sft":
        return losses.sft_weights(phi)[0]
    if cfg.loss == "weighted":
        return losses.score_weights(torch.tensor([row["scores"][cfg.weight_by]]))[0]
    rewards = torch.tensor(list(row["scores"].values()))  # (R, K)
    if cfg.loss == "direct":
        return losses.direct_weights(rewards.T[None])[0]
    if cfg.loss == "random_scorer":
        return losses.dpo_weights(rewards)
    coin = torch.Generator().manual_seed(cfg.seed * 1_000_003 + n)
    return losses.vote_weights(losses.majority_vote(rewards.T[None], cfg.ties, coin))[0]


# of L lists, filled up to the K of the longest: weights by 0, phi by -1, the mask by False
Labels = namedtuple("Labels", "weights phi mask")


def stack_labels(cfg, rows):
    """Labels of L lists: weights (L, [R,] K, K) or (L, K), phi (L, K), mask (L, K) True for real images."""
    weights = [list_weights(cfg, row, n) for n, row in enumerate(rows)]
    if not any(w.any() for w in weights):
        fail(f"{cfg.data}/metadata.jsonl: no list prefers any image to another, so there is nothing to learn")
    K = max(w.shape[-1] for w in weights)
    pad = lambda w, value=0: torch.nn.functional.pad(w, (0, K - w.shape[-1]) * min(w.dim(), 2), value=value)
    phi = torch.stack([pad(torch.tensor(row["phi"]), -1) for row in rows])
    return Labels(torch.stack([pad(w) for w in weights]), phi, phi >= 0)


def expert_rows(cfg, rows):
    """--loss dro: a row for each of the best images of all lists. Its phi (1, 0) is the expert's and that of
    a negative, which the policy draws while it trains."""
    if cfg.data == "random":
        return [dict(row, phi=[1.0, 0.0]) for row in rows]
    by = cfg.expert_by
    if by != "phi" and (lacking := [n for n, row in enumerate(rows, 1) if by not in row["scores"]]):
        fail(
            f"--expert_by {by}: {cfg.data}/metadata.jsonl, list {lacking[0]} has no such scores; phi is there"
        )
    images = []
    for row in rows:
        for name, value in zip(row["file_names"], row["phi"] if by == "phi" else row["scores"][by]):
            images.append((value, dict(row, file_names=[name], phi=[1.0, 0.0], scores={})))
    best = sorted(images, key=lambda image: -image[0])[: cfg.experts]  # stable: ties in the order of the file
    if process_rank()[0] == 0:
        print(f"experts: {len(best)} of {len(images)} images, {by} {best[0][0]:g} to {best[-1][0]:g}")
    return [row for _, row in best]


def even_votes(cfg, rows):
    """--loss balanced: share of the pairs of all lists for whose images equally many rewards vote."""
    if cfg.loss != "balanced":
        return None
    votes = [losses.majority_vote(torch.tensor(list(row["scores"].values())).T) for row in rows]  # (K, K)
    even = sum((vote == 0).sum().item() - len(vote) for vote in votes)  # each pair twice; not the diagonal
    return even / sum(len(vote) * (len(vote) - 1) for vote in votes)


def load_base(cfg, device, todo):
    """The pipeline of --model, with no weights but what this process uses, and its family."""
    encoders = bool(todo or cfg.sample_every or (cfg.caption_dropout and cfg.data != "random"))
    loaded_on = device if cfg.model.startswith("random:") else "cpu"
    denoiser = process_rank()[0] == 0
    pipe = pipelines.load_pipeline(cfg.model, loaded_on, denoiser=denoiser, encoders=encoders)
    common.wait_for_all(hours=True)  # the first process may have fetched them from the hub
    family = pipelines.family_of(pipe, trainable=True)
    if encoders and (missing := [name for name in family.encoders if getattr(pipe, name) is None]):
        fail(f"{cfg.model}: has no {', '.join(missing)}, which lists, samples or dropped captions need")
    return pipe, family


def complete(cfg, pipe):
    """The options with what suits the model where they were not given."""
    scale = pipelines.scale_of(pipe)
    beta, lr, lr_adapters = SUITS[scale]
    suits = dict(beta=beta, lr=lr_adapters if cfg.lora_rank else lr)
    suits.update({f"sample_{name}": value for name, value in pipelines.family_of(pipe).suits(pipe).items()})
    return common.fill_in(cfg, suits, f"{scale} model")


def split_lists(cfg, rows):
    """(seen, held): indices of the lists that are trained on, and of those kept to measure accuracy on. No
    prompt is in both."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    shuffled = np.random.default_rng([cfg.seed, 2**32 - 1]).permutation(len(prompts))
    kept = {prompts[i] for i in shuffled[: round(cfg.holdout * len(prompts))]}
    if len(kept) == len(prompts) or (cfg.holdout and not kept):
        none = f"leaves no list to {'train on' if kept else 'measure'}"
        fail(f"--holdout {cfg.holdout} of {len(prompts)} prompts {none}")
    held = [n for n, row in enumerate(rows) if row["prompt"] in kept]
    return [n for n, row in enumerate(rows) if row["prompt"] not in kept], held


def cache_folder(cfg, rows, dtype):
    """data/.cache/HASH, of all that goes into it: other images, prompts or models make another one."""
    data, local = Path(cfg.data), [Path(part) for part in cfg.model.split("+")]  # base, adapters
    stat = lambda p: [str(p), p.stat().st_size, p.stat().st_mtime_ns]
    images = [[row["prompt"], [stat(data / f) for f in row["file_names"]]] for row in rows]
    patterns = ("vae/*", "text_encoder*/*", "tokenizer*/*", "*.safetensors")
    encoders = [stat(p) for part in local for n in patterns for p in sorted(part.glob(n))]
    key = json.dumps([images, cfg.model, encoders, cfg.resolution, str(dtype)])
    return data / ".cache" / hashlib.sha256(key.encode()).hexdigest()[:16]


def list_pixels(cfg, row, size):
    """(k, 3, H, W) of a list's images, each of `size` (3, H, W)."""
    images = []
    for name in row["file_names"]:
        images.append(common.read_pixels(f"{cfg.data}/{name}", cfg.resolution))
        if images[-1].shape != size:
            differs = f"{images[-1].shape[2]} x {images[-1].shape[1]} pixels, not {size[2]} x {size[1]}"
            fail(f"{cfg.data}/{name}: {differs} as the first image; give --resolution")
    return torch.stack(images)


CHUNK = 16  # lists whose prompts are encoded together: by their place, so whoever does it gets the same


def lists_to_encode(cfg, rows, dtype):
    """(file_of, todo): the file of list n in the cache, and the lists that are not there, of the chunks that
    fall to this process."""
    if cfg.data == "random":
        return None, []
    (rank, world), folder = process_rank(), cache_folder(cfg, rows, dtype)
    file_of = lambda n: folder / f"{n:07d}.safetensors"
    mine = [n for n in range(len(rows)) if n // CHUNK % world == rank]
    return file_of, [n for n in mine if not common.is_whole_safetensors(file_of(n))]


@torch.no_grad()
def encode_lists(cfg, rows, pipe, device, dtype, file_of, todo):
    """Latents (k, C, h, w) of the lists `todo` and what the denoiser is conditioned on, a file a list, which
    all processes read. Threads decode the next lists' images meanwhile."""
    if not todo:
        return
    family, first = pipelines.family_of(pipe), f"{cfg.data}/{rows[0]['file_names'][0]}"
    size, factor = common.read_pixels(first, cfg.resolution).shape, pipe.vae_scale_factor * family.patch
    if any(side % factor for side in size[1:]):
        sides = f"{size[2]} x {size[1]} pixels, but sides must be multiples of {factor}"
        fail(f"{first}: {sides}; give another --resolution")
    pipe.vae.to(device)  # fp32: SDXL's VAE overflows in fp16
    for encoder in pipelines.text_encoders_of(pipe).values():
        encoder.to(device, dtype)
    images, chunk = common.ahead(lambda n: list_pixels(cfg, rows[n], size), todo, depth=8, threads=4), None
    for n in tqdm(todo, desc="encode", unit="list", disable=process_rank()[0] > 0):
        if n // CHUNK != chunk:
            chunk = n // CHUNK
            prompts = [row["prompt"] for row in rows[chunk * CHUNK : (chunk + 1) * CHUNK]]
            cond = family.encode_prompts(pipe, prompts, size[1:])
        tensors = {"latents": family.encode_images(pipe.vae, next(images)).float()}
        tensors.update({name: c[n % CHUNK] for name, c in cond.items()})
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        if not all(t.isfinite().all() for t in tensors.values()):
            fail(f"{cfg.model}: encodes list {n}, {rows[n]['prompt']!r}, to numbers that are not finite")
        # several runs may write the same file; one torn by a power cut is noticed when it is read
        common.publish(file_of(n), partial(save_file, tensors), sync=False, unique=True)


def dropped_caption(cfg, pipe, item, device, dtype):
    """What a list whose caption is dropped is conditioned on, {name: tensor}."""
    if not cfg.caption_dropout:
        return {}
    if cfg.data == "random":
        return {name: torch.zeros_like(t) for name, t in item.items() if name != "latents"}
    size = [side * pipe.vae_scale_factor for side in item["latents"].shape[-2:]]
    return pipelines.encode_nothing(pipe, size, device, dtype)


def random_lists(shapes, k):
    """read(n) of --data random: lists of k, to measure with."""

    def read(n):
        g = torch.Generator().manual_seed(n)
        tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        return {**tensors, "latents": torch.randn(k, *shapes["latents"], generator=g)}

    return read


# ----------------------------------------------------------------------------- data: batches


def generator_of(cfg, position, n, *use):
    """The random numbers of list n at a position of the run, which counts lists over all steps: from (seed,
    position, list) alone, the same for any number of processes. Each use has its own."""
    state = int(np.random.SeedSequence([cfg.seed, position, n, *use]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state % 2**63)


def draw(cfg, position, n, shape):
    """(u, noise) of a list: u () uniform in [0, 1), noise (k, C, h, w)."""
    g = generator_of(cfg, position, n)
    u = torch.rand((), generator=g)
    noise = torch.randn(shape if cfg.noise == "independent" else (1,) + shape[1:], generator=g)
    return u, noise.expand(shape)


# x_t, t, target, cond: a row an image, (N = B K, ...); mask, weights, phi, u, time: a row a list, (B, ...)
Batch = namedtuple("Batch", "x_t t target cond mask weights phi u time")


def load_batch(cfg, read, scheduler, labels, nothing, device, dtype, lists):
    """[(position, list)] -> a Batch. A list that is shorter than K is filled up with its first image, which
    the mask keeps out of the loss: all batches have one shape, every process takes equally many passes. Once
    a list, a caption is dropped (for `nothing`; both networks see the same) and a scorer drawn."""
    index, K = [n for _, n in lists], labels.mask.shape[1]
    wide = torch.promote_types(dtype, torch.float32)  # of noise, errors and losses
    items = [read(n) for n in index]
    shapes = [tuple(item["latents"].shape) for item in items]
    draws = [draw(cfg, position, n, shape) for (position, n), shape in zip(lists, shapes)]
    coins = [torch.rand(2, generator=generator_of(cfg, position, n, 1)).tolist() for position, n in lists]
    for item, (position, _), (coin, _) in zip(items, lists, coins):
        if position < UNSEEN and coin < (cfg.caption_dropout or 0):
            item.update(nothing)
    fill = lambda t: torch.cat([t, t[:1].expand(K - len(t), *t.shape[1:])])
    move = partial(common.to_device, device=device)
    x = move(torch.cat([fill(item["latents"]) for item in items])).to(wide)  # (N, C, h, w)
    noise = move(torch.cat([fill(noise) for _, noise in draws])).to(wide)  # (N, C, h, w)
    u = move(torch.stack([u for u, _ in draws]))  # (B,), one timestep a list
    if cfg.loss == "dro":  # one that a sampling path passes
        u = ((1000 * u).floor() + 0.5) / 1000
    names = [name for name in items[0] if name != "latents"]
    cond = {name: move(torch.stack([item[name] for item in items])) for name in names}
    cond = {name: c.repeat_interleave(K, 0) for name, c in cond.items()}  # (N, ...)
    spread = "uniform" if cfg.loss == "dro" else cfg.timesteps
    x_t, t, target = pipelines.add_noise(scheduler, x, noise, u.repeat_interleave(K), spread)
    weights, phi, mask = (values[index] for values in labels)
    if cfg.loss == "random_scorer":  # (B, R, K, K)
        weights = torch.stack([w[int(coin * len(w))] for w, (_, coin) in zip(weights, coins)])
    time = t[::K] / scheduler.config.num_train_timesteps  # (B,); of rectified flow: sigma
    return Batch(x_t, t, target, cond, mask.to(device), weights.to(device), phi.to(device), u, time)


def lists_of_step(cfg, step, seen):
    """[(position, list)] of this process: a fresh permutation an epoch of the lists that are trained on."""
    rank, world = process_rank()
    local = cfg.global_batch_size // world
    first = step * cfg.global_batch_size + rank * local
    positions = range(first, first + local)
    epochs = {p // len(seen) for p in positions}
    order = {e: np.random.default_rng([cfg.seed, e]).permutation(seen) for e in epochs}
    return [(p, int(order[p // len(seen)][p % len(seen)])) for p in positions]


def micro_batches(cfg, step, seen):
    """The same in pieces: lists of a pass each."""
    mine, size = lists_of_step(cfg, step, seen), cfg.device_batch_size
    return [mine[i : i + size] for i in range(0, len(mine), size)]


# ----------------------------------------------------------------------------- objective


def predict_some(family, autocast, network, x_t, t, cond, images):
    """What a network predicts of some images (a slice)."""
    with autocast:
        return family.predict(network, x_t[images], t[images], {name: c[images] for name, c in cond.items()})


def image_errors(predict, network, batch, images):
    """Errors (n,), fp32, of some images (a slice) of a batch; the network may be policy or reference."""
    prediction = predict(network, batch.x_t, batch.t, batch.cond, images)
    return losses.denoising_error(prediction[None], batch.target[None, images])[0]


def batch_errors(errors, network, batch, parts):
    """(B, K) errors of all images of a batch, one part (a slice) after the other."""
    return torch.cat([errors(network, batch, images) for images in parts]).view(batch.mask.shape)


def parts_of(x, images_per_forward):
    """Slices of x (N, ...), as many images as memory holds."""
    n = len(x)
    m = images_per_forward or n
    return [slice(i, min(i + m, n)) for i in range(0, n, m)]


def list_loss(cfg, policy_err, ref_err, batch):
    """Errors (B, K) -> loss (B,), and rows (B, M) of what METRICS names."""
    weights, phi, mask = batch.weights, batch.phi, batch.mask
    if cfg.loss in ("sft", "weighted"):
        loss, metrics = losses.finetuning_loss(policy_err, ref_err, weights, mask)
    elif cfg.loss == "dro":  # each list is an expert and a negative
        errs = (err[:, i] for i in (0, 1) for err in (policy_err, ref_err))
        loss, metrics = losses.dro_loss(*errs, cfg.margin)
    else:
        if cfg.rank_by == "model":  # padding comes last
            s = (policy_err.detach() - ref_err).nan_to_num().masked_fill(~mask, float("inf"))
            weights = losses.dcg_weights(phi, losses.model_rank(s, phi))
        weights = losses.smooth_weights(weights, cfg.label_smoothing)
        loss, metrics = losses.preference_loss(policy_err, ref_err, weights, cfg.beta, mask, cfg.loser_weight)
    if cfg.sft_weight:  # the mean over the images that are best by phi
        best = ((phi == phi.amax(1, keepdim=True)) & mask).to(loss)  # (B, K)
        loss = loss + cfg.sft_weight * (best * policy_err).sum(1) / best.sum(1)
    metrics.update(loss=loss.detach(), time=batch.time.to(loss.dtype))
    return loss, torch.stack([metrics[name] for name in METRICS], 1)


METRICS = ("loss", "accuracy", "best_s", "worst_s", "weight", "unweighted", "time")


def summarise(rows):
    """Rows (lists, M) -> numbers for the log: means over the lists that have a value, every list counting
    once, and the accuracy in ten bins of t / 1000, or sigma of rectified flow: from little noise to much."""
    mean = dict(zip(METRICS, rows.nanmean(0).tolist()))
    accuracy, time = rows[:, METRICS.index("accuracy")], rows[:, METRICS.index("time")]
    bins = (time * 10).long().clamp(0, 9)
    del mean["time"]
    return {**mean, "accuracy_by_time": [accuracy[bins == i].nanmean().item() for i in range(10)]}


def accumulate_gradient(cfg, errors, policy, engine, scale, batch, last=True, images_kept=slice(None)):
    """Adds to .grad that of `scale` times the sum of a batch's losses; returns rows (B, M) of metrics.
    `last`: of the step. `images_kept`: which of the K images' part of it."""
    parts = parts_of(batch.x_t, cfg.images_per_forward)

    # ---- errors, (B, K): a single pass keeps its graph, several are computed once more below
    with torch.no_grad(), reference_network(policy, *engine) as network:
        ref_err = batch_errors(errors, network, batch, parts)
    with torch.set_grad_enabled(len(parts) == 1):
        err = batch_errors(errors, policy, batch, parts)

    # ---- loss and gradient, by the chain rule in two steps: dL / d error of every image from the errors
    # alone; then each part's forward pass sends its own back, so that a list takes the memory of one part
    policy_err = err.detach().requires_grad_()
    loss, metrics = list_loss(cfg, policy_err, ref_err, batch)  # (B,), (B, M)
    slope = torch.zeros_like(policy_err)
    slope[:, images_kept] = torch.autograd.grad(loss.sum() * scale, policy_err)[0][:, images_kept]  # (B, K)
    for images in parts:
        with_graph = err.flatten() if len(parts) == 1 else errors(policy, batch, images)
        if cfg.keep_gathered:  # gradients stay whole on each process until the step's last
            policy.set_requires_gradient_sync(last and images is parts[-1])
        with_graph.backward(slope.flatten()[images])
    return metrics


def held_out_passes(cfg, held):
    """[(position, list)] of a pass each of this process, at noise and timesteps that stay the same, and which
    of them count: every process takes equally many, so a few lists are taken twice."""
    (rank, world), size = process_rank(), cfg.device_batch_size
    share = range(rank, -(-len(held) // world) * world, world)
    for begin in range(0, len(share), size):
        some = share[begin : begin + size]
        yield [(UNSEEN, held[i % len(held)]) for i in some], [i < len(held) for i in some]


@torch.no_grad()
def base_errors(cfg, held, load, errors, policy, engine):
    """[(B, K)] of the held-out passes under the base: the reference, before its first refresh. [] where it is
    never refreshed and stays the base."""
    if not cfg.ref_refresh:
        return []
    with reference_network(policy, *engine) as network:
        batches = (load(lists) for lists, _ in held_out_passes(cfg, held))
        return [batch_errors(errors, network, b, parts_of(b.x_t, cfg.images_per_forward)) for b in batches]


@torch.no_grad()
def measure_held_out(cfg, step, held, load, errors, policy, engine, base_err):
    """On the held-out lists, every --eval_every steps: implicit accuracy against the reference, and s of the
    winner and of the loser against the base, which is what pictures are compared with."""
    if not held or not due(cfg.eval_every, step):
        return {}
    rows, ends = [], slice(METRICS.index("best_s"), METRICS.index("worst_s") + 1)
    for n, (lists, counts) in enumerate(held_out_passes(cfg, held)):
        batch = load(lists)
        parts = parts_of(batch.x_t, cfg.images_per_forward)
        with reference_network(policy, *engine) as network:
            ref_err = batch_errors(errors, network, batch, parts)
        policy_err = batch_errors(errors, policy, batch, parts)
        _, metrics = list_loss(cfg, policy_err, ref_err, batch)
        if base_err:
            metrics[:, ends] = list_loss(cfg, policy_err, base_err[n], batch)[1][:, ends]
        metrics[[not count for count in counts]] = float("nan")
        rows.append(metrics)
    found = summarise(common.gather(torch.cat(rows)))
    return {f"held_out_{name}": found[name] for name in ("accuracy", "best_s", "worst_s")}


# ----------------------------------------------------------------------------- Diffusion-DRO's negatives


@torch.no_grad()
def sampling_path(cfg, scheduler, denoise, x, u):
    """Pure noise x (B, C, h, w) -> the states that DPM-Solver++ (2M) passes at the timesteps 1000 u (B,).

    An image's path goes down from the highest of its levels t, t + 1000 / steps, ... below 1000, without
    guidance. denoise(x, t): what the sampler predicts. On rectified flow alpha is 1 - sigma, and the solver's
    first step Euler's."""
    stride, shape, before = 1000 // cfg.sampler_steps, (-1, 1, 1, 1), None
    t = (1000 * u).long()  # (B,)
    place = t // stride  # of t on its path, 0 = the last step
    lowest = place.min()
    if process_rank()[1] > 1:  # as many passes on each process: the sampler may be sharded
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
    for i in range(cfg.sampler_steps - 1, int(lowest), -1):
        levels = [(t % stride + stride * k + 0.5) / 1000 for k in (i, i - 1)]
        (a, s, time), (a_next, s_next, _) = (pipelines.noise_levels(scheduler, u, "uniform") for u in levels)
        a, s, a_next, s_next = (level.view(shape) for level in (a, s, a_next, s_next))  # (B, 1, 1, 1)
        clean = pipelines.clean_latents(scheduler, x, denoise(x, time), a, s)
        h = (a_next / s_next).log() - (a / s).log()  # lambda = log(alpha / sigma)
        slope = 0 if before is None else (clean - before[0]) * h / before[1] / 2
        x_next = s_next / s * x - a_next * torch.expm1(-h) * (clean + slope)
        x = torch.where(place.view(shape) < i, x_next, x)  # those at their t stay there
        before = clean, h
    return x


@torch.no_grad()
def add_negatives(cfg, scheduler, predict, policy, trained, sampler, batch, lists):
    """--loss dro: the second image of each list becomes a state on the sampling path of a copy of the policy,
    at the expert's timestep and caption; its target is what the copy predicts there, without gradient."""
    if cfg.loss != "dro":
        return batch
    shape, wide = batch.x_t.shape[1:], batch.x_t.dtype
    noise = [torch.randn(shape, generator=generator_of(cfg, position, n, 2)) for position, n in lists]

    def predicted(x, t, cond):
        parts = parts_of(x, cfg.images_per_forward)
        return torch.cat([predict(policy, x, t, cond, images) for images in parts]).to(wide)

    with exchanged(policy, trained, sampler):
        x_t = batch.x_t.clone()
        denoise = partial(predicted, cond={name: c[::2] for name, c in batch.cond.items()})
        x_t[1::2] = sampling_path(cfg, scheduler, denoise, torch.stack(noise).to(x_t), batch.u)
        target = batch.target.clone()
        # of the batch as the errors take it: they are exactly 0 where the copy is the policy
        target[1::2] = predicted(x_t, batch.t, batch.cond)[1::2]
    return batch._replace(x_t=x_t, target=target)


def term_norms(step, batches, accumulate, parameters):
    """Norms of the gradients of the experts' errors and of the negatives', over all lists of a step. This
    costs another step."""
    norms, batches = {}, list(batches)
    for image, name in enumerate(("expert", "negative")):
        for batch in batches:
            accumulate(batch=batch, images_kept=image)
        norms[f"{name}_grad_norm"] = clip_grad_norm(parameters, 0).item()
        for p in parameters:
            p.grad = None
    if norms["expert_grad_norm"] > norms["negative_grad_norm"] == 0 and process_rank()[0] == 0:
        problem = f"step {step}: the negatives' gradient is exactly zero, since their sampler is the policy"
        tqdm.write(f"{problem}; they only gate the hinge: raise --sampler_refresh")
    return norms


# ----------------------------------------------------------------------------- engine


def shard(model, dtype, device, keep_gathered):
    """FSDP2: every block that diffusers names as a unit, then the rest. Master weights and reductions are
    fp32, gathered weights `dtype`. Inputs stay fp32 until autocast: bf16 would round SDXL's time ids."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))  # --device, whatever else is there
    half = dtype if dtype == torch.bfloat16 else None
    precision = MixedPrecisionPolicy(half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
    for module in reversed(list(model.modules())):  # children before parents
        if module is model or type(module).__name__ in (model._no_split_modules or ()):
            # said for the root, too, which FSDP would leave gathered
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=not keep_gathered)
            module.set_reshard_after_backward(not keep_gathered)
    return model


def release(model):
    """FSDP: let go of gathered weights. They are stale where the shards that they came from change."""
    for module in model.modules() if model else ():
        if hasattr(module, "reshard"):
            module.reshard()


def build_engine(cfg, family, policy, device, dtype, sharded):
    """(policy, reference, trained, anchors): the network that is trained, the frozen one, and by name the
    parameters of both. With adapters there is no second network: anchors are values, reference is None."""
    policy.eval()  # so that s is exactly 0 where policy = reference
    if dtype == torch.float64 or cfg.lora_rank:  # what is trained is fp32, as loaded, or fp64
        policy.to(dtype)
    if cfg.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    reference, values = None, None
    if process_rank()[1] > 1:
        values = to_meta(policy)
    if not sharded:
        if values:
            receive(policy, values, device)
        policy.to(device)
        if device.type == "cuda":  # faster convolutions; FSDP2 wants contiguous weights
            policy.to(memory_format=torch.channels_last)
    if cfg.lora_rank:  # small enough to be whole on each process
        pipelines.add_adapters(policy, cfg.lora_rank, dtype)
    else:
        for name, p in policy.named_parameters():
            p.requires_grad_(not name.startswith(family.unused(policy)))
        reference = copy.deepcopy(policy).requires_grad_(False)  # if sharded, of the meta device: no memory
    for model in filter(None, (policy, reference) if cfg.compile else ()):
        for module in model.modules():  # diffusers names no repeated blocks of SD3
            if type(module).__name__ in (model._repeated_blocks or model._no_split_modules):
                module.compile()
    if sharded:
        shard(policy, dtype, device, cfg.keep_gathered)
        receive(policy, values, device)
        shard(reference, dtype, device, cfg.keep_gathered)
        receive(reference, values, device, like=policy)
    elif reference:
        in_compute_type(reference, dtype)
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    if reference is None:
        return policy, None, trained, {n: p.detach().clone() for n, p in trained.items()}
    return policy, reference, trained, dict(reference.named_parameters())


def in_compute_type(model, dtype):
    """A frozen model's weights that autocast would round to bf16 at every pass: rounded once. Norms compute
    in fp32 and stay, so the model predicts what it did."""
    for module in model.modules() if dtype == torch.bfloat16 else ():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(dtype)


def to_meta(model):
    """Take a model's values out of it: (state, constants) on the process that has read them, else ({}, {}).
    Constants are buffers that are not saved and tensors that a module keeps as mere attributes."""
    state, constants = {}, {}
    if process_rank()[0] == 0:
        state = {name: value.detach() for name, value in model.state_dict().items()}
        for path, module in model.named_modules():
            unsaved = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
            unsaved.update({name: v for name, v in vars(module).items() if isinstance(v, torch.Tensor)})
            constants.update({(path, name): value for name, value in unsaved.items() if value is not None})
    model.to("meta")
    return state, constants


def receive(model, values, device, like=None):
    """Onto the device, each process its shards of what the first one has: nobody else holds a whole copy. Or
    its shards of the model `like`."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state, constants = dict(values[0]), [values[1]]  # a copy: torch puts its shards into it
    model.to_empty(device=device)
    if like:
        model.load_state_dict(like.state_dict())
    else:
        set_model_state_dict(model, state, options=options)
    dist.broadcast_object_list(constants)
    for (path, name), value in constants[0].items():
        module = model.get_submodule(path)
        if name in module._buffers:
            module._buffers[name] = value.to(device)
        else:
            setattr(module, name, value)


@torch.no_grad()
def copy_values(into, values):
    """{name: tensor} into the parameters of these names, each process its own shards."""
    for name, value in values.items():
        into[name].copy_(value)


@contextmanager
def exchanged(policy, trained, values):
    """The trained parameters take other values for a while, and these are kept for them: {} changes nothing.
    In place, since FSDP2 knows its shards by their memory."""

    @torch.no_grad()
    def exchange():
        release(policy if values else None)
        for name, value in values.items():
            own = trained[name].clone()
            trained[name].copy_(value)
            value.copy_(own)

    exchange()
    try:
        yield
    finally:
        exchange()


@torch.no_grad()
def update_average(average, trained, decay):
    for name, p in average.items():
        p.lerp_(trained[name], 1 - decay)


@contextmanager
def reference_network(policy, reference, trained, anchors):
    """The network that gives reference errors: a copy, or the policy itself with its adapters' values
    exchanged. They are back before any backward pass: gradient checkpointing recomputes the forward there."""
    with exchanged(policy, trained, {} if reference else anchors):
        yield reference or policy


def due(every, step):
    """Does this step end one of `every` steps? 0 = never."""
    return every > 0 and (step + 1) % every == 0


def learning_rate(cfg, step):
    """Linear warm-up, then --schedule: linear decay to zero, or constant as in Diffusion-DPO."""
    decay = 1 if cfg.schedule == "constant" else 1 - step / cfg.steps
    return cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps)) * decay


def clip_grad_norm(parameters, largest):
    """The gradient's norm, () on every process, after clipping it to `largest`; 0 = no clipping. Adapters are
    whole on each process: their gradients are summed here."""
    for p in parameters if process_rank()[1] > 1 else ():
        if not hasattr(p, "full_tensor"):
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def adamw(cfg, device, whole):
    """optimizer(parameters), asked for before anything is loaded. `whole`: they are fp32 and not sharded."""
    if not cfg.adam_8bit:
        return partial(torch.optim.AdamW, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    if not whole:
        fail("--adam_8bit true: needs fp32 weights that are whole on a process: one process, or --lora_rank")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        fail("--adam_8bit true needs a library: pip install bitsandbytes")
    return partial(AdamW8bit, weight_decay=cfg.weight_decay)


def suits_device(cfg, family, denoiser, item, K, dtype, device, room):
    """(the options with the fastest of the memory settings that fits the device, FLOPs of a list of K images,
    recomputation not counted). `room`: bytes to use on it. Prints the arithmetic; for --device meta, of
    several GPUs."""
    try:
        flops, *sizes = pipelines.count_flops(family, denoiser, item, cfg.lora_rank)
    except Exception as e:  # where nothing is computed: only sizes and kinds can be wrong
        fail(f"{cfg.model}: the parts of the pipeline do not fit together ({' '.join(str(e).split())[:200]})")
    passes = 4 * K + (cfg.sampler_steps + 1 if cfg.loss == "dro" else 0)  # forwards; a backward takes two
    (rank, world), trained = process_rank(), sizes[0]
    say = print if rank == 0 else lambda *_: None
    cost = f"a list of {K} takes {passes * flops / 4e12:.1f} TFLOP"
    say(f"{cfg.loss}: {trained / 1e6:.1f} M parameters are trained, computed in {dtype}; {cost}")
    images = dict.fromkeys((False, True), 0)
    if device.type in ("cuda", "meta"):
        count = partial(pipelines.count_bytes, family, denoiser, item, cfg.lora_rank, dtype)
        images = {recompute: count(recompute) for recompute in images}
        say("an image's pass: {:.2f} GB, recomputed {:.2f} GB".format(*(n / 1e9 for n in images.values())))

    def setting_in(room, gpus):
        return fastest(cfg, K, images, partial(weight_bytes, cfg, *sizes, dtype, gpus), room, gpus)

    if device.type == "meta":
        for gpus, gb in product((1, 8), (24, 40, 80)):
            say(f"{gpus} x {gb} GB:", describe(setting_in(common.USABLE * gb * 1e9, gpus)))
    setting = setting_in(room, world)
    if device.type == "cuda":
        say(f"{room / 1e9:.1f} GB to use on each of {world}:", describe(setting))
    return replace(cfg, **setting.options), passes * flops / 4


def weight_bytes(cfg, trained, frozen, dtype, world, keep_gathered):
    """Of weights, gradients and optimiser on each of `world` devices."""
    wide, half = max(4, dtype.itemsize), dtype.itemsize
    moments = 2 if cfg.adam_8bit else 2 * wide
    # weights, gradients, an average, a sampler
    own = ((2 + (cfg.ema > 0) + (cfg.loss == "dro")) * wide + moments) * trained
    if cfg.lora_rank:
        return own + wide * trained + half * frozen  # values of the reference; frozen weights
    if world == 1:
        copy = half if half < wide else 0  # of the policy, in the compute type
        return own + (half + copy) * trained
    gathered = (2 * half + wide) * trained if keep_gathered else 0  # policy, reference, whole gradients
    return (own + wide * trained) / world + gathered


Setting = namedtuple("Setting", "options gb time fits")  # `time`: over that of the least passes


def fastest(cfg, K, images, weights, room, world):
    """The fastest memory setting in `room` bytes, or the smallest; options that are given stay. `images`:
    {recompute: bytes an image}, `weights`: keep_gathered -> bytes."""
    local, sharded = max(1, cfg.global_batch_size // world), world > 1 and not cfg.lora_rank
    machines = world // int(os.environ.get("LOCAL_WORLD_SIZE", world)) or 1
    keeps = [sharded and cfg.keep_gathered] if cfg.keep_gathered is not None else {sharded, False}
    recomputes = (False, True) if cfg.gradient_checkpointing is None else [cfg.gradient_checkpointing]
    settings = []
    for keep, recompute in product(keeps, recomputes):
        fit = 10**6  # images
        if room < math.inf:
            fit = max(1, int((room - weights(keep)) / images[recompute]))
        lists = min(cfg.device_batch_size or min(32, max(1, fit // K)), local)
        together = cfg.images_per_forward
        if together is None:
            together = 0 if lists * K <= fit else fit
        needed = weights(keep) + images[recompute] * (min(together, lists * K) or lists * K)
        # both networks' forward and the backward take 4, recomputing .8; gathering in every pass a fifth,
        # between machines twice the time
        passes = 4 + 0.8 * recompute + (0 < together < lists * K)
        factor = passes / 4 * (1 if keep or not sharded else 1.2 if machines == 1 else 2)
        options = dict(device_batch_size=lists, images_per_forward=together, gradient_checkpointing=recompute)
        options["keep_gathered"] = keep
        settings.append(Setting(options, needed / 1e9, factor, needed <= room))
    return min(settings, key=lambda s: (not s.fits, s.time if s.fits else s.gb))


def describe(setting):
    options = [f"--{name} {str(value).lower()}" for name, value in setting.options.items()]
    fits = "" if setting.fits else ", DOES NOT FIT"
    return f"{' '.join(options)}: {setting.gb:.1f} GB, {setting.time:.2f} x the time{fits}"


# ----------------------------------------------------------------------------- checkpoints


def training_state(cfg, policy, optimizer, trained, anchors, average, sampler):
    """All that the next step depends on, as one flat {name: tensor} that torch.distributed.checkpoint saves,
    and loads in place on any number of processes. Data, noise and rate follow from the step."""
    release(policy)  # torch finds parameters by their shards
    get_optimizer_state_dict(policy, optimizer)  # makes the moments where no step was taken yet
    state = {}
    for n, p in trained.items():
        moments = optimizer.state[p]
        moments["step"] = torch.as_tensor(moments["step"])  # of bitsandbytes a number; its qmaps are constant
        state.update({f"optimizer.{n}.{key}": t for key, t in moments.items() if "qmap" not in key})
    named = {"weights": trained, "average": average, "sampler": sampler}
    if cfg.ref_refresh:  # else the reference is what every run begins with
        named["reference"] = anchors
    for name, values in named.items():
        state.update({f"{name}.{n}": p.detach() for n, p in values.items()})
    return state


def save_checkpoint(cfg, state, now, step):
    """out/checkpoints/step-000100: written under another name, renamed when all processes are done."""
    (rank, world), folder = process_rank(), Path(cfg.out) / "checkpoints"
    tmp, final = folder / f".tmp-step-{step:06d}", folder / f"step-{step:06d}"
    if rank == 0:
        common.remove(tmp)
        tmp.mkdir(parents=True)
    common.wait_for_all()
    writer = dcp.HuggingFaceStorageWriter(tmp, save_distributed=True)  # safetensors: data, never code
    dcp.save(state, storage_writer=writer, no_dist=world == 1)
    if rank == 0:
        files = {p.name: p.stat().st_size for p in tmp.glob("*.safetensors")}
        common.write_text(tmp / "run.json", json.dumps({"step": step, "identity": now, "files": files}))
        common.remove(final)
        os.rename(tmp, final)
        for old in sorted(folder.glob("step-??????"))[: -cfg.keep]:
            common.remove(old)
    common.wait_for_all()


def identity(cfg, rows, policy):
    """What makes a run this run: the options of Method, the weights it begins with, what its lists hold."""
    digest = hashlib.sha256()
    for row in rows:
        sizes = [(Path(cfg.data) / f).stat().st_size for f in row.get("file_names", [])]
        parts = [row["prompt"], row["phi"], row.get("scores"), row.get("file_names"), sizes]
        digest.update(json.dumps(parts).encode())
    options = {f.name: getattr(cfg, f.name) for f in fields(Method)}
    parts = [sorted(Path(part).rglob("*.safetensors")) for part in cfg.model.split("+")]  # base, adapters
    ends = [common.ends_of(file, 1 << 20) for files in parts for file in files]
    if not all(parts) and process_rank()[0] == 0 and cfg.device != "meta":  # from the hub: which revision?
        ends += [p.detach().flatten()[:8].tolist() for p in policy.parameters()]
    weights = hashlib.sha256(json.dumps(ends).encode())
    now = {**options, "weights": weights.hexdigest()[:16], "lists": digest.hexdigest()[:16]}
    return json.loads(json.dumps(now))  # as it is read back: tuples are lists


def read_run(folder):
    """run.json of a checkpoint whose files are all there and whole, or None."""
    try:
        run = common.parse_json((folder / "run.json").read_text())
        for name, size in run["files"].items():
            if (folder / name).stat().st_size != size or not common.is_whole_safetensors(folder / name):
                return None
        return run if folder.name == f"step-{run['step']:06d}" and run["identity"].items() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_checkpoint(cfg, now):
    """(folder, step) of the newest whole checkpoint of the run with identity `now`, or (None, 0), the same
    for every process. A damaged one is set aside; another run's is refused by name."""
    (rank, world), found, folder = process_rank(), [None, 0], Path(cfg.out) / "checkpoints"
    if rank == 0 and not cfg.resume:
        common.remove(folder)
    for path in sorted(folder.glob("step-??????"), reverse=True) if rank == 0 else []:
        run = read_run(path)
        if run is None:
            print(f"{path}: damaged, set aside as damaged-{path.name}")
            common.remove(folder / f"damaged-{path.name}")
            os.rename(path, folder / f"damaged-{path.name}")
            continue
        before = run["identity"]
        if changed := [f"{k} ({before.get(k)}, now {v})" for k, v in now.items() if before.get(k) != v]:
            where = f"{path} belongs to a run with another {', '.join(changed)}"
            fail(f"{where}; choose another --out, or start again with --resume false")
        found = [str(path), run["step"]]
        break
    if world > 1:
        dist.broadcast_object_list(found)
    return found


def load_checkpoint(folder, state):
    """Into the tensors of training_state, in place. Returns those that are not mere counts."""
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=process_rank()[1] == 1)
    except (Exception, CheckpointException) as e:  # tensors of another model
        reason = " ".join(str(e).split())[:200]
        fail(f"{folder}: does not fit this run ({reason}); delete it, or start again with --resume false")
    return [t for t in state.values() if t.dim()]


# ----------------------------------------------------------------------------- record: log, pictures, curves


CURVES = {
    "loss": {"loss": ""},
    "implicit accuracy": {"accuracy": ""},
    "error against the reference": {"best_s": "winner", "worst_s": "loser"},
    "gradient norm": {"grad_norm": ""},
}


GROWTH = 0.01  # of the winner's error, from which the log warns; less is the noise of a row


class Log:
    """log.jsonl: a head with all that a run depends on, then a row a step; curves.png at its end. tensorboard
    gets the same numbers where it is installed. `flops`: of a list on one device; `peak`: FLOP/s of it."""

    def __init__(self, cfg, head, start_step, flops, peak):
        path = Path(cfg.out) / "log.jsonl"
        there = start_step and path.is_file()
        rows = [row for _, row in common.read_jsonl(path, torn_end=True)] if there else []
        numbers = ["step", "skipped", *(key for lines in CURVES.values() for key in lines)]
        if not all(isinstance(row.get(key, ""), int | float | None) for row in rows[1:] for key in numbers):
            fail(f"{path}: not the log of this run; move it away")
        kept = [row for row in rows if row.get("step", -1) < start_step] or [head]
        if start_step:  # by another commit, perhaps, on another machine
            now = {key: value for key, value in head.items() if key != "config"}
            kept[0].setdefault("resumed", []).append({"step": start_step, **now})
        common.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file, self.winners, self.skipped = open(path, "a"), [], kept[-1].get("skipped", 0)
        self.start, self.start_step, self.flops, self.peak = time.time(), start_step, flops, peak
        self.lists, self.board = cfg.global_batch_size, None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(Path(cfg.out) / "tensorboard"))

    def write(self, row, skipped):
        """One line; returns what the progress bar shows."""
        self.skipped += skipped
        done = (row["step"] + 1 - self.start_step) * self.lists
        per_s = done / (time.time() - self.start)
        row.update(skipped=self.skipped, lists_per_s=per_s, tflops=per_s * self.flops / 1e12)
        if self.peak:
            row.update(share_of_peak=per_s * self.flops / self.peak)
            row.update(memory_gb=torch.cuda.max_memory_allocated() / 1e9)
        text = json.dumps(row).replace("NaN", "null").replace("-Infinity", "null").replace("Infinity", "null")
        self.file.write(text + "\n")
        self.file.flush()
        for name, value in row.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(name, value, row["step"])
        self.winners.append(row["best_s"])
        winner, than = row.get("held_out_best_s"), "the base's on held-out lists"
        if winner is None and row["step"] % 50 == 49:
            winner, than = np.mean(self.winners[-25:]), "the reference's"
        if winner is not None and winner > GROWTH:
            problem = f"step {row['step']}: the winner's error is {winner:.3f} above {than}"
            tqdm.write(f"{problem}; pictures may get worse although loss falls: lower --lr or raise --beta")
        shown = {"loss": "loss", "acc": "accuracy", "winner": "best_s", "loser": "worst_s"}
        return {name: f"{row[key]:.3g}" for name, key in shown.items()}

    def close(self):
        """Returns what a model card should say of the run: {title: {name: value}}."""
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board:
            self.board.close()
        path = Path(self.file.name)
        head, *rows = [row for _, row in common.read_jsonl(path)]
        common.plot_curves(rows, CURVES, path.with_name("curves.png"))
        return {"Run": head, "Options": head.pop("config", {}), "Last step": rows[-1] if rows else {}}


def prepare_samples(cfg, pipe, rows, item, device, dtype, autocast):
    """sample(step), which draws the first prompts every --sample_every steps. They are encoded now."""
    if not cfg.sample_every:
        return lambda step: None
    size = [side * pipe.vae_scale_factor for side in item["latents"].shape[-2:]]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: cfg.sample_prompts]
    arguments = pipelines.encode_and_drop_encoders(pipe, prompts, size, device, dtype)
    arguments.update(pipelines.family_of(pipe).sampling(pipe, cfg.sample_steps, cfg.sample_guidance))

    @torch.no_grad()
    def sample(step):
        """Draw them from fixed noise: by all processes, if they are sharded; the first one writes."""
        if step % cfg.sample_every:
            return
        generator = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
        pipe.vae.to(device, torch.promote_types(dtype, torch.float32))  # fp32, or fp64 as the denoiser
        with autocast:
            images = pipe(**arguments, generator=generator, output_type="np").images  # (N, H, W, 3) in [0, 1]
        pipe.vae.to("cpu")
        if process_rank()[0] == 0:
            write_samples(Path(cfg.out), prompts, np.nan_to_num(images), step)

    return sample


def write_samples(out, prompts, images, step):
    """samples/000100.png, a row of pictures (N, H, W, 3); samples.png, the rows of all steps so far."""
    if step == 0:  # of an earlier run
        common.remove(out / "samples")
    w, gap = images.shape[2], images.shape[2] // 16
    images = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=1)
    row = Image.fromarray((np.concatenate(list(images), axis=1) * 255).round().astype(np.uint8))
    common.publish(out / f"samples/{step:06d}.png", row.save)
    rows = []
    for path in sorted((out / "samples").glob("??????.png")):
        if int(path.stem) <= step:  # a killed run may have been further
            row, captions = Image.open(path), prompts if not rows else [""] * len(prompts)
            cells = [row.crop((i * (w + gap), 0, i * (w + gap) + w, row.height)) for i in range(len(prompts))]
            rows.append((f"step {int(path.stem)}", list(zip(cells, captions))))
    common.picture_grid(rows, out / "samples.png")


def export_model(cfg, step, policy, part, row):
    """OUT/model-000200 beside OUT/model, every --export_every steps -> what the log says of it. Which step's
    model is the best is seen by evaluation alone. Called by every process."""
    if not due(cfg.export_every, step):
        return {}
    name, about = f"model-{step + 1:06d}", {"Options": asdict(cfg), "Step": row}
    pipelines.save_tuned(Path(cfg.out) / name, cfg.model, policy, part, cfg.lora_rank > 0, about)
    return {"exported": name}


def remove_exports(out, step):
    """Models of later steps, which this run takes anew: no model stays that is not of this run."""
    for path in out.glob("model-" + "[0-9]" * 6):
        if int(path.name[6:]) > step:
            common.remove(path)


# ----------------------------------------------------------------------------- main


@common.one_line_errors
def main(argv=None):
    cfg = common.parse(Config, __doc__, argv)
    check_options(cfg)
    cfg = common.fill_in(cfg, {"caption_dropout": 0.2} if cfg.loss == "dro" else {}, "--loss dro")
    device, (rank, world) = common.start_processes(cfg.device), process_rank()
    room = common.free_bytes(device)  # before anything is there
    sharded = world > 1 and not cfg.lora_rank
    scale = (world if sharded else 1) / cfg.global_batch_size  # mean over lists; FSDP averages over processes
    dtype = common.pick_dtype(cfg.precision, device)
    optimizer_of = adamw(cfg, device, whole=not sharded and dtype != torch.float64)
    mixed = dtype == torch.bfloat16 and device.type != "meta"
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()

    # ---- data and model
    rows = expert_rows(cfg, read_lists(cfg)) if cfg.loss == "dro" else read_lists(cfg)
    check_scores(cfg, rows)
    labels = stack_labels(cfg, rows)
    seen, held = split_lists(cfg, rows)
    out = common.own_folder("out", cfg.out, "another rankdpo.py is at work in it")
    file_of, todo = lists_to_encode(cfg, rows, dtype)
    pipe, family = load_base(cfg, device, todo)
    denoiser, policy = pipelines.denoiser_of(pipe)
    cfg = complete(cfg, pipe)
    now = identity(cfg, rows, policy)
    checkpoint, start_step = find_checkpoint(cfg, now)
    encode_lists(cfg, rows, pipe, device, dtype, file_of, todo)
    common.wait_for_all(hours=True)
    read = lambda n: load_file(file_of(n))
    if cfg.data == "random":
        read = random_lists(family.shapes(policy.config), k=1 if cfg.loss == "dro" else 4)
    cfg, flops = suits_device(cfg, family, policy, read(seen[0]), labels.mask.shape[1], dtype, device, room)
    if device.type == "meta":
        return
    nothing = dropped_caption(cfg, pipe, read(seen[0]), device, dtype)
    sample = prepare_samples(cfg, pipe, rows, read(seen[0]), device, dtype, autocast)
    scheduler, predicts = pipe.scheduler, partial(predict_some, family, autocast)
    load = partial(load_batch, cfg, read, scheduler, labels, nothing, device, dtype)
    pipe = None  # VAE and text encoders have done their work, but for the samples

    # ---- policy, reference, optimiser
    policy, reference, trained, anchors = build_engine(cfg, family, policy, device, dtype, sharded)
    engine = reference, trained, anchors
    average = {n: p.detach().clone() for n, p in trained.items()} if cfg.ema else {}
    sampler = {n: p.detach().clone() for n, p in trained.items()} if cfg.loss == "dro" else {}
    negatives = partial(add_negatives, cfg, scheduler, predicts, policy, trained, sampler)
    batch_of = lambda lists: negatives(load(lists), lists)
    errors = partial(image_errors, predicts)
    accumulate = partial(accumulate_gradient, cfg, errors, policy, engine, scale)
    parameters = list(trained.values())  # a list: a generator would be used up by the optimiser
    optimizer = optimizer_of(parameters)
    state = partial(training_state, cfg, policy, optimizer, trained, anchors, average, sampler)
    base_err = base_errors(cfg, held, batch_of, errors, policy, engine)  # before another reference is loaded
    begun_with = load_checkpoint(checkpoint, state()) if checkpoint else parameters
    common.check_finite(begun_with, device, f"{checkpoint or cfg.model}: holds weights that are not finite")
    if not start_step:
        sample(0)
    if rank == 0:
        head = dict(world=world, precision=str(dtype), even_votes=even_votes(cfg, rows))
        head.update(lists=len(seen), held_out=len(held), config=asdict(cfg), **common.provenance(device))
        log = Log(cfg, head, start_step, flops / world, common.matrix_rate(device))
        remove_exports(out, start_step)

    # ---- the training loop
    bad_steps, stop = 0, []  # steps in a row without a finite gradient; a SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    steps_left = range(start_step, cfg.steps)
    pieces = (lists for step in steps_left for lists in micro_batches(cfg, step, seen))
    batches = common.ahead(load, pieces, depth=1)  # the next one is prepared while one trains
    for step in (bar := tqdm(steps_left, "train", cfg.steps, initial=start_step, disable=rank > 0)):
        # ---- reference and rate
        if cfg.ref_refresh and step and step % cfg.ref_refresh == 0:
            release(reference)
            copy_values(anchors, trained)  # BalancedDPO: ref <- theta
        if cfg.loss == "dro" and step % cfg.sampler_refresh == 0:
            copy_values(sampler, trained)
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)

        # ---- gradient
        mine, row = micro_batches(cfg, step, seen), {"step": step}
        if cfg.loss == "dro" and due(cfg.eval_every, step):
            row.update(term_norms(step, map(batch_of, mine), accumulate, parameters))
        metrics = [accumulate(negatives(next(batches), some), last=some is mine[-1]) for some in mine]

        # ---- update
        grad_norm = clip_grad_norm(parameters, cfg.max_grad_norm)
        if step == 0 and grad_norm == 0:
            fail("step 0: the gradient is zero; do these lists prefer anything? Raise --global_batch_size")
        bad_steps = 0 if torch.isfinite(grad_norm) else bad_steps + 1
        release(policy)
        if bad_steps == 0:  # a step that would ruin the weights is not taken
            optimizer.step()
            update_average(average, trained, min(cfg.ema, (1 + step) / (10 + step)))  # a young one forgets
        optimizer.zero_grad(set_to_none=True)
        if bad_steps == 3:
            problem = f"step {step}: the gradient was {grad_norm.item()} three times in a row"
            fail(f"{problem}; lower --lr or --beta, or try --precision fp32. The last checkpoint is kept")

        # ---- record
        row.update(summarise(common.gather(torch.cat(metrics))))
        row.update(grad_norm=grad_norm.item(), lr=optimizer.param_groups[0]["lr"])
        looked_at = any(due(n, step) for n in (cfg.eval_every, cfg.sample_every, cfg.export_every))
        with exchanged(policy, trained, average if looked_at else {}):  # of what will be saved
            row.update(measure_held_out(cfg, step, held, batch_of, errors, policy, engine, base_err))
            sample(step + 1)
            row.update(export_model(cfg, step, policy, denoiser, row))
        if rank == 0:
            bar.set_postfix(log.write(row, skipped=bad_steps > 0))

        # ---- save
        stopping = common.any_process(bool(stop), device)
        if stopping or due(cfg.save_every, step):
            common.check_finite(parameters, device, f"step {step}: weights not finite, not saved; lower --lr")
            save_checkpoint(cfg, state(), now, step + 1)
        if stopping:
            fail(f"a SIGTERM came: stopped after step {step}; the same command goes on from there", 143)

    copy_values(trained, average)
    common.check_finite(parameters, device, "the weights are not finite and not saved; lower --lr")
    about = log.close() if rank == 0 else {}
    pipelines.save_tuned(out / "model", cfg.model, policy, denoiser, cfg.lora_rank > 0, about)
    if rank == 0:
        print(f"{out}: log.jsonl, curves.png, and the tuned model in model/")
    common.wait_for_all(hours=True)  # or one would be gone while another still talks to it


if __name__ == "__main__":
    main()
