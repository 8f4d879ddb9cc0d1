"""Syn-Pic: a ranked preference data set without human labels (RankDPO, Algorithm 1).

    python synpic.py                                         # the toy world -> outputs/synpic
    python synpic.py --prompts my.txt --out synpic --rewards hpsv2.1 pickscore imagereward --batch_size 8 \\
        --models sdxl sd3 pixart cascade                     # the paper's four generators, from the hub
    torchrun --standalone --nproc_per_node 8 synpic.py ...   # the same data set, made by all GPUs
    python synpic.py ... --shard 3/16                        # part 3 of a job array; when all are done, once:
                                                             # the same command with --stages label
    python synpic.py --models sdxl sdxl,seed=1 sdxl,seed=2   # one generator, several seeds (Table 4)
    python synpic.py --stages label --label majority         # phi and rank anew, in seconds
    python synpic.py --stages import --from pickapic --out synpic    # pairs from people, see docs/synpic.md
    python synpic.py --stages label --out my_lists           # lists from elsewhere

Every model draws every prompt, every reward scores every image, and phi (the share of pairwise wins over
images and rewards) ranks the k images of a prompt, in three stages:

    generate   images/00000/sdxl_0.png ...    whole or not at all; each image has its own noise, each batch
                                              its place: the same pictures, whoever draws them, and when
    score      scores/pickscore.jsonl ...     appended as they come; a torn last line is scored again
    label      metadata.jsonl, preview.png    a row a prompt: its images, models, seeds, scores, phi, rank
               summary.json, summary.png      wins, agreement of the rewards, ties, speed, cost

A run that was killed is started again: the first two stages skip what is done; labels follow from the stored
scores alone and are always made anew. rankdpo.py trains on the folder, and
datasets.load_dataset("imagefolder", data_dir=...) reads it.
"""

import hashlib
import io
import json
import os
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from common import (
    EVALUATION_ONLY,
    HERE,
    check_label,
    ends_of,
    fail,
    in_range,
    is_number,
    lock,
    one_line_errors,
    open_image,
    option,
    parse,
    parse_json,
    pick_device,
    pick_dtype,
    picture_grid,
    process_rank,
    publish,
    read_image,
    read_metadata,
    read_prompts,
    read_text,
    start_processes,
    stored_rewards,
    whole_lines,
    writable_folder,
    write_text,
)
from losses import LABELS, preference_labels, preference_rank
from pipelines import check_pipeline, generate_each, load_pipeline, noise_seed
from rewards import (
    TOY_REWARDS,
    check_rewards,
    read_scores,
    reward_name,
    score_rows,
    stored_lines,
    stored_scores,
    version_there,
)

# Sampling defaults of each generator's model card: (hub id, steps, guidance, side in pixels, type on a GPU).
MODELS = {
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 40, 5.0, 1024, "fp16"),
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", 28, 7.0, 1024, "fp16"),
    "pixart": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 20, 4.5, 1024, "fp16"),
    "cascade": ("stabilityai/stable-cascade", 20, 4.0, 1024, "bf16"),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 50, 7.5, 512, "fp16"),
    "flux": ("black-forest-labs/FLUX.1-dev", 50, 3.5, 1024, "bf16"),
    "flux-schnell": ("black-forest-labs/FLUX.1-schnell", 4, 0.0, 1024, "bf16"),
    "qwen": ("Qwen/Qwen-Image", 50, 4.0, 1328, "bf16"),
}
TOY_MODELS = (
    f"sdxl={HERE}/toy/models/sdxl,steps=16,guidance=3",
    f"sdxl={HERE}/toy/models/sdxl,steps=16,guidance=3,seed=1",
    f"sd3={HERE}/toy/models/sd3,steps=16,guidance=3",
    f"sd15={HERE}/toy/models/sd15,steps=16,guidance=5",
    f"sd15={HERE}/toy/models/sd15,steps=16,guidance=5,seed=1",
)
STAGES = ("generate", "score", "label")


