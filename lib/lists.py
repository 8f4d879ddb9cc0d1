"""Ranked lists on disk: metadata.jsonl, one row per list of images; what is encoded once."""

import json
import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from lib import common, tables
from lib.common import about, fail, process_rank
from lib.pictures import look_at, read_pixels
from lib.store import digest, path_inside, publish, write_text
from lib.tables import read_jsonl
from losses import majority_vote, preference_probability

# ----------------------------------------------------------------------------- metadata.jsonl

EVALUATION_ONLY = ("toyworld", "diversity")  # rewards from which no label comes


def metadata_file(folder):
    """metadata.jsonl of a folder, else the metadata.csv of an imagefolder, or None."""
    found = (Path(folder) / name for name in ("metadata.jsonl", "metadata.csv"))
    return next((path for path in found if path.is_file()), None)


def metadata_rows(path):
    """[(line, dict)] of a metadata file; a row of csv counts as one line."""
    return read_jsonl(path) if path.suffix == ".jsonl" else list(enumerate(tables.prompt_rows(path), 2))


def read_metadata(folder, lists=False, labelled=False):
    """Rows of a folder's metadata file, one a list of images: prompt, file_names; scores and phi if there.

    Rows of other programs may say caption or text, and file_name. With `lists`, every row must have at least
    two images; with `labelled`, a phi in [0, 1] for each, so that it can be trained on.
    A bad row ends the run with file, line and what to do."""
    path, rows, lines, real = metadata_file(folder), [], {}, os.path.realpath(folder)
    if not path:
        near = [p for p in Path(folder).glob("*/metadata.*") if p.suffix in (".jsonl", ".csv")]
        hint = f"make it with synpic.py, or name the folder of {near[0] if near else 'one with --data'}"
        fail(f"{folder}/metadata.jsonl: no such file; {hint}")
    mend = "mend or delete that row" + (" (synpic.py --stages label writes phi anew)" if labelled else "")
    for n, row in metadata_rows(path):
        with about(f"{path}, line {n}", mend):
            rows.append(row := checked_row(real, row, lists, labelled))
            if (first := lines.setdefault((row["prompt"], *row["file_names"]), n)) < n:
                raise ValueError(f"the same prompt and images as line {first}")
    if not rows:
        fail(f"{path}: no rows; run synpic.py to the end first, with all of its stages")
    return rows


def checked_row(folder, row, lists, labelled):
    """A row of metadata.jsonl with its keys in our names; ValueError says what is wrong with it."""
    prompt = next((row[k] for k in tables.TEXT if k in row), None)
    files = row.get("file_names", [row["file_name"]] if "file_name" in row else None)
    if not isinstance(prompt, str) or not isinstance(files, list) or not files:
        raise ValueError("needs prompt (or caption, text) and file_names (or file_name)")
    plain = [os.path.normpath(str(f)) for f in files]  # ./a.png is a.png
    for f, name in zip(files, plain):
        try:
            path_inside(folder, f)
        except ValueError as e:
            raise ValueError(f"image {e}") from None
        if plain.count(name) > 1:
            raise ValueError(f"image {f} stands {plain.count(name)} times in the list")
    given = {key for key in ("phi", "scores", "rank") if row.get(key) is not None}
    if ranked := lists and given == {"rank"}:  # people's order, 1 = best: one judge
        row = {**row, "scores": {"rank": row["rank"]}}
    scores, k = {} if row.get("scores") is None else row["scores"], len(files)
    if not isinstance(scores, dict):
        raise ValueError("scores must be an object, {reward: [a number an image]}")
    for name, values in scores.items():
        if not isinstance(values, list) or len(values) != k or not all(map(is_number, values)):
            raise ValueError(f"scores of {name}: as many finite numbers as file_names are wanted")
    if lists and k < 2:
        raise ValueError("needs at least two file_names")
    if ranked:
        scores = {"rank": [-r for r in row["rank"]]}
        row["phi"] = preference_probability(torch.tensor(scores["rank"])[:, None].double()).tolist()
    if labelled:
        phi = row.get("phi")
        if not isinstance(phi, list) or len(phi) != k:
            raise ValueError("needs as many phi as file_names")
        if not all(is_number(p) and 0 <= p <= 1 for p in phi):
            raise ValueError("phi must lie in [0, 1]")
    scores = {name: values for name, values in scores.items() if name not in EVALUATION_ONLY}
    return {**row, "prompt": prompt, "file_names": files, "scores": scores}


def check_label(label, known):
    if label not in known and not label.startswith("single:"):
        fail(f"--label {label}: there are {', '.join(known)} and single:REWARD")


