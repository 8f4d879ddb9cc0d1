"""The study: what each objective of the three papers buys in the toy world. bash train.sh study

    python toy/study.py                # every run that the results lack; may be killed at any time, and two
                                       # may be at work side by side
    python toy/study.py --only dpo sft # the runs of these rows
    python toy/study.py --report       # results -> the tables of docs/study.md, and docs/study.png

A row is an objective. Its grid is the settings that are tried with one training seed each; the FINALISTS with
the highest accuracy on *training* prompts get SEEDS[0], and the best of these in the mean of its seeds all
SEEDS[1]. A run keeps POINTS models, and each is measured, so a row is a curve of accuracy against diversity;
its own best step is chosen on training prompts, too. Every training seed draws its pictures from noise of its
own, the same for all rows: an interval over seeds covers training and drawing. A run becomes a line of the
results, which are all that the report reads. docs/study.md has the design, written before the first run.
"""

import json
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import stats

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))

import losses
import rankdpo
from evaluate import markdown, plot_frontier
from lib import common, store, tables
from lib.common import fail, option
from lib.pipelines import SUITS, generate_each, load_pipeline, noise_seed
from lib.stats import category_mean, entropy, holm
from rewards import TOY_REWARDS, load_reward, reward_name
from toy.world import CATEGORIES, GROUND, check, find_objects, grammar, prompts_of

BASE, PAGE = TOY / "models/sdxl", TOY.parent / "docs/study.md"
NOISES = 4  # pictures of a prompt
STEPS, LISTS, POINTS = 60, 32, 3  # of a run: steps, lists a step, models along it
SEEDS, FINALISTS = (3, 10), 2  # training seeds: of a setting among the finalists, of a row
RATES = tuple(f"--lr {lr}" for lr in ("1e-4", "2e-4", "4e-4", "8e-4"))
LOW_RATES = ("--lr 2e-5", "--lr 5e-5")  # of Diffusion-DRO, which was at its edge without them
GRID = tuple(f"{lr} --beta {beta}" for beta in (100, 1000) for lr in RATES)
SAME = ("--lr 4e-4 --beta 100",)  # of the rows that differ in their labels alone
GUARD = "--loser_weight .5"  # of the defaults, in every preference row
Row = namedtuple("Row", "options grid seeds labels", defaults=((), SEEDS[1], ()))  # labels: its own rewards
CONFLICT = ("colours", "count", "ink")  # three rewards that disagree by construction
TOGETHER = "--data CONFLICT --loss dpo --label "
ALONE = f"{TOGETHER}single:"
ROWS = {
    "base": Row(""),
    "sft": Row("--loss sft", RATES),
    "dpo": Row(f"--loss dpo {GUARD}", GRID),
    "rankdpo": Row(f"--loss rankdpo {GUARD}", GRID),
    "vote": Row(f"--loss balanced {GUARD}", GRID),
    "vote, refresh 10": Row(f"--loss balanced --ref_refresh 10 {GUARD}", GRID),
    "gain": Row(f"--loss gain {GUARD}", GRID),
    "dro": Row(
        "--loss dro --experts 300 --expert_by hpsv2.1 --ema .9", (*LOW_RATES, *RATES), 3, ("hpsv2.1",)
    ),
    "colours": Row(f"{ALONE}colours {GUARD}", SAME, 3, ("colours",)),
    "count": Row(f"{ALONE}count {GUARD}", SAME, 3, ("count",)),
    "ink": Row(f"{ALONE}ink {GUARD}", SAME, 3, ("ink",)),
    "majority": Row(f"{TOGETHER}majority {GUARD}", SAME, 3, CONFLICT),
    "sum": Row(f"{TOGETHER}sum {GUARD}", SAME, 3, CONFLICT),
    "normalised sum": Row(f"{TOGETHER}normalized_sum {GUARD}", SAME, 3, CONFLICT),
}
CONTRASTS = (  # named in advance: a row, and the row it is compared with
    ("dpo", "sft"),
    ("gain", "dpo"),
    ("rankdpo", "dpo"),
    ("rankdpo", "sft"),
    ("vote", "dpo"),
    ("vote, refresh 10", "vote"),
)


