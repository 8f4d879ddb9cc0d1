"""Syn-Pic: a ranked preference data set without human labels (RankDPO, Algorithm 1).

    python synpic.py                                           # the toy world -> outputs/synpic
    python synpic.py --prompts my.txt --out synpic --rewards hpsv2.1 pickscore imagereward --batch_size 8 \\
        --models sdxl sd3 pixart cascade                       # the paper's four generators, from the hub
    torchrun --nproc_per_node 8 synpic.py ...                  # the same data set, made by all GPUs
    python synpic.py ... --shard 3/16                          # part 3 of a job array; at its end once: --stages label
    python synpic.py --models sdxl sdxl,seed=1 sdxl,seed=2     # one generator, several seeds ("only SDXL", Table 4)
    python synpic.py --stages label --label majority           # phi and rank anew from the stored scores, in seconds
    python synpic.py --stages label --out my_lists             # lists from elsewhere: metadata.jsonl with prompt, file_names, scores

Every model draws every prompt, every reward scores every image, and phi (the share of pairwise wins over images and
rewards) ranks the k images of a prompt. Three stages, each skipping what is done, so a killed run is started again:

    generate   images/00000/sdxl_0.png ...       written whole or not at all; a batch is made by its index and every image
                                                 has its own noise, so the pictures do not depend on who drew them when
                                                 (CPU kernels round by the number of threads: keep OMP_NUM_THREADS there)
    score      scores/pickscore.jsonl ...        appended as they come; a torn last line is scored again
    label      metadata.jsonl, preview.png,      one row a prompt: prompt, file_names, models, seeds, scores, phi, rank
               summary.json, summary.png         wins, agreement of the rewards, ties, speed, cost

datasets.load_dataset("imagefolder", data_dir=...) reads the folder, rankdpo.py trains on it.
A model is a name of the table below, or name=path, with options after commas: seed, steps, guidance, resolution, dtype.
"""
import csv
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

from losses import majority_vote, preference_probability, preference_rank
from rankdpo import HERE, fail, load_pipeline, option, parse, pick_device, pick_dtype, sequence_length, write_atomic
from rewards import TOY_REWARDS, check_reward, read_scores, reward_name, score_rows

# Sampling defaults of each generator's model card: (hub id, steps, guidance, side in pixels, type on a GPU).
MODELS = {
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 40, 5.0, 1024, "fp16"),
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", 28, 7.0, 1024, "fp16"),
    "pixart": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 20, 4.5, 1024, "fp16"),
    "cascade": ("stabilityai/stable-cascade", 20, 4.0, 1024, "bf16"),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 50, 7.5, 512, "fp16"),
}
TOY_MODELS = tuple(f"{name}={HERE / 'toy/models' / name.split(',')[0]},steps=16,guidance={g}{seed}" for name, g, seed in
                   (("sdxl", 3, ""), ("sdxl", 3, ",seed=1"), ("sd3", 3, ""), ("sd15", 5, ""), ("sd15", 5, ",seed=1")))


