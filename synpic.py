"""Syn-Pic: a ranked preference data set without human labels (RankDPO, Algorithm 1).

    python synpic.py                                         # the toy world -> outputs/synpic
    python synpic.py --prompts my.txt --out synpic --rewards hpsv2.1 pickscore imagereward --batch_size 8 \\
        --models sdxl sd3 pixart cascade                     # the paper's four generators, from the hub
    torchrun --standalone --nproc_per_node 8 synpic.py ...   # the same data set, made by all GPUs
    python synpic.py ... --shard 3/16                        # part 3 of a job array; when all are done, once:
                                                             # the same command with --stages label
    python synpic.py ... --models sdxl sdxl,seed=1 sdxl,seed=2     # one generator, several seeds (Table 4)
    python synpic.py --stages label --label majority         # phi and rank anew, in seconds
    python synpic.py --stages import --from pickapic --out synpic    # pairs from people, see docs/synpic.md
    python synpic.py --stages label --out my_lists           # your own pictures, see docs/synpic.md

Every model draws every prompt, every reward scores every image, and phi (the share of pairwise wins over
images and rewards) ranks the k images of a prompt, in three stages:

    generate   images/00000/sdxl_0.png ...    a picture is written whole or not at all
    score      scores/pickscore.jsonl ...     a row of scores a prompt, appended as they come
    label      metadata.jsonl, preview.png    one row per prompt: its images, models, seeds, scores, phi, rank
               summary.json                   wins, how varied each generator is, agreement, ties, speed

After a kill the same command goes on: the first two stages skip what is done, and labels are always made anew
from the stored scores. rankdpo.py trains on the folder; datasets.load_dataset("imagefolder", data_dir=...)
reads it.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lib import common
from lib.common import HERE, about, fail, in_range, one_line_errors, option, parse, process_rank

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
    f"sdxl={HERE}/toy/models/sdxl,steps=16,guidance=2",
    f"sdxl={HERE}/toy/models/sdxl,steps=16,guidance=2,seed=1",
    f"sd3={HERE}/toy/models/sd3,steps=16,guidance=1.5",
    f"sd15={HERE}/toy/models/sd15,steps=16,guidance=1.5",
    f"sd15={HERE}/toy/models/sd15,steps=16,guidance=1.5,seed=1",
)
STAGES = ("generate", "score", "label")


@dataclass
class Config:
    # what is drawn; without --models and --rewards, and for the toy's prompts only, it is the toy's
    prompts: str = option(f"{HERE}/toy/prompts.txt", ".txt, .json, .jsonl, .csv, .tsv, .parquet, or a folder")
    field: str = option("", "the column of prompts in such a file; empty = prompt, prompts, caption or text")
    limit: int = option(0, "use that many prompts; 0 = all", at_least=0)
    models: tuple = option((), "generators: name[=path][,steps=28][,guidance=4.5][,seed=1]...")
    from_: str = option(
        "", "import: a file of Pick-a-Pic, HPDv2, HPDv3 or ImageReward, or a folder of shards"
    )
    pictures: str = option("", "import: folder of its pictures or zips; empty = the file's own")
    # how it is scored and ranked
    rewards: tuple = option(
        (), "name or name=source, see rewards.py; to label lists, empty = all that scored"
    )
    label: str = option("phi", "phi, sum, normalized_sum, majority, random or single:REWARD ranks a list")
    seed: int = option(0, "of the order that --label random gives; a generator's is ,seed=1", at_least=0)
    # how it is run
    out: str = option("outputs/synpic", "folder to write")
    stages: tuple = option(STAGES, "which stages to run; import runs alone", ("import", *STAGES))
    batch_size: int = option(64, "images a batch, in every stage", at_least=1)
    shard: str = option("0/1", "i/n: make only part i of n, for job arrays; label when all are done")
    on_error: str = option("stop", "images that cannot be drawn or scored: stop, or skip", ("stop", "skip"))
    precision: str = option(
        "auto", "auto: the generator's own, fp32 on a CPU", ("auto", "fp32", "bf16", "fp16")
    )
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


if __name__ == "__main__":  # --help and mistyped options end here, before imports that take seconds
    parse(Config, __doc__)

import numpy as np
import torch
import torch.distributed as dist

import rewards
from lib import answers, draw, store
from lib.draw import check_recipe, folder_lock, generate_stage, note_time, progress, recipe_of
from lib.lists import (
    EVALUATION_ONLY,
    LABELS,
    check_label,
    look_at_pictures,
    preference_labels,
    read_metadata,
    stored_rewards,
)
from lib.people import import_stage
from lib.pictures import picture_grid, read_image
from lib.stats import entropy
from lib.store import write_text
from lib.tables import parse_json, read_prompts
from losses import preference_rank
from rewards import LOADERS, TOY_REWARDS, check_rewards, load_reward, read_scores, reward_name, score_rows
from toy.world import free_colours, knows

# ----------------------------------------------------------------------------- generators


def parse_model(spec):
    """ "name[=path][,key=value...]" -> dict(name, path, steps, guidance, resolution, dtype, seed)."""
    head, *options = draw.split_options(spec)
    name, _, path = head.partition("=")
    if not path and (name not in MODELS or "=" in head):
        fail(f"unknown model {name!r}: use one of {', '.join(MODELS)}, or {name}=folder_or_hub_id")
    if not name or not all(c.isalnum() or c in "-." for c in name):  # it becomes a part of file names
        fail(f"model {spec!r}: a name is made of letters, digits, - and .")
    keys = ("path", "steps", "guidance", "resolution", "dtype")
    model = dict(zip(keys, MODELS.get(name, ("", 30, 5.0, 0, "bf16"))), name=name, seed=0)
    if path:
        model.update(path=path, resolution=0)
    return {**model, **draw.read_options(spec, options)}


def parse_models(specs):
    models = [parse_model(spec) for spec in specs]
    if len(models) < 2:
        fail("--models: at least two are needed")
    if len({file_name(0, m) for m in models}) < len(models):
        fail("--models: a model that appears twice needs another seed, as in sdxl sdxl,seed=1")
    return models


def file_name(i, model):
    return f"images/{i:05d}/{model['name']}_{model['seed']}.png"


# ----------------------------------------------------------------------------- scores and labels


def score_stage(cfg, batches, device, part):
    """Every reward on the rows of the batches; what is scored already is left alone."""
    rows = [row for batch in batches for row in batch]
    for spec in cfg.rewards:
        began = time.time()
        scored, _ = score_rows(cfg.out, spec, rows, device, cfg.batch_size, cfg.on_error, part)
        if scored:
            note_time(cfg.out, "score", reward_name(spec), scored * len(rows[0][1]), time.time() - began)


def lists_drawn_here(cfg, rows, models):
    """What metadata.jsonl will hold, without labels, from what the first two stages left."""
    stored = {reward_name(spec): read_scores(cfg.out, spec, rows) for spec in cfg.rewards}
    complete = [i for i in range(len(rows)) if all(i in scores for scores in stored.values())]
    if len(complete) < len(rows):
        name = min(stored, key=lambda n: len(stored[n]))
        lacking = f"of {len(rows) - len(stored[name])} of {len(rows)} prompts are missing"
        message = f"{cfg.out}/scores/{name}.jsonl: scores {lacking}"
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
    """Rows of the metadata.jsonl that is there, with the scores that rewards.py --score added since. Where
    several versions of a reward scored, --rewards says whose scores count."""
    lists, out = read_metadata(cfg.out, lists=True), Path(cfg.out)
    look_at_pictures(out, lists)
    rows = [(row["prompt"], row["file_names"]) for row in lists]
    names = {path.stem.partition("@")[0] for path in (out / "scores").glob("*.jsonl")}
    specs = {reward_name(spec): spec for spec in cfg.rewards if "=" in spec or spec in LOADERS}
    for name in sorted(names - set(EVALUATION_ONLY)):
        lines = list(answers.stored_lines(out, name))
        version = rewards.version_there(out, name, lines, specs.get(name))
        found, outdated = answers.stored_scores(out, name, lines, rows, version)
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
    summary = {"label": cfg.label, "rewards": names, **summarise(lists, names)}
    summary.update(speed_of(out), variety=variety(cfg, lists) if "generators" in summary else {})
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    print_summary(out, summary)


# ----------------------------------------------------------------------------- what came out


def made_by(row):
    """(K,) names of who drew the images; None for a list from elsewhere that does not say."""
    who = [row.get("models"), row.get("seeds")]
    if all(isinstance(names, list) and len(names) == len(row["file_names"]) for names in who):
        return [f"{model}_{seed}" for model, seed in zip(*who)]


def draw_preview(out, lists):
    """preview.png: six lists, best to worst."""
    grid = []
    for row in lists[:: len(lists) // 6 or 1][:6]:
        names, cells = made_by(row) or row["file_names"], []
        for phi, name, file in sorted(zip(row["phi"], names, row["file_names"]), key=lambda x: -x[0]):
            with about(out / file):
                cells.append((read_image(out / file), f"{name}  phi {phi:.2f}"))
        grid.append((row["prompt"], cells))
    picture_grid(grid, out / "preview.png")


def summarise(lists, names):
    """Who wins against whom, how far the rewards agree, ties."""
    summary = {"lists": len(lists), "images": sum(len(row["phi"]) for row in lists)}
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
    return summary


def speed_of(out):
    """Images a second of one process and hours a stage, from timings.jsonl."""
    path, speed, hours = out / "timings.jsonl", {}, {}
    for line in store.whole_lines(path):
        try:
            t = parse_json(line.decode())
            stage, name, count = str(t["stage"]), str(t["name"]), int(t["images"])
            seconds = in_range("seconds", float(t["seconds"]), (None, 0, None))
        except (ValueError, TypeError, KeyError, OverflowError):
            print(f"{path}: a damaged line is left out of the speed")
            continue
        entry = speed.setdefault(stage, {}).setdefault(name, {"images": 0, "seconds": 0.0})
        entry["images"] += count
        entry["seconds"] += seconds
        entry["images_per_s"] = entry["images"] / max(entry["seconds"], 1e-9)
        hours[stage] = hours.get(stage, 0.0) + seconds / 3600
    return {"speed": speed, "hours": hours}


def variety(cfg, lists, most=100):
    """{generator: how varied its pictures are}, on the first `most` prompts. `distance`: 1 - cosine by CLIP
    between two seeds, where clip scored and there are two; `bits`: entropy of the colours that prompts of the
    toy world leave free. What winners lack, the tuned model will lack."""
    found, lists = {}, lists[:most]
    clip = [spec for spec in cfg.rewards if reward_name(spec) == "clip" and "score" in cfg.stages]
    scorers = [load_reward(f"diversity{spec[4:]}", common.pick_device(cfg.device)) for spec in clip]
    for name in dict.fromkeys(lists[0]["models"]):
        mine = [i for i, model in enumerate(lists[0]["models"]) if model == name]
        rows = [(row["prompt"], [row["file_names"][i] for i in mine]) for row in lists]
        found[name] = {}
        for scorer in scorers if len(mine) > 1 else ():
            results = answers.stream_rows(scorer, cfg.out, rows, range(len(rows)), cfg.batch_size)
            found[name]["distance"] = float(np.mean([value for _, of in results for value, _ in of]))
        if knows(cfg.out, rows):
            pictures = [(prompt, Path(cfg.out) / file) for prompt, files in rows for file in files]
            colours = sum(free_colours(prompt, read_image(path)) for prompt, path in pictures)
            found[name]["bits"] = float(entropy(colours / max(1, colours.sum())))
    return found


def print_summary(out, summary):
    if "generators" in summary:
        means = [f"{name} {phi:.3f}" for name, phi in zip(summary["generators"], summary["mean_phi"])]
        print(f"mean phi by model: {', '.join(means)}; share of tied pairs {summary['tied_pairs']:.3f}")
    for key, what in (("distance", "CLIP distance of a prompt's seeds"), ("bits", "bits of free colours")):
        each = [f"{name} {of[key]:.2f}" for name, of in summary["variety"].items() if key in of]
        if each:
            print(f"how varied, {what}: {', '.join(each)}; what winners lack, the tuned model will lack")
    for stage, entries in summary["speed"].items():
        each = [f"{name} {entry['images_per_s']:.1f} images/s" for name, entry in entries.items()]
        print(f"{stage}: {', '.join(each)}")
    by = f"ranked by {summary['label']} of {', '.join(summary['rewards'])}"
    print(
        f"{summary['lists']} lists in {out}/metadata.jsonl, {by}; {out}/preview.png has some, best to worst"
    )


# ----------------------------------------------------------------------------- main


def with_toy_models(cfg):
    """The toy's generators and rewards know 32 x 32 pictures of the toy's prompts alone, and are the default
    for these. For other prompts, or generators of the hub, they must be named."""
    local = all("=" in spec for spec in cfg.models)
    if local and Path(cfg.prompts).resolve().parent == HERE / "toy":
        return replace(cfg, models=cfg.models or TOY_MODELS, rewards=cfg.rewards or TOY_REWARDS)
    needed = {"models": "sdxl sd3 pixart cascade"}
    if set(cfg.stages) != {"generate"}:
        needed["rewards"] = "hpsv2.1 pickscore imagereward"
    for name, example in needed.items():
        if not getattr(cfg, name):
            fail(f"--{name}: must be named, as in --{name} {example}; the toy's know the toy world alone")
    return cfg


def check_choices(cfg, stored):
    """Wrong names of rewards and labels fail now, not after hours of drawing. `stored` lists may hold scores
    of a function or of another program: their name is enough."""
    check_rewards([spec for spec in cfg.rewards if not stored or "=" in spec or spec in LOADERS])
    names = [reward_name(spec) for spec in cfg.rewards]
    if only := [name for name in names if name in EVALUATION_ONLY]:
        fail(f"--rewards {only[0]}: is for evaluation only, labels come from reward models")
    check_label(cfg.label, LABELS)
    drawn = names and set(cfg.stages) != {"label"}
    if drawn and cfg.label.startswith("single:") and cfg.label[7:] not in names:
        fail(f"--label {cfg.label}: no such reward in --rewards (there are {', '.join(names)})")


@one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    out, stages = Path(cfg.out), set(cfg.stages)
    stored = stages == {"label"} and (out / "metadata.jsonl").is_file()  # needs neither prompts nor models
    if "import" not in stages and not stored:
        cfg = with_toy_models(cfg)
    check_choices(cfg, stored)
    part, parts, index, count = draw.share_of(cfg.shard)
    store.writable_folder("out", out)
    if "import" in stages and len(stages) > 1:
        fail("--stages import: stands alone; then rewards.py --score and --stages label")
    if "import" in stages or stored:
        if process_rank()[0] == 0:
            with folder_lock(out, 0, 1):
                if stored:
                    label_stage(cfg, lists_from_elsewhere(cfg))
                else:
                    import_stage(cfg)
        return

    if parts > 1 and stages == set(STAGES):
        stages.remove("label")  # the parts do not wait for each other
    rank, world = process_rank()
    models = parse_models(cfg.models)
    prompts = [row["prompt"] for row in read_prompts(cfg.prompts, cfg.limit, cfg.field)]
    rows = [(prompt, [file_name(i, m) for m in models]) for i, prompt in enumerate(prompts)]
    batches = [rows[start : start + cfg.batch_size] for start in range(0, len(rows), cfg.batch_size)]
    mine = batches[index::count]  # a batch belongs to one process, by its place
    device = common.pick_device(cfg.device)
    with folder_lock(out, index, count):
        recipe = recipe_of(cfg, rows, models)
        check_recipe(cfg.out, recipe, drawing="generate" in stages)
        if "generate" in stages:
            todo = draw.to_draw(cfg, mine, models)
            with progress("generate", todo) as bar:
                generate_stage(cfg, todo, device, recipe, bar)
        if "score" in stages:
            score_stage(cfg, mine, device, part=f"@{index}of{count}" if count > 1 else "")
        if "label" in stages and world > 1:  # every part must be there; nothing else waits for the others
            common.start_processes("cpu", minutes=24 * 60)
            dist.barrier()
        if rank == 0 and "label" in stages:
            label_stage(cfg, lists_drawn_here(cfg, rows, models))
        elif rank == 0:
            then = "; when all are done: the same command with --stages label, without --shard"
            print(f"{out}: {' and '.join(sorted(stages))} done, part {part} of {parts}{then * (parts > 1)}")


if __name__ == "__main__":
    main()
