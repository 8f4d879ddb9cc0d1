"""Compare models on held-out prompts: accuracy by category, reward means, win rates with intervals, pictures.

    python evaluate.py                                 # the toy world: the base against outputs/rankdpo/model
    python evaluate.py --models base=toy/models/sdxl rank=runs/a/model dpo=runs/b/model --seeds 8
    python evaluate.py --models sdxl=stabilityai/stable-diffusion-xl-base-1.0 mine=out/model \\
        --prompts parti.tsv --rewards pickscore hpsv2.1 --steps 30 --guidance 5 --resolution 1024

Prompts are a file of any kind that synpic.py reads; a column `tag`, as GenEval has it, makes categories. All
models draw from the same starting noise. The first model is the baseline of the others. Output: results.json,
report.md, grid.png.

  accuracy   share of images that pass the exact checker (toyworld); overall = mean of the categories
  win rate   BalancedDPO's: best of the seeds for each prompt and reward, win = strictly higher; with Wilson's
             95 % interval
  gain       difference of means to the baseline, paired, with a 95 % bootstrap interval over prompts
"""

import json
import os
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from common import (
    HERE,
    fail,
    fill_in,
    one_line_errors,
    option,
    parse,
    pick_device,
    pick_dtype,
    picture_grid,
    provenance,
    read_prompts,
    writable_folder,
    write_text,
)
from pipelines import SUITS, check_pipeline, generate_each, load_pipeline, noise_seed, scale_of
from rewards import TOY_REWARDS, check_rewards, load_reward, reward_name
from toyworld import grammar


@dataclass
class Config:
    # what is compared
    models: tuple = option(
        (f"base={HERE}/toy/models/sdxl", "rankdpo=outputs/rankdpo/model"),
        "two or more, as name=path; the first is the baseline",
    )
    prompts: str = option(f"{HERE}/toy/heldout.jsonl", "held-out prompts; a column tag makes categories")
    limit: int = option(0, "use the first that many prompts; 0 = all", at_least=0)
    rewards: tuple = option(("toyworld", *TOY_REWARDS), "scorers, name or name=source; toyworld is exact")
    seeds: int = option(4, "images a prompt and model", at_least=1)
    # how they draw
    steps: int = option(None, "sampling steps (default: what suits the first model)", at_least=1)
    guidance: float = option(None, "guidance scale (default: the same)", at_least=0)
    resolution: int = option(0, "side in pixels; 0 = the pipeline's own", at_least=0)
    seed: int = option(1234, "first seed of the starting noise, and of the bootstrap", at_least=0)
    precision: str = option("auto", "auto is bf16 on a GPU", ("auto", "fp32", "bf16", "fp16"))
    # how it is run
    out: str = option("outputs/evaluation", "folder to write")
    batch_size: int = option(64, "images a batch", at_least=1)
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


# ----------------------------------------------------------------------------- statistics


def wilson(wins, n):
    """95 % Wilson interval of a proportion."""
    interval = binomtest(wins, n).proportion_ci(confidence_level=0.95, method="wilson")
    return interval.low, interval.high


def category_mean(values, tags):
    """Mean over categories of the mean in each; values (..., P), one a prompt."""
    tags = np.array(tags)
    return np.mean([values[..., tags == t].mean(-1) for t in dict.fromkeys(tags)], axis=0)


def bootstrap_gain(a, b, tags, rng, n=2000):
    """Gain of b over a, (P,) means a prompt: (difference, low, high), resampling prompts by category."""
    difference, tags = b - a, np.array(tags)
    samples = []
    for tag in dict.fromkeys(tags):
        members = difference[tags == tag]
        samples.append(members[rng.integers(len(members), size=(n, len(members)))].mean(-1))  # (n,)
    low, high = np.percentile(np.mean(samples, axis=0), [2.5, 97.5])
    return float(category_mean(difference, tags)), float(low), float(high)


