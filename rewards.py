"""Reward models behind one function: load_reward(name, device) -> score(images, prompts) -> (N,) tensor.

    python rewards.py --image picture.png --prompt "a red circle"     # every toy reward on one picture
    python rewards.py --image a.png --prompt "a cat" --rewards imagereward hpsv2.1=HPS_v2.1_compressed.pt
    python rewards.py --score FOLDER --rewards mps vqascore            # a whole folder: its scores/NAME.jsonl

A reward is a name, or name=source: a FILE of weights is the published model and nothing else; a FOLDER (and
only that for vqascore) holds the weights and may bring a config and a tokenizer of its own; FILE.py:function,
under any other name, is a function of yours, (PIL images, prompts) -> scores. Larger is better. Without
--rewards the toy world's four score the toy world's pictures; for any others, --rewards must be named.

    name         model, default source on the hub                      size    licence     unit, usual range
    clip         open_clip, laion/CLIP-ViT-H-14-laion2B-s32B-b79K      3.9 GB  MIT         cosine, .2 to .4
    hpsv2.1      the same, xswu/HPSv2 HPS_v2.1_compressed.pt           2.0 GB  Apache-2.0  cosine, .2 to .35
    hpsv2        the same, xswu/HPSv2 HPS_v2_compressed.pt             2.0 GB  Apache-2.0  cosine, .2 to .3
    pickscore    CLIPModel ViT-H, yuvalkirstain/PickScore_v1           3.9 GB  MIT         100 cos, 15 to 25
    pickscore-cosine  the same                                                             cosine, .15 to .25
    imagereward  BLIP-L + MLP, zai-org/ImageReward ImageReward.pt      1.8 GB  Apache-2.0  z-score, -2.3 to 2
    cyclereward  BLIP-L + MLP, carolineec/CycleReward-Combo            1.8 GB  MIT         logits, unbounded
    mps          ViT-H + cross-attention, RE-N-Y/mpsv1                 4.4 GB  not stated  100 cos, 0 to 15
    vqascore     CLIP-L/336 + Flan-T5-XXL, zhiqiulin/clip-flant5-xxl   23 GB   Apache-2.0  P("Yes"), 0 to 1
    vqascore-xl  the same with Flan-T5-XL, zhiqiulin/clip-flant5-xl    6.3 GB  Apache-2.0  P("Yes"), 0 to 1
    aesthetic    ViT-L/14 + MLP, trl-lib/ddpo-aesthetic-predictor      1.7 GB  Apache-2.0  points, 1 to 10
    hpsv3        Qwen2-VL-7B + MLP, MizzenAI/HPSv3 HPSv3.safetensors   17 GB   MIT (code)  points, 5 to 11
    diversity    clip's image tower; to evaluate only                                      mean 1 - cosine
    toyworld     the exact checker of the toy world; to evaluate only                      1 if shown, else 0

The weights of mps state no licence (their authors' code is MIT). aesthetic reads no prompt; diversity
compares the pictures of one. pickscore and mps multiply the cosine by a learned scale of about 100;
BalancedDPO and Diffusion-DPO report the plain cosine, which also a sum of rewards (--label sum) needs:
pickscore-cosine. All run in fp32; vqascore-bf16, vqascore-xl-bf16 and hpsv3-bf16 take half the memory. Text
beyond a model's context (77 tokens for CLIP, 35 for ImageReward) is cut, said once.
scorers.py holds the models; docs/rewards.md says how far each agrees with its original.
"""

import os
import re
import runpy
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from lib.common import HERE, about, fail, one_line, one_line_errors, option, parse, pick_device

TOY_REWARDS = tuple(
    f"{name}={HERE / 'toy/rewards' / folder}"
    for name, folder in (("clip", "clip"), ("hpsv2.1", "hps"), ("pickscore", "pick"), ("imagereward", "blip"))
)


