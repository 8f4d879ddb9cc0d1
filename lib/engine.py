"""Devices, not the method: networks and their copies, shards, clipping, checkpoints, the log, samples.

    networks = build_networks(cfg, family, module, device, dtype)  # policy, reference, sampler, average
    copy_weights(policy, reference)                                # BalancedDPO: reference <- policy
    ends_step(policy, last)                                        # FSDP2: reduce gradients, or wait
    save_checkpoint(cfg, training_state(...), recipe, step)        # for any number of processes

A copy of the policy is called like the policy. Of all weights each copy is a network of its own; of adapters
each copy is a second set in the same network. One process runs plain, several shard all weights (FSDP2) and
keep adapters whole.
"""

import copy
import importlib
import json
import os
import re
import secrets
import signal
import sys
import time
import warnings
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from tqdm import tqdm

from lib import common, formats, pictures, pipelines, store, tables
from lib.common import fail, process_rank

# on purpose: one process saves for itself, and copies of adapters are sets of one network
warnings.filterwarnings("ignore", "torch.distributed is disabled|Already found a `peft_config`")

# ----------------------------------------------------------------------------- networks


def load_base(cfg, device, dtype, encoders):
    """The pipeline of --model, with no weights but those that this process uses, its family, and the name and
    module of its denoiser."""
    place = "cpu", torch.float32
    if cfg.model.startswith("random:") and not is_sharded(cfg):  # made in the type that they will have
        place = device, dtype if cfg.lora_rank else torch.float32
    denoiser = process_rank()[0] == 0
    pipe = pipelines.load_pipeline(cfg.model, *place, denoiser=denoiser, encoders=encoders)
    common.wait_for_all(slow=True)  # the first process may have fetched the weights from the hub
    family = pipelines.family_of(pipe, trainable=True)
    if encoders and (missing := [name for name in family.encoders if getattr(pipe, name) is None]):
        fail(f"{cfg.model}: has no {', '.join(missing)}, which lists, samples or dropped captions need")
    return pipe, family, *pipelines.denoiser_of(pipe)


Networks = namedtuple("Networks", "policy reference sampler average")  # the last two are None without use


class AdapterSet:
    """A set of adapters of a network, called like a network of its own."""

    def __init__(self, network, name):
        self.network, self.name = network, name

    def __call__(self, *args, **kwargs):
        return self.selected()(*args, **kwargs)

    def __getattr__(self, name):  # its config
        return getattr(self.network, name)

    def selected(self):
        """The network, with this set switched on."""
        if self.network.active_adapters() != [self.name]:
            self.network.set_adapter(self.name)
        return self.network


def module_of(network):
    """The torch module of a network. peft trains the set that is switched on, and freezes the others."""
    return network.selected() if isinstance(network, AdapterSet) else network


def weights(network):
    """{name: parameter} of a network, or of an adapter set under the names that all sets share."""
    named = module_of(network).named_parameters()
    if isinstance(network, AdapterSet):
        tag = f".{network.name}."
        return {name.replace(tag, "."): p for name, p in named if tag in name}
    return dict(named)


def build_networks(cfg, family, policy, device, dtype):
    """Networks of the denoiser `policy`, on the device. Trained weights are fp32, as loaded, or fp64."""
    world, sharded = process_rank()[1], is_sharded(cfg)
    copies = ["reference", *(["sampler"] if cfg.loss == "dro" else []), *(["average"] if cfg.ema else [])]
    policy.eval()  # so that s is exactly 0 where policy = reference
    if dtype == torch.float64 or cfg.lora_rank:
        policy.to(dtype)
    if cfg.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    values = to_meta(policy) if world > 1 else None
    if not sharded:
        if values:
            receive(policy, values, device)
        policy.to(device)
        if device.type == "cuda":  # faster convolutions; FSDP2 wants contiguous weights
            policy.to(memory_format=torch.channels_last)
    if cfg.lora_rank:  # small enough to be whole on each process
        for name in ("policy", *copies):
            pipelines.add_adapters(policy, cfg.lora_rank, dtype, name)
        networks = {name: AdapterSet(policy, name) for name in ("policy", *copies)}
    else:
        for name, p in policy.named_parameters():
            p.requires_grad_(not name.startswith(family.unused(policy)))
        # sharded, these copies are on the meta device and take no memory
        copied = {name: copy.deepcopy(policy).requires_grad_(False) for name in copies}
        networks = {"policy": policy, **copied}
    for name, network in networks.items():
        if sharded:
            shard(network, dtype, device, cfg.keep_gathered)
            receive(network, values, device, like=None if name == "policy" else policy)
        elif cfg.lora_rank:
            copy_weights(networks["policy"], network)
        elif name in ("reference", "sampler"):
            in_compute_type(network, dtype)
    return Networks(*(networks.get(name) for name in Networks._fields))


