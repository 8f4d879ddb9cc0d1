"""How the toy world's settings were chosen, on training prompts alone: docs/toyworld.md and docs/study.md.

    python toy/screen.py --guidance 1.5 2 3                     # what each generator draws at which guidance
    python toy/screen.py --name weight.3 --options loser_weight=.3    # one run, a line per model it keeps
    python toy/screen.py --report                               # outputs/screen.jsonl as a table

A run trains as rankdpo.py does. Each of its models draws SHARE prompts of each category of toy/prompts.txt,
four pictures each, as evaluate.py draws by default. Each model becomes a line of --results.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))

import rankdpo
from evaluate import markdown
from lib import common, store, tables
from lib.common import fail, option
from lib.pipelines import generate_each, load_pipeline, noise_seed
from lib.stats import category_mean, entropy, paired_gain
from rewards import TOY_REWARDS, load_reward, reward_name
from synpic import TOY_MODELS, parse_model
from toy import study
from toy.world import CATEGORIES, check, free_place, grammar

BASE, SHARE, NOISES = TOY / "models/sdxl", 20, study.NOISES


@dataclass
class Config:
    guidance: tuple = option((), "measure the generators of synpic.py at these, and train nothing")
    name: str = option("", "of the setting that is run")
    seed: int = option(0, "training seed", at_least=0)
    options: tuple = option((), "of rankdpo.py, as name=value")
    report: bool = option(False, "print the table of what has been run")
    data: str = option("outputs/synpic", "folder of lists")
    out: str = option("outputs/screen", "where models and logs go")
    results: str = option("outputs/screen.jsonl", "a line for each model")


def training_prompts():
    """(P,) the first SHARE of each category."""
    prompts = (TOY / "prompts.txt").read_text().splitlines()
    return [p for tag in CATEGORIES for p in [p for p in prompts if grammar()[p]["tag"] == tag][:SHARE]]


def tags_of(prompts):
    return [grammar()[p]["tag"] for p in prompts]


# ----------------------------------------------------------------------------- generators


def measure_generators(cfg):
    """Markdown: accuracy and bits of each generator at each guidance, on the first two pictures that it would
    draw for Syn-Pic of every training prompt."""
    prompts, rows = (TOY / "prompts.txt").read_text().splitlines(), []
    for spec in dict.fromkeys(spec.split(",")[0] for spec in TOY_MODELS):
        now = next(parse_model(s) for s in TOY_MODELS if s.startswith(spec))
        pipe = load_pipeline(now["path"])
        for guidance in sorted({*map(float, cfg.guidance), now["guidance"]}):
            jobs = [(p, noise_seed(p, now["name"], seed)) for seed in (0, 1) for p in prompts]
            images = []
            for batch in (jobs[i : i + 64] for i in range(0, len(jobs), 64)):
                images += [i for i, _ in generate_each(pipe, *zip(*batch), dict(now, guidance=guidance))]
            both = [p for p, _ in jobs]
            right = np.array([check(p, image) for p, image in zip(both, images)], float)
            tags = np.array(tags_of(both))
            each = [f"{right[tags == tag].mean():.2f}" for tag in CATEGORIES]
            overall = f"{category_mean(right, tags):.3f}"
            bits = f"{study.colour_bits(images, both):.2f}"
            rows.append([now["name"], f"{guidance:g}", overall, *each, bits])
            print(rows[-1], flush=True)
    print(markdown(["generator", "guidance", "accuracy", *CATEGORIES, "bits"], rows))


# ----------------------------------------------------------------------------- runs


def place_bits(images, prompts):
    """Entropy of where the first object is, of prompts without a relation; 3.17 is even over nine cells."""
    cells = sum(free_place(p, image) for p, image in zip(prompts, images))  # (9,)
    return float(entropy(cells / cells.sum()))


def distances(images, prompts, right):
    """Mean over prompts of 1 - cosine between two pictures by the toy CLIP: of all, and of right ones."""
    scorer = load_reward(f"diversity={TOY}/rewards/clip")
    seen = np.stack([np.asarray(v) for v, _ in scorer.stream(images, prompts)])  # unit vectors
    every, among = [], []
    for of, passed in zip(seen.reshape(len(right), NOISES, -1), right):
        apart = 1 - of @ of.T
        i, j = np.triu_indices(NOISES, 1)
        every.append(apart[i, j].mean())
        if (both := passed[i] & passed[j]).any():
            among.append(apart[i, j][both].mean())
    return float(np.mean(every)), float(np.mean(among))


def measure(path):
    """What a line says of the model in a folder."""
    prompts = training_prompts()
    images = study.draw(load_pipeline(str(path)), [dict(prompt=p, seed=10_000) for p in prompts], 0)
    each = [p for p in prompts for _ in range(NOISES)]
    right = np.reshape([check(p, image) for p, image in zip(each, images)], (-1, NOISES))
    apart, among = distances(images, each, right)
    found = dict(passes="".join(map(str, right.sum(1))), distance=apart, right_distance=among)
    found.update(bits=study.colour_bits(images, each), place_bits=place_bits(images, each))
    scores = {reward_name(spec): load_reward(spec)(images, each).numpy() for spec in TOY_REWARDS}
    return dict(found, scores={n: v.reshape(-1, NOISES).mean(1).round(4).tolist() for n, v in scores.items()})


def append(cfg, line):
    with store.appending(Path(cfg.results).resolve(), busy="") as f:
        f.write((json.dumps(line) + "\n").encode())


def run(cfg):
    """Train with the options, measure each model that the run leaves."""
    out = Path(cfg.out) / f"{cfg.name}-{cfg.seed}"
    if not Path(cfg.results).is_file():
        append(cfg, dict(name="base", seed=0, options="", step=0, cpu_seconds=0, warnings=0, **measure(BASE)))
    how = ["--model", BASE, "--data", cfg.data, "--out", out, "--resume", "false", "--device", "cpu"]
    how += ["--seed", cfg.seed, *(f"--{option}" for option in cfg.options)]
    began, lines, write = time.process_time(), [], rankdpo.tqdm.write
    rankdpo.tqdm.write = lambda text, *more, **options: (lines.append(text), write(text, *more, **options))
    rankdpo.main(list(map(str, how)))
    line = dict(name=cfg.name, seed=cfg.seed, options=" ".join(cfg.options))
    line.update(cpu_seconds=round(time.process_time() - began, 1), warnings=len(lines))
    logged = [row for _, row in tables.read_jsonl(out / "log.jsonl")][1:]
    for row in logged:
        if "exported" in row or row is logged[-1]:
            folder = out / row.get("exported", "model")
            append(cfg, dict(line, step=row["step"] + 1, **measure(folder)))


# ----------------------------------------------------------------------------- report


def report(cfg):
    """Markdown: a row for each model, its gain over the base with the interval over prompts."""
    lines, rows = [line for _, line in tables.read_jsonl(Path(cfg.results), torn_end=True)], []
    share = lambda line: np.array([int(c) for c in line["passes"]]) / NOISES  # (P,)
    tags = tags_of(training_prompts())
    base = next((line for line in lines if line["name"] == "base"), None)
    if base is None:
        fail(f"{cfg.results}: no base; run a setting first")
    for line in lines:
        gain = paired_gain(share(base), share(line), tags, 0)
        each = [f"{share(line)[np.array(tags) == tag].mean():.2f}" for tag in CATEGORIES]
        wins = [(np.array(v) > base["scores"][n]).mean() for n, v in line["scores"].items()]
        cells = [line["name"], line["seed"], line["step"], f"{category_mean(share(line), tags):.3f}"]
        cells += [f"{gain['gain']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})", *each]
        cells += [f"{line[key]:.3f}" for key in ("bits", "distance", "right_distance", "place_bits")]
        rows.append([*map(str, cells), f"{min(wins):.2f}", str(line["warnings"]), str(line["cpu_seconds"])])
    header = ["setting", "seed", "step", "accuracy", "gain (95 %)", *CATEGORIES, "bits", "distance"]
    print(markdown([*header, "of right ones", "place bits", "least win rate", "warnings", "CPU s"], rows))


@common.one_line_errors
def main(argv=None):
    cfg = common.parse(Config, __doc__, argv)
    torch.set_num_threads(1)
    if cfg.guidance:
        return measure_generators(cfg)
    if cfg.report:
        return report(cfg)
    if not cfg.name:
        fail("--name: of the setting that is run, as in --name weight.3")
    run(cfg)


if __name__ == "__main__":
    main()
