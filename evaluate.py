"""Compare models on held-out prompts: accuracy by category, reward means, win rates with intervals, a picture grid.

    python evaluate.py                                         # the toy world: the base against outputs/rankdpo/model
    python evaluate.py --models base=toy/models/sdxl rank=runs/a/model dpo=runs/b/model --seeds 8
    python evaluate.py --prompts parti.txt --models sdxl=stabilityai/stable-diffusion-xl-base-1.0 mine=out/model \\
        --rewards pickscore hpsv2.1 --steps 30 --guidance 5 --resolution 1024

Prompts are a .txt, one a line, or a .jsonl with `prompt` and, for categories, GenEval's `tag`. All models draw from
the same starting noise. The first model is the baseline of the others. Output: results.json, report.md, grid.png.

  accuracy   share of images that pass the exact checker (toyworld); overall = mean of the categories, as in GenEval
  win rate   BalancedDPO's: best of the seeds for each prompt and reward, win = strictly higher; Wilson 95 % interval
  gain       difference of means to the baseline with a 95 % bootstrap interval over prompts, paired
"""
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rankdpo import HERE, fail, load_pipeline, option, parse, pick_device, pick_dtype, provenance, write_atomic
from rewards import TOY_REWARDS, check_reward, load_reward, reward_name
from synpic import generate, noise_seed, picture_grid, read_prompts
from toyworld import grammar


@dataclass
class Config:
    models: tuple = option((f"base={HERE / 'toy/models/sdxl'}", "rankdpo=outputs/rankdpo/model"), "two or more, as name=path; the first is the baseline")
    prompts: str = option(str(HERE / "toy/heldout.jsonl"), "held-out prompts: .txt, or .jsonl with prompt and tag")
    rewards: tuple = option(("toyworld",) + TOY_REWARDS, "scorers, as name or name=source; toyworld is the exact checker")
    out: str = option("outputs/evaluation", "folder to write")
    seeds: int = option(4, "images a prompt and model")
    steps: int = option(16, "sampling steps")
    guidance: float = option(2., "guidance scale")
    resolution: int = option(0, "side in pixels; 0 = the pipeline's own")
    limit: int = option(0, "use the first that many prompts; 0 = all")
    batch_size: int = option(64, "images a batch")
    seed: int = option(1234, "first seed of the starting noise, and of the bootstrap")
    precision: str = option("auto", "of the generators; auto is bf16 on a GPU", ("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")


def read_tagged(path, limit):
    """-> prompts, tags (category of each; "all" without one)."""
    if not str(path).endswith(".jsonl"):
        prompts = read_prompts(path, limit)
        return prompts, ["all"] * len(prompts)
    if not os.path.isfile(path):
        fail(f"--prompts {path}: no such file")
    rows = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append((row["prompt"].strip(), str(row.get("tag", "all"))))
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path}, line {n}: not a JSON object with a string `prompt`; mend or delete that line")
    if not rows:
        fail(f"--prompts {path}: holds no prompt")
    rows = rows[:limit] if limit > 0 else rows
    return [r[0] for r in rows], [r[1] for r in rows]


def wilson(wins, n, z=1.96):
    """95 % Wilson interval of a proportion."""
    p, d = wins / n, 1 + z * z / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** .5 / d
    return (p + z * z / (2 * n)) / d - half, (p + z * z / (2 * n)) / d + half


def category_mean(values, tags):
    """Mean over categories of the mean in each; values (..., P), one a prompt."""
    tags = np.array(tags)
    return np.mean([values[..., tags == t].mean(-1) for t in dict.fromkeys(tags)], axis=0)


def bootstrap_gain(a, b, tags, rng, n=2000):
    """Gain of b over a, (P,) means a prompt: (difference, low, high), resampling prompts within each category."""
    d, tags = b - a, np.array(tags)
    index = np.concatenate([(i := np.flatnonzero(tags == t))[rng.integers(len(i), size=(n, len(i)))] for t in dict.fromkeys(tags)], axis=1)
    order = np.concatenate([tags[tags == t] for t in dict.fromkeys(tags)])
    samples = category_mean(d[index], order)
    return float(category_mean(d, tags)), *np.percentile(samples, [2.5, 97.5]).tolist()


def compare(scores, tags, seed):
    """{model: {reward: (P, S)}} -> results: per model category means, overall, reward means, win rates and gains."""
    base, results = next(iter(scores)), {}
    for name, by_reward in scores.items():
        result = results[name] = {"means": {}, "categories": {}, "win_rate": {}, "gain": {}}
        for reward, s in by_reward.items():
            per_prompt = s.mean(1)                                               # (P,)
            result["means"][reward] = float(category_mean(per_prompt, tags))
            result["categories"][reward] = {t: float(per_prompt[np.array(tags) == t].mean()) for t in dict.fromkeys(tags)}
            if name != base:
                mine, other = s.max(1), scores[base][reward].max(1)              # best of the seeds
                wins, ties, n = int((mine > other).sum()), int((mine == other).sum()), len(mine)
                low, high = wilson(wins, n)
                result["win_rate"][reward] = dict(wins=wins, ties=ties, losses=n - wins - ties, n=n, rate=wins / n, low=low, high=high)
                gain, low, high = bootstrap_gain(scores[base][reward].mean(1), per_prompt, tags, np.random.default_rng(seed))
                result["gain"][reward] = dict(gain=gain, low=low, high=high)
    return results


