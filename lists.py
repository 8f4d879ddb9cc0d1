"""Ranked lists on disk: metadata.jsonl, a row a list of images; what is encoded once; people's data sets.

rows = read_metadata(folder, lists=True)                # prompt, file_names, scores, phi
names, rewards = stored_rewards(folder, rows, label)    # of R scores, a tensor (K, R) a list
train, held_out = split(rows, holdout, seed)            # indices; no prompt is in both
sizes = read_sizes(cfg, rows)                           # [(height, width)], from the files' headers
cache, missing = find_cache(cfg, rows, dtype, wanted)   # latents and text, a file a list
import_stage(cfg)                                       # Pick-a-Pic, HPDv2, HPDv3, ImageRewardDB
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter, namedtuple
from contextlib import suppress
from dataclasses import replace
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
from common import fail, path_inside, process_rank, publish, read_jsonl, read_pixels, read_text
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
    two images, which are there; with `labelled`, a phi in [0, 1] for each, so that it can be trained on.
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
    if lists and k < 2:
        raise ValueError("needs at least two file_names")
    if labelled:
        phi = row.get("phi")
        if not isinstance(phi, list) or len(phi) != k:
            raise ValueError("needs as many phi as file_names")
        if not all(is_number(p) and 0 <= p <= 1 for p in phi):
            raise ValueError("phi must lie in [0, 1]")
    if lists and (missing := [f for f in files if not os.path.isfile(f"{folder}/{f}")]):
        raise ValueError(f"image {missing[0]} is not in the folder")
    scores = {name: values for name, values in scores.items() if name not in EVALUATION_ONLY}
    return {**row, "prompt": prompt, "file_names": files, "scores": scores}


def check_label(label, known):
    if label not in known and not label.startswith("single:"):
        fail(f"--label {label}: there are {', '.join(known)} and single:REWARD")


def with_model(cfg):
    """The trainer's options, with the toy's model where none is named and the lists are of the toy world."""
    from toy import world

    if cfg.model is None:
        rows = [] if cfg.data == "random" else read_metadata(cfg.data)
        if not rows or not world.knows(cfg.data, [(row["prompt"], row["file_names"]) for row in rows]):
            fail("--model: must be named; the default, toy/models/sdxl, knows lists of the toy world alone")
        cfg = replace(cfg, model=f"{common.HERE}/toy/models/sdxl")
    return cfg


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
    if cfg.label == "reversed":  # a control, which must not help: all that a loss looks at
        negated = lambda row: {name: [-x for x in values] for name, values in row["scores"].items()}
        rows = [dict(row, phi=[1 - p for p in row["phi"]], scores=negated(row)) for row in rows]
    if cfg.label == "random":  # another control
        rows = [dict(row, scores={"random": row["phi"]}) for row in rows]
    check_scores(cfg, rows)
    return rows


def check_scores(cfg, rows):
    """The scores that --loss looks at are there."""
    names = {frozenset(row["scores"]) for row in rows}
    there = ", ".join(sorted(frozenset.intersection(*names))) or "none"
    if cfg.loss in VOTES and (len(names) > 1 or not rows[0]["scores"]):
        fail(f"--loss {cfg.loss} needs the scores of every reward for every list; synpic.py makes them")
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
    """(train, held out): indices of lists to train on, and of those to measure on. No prompt is in both."""
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
Cache = namedtuple("Cache", "folder shapes k", defaults=(None, None))


def find_cache(cfg, rows, dtype, wanted):
    """(Cache, missing): the folder data/.cache/HASH, and the lists among `wanted` that are not there, of the
    chunks that fall to this process. The hash is of all that goes into the cache: images, prompts, models."""
    if cfg.data == "random":
        return None, []
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
    with suppress(OSError, SafetensorError), safe_open(cache_file(cache, n), "pt") as f:
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
        with Image.open(path, formats=common.IMAGE_FORMATS) as image:
            turn = Image.Image.getexif(image).get(common.ORIENTATION)  # PNG's own method would decode
            lying = turn in (5, 6, 7, 8) and image.format != "TIFF"  # which PIL turns by itself
            return image.size if lying else image.size[::-1]
    except Exception as e:  # besides OSError, each format of PIL has its own
        fail(f"{path}: not a readable image ({e}); delete it and run synpic.py again")


def read_sizes(cfg, rows):
    """[(height, width)] in pixels of each list's images as they are encoded. What --resolution crops is said;
    without it a list of several sizes ends the run."""
    if cfg.data == "random":
        return [(cfg.resolution, cfg.resolution)] * len(rows)
    side, bar = cfg.resolution, dict(unit="list", delay=2, disable=process_rank()[0] > 0)
    size_of = lambda name: header_size(f"{cfg.data}/{name}")
    every = [list(map(size_of, row["file_names"])) for row in tqdm(rows, "headers", **bar)]
    if side:
        cuts = [max(1 - side / round(side * max(size) / min(size)) for size in of_list) for of_list in every]
        if any(cuts) and process_rank()[0] == 0:
            share = f"{np.count_nonzero(cuts)} of {len(rows)} lists, by up to {100 * max(cuts):.0f} %"
            print(f"--resolution {side}: crops {share} of a picture")
        return [(side, side)] * len(rows)
    for n, of_list in enumerate(every):
        if len(set(of_list)) > 1:
            path, found = metadata_file(cfg.data), ", ".join(f"{w} x {h}" for h, w in of_list)
            mend = "give --resolution, which crops all to one size, or delete that row"
            fail(f"{path}, line {metadata_rows(path)[n][0]}: its images have {found} pixels; {mend}")
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
        if image.shape[1:] != size:  # a turn that stands behind the pixels
            fail(f"{cfg.data}/{name}: has another size than its header says; save it again")
    return torch.stack(images)


@torch.no_grad()
def encode(cfg, rows, sizes, pipe, device, dtype, cache, missing):
    """Latents (k, C, h, w) of the lists `missing` and what the denoiser is conditioned on, a file a list that
    all processes read. Threads decode the next lists' images meanwhile. Returns the Cache to read from."""
    import pipelines  # diffusers takes seconds, which readers of lists do not need

    if cfg.data == "random":
        return Cache(None, pipelines.shapes_at(pipe, cfg.resolution), k=1 if cfg.loss == "dro" else 4)
    if not missing:
        return cache
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
    return cache


