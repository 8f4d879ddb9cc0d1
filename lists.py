"""Ranked lists on disk: metadata.jsonl, a row a list of images; what is encoded once; people's data sets.

    rows = read_metadata(folder, lists=True)                # prompt, file_names, scores, phi
    names, rewards = stored_rewards(folder, rows, label)    # of R scores, a tensor (K, R) a list
    train, held_out = split(rows, holdout, seed)            # indices; no prompt is in both
    cache, missing = find_cache(cfg, rows, dtype, wanted)   # latents and text, a file a list
    import_stage(cfg)                                       # Pick-a-Pic, HPDv2, HPDv3, ImageRewardDB

A bad row ends the run with its file, its line and what to do.
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter, namedtuple
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import common
from common import (
    IMAGE_FORMATS,
    ORIENTATION,
    fail,
    path_inside,
    process_rank,
    publish,
    read_jsonl,
    read_pixels,
    read_text,
)
from losses import preference_labels, preference_rank

# ----------------------------------------------------------------------------- metadata.jsonl

EVALUATION_ONLY = ("toyworld", "diversity")  # rewards from which no label comes


def metadata_file(folder):
    """metadata.jsonl of a folder, else the metadata.csv of an imagefolder, or None."""
    found = (Path(folder) / name for name in ("metadata.jsonl", "metadata.csv"))
    return next((path for path in found if path.is_file()), None)


def metadata_rows(path):
    """[(line, dict)] of a metadata file."""
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    lines = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        return [(lines.line_num, row) for row in lines]
    except csv.Error as e:
        fail(f"{path}, line {lines.line_num}: {e}")


def read_metadata(folder, lists=False, labelled=False):
    """Rows of a folder's metadata file, one a list of images: prompt, file_names; scores and phi if there.

    Rows of other programs may say caption or text, and file_name. With `lists`, every row must have at least
    two images, which are there; with `labelled`, also a phi in [0, 1] for each, so that it can be trained on.
    A bad row ends the run with file, line and what to do."""
    path, rows, lines, real = metadata_file(folder), [], {}, os.path.realpath(folder)
    if not path:
        near = [p for p in Path(folder).glob("*/metadata.*") if p.suffix in (".jsonl", ".csv")]
        hint = f"make it with synpic.py, or name the folder of {near[0] if near else 'one with --data'}"
        fail(f"{folder}/metadata.jsonl: no such file; {hint}")
    mend = "mend or delete that row" + (" (synpic.py --stages label writes phi anew)" if labelled else "")
    for n, row in metadata_rows(path):
        try:
            rows.append(row := checked_row(real, row, lists, labelled))
            if (first := lines.setdefault((row["prompt"], *row["file_names"]), n)) < n:
                raise ValueError(f"the same prompt and images as line {first}")
        except (ValueError, TypeError, AttributeError) as e:
            fail(f"{path}, line {n}: {e}; {mend}")
    if not rows:
        fail(f"{path}: no rows; run synpic.py to the end first, with all of its stages")
    return rows


def checked_row(folder, row, lists, labelled):
    """A row of metadata.jsonl with its keys in our names; ValueError says what is wrong with it."""
    prompt = next((row[k] for k in common.TEXT if k in row), None)
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
    scores, k = {} if row.get("scores") is None else row["scores"], len(files)
    if not isinstance(scores, dict):
        raise ValueError("scores must be an object, {reward: [a number an image]}")
    for name, values in scores.items():
        if not isinstance(values, list) or len(values) != k or not all(map(is_number, values)):
            raise ValueError(f"scores of {name}: as many finite numbers as file_names are wanted")
    if (lists or labelled) and k < 2:
        raise ValueError("needs at least two file_names")
    if labelled:
        phi = row.get("phi")
        if not isinstance(phi, list) or len(phi) != k:
            raise ValueError("needs as many phi as file_names")
        if not all(is_number(p) and 0 <= p <= 1 for p in phi):
            raise ValueError("phi must lie in [0, 1]")
    if lists or labelled:
        if missing := [f for f in files if not os.path.isfile(f"{folder}/{f}")]:
            raise ValueError(f"image {missing[0]} is not in the folder")
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
        first = (
            f"score first: python rewards.py --score {folder} --rewards NAME, then synpic.py --stages label"
        )
        fail(f"--label {label}: {folder}/metadata.jsonl: {found}; {first}")
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


# ----------------------------------------------------------------------------- what is trained on

STORED = ("given", "reversed")  # labels that need no scores: the phi that is there
VOTES = ("balanced", "direct", "random_scorer")  # losses that look at scores, not at phi


def read_lists(cfg):
    """The trainer's rows of metadata.jsonl, with the phi that --label asks for and the scores that count."""
    if cfg.data == "random":
        phi = [1.0, 2 / 3, 1 / 3, 0.0]
        return [{"prompt": "", "phi": phi, "scores": {"random": phi}}] * cfg.global_batch_size
    stored = cfg.label in STORED
    rows = read_metadata(cfg.data, lists=True, labelled=stored)
    if cfg.label_rewards or not stored:
        names, rewards = stored_rewards(cfg.data, rows, cfg.label, cfg.label_rewards)
        rows = [dict(row, scores={name: row["scores"][name] for name in names}) for row in rows]
    if not stored:
        every_phi = preference_labels(cfg.label, rewards, cfg.seed)
        rows = [dict(row, phi=phi.tolist()) for row, phi in zip(rows, every_phi)]
    rows = [control(row, cfg.label) for row in rows]
    check_scores(cfg, rows)
    return rows