@dataclass
class Config:
    prompts: str = option(str(HERE / "toy/prompts.txt"), "prompts: .txt (one a line), .jsonl, .csv, .tsv or .parquet")
    field: str = option("", "the column of prompts in such a file; empty = prompt, caption or text")
    models: tuple = option(TOY_MODELS, "generators: name, or name=path, then options: sd3=toy/models/sd3,steps=16,guidance=3,seed=1")
    rewards: tuple = option(TOY_REWARDS, "reward models, as name or name=source; see rewards.py")
    out: str = option("outputs/synpic", "folder to write")
    stages: tuple = option(("generate", "score", "label"), "which stages to run")
    label: str = option("phi", "what ranks a list: phi, single:REWARD, sum, normalized_sum, majority or random")
    batch_size: int = option(64, "images a batch, in every stage")
    limit: int = option(0, "use that many prompts; 0 = all")
    offset: int = option(0, "skip that many prompts first")
    shard: str = option("0/1", "i/n: make only part i of n, for job arrays; label when all are done")
    on_error: str = option("stop", "images that cannot be drawn or scored: stop, or leave their prompt out", ("stop", "skip"))
    gpu_price: float = option(0., "USD a GPU hour, for the cost in the summary; 0 = no cost")
    seed: int = option(0, "of --label random")
    precision: str = option("auto", "of the generators; auto is the table's on a GPU, fp32 on a CPU", ("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


# ----------------------------------------------------------------------------- prompts and models


def read_prompts(path, limit=0, offset=0, field=""):
    """Prompts of a .txt (one a line), .jsonl, .csv, .tsv (with quotes, as PartiPrompts) or .parquet file. Blank ones and
    repetitions are dropped and counted."""
    if not os.path.isfile(path):
        fail(f"--prompts {path}: no such file")
    kind, rows = Path(path).suffix.lower(), []
    try:
        if kind == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif kind in (".csv", ".tsv"):
            with open(path, newline="", encoding="utf-8-sig") as f:
                rows = list(csv.DictReader(f, delimiter="\t" if kind == ".tsv" else ","))
        elif kind == ".jsonl":
            for n, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except ValueError as e:
                    fail(f"--prompts {path}, line {n}: not JSON ({e})")
        else:
            rows = [{"prompt": line} for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        fail(f"--prompts {path}: not UTF-8 text ({e.reason} at byte {e.start})")
    except Exception as e:                                     # pyarrow and csv have their own errors
        fail(f"--prompts {path}: not a readable {kind} file ({e})")
    columns = [c for c in rows[0] if c and c.lower() in ("prompt", "caption", "text")] if rows and isinstance(rows[0], dict) else []
    field = field or (columns[0] if columns else "prompt")
    prompts = []
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(field), str | None) or field not in row:
            fail(f"--prompts {path}, row {n}: no text under {field!r}; name the column with --field")
        prompts.append(" ".join((row[field] or "").split()))
    blank, prompts = prompts.count(""), [p for p in prompts if p]
    unique = list(dict.fromkeys(prompts))
    if blank or len(unique) < len(prompts):
        print(f"{path}: {len(rows)} rows, {blank} blank and {len(prompts) - len(unique)} repeated ones dropped, {len(unique)} prompts kept")
    unique = unique[offset:offset + limit if limit > 0 else None]
    if not unique:
        fail(f"--prompts {path}: holds no prompt" + (f" after --offset {offset}" if offset else ""))
    return unique


def parse_model(spec):
    """"name[=path][,key=value...]" -> dict(name, path, steps, guidance, resolution, dtype, seed)."""
    head, *options = spec.split(",")
    name, _, path = head.partition("=")
    if not path and name not in MODELS:
        fail(f"unknown model {name!r}: use one of {', '.join(MODELS)}, or {name}=folder_or_hub_id")
    if not name or not all(c.isalnum() or c in "-." for c in name):
        fail(f"model {spec!r}: a name is made of letters, digits, - and .")     # it becomes part of file names, before _seed
    hub, steps, guidance, resolution, dtype = MODELS.get(name, ("", 30, 5.0, 0, "bf16"))
    model = dict(name=name, path=path or hub, steps=steps, guidance=guidance, resolution=0 if path else resolution, dtype=dtype, seed=0)
    for o in options:
        key, _, value = o.partition("=")
        try:
            model[key] = {"steps": int, "guidance": float, "resolution": int, "seed": int, "dtype": str}[key](value)
        except (KeyError, ValueError):
            fail(f"model {spec!r}: {o!r} is not an option; use steps=28, guidance=4.5, resolution=1024, dtype=bf16 or seed=1")
    if model["dtype"] not in ("fp32", "bf16", "fp16") or model["steps"] < 1:
        fail(f"model {spec!r}: dtype is fp32, bf16 or fp16, and steps at least 1")
    return model


def noise_seed(prompt, model, seed):
    """The starting noise of (prompt, model, seed): the same in any order, batch or process."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{model}|{prompt}".encode()).digest()[:7], "big")


def generate(pipe, prompts, seeds, model):
    """One batch -> [(PIL image, None) or (None, what is wrong with it)]. Every image has its own generator, on the CPU: the
    same noise on every device. `model` is what parse_model returns."""
    kwargs, kind = dict(num_inference_steps=model["steps"], guidance_scale=model["guidance"]), type(pipe).__name__
    if kind.startswith("StableDiffusion3"):
        kwargs["max_sequence_length"] = sequence_length(pipe)
    if kind.startswith("PixArt"):
        kwargs["clean_caption"] = False                        # it would need packages that may or may not be there
    if kind.startswith("StableCascade"):                       # steps and guidance are the prior's; the decoder keeps its card's 10 steps
        kwargs = dict(prior_num_inference_steps=model["steps"], prior_guidance_scale=model["guidance"], num_inference_steps=10)
    if model["resolution"]:
        kwargs.update(height=model["resolution"], width=model["resolution"])
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    images = pipe(prompt=list(prompts), generator=generators, output_type="np", **kwargs).images                # (N, H, W, 3) in [0, 1]
    problems = ["not a number in the image" if not np.isfinite(x).all() else "an all-black image (a safety checker?)" if not x.any() else None for x in images]
    return [(None if p else Image.fromarray((x * 255).round().astype(np.uint8)), p) for x, p in zip(images, problems)]


def generate_each(pipe, prompts, seeds, model):
    """generate(), and where it raises, the batch's images one by one, so that the one that fails is named."""
    try:
        return generate(pipe, prompts, seeds, model)
    except torch.cuda.OutOfMemoryError:
        fail(f"model {model['name']}: out of GPU memory; lower --batch_size (now {len(prompts)} images)")
    except Exception as e:
        if len(prompts) == 1:
            return [(None, f"the generator raised {type(e).__name__}: {' '.join(str(e).split())[:200]}")]
        return [result for p, s in zip(prompts, seeds) for result in generate_each(pipe, [p], [s], model)]


def picture_grid(rows, path, side=128):
    """[(title, [(image, caption), ...]), ...] -> a PNG, one row of captioned pictures a title."""
    columns = max(len(cells) for _, cells in rows)
    canvas = Image.new("RGB", (max(columns * (side + 8) + 8, 420), len(rows) * (side + 44) + 8), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (title, cells) in enumerate(rows):
        top = r * (side + 44) + 6
        pen.text((8, top), title, fill="black")
        for c, (image, caption) in enumerate(cells):
            resample = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            canvas.paste(image.convert("RGB").resize((side, side), resample), (8 + c * (side + 8), top + 14))
            pen.text((8 + c * (side + 8), top + side + 16), caption, fill="black")
    tmp = f"{path}.tmp"
    canvas.save(tmp, format="PNG")
    os.replace(tmp, path)


# ----------------------------------------------------------------------------- one folder, many processes


def file_name(i, model):
    return f"images/{i:05d}/{model['name']}_{model['seed']}.png"


def is_whole(path):
    """A PNG file that is there to its end. Ours are renamed when complete; a copy or a crash of the disk may tear one."""
    try:
        f = os.open(path, os.O_RDONLY)                         # plain system calls: a finished folder may have 232 k files
    except OSError:
        return False
    try:
        return os.pread(f, 4, max(0, os.fstat(f).st_size - 8)) == b"IEND"
    finally:
        os.close(f)


@contextmanager
def lock(out, index, count):
    """Keep other processes out of the folder: a whole run excludes everybody, a part only the same part. The system frees
    the locks of a process that ends, however it ends."""
    try:
        import fcntl
    except ImportError:                                        # Windows: no locks
        yield
        return
    with open(out / ".lock", "w") as folder, open(out / f".lock-{index}-{count}", "w") as part:
        try:
            fcntl.flock(folder, (fcntl.LOCK_EX if count == 1 else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{out}: another synpic.py is at work in this folder; wait for it, or choose another --out")
        yield


def check_settings(cfg, prompts, models):
    """What an existing folder was made with must not change under it; rewards and labels may at any time."""
    def identity(m):                                           # a local model by its weights, wherever it lies; others by hub id
        files = sorted([str(p.relative_to(m["path"])), p.stat().st_size] for p in Path(m["path"]).rglob("*.safetensors"))
        return dict(m, path=files or m["path"])
    now = dict(prompts=[len(prompts), prompts[0], hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]],
               models={f"{m['name']}_{m['seed']}": identity(m) for m in models}, batch_size=cfg.batch_size, precision=cfg.precision)
    path = Path(cfg.out) / "settings.json"
    if not path.is_file():
        return write_atomic(path, json.dumps(now, indent=1))
    before, differs = json.loads(path.read_text()), []
    for key in ("prompts", "batch_size", "precision"):
        if (key == "prompts" or "generate" in cfg.stages) and before.get(key) != now[key]:
            differs.append(f"{key} (before: {before.get(key)}, now: {now[key]})")
    for name in before["models"] | now["models"]:
        a, b = (json.loads(json.dumps(s["models"].get(name, {}))) for s in (before, now))
        if a != b:
            keys = [k for k in a | b if a.get(k) != b.get(k)]
            differs.append(f"model {name} ({'not there before' if not a else 'missing now' if not b else ', '.join('other weights' if k == 'path' else f'{k} {a.get(k)} before, {b.get(k)} now' for k in keys)})")
    if differs:
        fail(f"{cfg.out} was made with other {'; '.join(differs)}. Choose another --out, or delete it to start again")


def note_time(out, stage, name, images, seconds):
    """Append to timings.jsonl what a stage took; the summary adds it up."""
    with open(Path(out) / "timings.jsonl", "a") as f:
        f.write(json.dumps({"stage": stage, "name": name, "images": images, "seconds": round(seconds, 3)}) + "\n")


# ----------------------------------------------------------------------------- stages


def generate_stage(cfg, prompts, models, device, index, count):
    """Draw what is missing of this process's batches. One generator in memory at a time, files written by threads.
    Returns how many images it drew."""
    out, pipe, loaded, skipped, total = Path(cfg.out), None, None, [], 0

    def save(image, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.save(f"{path}.tmp", format="PNG")
            os.replace(f"{path}.tmp", path)
        except OSError as e:
            Path(f"{path}.tmp").unlink(missing_ok=True)
            fail(f"{path}: cannot be written ({e.strerror or e}); what is complete is kept, start again when there is room")
    for model in models:
        starts = list(range(0, len(prompts), cfg.batch_size))[index::count]     # a batch belongs to one process, by its index
        starts = [s for s in starts if not all(is_whole(f"{out}/{file_name(i, model)}") for i in range(s, min(s + cfg.batch_size, len(prompts))))]
        if not starts:
            continue
        precision = "fp32" if device.type == "cpu" and cfg.precision == "auto" else model["dtype"] if cfg.precision == "auto" else cfg.precision
        if loaded != (model["path"], precision):
            pipe = None                                        # free the last one first
            pipe, loaded = load_pipeline(model["path"], device, pick_dtype(precision, device)), (model["path"], precision)
        began, drawn, pending = time.time(), 0, []
        with ThreadPoolExecutor(4) as threads:
            for start in tqdm(starts, desc=f"generate {model['name']}_{model['seed']}", unit="batch", disable=index > 0):
                batch = prompts[start:start + cfg.batch_size]
                results = generate_each(pipe, batch, [noise_seed(p, model["name"], model["seed"]) for p in batch], model)
                for future in pending:                         # at most one batch waits to be written
                    future.result()
                pending = []
                for i, (image, problem) in enumerate(results, start):
                    path = out / file_name(i, model)
                    if problem and cfg.on_error == "stop":
                        fail(f"{path}, prompt {prompts[i]!r}: {problem}; nothing was written for it. Leave such prompts out with --on_error skip")
                    if problem:
                        skipped.append(f"{path}, prompt {prompts[i]!r}: {problem}")
                        path.unlink(missing_ok=True)
                    elif not is_whole(path):
                        pending.append(threads.submit(save, image, path))
                drawn += len(batch)
            for future in pending:
                future.result()
        note_time(out, "generate", f"{model['name']}_{model['seed']}", drawn, time.time() - began)
        total += drawn
    if skipped:
        print("\n".join(skipped[:20]))
        print(f"{len(skipped)} images could not be drawn" + (", the first 20 above" if len(skipped) > 20 else ""))
    return total


def rows_of(prompts, models):
    """[(prompt, file_names)]: what the score stage of rewards.py takes."""
    return [(p, [file_name(i, m) for m in models]) for i, p in enumerate(prompts)]


def score_stage(cfg, prompts, models, device, index, count):
    rows, total = rows_of(prompts, models), 0
    mine = [row for start in list(range(0, len(rows), cfg.batch_size))[index::count] for row in rows[start:start + cfg.batch_size]]
    for spec in cfg.rewards:
        began = time.time()
        scored, _ = score_rows(cfg.out, spec, mine, device, cfg.batch_size, cfg.on_error, part=f"@{index}of{count}" if count > 1 else "")
        if scored:
            note_time(cfg.out, "score", reward_name(spec), scored * len(models), time.time() - began)
        total += scored
    return total


def first_rows(cfg, prompts, models):
    """Rows of metadata.jsonl, without labels, from what the first two stages left."""
    rows, stored = rows_of(prompts, models), {}
    for spec in cfg.rewards:
        stored[reward_name(spec)] = read_scores(cfg.out, spec, rows)
    complete = [i for i in range(len(rows)) if all(i in done for done in stored.values())]
    if len(complete) < len(rows):
        name = min(stored, key=lambda n: len(stored[n]))
        missing = f"{cfg.out}/scores/{name}.jsonl: scores of {len(rows) - len(stored[name])} of {len(rows)} prompts are missing"
        if cfg.on_error == "stop" or not complete:
            fail(f"{missing}; run --stages score first, or leave such prompts out with --on_error skip")
        print(f"{missing}; {len(rows) - len(complete)} prompts are left out")
    return [dict(prompt=rows[i][0], file_names=rows[i][1], models=[m["name"] for m in models], seeds=[m["seed"] for m in models],
                 scores={name: done[i] for name, done in stored.items()}) for i in complete]


def rows_from_elsewhere(cfg):
    """Rows of a metadata.jsonl that is there, whoever wrote it, with the scores that rewards.py --score added since."""
    from rewards import read_folder
    read_folder(cfg.out)                                       # names a malformed line
    rows = [json.loads(line) for line in (Path(cfg.out) / "metadata.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows, 1):
        if len(row.get("file_names", [])) < 2 or any(len(s) != len(row["file_names"]) for s in row.get("scores", {}).values()):
            fail(f"{cfg.out}/metadata.jsonl, line {n}: needs at least two file_names, and as many scores of each reward")
    pairs = [(row["prompt"], row["file_names"]) for row in rows]
    names = {p.stem.partition("@")[0] for p in (Path(cfg.out) / "scores").glob("*.jsonl")}
    for name in sorted(names):
        for i, scores in read_scores(cfg.out, name, pairs, any_version=True).items():
            rows[i].setdefault("scores", {})[name] = scores
    return rows


# ----------------------------------------------------------------------------- labels


def phi_of(label, rewards, names, prompts, seed):
    """phi (N, K) of N lists from their rewards (N, K, R), by one of the choices of RankDPO's Table 4 and BalancedDPO's
    Table III. All but majority are shares of pairwise wins: of every reward, or of the one number that stands for them."""
    if label == "phi":
        return preference_probability(rewards)                                  # Algorithm 1
    if label.startswith("single:"):
        return preference_probability(rewards[..., [names.index(label[7:])]])
    if label == "sum":
        return preference_probability(rewards.sum(-1, keepdim=True))
    if label == "normalized_sum":                                               # of rewards standardised over the whole data set
        scale = rewards.flatten(0, 1).std(0).clamp(min=1e-12)
        return preference_probability((rewards / scale).sum(-1, keepdim=True))
    if label == "majority":                                                     # share of the others that most rewards place below
        return (majority_vote(rewards) > 0).float().sum(-1) / (rewards.shape[1] - 1)
    draws = [torch.rand(rewards.shape[1], generator=torch.Generator().manual_seed(noise_seed(p, "label", seed))) for p in prompts]
    return preference_probability(torch.stack(draws)[..., None])                # random


def label_stage(cfg, rows):
    """Write phi and rank of every row, and nothing else, into metadata.jsonl; then pictures and the summary."""
    out = Path(cfg.out)
    chosen = None if cfg.rewards == TOY_REWARDS else [reward_name(s) for s in cfg.rewards]
    names = [n for n in rows[0].get("scores", {}) if chosen is None or n in chosen]
    if cfg.label.startswith("single:") and cfg.label[7:] in rows[0].get("scores", {}):
        names = list(dict.fromkeys([*names, cfg.label[7:]]))
    if cfg.label != "random" and (not names or (cfg.label.startswith("single:") and cfg.label[7:] not in names)):
        fail(f"--label {cfg.label}: no such scores in {out} (there are {', '.join(rows[0].get('scores', {})) or 'none'}); score first: python rewards.py --score {out} --rewards NAME")
    sizes = {}
    for i, row in enumerate(rows):                             # lists of one length together
        if missing := [n for n in names if n not in row.get("scores", {})]:
            fail(f"{out}/metadata.jsonl, line {i + 1}: no scores of {missing[0]}; score it (python rewards.py --score {out}) or delete that row")
        sizes.setdefault(len(row["file_names"]), []).append(i)
    for K, members in sizes.items():
        rewards = torch.tensor([[rows[i]["scores"][n] for n in names] for i in members], dtype=torch.float64).view(len(members), -1, K).transpose(1, 2)   # (N, K, R)
        phi = phi_of(cfg.label, rewards, names, [rows[i]["prompt"] for i in members], cfg.seed).float()                 # (N, K)
        for i, p, r in zip(members, phi.tolist(), preference_rank(phi).tolist()):
            rows[i].update(phi=p, rank=r)
    write_atomic(out / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    grid = []
    for i in np.linspace(0, len(rows) - 1, min(6, len(rows))).astype(int):
        row = rows[i]
        order = sorted(range(len(row["phi"])), key=lambda j: -row["phi"][j])
        caption = [f"{m}_{s}" for m, s in zip(row.get("models", range(len(order))), row.get("seeds", [0] * len(order)))]
        grid.append((row["prompt"], [(Image.open(out / row["file_names"][j]), f"{caption[j]}  phi {row['phi'][j]:.2f}") for j in order]))
    picture_grid(grid, out / "preview.png")
    summarise(cfg, rows, names)


def asked(cfg):
    """What labels and summary follow from, besides the scores: a finished folder with the same is left alone."""
    return [cfg.label, cfg.seed, cfg.gpu_price, [reward_name(r) for r in cfg.rewards]]


def summarise(cfg, rows, names):
    """summary.json and summary.png: who wins against whom, how far the rewards agree, ties, phi, speed and cost."""
    out, first = Path(cfg.out), rows[0]
    summary = {"lists": len(rows), "images": sum(len(r["phi"]) for r in rows), "label": cfg.label, "rewards": names,
               "asked": asked(cfg)}
    if len({tuple(map(str, zip(r.get("models", []), r.get("seeds", [])))) for r in rows}) == 1 and first.get("models"):
        phi = torch.tensor([r["phi"] for r in rows])                                                    # (N, K)
        above = (phi[:, :, None] > phi[:, None]).float().mean(0)                                        # (K, K)
        summary.update(generators=[f"{m}_{s}" for m, s in zip(first["models"], first["seeds"])], mean_phi=phi.mean(0).tolist(), win_matrix=above.tolist(),
                       tied_pairs=((phi[:, :, None] == phi[:, None]).float().mean(0).sum() - phi.shape[1]).item() / (phi.shape[1] * (phi.shape[1] - 1)))
        i, j = torch.triu_indices(phi.shape[1], phi.shape[1], 1)
        if names:
            rewards = torch.tensor([[r["scores"][n] for n in names] for r in rows], dtype=torch.float64)   # (N, R, K)
            order = (rewards[..., i] - rewards[..., j]).sign()                                          # (N, R, pairs)
            unit = order / order.norm(dim=-1, keepdim=True)                                             # Kendall's tau-b is the cosine of these signs
            summary.update(kendall_tau=torch.einsum("nap,nbp->nab", unit, unit).nanmean(0).tolist(), reward_ties={n: (order[:, r] == 0).float().mean().item() for r, n in enumerate(names)})
    counts, edges = np.histogram(np.concatenate([r["phi"] for r in rows]), bins=10, range=(0, 1))
    summary["phi_histogram"] = {"edges": edges.round(1).tolist(), "counts": counts.tolist()}
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines() if line.endswith("}")] if (out / "timings.jsonl").is_file() else []
    speed = {}
    for t in timings:
        entry = speed.setdefault(t["stage"], {}).setdefault(t["name"], {"images": 0, "seconds": 0.})
        entry["images"], entry["seconds"] = entry["images"] + t["images"], round(entry["seconds"] + t["seconds"], 3)
    for stage in speed.values():
        for entry in stage.values():
            entry["images_per_s"] = round(entry["images"] / max(entry["seconds"], 1e-9), 3)             # of one process
    summary["speed"] = speed
    if cfg.gpu_price and timings:
        hours = sum(t["seconds"] for t in timings) / 3600
        summary["cost"] = {"usd_per_gpu_hour": cfg.gpu_price, "gpu_hours": hours, "usd": hours * cfg.gpu_price,
                           "usd_for_232k_images": hours * cfg.gpu_price * 232_000 / summary["images"], "paper_usd_for_232k_images": "< 206"}
    write_atomic(out / "summary.json", json.dumps(summary, indent=1))

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, key, labels, title in ((axes[0], "win_matrix", summary.get("generators"), "row above column (share of prompts)"), (axes[1], "kendall_tau", names, "agreement of rewards (Kendall's tau)")):
        if key in summary:
            axis.imshow(m := np.array(summary[key]), vmin=0 if key == "win_matrix" else -1, vmax=1, cmap="viridis" if key == "win_matrix" else "RdBu")
            for (a, b), v in np.ndenumerate(m):
                axis.text(b, a, f"{v:.2f}", ha="center", va="center", fontsize=8, color="white" if key == "win_matrix" and v < .6 else "black")
            axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right"), axis.set_yticks(range(len(labels)), labels)
        axis.set_title(title, fontsize=10)
    axes[2].bar(edges[:-1], counts, width=.1, align="edge", edgecolor="w"), axes[2].set_title("phi", fontsize=10)
    figure.savefig(out / "summary.png", dpi=100)
    plt.close(figure)
    if "generators" in summary:
        print("mean phi by model: " + ", ".join(f"{g} {p:.3f}" for g, p in zip(summary["generators"], summary["mean_phi"])) + f"; share of tied pairs {summary['tied_pairs']:.3f}")
    for stage, parts in speed.items():
        print(f"{stage}: " + ", ".join(f"{name} {e['seconds']:.0f} s ({e['images_per_s']:.1f} images/s)" for name, e in parts.items()))
    if "cost" in summary:
        c = summary["cost"]
        print(f"cost at {c['usd_per_gpu_hour']} USD a GPU hour: {c['usd']:.2f} USD, so {c['usd_for_232k_images']:.0f} USD for the paper's 232 k images (the paper: under 206)")
    print(f"{len(rows)} lists in {out}/metadata.jsonl; look at {out}/preview.png (best to worst) and summary.png")


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    out, stages = Path(cfg.out), set(cfg.stages)
    if unknown := stages - {"generate", "score", "label"}:
        fail(f"--stages {' '.join(unknown)}: there are generate, score and label")
    for spec in cfg.rewards:
        check_reward(spec)                                     # a wrong name fails now, not after hours of drawing
    if len({reward_name(r) for r in cfg.rewards}) < len(cfg.rewards):
        fail("--rewards: a reward appears twice")
    if any(reward_name(r) == "toyworld" for r in cfg.rewards):
        fail("--rewards toyworld: the exact checker is for evaluation only, labels come from reward models")
    if cfg.label not in ("phi", "sum", "normalized_sum", "majority", "random") and not cfg.label.startswith("single:"):
        fail(f"--label {cfg.label}: there are phi, single:REWARD, sum, normalized_sum, majority and random")
    if cfg.batch_size < 1:
        fail(f"--batch_size must be positive, got {cfg.batch_size}")
    if cfg.offset < 0 or cfg.limit < 0:
        fail(f"--offset and --limit must not be negative, got {cfg.offset} and {cfg.limit}")
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        part, parts = map(int, cfg.shard.split("/"))
        assert 0 <= part < parts
    except (ValueError, AssertionError):
        fail(f"--shard {cfg.shard}: must be i/n with 0 <= i < n, as in 3/16")
    if parts > 1 and stages == {"generate", "score", "label"}:
        stages = {"generate", "score"}                         # the parts do not wait for each other
    index, count = part * world + rank, parts * world

    if stages == {"label"} and (out / "metadata.jsonl").is_file():              # labels anew: needs neither prompts nor models
        with lock(out, 0, 1):
            return label_stage(cfg, rows_from_elsewhere(cfg))
    prompts = read_prompts(cfg.prompts, cfg.limit, cfg.offset, cfg.field)
    models = [parse_model(spec) for spec in cfg.models]
    if len({file_name(0, m) for m in models}) < len(models) or len(models) < 2:
        fail("--models: at least two are needed, and a model that appears twice needs another seed, as in sdxl sdxl,seed=1")
    if torch.cuda.is_available() and world > 1 and cfg.device != "cpu":
        torch.cuda.set_device(local % torch.cuda.device_count())
    device = pick_device(cfg.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f".lock-{index}-{count}").touch()
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror})")
    with lock(out, index, count):
        check_settings(cfg, prompts, models)
        new = generate_stage(cfg, prompts, models, device, index, count) if "generate" in stages else 0
        new += score_stage(cfg, prompts, models, device, index, count) if "score" in stages else 0
        if stages == {"generate", "score", "label"} and count == 1 and not new and (out / "metadata.jsonl").is_file() \
                and (out / "summary.json").is_file() and json.loads((out / "summary.json").read_text()).get("asked") == asked(cfg):
            print(f"{out}: all drawn, scored and labelled already")
        elif "label" in stages:
            if world > 1:                                      # every part must be there; nothing else waits for the others
                dist.init_process_group("gloo", timeout=timedelta(hours=24))
                dist.barrier()
                dist.destroy_process_group()
            if rank == 0:
                label_stage(cfg, first_rows(cfg, prompts, models))
        elif rank == 0:
            print(f"{out}: {' and '.join(sorted(stages))} done for part {part} of {parts}"
                  + ("; when all parts are done: the same command with --stages label, without --shard" if parts > 1 else ""))


if __name__ == "__main__":
    main()