# ----------------------------------------------------------------------------- import

LARGEST = 1 << 28  # bytes of a picture: a larger member of a zip is a bomb or no picture

# Published choices of people: the fields of a prompt, of its pictures and of a number a picture, and 1 where
# higher is better, -1 for ranks. One field alone holds a list. Without numbers the first picture is better.
FORMATS = {
    "Pick-a-Pic v2": ("caption", ["jpg_0", "jpg_1"], ["label_0", "label_1"], 1),
    "ImageRewardDB": ("prompt", ["image_path"], ["rank"], -1),
    "ImageReward test": ("prompt", ["generations"], ["ranking"], -1),
    "HPDv2 test": ("prompt", ["image_path"], ["rank"], -1),
    "HPDv2": ("prompt", ["file_path"], ["human_preference"], 1),
    "HPDv3": ("prompt", ["path1", "path2"], [], 1),
}
FIELDS = {name: [prompt, *pictures, *labels] for name, (prompt, pictures, labels, _) in FORMATS.items()}
FIELDS["ImageRewardDB"].append("prompt_id")  # a row is a picture, and this is its list


def format_of(path, fields):
    """The name in FORMATS of a file with these fields."""
    for name, wanted in FIELDS.items():
        if set(wanted) <= set(fields):
            return name
    known = "; ".join(f"{name} has {', '.join(wanted)}" for name, wanted in FIELDS.items())
    found = ", ".join(map(str, fields)) or "no fields"
    fail(f"--from {path}: has {found}, which is no known format. {known}")


