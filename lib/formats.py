"""How models lie on disk: what a path names, how weights are stored, what is added to a base.

    split_spec("base+first+second")            # ["base", "first", "second"]
    stored_as("folder", "unet")                # from_pretrained's arguments: fp16 files alone, .bin alone
    find_addition("folder, file or hub id")    # ("adapters" or "denoiser", its files of weights)

load_denoiser and load_adapters take every tensor of such files, or say which one they cannot use. Libraries
only warn of tensors that they drop or draw at random. Files of torch.save are read with weights_only.
"""

import hashlib
import json
import logging
import os
import re
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from lib.common import about
from lib.tables import parse_json, read_text


def split_spec(path):
    """The parts of "base+first+second", a list. A + in the name of a path that exists does not split it."""
    parts, words = [], str(path).split("+")
    while words:
        longest = (n for n in range(len(words), 1, -1) if os.path.exists("+".join(words[:n])))
        n = next(longest, 1)
        parts.append("+".join(words[:n]))
        words = words[n:]
    return parts


# model.safetensors, diffusion_pytorch_model.fp16.safetensors, pytorch_model-00001-of-00002.bin
WEIGHTS = re.compile(r"(?:diffusion_)?(?:pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(safetensors|bin)")


def stored_as(path, part):
    """from_pretrained's arguments for the weights of a part, in a folder or on the hub. safetensors go before
    .bin, plain names before fp32, fp16 and bf16. ValueError where none of these is there."""
    if os.path.isdir(path):
        names = [file.name for file in Path(path, part).glob("*")]
    else:
        try:
            names = [Path(n).name for n in huggingface_hub.list_repo_files(path) if n.startswith(f"{part}/")]
        except Exception:  # offline: the usual names, or from_pretrained says what it misses
            names = ["model.safetensors"]
    there = {match.groups() for match in map(WEIGHTS.fullmatch, names) if match}
    for suffix in ("safetensors", "bin"):
        for variant in (None, "fp32", "fp16", "bf16"):
            if (variant, suffix) in there:
                return dict(variant=variant, use_safetensors=suffix == "safetensors")
    held = f"weights are {sorted(map(str, there))}" if there else "there are no weights"
    raise ValueError(f"{path}/{part}: {held}; wanted are safetensors or .bin, whole or as fp32, fp16 or bf16")


# ----------------------------------------------------------------------------- libraries, loading