def is_sharded(cfg):
    return process_rank()[1] > 1 and not cfg.lora_rank


def in_compute_type(network, dtype):
    """A frozen copy's weights that autocast would round to bf16 at every pass are rounded once. Norms compute
    in fp32 and stay as they are, so the copy predicts what it did."""
    for module in network.modules() if dtype == torch.bfloat16 else ():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(dtype)


@torch.no_grad()
def copy_weights(policy, into, share=1.0):
    """into <- policy; with a share, into <- into + share (policy - into), a moving average. Each process
    copies its own shards, so gathered weights, which would be stale afterwards, are dropped first."""
    reshard(policy)
    reshard(into)
    source, target = weights(policy), weights(into)
    for name, p in source.items():
        if share == 1:
            target[name].copy_(p)
        else:
            target[name].lerp_(p, share)


# ----------------------------------------------------------------------------- several processes


def shard(network, dtype, device, keep_gathered):
    """FSDP2: each block that diffusers names is a unit, and the rest is one. Weights and reductions are fp32,
    gathered weights `dtype`. Inputs stay fp32 until autocast: bf16 would round SDXL's time ids."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))  # --device, whatever else is there
    half = dtype if dtype == torch.bfloat16 else None
    precision = MixedPrecisionPolicy(half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
    for module in reversed(list(network.modules())):  # children before parents
        if module is network or type(module).__name__ in (network._no_split_modules or ()):
            # FSDP2 would leave the root gathered unless it is told otherwise
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=not keep_gathered)
    network.keep_gathered = keep_gathered


def reshard(network):
    """FSDP2: drop gathered weights, which are stale once the shards change."""
    for module in module_of(network).modules():
        if hasattr(module, "reshard"):
            module.reshard()


def ends_step(policy, last):
    """FSDP2 with --keep_gathered: only the last backward pass of a step reduces gradients and drops gathered
    weights. Before that, gradients stay whole on each process."""
    if getattr(policy, "keep_gathered", False):
        policy.set_requires_gradient_sync(last)
        policy.set_reshard_after_backward(last)
        policy.last = last


def ends_with(policy, first_part):
    """The same where a batch is predicted in parts: autograd goes through them backwards, so the pass of the
    first part is the last."""
    if getattr(policy, "last", False) and first_part.requires_grad:
        ends_step(policy, False)
        first_part.register_hook(lambda _: ends_step(policy, True))


def to_meta(model):
    """Take a model's values out of it: (state, constants) on the process that has read them, else ({}, {}).
    Constants are buffers that are not saved and tensors that a module keeps as mere attributes."""
    state, constants = {}, {}
    if process_rank()[0] == 0:
        state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        for path, module in model.named_modules():
            unsaved = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
            unsaved.update({name: v for name, v in vars(module).items() if isinstance(v, torch.Tensor)})
            constants.update({(path, name): value for name, value in unsaved.items() if value is not None})
    model.to("meta")
    torch.cuda.empty_cache()  # no GPU holds the weights twice
    return state, constants


def receive(model, values, device, like=None):
    """Give the model on each process its shards of what the first process has, so that no other process holds
    a whole copy; or its shards of the model `like`."""
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


def gather(rows):
    """Concatenate the rows (n, M) of all processes in the order of their ranks -> (world n, M)."""
    if process_rank()[1] == 1:
        return rows
    whole = [torch.empty_like(rows) for _ in range(process_rank()[1])]
    dist.all_gather(whole, rows.contiguous())
    return torch.cat(whole)


def to_device(t, device):
    """Copy a CPU tensor to the device; the caller does not wait for a copy to a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    return t.pin_memory().to(device, non_blocking=True) if on_gpu else t.to(device)


