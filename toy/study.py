"""The study: what each objective of the three papers buys in the toy world. bash train.sh study

    python toy/study.py                # every run that toy/study.jsonl lacks; may be killed at any
                                       # time, and several may be at work side by side
    python toy/study.py --only dpo sft # the runs of these methods
    python toy/study.py --report       # toy/study.jsonl -> tables of docs/study.md and README, docs/study.png

A run trains one method with one seed and draws the study's prompts. It becomes a line of toy/study.jsonl: how
many of the four pictures of each prompt pass the exact checker, whether the best of them beats the base's by
each reward, how different they are. First comes the grid, which finds each objective's learning rate on
*training* prompts; then the base, seed 0 of every method, seed 1, ... World, models and prompts are frozen:
docs/study.md names the commit, and said before the first run what the design can resolve.
"""

import json
import resource
import subprocess
import sys
import time
from collections import Counter, namedtuple
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))

import synpic
from common import (
    appending,
    fail,
    lock,
    one_line_errors,
    option,
    parse,
    provenance,
    publish,
    read_jsonl,
    remove,
    write_text,
)
from evaluate import markdown
from pipelines import SUITS, generate_each, load_pipeline, noise_seed
from rewards import TOY_REWARDS, load_reward, reward_name
from stats import category_mean, entropy
from toy.world import CATEGORIES, check, find_objects, grammar, prompts_of

RATES = (1e-4, 2e-4, 4e-4)  # the grid of every objective
SEEDS = 5  # of training, a method
NOISES = 4  # pictures, a prompt
BASE, PAGE, README = TOY / "models/sdxl", TOY.parent / "docs/study.md", TOY.parent / "README.md"
REWARDS = tuple(map(reward_name, TOY_REWARDS))
VOTE = "--loss balanced --ref_refresh 50"
Method = namedtuple("Method", "table paper grid options")  # `grid`: the method whose learning rate it takes
METHODS = {
    "base": Method("", "74.65 / 84.33", "", ""),
    "sft": Method("RankDPO 5", "76.56 / 85.45", "sft", "--loss sft"),
    "weighted": Method("RankDPO 5", "77.02 / 85.55", "weighted", "--loss weighted"),
    "dpo": Method("RankDPO 5", "78.84 / 86.27", "dpo", "--loss dpo"),
    "gain": Method("RankDPO 5", "79.15 / 87.43", "gain", "--loss gain"),
    "rankdpo": Method("RankDPO 5", "79.26 / 87.52", "rankdpo", "--loss rankdpo"),
    "dpo, random labels": Method("RankDPO 4", "75.66 / 84.42", "dpo", "--loss dpo --label random"),
    "dpo, hpsv2.1": Method("RankDPO 4", "78.04 / 86.22", "dpo", "--loss dpo --label single:hpsv2.1"),
    "dpo, pickscore": Method("RankDPO 4", "", "dpo", "--loss dpo --label single:pickscore"),
    "dpo, clip": Method("RankDPO 4", "", "dpo", "--loss dpo --label single:clip"),
    "dpo, imagereward": Method("RankDPO 4", "", "dpo", "--loss dpo --label single:imagereward"),
    "rankdpo, one generator": Method("RankDPO 4", "78.40 / 86.76", "rankdpo", "--loss rankdpo --data ONE"),
    "balanced": Method("BalancedDPO", "85 78 64", "balanced", VOTE),
    "balanced, no refresh": Method("BalancedDPO", "63 61 47", "balanced", "--loss balanced"),
    "balanced, 3 rewards": Method(
        "BalancedDPO", "", "balanced", f"{VOTE} --label_rewards clip hpsv2.1 pickscore"
    ),
    "hpsv2.1, refresh": Method("BalancedDPO", "90 49 57", "balanced", f"{VOTE} --label_rewards hpsv2.1"),
    "sum, refresh": Method("BalancedDPO", "70 32 54", "balanced", "--loss dpo --label sum --ref_refresh 50"),
    "normalised sum, refresh": Method(
        "BalancedDPO", "84 43 60", "balanced", "--loss dpo --label normalized_sum --ref_refresh 50"
    ),
    "direct": Method("BalancedDPO", "", "direct", "--loss direct --ref_refresh 50"),
    "random scorer": Method("BalancedDPO", "84 56 49", "balanced", "--loss random_scorer --ref_refresh 50"),
    "dro": Method("Diffusion-DRO", "", "dro", "--loss dro --global_batch_size 40 --device_batch_size 40"),
}


