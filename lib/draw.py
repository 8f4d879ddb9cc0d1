"""Pictures on disk: drawn once, kept whole, resumed, by many processes, for synpic.py and evaluate.py.

    for k, model, missing in to_draw(cfg, batches, models)      what is not there yet
    generate_stage(cfg, todo, device, recipe, bar)              one generator in memory at a time

A row is (prompt, file names), one name per model; a repeated prompt has a third element, its count, which
changes its noise. Each image has its own noise and each batch its place, so the
same pictures come out whoever draws them, and when. `cfg` holds the options of the script: out, batch_size,
precision, device, on_error. recipe.json says what the pictures were made with; another recipe is refused.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from lib import common, store
from lib.common import about, fail, pick_device, pick_dtype, print_problems, process_rank
from lib.formats import fingerprint, split_spec
from lib.pipelines import check_pipeline, generate_each, load_pipeline, noise_seed
from lib.store import appending, digest, lock

# ----------------------------------------------------------------------------- drawing


def to_draw(cfg, batches, models):
    """[(k, model, batches that lack pictures of model k)]. A batch is a list of rows. A model that cannot be
    loaded is refused here, before the first one draws."""
    todo = []
    for k, model in enumerate(models):
        missing = [b for b in batches if not all(is_png(f"{cfg.out}/{row[1][k]}") for row in b)]
        if missing:
            check_pipeline(model["path"])
            todo.append((k, model, missing))
    return todo


def progress(title, todo):
    """A bar over the images of all models of to_draw, with images/s and the time left."""
    images = sum(len(batch) for _, _, missing in todo for batch in missing)
    return tqdm(total=images, desc=title, unit="image", disable=process_rank()[0] > 0 or not images)


def generate_stage(cfg, todo, device, recipe, bar):
    """Draw what to_draw found missing, one generator in memory at a time."""
    pipe, loaded, problems = None, None, []
    for k, model, missing in todo:
        precision = cfg.precision
        if precision == "auto":
            precision = "fp32" if device.type == "cpu" else model["dtype"]
        if loaded != (model["path"], precision):
            pipe = None  # free the last one first
            pipe = load_pipeline(model["path"], device, pick_dtype(precision, device))
            loaded = (model["path"], precision)
            check_recipe(cfg.out, recipe, write=True)  # from here on the folder is that of these models
        began, images = time.time(), sum(len(batch) for batch in missing)
        problems += draw_model(cfg, pipe, k, model, missing, bar)
        note_time(cfg.out, "generate", f"{model['name']}_{model['seed']}", images, time.time() - began)
    check_recipe(cfg.out, recipe, write=True)  # also where nothing was left to draw
    print_problems(problems, "images could not be drawn")


def draw_model(cfg, pipe, k, model, batches, bar):
    """Image k of every row; threads write pictures while the next batch is drawn. Returns a line for each
    image that could not be drawn."""
    problems, writing = [], []
    bar.set_description(f"generate {model['name']}_{model['seed']}")
    with ThreadPoolExecutor(4) as threads:
        for batch in batches:
            prompts, seeds = [row[0] for row in batch], []
            noise = model.get("noise", model["name"])  # models that are compared start from the same
            for prompt, _, *place in batch:
                seeds.append(noise_seed(prompt, " repeat ".join([noise, *map(str, place)]), model["seed"]))
            results = generate_each(pipe, prompts, seeds, model)
            for picture in writing:  # at most one batch waits to be written
                picture.result()
            writing = []
            for (prompt, files, *_), (image, problem) in zip(batch, results):
                path = Path(cfg.out) / files[k]
                if problem:
                    problems.append(f"{path}, prompt {common.one_line(repr(prompt), 80)}: {problem}")
                    path.unlink(missing_ok=True)
                elif not is_png(path):
                    writing.append(threads.submit(store.publish, path, image.save, sync=False))
            if problems and cfg.on_error == "stop":
                fail(f"{problems[0]}; nothing was written for it. --on_error skip leaves such prompts out")
            bar.update(len(batch))
        for picture in writing:
            picture.result()
    return problems


# ----------------------------------------------------------------------------- how a model draws


def split_options(spec):
    """[name=path, key=value, ...] of "name=path,key=value,..."; a path that exists may hold commas."""
    words = spec.split(",")
    for n in range(len(words), 1, -1):
        head = ",".join(words[:n])
        if "=" in head and all(map(os.path.exists, split_spec(head.partition("=")[2]))):
            return [head, *words[n:]]
    return words


NUMBERS = {"steps": (int, 1), "guidance": (float, 0), "seed": (int, 0)}  # type, least
DTYPES = ("fp32", "bf16", "fp16")


def read_options(spec, options):
    """{key: value} of a model's ["steps=28", "guidance=4.5", "resolution=64x32", "seed=1", "dtype=fp16"]."""
    found = {}
    for text in options:
        key, _, value = text.partition("=")
        if key in found:
            fail(f"model {spec!r}: {key} appears twice")
        if key == "resolution":
            value = read_resolution(f"model {spec!r}: resolution", value)
        elif key == "dtype" and value not in DTYPES:
            fail(f"model {spec!r}: dtype is {', '.join(DTYPES)}, not {value!r}")
        elif key not in ("dtype", *NUMBERS):
            fail(f"model {spec!r}: no option {key!r}; there are resolution, dtype, {', '.join(NUMBERS)}")
        elif key in NUMBERS:
            kind, least = NUMBERS[key]
            with about(f"model {spec!r}"):
                value = common.in_range(key, kind(value), (None, least, None))
        found[key] = value
    return found