@dataclass
class Config:
    image: str = option("", "an image file to score")
    prompt: str = option("", "its prompt")
    score: str = option("", "a folder to score: an imagefolder, or pictures with .txt captions; resumes")
    rewards: tuple = option(None, "rewards, as name or name=source (default: the toy world's, for its own)")
    batch_size: int = option(32, "images a forward pass", above=0)
    on_error: str = option("stop", "rows that cannot be scored", ("stop", "skip"))
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


if __name__ == "__main__":  # --help and mistyped options end here, before imports that take seconds
    parse(Config, __doc__)

import torch
import torch.nn.functional as F

from lib import store, tables
from lib.answers import Store, answer_rows, files_version, read_answers
from lib.formats import loading
from lib.lists import metadata_file, read_metadata
from lib.pictures import SUFFIXES
from lib.scorers import PUBLISHED, Scorer, crop, find_weights, open_clip_model

# ----------------------------------------------------------------------------- rewards that only judge


def load_diversity(name, source, weights, device):
    """How far apart the pictures of one prompt are, by the embeddings of clip's image tower."""
    model, _, size = open_clip_model(source, weights, device)
    embed = lambda x, prompts: F.normalize(model.encode_image(x), dim=-1)  # (N, D)
    return Scorer(name, crop(size), embed, device, of_row=distances)


def distances(results):
    """Embeddings of one prompt's pictures -> of each picture the mean of 1 - cosine to the others."""
    if len(results) < 2 or any(problem for _, problem in results):
        return [(None, problem or "another picture of the prompt is missing") for _, problem in results]
    e = torch.tensor([embedding for embedding, _ in results], dtype=torch.float64)  # (K, D)
    apart = (1 - e @ e.T).fill_diagonal_(0).sum(1) / (len(e) - 1)  # (K,)
    return [(distance, None) for distance in apart.tolist()]


def load_toyworld(name, source, device):
    """The exact checker as a scorer. It is the truth of the toy world: never label training lists with it."""
    from toy import world

    def forward(images, prompts):
        with about("reward toyworld"):
            return torch.tensor([float(world.check(p, i)) for i, p in zip(images, prompts)])

    return Scorer(name, lambda image: image.convert("RGB"), forward)


LOADERS = {  # name: (loader, default hub repository, file of weights); toyworld has no weights
    **PUBLISHED,
    "diversity": (load_diversity, *PUBLISHED["clip"][1:]),
    "toyworld": (load_toyworld,),
}


# ------------------------------------------------------------ name=FILE.py:function: one of your own


def function_of(spec):
    """(FILE.py, function) of "name=FILE.py:function"; ("", "") of any other spec."""
    source = spec.partition("=")[2]
    file, _, function = source.rpartition(":")
    fits = file.endswith(".py") and function.isidentifier() and not Path(source).exists()
    return (file, function) if fits else ("", "")


@lru_cache(maxsize=None)
def run_file(file, code):
    """{name: what a file defines}; it runs once a process, while the bytes `code` are in it. It is not
    imported: Python's cache of compiled files takes an edit within the same second for the old file."""
    return runpy.run_path(file)


@contextmanager
def user_code(name, file):
    """A `with` around the user's code: whatever it raises, except Ctrl-C, ends the run with one line, which
    says the last line of the file that it passed. The working folder stays what it was."""
    here = os.getcwd()
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit, too, and what is no Exception
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        if isinstance(e, SyntaxError) and e.filename == file:
            lines.append(e.lineno)
        place = f"{file}, line {lines[-1]}" if lines else file
        fail(f"reward {name}: {place}: {type(e).__name__}: {one_line(e)}")
    finally:
        os.chdir(here)


def user_function(name, file, function):
    if not Path(file).is_file():
        fail(f"reward {name}: {file}: no such file")
    with user_code(name, file):
        found = run_file(file, Path(file).read_bytes()).get(function)
    if not callable(found):
        fail(f"reward {name}: {file} defines no function {function}")
    return found