@contextmanager
def quiet():
    """Hide the libraries' warnings and loading bars meanwhile: one line of ours says what is wrong. Bars of
    downloads stay."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            huggingface_hub.utils.enable_progress_bars()  # transformers has disabled them too
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def loading(what):
    """A `with` around the loading of a model: without the bars and warnings of libraries, and whatever fails
    ends the program with one line."""
    with about(f"{what}: could not be loaded"), quiet():  # a missing file, a wrong format, no hub
        yield


# ----------------------------------------------------------------------------- what is added to a base

# in keys of adapters that are not LoRA: LoHa, LoKr, OFT, DoRA twice, LoCon
OTHERS = ("hada_", "lokr_", "oft_", "dora_scale", "lora_magnitude_vector", "lora_mid")


def read_weights(file):
    """{name: tensor} of safetensors or of a file of torch.save, which is read with weights_only."""
    if file.suffix == ".safetensors":
        return load_file(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def find_addition(path):
    """("adapters" or "denoiser", files of weights): what a file, a folder or a hub id adds to a base.
    ValueError where that is not clear."""
    folder = Path(path)
    if not folder.exists():
        wanted = ["*.json", "*.safetensors", "unet/*", "transformer/*"]
        folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=wanted))
    if (folder / "model_index.json").is_file():
        raise ValueError(f"{path}: is a whole pipeline, which is named alone, without BASE+")
    for inner in (folder / "unet", folder / "transformer", folder):
        if (inner / "config.json").is_file():
            more = stored_as(inner.parent, inner.name)
            kind = (more["variant"], "safetensors" if more["use_safetensors"] else "bin")
            there = [(file, WEIGHTS.fullmatch(file.name)) for file in sorted(inner.glob("*"))]
            return "denoiser", [file for file, match in there if match and match.groups() == kind]
    usual = [folder / "pytorch_lora_weights.safetensors", folder / "adapter_model.safetensors"]
    files = [file for file in usual if file.is_file()] or sorted(folder.glob("*.safetensors"))
    files = [folder] if folder.is_file() else files or [*folder.glob("*.bin"), *folder.glob("*.pth")]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{path}: one file of adapters is wanted, there are {names}; name it, BASE+FILE")
    with safe_open(files[0], "pt") if files[0].suffix == ".safetensors" else nullcontext() as f:
        names = list((f or read_weights(files[0])).keys())
    if other := [name for name in names if any(mark in name for mark in OTHERS)]:
        raise ValueError(f"{files[0]}: holds {other[0]}; LoHa, LoKr, OFT, DoRA and LoCon are not supported")
    return "adapters" if any("lora" in name for name in names) else "denoiser", files


def load_denoiser(model, path, files):
    """Replace the weights of the base's denoiser by those of one that was saved alone. ValueError unless both
    have the same tensors and the same configuration."""
    state, wanted = {}, model.state_dict()
    for file in files:
        state.update(read_weights(file))
    differs = lambda key: key not in wanted or key not in state or wanted[key].shape != state[key].shape
    if wrong := sorted(filter(differs, wanted.keys() | state.keys())):
        what = "are missing, unknown or of another shape than in the base"
        raise ValueError(f"{path}: {len(wrong)} tensors {what}, as {wrong[0]}")
    config = files[0].with_name("config.json")
    there = parse_json(read_text(config)) if config.is_file() else {}
    for name in there.keys() & model.config.keys() - {"sample_size", "_name_or_path", "_diffusers_version"}:
        ours, theirs = json.loads(json.dumps(model.config[name])), there[name]  # tuples are lists in JSON
        if (ours or None) != (theirs or None):  # older files have null where newer ones have false
            raise ValueError(f"{config}: {name} is {theirs}, but {ours} in the base")
    model.load_state_dict(state)


DOWN = re.compile(r"[._]?(lora_A|lora\.down|lora_linear_layer\.down)\.")
UP = re.compile(r"[._]?(lora_B|lora\.up|lora_linear_layer\.up)\.")


def load_adapters(pipe, denoiser, path, file):
    """Fuse a file of LoRA into the weights of the pipeline, which can then be tuned and saved as any other.
    ValueError for half of a pair, whose other half diffusers draws at random, and for a tensor that fits no
    module of the base, which diffusers drops. `denoiser` is the name of that part."""
    source, more = str(file.parent), dict(weight_name=file.name)
    if (file.parent / "adapter_config.json").is_file():
        source, more = from_peft(read_weights(file), file.with_name("adapter_config.json"), denoiser), {}
    state = pipe.lora_state_dict(source, **more)
    state = state[0] if isinstance(state, tuple) else state
    down, up = ({half.sub(".", name) for name in state if half.search(name)} for half in (DOWN, UP))
    if not down or down != up:
        lacks = f"; of {sorted(down ^ up)[0]} one half is missing" if down ^ up else ""
        raise ValueError(f"{path}: holds no whole adapters{lacks}")
    pipe.load_lora_weights(source, **more)
    loaded = pipe.get_list_adapters()
    if not loaded:
        raise ValueError(f"{path}: holds adapters of another kind of model")
    parts, dtype = [part for part in loaded if part in pipe.components], getattr(pipe, denoiser).dtype
    digest = lambda t: hashlib.sha256(t.detach().to("cpu", dtype).float().numpy().tobytes()).digest()
    used = {digest(p) for part in parts for n, p in getattr(pipe, part).named_parameters() if "lora_" in n}
    if unused := [name for name, t in state.items() if t.dim() and digest(t) not in used]:
        what = f"{len(unused)} of {len(state)} tensors fit no module of the base"
        raise ValueError(f"{path}: {what}, as {unused[0]}")
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()


def from_peft(state, config, denoiser):
    """Adapters as peft saves them, by diffusers' names; the scale, alpha / r, goes into the second factor."""
    options = parse_json(read_text(config))
    odd = [name for name in ("use_dora", "alpha_pattern", "lora_bias") if options.get(name)]
    if options.get("peft_type") != "LORA" or odd:
        raise ValueError(f"{config}: {odd[0] if odd else options.get('peft_type')} is not supported")
    named = {}
    for name, t in state.items():
        if ".lora_B." in name:
            rank = t.shape[1] ** (0.5 if options.get("use_rslora") else 1)
            t = t.float() * (options["lora_alpha"] / rank)
        named[name.replace("base_model.model", denoiser, 1)] = t
    return named