@dataclass
class Config:
    # what is drawn
    prompts: str = option(f"{HERE}/toy/prompts.txt", "prompts: .txt, .json, .jsonl, .csv, .tsv or .parquet")
    field: str = option("", "the column of prompts in such a file; empty = prompt, caption or text")
    limit: int = option(0, "use that many prompts; 0 = all", at_least=0)
    offset: int = option(0, "skip that many prompts first", at_least=0)
    models: tuple = option(TOY_MODELS, "generators: name[=path][,steps=28][,guidance=4.5][,seed=1]...")
    from_: str = option(
        "", "import: .parquet or .json of Pick-a-Pic, HPDv2, HPDv3 or ImageRewardDB, or a folder"
    )
    pictures: str = option("", "import: folder of its pictures or zips of them; empty = where the file lies")
    # how it is scored and ranked
    rewards: tuple = option(
        (),
        "reward models, as name or name=source; see rewards.py (default: the toy world's four; to label "
        "lists that are there, all that scored them)",
    )
    label: str = option("phi", f"what ranks a list: {', '.join(LABELS)} or single:REWARD")
    seed: int = option(0, "of the order that --label random gives; a generator's is ,seed=1", at_least=0)
    # how it is run
    out: str = option("outputs/synpic", "folder to write")
    stages: tuple = option(STAGES, "which stages to run; import stands alone", ("import", *STAGES))
    batch_size: int = option(64, "images a batch, in every stage", at_least=1)
    shard: str = option("0/1", "i/n: make only part i of n, for job arrays; label when all are done")
    on_error: str = option("stop", "images that cannot be drawn or scored: stop, or skip", ("stop", "skip"))
    gpu_price: float = option(0.0, "USD a GPU hour, for the cost in the summary; 0 = no cost", at_least=0)
    precision: str = option(
        "auto", "of the generators: its own on a GPU, else fp32", ("auto", "fp32", "bf16", "fp16")
    )
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


# ----------------------------------------------------------------------------- generators


def parse_model(spec):
    """ "name[=path][,key=value...]" -> dict(name, path, steps, guidance, resolution, dtype, seed)."""
    head, *options = spec.split(",")
    name, _, path = head.partition("=")
    if not path and (name not in MODELS or "=" in head):
        fail(f"unknown model {name!r}: use one of {', '.join(MODELS)}, or {name}=folder_or_hub_id")
    if not name or not all(c.isalnum() or c in "-." for c in name):  # it becomes a part of file names
        fail(f"model {spec!r}: a name is made of letters, digits, - and .")
    hub, steps, guidance, resolution, dtype = MODELS.get(name, ("", 30, 5.0, 0, "bf16"))
    model = dict(name=name, path=path or hub, steps=steps, guidance=guidance, dtype=dtype, seed=0)
    model["resolution"] = 0 if path else resolution
    kinds = {"steps": (int, 1), "guidance": (float, 0), "resolution": (int, 0), "seed": (int, 0)}
    kinds["dtype"] = (str, None)
    for text in options:
        key, _, value = text.partition("=")
        if key not in kinds:
            fail(f"model {spec!r}: no option {key!r}; there are {', '.join(kinds)}")
        if spec.count(f",{key}=") > 1:
            fail(f"model {spec!r}: {key} appears twice")
        try:
            kind, least = kinds[key]
            model[key] = in_range(key, kind(value), (None, least, None))
        except ValueError as e:
            fail(f"model {spec!r}: {e}")
    if model["resolution"] % 8:
        fail(f"model {spec!r}: resolution must be a multiple of 8")
    if model["dtype"] not in ("fp32", "bf16", "fp16"):
        fail(f"model {spec!r}: dtype is fp32, bf16 or fp16")
    return model


def parse_models(specs):
    models = [parse_model(spec) for spec in specs]
    if len(models) < 2:
        fail("--models: at least two are needed")
    if len({file_name(0, m) for m in models}) < len(models):
        fail("--models: a model that appears twice needs another seed, as in sdxl sdxl,seed=1")
    return models


def file_name(i, model):
    return f"images/{i:05d}/{model['name']}_{model['seed']}.png"


# ----------------------------------------------------------------------------- stage 1: generate