def win_rate(mine, base):
    """How often the best of the seeds is strictly higher; mine, base: (P, S) scores."""
    mine, base = mine.max(1), base.max(1)
    wins, ties, n = int((mine > base).sum()), int((mine == base).sum()), len(mine)
    low, high = wilson(wins, n)
    return dict(wins=wins, ties=ties, losses=n - wins - ties, n=n, rate=wins / n, low=low, high=high)


def compare(scores, tags, seed):
    """{model: {reward: (P, S)}} -> of each model and reward: mean, means by category, win rate, gain."""
    base, results = next(iter(scores)), {}
    for name, by_reward in scores.items():
        result = results[name] = {"means": {}, "categories": {}, "win_rate": {}, "gain": {}}
        for reward, s in by_reward.items():
            per_prompt, per_prompt_base = s.mean(1), scores[base][reward].mean(1)  # (P,)
            means = {t: float(per_prompt[np.array(tags) == t].mean()) for t in dict.fromkeys(tags)}
            result["means"][reward] = float(category_mean(per_prompt, tags))
            result["categories"][reward] = means
            if name != base:
                result["win_rate"][reward] = win_rate(s, scores[base][reward])
                rng = np.random.default_rng(seed)
                gain, low, high = bootstrap_gain(per_prompt_base, per_prompt, tags, rng)
                result["gain"][reward] = dict(gain=gain, low=low, high=high)
    return results


# ----------------------------------------------------------------------------- report


def table(header, rows):
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells) + "\n"


def report(cfg, results, tags, where):
    """The setting in a line, then a table of accuracy and a table of rewards."""
    setting = f"{cfg.steps} steps, guidance {cfg.guidance:g}; {where['device']}; commit {where['commit']}"
    text = f"{len(tags)} held-out prompts x {cfg.seeds} seeds, {setting}\n\n"
    categories, rewards = list(dict.fromkeys(tags)), list(next(iter(results.values()))["means"])
    if "toyworld" in rewards:
        rewards.remove("toyworld")
        rows = []
        for name, result in results.items():
            accuracy, gain = result["categories"]["toyworld"], ""
            if g := result["gain"].get("toyworld"):
                gain = f"{g['gain']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f})"
            overall = f"**{result['means']['toyworld']:.3f}**"
            rows.append([name, overall, *(f"{accuracy[t]:.2f}" for t in categories), gain])
        text += table(["accuracy, exact checker", "overall", *categories, "gain (95 %)"], rows)
    if rewards:
        rows = []
        for name, result in results.items():
            cells = [f"{result['means'][reward]:.3f}" for reward in rewards]
            for i, w in enumerate(result["win_rate"].get(reward) for reward in rewards):
                if w:
                    cells[i] += f"; {w['rate']:.0%} ({w['low']:.0%} to {w['high']:.0%}, n = {w['n']})"
            rows.append([name, *cells])
        text += table(["mean reward over categories; win rate over the first (95 %, n)", *rewards], rows)
    return text.strip() + "\n"


def draw_grid(path, prompts, tags, pictures, passed):
    """grid.png: two prompts of each category, at most twelve in all; up to four pictures of each model."""
    by_tag, rows = {tag: [] for tag in tags}, []
    for i, tag in enumerate(tags):
        by_tag[tag].append(i)
    for i in [i for members in by_tag.values() for i in members[:2]][:12]:
        cells = []
        for name, images in pictures.items():  # {model: [of prompt [of seed]]}
            for s, image in enumerate(images[i][:4]):
                verdict = "" if name not in passed else (" -", " ok")[int(passed[name][i, s])]
                cells.append((image, name + verdict))
        rows.append((prompts[i], cells))
    picture_grid(rows, path, side=96)


# ----------------------------------------------------------------------------- main


def parse_models(specs):
    """{name: path}, at least two."""
    models = dict(spec.partition("=")[::2] for spec in specs)
    if len(models) < 2 or not all(models.values()) or len(models) < len(specs):
        fail("--models: two or more different names are needed, each as name=path")
    for name, path in models.items():
        local = path.startswith(("outputs/", ".", "/"))
        if local and not all(map(os.path.isdir, path.split("+"))):  # base+adapters
            fail(f"--models {name}={path}: no such folder; train it with rankdpo.py first")
    return models


