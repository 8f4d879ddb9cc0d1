"""What a run takes, counted before a GPU is rented: FLOPs, bytes, hours, and the memory setting that fits.

Nothing is computed and no weight is read: FLOPs are counted on the meta device, bytes on fake tensors.
docs/memory.md has these figures beside those of PyTorch's own allocator.
"""

import ctypes
import math
import os
import re
import weakref
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from itertools import product

import diffusers
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lib import formats, pipelines
from lib.common import fail, print_first, process_rank
from lib.lists import read_metadata

# ----------------------------------------------------------------------------- counting


def stand_in(denoiser, item, lora_rank):
    """(network, x, t, cond) of one image on the meta device; `item` is a list as cached."""
    with torch.device("meta"):
        network = type(denoiser).from_config(denoiser.config).eval()
        cond = {name: torch.empty(1, *t.shape) for name, t in item.items() if name != "latents"}
        x, t = torch.empty(1, *item["latents"].shape[1:]), torch.empty(1)
        if lora_rank:
            pipelines.add_adapters(network, lora_rank, torch.float32)
        return network, x, t, cond


def count_flops(family, denoiser, item, lora_rank=0):
    """(FLOPs, trained parameters, frozen ones) of one image a step: forward of the reference, forward and
    backward of the policy."""
    network, x, t, cond = stand_in(denoiser, item, lora_rank)
    with FlopCounterMode(display=False) as counter:
        prediction = family.predict(network, x, t, cond)
        forward = counter.get_total_flops()
        prediction.sum().backward()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters()) - trained
    return forward + counter.get_total_flops(), trained, frozen


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes at a time of what was computed under it since begin(). Copies of what was there
    before (weights, in the compute type) do not count: the caller knows their size."""

    def begin(self):
        self.now, self.peak, self.given = 0, 0, set(self.alive)

    def __enter__(self):
        self.now, self.peak, self.alive, self.given = 0, 0, {}, set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_cast = function is torch.ops.aten._to_copy.default
        copies = is_cast and args[0].untyped_storage()._cdata in self.given
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            key, size = storage._cdata, 0 if copies else storage.nbytes()
            if key not in self.alive:
                self.now += size
                self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self.gone(key, size))
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, size):
        self.now -= size
        del self.alive[key]


def peak_bytes(network, inputs, run, dtype):
    """Bytes at the peak of run(network, *inputs), beside weights, their casts and gradients. The fake tensors
    are on the CPU, whose attention keeps as little as a GPU's."""
    half, fake_like = dtype == torch.bfloat16, lambda t: torch.empty(t.shape, dtype=t.dtype)
    with FakeTensorMode(), LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, half):
        for module in network.modules():
            for values in (module._parameters, module._buffers, vars(module)):
                for name, t in [(n, t) for n, t in values.items() if isinstance(t, torch.Tensor)]:
                    fake, parameter = fake_like(t), isinstance(t, torch.nn.Parameter)
                    values[name] = torch.nn.Parameter(fake, t.requires_grad) if parameter else fake
            if half and "Norm" in type(module).__name__:  # in fp32, as under a GPU's autocast
                module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        for p in network.parameters():
            if p.requires_grad:  # the caller counts gradients
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        inputs = tree_map_only(torch.Tensor, fake_like, tuple(inputs))
        live.begin()
        run(network, *inputs)
    return live.peak


def count_bytes(family, denoiser, item, lora_rank, dtype, recompute):
    """Bytes that an image takes at the peak of the policy's forward and backward."""
    network, *inputs = stand_in(denoiser, item, lora_rank)
    if recompute:
        network.enable_gradient_checkpointing()
    return peak_bytes(network, inputs, lambda *a: family.predict(*a).float().square().sum().backward(), dtype)


@torch.no_grad()
def count_forward(network, inputs, run, dtype):
    """(FLOPs, bytes at the peak) of run(network, *inputs) on meta tensors, without gradient."""
    with FlopCounterMode(display=False) as counter:
        run(network, *inputs)
    return counter.get_total_flops(), peak_bytes(network, inputs, run, dtype)


