"""RankDPO, BalancedDPO, Diffusion-DRO and their baselines on ranked lists. Read losses.py first.

    python rankdpo.py                                    # the toy world: toy/models/sdxl on outputs/synpic
    python rankdpo.py --loss dpo --beta 500              # another objective of the family
    python rankdpo.py --loss balanced --ref_refresh 50   # BalancedDPO: majority vote, reference refresh
    python rankdpo.py --loss dro --sampler_refresh 20    # Diffusion-DRO: experts against its own pictures
    torchrun --nproc_per_node 8 rankdpo.py --data synpic --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --resolution 1024 --beta 2500 --lr 2e-5 --steps 400 --global_batch_size 1024 --device_batch_size 1 \\
        --gradient_checkpointing true --save_every 20    # the paper's size; bash train.sh sdxl is the recipe
    python rankdpo.py ... --lora_rank 64 --images_per_forward 1      # adapters, one image at a time: one GPU
    python rankdpo.py --model random:sdxl --data random --steps 5    # time and memory at real size
    python rankdpo.py --model random:sdxl --plan 24 40 8x80          # the same, counted without a GPU

It reads a folder that synpic.py wrote (metadata.jsonl and images). It writes a pipeline that diffusers'
`from_pretrained` loads (with --lora_rank: a folder for `pipe.load_lora_weights`), log.jsonl, curves.png and,
with --sample_every, samples.png. The same command continues a killed run from its newest checkpoint.

The curve is the same on 1 and on N processes, for any --device_batch_size and --images_per_forward: noise and
timestep depend on (seed, step, list) alone. docs/departures.md lists where this departs from the papers.
"""

from collections import namedtuple
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import chain, count, islice
from pathlib import Path

from lib import common
from lib.common import fail, option, process_rank

LOSSES = ("rankdpo", "dpo", "gain", "balanced", "direct", "random_scorer", "sft", "weighted", "dro")
SUITS = {  # (--beta, --lr, --lr of adapters, --loser_weight) by the scale of the model
    "toy": (100.0, 2e-4, 2e-4, 0.5),
    "noise": (2500.0, 2e-5, 1e-4, 1.0),  # of public DPO trainers of SDXL, with batches of 1024 and 2048
    "flow": (50.0, 2e-5, 1e-4, 1.0),  # public SD3 trainers' 100 has the factor 1/2
}
EXPERTS = ("hpsv2.1", "hpsv2", "pickscore")  # rank the pictures of --loss dro: the first that is there