def read_resolution(name, text):
    """A side in pixels, 0 for the pipeline's own, or "WIDTHxHEIGHT"; each a multiple of 8."""
    sides = str(text).split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) < 2**16 for side in sides):
        fail(f"{name} must be a side in pixels, not negative, or WIDTHxHEIGHT; got {text}")
    if any(int(side) % 8 for side in sides) or (len(sides) == 2 and "0" in sides):
        fail(f"{name} must be a multiple of 8, got {text}")
    return text if len(sides) == 2 else int(text)


# ----------------------------------------------------------------------------- one folder, many processes


def is_png(path):
    """Is this a PNG file with its end? A picture of ours is, unless a copy or a full disk tore it."""
    with suppress(OSError):  # missing, or shorter than an end
        if os.path.isfile(path):  # a pipe must not be waited for
            with open(path, "rb", buffering=0) as f:
                f.seek(-8, os.SEEK_END)
                return f.read(4) == b"IEND"
    return False


@contextmanager
def folder_lock(out, index, count, script="synpic.py"):
    """Keep other runs out of the folder: a whole run excludes every other, a part only the same part."""
    message = f"{out}: another {script} is at work in this folder; wait for it, or choose another --out"
    with lock(out / ".lock", message, shared=count > 1), lock(out / f".lock-{index}-{count}", message):
        yield


def share_of(shard):
    """--shard i/n -> i, n, and this process's place among those of all parts, and how many these are."""
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        fail(f"--shard {shard}: must be i/n with 0 <= i < n, as in 3/16")
    (rank, world), part, parts = process_rank(), int(part), int(parts)
    return part, parts, part * world + rank, parts * world


# ----------------------------------------------------------------------------- what a folder was made with


def recipe_of(cfg, rows, models):
    """What the pictures of a folder depend on; rewards and labels may change at any time. A model is known by
    what its files hold, and may be moved; a model of the hub by its name."""
    on_cpu = pick_device(cfg.device).type == "cpu"  # whose auto is another than a GPU's
    prompts = [prompt for prompt, _ in rows]
    return {
        "prompts": {"count": len(prompts), "first": prompts[0], "all": digest(prompts)},
        "models": {f"{m['name']}_{m['seed']}": {**m, "path": fingerprint(m["path"])} for m in models},
        "batch_size": cfg.batch_size,
        "precision": "fp32" if on_cpu and cfg.precision == "auto" else cfg.precision,
    }


def check_recipe(out, now, drawing=True, write=False):
    """A folder goes on with the recipe it was begun with. Where nothing is drawn, batches and precision may
    differ. Pictures and lists that were not drawn here are not replaced."""
    if not drawing and (before := store.read_recipe(out)):
        now = {**now, **{key: before.get(key) for key in ("batch_size", "precision")}}
    mend = "choose another --out; lists from elsewhere: rewards.py --score, then synpic.py --stages label"
    with store.lock(Path(out) / ".recipe.lock", wait=True):  # another part of this run may write it
        store.same(out, now, ("images", "metadata.jsonl", "[0-9]*"), mend, write)


def note_time(out, stage, name, images, seconds):
    """Append to timings.jsonl what a stage took; the summary adds it up."""
    row = {"stage": stage, "name": name, "images": images, "seconds": round(seconds, 3)}
    with appending(Path(out) / "timings.jsonl", busy="") as f:
        f.write(json.dumps(row).encode() + b"\n")