@dataclass
class Config:
    only: tuple = option(tuple(ROWS), "rows", choices=tuple(ROWS))
    report: bool = option(False, "train nothing; write tables and picture of what has been run")
    steps: int = option(STEPS, "optimiser steps of a run", above=0)
    lists: int = option(LISTS, "lists a step", above=0)
    data: str = option("outputs/synpic", "the default Syn-Pic folder; python synpic.py makes it")
    out: str = option("outputs/study", "where runs leave their logs")
    results: str = option("outputs/study.jsonl", "the lines of all runs")


# ----------------------------------------------------------------------------- prompts


def study_prompts(count=8):
    """`count` rows of each category, none of a preference list: first training sentences of the grammar that
    stand in no list, which preference tuning has not seen, then the held-out ones. Where there are fewer, a
    sentence stands in several rows, each with noise of its own."""
    used, rows = set((TOY / "prompts.txt").read_text().splitlines()), []
    unused = [p for split in ("train", "heldout") for p in prompts_of(split, 10**6, seed=3) if p not in used]
    for tag in CATEGORIES:
        options = [p for p in unused if grammar()[p]["tag"] == tag]
        for i in range(count):
            turn, place = divmod(i, len(options))
            rows.append(dict(tag=tag, prompt=options[place], seed=20_000 + 10 * turn))
    return rows


def choice_prompts(count=6):
    """The training prompts by which settings and steps are chosen: the first `count` of each category."""
    prompts, rows = (TOY / "prompts.txt").read_text().splitlines(), []
    for tag in CATEGORIES:
        rows += [p for p in prompts if grammar()[p]["tag"] == tag][:count]
    return [dict(tag=grammar()[p]["tag"], prompt=p, seed=10_000) for p in rows]


# ----------------------------------------------------------------------------- rewards that disagree


def exact_rewards(prompt, image):
    """{name: value}: the share of the named colours that an object has, the number of objects, ink. More
    objects please the first and the last; ink, the share of the page that is not ground, nobody asks for."""
    found, wanted = find_objects(image), grammar()[prompt]["objects"]
    named = [colour for _, colour in wanted if colour]
    colours = sum(c in {o[1] for o in found} for c in named) / max(1, len(named))
    ink = (np.abs(np.asarray(image.convert("RGB")) / 255 - GROUND).max(-1) > 0.25).mean()
    return dict(colours=colours, count=-float(abs(len(found) - len(wanted))), ink=float(ink))


def conflict_lists(cfg):
    """The lists of --data with the scores of the exact rewards alone, in a folder beside the runs."""
    folder = Path(cfg.out) / "conflict"

    def write(tmp):
        shutil.copytree(Path(cfg.data) / "images", tmp / "images")  # readers refuse a link out of a folder
        lines = []
        for _, row in tables.read_jsonl(Path(cfg.data) / "metadata.jsonl"):
            found = [exact_rewards(row["prompt"], Image.open(tmp / name)) for name in row["file_names"]]
            scores = {name: [one[name] for one in found] for name in CONFLICT}
            phi = losses.preference_probability(torch.tensor(list(scores.values())).T).tolist()
            lines.append(json.dumps(dict(row, scores=scores, phi=phi)))
        (tmp / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    with store.lock(Path(cfg.out) / ".conflict.lock", wait=True):  # two may be at work side by side
        if not folder.is_dir():
            store.publish(folder, write)
    return str(folder)


# ----------------------------------------------------------------------------- measurement


def draw(pipe, rows, shift, batch_size=64):
    """The pictures of all rows, NOISES of each, as evaluate.py draws by default; `shift` of their seeds."""
    jobs, images = [(row["prompt"], row["seed"] + shift + n) for row in rows for n in range(NOISES)], []
    for batch in (jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)):
        noise = [noise_seed(prompt, "", seed) for prompt, seed in batch]
        drawn = generate_each(pipe, [prompt for prompt, _ in batch], noise, dict(SUITS["toy"], resolution=0))
        if problem := next((problem for _, problem in drawn if problem), None):
            fail(f"a model of the study draws nothing: {problem}")
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