def to_draw(cfg, batches, models):
    """[(k, model, batches of rows (prompt, file_names) that lack its pictures)]. Every model is looked at
    before the first one draws."""
    todo = []
    for k, model in enumerate(models):
        missing = [b for b in batches if not all(is_whole(f"{cfg.out}/{files[k]}") for _, files in b)]
        if missing:
            check_pipeline(model["path"])
            todo.append((k, model, missing))
    return todo


def progress(title, todo):
    """A bar over the images of all models of to_draw, with images/s and the time left."""
    images = sum(len(batch) for _, _, missing in todo for batch in missing)
    return tqdm(total=images, desc=title, unit="image", disable=process_rank()[0] > 0 or not images)


def generate_stage(cfg, todo, device, settings, bar):
    """Draw what to_draw found missing, one generator in memory at a time. evaluate.py draws with it, too."""
    pipe, loaded, problems = None, None, []
    for k, model, missing in todo:
        precision = cfg.precision
        if precision == "auto":
            precision = "fp32" if device.type == "cpu" else model["dtype"]
        if loaded != (model["path"], precision):
            pipe = None  # free the last one first
            pipe = load_pipeline(model["path"], device, pick_dtype(precision, device))
            loaded = (model["path"], precision)
            keep_settings(cfg, settings)  # from here on the folder is that of these models
        began, images = time.time(), sum(len(batch) for batch in missing)
        problems += draw(cfg, pipe, k, model, missing, bar)
        note_time(cfg, "generate", f"{model['name']}_{model['seed']}", images, time.time() - began)
    keep_settings(cfg, settings)  # also where nothing was left to draw
    show_problems(problems, "images could not be drawn")


def show_problems(problems, what):
    if problems:
        print("\n".join(problems[:20]))
        print(f"{len(problems)} {what}; at most 20 of them are listed above")


def draw(cfg, pipe, k, model, batches, bar):
    """Image k of every row; threads write pictures while the next batch is drawn. Returns what went wrong."""
    problems, writing = [], []
    bar.set_description(f"generate {model['name']}_{model['seed']}")
    with ThreadPoolExecutor(4) as threads:
        for batch in batches:
            prompts = [prompt for prompt, _ in batch]
            noise = model.get("noise", model["name"])  # models that are compared start from the same
            seeds = [noise_seed(prompt, noise, model["seed"]) for prompt in prompts]
            results = generate_each(pipe, prompts, seeds, model)
            for picture in writing:  # at most one batch waits to be written
                picture.result()
            writing = []
            for (prompt, files), (image, problem) in zip(batch, results):
                path = Path(cfg.out) / files[k]
                if problem:
                    problems.append(f"{path}, prompt {prompt!r}: {problem}")
                    path.unlink(missing_ok=True)
                elif not is_whole(path):
                    writing.append(threads.submit(publish, path, image.save, sync=False))
            if problems and cfg.on_error == "stop":
                fail(f"{problems[0]}; nothing was written for it. --on_error skip leaves such prompts out")
            bar.update(len(batch))
        for picture in writing:
            picture.result()
    return problems


# ----------------------------------------------------------------------------- in place of 1 and 2: import

# Published choices of people: the fields that a format is known by, and what a record of it says as (prompt,
# pictures as bytes or names, a number a picture, higher is better). Of ImageRewardDB a record is a prompt_id.
RANKED = lambda r: (r["prompt"], r["image_path"], [-rank for rank in r["rank"]])
PICKED = lambda r: (r["caption"], [r["jpg_0"], r["jpg_1"]], [r["label_0"], r["label_1"]])
FORMATS = {
    "Pick-a-Pic v2": (("caption", "jpg_0", "jpg_1", "label_0", "label_1"), PICKED),
    "ImageRewardDB": (("prompt_id", "prompt", "image_path", "rank"), RANKED),
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
        rows = parse_json(read_text(path))
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
        columns = {key: [row[key] for row in rows] for key in ("image_path", "rank")}
        yield path, f"prompt_id {name}", kind, {"prompt": rows[0]["prompt"], **columns}


@lru_cache(maxsize=None)
def zipped(folder):
    """{file name: [(zip, member), ...]} of all zips in a folder; publishers cut their paths differently."""
    members = {}
    for path in sorted(folder.rglob("*.zip")):
        archive = ZipFile(path)
        for member in archive.namelist():
            members.setdefault(Path(member).name, []).append((archive, member))
    return members


def picture_bytes(picture, folder):
    """A picture of a record: its bytes, or a file of this name in the folder or in a zip there."""
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, str) or not picture or "\0" in picture:
        raise ValueError(f"no picture ({picture!r})")
    if (folder / picture).is_file():
        return (folder / picture).read_bytes()
    try:
        found = zipped(folder).get(Path(picture).name, [])
        if len(found) == 1:
            return found[0][0].read(found[0][1])
    except (BadZipFile, zlib.error, EOFError) as e:
        raise ValueError(f"{picture}: {e}") from None
    raise ValueError(f"{picture} is {'twice' if found else 'not'} in {folder} and its zips")