def count_vae(family, latents, way):
    """(FLOPs, bytes at the peak, parameters) of an image in fp32 through encode or decode of the VAE that the
    published pipelines of the family have."""
    down, up, widths = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, (128, 256, 512, 512)
    shape = (1, 3, 8 * latents[1], 8 * latents[2]) if way == "encode" else (1, *latents)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(3, 3, down, up, widths, 2, latent_channels=latents[0])
        if family is pipelines.TRAINABLE["qwen"]:  # its VAE is one of videos; a picture is the only frame
            vae, shape = diffusers.AutoencoderKLQwenImage(), (*shape[:2], 1, *shape[2:])
        x = torch.empty(shape)
    parameters = sum(p.numel() for p in vae.parameters())
    return *count_forward(vae, [x], lambda vae, x: getattr(vae, way)(x), torch.float32), parameters


def weight_bytes(cfg, trained, frozen, dtype, gpus, keep_gathered):
    """Bytes of weights, gradients and AdamW's moments on each of several GPUs."""
    wide, half, sampler = max(4, dtype.itemsize), dtype.itemsize, cfg.loss == "dro"
    own = (4 + (cfg.ema > 0)) * wide * trained  # weights, gradients, two moments; an average
    if cfg.lora_rank:
        return own + (1 + sampler) * wide * trained + half * frozen
    if gpus == 1:
        cast = half if half < wide else 0  # autocast's copy of the policy
        return own + ((1 + sampler) * half + cast) * trained
    gathered = ((2 + sampler) * half + wide) * trained if keep_gathered else 0  # networks, whole gradients
    return (own + (1 + sampler) * wide * trained) / gpus + gathered


# ----------------------------------------------------------------------------- the setting that fits

# Beside what is counted a GPU holds what the CUDA context, cuBLAS, cuDNN and NCCL take, and the fragments of
# PyTorch's allocator: a share of the weights, and one of what a step computes, by whether it is recomputed.
LIBRARIES = 2e9
FRAGMENTS_OF_WEIGHTS, FRAGMENTS = 0.06, {False: 0.15, True: 0.4}  # docs/memory.md has the table behind them


def use_expandable_segments():
    """Let PyTorch's allocator extend its segments, so that hardly any fragments are left. Call it before the
    first use of a GPU. What the environment says stays; a GPU without virtual memory cannot."""
    name = "PYTORCH_ALLOC_CONF" if torch.__version__ >= "2.9" else "PYTORCH_CUDA_ALLOC_CONF"
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        with suppress(OSError, AttributeError):  # there is no driver
            driver, has_it = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
            driver.cuInit(0)
            driver.cuDeviceGetAttribute(ctypes.byref(has_it), 102, 0)  # VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
            os.environ.update({name: "expandable_segments:True"} if has_it.value else {})


def free_bytes(device):
    """What PyTorch's allocator may reserve on a GPU, the least of all processes. Infinite elsewhere."""
    if device.type != "cuda":
        return math.inf
    free = torch.tensor(float(torch.cuda.mem_get_info(device)[0]), device=device)
    if process_rank()[1] > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return free.item() - LIBRARIES


# `gb` are allocated, `reserved` with fragments; `time` is relative to the setting with the fewest passes
Setting = namedtuple("Setting", "options gb reserved time fits")


