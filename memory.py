"""What a training run takes, counted before it starts: FLOPs, bytes, and the memory setting that fits a GPU.

    python memory.py --model random:sdxl                    # the plan for 1 and 8 GPUs of 24, 40 and 80 GB
    python memory.py --model random:flux --lora_rank 64 --gpus 1 --gb 40
    cfg, flops = memory.choose(cfg, family, denoiser, item, K, dtype, device, memory.free_bytes(device))

Nothing is computed and no weight is read: FLOPs are counted on the meta device, bytes on fake tensors.
"""

import math
import os
import weakref
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import common
import pipelines
from common import HERE, fail, option, process_rank

LOSSES = ("rankdpo", "dpo", "gain", "balanced", "direct", "random_scorer", "sft", "weighted", "dro")


@dataclass
class Plan:
    """The trainer's options that decide what a run takes, under the trainer's names, and the GPUs."""

    model: str = option(f"{HERE}/toy/models/sdxl", "what to tune: folder, hub id or random:sdxl")
    loss: str = option("rankdpo", "the objective; dro samples and keeps one more copy of the policy", LOSSES)
    k: int = option(None, "images a list (default: 4; 2 for dro)", above=0)
    resolution: int = option(0, "side of the images in pixels; 0 = the model's own", at_least=0)
    lora_rank: int = option(0, "train adapters of this rank; 0 = all weights", at_least=0)
    ema: float = option(0.0, "decay of an average of the weights", at_least=0, below=1)
    sampler_steps: int = option(20, "--loss dro: steps of the sampling path", above=1)
    global_batch_size: int = option(32, "lists a step, over all processes", above=0)
    precision: str = option("bf16", "of the forward pass", ("fp32", "bf16", "fp64"))
    device_batch_size: int = option(None, "lists a forward pass on one device", above=0)
    images_per_forward: int = option(None, "images a pass; 0 = all", at_least=0)
    gradient_checkpointing: bool = option(None, "recompute activations in the backward pass")
    keep_gathered: bool = option(None, "sharded: weights are gathered, gradients reduced once a step")
    gpus: int = option(None, "GPUs (default: 1 and 8)", above=0)
    gb: float = option(None, "memory of each GPU in GB, 1e9 bytes (default: 24, 40 and 80)", above=0)


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


def fake_like(t):
    """Of a tensor on the meta device, under FakeTensorMode: a fake one on the CPU."""
    return torch.empty(t.shape, dtype=t.dtype)


def make_fake(module):
    """Exchange a module's parameters, buffers and constants for fake ones."""
    for values in (module._parameters, module._buffers, vars(module)):
        for name, t in [(n, t) for n, t in values.items() if isinstance(t, torch.Tensor)]:
            is_parameter = isinstance(t, torch.nn.Parameter)
            values[name] = torch.nn.Parameter(fake_like(t), t.requires_grad) if is_parameter else fake_like(t)


def count_bytes(family, denoiser, item, lora_rank, dtype, recompute):
    """Bytes that an image takes at the peak of the policy's forward and backward, beside weights, their
    copies in the compute type, and gradients. The fake tensors lie on the CPU, whose attention keeps as
    little as a GPU's."""
    half = dtype == torch.bfloat16
    network, *inputs = stand_in(denoiser, item, lora_rank)
    if recompute:
        network.enable_gradient_checkpointing()
    with FakeTensorMode(), LiveBytes() as live, torch.autocast("cpu", dtype, half):
        for module in network.modules():
            make_fake(module)
            if half and "Norm" in type(module).__name__:  # in fp32, as under a GPU's autocast
                module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        for p in network.parameters():
            if p.requires_grad:  # the caller counts gradients
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        x, t, cond = tree_map_only(torch.Tensor, fake_like, tuple(inputs))
        live.begin()
        family.predict(network, x, t, cond).float().square().sum().backward()
    return live.peak


def weight_bytes(cfg, trained, frozen, dtype, gpus, keep_gathered):
    """Bytes of weights, gradients and AdamW's moments on each of several GPUs."""
    wide, half = max(4, dtype.itemsize), dtype.itemsize
    # weights, gradients, two moments; an average; a sampler
    own = (4 + (cfg.ema > 0) + (cfg.loss == "dro")) * wide * trained
    if cfg.lora_rank:
        return own + wide * trained + half * frozen  # the reference's adapters; the frozen weights
    if gpus == 1:
        cast = half if half < wide else 0  # autocast's copy of the policy
        return own + (half + cast) * trained
    gathered = (2 * half + wide) * trained if keep_gathered else 0  # policy, reference, whole gradients
    return (own + wide * trained) / gpus + gathered


# ----------------------------------------------------------------------------- the setting that fits

USABLE = 0.92  # share of a GPU's free memory; the rest is for fragments, NCCL and kernels


def free_bytes(device):
    """Memory of a GPU that may be used, the least of all processes. Infinite elsewhere."""
    if device.type != "cuda":
        return math.inf
    free = torch.tensor(float(torch.cuda.mem_get_info(device)[0]), device=device)
    if process_rank()[1] > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return USABLE * free.item()


