"""Models on disk: what a path names, how weights are stored, what is added to a base.

    split_spec("base+first+second")            # ["base", "first", "second"]
    stored_as("folder", "unet")                # from_pretrained's arguments: fp16 files alone, .bin alone
    find_addition("folder, file or hub id")    # ("adapters" or "denoiser", its files of weights)
    fingerprint("base+first")                  # {part: hash of what it holds}, wherever it is

load_denoiser and load_adapters take every tensor of such files, or say which one they cannot use. Libraries
only warn of tensors that they drop or draw at random. Files of torch.save are read with weights_only.
"""

import json
import logging
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from lib.common import about, one_line
from lib.store import digest, file_digest, whole
from lib.tables import parse_json, read_text

# a warning of diffusers 0.42 that names no module
logging.getLogger("diffusers.models.modeling_utils").addFilter(lambda r: "float32: []" not in r.getMessage())


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
        names = [whole(file).name for file in Path(path, part).glob("*") if WEIGHTS.fullmatch(file.name)]
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


# ----------------------------------------------------------------------------- fingerprints

SAVED = (".json", ".txt", ".model", ".safetensors", ".bin", ".pth")  # configurations, vocabularies, weights


def fingerprint(path):
    """{part: hash} of all that changes a picture or a latent of load_pipeline(path).

    Parts of a base folder are named after their folders ("scheduler", "vae", "unet"). Its model_index.json is
    "pipeline", and what is added to it is "+1", "+2". A hub id stands for itself: its files may not be here
    yet. A copy has the fingerprint of its original."""
    base, *additions = split_spec(path)
    hashes = {"pipeline": base, **{f"+{n}": added for n, added in enumerate(additions, 1)}}
    files = {"pipeline": [Path(base, "model_index.json")]}
    for file in sorted(Path(base).glob("*/*")) if os.path.isdir(base) else ():
        files.setdefault(file.parent.name, []).append(file)
    for n, added in enumerate(map(Path, additions), 1):
        folders = (added, added / "unet", added / "transformer")
        files[f"+{n}"] = [added, *(file for folder in folders for file in sorted(folder.glob("*")))]
    for name, there in files.items():
        there = [file for file in there if file.suffix in SAVED and file.is_file()]
        if there:
            names = [file.name if len(there) > 1 else "" for file in there]
            hashes[name] = digest([names, [file_digest(file) for file in there]])
    return hashes


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


def read_weights(file):
    """{name: tensor} of safetensors or of a file of torch.save, which is read with weights_only."""
    file = whole(Path(file))
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # each format has its own
        raise ValueError(f"{file}: no readable weights ({type(e).__name__})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{file}: holds no state dict of tensors")
    return state


def read_header(file):
    """[names of the tensors], {metadata} of a file of weights."""
    if file.suffix != ".safetensors":
        return list(read_weights(file)), {}
    with safe_open(whole(file), "pt") as f:
        return list(f.keys()), f.metadata() or {}


# what only a model in the names of its original code holds -> diffusers' pipeline, which converts it
ORIGINAL = {
    "conditioner.embedders.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
    "joint_blocks.": "StableDiffusion3Pipeline",
    "double_blocks.": "FluxPipeline",
}


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
    names, _ = read_header(files[0])
    if any(re.search("lora|hada_|lokr_|oft_", name) for name in names):
        pairs_of(files[0], names)
        return "adapters", files
    for mark, kind in ORIGINAL.items():
        if any(mark in name for name in names):
            convert = f'{kind}.from_single_file("{files[0]}").save_pretrained(FOLDER)'
            raise ValueError(f"{files[0]}: is a model in a single file; convert it by diffusers' {convert}")
    return "denoiser", files


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


# A or B of LoRA in anybody's names: X.lora_A.weight, X.lora_up.weight, X_lora.down.weight
FACTOR = re.compile(r"(.+)[._](lora\w*[._])(?:(A|down)|B|up)((?:\.default)?\.weight)")