def scores_of(images, prompts):
    """{reward: (P, NOISES)} by the four toy rewards and the three exact ones."""
    scores = {reward_name(spec): load_reward(spec)(images, prompts).numpy() for spec in TOY_REWARDS}
    exact = [exact_rewards(prompt, image) for prompt, image in zip(prompts, images)]
    scores.update({name: np.array([one[name] for one in exact]) for name in CONFLICT})
    return {name: values.reshape(-1, NOISES).round(4) for name, values in scores.items()}


def measure(pipe, rows, seed, base=None, scored=True):
    """What a line says of a model. `base`: what the base's line of this seed says of the same rows."""
    images = draw(pipe, rows, 100 * seed)
    prompts = [row["prompt"] for row in rows for _ in range(NOISES)]
    passed = np.reshape([check(p, image) for p, image in zip(prompts, images)], (-1, NOISES))
    found = dict(passes="".join(str(n) for n in passed.sum(1)))  # of each row, a digit
    found.update(distance=distance(images, prompts), bits=colour_bits(images, prompts))
    if not scored:
        return found
    scores = scores_of(images, prompts)
    if base is None:
        return dict(found, scores={name: values.tolist() for name, values in scores.items()})
    before = {name: np.array(values) for name, values in base["scores"].items()}
    # of each row a digit: 0 lost, 1 even, 2 won; of the mean of its pictures, of the best of them
    digits = lambda a, b: "".join(str(int(n)) for n in np.sign(a - b) + 1)
    found["wins"] = {n: digits(v.mean(1), before[n].mean(1)) for n, v in scores.items()}
    found["best"] = {n: digits(v.max(1), before[n].max(1)) for n, v in scores.items()}
    found["gain"] = {n: float((v.mean() - before[n].mean()) / before[n].std()) for n, v in scores.items()}
    return found


# ----------------------------------------------------------------------------- runs


def key_of(line):
    return line["row"], line["setting"], line["seed"]


def accuracy(measured, rows):
    values = np.array([int(c) for c in measured["passes"]]) / NOISES  # (P,)
    return float(category_mean(values, [row["tag"] for row in rows]))


def accuracies(lines, name, setting, seeds):
    """{step: accuracy on training prompts, the mean of the seeds}; {} where a run ruined its weights; None
    while a seed lacks."""
    of_setting = {line["seed"]: line for line in lines if key_of(line)[:2] == (name, setting)}
    if not set(range(seeds)) <= of_setting.keys():
        return None
    runs, rows = [of_setting[seed] for seed in range(seeds)], choice_prompts()
    if any("problem" in line for line in runs):
        return {}
    return {n: np.mean([accuracy(line["at"][n]["choice"], rows) for line in runs]) for n in runs[0]["at"]}


def finalists(lines, name):
    """The settings of a row that get more than one seed; none while its grid is not complete."""
    found = {setting: accuracies(lines, name, setting, 1) for setting in ROWS[name].grid}
    if None in found.values():
        return []
    best = {setting: max(values.values()) for setting, values in found.items() if values}
    return sorted(best, key=best.get, reverse=True)[:FINALISTS]


def best_point(lines, name):
    """(setting, step) of a row with the highest accuracy; None while a finalist lacks a seed."""
    found = {setting: accuracies(lines, name, setting, SEEDS[0]) for setting in finalists(lines, name)}
    if None in found.values():
        return None
    points = {(setting, step): value for setting, of in found.items() for step, value in of.items()}
    return max(points, key=points.get, default=None)