def keep_picture(out, data):
    """The name of a picture in the folder, made of its bytes: rows share it, and a second run finds it."""
    try:
        image = Image.open(io.BytesIO(data))  # its head alone
    except Exception as e:  # besides OSError, each format of PIL has its own
        raise ValueError(f"not a readable image ({e})") from None
    digest = hashlib.sha256(data).hexdigest()[:32]
    name = f"images/{digest[:2]}/{digest}.{image.format.lower()}"
    try:
        whole = os.stat(f"{out}/{name}").st_size == len(data)
    except FileNotFoundError:
        whole = False
    if not whole:
        open_image(image)
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
            raise ValueError(f"picture {n} of {prompt!r}: {e}") from None
    if len(set(files)) < len(files):
        return None  # nothing to choose between
    phi = preference_labels("phi", [torch.tensor(scores, dtype=torch.float64)[:, None]])[0]
    labels = dict(scores={"human": scores}, phi=phi.tolist(), rank=preference_rank(phi).tolist())
    return dict(prompt=prompt, file_names=files, **labels)


def import_lists(cfg, paths, metadata):
    """Write the lists of all files to `metadata`. Returns how many of which kind, and what went wrong."""
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
    return counts, problems


def import_stage(cfg):
    """metadata.jsonl and images/ from what people chose. The pictures are there first, under names that
    follow from their bytes, so that a run that was killed writes what is missing, and the same rows."""
    source, out, done = Path(cfg.from_), Path(cfg.out), []
    paths = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not cfg.from_ or not paths or not all(path.is_file() for path in paths):
        fail(f"--from {source}: name a .parquet or .json file, or a folder of .parquet files")
    if cfg.pictures and not Path(cfg.pictures).is_dir():
        fail(f"--pictures {cfg.pictures}: no such folder")
    now = json.dumps([[path.name, *ends_of(path, 1 << 20)] for path in paths]) + "\n"
    begun = out / "import.json"
    if begun.is_file() and read_text(begun) != now:
        fail(f"--out {out}: was begun from another file than {source}; choose another folder")
    if not begun.is_file() and ((out / "metadata.jsonl").exists() or (out / "images").exists()):
        fail(f"--out {out}: holds other pictures; choose another folder")
    if (out / "metadata.jsonl").is_file():
        print(f"{out}: was imported already; delete its metadata.jsonl to do it again")
        return
    write_text(begun, now)
    publish(out / "metadata.jsonl", lambda tmp: done.extend(import_lists(cfg, paths, tmp)))
    counts, problems = done
    show_problems(problems, "lists could not be read")
    print(f"{out}/metadata.jsonl: {', '.join(f'{count} {name}' for name, count in counts.items())}")


# ----------------------------------------------------------------------------- stage 2: score


def score_stage(cfg, batches, device, part):
    """Every reward on the rows of the batches; what is scored already is left alone."""
    rows = [row for batch in batches for row in batch]
    for spec in cfg.rewards:
        began = time.time()
        scored, _ = score_rows(cfg.out, spec, rows, device, cfg.batch_size, cfg.on_error, part)
        if scored:
            note_time(cfg, "score", reward_name(spec), scored * len(rows[0][1]), time.time() - began)


# ----------------------------------------------------------------------------- stage 3: label