def control(row, label):
    """The row of a control, which must not help: all that a loss looks at is reversed, or random."""
    if label == "reversed":
        scores = {name: [-x for x in values] for name, values in row["scores"].items()}
        return dict(row, phi=[1 - p for p in row["phi"]], scores=scores)
    return dict(row, scores={"random": row["phi"]}) if label == "random" else row


def check_scores(cfg, rows):
    """The scores that --loss looks at are there."""
    names = {frozenset(row["scores"]) for row in rows}
    there = ", ".join(sorted(frozenset.intersection(*names))) or "none"
    if cfg.loss in VOTES and (len(names) > 1 or not rows[0]["scores"]):
        fail(
            f"--loss {cfg.loss} needs the scores of every reward for every list: run synpic.py's score stage"
        )
    wanted = {"weighted": ("weight_by", cfg.weight_by), "dro": ("expert_by", cfg.expert_by)}.get(cfg.loss)
    if not wanted or wanted[1] in (None, "phi") or cfg.data == "random":
        return
    option, name = wanted
    if lacking := [n for n, row in enumerate(rows, 1) if name not in row["scores"]]:
        missing = f"{cfg.data}/metadata.jsonl, list {lacking[0]}: no scores of {name}"
        fail(f"--{option} {name}: {missing}; name another reward (every list has {there})")
    unusable = np.mean([x <= 0 for row in rows for x in row["scores"][name]])
    if option == "weight_by" and unusable >= 0.5:
        share = f"{unusable:.0%} of the scores are not positive and cannot weigh an error"
        fail(f"--weight_by {name}: {share}; name another reward (there are {there})")