Setting = namedtuple("Setting", "options gb time fits")  # `time`: over that of the least passes


def fastest(cfg, K, images, weights, free, gpus):
    """The fastest memory setting in `free` bytes, or the smallest; options that are given stay. `images`:
    {recompute: bytes an image}, `weights`: keep_gathered -> bytes."""
    local, sharded = max(1, cfg.global_batch_size // gpus), gpus > 1 and not cfg.lora_rank
    machines = gpus // int(os.environ.get("LOCAL_WORLD_SIZE", gpus)) or 1
    keeps = [sharded and cfg.keep_gathered] if cfg.keep_gathered is not None else {sharded, False}
    recomputes = (False, True) if cfg.gradient_checkpointing is None else [cfg.gradient_checkpointing]
    settings = []
    for keep, recompute in product(keeps, recomputes):
        fit = 10**6  # images
        if free < math.inf:
            fit = max(1, int((free - weights(keep)) / images[recompute]))
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
        settings.append(Setting(options, needed / 1e9, factor, needed <= free))
    return min(settings, key=lambda s: (not s.fits, s.time if s.fits else s.gb))


def describe(setting):
    options = [f"--{name} {str(value).lower()}" for name, value in setting.options.items()]
    fits = "" if setting.fits else ", DOES NOT FIT"
    return f"{' '.join(options)}: {setting.gb:.1f} GB, {setting.time:.2f} x the time{fits}"


def count(cfg, family, denoiser, item, K, dtype, bytes_too):
    """(FLOPs of a list of K images, recomputation not counted; setting_in(free bytes, GPUs) -> a Setting).
    Prints what was counted; without `bytes_too` an image is taken to need none."""
    try:
        flops, trained, frozen = count_flops(family, denoiser, item, cfg.lora_rank)
    except Exception as e:  # where nothing is computed: only sizes and kinds can be wrong
        fail(f"{cfg.model}: the parts of the pipeline do not fit together ({' '.join(str(e).split())[:200]})")
    passes = 4 * K + (cfg.sampler_steps + 1 if cfg.loss == "dro" else 0)  # forwards; a backward takes two
    print_first(
        f"{cfg.loss}: {trained / 1e6:.1f} M parameters are trained, computed in {dtype};",
        f"a list of {K} takes {passes * flops / 4e12:.1f} TFLOP",
    )
    images = {False: 0, True: 0}
    if bytes_too:
        images = {again: count_bytes(family, denoiser, item, cfg.lora_rank, dtype, again) for again in images}
        print_first(f"an image's pass: {images[False] / 1e9:.2f} GB, recomputed {images[True] / 1e9:.2f} GB")

    def setting_in(free, gpus):
        weights = partial(weight_bytes, cfg, trained, frozen, dtype, gpus)
        return fastest(cfg, K, images, weights, free, gpus)

    return passes * flops / 4, setting_in


def print_first(*texts):
    if process_rank()[0] == 0:
        print(*texts)


def choose(cfg, family, denoiser, item, K, dtype, device, free):
    """(the options with the fastest memory setting that fits in `free` bytes of the device, FLOPs of a list
    of K images). `item` is a list as cached: {"latents": (k, C, h, w), ...}; only its shapes count."""
    on_gpu, world = device.type == "cuda", process_rank()[1]
    flops, setting_in = count(cfg, family, denoiser, item, K, dtype, bytes_too=on_gpu)
    setting = setting_in(free, world)
    if on_gpu:
        print_first(f"{free / 1e9:.1f} GB to use on each of {world}:", describe(setting))
    return replace(cfg, **setting.options), flops


# ----------------------------------------------------------------------------- the plan


@common.one_line_errors
def main(argv=None):
    cfg = common.parse(Plan, __doc__, argv)
    dtype, K = (
        common.pick_dtype(cfg.precision, torch.device("meta")),
        cfg.k or (2 if cfg.loss == "dro" else 4),
    )
    pipe = pipelines.load_pipeline(cfg.model.split("+")[0], denoiser=False, encoders=False)
    family, denoiser = pipelines.family_of(pipe, trainable=True), pipelines.denoiser_of(pipe)[1]
    shapes = family.shapes(denoiser.config)
    if cfg.resolution % (step := pipe.vae_scale_factor * family.patch):
        fail(f"--resolution {cfg.resolution}: must be a multiple of {step}")
    if cfg.resolution:
        shapes["latents"] = (shapes["latents"][0], *[cfg.resolution // pipe.vae_scale_factor] * 2)
    item = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    item["latents"] = item["latents"].expand(K, *shapes["latents"])
    _, setting_in = count(cfg, family, denoiser, item, K, dtype, bytes_too=True)
    for gpus, gb in product([cfg.gpus] if cfg.gpus else (1, 8), [cfg.gb] if cfg.gb else (24, 40, 80)):
        print(f"{gpus} x {gb:g} GB:", describe(setting_in(USABLE * gb * 1e9, gpus)))


if __name__ == "__main__":
    main()