@dataclass
class Config:
    only: tuple = option(tuple(METHODS), "methods", choices=tuple(METHODS))
    report: bool = option(False, "train nothing; write tables and picture of what has been run")
    steps: int = option(200, "optimiser steps of every run", above=0)
    lists: int = option(16, "lists a step", above=0)
    data: str = option("outputs/synpic", "the default Syn-Pic folder; python synpic.py makes it")
    out: str = option("outputs/study", "where runs leave their logs and models")
    results: str = option(f"{TOY}/study.jsonl", "the lines of all runs")


# ----------------------------------------------------------------------------- prompts


def study_prompts(rows=50):
    """toy/study_prompts.jsonl, written once: `rows` of each category from the held-out share of the grammar,
    first the sentences that no evaluation has used, then the others. Where there are fewer a sentence stands
    in several rows, each with noise of its own (its seeds: `seed` and the next three)."""
    path, seen = TOY / "study_prompts.jsonl", {r["prompt"] for _, r in read_jsonl(TOY / "heldout.jsonl")}
    if not path.is_file():
        lines = []
        for tag in CATEGORIES:
            options = [p for p in prompts_of("heldout", 10**6, seed=1) if grammar()[p]["tag"] == tag]
            options.sort(key=lambda p: p in seen)  # stable
            for i in range(rows):
                turn, place = divmod(i, len(options))
                p = options[place]
                lines.append(dict(tag=tag, prompt=p, seed=9000 + 10 * turn, fresh=p not in seen and not turn))
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return [row for _, row in read_jsonl(path)]


def grid_prompts(rows=15):
    """The training prompts by which learning rates are chosen: the first `rows` of each category."""
    prompts, chosen = (TOY / "prompts.txt").read_text().splitlines(), []
    for tag in CATEGORIES:
        chosen += [p for p in prompts if grammar()[p]["tag"] == tag][:rows]
    return [dict(tag=grammar()[p]["tag"], prompt=p, seed=5000) for p in chosen]


# ----------------------------------------------------------------------------- measurement


def draw(path, rows, batch_size=64):
    """The pictures of all rows, NOISES of each, as evaluate.py draws by default."""
    jobs = [(row["prompt"], row["seed"] + n) for row in rows for n in range(NOISES)]
    pipe, images = load_pipeline(str(path)), []
    for batch in (jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)):
        noise = [noise_seed(prompt, "", seed) for prompt, seed in batch]
        drawn = generate_each(pipe, [prompt for prompt, _ in batch], noise, dict(SUITS["toy"], resolution=0))
        if problem := next((problem for _, problem in drawn if problem), None):
            fail(f"{path}: {problem}")
        images += [image for image, _ in drawn]
    return images


def distance(images, prompts):
    """Mean over rows of 1 - cosine between two pictures of a row, as the toy CLIP sees them."""
    scorer = load_reward(f"diversity={TOY}/rewards/clip")
    seen = list(scorer.stream(images, prompts))  # an embedding a picture
    rows = (scorer.of_row(seen[i : i + NOISES]) for i in range(0, len(seen), NOISES))
    return float(np.mean([apart for row in rows for apart, _ in row]))