def split(rows, holdout, seed):
    """(train, held out): indices of the lists that are trained on, and of those kept to measure on. No prompt
    is in both."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    shuffled = np.random.default_rng([seed, 2**32 - 1]).permutation(len(prompts))
    kept = {prompts[i] for i in shuffled[: round(holdout * len(prompts))]}
    if len(kept) == len(prompts) or (holdout and not kept):
        none = f"leaves no list to {'train on' if kept else 'measure'}"
        fail(f"--holdout {holdout} of {len(prompts)} prompts {none}")
    held_out = [n for n, row in enumerate(rows) if row["prompt"] in kept]
    return [n for n, row in enumerate(rows) if row["prompt"] not in kept], held_out


# ----------------------------------------------------------------------------- latents and text, encoded once

CHUNK = 16  # lists whose prompts are encoded together: by their place, so whoever does it gets the same

DENOISING = ("unet", "transformer", "scheduler")  # parts of a model that encode nothing

# `folder` has a file a list; without one, lists of k images are random, of the `shapes` {tensor: shape}
Cache = namedtuple("Cache", "folder shapes k", defaults=(None, None, None))


def find_cache(cfg, rows, dtype, wanted):
    """(Cache, missing): the folder data/.cache/HASH, and the lists among `wanted` that are not there, of the
    chunks that fall to this process. The hash is of all that goes into the cache: images, prompts, models."""
    if cfg.data == "random":
        return Cache(), []
    import pipelines  # diffusers takes seconds, which readers of lists do not need

    data = Path(cfg.data)
    stat = lambda p: [str(p), p.stat().st_size, p.stat().st_mtime_ns]
    images = [[row["prompt"], [stat(data / f) for f in row["file_names"]]] for row in rows]
    encoders = {k: v for k, v in pipelines.fingerprint(cfg.model).items() if k not in DENOISING}
    key = json.dumps([images, cfg.model, encoders, cfg.resolution, str(dtype)])
    cache = Cache(data / ".cache" / hashlib.sha256(key.encode()).hexdigest()[:16])
    rank, world = process_rank()
    mine = (n for n in sorted(wanted) if n // CHUNK % world == rank)
    return cache, [n for n in mine if not is_list(cache, n)]


def cache_file(cache, n):
    return cache.folder / f"{n:07d}.safetensors"


def is_list(cache, n):
    """Is the file of list n there, whole, and not that of another list?"""
    with suppress(OSError, SafetensorError):
        with safe_open(cache_file(cache, n), "pt") as f:
            return f.metadata() == {"list": f"{cache.folder.name}/{n}"}
    return False


def read_cached(cache, n):
    """List n: {"latents": (k, C, h, w), and what the denoiser is conditioned on, a tensor each}."""
    if cache.folder:
        return load_file(cache_file(cache, n))
    g = torch.Generator().manual_seed(n)
    tensors = {name: torch.randn(shape, generator=g) for name, shape in cache.shapes.items()}
    return {**tensors, "latents": torch.randn(cache.k, *cache.shapes["latents"], generator=g)}


def header_size(path):
    """(height, width) of an image file as read_pixels gives it, from its header: nothing is decoded."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            turn = Image.Image.getexif(image).get(ORIENTATION)  # PNG's own method would decode
            lying = turn in (5, 6, 7, 8) and image.format != "TIFF"  # which PIL turns by itself
            return image.size if lying else image.size[::-1]
    except Exception as e:  # besides OSError, each format of PIL has its own
        fail(f"{path}: not a readable image ({e}); delete it and run synpic.py again")


def read_sizes(cfg, rows):
    """[(height, width)] in pixels of each list's images. A list of several sizes ends the run; what
    --resolution crops is said."""
    if cfg.data == "random":
        return [(cfg.resolution, cfg.resolution)] * len(rows)
    first, side, sizes, cuts = process_rank()[0] == 0, cfg.resolution, [], []
    for n, row in enumerate(tqdm(rows, "headers", unit="list", delay=2, disable=not first)):
        of_list = [header_size(f"{cfg.data}/{name}") for name in row["file_names"]]
        if side:
            cuts.append(max(1 - side / round(side * max(size) / min(size)) for size in of_list))
        elif len(set(of_list)) > 1:
            path, found = metadata_file(cfg.data), ", ".join(f"{w} x {h}" for h, w in of_list)
            mend = "give --resolution, which crops all to one size, or delete that row"
            fail(f"{path}, line {metadata_rows(path)[n][0]}: its images have {found} pixels; {mend}")
        sizes.append((side, side) if side else of_list[0])
    if first and any(cuts):
        lost = f"{np.count_nonzero(cuts)} of {len(rows)} lists, by up to {100 * max(cuts):.0f} % of a picture"
        print(f"--resolution {side}: crops {lost}")
    return sizes


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
        if image.shape[1:] != size:  # a turn that stands behind the pixels
            fail(f"{cfg.data}/{name}: has another size than its header says; save it again")
    return torch.stack(images)