def lists_drawn_here(cfg, rows, models):
    """What metadata.jsonl will hold, without labels, from what the first two stages left."""
    stored = {reward_name(spec): read_scores(cfg.out, spec, rows) for spec in cfg.rewards}
    complete = [i for i in range(len(rows)) if all(i in scores for scores in stored.values())]
    if len(complete) < len(rows):
        name = min(stored, key=lambda n: len(stored[n]))
        lacking = f"scores of {len(rows) - len(stored[name])} of {len(rows)} prompts are missing"
        message = f"{cfg.out}/scores/{name}.jsonl: {lacking}"
        if cfg.on_error == "stop" or not complete:
            fail(f"{message}; run --stages score first, or leave such prompts out with --on_error skip")
        print(f"{message}; {len(rows) - len(complete)} prompts are left out")
    who = {"models": [m["name"] for m in models], "seeds": [m["seed"] for m in models]}
    lists = []
    for i in complete:
        scores = {name: of_rows[i] for name, of_rows in stored.items()}
        lists.append({"prompt": rows[i][0], "file_names": rows[i][1], **who, "scores": scores})
    return lists


def lists_from_elsewhere(cfg):
    """The metadata.jsonl that is there, whoever wrote it, with scores that rewards.py --score added since:
    those of the versions that --rewards names, or else of the only ones."""
    lists, out = read_metadata(cfg.out, lists=True), Path(cfg.out)
    drawn = read_settings(out)[1] if (out / "settings.json").is_file() else 0
    if len(lists) < drawn:
        again = "the command that drew them, without --stages, brings the others back"
        print(f"{out}/metadata.jsonl has {len(lists)} rows of {drawn} prompts; {again}")
    rows = [(row["prompt"], row["file_names"]) for row in lists]
    names = {path.stem.partition("@")[0] for path in (out / "scores").glob("*.jsonl")}
    specs = {reward_name(spec): spec for spec in cfg.rewards}
    for name in sorted(names - set(EVALUATION_ONLY)):
        lines = list(stored_lines(out, name))
        version = version_there(out, name, lines, specs.get(name))
        found, outdated = stored_scores(out, name, lines, rows, version)
        for i in outdated:
            lists[i]["scores"].pop(name, None)  # perhaps taken into metadata.jsonl before
        for i, scores in found.items():
            lists[i]["scores"][name] = scores
    return lists


def label_stage(cfg, lists):
    """Write phi and rank of every list, and nothing else, into metadata.jsonl; then pictures and summary."""
    out, wanted = Path(cfg.out), [reward_name(spec) for spec in cfg.rewards]
    names, rewards = stored_rewards(out, lists, cfg.label, wanted)
    for row, phi in zip(lists, preference_labels(cfg.label, rewards, cfg.seed)):
        row.update(phi=phi.tolist(), rank=preference_rank(phi).tolist())
    write_text(out / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in lists))
    draw_preview(out, lists)
    summary = {"label": cfg.label, "rewards": names, **summarise(lists, names), **speed_and_cost(cfg, lists)}
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    draw_summary(out, summary)
    print_summary(out, summary)


# ----------------------------------------------------------------------------- what came out


def made_by(row):
    """(K,) names of who drew the images; None for a list from elsewhere that does not say."""
    models, seeds = row.get("models"), row.get("seeds")
    if not isinstance(models, list) or not isinstance(seeds, list):
        return None
    if not len(models) == len(seeds) == len(row["file_names"]):
        return None
    return [f"{model}_{seed}" for model, seed in zip(models, seeds)]


def draw_preview(out, lists):
    """preview.png: six lists, best to worst."""
    grid = []
    for i in np.linspace(0, len(lists) - 1, min(6, len(lists))).astype(int):
        row = lists[i]
        K = len(row["file_names"])
        names, cells = made_by(row) or [f"image {j}" for j in range(K)], []
        for j in sorted(range(K), key=lambda j: -row["phi"][j]):
            path = out / row["file_names"][j]
            try:
                cells.append((read_image(path), f"{names[j]}  phi {row['phi'][j]:.2f}"))
            except ValueError as e:
                fail(f"{path}: {e}")
        grid.append((row["prompt"], cells))
    picture_grid(grid, out / "preview.png")