def as_numbers(found, count):
    """Floats (count,) of what a function returned. Other things can be iterated, too, but a set has no order,
    a dict gives its keys and bytes their codes."""
    if not isinstance(found, list | tuple) and not hasattr(found, "__array__"):
        raise ValueError(f"a list, tuple, array or tensor is wanted, not a {type(found).__name__}")
    values = [v.item() if hasattr(v, "item") else v for v in found]
    if len(values) != count:
        raise ValueError(f"{len(values)} scores for {count} pairs of image and prompt")
    if odd := [v for v in values if not isinstance(v, int | float)]:
        raise ValueError(f"a score is {one_line(repr(odd[0]))[:60]}, which is no number")
    return torch.tensor([float(v) for v in values])


def load_function(name, file, function):
    """A function of the user's as a scorer. It gets a batch: copies of a list of RGB images and of their
    prompts. An error in it ends the run; a score that is not finite is the problem of its own pair, as
    everywhere."""
    call = user_function(name, file, function)

    def forward(images, prompts):
        with user_code(name, file):
            return as_numbers(call([image.copy() for image in images], list(prompts)), len(prompts))

    return Scorer(name, lambda image: image.convert("RGB"), forward)


# ----------------------------------------------------------------------------- by name


def reward_name(spec):
    return spec.partition("=")[0]


RESERVED = ("human", "phi", "random", "geneval", "t2i-compbench", "dpg")  # what people chose, labels, metrics


def check_reward(spec):
    """End with one line if "name", "name=source" or "name=FILE.py:function" can be no reward."""
    name, given, source = spec.partition("=")
    file, function = function_of(spec)
    if function:
        if name in (*LOADERS, *RESERVED):
            fail(f"reward {spec}: {name} means something else already; call yours by another name")
        if not re.fullmatch(r"\w[\w.-]*", name):
            fail(f"reward {spec}: the name, which names a file of scores, must be a word, not {name!r}")
        user_function(name, file, function)
        return
    if name not in LOADERS:
        others = "each also as name=folder_or_file; one of your own is name=FILE.py:function"
        fail(f"unknown reward {spec!r}; there are {', '.join(LOADERS)}, {others}")
    if given and (not source or name == "toyworld"):
        fail(f"reward {spec}: {'it has no weights' if source else 'a folder or file is wanted after ='}")
    if source and not Path(source).exists():
        fail(f"{spec}: no such file or folder")
    if source:
        with about(f"reward {name}"):
            find_weights(source, *LOADERS[name][1:])


def check_rewards(specs):
    """check_reward of each, and none twice: a name has one place in a row of scores."""
    for spec in specs:
        check_reward(spec)
        same = [s for s in specs if reward_name(s) == reward_name(spec)]
        if len(same) > 1:
            fail(f"--rewards: {reward_name(spec)} is named twice ({', '.join(same)})")


def load_reward(spec, device="cpu", **options):
    """A Scorer by name, "name=source" or "name=FILE.py:function"; `options` are of its loader. Where there is
    no such reward, or it does not load, the program ends with one line."""
    check_reward(spec)
    name, _, source = spec.partition("=")
    file, function = function_of(spec)
    if function:
        return load_function(name, file, function)
    loader, *hub = LOADERS[name]
    with loading(f"reward {spec}"):
        weights = [find_weights(source, *hub)] if hub else []
        return loader(name, source, *weights, device, **options)


# ----------------------------------------------------------------------------- stored scores


def reward_version(spec):
    """A short hash of what a score depends on: the reward, its weights, config and tokenizer, wherever they
    are. Every byte of them counts."""
    name, _, source = spec.partition("=")
    file, function = function_of(spec)
    if function:
        return files_version([function], file)
    return files_version([name, 2, *LOADERS[name][1:]], source)  # 2: to be raised when a formula here changes


def version_there(folder, name, lines, spec):
    """Which version's scores to use, of the stored_lines: that of `spec` if it scored here; otherwise there
    must be only one."""
    versions = {row.get("version") for _, _, row in lines if row}
    own = reward_version(spec) if spec else None
    if len(versions) > 1 and own not in versions:
        where = f"{folder}/scores/{name}.jsonl: scores of {len(versions)} versions of {name}"
        fail(f"{where}; say whose: --rewards {name} or {name}=source, with all others that count")
    return own if own in versions else next(iter(versions), None)