def report(cfg, results, tags, where):
    """Markdown tables."""
    names, categories = list(results), list(dict.fromkeys(tags))
    lines = [f"{len(tags)} held-out prompts x {cfg.seeds} seeds, {cfg.steps} steps, guidance {cfg.guidance:g}; {where['device']}; commit {where['commit']}", ""]
    if "toyworld" in results[names[0]]["means"]:
        lines += ["| accuracy, exact checker | overall | " + " | ".join(categories) + " | gain (95 %) |", "|---" * (len(categories) + 3) + "|"]
        for n in names:
            c, g = results[n]["categories"]["toyworld"], results[n]["gain"].get("toyworld")
            lines.append(f"| {n} | **{results[n]['means']['toyworld']:.3f}** | " + " | ".join(f"{c[t]:.2f}" for t in categories)
                         + (f" | {g['gain']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f}) |" if g else " | |"))
        lines.append("")
    rewards = [r for r in results[names[0]]["means"] if r != "toyworld"]
    if rewards:
        lines += ["| mean reward over categories; win rate over the first (95 %, n) | " + " | ".join(rewards) + " |", "|---" * (len(rewards) + 1) + "|"]
        for n in names:
            cells = []
            for r in rewards:
                w = results[n]["win_rate"].get(r)
                cells.append(f"{results[n]['means'][r]:.3f}" + (f"; {w['rate']:.0%} ({w['low']:.0%} to {w['high']:.0%}, n = {w['n']})" if w else ""))
            lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    paths = dict(spec.partition("=")[::2] for spec in cfg.models)
    if len(paths) < 2 or not all(paths.values()) or len(paths) < len(cfg.models):
        fail("--models: two or more different names are needed, each as name=path")
    for option_name in ("seeds", "steps", "batch_size"):
        if getattr(cfg, option_name) < 1:
            fail(f"--{option_name} must be positive, got {getattr(cfg, option_name)}")
    for name, path in paths.items():
        if path.startswith(("outputs/", ".", "/")) and not all(map(os.path.isdir, path.split("+"))):   # base+adapters
            fail(f"--models {name}={path}: no such folder; train it with rankdpo.py first")
    prompts, tags = read_tagged(cfg.prompts, cfg.limit)
    for spec in cfg.rewards:
        check_reward(spec)
    if any(reward_name(r) == "toyworld" for r in cfg.rewards) and (unknown := [p for p in prompts if p not in grammar()]):
        fail(f"--rewards toyworld judges sentences of the toy world only, not {unknown[0]!r} in {cfg.prompts}")
    device, out = pick_device(cfg.device), Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror})")

    jobs = [(p, cfg.seed + s) for p in range(len(prompts)) for s in range(cfg.seeds)]
    sampling = dict(steps=cfg.steps, guidance=cfg.guidance, resolution=cfg.resolution)
    pictures = {}
    for name, path in paths.items():
        pipe, images = load_pipeline(path, device, pick_dtype(cfg.precision, device)), []
        for start in tqdm(range(0, len(jobs), cfg.batch_size), desc=f"generate {name}", unit="batch"):
            batch = jobs[start:start + cfg.batch_size]
            # the noise does not depend on the model: all of them start from the same
            for (p, s), (image, problem) in zip(batch, generate(pipe, [prompts[p] for p, _ in batch], [noise_seed(prompts[p], "", s) for p, s in batch], sampling)):
                if problem:
                    fail(f"--models {name}={path}: {problem}, for {prompts[p]!r} with seed {s}")
                images.append(image)
        pictures[name] = images
        del pipe
    scores = {name: {} for name in paths}
    for spec in cfg.rewards:
        score = load_reward(spec, device)
        for name, images in tqdm(pictures.items(), desc=f"score {reward_name(spec)}", unit="model"):
            try:
                s = score(images, [prompts[p] for p, _ in jobs])
            except ValueError as e:
                fail(f"pictures of {name}: {e}; leave that reward or that prompt out")
            scores[name][reward_name(spec)] = s.view(len(prompts), cfg.seeds).double().numpy()

    results, where = compare(scores, tags, cfg.seed), provenance(device)
    text = report(cfg, results, tags, where)
    raw = {name: {r: s.round(6).tolist() for r, s in by_reward.items()} for name, by_reward in scores.items()}   # (P, S) each
    write_atomic(out / "results.json", json.dumps(dict(config=asdict(cfg), **where, prompts=prompts, tags=tags, models=results, scores=raw)))
    write_atomic(out / "report.md", text)
    chosen = [j for t in dict.fromkeys(tags) for j in [j for j, u in enumerate(tags) if u == t][:2]][:12]   # two of each category
    rows = [(prompts[i], [(pictures[n][i * cfg.seeds + s], n if "toyworld" not in scores[n] else f"{n} {'ok' if scores[n]['toyworld'][i, s] else '-'}")
                          for n in paths for s in range(min(4, cfg.seeds))]) for i in chosen]
    picture_grid(rows, out / "grid.png", side=96)
    print(text)
    print(f"{out}/results.json, report.md; pictures side by side in {out}/grid.png")


if __name__ == "__main__":
    main()