def summarise(lists, names):
    """Who wins against whom, how far the rewards agree, ties, phi."""
    every_phi = np.concatenate([row["phi"] for row in lists])
    counts, edges = np.histogram(every_phi, bins=10, range=(0, 1))
    summary = {"lists": len(lists), "images": len(every_phi)}
    summary["phi_histogram"] = {"edges": edges.round(1).tolist(), "counts": counts.tolist()}
    generators = made_by(lists[0])
    if not generators or any(made_by(row) != generators for row in lists):
        return summary
    phi = torch.tensor([row["phi"] for row in lists])  # (N, K)
    i, j = torch.triu_indices(phi.shape[1], phi.shape[1], 1)
    summary["generators"] = generators
    summary["mean_phi"] = phi.mean(0).tolist()
    summary["win_matrix"] = (phi[:, :, None] > phi[:, None]).float().mean(0).tolist()  # (K, K)
    summary["tied_pairs"] = (phi[:, i] == phi[:, j]).float().mean().item()
    if names:
        scores = [[row["scores"][name] for name in names] for row in lists]
        rewards = torch.tensor(scores, dtype=torch.float64)  # (N, R, K)
        order = (rewards[..., i] - rewards[..., j]).sign()  # (N, R, pairs)
        unit = order / order.norm(dim=-1, keepdim=True)  # Kendall's tau-b is the cosine of these signs
        tau = torch.einsum("nap,nbp->nab", unit, unit).nanmean(0)
        summary["kendall_tau"] = tau.nan_to_num(0).tolist()  # a reward that ties everywhere agrees with none
        summary["reward_ties"] = dict(zip(names, (order == 0).double().mean((0, 2)).tolist()))
    return summary


def speed_and_cost(cfg, lists):
    """Images a second of one process and, with --gpu_price, the cost, from timings.jsonl."""
    path, speed, hours = Path(cfg.out) / "timings.jsonl", {}, 0.0
    for line in whole_lines(path):
        try:
            t = parse_json(line.decode())
            stage, name, images = str(t["stage"]), str(t["name"]), int(t["images"])
            seconds = in_range("seconds", float(t["seconds"]), (None, 0, None))
        except (ValueError, TypeError, KeyError, OverflowError):
            print(f"{path}: a damaged line is left out of speed and cost")
            continue
        entry = speed.setdefault(stage, {}).setdefault(name, {"images": 0, "seconds": 0.0})
        entry["images"] += images
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        entry["images_per_s"] = round(entry["images"] / max(entry["seconds"], 1e-9), 3)
        hours += seconds / 3600
    if not cfg.gpu_price or not hours:
        return {"speed": speed}
    cost = {"usd_per_gpu_hour": cfg.gpu_price, "gpu_hours": hours, "usd": hours * cfg.gpu_price}
    cost["usd_for_232k_images"] = cost["usd"] * 232_000 / sum(len(row["file_names"]) for row in lists)
    cost["paper_usd_for_232k_images"] = "< 206"
    return {"speed": speed, "cost": cost}