@dataclass
class Method:
    """What a run is: with another value of one of these it is another run."""

    # data
    data: str = option("outputs/synpic", "a folder that synpic.py wrote; random measures time and memory")
    model: str = option(None, "folder, hub id, base+adapters or random:sdxl (for toy lists: the toy's)")
    resolution: int = option(0, "resize and crop images to this side in pixels; 0 = as they are", at_least=0)
    label: str = option("given", "phi as stored, reversed, or phi, sum, normalized_sum, majority, random")
    label_rewards: tuple = option((), "which scores --label and --loss balanced count (default: all)")
    holdout: float = option(0.0, "share of the prompts kept to measure on", at_least=0, below=1)
    seed: int = option(0, "determines the order of the lists, timesteps and noise", at_least=0)
    # objective
    loss: str = option("rankdpo", "the objective; losses.py has the table", LOSSES)
    beta: float = option(None, "pull towards the reference; errors are MEANS (default: by model)", above=0)
    weight_by: str = option("hpsv2.1", "the reward whose scores weigh the images of --loss weighted")
    loser_weight: float = option(None, "scales the losers' gradient (default: by model)", at_least=0)
    ref_refresh: int = option(0, "steps between copies of the policy into the reference", at_least=0)
    timesteps: str = option("logit_normal", "how rectified flow draws them", ("logit_normal", "uniform"))
    experts: int = option(500, "--loss dro: how many of the best images are the experts", above=0)
    expert_by: str = option(None, "--loss dro: a reward, or phi (default: HPS or PickScore, else phi)")
    sampler_refresh: int = option(20, "--loss dro: steps between copies into the sampler", above=0)
    caption_dropout: float = option(None, "share of lists without text (dro: .2)", at_least=0, below=1)
    # optimiser
    lr: float = option(None, "learning rate of AdamW, peak after the warm-up (default: by model)", above=0)
    schedule: str = option("linear", "after the warm-up: decay to 0, or not", ("linear", "constant"))
    steps: int = option(400, "optimiser steps", above=0)
    warmup_steps: int = option(10, "steps of linear warm-up", at_least=0)
    global_batch_size: int = option(32, "lists per step, over all processes", above=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", at_least=0)
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0 = no clipping", at_least=0)
    ema: float = option(0.0, "decay of an average of the weights, which is then saved", at_least=0, below=1)
    lora_rank: int = option(0, "train adapters of this rank; 0 = all weights", at_least=0)
    precision: str = option("auto", "of the passes; fp64: of all", ("auto", "fp32", "bf16", "fp64"))


@dataclass
class Config(Method):
    """How it is computed and recorded: this may change between the parts of one run."""

    # memory: the fastest setting that fits a GPU is taken where the first four are not given
    device_batch_size: int = option(None, "lists per pass on one device; accumulation follows", above=0)
    images_per_forward: int = option(None, "images per pass, where memory is short; 0 = all", at_least=0)
    gradient_checkpointing: bool = option(None, "recompute activations in the backward pass")
    keep_gathered: bool = option(None, "several GPUs: gather weights and reduce gradients once per step")
    device: str = option("auto", "cuda, mps or cpu")
    plan: tuple = option((), "print memory and hours for GPUs of such GB, as 24 40 8x80, and end")
    # record
    out: str = option("outputs/rankdpo", "folder for the tuned pipeline, log.jsonl and curves.png")
    report: str = option("none", "send numbers and samples there, too", ("none", "tensorboard", "wandb"))
    eval_every: int = option(50, "steps between measurements on the held-out lists", above=0)
    sample_every: int = option(0, "steps between rows of pictures in samples.png; 0 = never", at_least=0)
    sample_prompts: int = option(8, "prompts in samples.png", above=0)
    sample_steps: int = option(None, "sampling steps of samples.png (default: by model)", above=0)
    sample_guidance: float = option(None, "guidance of samples.png (default: by model)", at_least=0)
    export_every: int = option(0, "steps between models besides the last, OUT/model-000200", at_least=0)
    save_every: int = option(0, "steps between checkpoints; 0 = only at a signal", at_least=0)
    keep: int = option(1, "checkpoints to keep", above=0)
    resume: bool = option(True, "go on from the newest checkpoint in --out; false sets the old run aside")


if __name__ == "__main__":  # --help and mistyped options and paths end here, before imports that take seconds
    given = common.parse(Config, __doc__)
    if given.data != "random" and not (given.plan or Path(given.data).is_dir()):
        fail(f"--data {given.data}: no such folder; make it with synpic.py, or name the one that is there")

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import losses
from lib import engine, formats, lists, memory, pipelines, store
from toy.world import checker, knows

SCORES = ("phi", "sum", "normalized_sum", "majority")  # labels that count all stored scores, or some
ONLY_FOR = {  # an option that is not at its default: the losses that use it
    "weight_by": ("weighted",),
    "ref_refresh": tuple(loss for loss in LOSSES if loss != "dro"),
    **dict.fromkeys(("experts", "expert_by", "sampler_refresh"), ("dro",)),
}


def with_defaults(cfg):
    """The options with the toy's model, where none is named and the lists are of the toy world, and with
    Diffusion-DRO's share of dropped captions."""
    if cfg.model is None:
        rows = [] if cfg.data == "random" else lists.read_metadata(cfg.data)
        if not rows or not knows(cfg.data, [(row["prompt"], row["file_names"]) for row in rows]):
            fail("--model: must be named; the default, toy/models/sdxl, knows lists of the toy world alone")
        cfg = replace(cfg, model=f"{common.HERE}/toy/models/sdxl")
    return common.fill_in(cfg, {"caption_dropout": 0.2} if cfg.loss == "dro" else {}, "--loss dro")


def check_options(cfg):
    """What is wrong whatever the data holds."""
    world = process_rank()[1]
    if cfg.global_batch_size % world:
        fail(f"--global_batch_size {cfg.global_batch_size} does not divide by {world} processes")
    for name, users in ONLY_FOR.items():
        if cfg.loss not in users and getattr(cfg, name) != getattr(Method, name):
            fail(f"--{name}: --loss {cfg.loss} does not use it; it belongs to {', '.join(users)}")
    out, parts = Path(cfg.out).resolve(), formats.split_spec(cfg.model)
    if any(Path(part).resolve().is_relative_to(out) for part in parts):
        fail(f"--model {cfg.model}: lies in --out {cfg.out}, which the run writes; choose another --out")
    lists.check_label(cfg.label, (*lists.STORED, *lists.LABELS))
    if cfg.loss in lists.VOTES and cfg.label in SCORES:
        fail(f"--loss {cfg.loss} looks at the scores, at no phi: take --label {cfg.label} with another loss")
    counted = cfg.label in SCORES or (cfg.loss in lists.VOTES and cfg.label in lists.STORED)
    if cfg.label_rewards and not counted:
        fail(f"--label_rewards: --label {cfg.label} does not look at them; name --label phi, sum or majority")
    if cfg.label == "reversed" and cfg.loss == "weighted":
        fail("--label reversed: turns scores negative, and those cannot weigh an error; take another --loss")
    if cfg.loss == "dro" and cfg.sampler_refresh == 1:
        common.print_first(
            "--sampler_refresh 1: the negatives' gradient is exactly zero, they only gate the hinge"
        )
    engine.check_report(cfg.report)


# ----------------------------------------------------------------------------- labels


def expert_rows(cfg, rows):
    """--loss dro: one row for each of the best pictures with their captions. A picture of several lists
    counts once. phi is (1, 0): 1 for the expert, 0 for the picture that the policy will draw."""
    scored = [name for name in EXPERTS if all(name in row["scores"] for row in rows)]
    by, values, looks = cfg.expert_by or (*scored, "phi")[0], {}, {}
    for row in rows:
        for name, value in zip(row["file_names"], row["phi"] if by == "phi" else row["scores"][by]):
            values[name, row["prompt"]] = max(value, values.get((name, row["prompt"]), value))
        looks.update(zip(row["file_names"], row["pictures"]))
    best = sorted(values, key=values.get, reverse=True)  # stable: ties in the order of the file
    tied = sum(value == values[best[0]] for value in values.values())
    if by == "phi" and tied > cfg.experts:
        fail(f"--expert_by phi: {tied} pictures tie at the top, {cfg.experts} are wanted; name a reward")
    best = best[: cfg.experts]
    between = f"{by} {values[best[0]]:g} to {values[best[-1]]:g}"
    common.print_first(f"experts: {len(best)} of {len(values)} pictures, {between}")
    more = dict(phi=[1.0, 0.0], scores={})
    return [dict(more, prompt=prompt, file_names=[name], pictures=[looks[name]]) for name, prompt in best]


# all lists, padded to the K of the longest: weights with 0, the mask with False
Labels = namedtuple("Labels", "weights mask")


def stack_labels(cfg, rows):
    """Labels of L lists: weights (L, [R,] K, K) or (L, K), mask (L, K) True for real images."""
    weights = []
    for row in rows:
        scores = [row["scores"][cfg.weight_by]] if cfg.loss == "weighted" else list(row["scores"].values())
        labels = torch.tensor(row["phi"]), torch.tensor(scores, dtype=torch.float64)
        weights.append(losses.list_weights(cfg.loss, *labels).float())
    if not any(w.any() for w in weights):
        fail(f"{cfg.data}/metadata.jsonl: no list prefers any image to another, so there is nothing to learn")
    K = max(w.shape[-1] for w in weights)
    pad = lambda w: torch.nn.functional.pad(w, (0, K - w.shape[-1]) * min(w.dim(), 2))
    sizes = torch.tensor([len(row["phi"]) for row in rows])  # (L,)
    return Labels(torch.stack([pad(w) for w in weights]), torch.arange(K) < sizes[:, None])


def split(rows, holdout, seed):
    """(train, held out): indices of lists to train on, and of those to measure on. No prompt is in both."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    shuffled = np.random.default_rng([seed, 2**32 - 1]).permutation(len(prompts))
    kept = {prompts[i] for i in shuffled[: round(holdout * len(prompts))]}
    if len(kept) == len(prompts) or (holdout and not kept):
        none = f"leaves no list to {'train on' if kept else 'measure'}"
        fail(f"--holdout {holdout} of {len(prompts)} prompts {none}")
    held_out = [n for n, row in enumerate(rows) if row["prompt"] in kept]
    return [n for n, row in enumerate(rows) if row["prompt"] not in kept], held_out


# ----------------------------------------------------------------------------- batches

HELD_OUT = 2**40  # the position of held-out lists, which no step reaches: their noise stays the same

# what batches are made of: cached latents and text, labels, the noise schedule, a dropped caption
Data = namedtuple("Data", "cache labels scheduler no_caption device dtype")

# x_t, t, target, cond: one row per image, (N = B K, ...); mask, weights, u, time: one per list, (B, ...)
Batch = namedtuple("Batch", "x_t t target cond mask weights u time")


def generator_of(cfg, position, n, *use):
    """The random numbers of list n at a position of the run, which counts lists over all steps: from (seed,
    position, list) alone, the same for any number of processes. Each use has its own."""
    state = int(np.random.SeedSequence([cfg.seed, position, n, *use]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state % 2**63)


def draw_noise(cfg, position, n, shape):
    """(u, noise) of a list: u () uniform in [0, 1), noise (k, C, h, w), one for all its images."""
    g = generator_of(cfg, position, n)
    u = torch.rand((), generator=g)
    return u, torch.randn(1, *shape[1:], generator=g).expand(shape)


def draw_order(cfg, buckets):
    """The lists of all steps, (steps, G). Each step takes its lists from one bucket, the one used least for
    its size, so that all lists are visited equally often. A bucket is repeated, each time in another
    order."""
    lengths, taken, order = np.array([len(bucket) for bucket in buckets]), np.zeros(len(buckets)), []
    epochs = lambda bucket: (np.random.default_rng([cfg.seed, e]).permutation(bucket) for e in count())
    streams = [chain.from_iterable(epochs(bucket)) for bucket in buckets]
    for _ in range(cfg.steps):
        turn = np.argmin((taken + 0.5) / lengths)  # at first the largest bucket
        taken[turn] += 1
        order.append(np.fromiter(islice(streams[turn], cfg.global_batch_size), int))
    return np.stack(order)


def micro_batches(cfg, order, step):
    """The lists of a step on this process, [[(position, list), ...], ...]: a pass each."""
    rank, local = process_rank()[0], cfg.global_batch_size // process_rank()[1]
    mine = list(enumerate(order[step].tolist(), step * cfg.global_batch_size))[rank * local :][:local]
    return [mine[i : i + cfg.device_batch_size] for i in range(0, local, cfg.device_batch_size)]


def load_batch(cfg, data, positions):
    """[(position, list)] -> a Batch. A list that is shorter than K is padded with its first image, which the
    mask keeps out of the loss: all batches have one shape, and every process takes equally many passes. For
    each list we decide once whether its caption is dropped, and which scorer ranks it."""
    K, index = data.labels.mask.shape[1], [n for _, n in positions]
    wide = torch.promote_types(data.dtype, torch.float32)  # of noise, errors and losses
    items = [lists.read_cached(data.cache, n) for n in index]
    draws = [draw_noise(cfg, p, n, tuple(x["latents"].shape)) for (p, n), x in zip(positions, items)]
    coins = [torch.rand(2, generator=generator_of(cfg, p, n, 1)).tolist() for p, n in positions]
    for item, (position, _), (coin, _) in zip(items, positions, coins):
        if position < HELD_OUT and coin < (cfg.caption_dropout or 0):
            item.update(data.no_caption)
    fill = lambda t: torch.cat([t, t[:1].expand(K - len(t), *t.shape[1:])])
    move = lambda t: engine.to_device(t, data.device)
    x = move(torch.cat([fill(item["latents"]) for item in items])).to(wide)  # (N, C, h, w)
    noise = move(torch.cat([fill(noise) for _, noise in draws])).to(wide)  # (N, C, h, w)
    u = move(torch.stack([u for u, _ in draws]))  # (B,), one timestep a list
    if cfg.loss == "dro":  # a timestep that a sampling path passes
        u = ((1000 * u).floor() + 0.5) / 1000
    names = [name for name in items[0] if name != "latents"]
    cond = {name: move(torch.stack([x[name] for x in items])).repeat_interleave(K, 0) for name in names}
    timesteps = "uniform" if cfg.loss == "dro" else cfg.timesteps
    x_t, t, target = pipelines.add_noise(data.scheduler, x, noise, u.repeat_interleave(K), timesteps)
    weights, mask = (values[index] for values in data.labels)
    if cfg.loss == "random_scorer":  # (B, R, K, K)
        weights = torch.stack([w[int(coin * len(w))] for w, (_, coin) in zip(weights, coins)])
    time = t[::K] / data.scheduler.config.num_train_timesteps  # (B,); of rectified flow: sigma
    return Batch(x_t, t, target, cond, move(mask), move(weights), u, time)


def read_ahead(cfg, data, order, first_step):
    """Yield (positions, Batch) of all micro-batches from a step on; a thread loads the next one meanwhile."""
    steps = range(first_step, cfg.steps)
    passes = (positions for step in steps for positions in micro_batches(cfg, order, step))
    return common.ahead(lambda positions: (positions, load_batch(cfg, data, positions)), passes, depth=1)


# ----------------------------------------------------------------------------- objective


def predict(family, network, x_t, t, cond, images_per_forward):
    """What a network predicts of x_t (N, C, h, w). Where memory is short, in parts, whose activations are
    computed again in the backward pass. use_reentrant gives each part a backward of its own, at whose end
    FSDP2 adds its bf16 gradients up in fp32."""
    N, m = len(x_t), images_per_forward or len(x_t)
    if m >= N:
        return family.predict(network, x_t, t, cond)
    parts = []
    for i in range(0, N, m):
        x, of_part = x_t[i : i + m], {name: c[i : i + m] for name, c in cond.items()}
        if torch.is_grad_enabled():
            args = network, x.requires_grad_(), t[i : i + m], of_part
            parts.append(checkpoint(family.predict, *args, use_reentrant=True, preserve_rng_state=False))
        else:
            parts.append(family.predict(network, x, t[i : i + m], of_part))
    engine.ends_with(network, parts[0])
    return torch.cat(parts)


def errors(family, network, batch, images_per_forward):
    """(B, K), fp32 or wider: mean squared errors of a network on a batch."""
    prediction = predict(family, network, batch.x_t, batch.t, batch.cond, images_per_forward)
    return losses.denoising_error(prediction, batch.target, batch.mask.shape[1])


def list_loss(cfg, policy_err, ref_err, batch):
    """Errors (B, K) -> loss (B,), metrics {name: (B,)}."""
    weights, mask = batch.weights, batch.mask
    if cfg.loss in ("sft", "weighted"):
        loss, metrics = losses.finetuning_loss(policy_err, ref_err, weights, mask)
    elif cfg.loss == "dro":  # each list is an expert and a negative
        (expert, negative), (expert_ref, negative_ref) = policy_err.T, ref_err.T
        loss, metrics = losses.dro_loss(expert, expert_ref, negative, negative_ref)
    else:
        loss, metrics = losses.preference_loss(policy_err, ref_err, weights, cfg.beta, mask, cfg.loser_weight)
    return loss, {**metrics, "loss": loss.detach(), "time": batch.time.to(loss.dtype)}


METRICS = ("loss", "accuracy", "best_s", "worst_s", "weight", "unweighted", "time")


def summarise(metrics, **more):
    """[{name: (B,)}] of the passes of all processes -> numbers for the log: means over the lists that have a
    value, every list counting once, and the accuracy in ten bins of t / 1000, or of rectified flow's sigma,
    from little noise to much. These and `more`, tensors (), leave the GPU in one transfer: each delays it."""
    columns = [torch.cat([of_pass[name] for of_pass in metrics]) for name in METRICS]
    table = engine.gather(torch.stack(columns, 1))  # (lists, M)
    numbers = torch.cat([table.flatten(), *(value.view(1) for value in more.values())]).cpu()
    table, rest = numbers[: table.numel()].view(table.shape), numbers[table.numel() :].tolist()
    row = dict(zip(METRICS, table.nanmean(0).tolist()))
    accuracy, time = (table[:, METRICS.index(name)] for name in ("accuracy", "time"))
    bins = (time * 10).long().clamp(0, 9)
    row["accuracy_by_time"] = [accuracy[bins == i].nanmean().item() for i in range(10)]
    del row["time"]
    return {**row, **dict(zip(more, rest))}


# ----------------------------------------------------------------------------- Diffusion-DRO's negatives


def sampling_path(scheduler, denoise, x, u):
    """Pure noise x (B, C, h, w) -> the states that DPM-Solver++ (2M) passes at the timesteps 1000 u (B,).

    An image's path goes down from the highest of its levels t, t + 50, ... below 1000, without
    guidance. denoise(x, t): what the sampler predicts. On rectified flow alpha is 1 - sigma, and the solver's
    first step Euler's."""
    stride, shape, before = 1000 // pipelines.SAMPLER_STEPS, (-1, 1, 1, 1), None
    t = (1000 * u).long()  # (B,)
    place = t // stride  # of t on its path, 0 = the last step
    lowest = place.min()
    if process_rank()[1] > 1:  # as many passes on each process: the sampler may be sharded
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
    for i in range(pipelines.SAMPLER_STEPS - 1, int(lowest), -1):
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
def add_negatives(cfg, family, scheduler, sampler, batch, positions):
    """The second image of each list becomes a state on the sampling path of a copy of the policy, at the
    expert's timestep and caption; its target is what the copy predicts there, without gradient."""
    noise = [torch.randn(batch.x_t.shape[1:], generator=generator_of(cfg, p, n, 2)) for p, n in positions]
    caption = {name: c[::2] for name, c in batch.cond.items()}
    m, wide = cfg.images_per_forward, batch.x_t.dtype
    denoise = lambda x, t: predict(family, sampler, x, t, caption, m).to(wide)
    x_t, target = batch.x_t.clone(), batch.target.clone()
    x_t[1::2] = sampling_path(scheduler, denoise, torch.stack(noise).to(x_t), batch.u)
    # predicted in the whole batch, as the errors are: they are exactly 0 where the copy is the policy
    target[1::2] = predict(family, sampler, x_t, batch.t, batch.cond, m).to(wide)[1::2]
    return batch._replace(x_t=x_t, target=target)


# ----------------------------------------------------------------------------- held-out lists


@torch.no_grad()
def held_out_passes(cfg, family, data, buckets, base):
    """For each pass: its (position, list) pairs, a flag for lists that only fill up the pass, and their
    errors (B, K) under the base. Every process takes equally many lists of each bucket, so a few are taken
    twice."""
    (rank, world), size, passes = process_rank(), cfg.device_batch_size, []
    for bucket in buckets:
        share = range(rank, -(-len(bucket) // world) * world, world)
        for places in (share[i : i + size] for i in range(0, len(share), size)):
            positions = [(HELD_OUT, bucket[place % len(bucket)]) for place in places]
            twice = torch.tensor([place >= len(bucket) for place in places])
            base_err = errors(family, base, load_batch(cfg, data, positions), cfg.images_per_forward)
            passes.append((positions, twice.to(data.device), base_err))
    return passes


@torch.no_grad()
def measure_held_out(cfg, family, data, passes, policy, networks):
    """Implicit accuracy on the held-out lists against the reference, at noise and timesteps that stay the
    same. s of the winner and of the loser is against the BASE, which is what pictures are compared with."""
    accuracy, against_base = [], []
    for positions, twice, base_err in passes:
        batch = load_batch(cfg, data, positions)
        if networks.sampler:
            batch = add_negatives(cfg, family, data.scheduler, networks.sampler, batch, positions)
        ref_err = errors(family, networks.reference, batch, cfg.images_per_forward)
        policy_err = errors(family, policy, batch, cfg.images_per_forward)
        for found, err in ((accuracy, ref_err), (against_base, base_err)):
            metrics = list_loss(cfg, policy_err, err, batch)[1]
            found.append({name: value.masked_fill(twice, float("nan")) for name, value in metrics.items()})
    accuracy, drift = summarise(accuracy)["accuracy"], summarise(against_base)
    row = {"held_out_accuracy": accuracy, "held_out_best_s": drift["best_s"]}
    # Diffusion-DRO's losers are other pictures each time
    return row if networks.sampler else {**row, "held_out_worst_s": drift["worst_s"]}


# ----------------------------------------------------------------------------- main


def due(every, step):
    """Does this step end one of `every` steps? 0 = never."""
    return every > 0 and (step + 1) % every == 0


def learning_rate(cfg, step):
    """Linear warm-up to --lr, then --schedule: linear decay to zero, or constant as in Diffusion-DPO."""
    if step < cfg.warmup_steps or cfg.schedule == "constant":
        return cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps))
    return cfg.lr * (cfg.steps - step) / (cfg.steps - cfg.warmup_steps)


def check_gradient(step, grad_norm, norm):
    """End a run that learns nothing, or whose gradient is no number. `norm` is grad_norm (), as a float."""
    if step == 0 and grad_norm == 0:
        fail("step 0: the gradient is zero; do these lists prefer anything? Raise --global_batch_size")
    if not np.isfinite(norm):
        mend = "lower --lr or --beta, or try --precision fp32. The last checkpoint is kept"
        fail(f"step {step}: the gradient is {norm}; {mend}")


def complete(cfg, pipe):
    """The options with what suits the model where they were not given."""
    scale = pipelines.scale_of(pipe)
    beta, lr, lr_adapters, loser_weight = SUITS[scale]
    suits = dict(beta=beta, lr=lr_adapters if cfg.lora_rank else lr, loser_weight=loser_weight)
    suits.update({f"sample_{name}": value for name, value in pipelines.family_of(pipe).suits(pipe).items()})
    return common.fill_in(cfg, suits, f"{scale} model")


@common.one_line_errors
def main(argv=None):
    cfg = common.parse(Config, __doc__, argv)
    if cfg.plan:
        return memory.print_plan(cfg)
    cfg = with_defaults(cfg)
    check_options(cfg)
    memory.use_expandable_segments()
    device, (rank, world) = common.start_processes(cfg.device), process_rank()
    free = memory.free_bytes(device)  # before anything is there
    dtype = common.pick_dtype(cfg.precision, device)
    autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
    out = store.own_folder("out", cfg.out, "another rankdpo.py is at work in it")

    # ---- lists: which are trained on, in which order, and which of them are encoded already
    cfg, rows = common.from_first(lists.read_lists, cfg)
    rows = expert_rows(cfg, rows) if cfg.loss == "dro" else rows
    labels, sizes = stack_labels(cfg, rows), lists.encoded_sizes(cfg, rows)
    train_lists, held_out = split(rows, cfg.holdout, cfg.seed)
    order = draw_order(cfg, lists.by_size(sizes, train_lists))
    wanted = {*order.flatten().tolist(), *held_out}
    cache, missing = lists.find_cache(cfg, rows, dtype, wanted)

    # ---- the base, its defaults, and the newest checkpoint of this very run
    encodes = not cfg.model.startswith("random:")  # which is a denoiser alone
    encoders = bool(cfg.sample_every or (encodes and (missing or cfg.caption_dropout)))
    pipe, family, part, denoiser = engine.load_base(cfg, device, dtype, encoders)
    cfg = complete(cfg, pipe)
    recipe = common.from_first(engine.recipe_of, cfg, fields(Method), rows, denoiser)
    checkpoint_folder, start_step = common.from_first(engine.find_checkpoint, cfg, recipe)
    if start_step == cfg.steps and not checkpoint_folder:
        return  # it was finished before

    # ---- latents and text encoded once; the memory setting; what samples need
    lists.encode(cfg, rows, sizes, pipe, device, dtype, cache, missing)
    largest = lists.read_cached(cache, max(wanted, key=lambda n: np.prod(sizes[n])))
    cfg, flops = memory.choose(cfg, family, denoiser, largest, labels.mask.shape[1], dtype, device, free)
    no_caption = pipelines.encode_nothing(pipe, device, dtype) if cfg.caption_dropout and encoders else {}
    check = checker(cfg.data, rows)  # None unless these are lists of the toy world
    samples = engine.prepare_samples(cfg, pipe, rows, sizes[order[0, 0]], device, dtype, check)
    data, pipe = Data(cache, labels, pipe.scheduler, no_caption, device, dtype), None  # encoders are done

    # ---- networks and optimiser. The reference is a frozen copy of the policy, with --lora_rank a second set
    # of adapters in the same network. Several processes shard whole networks and their moments (FSDP2), and
    # each holds all adapters.
    networks = engine.build_networks(cfg, family, denoiser, device, dtype)
    policy, reference, sampler, average = networks
    parameters = [p for p in engine.weights(policy).values() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    with autocast:
        exam = held_out_passes(cfg, family, data, lists.by_size(sizes, held_out), reference)
    if checkpoint_folder:  # weights of the policy and of what was copied from it, and AdamW's moments
        engine.load_checkpoint(checkpoint_folder, engine.training_state(cfg, networks, optimizer))
    engine.check_finite(parameters, device, f"{cfg.model}: holds weights that are not finite")
    if samples and not start_step:
        engine.draw_samples(cfg, samples, policy, autocast, 0)
    if rank == 0:
        log = engine.Log(cfg, len(train_lists), len(held_out), start_step, flops / world, device, dtype)

    # ---- the training loop
    stop, batches = engine.signals(), read_ahead(cfg, data, order, start_step)
    passes = -(-cfg.global_batch_size // world // cfg.device_batch_size)  # of a step: gradient accumulation
    average_of = world if engine.is_sharded(cfg) else 1  # FSDP2 averages gradients over processes
    steps = range(start_step, cfg.steps)
    for step in (bar := tqdm(steps, "train", cfg.steps, initial=start_step, disable=rank > 0)):
        # ---- copies of the policy, and the rate
        if cfg.ref_refresh and step and step % cfg.ref_refresh == 0:
            engine.copy_weights(policy, reference)  # BalancedDPO: ref <- theta
        if sampler and step % cfg.sampler_refresh == 0:
            engine.copy_weights(policy, sampler)  # Diffusion-DRO
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)

        # ---- gradient: errors of both networks on the same x_t, then the loss of each list
        metrics = []
        for i in range(passes):
            engine.ends_step(policy, i == passes - 1)
            positions, batch = next(batches)
            with autocast:
                if sampler:  # the second image of each list becomes the policy's own
                    batch = add_negatives(cfg, family, data.scheduler, sampler, batch, positions)
                with torch.no_grad():
                    ref_err = errors(family, reference, batch, cfg.images_per_forward)  # (B, K)
                policy_err = errors(family, policy, batch, cfg.images_per_forward)  # (B, K)
            loss, of_pass = list_loss(cfg, policy_err, ref_err, batch)  # (B,), {name: (B,)}
            (loss.sum() * average_of / cfg.global_batch_size).backward()  # mean over the lists of the step
            metrics.append(of_pass)

        # ---- update
        grad_norm = engine.clip_grad_norm(parameters, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:  # its decay starts low, so that the first weights do not weigh for long
            engine.copy_weights(policy, average, 1 - min(cfg.ema, (1 + step) / (10 + step)))

        # ---- record
        row = {"step": step, **summarise(metrics, grad_norm=grad_norm), "lr": optimizer.param_groups[0]["lr"]}
        check_gradient(step, grad_norm, row["grad_norm"])
        tuned = average or policy  # what will be saved
        if held_out and due(cfg.eval_every, step):
            with autocast:
                row.update(measure_held_out(cfg, family, data, exam, tuned, networks))
        if samples and due(cfg.sample_every, step):
            row["samples"] = engine.draw_samples(cfg, samples, tuned, autocast, step + 1)
        if due(cfg.export_every, step):
            row["exported"] = f"model-{step + 1:06d}"
            engine.save_model(cfg, row["exported"], tuned, part, log.card() if rank == 0 else {})
        stopping = engine.any_process(bool(stop), device)
        if rank == 0:
            bar.set_postfix(log.write(row, stopping))

        # ---- save
        if stopping or due(cfg.save_every, step):
            engine.save_checkpoint(cfg, engine.training_state(cfg, networks, optimizer), recipe, step + 1)
        if stopping:
            mend = f"goes on there; with --export_every {step + 2} it also writes model-{step + 2:06d}"
            fail(f"stopped after {step + 1} steps; the same command {mend}", stop[0] if stop else 143)

    engine.check_finite(parameters, device, "the weights are not finite and not saved; lower --lr")
    about = log.close() if rank == 0 else {}
    engine.save_model(cfg, "model", average or policy, part, about)
    common.print_first(f"{out}: log.jsonl, curves.png, and the tuned model in model/")


if __name__ == "__main__":
    main()