def jobs(cfg, lines):
    """[(row, setting, seed)] in the order of the study: all grids, the finalists, then seed after seed."""
    names = [name for name in ROWS if name in cfg.only and name != "base"]
    names.sort(key=lambda name: ROWS[name].seeds < SEEDS[1])  # stable: core rows first
    out = [("base", "", 0)] + [(name, setting, 0) for name in names for setting in ROWS[name].grid]
    for seed in range(1, SEEDS[0]):
        out += [("base", "", seed), *((n, setting, seed) for n in names for setting in finalists(lines, n))]
    chosen = {name: best_point(lines, name) for name in names}
    for seed in range(SEEDS[1]):
        out.append(("base", "", seed))
        out += [(n, point[0], seed) for n, point in chosen.items() if point and seed < ROWS[n].seeds]
    return list(dict.fromkeys(out))


def train(cfg, name, setting, seed, out):
    """One run of rankdpo.py -> what its line says of the training, and {step: folder of the model}."""
    options = f"{ROWS[name].options} {setting}".split()
    options = [conflict_lists(cfg) if o == "CONFLICT" else o for o in options]
    every = cfg.steps // POINTS
    size = ["--steps", cfg.steps, "--global_batch_size", cfg.lists, "--device_batch_size", cfg.lists]
    kept = ["--export_every", every, "--eval_every", every, "--holdout", 0.1, "--schedule", "constant"]
    how = ["--model", BASE, "--data", cfg.data, "--out", out, "--resume", "false", "--device", "cpu"]
    started = time.process_time()
    try:  # in this process: importing torch once more would take a tenth of a run
        rankdpo.main([str(a) for a in (*how, "--seed", seed, *size, *kept, *options)])
    except SystemExit as e:
        if "lower --lr" in str(e.code):  # the trainer's word for weights that it has ruined
            return dict(problem=str(e.code)), {}
        raise
    finally:  # the trainer has its own way to end
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = [row for _, row in tables.read_jsonl(Path(out) / "log.jsonl")]
    largest = log[0]["config"]["max_grad_norm"]
    line = dict(steps=cfg.steps, lists=cfg.lists, cpu_seconds=round(time.process_time() - started, 1))
    line["clipped"] = round(float(np.mean([row["grad_norm"] > largest for row in log[1:]])), 3)
    kept = {row["step"] + 1: row for row in log[1:] if "exported" in row}
    line["held_out"] = {step: row["held_out_best_s"] for step, row in kept.items()}
    return line, {step: Path(out) / row["exported"] for step, row in kept.items()}


def run(cfg, job, base):
    """Train, measure -> a line of the results."""
    name, setting, seed = job
    out = f"{cfg.out}/{'-'.join(map(str, job))}".replace(" ", "_")
    line, models = dict(row=name, setting=setting, seed=seed), {0: BASE}
    if name != "base":
        more, models = train(cfg, name, setting, seed, out)
        line.update(more)
    line["at"] = {}
    for step, path in models.items():
        pipe = load_pipeline(str(path))
        found = dict(study=measure(pipe, study_prompts(), seed, base and base["at"]["0"]["study"]))
        if seed < SEEDS[0]:
            found["choice"] = measure(pipe, choice_prompts(), seed, scored=False)
        line["at"][str(step)] = found
    store.remove(out)
    return dict(line, commit=common.provenance(torch.device("cpu"))["commit"])


def read_results(cfg):
    path, lines = Path(cfg.results), []
    for n, line in tables.read_jsonl(path, torn_end=True) if path.is_file() else ():
        if line.get("steps", cfg.steps) != cfg.steps or line.get("lists", cfg.lists) != cfg.lists:
            fail(f"{path}, line {n}: a run of other --steps or --lists; name another file with --results")
        lines.append(line)
    return lines