def stored_rewards(folder, rows, label, wanted=()):
    """(names, rewards) that a label counts: names of R stored scores and for each row of metadata.jsonl a
    tensor (K, R), fp64. They are the `wanted` scores, or all there are, or that of single:REWARD alone."""
    there = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    if label.startswith("single:"):
        wanted = [label[7:]]
    names = [name for name in there if name in (wanted or there)]
    lacking = [name for name in wanted if name not in there]
    if lacking or (not names and label != "random"):
        found = f"no such scores: {', '.join(lacking)} (there are {', '.join(there) or 'none'})"
        first = f"rewards.py --score {folder} --rewards NAME, then synpic.py --stages label"
        fail(f"--label {label}: {folder}/metadata.jsonl: {found}; score first: {first}")
    if label == "random":  # it looks at none
        names = [name for name in names if all(name in row["scores"] for row in rows)]
    for n, row in enumerate(rows, 1):
        if missing := [name for name in names if name not in row["scores"]]:
            problem = f"{folder}/metadata.jsonl, row {n}: no scores of {missing[0]}"
            fail(f"{problem}; score it (python rewards.py --score {folder}) or delete that row")
    rewards = [torch.tensor([row["scores"][name] for name in names], dtype=torch.float64) for row in rows]
    return names, [r.view(len(names), len(row["file_names"])).T for r, row in zip(rewards, rows)]


def is_number(value):
    """A finite number of fp32's range, not text that looks like one."""
    return type(value) in (int, float) and abs(value) < 3e38


# ----------------------------------------------------------------------------- labels

LABELS = ("phi", "sum", "normalized_sum", "majority", "random")  # and single:REWARD


def preference_labels(label, rewards, seed=0):
    """phi of every list of a data set: the choices of RankDPO's Table 4 and BalancedDPO's Table III.

    majority is the share of the other images that most rewards place below. All others are shares of pairwise
    wins: over every reward (phi), by their sum, by one reward (single:NAME; pass its column alone), or at
    random, which follows from (seed, place of the list) and needs no rewards: R may be 0.
    rewards: N tensors (K_n, R), lists of any lengths -> N tensors phi (K_n,) in [0, 1], fp32. ValueError for
    an unknown label, for single: with several rewards and as in preference_probability."""
    if label not in LABELS and not label.startswith("single:"):
        raise ValueError(f"preference_labels: {label!r} is none of {', '.join(LABELS)} and single:REWARD")
    if label.startswith("single:") and any(r.shape[-1] != 1 for r in rewards):
        raise ValueError(f"preference_labels: {label} needs the scores of that reward alone, (K, 1)")
    if label == "normalized_sum":  # rewards standardised over all images of the data set
        scale = torch.cat(rewards).std(0).clamp(min=1e-12)  # (R,)
        rewards = [r / scale for r in rewards]
    if label in ("sum", "normalized_sum"):
        rewards = [r.sum(-1, keepdim=True) for r in rewards]  # (K_n, 1)
    if label == "random":
        coins = [torch.Generator().manual_seed(seed * 1_000_003 + n) for n in range(len(rewards))]
        rewards = [torch.randperm(len(r), generator=g)[:, None] for r, g in zip(rewards, coins)]
    if label == "majority":
        return [(majority_vote(r) > 0).float().sum(-1) / (len(r) - 1) for r in rewards]
    return [preference_probability(r).float() for r in rewards]


# ----------------------------------------------------------------------------- what is trained on

STORED = ("given", "reversed")  # labels that need no scores: the phi that is there
VOTES = ("balanced", "direct", "random_scorer")  # losses that look at scores, not at phi


RANDOM = 32  # lists of --data random


def write_random(cfg):
    """--data random: lists of four plain pictures, to measure time and memory at the size of the model."""
    from lib import formats, pipelines  # diffusers takes seconds, which readers of lists do not need

    folder, phi = Path(cfg.out) / "random", [1.0, 2 / 3, 1 / 3, 0.0]
    pipe = pipelines.load_pipeline(formats.split_spec(cfg.model)[0], denoiser=False, encoders=False)
    sides = [
        side * pipe.vae_scale_factor for side in pipelines.shapes_at(pipe, cfg.resolution)["latents"][1:]
    ]
    names = [f"{n}.png" for n in range(len(phi))]
    for n, name in enumerate(names):
        image = Image.new("RGB", sides[::-1], (60 * n,) * 3)
        publish(folder / name, image.save)
    row = dict(file_names=names, phi=phi, scores={"random": phi})
    rows = [json.dumps({"prompt": f"random {n}", **row}) + "\n" for n in range(RANDOM)]
    write_text(folder / "metadata.jsonl", "".join(rows))
    return str(folder)


def line_of(folder, name):
    """Where a picture is named: the metadata file and the line, as text."""
    path = metadata_file(folder)
    lines = (n for n, row in metadata_rows(path) if name in (row.get("file_names") or [row.get("file_name")]))
    return f"{path}, line {next(lines, '?')}"