def check_choices(cfg, models, prompts):
    """What can be wrong is found now, not after hours of drawing."""
    check_rewards(cfg.rewards)
    if "toyworld" in map(reward_name, cfg.rewards):
        if unknown := [prompt for prompt in prompts if prompt not in grammar()]:
            sentence = f"{unknown[0]!r} in {cfg.prompts}"
            fail(f"--rewards toyworld judges sentences of the toy world only, not {sentence}")
    if cfg.resolution % 8:
        fail(f"--resolution must be a multiple of 8, got {cfg.resolution}")
    for path in models.values():
        check_pipeline(path)


def suited(cfg, pipe):
    """The options with what suits the model where they were not given. All models are drawn alike."""
    return fill_in(cfg, SUITS[scale_of(pipe)], "sampling")


def draw(cfg, name, pipe, prompts):
    """[of prompt [of seed: image]]. The noise does not depend on the model: all start from the same."""
    images = []
    jobs = [(prompt, cfg.seed + s) for prompt in prompts for s in range(cfg.seeds)]
    settings = dict(steps=cfg.steps, guidance=cfg.guidance, resolution=cfg.resolution)
    for start in tqdm(range(0, len(jobs), cfg.batch_size), desc=f"generate {name}", unit="batch"):
        batch = jobs[start : start + cfg.batch_size]
        noise = [noise_seed(prompt, "", seed) for prompt, seed in batch]
        results = generate_each(pipe, [prompt for prompt, _ in batch], noise, settings)
        for (prompt, seed), (image, problem) in zip(batch, results):
            if problem:
                fail(f"--models {name}: {problem}, for {prompt!r} with seed {seed}")
            images.append(image)
    return [images[i : i + cfg.seeds] for i in range(0, len(images), cfg.seeds)]


def score(cfg, pictures, prompts, device):
    """{model: {reward: (P, S)}}."""
    scores, repeated = {name: {} for name in pictures}, [p for p in prompts for _ in range(cfg.seeds)]
    for spec in cfg.rewards:
        reward = load_reward(spec, device)
        for name, images in tqdm(pictures.items(), desc=f"score {reward_name(spec)}", unit="model"):
            try:
                values = reward([image for of_seed in images for image in of_seed], repeated)
            except ValueError as e:
                fail(f"pictures of {name}: {e}; leave that reward or that prompt out")
            scores[name][reward_name(spec)] = values.view(len(prompts), cfg.seeds).double().numpy()
    return scores


@one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    models = parse_models(cfg.models)
    rows = read_prompts(cfg.prompts, cfg.limit)
    prompts = [row["prompt"] for row in rows]
    tags = ["all" if row.get("tag") is None else str(row["tag"]) for row in rows]
    check_choices(cfg, models, prompts)
    device, out = pick_device(cfg.device), writable_folder("out", cfg.out)

    pictures = {}
    for name, path in models.items():
        pipe = load_pipeline(path, device, pick_dtype(cfg.precision, device))
        cfg = suited(cfg, pipe)
        pictures[name] = draw(cfg, name, pipe, prompts)
        del pipe  # before the next is loaded
    scores = score(cfg, pictures, prompts, device)
    results, where = compare(scores, tags, cfg.seed), provenance(device)
    text = report(cfg, results, tags, where)
    raw = {}
    for name, by_reward in scores.items():
        raw[name] = {reward: s.round(6).tolist() for reward, s in by_reward.items()}  # (P, S) each
    record = dict(config=asdict(cfg), **where, prompts=prompts, tags=tags, models=results, scores=raw)
    write_text(out / "results.json", json.dumps(record))
    write_text(out / "report.md", text)
    passed = {name: by_reward["toyworld"] for name, by_reward in scores.items() if "toyworld" in by_reward}
    draw_grid(out / "grid.png", prompts, tags, pictures, passed)
    print(text)
    print(f"{out}/results.json, report.md; pictures side by side in {out}/grid.png")


if __name__ == "__main__":
    main()