def pairs_of(path, names):
    """[(module, name of A (r, in), name of B (out, r))] of a file of LoRA. ValueError names a tensor that is
    neither a factor nor the alpha of a module, and a factor whose other half is missing."""
    factors = {name: FACTOR.fullmatch(name) for name in names}
    modules = {match[1] for match in factors.values() if match}
    odd = [name for name in names if not factors[name] and name.removesuffix(".alpha") not in modules]
    if odd:  # other kinds have an alpha, too, which does not tell what they are
        name = min(odd, key=lambda name: name.endswith(".alpha"))
        raise ValueError(f"{path}: {name} is no LoRA; LoHa, LoKr, OFT, DoRA, LoCon, biases are not supported")
    downs = {match.group(1, 2, 4): name for name, match in factors.items() if match and match[3]}
    ups = {match.group(1, 2, 4): name for name, match in factors.items() if match and not match[3]}
    if single := downs.keys() ^ ups.keys():
        lacks = {**downs, **ups}[min(single)]
        raise ValueError(f"{path}: holds no whole adapters; of {lacks} one half is missing")
    return [(key[0], down, ups[key]) for key, down in downs.items()]


def peft_options(file, denoiser):
    """{"unet.lora_alpha": 8, ...}: peft's options of each part, from the file beside the adapters (which are
    the denoiser's) or from their header. ValueError for an option that changes more than one scale."""
    config = file.with_name("adapter_config.json")
    if config.is_file():
        given = {"lora_alpha": 8, **parse_json(read_text(config))}  # peft's default
        options = {f"{denoiser}.{name}": value for name, value in given.items()}
    else:
        options = parse_json(read_header(file)[1].get("lora_adapter_metadata", "{}"))
    for name, value in options.items():
        other_kind = name.endswith(".peft_type") and value != "LORA"
        if other_kind or value and name.endswith((".use_dora", ".alpha_pattern", ".lora_bias")):
            raise ValueError(f"{file}: its option {name} is not supported ({value})")
    return options


def load_adapters(pipe, denoiser, path, file):
    """Fuse a file of LoRA, W + alpha / r B A, into the weights of the pipeline, which can then be tuned and
    saved as any other. `denoiser` is the name of that part. ValueError unless each tensor fits a module.

    diffusers renames the tensors, splits some and drops others silently. So each row is given a zero of its
    own: the zero of a row that was dropped has no gradient in what was fused."""
    state, options = read_weights(file), peft_options(file, denoiser)
    given, zeros = {}, {}
    for module, down, up in pairs_of(file, state):
        if not state[up].float().any():
            continue  # adds nothing: files hold such for encoders that were not trained
        rank, alpha = len(state[down]), f"{module}.alpha"
        part = module.replace("base_model.model", denoiser).partition(".")[0]
        root = 0.5 if options.get(f"{part}.use_rslora") else 1
        scale = options.get(f"{part}.lora_alpha", rank) / rank**root
        if alpha in state:
            scale = state[alpha].item() / rank
            given[alpha] = torch.tensor(float(rank))  # diffusers may read it or not: its scale is 1
        for name, t in ((down, state[down].float()), (up, state[up].float() * scale)):
            zeros[name] = torch.zeros_like(t[..., :1], requires_grad=True)
            given[name.replace("base_model.model", denoiser, 1) if options else name] = t + zeros[name]
    try:
        converted = pipe.lora_state_dict(given, unet_config=getattr(pipe, denoiser).config)
    except Exception as e:
        raise ValueError(f"{path}: diffusers does not know its names: {one_line(e)}") from None
    converted = converted[0] if isinstance(converted, tuple) else converted
    fused = fuse(pipe, denoiser, converted, pairs_of(path, converted))
    gradients = torch.autograd.grad(fused, list(zeros.values()), allow_unused=True)
    if lost := [name for name, g in zip(zeros, gradients) if g is None or not g.all()]:
        raise ValueError(f"{path}: {len(lost)} of {len(zeros)} tensors fit no module of the base: {lost[0]}")


def fuse(pipe, denoiser, state, pairs):
    """Add B A of each pair to the weight of its shape and name -> the sum of all factors that were used."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {f"{part}.{name}": p for part in parts for name, p in parts[part].named_parameters()}
    used = torch.zeros((), requires_grad=True)
    for module, down, up in pairs:
        module = module.replace(".processor.", ".")
        places = (module, f"{denoiser}.{module}", module.replace(".text_model.", "."))
        older = [re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", place) for place in places]  # of text encoders
        names = [*places, *(f"{place}.0" for place in places), *older]
        w = next((weights[f"{name}.weight"] for name in names if f"{name}.weight" in weights), None)
        a, b = state[down].flatten(1), state[up].flatten(1)  # (r, in) or (r, in k k); (out, r)
        if w is not None and [*b.shape, *a.shape] == [len(w), len(a), len(a), w[0].numel()]:
            used = used + a.sum() + b.sum()
            with torch.no_grad():
                w += (b @ a).view_as(w)
    return used