def run_all(cfg):
    """Job after job that no line tells of and no other process is at."""
    if not (Path(cfg.data) / "metadata.jsonl").is_file():
        fail(f"--data {cfg.data}: no metadata.jsonl there; python synpic.py makes it")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    taken = set()
    while True:
        lines = read_results(cfg)
        done = {key_of(line): line for line in lines}
        base = lambda job: done.get(("base", "", job[2]))
        todo = [job for job in jobs(cfg, lines) if job not in {*done, *taken}]
        todo = [job for job in todo if job[0] == "base" or base(job)]
        if not todo:
            return
        job = todo[0]
        with ExitStack() as stack:
            try:
                name = "-".join(map(str, job)).replace(" ", "_")
                stack.enter_context(store.lock(Path(cfg.out) / f".{name}.lock", "another process is at it"))
            except SystemExit:
                taken.add(job)
                continue
            text = json.dumps(run(cfg, job, None if job[0] == "base" else base(job))) + "\n"
            with store.appending(Path(cfg.results).resolve(), busy="") as f:
                f.write(text.encode())


# ----------------------------------------------------------------------------- report


def study_accuracy(found):
    return accuracy(found, study_prompts())


def at_point(runs, step, value):
    """{seed: value(what a run's line says of its model of that step)}."""
    return {line["seed"]: value(line["at"][step]["study"]) for line in runs}


def mean_interval(values):
    """Mean over seeds and 95 % by Student's t; a single seed has no interval."""
    values = np.array(list(values))
    if len(values) < 2:
        return float(values.mean()), np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def show(found, sign=""):
    mean, low, high = found
    return f"{mean:{sign}.3f}" + ("" if np.isnan(low) else f" ({low:{sign}.3f} to {high:{sign}.3f})")


def trained(runs, step, labels):
    """The gate: by the rewards that labelled its lists a row's pictures are better than the base's."""
    gains = [np.mean([line["at"][step]["study"]["gain"][name] for name in labels]) for line in runs]
    return float(np.mean(gains)) > 0


def win(text):
    """Share of rows won, an even one half: "012" -> .5."""
    return np.mean([int(c) for c in text]) / 2


def chosen_runs(lines):
    """{row: (setting, step, its runs by seed)} at each row's own best point; the base at 0."""
    out = {}
    for name in ROWS:
        point = ("", "0") if name == "base" else best_point(lines, name)
        if point:
            runs = [line for line in lines if key_of(line)[:2] == (name, point[0]) and "problem" not in line]
            out[name] = (*point, sorted(runs, key=lambda line: line["seed"]))
    return {name: found for name, found in out.items() if found[2]}


def main_table(chosen):
    """Markdown: a row at its own best point, with intervals over seeds, and what it costs in diversity."""
    rows, tags = [], [row["tag"] for row in study_prompts()]
    base = at_point(chosen["base"][2], "0", study_accuracy)
    for name, (setting, step, runs) in chosen.items():
        values = at_point(runs, step, study_accuracy)
        gain = [values[seed] - base[seed] for seed in values if seed in base]
        mean = lambda value: np.mean(list(at_point(runs, step, value).values()))
        cells = [str(len(runs)), setting.replace("--", ""), step, show(mean_interval(values.values()))]
        cells.append(show(mean_interval(gain), "+") if name != "base" else "")
        for tag in CATEGORIES:
            passes = lambda found: np.mean([int(c) for c, t in zip(found["passes"], tags) if t == tag])
            cells.append(f"{mean(passes) / NOISES:.2f}")
        cells += [f"{mean(lambda found: found['distance']):.3f}", f"{mean(lambda found: found['bits']):.2f}"]
        more = ["", "", ""]
        if name != "base":
            drift = np.mean([line["held_out"][step] for line in runs])
            labels = ROWS[name].labels or [reward_name(spec) for spec in TOY_REWARDS]
            gate = "" if trained(runs, step, labels) else "did not train"
            more = [f"{drift:+.4f}", f"{np.mean([line['clipped'] for line in runs]):.0%}", gate]
        rows.append([name, *cells, *more])
    header = ["row", "seeds", "setting", "step", "accuracy (95 %)", "gain on the base", *CATEGORIES]
    return markdown([*header, "distance", "bits", "winner's s", "clipped", "gate"], rows)