def draw_summary(out, summary):
    """summary.png: two matrices and the histogram of phi."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, key, names, least, colours in (
        (axes[0], "win_matrix", summary.get("generators"), 0, "YlGn"),
        (axes[1], "kendall_tau", summary["rewards"], -1, "coolwarm"),
    ):
        if key in summary:
            axis.imshow(summary[key], vmin=least, vmax=1, cmap=colours)
            axis.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
            axis.set_yticks(range(len(names)), names, parse_math=False)
            for (row, column), value in np.ndenumerate(summary[key]):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    histogram = summary["phi_histogram"]
    axes[2].bar(histogram["edges"][:-1], histogram["counts"], width=0.1, align="edge", edgecolor="w")
    titles = ("row above column (share of prompts)", "agreement of rewards (Kendall's tau)", "phi")
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10)
    publish(out / "summary.png", lambda tmp: figure.savefig(tmp, dpi=100))


def print_summary(out, summary):
    if "generators" in summary:
        means = [f"{name} {phi:.3f}" for name, phi in zip(summary["generators"], summary["mean_phi"])]
        print(f"mean phi by model: {', '.join(means)}; share of tied pairs {summary['tied_pairs']:.3f}")
    for stage, entries in summary["speed"].items():
        each = [f"{name} {entry['images_per_s']:.1f} images/s" for name, entry in entries.items()]
        print(f"{stage}: {', '.join(each)}")
    if "cost" in summary:
        cost = summary["cost"]
        paper = f"{cost['usd_for_232k_images']:.0f} USD for the paper's 232 k images (the paper: under 206)"
        print(f"cost at {cost['usd_per_gpu_hour']} USD a GPU hour: {cost['usd']:.2f} USD, so {paper}")
    print(f"{summary['lists']} lists in {out}/metadata.jsonl; look at {out}/preview.png (best to worst)")


# ----------------------------------------------------------------------------- one folder, many processes


def is_whole(path):
    """A PNG file that is there to its end: ours are, unless a copy or a crash of the disk tore one."""
    try:
        f = os.open(path, os.O_RDONLY)  # plain system calls: a finished folder may have 232 k files
    except OSError:
        return False
    try:
        return os.pread(f, 4, max(0, os.fstat(f).st_size - 8)) == b"IEND"
    finally:
        os.close(f)


@contextmanager
def folder_lock(out, index, count, script="synpic.py"):
    """Keep other processes out of the folder: a whole run excludes everybody, a part only the same part."""
    message = f"{out}: another {script} is at work in this folder; wait for it, or choose another --out"
    with lock(out / ".lock", message, shared=count > 1), lock(out / f".lock-{index}-{count}", message):
        yield


def settings_of(cfg, rows, models):
    """What the pictures of a folder depend on; rewards and labels may change at any time."""

    def weights(folder):  # of a local model, wherever it lies; others have a hub id
        files = sorted(Path(folder).rglob("*.safetensors"))
        return [[file.name, *ends_of(file, 1 << 20)] for file in files] or folder

    def identity(model):
        parts = [weights(folder) for folder in model["path"].split("+")]  # base and adapters
        return {**model, "path": parts if len(parts) > 1 else parts[0]}

    on_cpu = pick_device(cfg.device).type == "cpu"  # whose auto is another than a GPU's
    prompts = [prompt for prompt, _ in rows]
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    return {
        "prompts": [len(prompts), prompts[0], digest],
        "models": {f"{m['name']}_{m['seed']}": identity(m) for m in models},
        "batch_size": cfg.batch_size,
        "precision": "fp32" if on_cpu and cfg.precision == "auto" else cfg.precision,
    }


def read_settings(out):
    """What was kept, and how many prompts that were."""
    path = Path(out) / "settings.json"
    try:
        settings = parse_json(read_text(path))
        models = {name: dict(model) for name, model in settings["models"].items()}
        return {**settings, "models": models}, int(settings["prompts"][0])
    except (ValueError, TypeError, LookupError, AttributeError):
        mend = "delete that file if this very command made the folder, or choose another --out"
        fail(f"{path}: damaged, so it is not known what the pictures were made with; {mend}")


def check_settings(cfg, now):
    """A folder is not continued with other settings than it was begun with; each difference is named."""
    if not (Path(cfg.out) / "settings.json").is_file():
        return
    (before, _), differs = read_settings(cfg.out), []
    for key in ("prompts", "batch_size", "precision"):
        if (key == "prompts" or "generate" in cfg.stages) and before.get(key) != now[key]:
            differs.append(f"{key} (before: {before.get(key)}, now: {now[key]})")
    for name in before["models"] | now["models"]:
        old, new = before["models"].get(name), now["models"].get(name)
        if not old or not new:
            differs.append(f"model {name} ({'missing now' if old else 'not there before'})")
        elif old != new:
            keys = [key for key in old | new if old.get(key) != new.get(key)]
            changes = [f"{key} {old.get(key)} before, {new.get(key)} now" for key in keys if key != "path"]
            changes += ["other weights"] if "path" in keys else []
            differs.append(f"model {name} ({', '.join(changes)})")
    if differs:
        fail(f"{cfg.out} was made with other {'; '.join(differs)}. Choose another --out, or delete this one")


def keep_settings(cfg, now):
    """Write settings.json, unless another part of this run has done it meanwhile."""
    path = Path(cfg.out) / "settings.json"
    with lock(path.with_name(".lock-settings"), wait=True):
        check_settings(cfg, now)
        if not path.is_file():
            write_text(path, json.dumps(now, indent=1))


def note_time(cfg, stage, name, images, seconds):
    """Append to timings.jsonl what a stage took; the summary adds it up."""
    row = {"stage": stage, "name": name, "images": images, "seconds": round(seconds, 3)}
    with open(Path(cfg.out) / "timings.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")


# ----------------------------------------------------------------------------- main


def check_choices(cfg):
    """Wrong names of rewards and labels fail now, not after hours of drawing."""
    check_rewards(cfg.rewards or (() if set(cfg.stages) == {"label"} else TOY_REWARDS))
    names = [reward_name(spec) for spec in cfg.rewards or TOY_REWARDS]
    if only := [name for name in names if name in EVALUATION_ONLY]:
        fail(f"--rewards {only[0]}: is for evaluation only, labels come from reward models")
    check_label(cfg.label, LABELS)
    if set(cfg.stages) != {"label"} and cfg.label.startswith("single:") and cfg.label[7:] not in names:
        fail(f"--label {cfg.label}: no such reward in --rewards (there are {', '.join(names)})")


def share_of(shard):
    """--shard i/n -> i, n, and this process's place among those of all parts, and how many these are."""
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        fail(f"--shard {shard}: must be i/n with 0 <= i < n, as in 3/16")
    (rank, world), part, parts = process_rank(), int(part), int(parts)
    return part, parts, part * world + rank, parts * world