def look_at_pictures(folder, rows):
    """Each row with its `pictures`, [[height, width, digest], ...]: every file is opened once."""
    names = list(dict.fromkeys(name for row in rows for name in row["file_names"]))
    parts, found = [names[i : i + 100] for i in range(0, len(names), 100)], {}
    look = lambda part: [(name, *look_at(folder, name)) for name in part]
    looks = common.ahead(look, parts, depth=32, threads=16)
    for name, found[name], problem in chain.from_iterable(tqdm(looks, "pictures", len(parts), delay=2)):
        if problem:
            fail(f"{line_of(folder, name)}: image {name} {problem}; mend or delete that row")
    return [dict(row, pictures=[found[name] for name in row["file_names"]]) for row in rows]


def read_lists(cfg):
    """(options, rows): the trainer's rows of metadata.jsonl with the phi that --label asks for, the scores
    that count and the `pictures`; --data random becomes a folder. One process reads them for all."""
    if cfg.data == "random":
        cfg = replace(cfg, data=write_random(cfg))
    stored = cfg.label in STORED
    rows = read_metadata(cfg.data, lists=True, labelled=stored)
    if cfg.label_rewards or not stored:
        names, rewards = stored_rewards(cfg.data, rows, cfg.label, cfg.label_rewards)
        rows = [dict(row, scores={name: row["scores"][name] for name in names}) for row in rows]
    if not stored:
        every_phi = preference_labels(cfg.label, rewards, cfg.seed)
        rows = [dict(row, phi=phi.tolist()) for row, phi in zip(rows, every_phi)]
    if cfg.label == "reversed":  # a control, which must not help: all that a loss looks at
        negated = lambda row: {name: [-x for x in values] for name, values in row["scores"].items()}
        rows = [dict(row, phi=[1 - p for p in row["phi"]], scores=negated(row)) for row in rows]
    if cfg.label == "random":  # another control
        rows = [dict(row, scores={"random": row["phi"]}) for row in rows]
    check_scores(cfg, rows)
    return cfg, look_at_pictures(cfg.data, rows)


def check_scores(cfg, rows):
    """The scores that --loss looks at are there."""
    names = {frozenset(row["scores"]) for row in rows}
    there = ", ".join(sorted(frozenset.intersection(*names))) or "none"
    if cfg.loss in VOTES and (len(names) > 1 or not rows[0]["scores"]):
        fail(f"--loss {cfg.loss} needs the scores of every reward for every list; synpic.py makes them")
    wanted = {"weighted": ("weight_by", cfg.weight_by), "dro": ("expert_by", cfg.expert_by)}.get(cfg.loss)
    if not wanted or wanted[1] in (None, "phi"):
        return
    option, name = wanted
    if lacking := [n for n, row in enumerate(rows, 1) if name not in row["scores"]]:
        missing = f"{cfg.data}/metadata.jsonl, list {lacking[0]}: no scores of {name}"
        fail(f"--{option} {name}: {missing}; name another reward (every list has {there})")
    unusable = np.mean([x <= 0 for row in rows for x in row["scores"][name]])
    if option == "weight_by" and unusable >= 0.5:
        share = f"{unusable:.0%} of the scores are not positive and cannot weigh an error"
        fail(f"--weight_by {name}: {share}; name another reward (there are {there})")


# ----------------------------------------------------------------------------- latents and text, encoded once

CHUNK = 16  # lists whose prompts are encoded together: by their place, so whoever does it gets the same
DENOISING = ("unet", "transformer", "scheduler")  # parts of a model that encode nothing