def any_process(flag, device):
    """True on every process if the flag is set on one of them."""
    if process_rank()[1] == 1:
        return bool(flag)
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value)
    return bool(value)


def check_finite(values, device, message):
    """End the run on every process if one of the tensors holds inf or nan."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in values]
    if any_process(not torch.stack([p.isfinite().all() for p in local]).all(), device):
        fail(message)


def signals():
    """A list that a SIGTERM or Ctrl-C puts its exit status into. A second Ctrl-C ends the run at once."""
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append(143))
    signal.signal(signal.SIGINT, lambda *_: came.append(130) or signal.signal(signal.SIGINT, signal.SIG_DFL))
    return came


def clip_grad_norm(parameters, largest):
    """The gradient's norm, () on every process, after clipping it to `largest`; 0 = no clipping. Adapters are
    whole on each process: their gradients are summed here."""
    for p in parameters if process_rank()[1] > 1 else ():
        if not hasattr(p, "full_tensor"):
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ----------------------------------------------------------------------------- checkpoints


def training_state(cfg, networks, optimizer):
    """All that the next step depends on, as one flat {name: tensor}. The step determines data, noise and
    learning rate. The reference is part of it where it is refreshed, else every run begins with it."""
    kept = networks if cfg.ref_refresh else networks._replace(reference=None)
    for network in filter(None, networks):
        reshard(network)  # weights are their shards
    trained = {name: p for name, p in weights(networks.policy).items() if p.requires_grad}
    state = {}
    for kind, network in kept._asdict().items():
        values = weights(network) if network else {}
        state.update({f"{kind}.{name}": values[name].detach() for name in trained if values})
    for name, p in trained.items():
        moments = moments_of(optimizer, p)
        state.update({f"optimizer.{name}.{key}": moment for key, moment in moments.items()})
    return state


def moments_of(optimizer, p):
    """AdamW's state of a parameter; before the first step, the zeros that AdamW would start from."""
    if p not in optimizer.state:
        count = torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu")
        moments = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": count, **moments}
    return optimizer.state[p]


def save_checkpoint(cfg, state, recipe, step):
    """out/checkpoints/step-000100, by all processes: shards as safetensors, and the run's recipe.json.
    safetensors wants contiguous tensors: a GPU's channels_last weights are laid out on the CPU."""
    (rank, world), final = process_rank(), Path(cfg.out) / f"checkpoints/step-{step:06d}"
    tmp = Path(common.from_first(store.begin, final))
    values = [t for t in state.values() if t.dim()]
    check_finite(values, values[0].device, f"{final}: not written: weights are not finite; lower --lr")
    state = {name: t if t.is_contiguous() else t.cpu().contiguous() for name, t in state.items()}
    writer = dcp.HuggingFaceStorageWriter(tmp, save_distributed=True)  # safetensors: data, never code
    try:
        group = common.slow_group[0] if world > 1 else None  # a disk may be slow
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=world == 1)
    except (Exception, CheckpointException) as e:  # torch's own, one error a process, is no Exception
        store.remove(tmp)
        reason = " ".join(str(e).split()).rpartition("Error: ")[2][-200:]  # it follows a traceback
        fail(f"{final}: not written ({reason}); the checkpoint before it is kept")
    common.wait_for_all(slow=True)
    if rank == 0:
        (tmp / store.RECIPE).write_text(json.dumps(recipe))
        store.finish(tmp, final)
        for old in sorted(final.parent.glob("step-??????"))[: -cfg.keep]:
            store.discard(old)
    common.wait_for_all(slow=True)


def load_checkpoint(folder, state):
    """Into the tensors of training_state, in place."""
    contiguous = {name: t.contiguous() for name, t in state.items()}
    try:
        reader = dcp.HuggingFaceStorageReader(folder)
        dcp.load(contiguous, storage_reader=reader, no_dist=process_rank()[1] == 1)
    except (Exception, CheckpointException) as e:  # tensors of another model
        mend = "delete it, or start again with --resume false"
        fail(f"{folder}: does not fit this run ({common.one_line(e)}); {mend}")
    for name, t in state.items():
        if contiguous[name] is not t:
            t.copy_(contiguous[name])
    values = [t for t in state.values() if t.dim()]
    check_finite(values, values[0].device, f"{folder}: holds weights that are not finite")