@torch.no_grad()
def encode(cfg, rows, sizes, pipe, device, dtype, cache, missing):
    """Latents (k, C, h, w) of the lists `missing` and what the denoiser is conditioned on, a file a list that
    all processes read. Threads decode the next lists' images meanwhile."""
    if not missing:
        return
    import pipelines  # diffusers takes seconds, which readers of lists do not need

    family = pipelines.family_of(pipe)
    factor = pipe.vae_scale_factor * family.patch
    for row, (h, w) in zip(rows, sizes):
        if h % factor or w % factor:
            sides = f"{w} x {h} pixels, but sides must be multiples of {factor}"
            fail(f"{cfg.data}/{row['file_names'][0]}: {sides}; give another --resolution")
    pipe.vae.to(device)  # fp32: SDXL's VAE overflows in fp16
    for encoder in pipelines.text_encoders_of(pipe).values():
        encoder.to(device, dtype)
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
        # several runs may write the same file; one torn by a power cut is noticed when it is read
        write = partial(save_file, tensors, metadata={"list": f"{cache.folder.name}/{n}"})
        publish(cache_file(cache, n), write, sync=False, unique=True)


# ----------------------------------------------------------------------------- import

LARGEST = 1 << 28  # bytes of a picture: a larger member of a zip is a bomb or no picture


def ranked_rows(record):
    """ImageRewardDB has a row a picture; its record is a prompt_id, of which each field is a list."""
    if len(set(record["prompt"])) > 1:
        raise ValueError(f"{len(set(record['prompt']))} prompts under one prompt_id")
    return record["prompt"][0], record["image_path"], [-rank for rank in record["rank"]]


# Published choices of people: the fields that a format is known by, and what a record of it says as (prompt,
# pictures as bytes or names, a number a picture, higher is better).
RANKED = lambda r: (r["prompt"], r["image_path"], [-rank for rank in r["rank"]])
PICKED = lambda r: (r["caption"], [r["jpg_0"], r["jpg_1"]], [r["label_0"], r["label_1"]])
FORMATS = {
    "Pick-a-Pic v2": (("caption", "jpg_0", "jpg_1", "label_0", "label_1"), PICKED),
    "ImageRewardDB": (("prompt_id", "prompt", "image_path", "rank"), ranked_rows),
    "ImageReward test": (
        ("prompt", "generations", "ranking"),
        lambda r: (r["prompt"], r["generations"], [-rank for rank in r["ranking"]]),
    ),
    "HPDv2 test": (("prompt", "image_path", "rank"), RANKED),
    "HPDv2": (
        ("prompt", "file_path", "human_preference"),
        lambda r: (r["prompt"], r["file_path"], r["human_preference"]),
    ),
    "HPDv3": (("prompt", "path1", "path2"), lambda r: (r["prompt"], [r["path1"], r["path2"]], [1, 0])),
}


def format_of(path, fields):
    """The name in FORMATS of a file with these fields."""
    for name, (wanted, _) in FORMATS.items():
        if set(wanted) <= set(fields):
            return name
    known = "; ".join(f"{name} has {', '.join(wanted)}" for name, (wanted, _) in FORMATS.items())
    found = ", ".join(map(str, fields)) or "no fields"
    fail(f"--from {path}: has {found}, which is no known format. {known}")