@one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    check_choices(cfg)
    part, parts, index, count = share_of(cfg.shard)
    out, stages = writable_folder("out", cfg.out), set(cfg.stages)
    if "import" in stages:
        if len(stages) > 1:
            fail("--stages import: stands alone; then rewards.py --score and --stages label")
        if process_rank()[0] == 0:
            with folder_lock(out, 0, 1):
                import_stage(cfg)
        return
    if stages == {"label"} and (out / "metadata.jsonl").is_file():  # needs neither prompts nor models
        if process_rank()[0] == 0:
            with folder_lock(out, 0, 1):
                label_stage(cfg, lists_from_elsewhere(cfg))
        return

    cfg = replace(cfg, rewards=cfg.rewards or TOY_REWARDS)
    if parts > 1 and stages == set(STAGES):
        stages.remove("label")  # the parts do not wait for each other
    rank, world = process_rank()
    models = parse_models(cfg.models)
    prompts = [row["prompt"] for row in read_prompts(cfg.prompts, cfg.limit, cfg.offset, cfg.field)]
    rows = [(prompt, [file_name(i, m) for m in models]) for i, prompt in enumerate(prompts)]
    batches = [rows[start : start + cfg.batch_size] for start in range(0, len(rows), cfg.batch_size)]
    mine = batches[index::count]  # a batch belongs to one process, by its place
    device = pick_device(cfg.device)
    with folder_lock(out, index, count):
        settings = settings_of(cfg, rows, models)
        check_settings(cfg, settings)
        if "generate" in stages:
            todo = to_draw(cfg, mine, models)
            with progress("generate", todo) as bar:
                generate_stage(cfg, todo, device, settings, bar)
        if "score" in stages:
            score_stage(cfg, mine, device, part=f"@{index}of{count}" if count > 1 else "")
        if "label" in stages and world > 1:  # every part must be there; nothing else waits for the others
            start_processes("cpu", minutes=24 * 60)
            dist.barrier()
        if rank == 0 and "label" in stages:
            label_stage(cfg, lists_drawn_here(cfg, rows, models))
        elif rank == 0:
            print(f"{out}: {' and '.join(sorted(stages))} done for part {part} of {parts}")
            if parts > 1:
                print("when all parts are done: the same command with --stages label, without --shard")


if __name__ == "__main__":
    main()