def read_scores(folder, spec, rows):
    """{row index: [k floats]} of the rows [(prompt, file_names)] that this reward scored, as stored. What
    another version scored does not count, nor does a torn last line, nor a score of a picture that was
    replaced since."""
    return read_answers(Store(folder, reward_name(spec), reward_version(spec)), rows)


def score_rows(folder, spec, rows, device="cpu", batch_size=32, on_error="stop", part="", load=None):
    """Score what is not scored yet; see answer_rows. `load` stands in for load_reward where one scorer serves
    several folders."""
    store = Store(folder, reward_name(spec), reward_version(spec))
    return answer_rows(store, rows, partial(load or load_reward, spec, device), batch_size, on_error, part)


# ----------------------------------------------------------------------------- the command line


def read_folder(folder):
    """[(prompt, file_names)] of an imagefolder (metadata.jsonl with prompt, text or caption and file_names or
    file_name), or of pictures with their caption in a .txt of the same name: those that lie in it or are
    linked there, wherever the link leads. Folders in it, also linked ones, are not searched."""
    folder = Path(folder)
    if not folder.is_dir():
        fail(f"{folder}: no such folder")
    if metadata_file(folder):
        return [(row["prompt"], row["file_names"]) for row in read_metadata(folder)]
    pictures = [p for p in sorted(folder.glob("[!.]*")) if p.suffix.lower() in SUFFIXES]
    captioned = [p for p in pictures if p.with_suffix(".txt").is_file()]
    if not captioned:
        fail(f"{folder}: neither metadata.jsonl nor pictures with a .txt caption beside them")
    if bare := sorted(set(pictures) - set(captioned)):
        what = f"{len(bare)} of {len(pictures)} pictures have no .txt caption and are left out"
        print(f"{folder}: {what} (the first: {bare[0].name})", file=sys.stderr)
    return [(tables.read_text(p.with_suffix(".txt")).strip(), [p.name]) for p in captioned]


def score_folder(cfg, rows):
    device = pick_device(cfg.device)
    store.writable_folder("score", Path(cfg.score) / "scores")
    for spec in cfg.rewards:
        score_rows(cfg.score, spec, rows, device, cfg.batch_size, cfg.on_error)
        values = [score for scores in read_scores(cfg.score, spec, rows).values() for score in scores]
        name, mean = reward_name(spec), sum(values) / len(values) if values else float("nan")
        print(f"{name:12s} mean {mean:.4f} over {len(values)} images; {cfg.score}/scores/{name}.jsonl")


@one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    check_rewards(cfg.rewards or ())
    if not cfg.score and (not cfg.prompt.strip() or not os.path.isfile(cfg.image)):
        what = f"--image {cfg.image!r} must be a file and --prompt not empty, or name a folder with --score"
        fail(f"rewards.py: {what} (--help shows examples)")
    rows = read_folder(cfg.score) if cfg.score else [(cfg.prompt, [cfg.image])]
    if cfg.rewards is None:
        from toy import world

        if not world.knows(cfg.score, rows):
            what = f"{cfg.score or cfg.image} is not of the toy world, whose scorers are the default"
            fail(f"{what}; name --rewards, for instance --rewards hpsv2.1 clip (--help lists them)")
        cfg = replace(cfg, rewards=TOY_REWARDS)
    if cfg.score:
        score_folder(cfg, rows)
        return
    if "diversity" in map(reward_name, cfg.rewards):
        fail("--rewards diversity: compares the pictures of a prompt; name a folder with --score")
    for spec in cfg.rewards:
        with about(cfg.image):
            score = load_reward(spec, pick_device(cfg.device))([cfg.image], [cfg.prompt]).item()
        print(f"{reward_name(spec):12s} {score:.4f}")


if __name__ == "__main__":
    main()