def recipe_of(cfg, options, rows, policy):
    """What makes a run this run: its options (fields of cfg), the weights it begins with, its lists. Content
    counts: data and models may be moved."""
    lists = [[row["prompt"], row["phi"], row["scores"], [d for _, _, d in row["pictures"]]] for row in rows]
    parts = formats.fingerprint(cfg.model)
    local = {"unet", "transformer"} & parts.keys()
    weights = {name: parts.pop(name) for name in list(parts) if name in local or name[0] == "+"}
    if not local:  # the base is from the hub: which revision?
        weights["base"] = [p.detach().flatten()[:8].tolist() for p in policy.parameters()]
    options = {f"--{f.name}": getattr(cfg, f.name) for f in options if f.name not in ("data", "model")}
    model = {"weights of --model": store.digest(weights), "other parts of --model": store.digest(parts)}
    return {**options, **model, "lists of --data": store.digest(lists)}


RESULTS = ("model", "model-[0-9]*", "checkpoints", "samples", "samples.png", "log.jsonl", "curves.png")


def find_checkpoint(cfg, recipe):
    """(folder, step) of the newest whole checkpoint of this run, or (None, 0); (None, --steps) if the run is
    finished. A damaged one is set aside. What another run left in --out is refused by name; with --resume
    false it is moved into OUT/before-1."""
    out, mend = Path(cfg.out), "choose another --out, or start again with --resume false"
    if not cfg.resume:
        store.set_aside(out, (*RESULTS, store.RECIPE))
    store.same(out, recipe, RESULTS, mend)
    if store.is_whole(out / "model"):
        print(f"{out}: this run is finished, and its model is in model/; --resume false starts it again")
        return None, cfg.steps
    if found := store.strangers(out / "model"):  # now, and not when the model is to be replaced
        fail(f"{out}/model: holds {found[0]}, which was not written here; {mend}")
    for path in sorted(out.glob("checkpoints/step-??????"), reverse=True):
        if store.is_whole(path):
            store.same(path, recipe, (), mend, write=False)
            return str(path), int(path.name[5:])
        print(f"{path}: damaged, set aside as damaged-{path.name}")
        store.remove(path.with_name(f"damaged-{path.name}"))
        os.rename(path, path.with_name(f"damaged-{path.name}"))
    return None, 0


def save_model(cfg, name, network, part, about):
    """OUT/NAME: the pipeline with this network as its `part`, or an adapter set alone. Every process calls
    this and returns when it is written: one that ended before would end the others."""
    adapters = network.name if isinstance(network, AdapterSet) else ""
    pipelines.save_tuned(Path(cfg.out) / name, cfg.model, module_of(network), part, adapters, about)
    common.wait_for_all(slow=True)


# ----------------------------------------------------------------------------- log

CURVES = {
    "loss": {"loss": ""},
    "implicit accuracy": {"accuracy": ""},
    "error against the reference": {"best_s": "winner", "worst_s": "loser"},
    "gradient norm": {"grad_norm": ""},
}


def check_report(report):
    """Fail before anything is computed where --report names what is not installed, or not logged in."""
    try:
        if report == "tensorboard":
            importlib.import_module("torch.utils.tensorboard")
        if report == "wandb" and process_rank()[0] == 0:
            importlib.import_module("wandb").login()  # asks on a terminal
    except ImportError:
        fail(f"--report {report}: is not installed; pip install {report}")
    except Exception as e:  # wandb has its own
        fail(f"--report {report}: {' '.join(str(e).split())}; or set WANDB_MODE=offline")