def read_rows(path):
    """(format, rows as dicts) of a file; those of a parquet come one row group after the other."""
    if path.suffix != ".parquet":
        lines = path.suffix == ".jsonl"
        rows = [row for _, row in read_jsonl(path)] if lines else common.parse_json(read_text(path))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("not a list of objects")
        return format_of(path, rows[0] if rows else ()), rows
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)
    kind = format_of(path, file.schema_arrow.names)
    columns = [c for c in file.schema_arrow.names if c in (*FORMATS[kind][0], "has_label")]
    groups = (file.read_row_group(n, columns) for n in range(file.num_row_groups))  # iter_batches keeps all
    return kind, (row for group in groups for batch in group.to_batches(64) for row in batch.to_pylist())


def read_records(path):
    """Yield (file, place in it, format, record) of a file."""
    try:
        kind, rows = read_rows(path)
        if kind != "ImageRewardDB":
            yield from ((path, f"row {n}", kind, row) for n, row in enumerate(rows, 1))
            return
        lists = {}  # a row an image, without its pixels
        for row in rows:
            lists.setdefault(row["prompt_id"], []).append(row)
    except Exception as e:  # pyarrow has its own errors
        fail(f"--from {path}: not a readable file ({' '.join(str(e).split())[:200]})")
    for name, rows in lists.items():
        columns = {key: [row[key] for row in rows] for key in ("prompt", "image_path", "rank")}
        yield path, f"prompt_id {name}", kind, columns


@lru_cache(maxsize=None)
def zipped(folder):
    """{file name: [(zip, member), ...]} of all zips in a folder, and the zips that cannot be read. Members go
    by their last name, since publishers cut the paths before it differently."""
    members, torn = {}, []
    for path in sorted(folder.rglob("*.zip")):
        try:
            archive = ZipFile(path)
        except Exception as e:  # zipfile has several kinds
            torn.append(f"{path.name}: {e}")
            continue
        for member in archive.infolist():
            members.setdefault(Path(member.filename).name, []).append((archive, member))
    return members, torn


def picture_bytes(picture, folder):
    """The bytes of a picture of a record, which is bytes, or the name of a file in the folder or in a zip
    there, or both as datasets saves them: {"bytes", "path"}. ValueError if it cannot be read."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        return picture
    path = path_inside(folder, picture)
    if os.path.isfile(path):
        if os.path.getsize(path) > LARGEST:
            raise ValueError(f"{picture}: larger than {LARGEST >> 20} MB")
        return Path(path).read_bytes()
    members, torn = zipped(folder)
    found = members.get(Path(picture).name, [])
    if len(found) != 1:
        what = f"{picture} is {'twice' if found else 'not'} in {folder} and its zips"
        raise ValueError(
            what + (f" (of which these cannot be read: {', '.join(torn)[:200]})" if torn else "")
        )
    archive, member = found[0]
    if member.file_size > LARGEST:
        raise ValueError(f"{picture} in {archive.filename}: larger than {LARGEST >> 20} MB")
    try:
        return archive.read(member)
    except Exception as e:  # a password, an unknown method, torn data: each method has its own errors
        raise ValueError(f"{picture} in {archive.filename}: {e}") from None


def keep_picture(out, data):
    """The name of a picture in the folder, made of its bytes: rows share it, and a second run finds it."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)  # its head alone
    except Exception as e:  # besides OSError, each format of PIL has its own
        raise ValueError(f"not a readable image ({e})") from None
    digest = hashlib.sha256(data).hexdigest()[:32]
    name = f"images/{digest[:2]}/{digest}.{image.format.lower()}"
    try:
        whole = os.stat(f"{out}/{name}").st_size == len(data)
    except FileNotFoundError:
        whole = False
    if not whole:
        common.open_image(image)
        publish(f"{out}/{name}", lambda tmp: tmp.write_bytes(data), sync=False)
    return name