def read_records(path):
    """Yield (file, place in it, format, record) of a file; a parquet is read one row group after the other.
    Of ImageRewardDB the rows of a prompt_id are one record."""
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            file = ParquetFile(path)
            kind = format_of(path, file.schema_arrow.names)
            columns = [c for c in file.schema_arrow.names if c in (*FIELDS[kind], "has_label")]
            groups = (file.read_row_group(n, columns) for n in range(file.num_row_groups))
            batches = (batch for group in groups for batch in group.to_batches(64))  # iter_batches keeps all
            rows = (row for batch in batches for row in batch.to_pylist())
        else:
            lines = path.suffix == ".jsonl"
            rows = [row for _, row in read_jsonl(path)] if lines else common.parse_json(read_text(path))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("not a list of objects")
            kind = format_of(path, rows[0] if rows else ())
        what = "list" if kind == "ImageRewardDB" else "row"
        if what == "list":
            lists = {}
            for row in rows:
                empty = {"prompt": row["prompt"], "image_path": [], "rank": []}
                of_list = lists.setdefault((row["prompt_id"], row["prompt"]), empty)
                of_list["image_path"].append(row["image_path"])
                of_list["rank"].append(row["rank"])
            rows = lists.values()
        yield from ((path, f"{what} {n}", kind, row) for n, row in enumerate(rows, 1))
    except Exception as e:  # pyarrow has its own errors
        fail(f"--from {path}: not a readable file ({' '.join(str(e).split())[:200]})")


@lru_cache(maxsize=None)
def zipped(folder):
    """{file name: [(zip, member), ...]} of all zips in a folder. Members go by their last name, since
    publishers cut the paths before it differently."""
    members = {}
    for path in sorted(folder.rglob("*.zip")):
        try:
            archive = ZipFile(path)
        except Exception as e:  # zipfile has several kinds
            print(f"{path}: cannot be read ({e})")
            continue
        for member in archive.infolist():
            members.setdefault(Path(member.filename).name, []).append((archive, member))
    return members


def picture_bytes(picture, folder):
    """The bytes of a picture of a record, which is bytes, or the name of a file in the folder or in a zip
    there, or both as datasets saves them: {"bytes", "path"}. ValueError if it cannot be read."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        return picture
    path = path_inside(folder, picture)
    if os.path.isfile(path):
        size, read = os.path.getsize(path), Path(path).read_bytes
    else:
        found = zipped(folder).get(Path(picture).name, [])
        if len(found) != 1:
            raise ValueError(f"{picture} is {'twice' if found else 'not'} in {folder} and its zips")
        archive, member = found[0]
        size, read = member.file_size, partial(archive.read, member)
        picture = f"{picture} in {archive.filename}"
    if size > LARGEST:
        raise ValueError(f"{picture}: larger than {LARGEST >> 20} MB")
    try:
        return read()
    except Exception as e:  # a password, an unknown method, torn data: each method has its own errors
        raise ValueError(f"{picture}: {e}") from None


def keep_picture(out, data):
    """The name of a picture in the folder, made of its bytes: rows share it, and a second run finds it."""
    try:
        image = Image.open(io.BytesIO(data), formats=common.IMAGE_FORMATS)  # its head alone
    except Exception as e:  # besides OSError, each format of PIL has its own
        raise ValueError(f"not a readable image ({e})") from None
    digest = hashlib.sha256(data).hexdigest()[:32]
    name = f"images/{digest[:2]}/{digest}.{image.format.lower()}"
    path = Path(out) / name
    if not path.is_file() or path.stat().st_size != len(data):
        common.open_image(image)
        publish(path, lambda tmp: tmp.write_bytes(data), sync=False)
    return name


def imported_row(out, kind, record, folder):
    """A row of metadata.jsonl with the people's choice as the scores `human`, or None without one. ValueError
    with what is wrong with the record."""
    if record.get("has_label") is False:
        return None
    prompt, *fields, sign = FORMATS[kind]
    values = lambda names: record[names[0]] if len(names) == 1 else [record[name] for name in names]
    try:
        prompt = " ".join(record[prompt].split())
        pictures, labels = map(values, fields)
        scores = [sign * label for label in labels] or [1, 0]
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
    """Write the lists of all files to `metadata`, and print how many of which kind."""
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
    print(f"{cfg.out}/metadata.jsonl: {said}")


def import_stage(cfg):
    """metadata.jsonl and images/ from what people chose. The pictures are there first, under names that
    follow from their bytes, so that a run that was killed writes what is missing, and the same rows.
    import.json says what was imported. Until metadata.jsonl is there, another file may take its place."""
    source, out = Path(cfg.from_), Path(cfg.out)
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
    publish(out / "metadata.jsonl", lambda tmp: import_lists(cfg, paths, tmp))