def open_report(cfg, head, start_step):
    """--report: what takes (step, {name: number}, {name: picture file}). The `id` in the head of log.jsonl
    says which run goes on; steps after its checkpoint are hidden, or drawn twice alike."""
    out = Path(cfg.out).resolve()
    if cfg.report == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(f"{out}/tensorboard", purge_step=start_step)
        common.cleanup.callback(board.close)

        def write(step, numbers, pictures):
            for name, value in numbers.items():
                board.add_scalar(name, value, step)
            for name, file in pictures.items():
                board.add_image(name, np.array(Image.open(file)), step, dataformats="HWC")

        return write
    if cfg.report == "wandb":
        import wandb

        named = dict(WANDB_PROJECT=re.sub(r"[/\\#?%:]", "-", out.parent.name) or None, WANDB_NAME=out.name)
        project, name = (os.environ.get(key, value) for key, value in named.items())
        place = dict(project=project, name=name, dir=out)
        run = wandb.init(**place, id=head["id"], resume="allow", config=head["config"])
        run.define_metric("*", step_metric="step")  # wandb's own count cannot go back to a checkpoint
        common.cleanup.callback(lambda: run.finish(exit_code=int(sys.exc_info()[0] is not None)))
        images = lambda files: {name: wandb.Image(str(file)) for name, file in files.items()}
        return lambda step, numbers, pictures: run.log({"step": step, **numbers, **images(pictures)})
    return lambda *_: None


class Log:
    """log.jsonl: a head with all that a run depends on, then one row per step; curves.png.
    --report gets the same numbers, and the pictures of --sample_every. `flops`: of a list on one device."""

    def __init__(self, cfg, lists, held_out, start_step, flops, device, dtype):
        path, head = Path(cfg.out) / "log.jsonl", dict(lists=lists, held_out=held_out, precision=str(dtype))
        head.update(world=process_rank()[1], **common.provenance(device))
        lines = tables.read_jsonl(path, torn_end=True) if start_step and path.is_file() else []
        rows = [row for _, row in lines]
        numbers = ["step", *(key for lines in CURVES.values() for key in lines)]
        if not all(isinstance(row.get(key, ""), int | float | None) for row in rows[1:] for key in numbers):
            fail(f"{path}: not the log of this run; move it away")
        kept = [row for row in rows if row.get("step", -1) < start_step] or [{**head, "config": asdict(cfg)}]
        kept[0].setdefault("id", secrets.token_hex(4))
        if start_step:  # by another commit, perhaps, on another machine
            kept[0].setdefault("resumed", []).append({"step": start_step, **head})
        store.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        print(f"resumed from step {start_step}" if start_step else f"{lists} lists to train on")
        self.cfg, self.head, self.flops, self.start_step = cfg, head, flops, start_step
        self.began = self.drawn = time.time()
        self.file, self.last, self.winners, self.accuracy = open(path, "a"), {}, [], []
        self.report = open_report(cfg, kept[0], start_step)
        if cfg.sample_every and not start_step:
            self.report(0, {}, {"samples": path.with_name("samples") / "000000.png"})

    def write(self, row, stopping=False):
        """One line; returns what the progress bar shows. curves.png is at most a minute behind."""
        steps = row["step"] + 1 - self.start_step
        per_s = steps * self.cfg.global_batch_size / (time.time() - self.began)
        row.update(lists_per_s=per_s, tflops=per_s * self.flops / 1e12)
        if torch.cuda.is_initialized():
            row.update(memory_gb=torch.cuda.max_memory_allocated() / 1e9)
        text = json.dumps(row).replace("NaN", "null").replace("-Infinity", "null").replace("Infinity", "null")
        self.file.write(text + "\n")
        self.file.flush()
        pictures = {"samples": Path(self.cfg.out) / row["samples"]} if "samples" in row else {}
        try:  # a side channel, which must not end the run
            self.report(row["step"], {k: v for k, v in row.items() if isinstance(v, float)}, pictures)
        except Exception as e:
            tqdm.write(f"--report {self.cfg.report}: {common.one_line(e)}; log.jsonl goes on without it")
            self.report = lambda *_: None
        self.last = row
        self.warn(row)
        if stopping or time.time() - self.drawn > 60:
            self.draw()
        shown = {"loss": "loss", "acc": "accuracy", "winner": "best_s", "loser": "worst_s"}
        return {name: f"{row[key]:.3g}" for name, key in shown.items()}

    def warn(self, row):
        """Pictures get worse where both errors grow and the loser's grows faster, although the loss falls.
        Values below .01 vary as much from one row to the next. Labels may also be learned by heart."""
        self.winners.append(row["best_s"])
        self.accuracy.append(row["accuracy"])
        known = np.mean(self.accuracy[-50:])
        if not self.cfg.holdout and len(self.accuracy) % 50 == 0 and known > 0.98:
            heart = f"step {row['step']}: accuracy is {known:.3f} over 50 steps, so labels are known by heart"
            tqdm.write(f"{heart}; --holdout .1 measures on other prompts; take fewer steps or more lists")
        winner, than = row.get("held_out_best_s"), "the base's on held-out lists"
        if winner is None and row["step"] % 50 == 49:
            winner, than = np.nanmean(self.winners[-25:]), "the reference's"
        if winner is not None and winner > 0.01:
            grows = f"step {row['step']}: the winner's error is {winner:.3f} above {than}"
            tqdm.write(f"{grows}; pictures may get worse although loss falls: lower --lr or raise --beta")

    def card(self):
        """What a model card says of the run: {title: {name: value}}."""
        return {"Run": self.head, "Options": asdict(self.cfg), "Last step": self.last}

    def close(self):
        os.fsync(self.file.fileno())
        self.file.close()
        self.draw()
        return self.card()

    def draw(self):
        rows = [row for _, row in tables.read_jsonl(self.file.name)][1:]
        pictures.plot_curves(rows, CURVES, Path(self.file.name).with_name("curves.png"))
        self.drawn = time.time()