def fastest(cfg, K, images, weights, free, gpus, samples=0):
    """The fastest memory setting in `free` bytes, or the smallest; options that are given stay. `images`:
    {recompute: bytes an image}; `weights`: keep_gathered -> bytes; `samples`: bytes of sampling pictures."""
    local, sharded = max(1, cfg.global_batch_size // gpus), gpus > 1 and not cfg.lora_rank
    machines = gpus // int(os.environ.get("LOCAL_WORLD_SIZE", gpus)) or 1
    keeps = [sharded and cfg.keep_gathered] if cfg.keep_gathered is not None else {sharded, False}
    recomputes = (False, True) if cfg.gradient_checkpointing is None else [cfg.gradient_checkpointing]
    settings = []
    for keep, recompute in product(keeps, recomputes):
        fit, lying = 10**6, weights(keep) * (1 + FRAGMENTS_OF_WEIGHTS)  # images; bytes
        if free < math.inf:
            fit = max(1, int((free - lying) / images[recompute] / (1 + FRAGMENTS[recompute])))
        lists = min(cfg.device_batch_size or min(32, max(1, fit // K)), local)
        together = cfg.images_per_forward
        if together is None:
            together = 0 if lists * K <= fit else fit
        computed = max(images[recompute] * (min(together, lists * K) or lists * K), samples)
        needed, reserved = weights(keep) + computed, lying + computed * (1 + FRAGMENTS[recompute])
        # in forward passes: reference 1, policy 1, backward 2; recomputing adds .8; gathering in each pass
        # adds a fifth, between machines it doubles the time
        passes = 4 + 0.8 * recompute + (0 < together < lists * K)
        factor = passes / 4 * (1 if keep or not sharded else 1.2 if machines == 1 else 2)
        options = dict(device_batch_size=lists, images_per_forward=together, gradient_checkpointing=recompute)
        options["keep_gathered"] = keep
        settings.append(Setting(options, needed / 1e9, reserved / 1e9, factor, reserved <= free))
    return min(settings, key=lambda s: (not s.fits, s.time if s.fits else s.gb))


def describe(setting):
    options = [f"--{name} {str(value).lower()}" for name, value in setting.options.items()]
    size = f"{setting.gb:.1f} GB, {setting.reserved:.1f} with fragments, {setting.time:.2f} x the time"
    return f"{' '.join(options)}: {size}{'' if setting.fits else ', DOES NOT FIT'}"


def count(cfg, family, denoiser, item, K, dtype, on_gpu):
    """(FLOPs of a list of K images, recomputation not counted; setting_in(free bytes, GPUs) -> a Setting).
    Prints what was counted. Without `on_gpu` an image is taken to need no memory."""
    try:
        flops, trained, frozen = count_flops(family, denoiser, item, cfg.lora_rank)
    except Exception as e:  # where nothing is computed: only sizes and kinds can be wrong
        fail(f"{cfg.model}: the parts of the pipeline do not fit together ({' '.join(str(e).split())[:200]})")
    passes = 4 * K + (pipelines.SAMPLER_STEPS + 1 if cfg.loss == "dro" else 0)  # a backward is two
    size, cost = f"{trained / 1e6:.1f} M parameters", f"a list of {K} takes {passes * flops / 4e12:.4g} TFLOP"
    print_first(f"{cfg.loss}: {size} are trained, computed in {dtype}; {cost}")
    images, samples = {False: 0, True: 0}, 0
    if on_gpu:
        images = {again: count_bytes(family, denoiser, item, cfg.lora_rank, dtype, again) for again in images}
        print_first(f"an image's pass: {images[False] / 1e9:.2f} GB, recomputed {images[True] / 1e9:.2f} GB")
    if on_gpu and cfg.sample_every:  # guidance predicts each picture twice, with and without its prompt
        network, *inputs = stand_in(denoiser, item, 0)
        _, kept = count_forward(network, inputs, family.predict, dtype)
        samples = 2 * cfg.sample_prompts * kept
        print_first(f"{cfg.sample_prompts} samples: {samples / 1e9:.2f} GB beside the weights")

    def setting_in(free, gpus):
        weights = lambda keep: weight_bytes(cfg, trained, frozen, dtype, gpus, keep)
        return fastest(cfg, K, images, weights, free, gpus, samples)

    return passes * flops / 4, setting_in


def choose(cfg, family, denoiser, item, K, dtype, device, free):
    """(the options with the fastest memory setting that fits in `free` bytes of the device, FLOPs of a list
    of K images). `item` is a list as cached: {"latents": (k, C, h, w), ...}; only its shapes count."""
    on_gpu, world = device.type == "cuda", process_rank()[1]
    flops, setting_in = count(cfg, family, denoiser, item, K, dtype, on_gpu)
    setting = setting_in(free, world)
    if on_gpu:
        print_first(f"{free / 1e9:.1f} GB to use on each of {world}: {describe(setting)}")
    return replace(cfg, **setting.options), flops


# ----------------------------------------------------------------------------- the plan

RATES = {"A100 at 100 TFLOP/s": 100, "A100 at 200": 200, "H100 at 400": 400}  # assumed
ENCODERS = {"sd15": 0.123, "sdxl": 0.818, "sd3": 5.58, "flux": 4.885, "qwen": 8.292}  # of text, 1e9
# (1e9 parameters, MB of a picture in fp32: tokens x (4 widths + MLP) x 4 bytes at the widest layer)
SCORING = {
    "clip, hpsv2, hpsv2.1, pickscore, diversity": (0.986, 16),
    "imagereward, cyclereward": (0.447, 10),
    "mps": (1.1, 25),
    "aesthetic": (0.428, 13),
    "vqascore-xl": (3.15, 60),
    "vqascore": (11.3, 120),
    "hpsv3": (8.29, 142),
}


def read_cards(plan):
    """[(GPUs, GB of 1e9 bytes)] of --plan 24 8x80."""
    cards = [re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*(?:\.\d+)?)", text) for text in plan]
    if None in cards:
        wrong = plan[cards.index(None)]
        fail(f"--plan {wrong}: expected the GB of a GPU, as 24, or GPUs x GB, as 8x80", 2)
    return [(int(card[1] or 1), float(card[2])) for card in cards]


def largest_batch(gb, weights, image):
    """The images at once that fit beside `weights` bytes, of `image` bytes each."""
    fit = int((gb * 1e9 - LIBRARIES - weights) / image / (1 + FRAGMENTS[True]))
    return f"--batch_size {fit}" if fit > 0 else "DOES NOT FIT"


def print_hours(what, flops, gpus):
    each = [f"{flops / (1e12 * rate) / gpus / 3600:.1f} on an {name}" for name, rate in RATES.items()]
    print(f"hours of {what} on {gpus} GPU{'s' * (gpus > 1)}: {', '.join(each)}")


def plan_training(cfg, cards, family, denoiser, item, lists, dtype, text):
    K, latents = len(item["latents"]), item["latents"].shape[1:]
    flops, setting_in = count(cfg, family, denoiser, item, K, dtype, on_gpu=True)
    encode, encoded, vae = count_vae(family, latents, "encode")
    _, decoded, _ = count_vae(family, latents, "decode")
    encoding = 4 * vae + dtype.itemsize * text + K * encoded
    print(f"encoding lists of {K}: {encoding / 1e9:.1f} GB, before anything else is on the GPU")
    print(f"a sample: {decoded / 1e9:.1f} GB to decode beside the weights, or less in tiles; a checkpoint: 0")
    for gpus, gb in cards:
        print(f"{gpus} x {gb:g} GB:", describe(setting := setting_in(gb * 1e9 - LIBRARIES, gpus)))
        print_hours("training", cfg.steps * cfg.global_batch_size * flops * setting.time, gpus)
        print_hours(f"encoding {lists} lists, at half these rates in TF32,", 2 * lists * K * encode, gpus)


def plan_drawing(cards, family, denoiser, item, lists, dtype, text, suits):
    guided = 2 if suits["guidance"] and not denoiser.config.get("guidance_embeds") else 1
    network, *inputs = stand_in(denoiser, item, 0)
    forward, kept = count_forward(network, inputs, family.predict, dtype)
    decode, decoded, vae = count_vae(family, item["latents"].shape[1:], "decode")
    weights = dtype.itemsize * (sum(p.numel() for p in denoiser.parameters()) + vae + text)
    image = max(guided * kept, decoded * dtype.itemsize / 4)
    flops = suits["steps"] * guided * forward + decode
    print(f"weights {weights / 1e9:.1f} GB, a picture {image / 1e9:.2f} GB more, {flops / 1e12:.0f} TFLOP")
    for gpus, gb in cards:
        print(f"{gpus} x {gb:g} GB:", largest_batch(gb, weights, image))
        print_hours(f"drawing {lists} pictures", lists * flops, gpus)


def print_plan(cfg):
    """--plan: memory and hours of training, of drawing with this model and of scoring, for each kind of card.
    K and the number of lists are those of --data where it is named, else the paper's."""
    cards, dtype = read_cards(cfg.plan), torch.bfloat16
    pipe = pipelines.load_pipeline(formats.split_spec(cfg.model)[0], denoiser=False, encoders=False)
    family, denoiser = pipelines.family_of(pipe, trainable=True), pipelines.denoiser_of(pipe)[1]
    K, lists = 2 if cfg.loss == "dro" else 4, 58_000
    if cfg.data not in ("random", type(cfg).data):
        rows = read_metadata(cfg.data)
        K, lists = len(rows[0]["file_names"]), len(rows)
    shapes = pipelines.shapes_at(pipe, cfg.resolution)
    item = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    item["latents"] = item["latents"].expand(K, *shapes["latents"])
    text = next(1e9 * ENCODERS[name] for name, known in pipelines.TRAINABLE.items() if known is family)
    print("---- training")
    plan_training(cfg, cards, family, denoiser, item, lists, dtype, text)
    print("---- drawing with this model")
    plan_drawing(cards, family, denoiser, item, lists, dtype, text, family.suits(pipe))
    print("---- scoring: one reward after the other, so each has the GPU to itself; NAME-bf16 takes half")
    for name, (parameters, picture) in SCORING.items():
        fits = [f"{gb:g} GB: {largest_batch(gb, 4e9 * parameters, 1e6 * picture)}" for _, gb in cards]
        print(f"{name}, {4 * parameters:.1f} GB in fp32; {'; '.join(fits)}")