def colour_bits(images, prompts):
    """Entropy of the colours in pictures whose prompt names none; log2(6) = 2.58 is even. Every object counts
    once, where evaluate.py's table counts every picture once."""
    free = [all(c is None for _, c in grammar()[p]["objects"]) for p in prompts]
    seen = Counter(o[1] for ok, image in zip(free, images) if ok for o in find_objects(image))
    return float(entropy(np.array(list(seen.values())) / max(1, sum(seen.values()))))


def measure(path, rows, base, rewards):
    """What a line says of the model at `path`; `base` is the base's line. Without rewards accuracy alone."""
    images, prompts = draw(path, rows), [row["prompt"] for row in rows for _ in range(NOISES)]
    passed = np.reshape([check(p, image) for p, image in zip(prompts, images)], (-1, NOISES))
    line = dict(passes="".join(str(n) for n in passed.sum(1)))  # of each row, a digit
    if rewards:
        line.update(distance=distance(images, prompts), bits=colour_bits(images, prompts), means={}, best={})
    for spec in rewards:
        scores, name = load_reward(spec)(images, prompts).view(-1, NOISES), reward_name(spec)
        line["means"][name] = scores.mean().item()
        line["best"][name] = [round(x, 5) for x in scores.amax(1).tolist()]  # (P,)
    if rewards and base:
        best = line.pop("best")
        wins = {n: "".join(str(int(a > b)) for a, b in zip(best[n], base["best"][n])) for n in best}
        line.update(wins=wins)
    return line


# ----------------------------------------------------------------------------- runs


def key_of(line):
    return line["kind"], line["method"], line["lr"], line["seed"]


def best_rate(lines, method):
    """The rate of the grid with the highest accuracy on training prompts; None while it is not complete."""
    tags = [row["tag"] for row in grid_prompts()]
    found = {line["lr"]: line for line in lines if key_of(line)[:2] == ("grid", method) and not line["seed"]}
    if not set(RATES) <= found.keys():
        return None
    accuracy = {lr: overall(line, tags) if "passes" in line else -1 for lr, line in found.items()}
    return max(RATES, key=lambda lr: accuracy[lr])


def jobs(cfg, lines):
    """[(kind, method, lr, seed)] in the order of the study."""
    chosen = [name for name in METHODS if name in cfg.only and name != "base"]
    grids = dict.fromkeys(METHODS[name].grid for name in chosen)
    out = [("grid", name, lr, 0) for name in grids for lr in RATES]
    out += [("grid", name, 2e-4, 1) for name in ("dpo", "rankdpo") if name in grids]  # pilots, for the design
    out.append(("study", "base", 0.0, 0))
    rates = {name: best_rate(lines, name) for name in grids}
    for seed in range(SEEDS):
        for name in chosen:
            if lr := rates[METHODS[name].grid]:
                out.append(("study", name, lr, seed))
    return out


def one_generator(cfg):
    """Lists of five pictures of the same prompts by the model that is tuned: RankDPO's Table 4."""
    folder = Path(cfg.out) / "one_generator"
    if not (folder / "metadata.jsonl").is_file():
        spec = synpic.TOY_MODELS[0]
        models = [spec, *(f"{spec},seed={seed}" for seed in range(1, 5))]
        synpic.main(["--out", str(folder), "--models", *models])
    return str(folder)


def cpu_seconds():
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of_children.ru_utime + of_children.ru_stime