def find_cache(cfg, rows, dtype, wanted):
    """(folder, missing): data/.cache/HASH with a file for each list, and the lists among `wanted` that it
    lacks, of this process's chunks (of random:NAME all). The hash is of what is encoded."""
    from lib import formats  # diffusers takes seconds, which readers of lists do not need

    images = [[row["prompt"], [d for _, _, d in row["pictures"]]] for row in rows]
    encoders = {k: v for k, v in formats.fingerprint(cfg.model).items() if k not in DENOISING}
    cache = Path(cfg.data) / ".cache" / digest([images, encoders, cfg.resolution, str(dtype)])
    rank, world = process_rank()
    mine = (n for n in sorted(wanted) if cfg.model.startswith("random:") or n // CHUNK % world == rank)
    return cache, [n for n in mine if not is_list(cache, n)]


def cache_file(cache, n):
    return cache / f"{n:07d}.safetensors"


def is_list(cache, n):
    """Is the file of list n there, whole, and not that of another list?"""
    with suppress(OSError, SafetensorError), safe_open(cache_file(cache, n), "pt") as f:
        return f.metadata() == {"list": f"{cache.name}/{n}"}
    return False


def read_cached(cache, n):
    """List n: {"latents": (k, C, h, w), and what the denoiser is conditioned on, a tensor each}."""
    return load_file(cache_file(cache, n))


def encoded_sizes(cfg, rows):
    """[(height, width)] in pixels of each list's images as they are encoded. What --resolution crops is said;
    without it a list of several sizes ends the run."""
    side, every = cfg.resolution, [[(h, w) for h, w, _ in row["pictures"]] for row in rows]
    if side:
        cuts = [max(1 - side / round(side * max(size) / min(size)) for size in of_list) for of_list in every]
        if any(cuts):
            share = f"{np.count_nonzero(cuts)} of {len(rows)} lists, by up to {100 * max(cuts):.0f} %"
            common.print_first(f"--resolution {side}: crops {share} of a picture")
        return [(side, side)] * len(rows)
    for row, of_list in zip(rows, every):
        if len(set(of_list)) > 1:
            found = ", ".join(f"{w} x {h}" for h, w in of_list)
            mend = "give --resolution, which crops all to one size, or delete that row"
            fail(f"{line_of(cfg.data, row['file_names'][0])}: its images have {found} pixels; {mend}")
    return [of_list[0] for of_list in every]


def by_size(sizes, indices):
    """These lists in buckets, [[list, ...], ...]: the images of a bucket have one size."""
    buckets = {}
    for n in indices:
        buckets.setdefault(sizes[n], []).append(n)
    return list(buckets.values())


def list_pixels(cfg, row, size):
    """(k, 3, H, W) of a list's images, whose `size` is (H, W)."""
    images = [read_pixels(f"{cfg.data}/{name}", cfg.resolution) for name in row["file_names"]]
    for name, image in zip(row["file_names"], images):
        if image.shape[1:] != size:  # a turn that is written behind the pixels
            fail(f"{cfg.data}/{name}: has another size than its header says; save it again")
    return torch.stack(images)


def write_cached(cache, n, tensors):
    """Several runs may write the same file. One that a power cut tore is noticed when it is read."""
    write = partial(save_file, tensors, metadata={"list": f"{cache.name}/{n}"})
    publish(cache_file(cache, n), write, sync=False, unique=True)


@torch.no_grad()
def encode(cfg, rows, sizes, pipe, device, dtype, cache, missing):
    """Write latents (k, C, h, w) of the lists `missing` and what the denoiser is conditioned on, a file for
    each list, which all processes read. Threads decode the next lists' images while one is encoded."""
    from lib import pipelines  # diffusers takes seconds, which readers of lists do not need

    family = pipelines.family_of(pipe)
    factor = pipe.vae_scale_factor * family.patch
    for row, (h, w) in zip(rows, sizes):
        if h % factor or w % factor:
            sides = f"{w} x {h} pixels, but sides must be multiples of {factor}"
            fail(f"{cfg.data}/{row['file_names'][0]}: {sides}; give another --resolution")
    for n in missing if pipe.vae is None else ():  # random:NAME is a denoiser alone; the shapes are right
        k, shapes = len(rows[n]["file_names"]), pipelines.shapes_at(pipe, sizes[n][0])
        g = torch.Generator().manual_seed(n)
        tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        write_cached(cache, n, {**tensors, "latents": torch.randn(k, *shapes["latents"], generator=g)})
    missing = [] if pipe.vae is None else missing
    for part in [pipe.vae, *pipelines.text_encoders_of(pipe).values()] if missing else ():
        part.to(device, None if part is pipe.vae else dtype)  # the VAE is fp32: SDXL's overflows in fp16
    chunk_of = lambda n: (n // CHUNK, sizes[n])
    missing, encoded = sorted(missing, key=chunk_of), None
    images = common.ahead(lambda n: list_pixels(cfg, rows[n], sizes[n]), missing, depth=8, threads=4)
    for n in tqdm(missing, desc="encode", unit="list", disable=process_rank()[0] > 0):
        if chunk_of(n) != encoded:
            encoded = chunk_of(n)
            chunk = range(len(rows))[n // CHUNK * CHUNK :][:CHUNK]
            chunk = [m for m in chunk if sizes[m] == sizes[n]]
            cond = family.encode_prompts(pipe, [rows[m]["prompt"] for m in chunk], sizes[n])
        tensors = {"latents": family.encode_images(pipe.vae, next(images)).float()}
        tensors.update({name: c[chunk.index(n)] for name, c in cond.items()})
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        if not all(t.isfinite().all() for t in tensors.values()):
            fail(f"{cfg.model}: encodes list {n}, {rows[n]['prompt']!r}, to numbers that are not finite")
        write_cached(cache, n, tensors)
    common.wait_for_all(slow=True)