def imported_row(out, kind, record, folder):
    """A row of metadata.jsonl with the people's choice as the scores `human`, or None without one. ValueError
    with what is wrong with the record."""
    if record.get("has_label") is False:
        return None
    try:
        prompt, pictures, scores = FORMATS[kind][1](record)
        prompt = " ".join(prompt.split())
        fits = prompt and len(pictures) == len(scores) and all(map(is_number, scores))
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"not the fields of {kind}: a prompt, pictures and as many labels are wanted")
    if len(pictures) < 2:
        return None
    files = []
    for n, picture in enumerate(pictures):
        try:
            files.append(keep_picture(out, picture_bytes(picture, folder)))
        except ValueError as e:
            raise ValueError(f"picture {n} of {common.quoted(prompt)}: {e}") from None
    if len(set(files)) < len(files):
        return None  # nothing to choose between
    phi = preference_labels("phi", [torch.tensor(scores, dtype=torch.float64)[:, None]])[0]
    labels = dict(scores={"human": scores}, phi=phi.tolist(), rank=preference_rank(phi).tolist())
    return dict(prompt=prompt, file_names=files, **labels)


def import_lists(cfg, paths, metadata):
    """Write the lists of all files to `metadata`. Returns how many of which kind, as text."""
    counts, problems, seen = Counter(lists=0), [], set()
    records = (record for path in paths for record in read_records(path))
    with open(metadata, "w", encoding="utf-8") as f:
        for path, place, kind, record in tqdm(records, desc="import", unit="list"):
            try:
                row = imported_row(cfg.out, kind, record, Path(cfg.pictures or path.parent))
            except ValueError as e:
                problems.append(f"{path}, {place}: {e}")
                if cfg.on_error == "stop":
                    fail(f"{problems[0]}; mend it, or leave such lists out with --on_error skip")
                continue
            key = row and hash((row["prompt"], *row["file_names"]))
            if row is None or key in seen:
                counts["without a choice" if row is None else "doubled"] += 1
                continue
            seen.add(key)
            human = row["scores"]["human"]
            counts.update(lists=1, images=len(human), ties=int(len(set(human)) < len(human)))
            f.write(json.dumps(row) + "\n")
    common.print_problems(problems, "lists could not be read")
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    if not counts["lists"]:
        fail(f"--from {cfg.from_}: {said}, so nothing was imported")
    return said


def import_stage(cfg):
    """metadata.jsonl and images/ from what people chose. The pictures are there first, under names that
    follow from their bytes, so that a run that was killed writes what is missing, and the same rows.

    import.json says what was imported. Until metadata.jsonl is there, another file may take its place: what
    is left of an import that failed is pictures that no row names."""
    source, out, said = Path(cfg.from_), Path(cfg.out), []
    paths = common.shards(source) if source.is_dir() else [source]
    if not cfg.from_ or not paths or not all(path.is_file() for path in paths):
        fail(f"--from {source}: name a .parquet, .json or .jsonl file, or a folder of .parquet files")
    if cfg.pictures and not Path(cfg.pictures).is_dir():
        fail(f"--pictures {cfg.pictures}: no such folder")
    now = json.dumps([[path.name, *common.ends_of(path, 1 << 20)] for path in paths]) + "\n"
    begun, done = out / "import.json", (out / "metadata.jsonl").is_file()
    if done and begun.is_file() and read_text(begun) != now:
        fail(f"--out {out}: holds the lists of another file than {source}; choose another folder")
    if not begun.is_file() and (done or (out / "images").exists()):
        fail(f"--out {out}: holds other pictures; choose another folder")
    if done:
        print(f"{out}: was imported already; delete its metadata.jsonl to do it again")
        return
    common.write_text(begun, now)
    publish(out / "metadata.jsonl", lambda tmp: said.append(import_lists(cfg, paths, tmp)))
    print(f"{out}/metadata.jsonl: {said[0]}")