# ----------------------------------------------------------------------------- samples

Samples = namedtuple("Samples", "pipe part prompts arguments check")


def prepare_samples(cfg, pipe, rows, size, device, dtype, check):
    """Samples of the first prompts, which are encoded now, or None. `size` is (height, width) in pixels.
    Where there is a `check`(prompt, picture) -> bool, each prompt is drawn three times."""
    if not cfg.sample_every:
        return None
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: cfg.sample_prompts]
    prompts = [prompt for prompt in prompts for _ in range(3 if check else 1)]
    arguments = pipelines.encode_and_drop_encoders(pipe, prompts, size, device, dtype)
    arguments.update(pipelines.family_of(pipe).sampling(pipe, cfg.sample_steps, cfg.sample_guidance))
    return Samples(pipe, pipelines.denoiser_of(pipe)[0], prompts, arguments, check)


@torch.no_grad()
def draw_samples(cfg, samples, network, autocast, step):
    """samples/000100.png in --out: a row of pictures from fixed noise. All processes draw, for a sharded
    network; the first one writes."""
    pipe, prompts = samples.pipe, samples.prompts
    generator = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
    network = module_of(network)
    p = next(network.parameters())
    setattr(pipe, samples.part, network)
    pipe.vae.to(p.device, torch.promote_types(p.dtype, torch.float32))  # fp32, or fp64 as the denoiser
    with autocast:
        images = pipe(**samples.arguments, generator=generator, output_type="np").images  # (N, H, W, 3)
    pipe.vae.to("cpu")
    if process_rank()[0] == 0:
        write_samples(cfg, prompts, np.nan_to_num(images), step, samples.check)
    return f"samples/{step:06d}.png"


def write_samples(cfg, prompts, images, step, check=None):
    """samples/000100.png, a row of pictures (N, H, W, 3); samples.png, the rows of all steps so far. What
    `check` finds right gets a green frame."""
    out, w, rows = Path(cfg.out), images.shape[2], []
    images = np.pad(images, ((0, 0), (0, 0), (0, w // 16), (0, 0)), constant_values=1)  # a gap beside each
    row = Image.fromarray((np.concatenate(images, axis=1) * 255).round().astype(np.uint8))
    store.publish(out / f"samples/{step:06d}.png", row.save)
    for step in range(0, step + 1, cfg.sample_every):
        if (path := out / f"samples/{step:06d}.png").is_file():
            row, lefts = Image.open(path), range(0, row.width, images.shape[2])
            cells = [row.crop((left, 0, left + w, row.height)) for left in lefts]
            right = [bool(check and check(prompt, cell)) for prompt, cell in zip(prompts, cells)]
            title = f"step {step}" + f": {sum(right)} of {len(right)} right" * bool(check)
            captions = [prompt * (not rows and prompt not in prompts[:n]) for n, prompt in enumerate(prompts)]
            rows.append((title, list(zip(cells, captions, right))))
    pictures.picture_grid(rows, out / "samples.png", side=96 if check else 128)