def train(cfg, method, lr, seed, out):
    """One run of rankdpo.py -> what its line says of the training; a problem, if it ruined its weights."""
    options = [one_generator(cfg) if o == "ONE" else o for o in METHODS[method].options.split()]
    size = ["--steps", cfg.steps, "--global_batch_size", cfg.lists, "--device_batch_size", cfg.lists]
    how = ["--lr", lr, "--seed", seed, "--out", out, "--resume", "false", "--device", "cpu", *size]
    command = [sys.executable, TOY.parent / "rankdpo.py", "--model", BASE, "--data", cfg.data, *how, *options]
    wall, cpu = time.time(), cpu_seconds()
    done = subprocess.run([str(a) for a in command], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if "lower --lr" in said:  # the trainer's word for weights that it has ruined
            return dict(problem=said)
        fail(f"{out}: the trainer was stopped ({said}); the same command goes on")
    log = [row for _, row in read_jsonl(Path(out) / "log.jsonl")]
    norms, largest = np.array([row["grad_norm"] for row in log[1:]]), log[0]["config"]["max_grad_norm"]
    return dict(
        steps=cfg.steps,
        lists=cfg.lists,
        clipped=round(float((norms > largest).mean()), 3),
        winner_s=log[-1]["best_s"],
        loser_s=log[-1]["worst_s"],
        seconds=round(time.time() - wall, 1),
        cpu_seconds=round(cpu_seconds() - cpu, 1),
    )


def run(cfg, job, base):
    """Train and measure -> a line for study.jsonl."""
    kind, method, lr, seed = job
    out = f"{cfg.out}/{kind}-{method}-{lr:g}-{seed}".replace(" ", "_")
    line = dict(kind=kind, method=method, lr=lr, seed=seed)
    line.update({} if method == "base" else train(cfg, method, lr, seed, out))
    if "problem" in line:
        return line
    path = BASE if method == "base" else f"{out}/model"
    rows, rewards = (study_prompts(), TOY_REWARDS) if kind == "study" else (grid_prompts(), ())
    line.update(measure(path, rows, base, rewards), commit=provenance(torch.device("cpu"))["commit"])
    remove(f"{out}/model")
    return line


def read_results(cfg):
    path, lines = Path(cfg.results), []
    for n, line in read_jsonl(path, torn_end=True) if path.is_file() else ():
        if line.get("steps", cfg.steps) != cfg.steps or line.get("lists", cfg.lists) != cfg.lists:
            fail(f"{path}, line {n}: a run of other --steps or --lists; name another file with --results")
        lines.append(line)
    return lines


def run_all(cfg):
    """Job after job that no line tells of and no other process is at."""
    if not (Path(cfg.data) / "metadata.jsonl").is_file():
        fail(f"--data {cfg.data}: no metadata.jsonl there; python synpic.py makes it")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    tried = set()
    while True:
        lines = read_results(cfg)
        done = {key_of(line) for line in lines} | tried
        todo = [job for job in jobs(cfg, lines) if job not in done]
        if not todo:
            return
        job = todo[0]
        base = next((line for line in lines if line["method"] == "base"), None)
        if job[0] == "study" and job[1] != "base" and not base:
            fail("the base is being measured by another process; start this one again in a minute")
        name = "-".join(map(str, job)).replace(" ", "_")
        with ExitStack() as stack:
            try:
                stack.enter_context(lock(Path(cfg.out) / f".{name}.lock", "another process is at it"))
            except SystemExit:
                tried.add(job)
                continue
            text = json.dumps(run(cfg, job, base)) + "\n"
            with appending(Path(cfg.results).resolve(), busy="") as f:
                f.write(text.encode())


# ----------------------------------------------------------------------------- report


def share(line):
    """(P,) share of the pictures of each row that pass."""
    return np.array([int(c) for c in line["passes"]]) / NOISES


def overall(line, tags):
    return float(category_mean(share(line), tags))


def interval(values, tags, n=4000):
    """(S, P) of S training seeds and P rows -> (mean over categories, low, high): 95 %, by a bootstrap that
    draws seeds, and rows within each category, anew. Of one seed it knows no spread between seeds."""
    rng, tags, S, by_seed = np.random.default_rng(0), np.array(tags), len(values), 0
    for tag in CATEGORIES:
        of_tag = values[:, tags == tag]  # (S, m)
        by_seed = by_seed + of_tag[:, rng.integers(of_tag.shape[1], size=(n, of_tag.shape[1]))].mean(-1)
    seeds = rng.integers(S, size=(n, S))
    samples = by_seed[seeds, np.arange(n)[:, None]].mean(1) / len(CATEGORIES)  # (n,)
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(category_mean(values, tags).mean()), float(low), float(high)


def between(a, b, tags):
    """interval of a - b, (S, P) each: of the same rows, noise and training seeds."""
    S = min(len(a), len(b))
    return interval(a[:S] - b[:S], tags)


def show(found, digits=3):
    mean, low, high = found
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def accuracy_table(runs, tags):
    """Markdown: a row a method, with intervals, and the paper's numbers beside it."""
    values = {name: np.stack([share(line) for line in lines]) for name, lines in runs.items()}
    header = [
        "method",
        "seeds",
        "rate",
        "accuracy (95 %)",
        "against the base",
        "against dpo",
        *CATEGORIES,
        "paper",
    ]
    rows = []
    for name, v in values.items():
        mean, low, high = interval(v, tags)
        base = show(interval(v - values["base"], tags)) if name != "base" else ""
        dpo = show(between(v, values["dpo"], tags)) if name not in ("base", "dpo") and "dpo" in values else ""
        by_tag = [f"{v[:, np.array(tags) == tag].mean():.2f}" for tag in CATEGORIES]
        numbers = [str(len(v)), f"{runs[name][0]['lr']:g}", f"**{mean:.3f}** ({low:.3f} to {high:.3f})"]
        rows.append([name, *numbers, base, dpo, *by_tag, METHODS[name].paper])
    return markdown(header, rows)


def short_table(runs, tags):
    """Markdown: the README's table, a row a method, the papers' numbers in a column of their own."""
    base, rows = share(runs["base"][0]), []
    for name, lines in runs.items():
        values = np.stack([share(line) for line in lines])
        mean, low, high = interval(values, tags)
        gain = show(interval(values - base, tags)) if name != "base" else ""
        distance = np.mean([line["distance"] for line in lines])
        numbers = [f"{mean:.3f} ({low:.3f} to {high:.3f})", gain, f"{distance:.2f}"]
        rows.append([name, *numbers, METHODS[name].table, METHODS[name].paper])
    header = ["method", "accuracy (95 %)", "gain on the base", "distance", "the paper's table", "its numbers"]
    return markdown(header, rows)


def cost_table(runs):
    """Markdown: what the rewards say, what it costs in diversity, how often the clip was at work."""
    mean = lambda lines, key: np.mean([line[key] for line in lines])
    header = ["method", *(f"{r}, win rate" for r in REWARDS), "distance", "colours, bits", "clipped"]
    rows = []
    for name, lines in runs.items():
        wins, more = [""] * len(REWARDS), ["", "", "", ""]
        if name != "base":
            wins = [f"{np.mean([[int(c) for c in line['wins'][r]] for line in lines]):.0%}" for r in REWARDS]
            more = [f"{mean(lines, 'clipped'):.0%}", f"{mean(lines, 'cpu_seconds'):.0f}"]
            more += [f"{mean(lines, key):+.1e}" for key in ("winner_s", "loser_s")]
        rows.append([name, *wins, f"{mean(lines, 'distance'):.3f}", f"{mean(lines, 'bits'):.2f}", *more])
    return markdown([*header, "CPU s", "winner's s", "loser's s"], rows)


def resolution(lines, tags):
    """What the design resolves, from the pilots: dpo and rankdpo, two seeds each, on training prompts."""
    pilots = {}
    for line in lines:
        if line["kind"] == "grid" and line["method"] in ("dpo", "rankdpo") and line["lr"] == 2e-4:
            pilots.setdefault(line["method"], {})[line["seed"]] = share(line)
    if not all(len(pilots.get(name, ())) == 2 for name in ("dpo", "rankdpo")):
        return ""
    a, b = (np.stack([pilots[name][seed] for seed in (0, 1)]) for name in ("rankdpo", "dpo"))  # (2, P)
    difference, tags = (a - b)[0], np.array(tags)
    spread = np.mean([difference[tags == tag].var(ddof=1) for tag in CATEGORIES])  # of a row, one seed
    sigma = np.sqrt(np.mean([np.diff(category_mean(v, tags)) ** 2 / 2 for v in (a, b)]))
    rows = len(study_prompts())
    half = 1.96 * np.sqrt(spread / rows / SEEDS + 2 * sigma**2 / SEEDS)
    one = 1.96 * np.sqrt(spread / rows + 2 * sigma**2)
    found = f"a row's difference between two methods deviates by {spread**0.5:.2f}, two seeds by {sigma:.3f}"
    resolved = f"{half:.3f} is resolved (95 %) with {rows} rows and {SEEDS} seeds, {one:.3f} with one seed"
    return f"Pilots on training prompts: {found}; a difference of {resolved}.\n"


def draw_intervals(runs, tags, path):
    """docs/study.png: accuracy of every method with its interval, coloured by table, and its seeds."""
    from matplotlib.figure import Figure

    names = list(runs)[::-1]
    figure = Figure(figsize=(7.5, 0.28 * len(names) + 1), layout="constrained")
    axis = figure.subplots()
    colours = {table: f"C{i}" for i, table in enumerate(dict.fromkeys(m.table for m in METHODS.values()))}
    for y, name in enumerate(names):
        mean, low, high = interval(np.stack([share(line) for line in runs[name]]), tags)
        colour = colours[METHODS[name].table]
        axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", ms=4, capsize=2, color=colour)
    axis.set_yticks(range(len(names)), [f"{name} ({len(runs[name])})" for name in names])
    axis.axvline(overall(runs["base"][0], tags), color="k", lw=0.5)
    axis.set_xlabel("accuracy, exact checker (95 % over prompts and training seeds)")
    publish(path, lambda tmp: figure.savefig(tmp, dpi=100))


def report(cfg):
    """The tables below the mark in docs/study.md, between the marks in the README, and the picture."""
    lines = read_results(cfg)
    if not lines:
        fail(f"{cfg.results}: no runs yet")
    runs = {}
    for name in METHODS:
        of_method = [
            line for line in lines if line["kind"] == "study" and line["method"] == name and "passes" in line
        ]
        if of_method:
            runs[name] = sorted(of_method, key=lambda line: line["seed"])
    text = resolution(lines, [row["tag"] for row in grid_prompts()])
    tags = [row["tag"] for row in study_prompts()]
    rates = [
        f"{name}: {best_rate(lines, name):g}"
        for name in dict.fromkeys(m.grid for m in METHODS.values())
        if name and best_rate(lines, name)
    ]
    text += f"\nLearning rates by the grid: {', '.join(rates)}.\n\n"
    if "base" in runs:
        text += accuracy_table(runs, tags) + cost_table(runs)
        draw_intervals(runs, tags, PAGE.with_suffix(".png"))
        write_below(README, short_table(runs, tags))
    missing = [name for name in METHODS if name not in runs]
    text += f"Not run: {', '.join(missing)}.\n" if missing else ""
    write_below(PAGE, text)
    print(text)


MARK, END = "<!-- what follows is written by `python toy/study.py --report` -->", "<!-- to here -->"


def write_below(path, text):
    """What a page says below the mark: all, or as far as the other mark."""
    head, _, old = (path.read_text() if path.is_file() else "").partition(MARK)
    rest = END + old.partition(END)[2] if END in old else ""
    write_text(path, f"{head}{MARK}\n\n{text.rstrip()}\n" + (f"\n{rest}" if rest else ""))


# ----------------------------------------------------------------------------- main


@one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    torch.set_num_threads(1)
    if cfg.report:
        return report(cfg)
    run_all(cfg)


if __name__ == "__main__":
    main()