def contrast_table(chosen):
    """Markdown: the contrasts named in advance, paired over training seeds, p by t and after Holm."""
    rows, p = [], []
    for a, b in CONTRASTS:
        if not {a, b} <= chosen.keys():
            continue
        one, other = (at_point(chosen[name][2], chosen[name][1], study_accuracy) for name in (a, b))
        difference = np.array([one[seed] - other[seed] for seed in one if seed in other])
        if len(difference) > 1:
            rows.append([f"{a} - {b}", str(len(difference)), show(mean_interval(difference), "+")])
            p.append(float(stats.ttest_1samp(difference, 0).pvalue))
    rows = [[*row, f"{one:.2g}", f"{all_of:.2g}"] for row, one, all_of in zip(rows, p, holm(p))]
    header = ["contrast", "seeds", "difference in accuracy (95 %)", "p", "p, Holm"]
    return markdown(header, rows) if rows else ""


def reward_table(chosen, names, key):
    """Markdown: win rate over the base by each reward: of the mean of a prompt's pictures, or of the best."""
    rows = []
    for name, (_, step, runs) in chosen.items():
        if name != "base":
            wins = [list(at_point(runs, step, lambda found: win(found[key][n])).values()) for n in names]
            rows.append([name, *(f"{np.mean(values):.0%}" for values in wins)])
    return markdown([{"wins": "mean of four", "best": "best of four"}[key], *names], rows)


def draw_frontier(chosen, path):
    """docs/study.png: accuracy against diversity, a line for each row through the models of its setting."""
    panels = {"distance": {}, "bits": {}}
    for key, runs_of in panels.items():
        for name, (_, _, runs) in chosen.items():
            points = []
            for step in runs[0]["at"]:
                mean = lambda value: np.mean(list(at_point(runs, step, value).values()))
                points.append(dict(x=mean(lambda found: found[key]), y=mean(study_accuracy)))
            points[-1]["label"] = f"{name} ({len(runs)} seeds)"
            runs_of[name] = points
    titles = {"CLIP distance among seeds": panels["distance"], "bits of free colours": panels["bits"]}
    plot_frontier(path, titles, "accuracy, exact checker")


MARK = "<!-- what follows is written by `python toy/study.py --report` -->"


def report(cfg):
    """The tables below the mark in docs/study.md, and the picture."""
    lines = read_results(cfg)
    if not any(line["row"] == "base" for line in lines):
        fail(f"{cfg.results}: no runs yet")
    chosen = chosen_runs(lines)
    conflict = {name: found for name, found in chosen.items() if set(ROWS[name].labels) & set(CONFLICT)}
    core = {name: found for name, found in chosen.items() if name not in conflict}
    text = main_table(chosen) + contrast_table(chosen)
    for rows, names in ((core, [reward_name(spec) for spec in TOY_REWARDS]), (conflict, CONFLICT)):
        text += "".join(reward_table(rows, names, key) for key in ("wins", "best") if rows)
    missing = [name for name in ROWS if name not in chosen]
    text += f"Not run: {', '.join(missing)}.\n" if missing else ""
    draw_frontier(core, PAGE.with_suffix(".png"))
    head = (PAGE.read_text() if PAGE.is_file() else "").partition(MARK)[0]
    store.write_text(PAGE, f"{head}{MARK}\n\n{text.rstrip()}\n")
    print(text)


# ----------------------------------------------------------------------------- main


@common.one_line_errors
def main(argv=None):
    cfg = common.parse(Config, __doc__, argv)
    torch.set_num_threads(1)
    if cfg.report:
        return report(cfg)
    run_all(cfg)


if __name__ == "__main__":
    main()
