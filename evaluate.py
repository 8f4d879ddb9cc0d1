"""Compare models on held-out prompts: pictures on disk, scores of each, then statistics with intervals.

    python evaluate.py                                 # the toy world: the base against outputs/rankdpo/model
    python evaluate.py --models base=toy/models/sdxl rank=runs/a/model dpo=runs/b/model --seeds 8
    python evaluate.py --models sdxl=stabilityai/stable-diffusion-xl-base-1.0 mine=out/model other=pictures \\
        --prompts parti.tsv --rewards pickscore hpsv2.1 clip --steps 30 --guidance 5 --resolution 1024
    torchrun --standalone --nproc_per_node 8 evaluate.py ...      # or --shard 3/16, then --stages report
    python evaluate.py ... --bench geneval --prompts evaluation_metadata.jsonl     # see docs/evaluation.md
    python evaluate.py ... --stages report --study 50             # a blind study of 50 pairs in OUT/study
    python evaluate.py --study_answers answers-*.json             # what the people said

Prompts are a file of any kind that synpic.py reads; a column `tag`, as GenEval has it, makes categories. With
--bench they are that benchmark's own files, and pictures lie where its official scorer looks for them.

    draw     OUT/NAME/00000/samples/0000.png ...     all models start from the noise of prompt and seed
    score    OUT/NAME/scores/REWARD.jsonl            python rewards.py --score OUT/NAME, run elsewhere, counts
    report   report.html, report.md, results.json, grid.png

A folder of pictures (metadata.jsonl with prompt and file_names, or the layout above) may stand for a model.

docs/evaluation.md defines gain, win rate, diversity, their intervals and p values.
"""

import base64
import hashlib
import html
import io
import json
import os
import re
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from lib import common
from lib.common import HERE, about, fail, fill_in, option, parse

STAGES = ("draw", "score", "report")
OURS = "report.html report.md results.json grid.png frontier.png study study.json key.json".split()


@dataclass
class Config:
    # what is compared
    models: tuple = option(
        (f"base={HERE}/toy/models/sdxl", "rankdpo=outputs/rankdpo/model"),
        "two or more, as name=pipeline[,steps=4][,guidance=0][,resolution=64x32] or name=folder_of_pictures; "
        "the first is the baseline of the tables; names like rankdpo@200 are steps of one run",
    )
    prompts: str = option(f"{HERE}/toy/heldout.jsonl", "held-out prompts, in any file that synpic.py reads")
    field: str = option("", "its column of prompts (default: prompt, prompts, caption or text)")
    tag: str = option("", "its column of categories (default: tag or category)")
    keep: str = option("", "a file of prompts: the others of --prompts are left out")
    bench: str = option("", "whose --prompts are: geneval, t2i-compbench, dpg, parti, hpdv2 or pickapic")
    bench_models: tuple = option((), "what judges it, as role=source: detector=DIR colours=DIR vqa=NAME ...")
    limit: int = option(0, "use the first that many prompts; 0 = all", at_least=0)
    rewards: tuple = option(None, "scorers, name or name=source (default: toyworld's, or --bench's metric)")
    seeds: int = option(4, "images a prompt and model", at_least=1)
    # how they draw
    steps: int = option(None, "sampling steps (default: what suits the first model)", at_least=1)
    guidance: float = option(None, "guidance scale (default: the same)", at_least=0)
    resolution: str = option("0", "side in pixels, or WIDTHxHEIGHT; 0 = the pipeline's own")
    seed: int = option(1234, "first seed of the starting noise, and of the bootstrap", at_least=0)
    precision: str = option("auto", "auto is bf16 on a GPU", ("auto", "fp32", "bf16", "fp16"))
    # how it is run
    out: str = option("outputs/evaluation", "folder to write")
    stages: tuple = option(STAGES, "which stages to run", STAGES)
    on_error: str = option("stop", "at a prompt that a model cannot draw or score", ("stop", "skip"))
    shard: str = option("0/1", "i/n: draw and score only part i of n; report when all are done")
    batch_size: int = option(64, "images a batch", at_least=1)
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")
    # people
    study: int = option(0, "a blind study in OUT/study: pairs of each model and the first", at_least=0)
    study_answers: tuple = option((), "files that people sent back: who wins, and how far people agree")


if __name__ == "__main__":  # --help and mistyped options end here, before imports that take seconds
    parse(Config, __doc__)

import numpy as np
import torch.distributed as dist
from PIL import Image

from lib import benchmarks, draw, store
from lib.formats import split_spec
from lib.lists import read_metadata
from lib.pictures import picture_grid, read_image
from lib.pipelines import check_pipeline, family_of, load_pipeline
from lib.stats import METRICS, by_prompt, category_mean, compare, distinct, paired_gain, typical, win_rate
from lib.store import publish, whole_lines, write_text
from lib.tables import parse_json, read_prompts, read_text
from rewards import TOY_REWARDS, check_rewards, load_reward, read_scores, reward_name, score_rows
from toy.diversity import free_choices
from toy.world import COLORS, grammar

# of one model: what draws them, "" for a folder from elsewhere; (P,) of (prompt, files); its sampling options
Pictures = namedtuple("Pictures", "path folder rows own")


# ----------------------------------------------------------------------------- report


def headline(scores, results, tags, seed, prompts=None):
    """What a reader wants first: dict(what, points), a point a model: its value, its gain over the
    first model with the interval, and its diversity with the change where that is measured.

    The value is accuracy where that is measured; else the mean over prompts of the share of rewards (each by
    the mean over seeds) that prefer the model's pictures: equal scores count half, so the first has .5."""
    base, points = next(iter(results)), []
    there = results[base]["means"]
    metric = next((name for name in METRICS if name in there), None)
    rewards = [name for name in there if name != "diversity"] or list(there)
    places, found = distinct(list(zip(tags, range(len(tags)) if prompts is None else prompts)))
    tags = [tag for tag, _ in found]
    for name, result in results.items():
        against, means = result["against"].get(base, {}), result["means"]
        if metric:
            value, gain = means[metric], against.get(metric, {}).get("gain")
        else:
            won = [np.sign(scores[name][r].mean(1) - scores[base][r].mean(1)) for r in rewards]
            won = by_prompt((np.mean(won, axis=0)[:, None] + 1) / 2, places)[0]  # (P',)
            value = float(category_mean(won, tags))
            gain = paired_gain(np.full(len(tags), 0.5), won, tags, seed) if against else None
        point = dict(model=name, value=value, gain=gain, diversity=means.get("diversity"))
        points.append(point | dict(change=against.get("diversity", {}).get("gain")))
    what = "accuracy" if metric else f"preferred by {len(rewards)} reward{'s' * (len(rewards) > 1)}"
    return dict(what=what, points=points)


def plain(text):
    """Text of anybody's as markdown that shows it as it is, on one line."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()))
    return html.escape(text, quote=False)


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(plain, line))} |\n" for line in lines) + "\n"


def write_page(path, template, data):
    """A page of lib/templates and its data, in which a prompt may say </script>."""
    text = json.dumps(data).replace("<", "\\u003c")
    write_text(path, read_text(HERE / "lib/templates" / template).replace("<!-- DATA -->", text))


def interval_text(g, digits=3):
    return f"{g['gain']:+.{digits}f} ({g['low']:+.{digits}f} to {g['high']:+.{digits}f})"


def p_text(test):
    return "< 0.001" if test["p_holm"] < 0.001 else f"{test['p_holm']:.3f}"


def win_text(w):
    rate = f"{w['rate']:.0%} ({w['low']:.0%} to {w['high']:.0%})"
    return f"{rate}; {w['wins']} : {w['ties']} : {w['losses']}; {p_text(w)}"


def gain_cells(result, base, metric):
    """[gain with its interval, p] over the model `base`; empty in that model's own row."""
    gain = result["against"].get(base, {}).get(metric, {}).get("gain")
    return [interval_text(gain), p_text(gain)] if gain else ["", ""]


def diversity_table(results, free, trained):
    """What the gain was paid with; it stands right below the accuracy."""
    base, rows, colours, places, right = next(iter(results)), [], *free.values()
    drift = {name: of["drift"] for name, of in trained.items() if "drift" in of}
    header = ["diversity: what a prompt leaves free", "CLIP distance among seeds", "change (95 %)", "p"]
    header += ["winner's error minus the base's, held-out lists"] * bool(drift)
    header += ["distance among right pictures (prompts)", "change (95 %)"] * bool(right)
    header += ["bits of the first object's place (of 3.17)", "change (95 %)"] * bool(places)
    if colours:
        header += [f"bits of free colours (of {np.log2(len(COLORS)):.2f})", "change (95 %)", *COLORS]
    for name, result in results.items():
        mean = result["means"].get("diversity")
        cells = ["" if mean is None else f"{mean:.3f}", *gain_cells(result, base, "diversity")]
        if drift:
            cells.append(f"{drift[name]:+.4f}" if name in drift else "")
        if own := right.get(name):
            cells += [
                f"{own['mean']:.3f} ({own['n']})",
                interval_text(own["change"]) if own["change"] else "",
            ]
        if own := places.get(name):
            cells += [f"{own['bits']:.2f}", "" if name == base else interval_text(own["change"], 2)]
        if own := colours.get(name):
            change = "" if name == base else interval_text(own["change"], 2)
            cells += [f"{own['bits']:.2f}", change, *(f"{own['share'][c]:.0%}" for c in COLORS)]
        rows.append([name, *cells])
    return header, rows


def tables_of(results, free, seeds, trained):
    """[(header, rows)]: accuracy, diversity, means, every pair as in BalancedDPO's table, spread."""
    base, tables, keys = next(iter(results)), [], ("mean", "min", "max", "std")
    rewards = list(results[base]["means"])
    for metric, title in (("toyworld", "accuracy, exact checker"), ("geneval", "accuracy, GenEval")):
        if metric in rewards:
            rows = []
            for name, result in results.items():
                cells = [result["means"][metric], *result["categories"][metric].values()]
                rows.append([name, *(f"{value:.3f}" for value in cells), *gain_cells(result, base, metric)])
            tags = results[base]["categories"][metric]
            tables.append(([title, "overall", *tags, "gain (95 %)", "p"], rows))
    if "diversity" in rewards or free["colours"] or trained:
        tables.append(diversity_table(results, free, trained))
    names = [reward for reward in rewards if reward not in ("toyworld", "diversity")]
    if names:
        rows = [[model, *(f"{result['means'][r]:.3f}" for r in names)] for model, result in results.items()]
        tables.append((["mean reward over categories", *names], rows))
    header = ["gain (95 %)", "p", "n", f"best of {seeds} wins (95 %); win : tie : loss; p"]
    header.append("mean of seeds wins; the same")
    spreads = []
    for name, result in results.items():
        for other, pair in result["against"].items():
            rows = []
            for reward, tests in pair.items():
                wins = [win_text(tests[kind]) if kind in tests else "" for kind in ("best", "mean")]
                rows.append([reward, *gain_cells(result, other, reward), str(tests["gain"]["n"]), *wins])
            tables.append(([f"{name} over {other}", *header], rows))
        for reward, spread in result["spread"].items():
            spreads.append([f"{name}, {reward}", *(f"{spread[key]:.4f}" for key in keys)])
    return [*tables, (["over all images", *keys], spreads)]


def thumbnail(path, side=160):
    """A picture as a data URI: WebP, at most `side` pixels; a tiny one keeps every pixel."""
    image, file = read_image(path), io.BytesIO()
    small = max(image.size) <= 64
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(file, "WEBP", lossless=small, quality=60)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def rounded(values, digits=6):
    """For JSON: nested lists, null where there is no number."""
    values = np.asarray(values, float).round(digits)
    return np.where(np.isnan(values), None, values).tolist()


def page_rows(found, seeds, budget=1000):
    """What the page shows of each prompt; about `budget` pictures in all, from the first seeds."""
    models, rows = found.models.values(), []
    shown = int(np.clip(budget // (len(found.tags) * len(models)), 1, seeds))
    for i, tag in enumerate(found.tags):
        row, scores = dict(prompt=found.rows[i]["prompt"], tag=tag), list(found.scores.values())
        row["scores"] = [[rounded(s[i].mean(), 4) for s in of.values()] for of in scores]
        if all("toyworld" in of for of in scores):
            row["passed"] = [of["toyworld"][i].astype(int).tolist() for of in scores]
        row["pictures"] = [[thumbnail(f"{m.folder}/{f}") for f in m.rows[i][1][:shown]] for m in models]
        rows.append(row)
    return rows


def draw_grid(path, found):
    """grid.png: two prompts of each category, at most twelve in all; up to four pictures of each model. Where
    accuracy is measured, their change from the first to the last model is typical of the category."""
    rows, of_models = [], list(found.scores.values())
    metric = next((name for name in METRICS if name in of_models[0]), None)
    passed = [of[metric] if metric else np.zeros((len(found.tags), 0)) for of in of_models]  # each (P, S)
    for i in typical(passed[-1].sum(1) - passed[0].sum(1), found.tags)[:12]:
        cells, counts = [], []
        for (name, pictures), right in zip(found.models.items(), passed):
            marks = (right[i] == 1).tolist() or [False] * len(pictures.rows[i][1])
            counts.append(f"{name} {sum(marks)} of {len(marks)}")
            for mark, file in list(zip(marks, pictures.rows[i][1]))[:4]:
                cells.append((read_image(f"{pictures.folder}/{file}"), name, mark))
        rows.append((found.rows[i]["prompt"] + f" ({', '.join(counts)} right)" * bool(metric), cells))
    picture_grid(rows, path, side=96)


# ----------------------------------------------------------------------------- stages


def named_paths(specs):
    """{name: (path, own sampling options)} of --models, at least two."""
    models = {}
    for spec in specs:
        head, *options = draw.split_options(spec)
        name, _, path = head.partition("=")
        if not path or not re.fullmatch(r"[^\W_][\w.@-]*", name):
            fail(f"--models {head}: name=path is wanted; a name is made of letters, digits, -, ., _ and @")
        if name.lower() in map(str.lower, OURS):
            fail(f"--models {head}: {name} is a file of the report")
        if name.lower() in map(str.lower, models):  # folders may not tell case apart
            fail(f"--models {head}: {name} is given twice; different names are wanted")
        local = path.startswith(("outputs/", ".", "/"))
        if local and not all(map(os.path.exists, split_spec(path))):  # base+adapters
            fail(f"--models {head}: no such folder; train it with rankdpo.py first")
        own = draw.read_options(spec, options)
        if "seed" in own:
            fail(f"--models {spec}: all models start from the same noise; --seed chooses it")
        models[name] = path, own
    if len(models) < 2:
        fail("--models: two or more are needed, each as name=path")
    return models


def pictures_of(cfg, name, path, own, rows):
    """A model's pictures, to be drawn into OUT/NAME, or those of a folder from elsewhere where they lie."""
    layout, here = benchmarks.picture_files(cfg.bench or "geneval", rows, cfg.seeds), Path(path)
    drawn = [(row["prompt"], files) for row, files in zip(rows, layout)]
    described = (here / "metadata.jsonl").is_file()
    found, missed = benchmarks.pictures_from_elsewhere(cfg.bench, here, rows, cfg.seeds)
    if (here / "model_index.json").is_file() or not (described or found):
        if here.is_dir() and not any(here.rglob("*.json")) and not any(here.rglob("*.safetensors")):
            fail(f"--models {name}={path}: no pipeline, and no pictures: {missed} is wanted there")
        check_pipeline(path)
        return Pictures(path, f"{cfg.out}/{name}", drawn, own)
    if own:
        fail(f"--models {name}={path}: these pictures are drawn already; no {', '.join(own)}")
    drawn, there = [(row["prompt"], files) for row, files in zip(rows, found or layout)], {}
    for row in read_metadata(path) if described else ():
        there.setdefault(" ".join(row["prompt"].split()), []).append(row)
    for i, (prompt, files) in enumerate(drawn):
        if same := there.get(" ".join(prompt.split())):
            row = same.pop(0) if len(same) > 1 else same[0]  # a benchmark may ask the same thing twice
            kept = row["file_names"][: cfg.seeds]  # what is lacking is missed, and named, below
            drawn[i] = (row["prompt"], kept + files[len(kept) :])
        elif not described and (wrong := benchmarks.of_another_prompt(here, files[0], prompt)):
            fail(f"--models {name}={path}: {wrong}")
    for _, files in drawn:
        for file in files:
            with about(f"--models {name}={path}"):
                store.path_inside(here, file)
    return Pictures("", path, drawn, {})


def check_choices(cfg, prompts):
    """What can be wrong is found now, not after hours of drawing."""
    check_rewards(cfg.rewards)
    if "toyworld" in map(reward_name, cfg.rewards):
        if unknown := [prompt for prompt in prompts if prompt not in grammar()]:
            sentence = f"{unknown[0]!r} in {cfg.prompts}"
            fail(f"--rewards toyworld judges sentences of the toy world only, not {sentence}")
    if cfg.bench and not cfg.rewards and cfg.bench not in benchmarks.JUDGED:
        wanted = "name --rewards hpsv2.1 clip pickscore aesthetic"
        fail(f"--bench {cfg.bench}: has no metric of its own; {wanted}")
    draw.read_resolution("--resolution", cfg.resolution)
    if cfg.study > (count := len(set(prompts))):
        fail(f"--study {cfg.study}: there are {count} prompts; each pair of models takes one once")


def with_diversity(cfg):
    """The rewards, and diversity by the same weights wherever clip is one of them."""
    names = [reward_name(spec) for spec in cfg.rewards]
    if cfg.seeds < 2 or "clip" not in names or "diversity" in names:
        return cfg.rewards
    return (*cfg.rewards, "diversity" + cfg.rewards[names.index("clip")].removeprefix("clip"))


def suited(cfg, models):
    """The options with what suits the first model that lacks them, one without options of its own if there is
    any. Models without options of their own are drawn alike."""
    lacking = [m for m in models.values() if m.path and not {"steps", "guidance"} <= m.own.keys()]
    if not lacking or None not in (cfg.steps, cfg.guidance):
        return cfg
    drawn = min(lacking, key=lambda pictures: bool(pictures.own))
    if models := store.read_recipe(drawn.folder).get("models"):  # it was begun: no need to load a model
        began = next(iter(models.values()))
        return fill_in(cfg, {key: began[key] for key in ("steps", "guidance")}, "sampling, as before")
    pipe = load_pipeline(drawn.path, denoiser=False)  # its size says enough
    return fill_in(cfg, family_of(pipe).suits(pipe), "sampling")


def drawings(cfg, models):
    """[(options, recipe, one model for each seed, pictures)] for draw.py's stage of all models that are to be
    drawn. What lies there must have been drawn like that, also where it is only reported."""
    plans, size = [], draw.read_resolution("--resolution", cfg.resolution)
    for name, pictures in models.items():
        if pictures.path:
            folder = store.writable_folder("out", pictures.folder)
            how = dict(steps=cfg.steps, guidance=cfg.guidance, resolution=size, dtype="bf16", noise="")
            how.update(name=name, path=pictures.path, **pictures.own)
            seeds = [dict(how, seed=cfg.seed + s) for s in range(cfg.seeds)]
            drawing = replace(cfg, out=str(folder))
            recipe = draw.recipe_of(drawing, pictures.rows, seeds[:1])  # more seeds may follow
            draw.check_recipe(folder, recipe, drawing="draw" in cfg.stages)
            plans.append((drawing, recipe, seeds, pictures))
    return plans


def draw_stage(plans, mine, device):
    """The missing pictures of every model, by draw.py's stage: there, a seed is another model. The place of a
    repeated prompt among the repeats gives it a noise of its own."""
    todo = []
    for drawing, _, seeds, pictures in plans:
        count, rows = Counter(), []
        for prompt, files in pictures.rows:
            rows.append((prompt, files, count[prompt]) if count[prompt] else (prompt, files))
            count[prompt] += 1
        todo.append(draw.to_draw(drawing, [[rows[i] for i in batch] for batch in mine], seeds))
    with draw.progress("draw", sum(todo, [])) as bar:
        for (drawing, recipe, _, pictures), of_model in zip(plans, todo):
            draw.generate_stage(drawing, of_model, device, recipe, bar)
            rows = [json.dumps(dict(prompt=p, file_names=f)) + "\n" for p, f in pictures.rows]
            write = lambda tmp: tmp.write_text("".join(rows), encoding="utf-8")
            publish(f"{drawing.out}/metadata.jsonl", write, unique=True)


def score_stage(cfg, models, mine, device, part):
    """Every reward is loaded once and scores what is not scored yet of every model."""
    for spec in with_diversity(cfg):
        load = lru_cache(1)(load_reward)  # the last one is let go before the next is loaded
        for name, pictures in models.items():
            rows = [pictures.rows[i] for batch in mine for i in batch]
            score_rows(pictures.folder, spec, rows, device, cfg.batch_size, cfg.on_error, part, load)


def missing_pictures(models, indices):
    """{prompt index: what is wrong with its pictures}, of all models."""
    problems = {}
    for name, pictures in models.items():
        for i, file in ((i, f"{pictures.folder}/{file}") for i in indices for file in pictures.rows[i][1]):
            try:
                if not draw.is_png(file):  # no PNG of ours
                    read_image(file)
            except ValueError:
                problems.setdefault(i, f"{name}: {file} is missing or torn ({pictures.rows[i][0]!r})")
    return problems


def stop_or_skip(cfg, problems, count):
    """One line for what cannot be compared: the end, or a prompt less for every model."""
    if problems:
        first = problems[min(problems)]
        message = f"{len(problems)} of {count} prompts cannot be compared, the first: {first}"
        if cfg.on_error == "stop" or len(problems) == count:
            fail(f"{message}. Draw and score it, or leave such prompts out with --on_error skip")
        if common.process_rank()[0] == 0:
            print(f"{message}; they are left out for all models")


def stored(cfg, models):
    """Scores from disk: ({model: {reward: (P, S)}} of the prompts of which nothing is missing, their indices,
    {index: what is missing} of the others)."""
    every, found = range(len(next(iter(models.values())).rows)), {name: {} for name in models}
    problems = missing_pictures(models, every)
    for name, pictures in models.items():
        for spec in with_diversity(cfg):
            reward, known = reward_name(spec), read_scores(pictures.folder, spec, pictures.rows)
            found[name][reward] = known
            for i in set(every) - known.keys():
                where = f"{pictures.folder}/scores/{reward}.jsonl"
                problems.setdefault(i, f"{name}: no scores of {pictures.rows[i][0]!r} in {where}")
    stop_or_skip(cfg, problems, len(every))
    complete = [i for i in every if i not in problems]
    of_complete = lambda known: np.array([known[i] for i in complete])
    scores = {name: {r: of_complete(known) for r, known in of.items()} for name, of in found.items()}
    return scores, complete, problems


def bench_stage(cfg, models, rows, device):
    """({model: {metric: (P, S)}}, notes) by the benchmark's judge, whose answers are kept on disk. Every
    process of torchrun calls this and gives its part."""
    sources, metrics, notes = dict(spec.partition("=")[::2] for spec in cfg.bench_models), {}, {}
    for name, pictures in models.items() if cfg.bench else ():
        files, how = [files for _, files in pictures.rows], (device, cfg.batch_size, sources)
        metrics[name], more = benchmarks.measure(cfg.bench, pictures.folder, rows, files, *how)
        notes.update(dict.fromkeys(more))  # each is said once
        if pictures.path and common.process_rank()[0] == 0:  # drawn here
            benchmarks.write_layout(cfg.bench, pictures.folder, rows, files)
    return metrics, list(notes)


# a comparison in numbers, of the P prompts of which nothing is missing: (P,) rows of the prompt file, (P,)
# categories, {model: {reward or metric: (P, S)}}, compare() and headline() of them, {model: training()},
# free_choices(), {prompt: what is missing}, what the benchmark's judge differs in
Found = namedtuple("Found", "models rows tags scores results first trained free left_out notes")


def compute(cfg, models, every, tags, of_bench):
    """Everything that the report says, as numbers; `every` row of the prompt file, (P,) categories."""
    (metrics, notes), (scores, complete, problems) = of_bench, stored(cfg, models)
    for name in metrics:
        scores[name].update({metric: values[complete] for metric, values in metrics[name].items()})
    models = {name: p._replace(rows=[p.rows[i] for i in complete]) for name, p in models.items()}
    rows, tags = [every[i] for i in complete], [tags[i] for i in complete]
    free, specs = dict(colours={}, places={}, right={}), {reward_name(s): s for s in with_diversity(cfg)}
    if "toyworld" in specs:
        scorer = load_reward(specs["diversity"]) if "diversity" in specs else None
        free = free_choices(models, scores, scorer, cfg.seed)
    prompts = [row["prompt"] for row in rows]
    results = compare(scores, tags, cfg.seed, prompts)
    first = headline(scores, results, tags, cfg.seed, prompts)
    trained = {name: found for name, p in models.items() if (found := training(p.path))}
    left_out = {every[i]["prompt"]: what for i, what in sorted(problems.items())}
    return Found(models, rows, tags, scores, results, first, trained, free, left_out, notes)


def training(path):
    """What the log beside a model of rankdpo.py says of it: `drift`, the winner's error minus the base's on
    held-out lists at that step; `Images`, how many it was tuned on; `GPU days`. {} without a log."""
    folder, found = Path(split_spec(path)[-1] if path else "/"), {}
    step = folder.name.removeprefix("model-")
    last = int(step) if step.isdecimal() else float("inf")
    try:
        head, *rows = [parse_json(line.decode()) for line in whole_lines(folder.parent / "log.jsonl")]
        rows = [row for row in rows if row["step"] < last]
        for row in rows:
            if row.get("held_out_best_s") is not None:
                found["drift"] = float(row["held_out_best_s"])
        if not head["device"].startswith("cpu"):
            lists = (rows[-1]["step"] + 1) * head["config"]["global_batch_size"]
            found["GPU days"] = lists / rows[-1]["lists_per_s"] * head["world"] / 86400
        summary = Path(head["config"]["data"]) / "summary.json"
        found.update({"Images": parse_json(read_text(summary))["images"]} if summary.is_file() else {})
    except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError):
        pass  # no log, or another program's: what was found until here counts
    return found


def sampling_of(cfg, pictures):
    """How a model draws, as text; "" for pictures from elsewhere."""
    if not pictures.path:
        return ""
    how = dict(steps=cfg.steps, guidance=cfg.guidance, resolution=cfg.resolution) | pictures.own
    size = f", {how['resolution']} pixels" * (str(how["resolution"]) != "0")
    return f"{how['steps']} steps, guidance {how['guidance']:g}{size}"


def phrase(cfg, found, device):
    """The report in words: lines, a sentence a model, what was gained and what it was paid with; setting;
    note; tables."""
    where, lines, what = common.provenance(device), [], found.first["what"]
    for point in found.first["points"]:
        line = f"{point['model']}: {what} {point['value']:.3f}"
        line += f", gain {interval_text(point['gain'])}" if point["gain"] else ""
        line += "" if point["diversity"] is None else f"; diversity {point['diversity']:.3f}"
        lines.append(line + (f", change {interval_text(point['change'])}" if point["change"] else ""))
    each = {name: sampling_of(cfg, pictures) for name, pictures in found.models.items()}
    sampling = next(iter(each.values()))
    if len(set(each.values())) > 1:
        sampling = ", ".join(f"{name}: {how or 'drawn elsewhere'}" for name, how in each.items())
    setting = f"{len(found.rows)} held-out prompts of {Path(cfg.prompts).name} x {cfg.seeds} seeds"
    setting += f"; {sampling}" * bool(sampling) + f"; {where['device']}; commit {where['commit']}"
    if found.left_out:
        first = next(iter(found.left_out.values()))
        setting += f". {len(found.left_out)} prompts are left out for all models: {first}, ..."
    note = "p values: Wilcoxon's signed-rank test of gains, sign test of wins; Holm's correction covers all "
    note += "gains of this report, all wins of the best seed, all wins of the mean"
    tables = tables_of(found.results, found.free, cfg.seeds, found.trained)
    if cfg.bench:
        known = {n: {c: of[c] for c in ("Images", "GPU days") if c in of} for n, of in found.trained.items()}
        args = (found.results, found.rows, found.scores, found.notes, known)
        tables.insert(0, benchmarks.paper_table(cfg.bench, *args))
    note = "; ".join([note, *found.notes]) + "."
    return where, dict(lines=lines, setting=setting, note=note, tables=tables)


def draw_frontier(path, first):
    """frontier.png: gain against diversity with intervals, a point for each model; runs are joined."""
    runs, none = {}, dict(gain=0, low=0, high=0)
    arms = lambda e: (e["gain"] - e["low"], e["high"] - e["gain"])
    for point in first["points"]:
        gain, change = point["gain"] or none, point["change"] or none
        found = dict(label=point["model"], x=point["diversity"], y=gain["gain"])
        found.update(x_arms=arms(change), y_arms=arms(gain))
        runs.setdefault(point["model"].partition("@")[0], []).append(found)
    plot_frontier(
        path, {"diversity: CLIP distance among seeds (95 %)": runs}, f"gain: {first['what']} (95 %)"
    )


def report_stage(cfg, found, device):
    """report.md, results.json, report.html, grid.png, and frontier.png where diversity is measured."""
    out, models, (where, words) = Path(cfg.out), found.models, phrase(cfg, found, device)
    record = dict(config=asdict(cfg), **where, prompts=[row["prompt"] for row in found.rows])
    record.update(tags=found.tags, models=found.results, free=found.free, left_out=found.left_out)
    record.update(scores={m: {r: rounded(s) for r, s in of.items()} for m, of in found.scores.items()})
    write_text(out / "results.json", json.dumps(record | dict(headline=found.first, trained=found.trained)))
    parts = [*map(plain, words["lines"]), plain(words["setting"])]
    parts += ["".join(markdown(*table) for table in words["tables"]).strip(), plain(words["note"])]
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    page = dict(words, models=list(models), rewards=list(next(iter(found.scores.values()))))
    page["sources"] = [[name, m.path or m.folder, sampling_of(cfg, m)] for name, m in models.items()]
    page["same_noise"] = all(m.path for m in models.values())
    page.update(headline=found.first, rows=page_rows(found, cfg.seeds))
    write_page(out / "report.html", "report.html", page)
    draw_grid(out / "grid.png", found)
    if all(point["diversity"] is not None for point in found.first["points"]):
        draw_frontier(out / "frontier.png", found.first)
    print("\n".join([*words["lines"], words["setting"], f"{out}/report.html, and what lies beside it"]))
    if cfg.study:
        make_study(cfg, models)


def plot_frontier(path, panels, what):
    """Gain against diversity as a PNG: {title of x: {run: [point]}}, the first point is the base. A point is
    dict(x, y), and perhaps its label and the arms of its interval, x_arms and y_arms (below, above)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, runs) in zip(axes, panels.items()):
        for points in runs.values():
            x, y = ([p[key] for p in points] for key in "xy")
            arms = [np.transpose([p.get(key, (0, 0)) for p in points]) for key in ("y_arms", "x_arms")]
            axis.errorbar(x, y, *arms, marker="o", capsize=2, elinewidth=0.8)
        base = next(iter(runs.values()))[0]
        axis.axhline(base["y"], color="k", ls=":", lw=0.8)
        axis.axvline(base["x"], color="k", ls=":", lw=0.8)
        axis.margins(0.12)
        axis.set(xlabel=title, ylabel=what if axis is axes[0] else "")
        arrow = dict(arrowstyle="->", color="green")
        paper = dict(facecolor="white", edgecolor="none")
        where = ((0.99, 0.99), (0.87, 0.89), "axes fraction")
        axis.annotate("better", *where, color="green", arrowprops=arrow, bbox=paper)
        named = sorted(
            (p for points in runs.values() for p in points if p.get("label")), key=lambda p: p["y"]
        )
        (low, high), gap = axis.get_ylim(), min(0.05, 1 / len(named))
        at = np.array([(p["y"] - low) / (high - low) for p in named])
        for n in range(1, len(at)):  # names beside the axis, at the height of their points, apart
            at[n] = max(at[n], at[n - 1] + gap)
        line = dict(arrowstyle="-", color="0.6", lw=0.6)
        for p, height in zip(named, at - max(0, at[-1] - 1)):
            beside = dict(xytext=(1.02, height), textcoords="axes fraction", va="center", arrowprops=line)
            axis.annotate(p["label"], (p["x"], p["y"]), fontsize=8, parse_math=False, **beside)
    publish(path, lambda tmp: figure.savefig(tmp, dpi=120))


# ----------------------------------------------------------------------------- a blind study, for people


def make_study(cfg, models):
    """OUT/study, to be sent to people, and OUT/key.json, to be kept: who drew which picture of each pair."""
    rng, (base, *others), chosen, key = np.random.default_rng(cfg.seed), models, [], []
    prompts = [prompt for prompt, _ in models[base].rows]
    for other in others:
        places = {prompts[i]: i for i in rng.permutation(len(prompts)).tolist()}  # a repeated prompt once
        chosen += [(other, i) for i in list(places.values())[: cfg.study]]
    for n, j in enumerate(rng.permutation(len(chosen))):
        sides, i = rng.permutation([base, chosen[j][0]]).tolist(), chosen[j][1]
        s = rng.integers(cfg.seeds)  # one seed: the same noise, where both were drawn here
        files = [f"{models[name].folder}/{models[name].rows[i][1][s]}" for name in sides]
        key.append(dict(id=str(n), prompt=prompts[i], models=sides, files=files))
    digest = hashlib.sha256(json.dumps(key).encode())
    for pair in key:
        for file in pair["files"]:
            digest.update(Path(file).read_bytes())
    study, path = digest.hexdigest()[:12], Path(cfg.out) / "key.json"
    if path.is_file() and read_key(path)["study"] != study:
        fail(f"{path}: another study is out; its answers need this key. Move key.json and study/ away first")

    def write(tmp):
        tmp.mkdir()
        for pair in key:
            for side, file in enumerate(pair["files"], 1):
                image = read_image(file)
                image.save(tmp / f"{pair['id']}_{side}.webp", lossless=max(image.size) <= 64, quality=92)
        pairs = [{"id": pair["id"], "prompt": pair["prompt"]} for pair in key]
        write_page(tmp / "index.html", "study.html", {"study": study, "pairs": pairs})

    write_text(path, json.dumps({"study": study, "pairs": key}, indent=1))
    publish(Path(cfg.out) / "study", write)
    print(f"{cfg.out}/study/index.html: {len(key)} pairs; send that folder, keep {path}")


def read_key(path):
    """key.json of a study: its number, and pairs of two models each."""
    with about(f"{path}: damaged, so no answer can be read", "take it from a copy, or make another study"):
        key = parse_json(read_text(path))
        pairs = {pair["id"]: sorted(pair["models"]) for pair in key["pairs"]}
        if not isinstance(key["study"], str) or not all(len(set(models)) == 2 for models in pairs.values()):
            raise ValueError("no pairs of two models")
    return key


def read_answers(cfg, key):
    """{pair id: [the answer of each file: "1", "2" or "tie"]}."""
    votes, people = {pair["id"]: [] for pair in key["pairs"]}, {}
    for path in cfg.study_answers:
        with about(f"--study_answers {path}: no answers that the study page saved"):
            answers = parse_json(text := read_text(path))
            if answers["study"] != key["study"]:
                raise ValueError(f"of study {answers['study']}, and {cfg.out}/key.json is of {key['study']}")
            for pair, answer in answers["answers"].items():
                if answer not in ("1", "2", "tie"):
                    raise ValueError(f"pair {pair}: {answer!r} is none of 1, 2, tie")
                votes[pair].append(answer)
        if text in people:
            fail(f"--study_answers {path}: the same answers as {people[text]}; a person counts once")
        people[text] = path
    return votes


def agreement(counts):
    """(N, 3) votes a pair for each answer, two or more a pair -> (share of agreeing pairs of people, Fleiss'
    kappa: that share beyond chance)."""
    n = counts.sum(1)  # (N,)
    observed = ((counts**2).sum(1) - n) / (n * (n - 1))  # (N,)
    chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    kappa = (observed.mean() - chance) / (1 - chance) if chance < 1 else 1.0
    return float(observed.mean()), float(kappa)


def study_results(key, votes):
    """Per two models: votes and majorities of one, with Wilson intervals, and how far people agree."""
    by_models, results = {}, {}
    for pair in key["pairs"]:
        base, mine = sorted(pair["models"])
        said = Counter({"1": pair["models"][0], "2": pair["models"][1]}.get(v) for v in votes[pair["id"]])
        if said:
            counts = [said[mine], said[None], said[base]]
            by_models.setdefault(f"{mine} over {base}", []).append(counts)
    for name, counts in by_models.items():
        counts = np.array(counts)  # (N, win tie loss)
        results[name] = {"votes": win_rate(*np.repeat([[1, 0, 0], [0, 0, 1]], counts.sum(0), axis=1))}
        results[name]["majority"] = win_rate(counts[:, 0], counts[:, 2])
        if len(several := counts[counts.sum(1) > 1]):
            results[name]["agreement"], results[name]["kappa"] = agreement(several)
    return results


def study_report(cfg):
    """Several people's answers -> OUT/study.json and a table."""
    key = read_key(Path(cfg.out) / "key.json")
    results = study_results(key, read_answers(cfg, key))
    rates = ["votes won (95 %)", "majority of a pair won (95 %)"]
    header = [f"{len(cfg.study_answers)} people", *rates, "win : tie : loss", "agreement", "Fleiss' kappa"]
    rate_text = lambda w: f"{w['rate']:.0%} ({w['low']:.0%} to {w['high']:.0%}), n = {w['n']}"
    rows = []
    for name, r in results.items():
        votes = " : ".join(str(r["votes"][k]) for k in ("wins", "ties", "losses"))
        both = [f"{r['agreement']:.0%}", f"{r['kappa']:.2f}"] if "kappa" in r else ["", ""]
        rows.append([name, rate_text(r["votes"]), rate_text(r["majority"]), votes, *both])
    write_text(Path(cfg.out) / "study.json", json.dumps(results, indent=1))
    print(markdown(header, rows) + "Votes of one pair are not independent: read the majorities' interval.")


# ----------------------------------------------------------------------------- main


@common.one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    if cfg.study_answers:
        return study_report(cfg)
    named = named_paths(cfg.models)
    if cfg.rewards is None:
        cfg = replace(cfg, rewards=() if cfg.bench else ("toyworld", *TOY_REWARDS))
    if cfg.bench:
        rows = benchmarks.read_bench(cfg.bench, cfg.prompts, cfg.limit, cfg.keep)
    else:
        also = ("tag", "category", "Category", cfg.tag)
        rows = read_prompts(cfg.prompts, column=cfg.field, also=also)
        rows = benchmarks.kept_rows(rows, cfg.keep)[: cfg.limit or None]
    if cfg.tag and cfg.tag not in rows[0]:
        fail(f"--tag {cfg.tag}: {cfg.prompts} has no such column")
    column = cfg.tag or next((key for key in rows[0] if key.lower() in ("tag", "category")), "tag")
    tags = ["all" if row.get(column) is None else str(row[column]) for row in rows]
    check_choices(cfg, [row["prompt"] for row in rows])
    part, parts, index, count = draw.share_of(cfg.shard)
    models = {name: pictures_of(cfg, name, *how, rows) for name, how in named.items()}
    device, out = common.pick_device(cfg.device), store.writable_folder("out", cfg.out)
    stages = set(cfg.stages) - ({"report"} if parts > 1 else set())  # the parts do not wait for each other
    cfg = suited(cfg, models)
    plans = drawings(cfg, models)
    rank, world = common.process_rank()
    starts = range(0, len(rows), cfg.batch_size)[index::count]  # a batch belongs to one process, by its place
    mine = [range(len(rows))[start : start + cfg.batch_size] for start in starts]
    with draw.folder_lock(out, index, count, "evaluate.py"):
        if "draw" in stages:
            draw_stage(plans, mine, device)
        if "score" in stages:
            if cfg.on_error == "stop":
                stop_or_skip(cfg, missing_pictures(models, [i for batch in mine for i in batch]), len(rows))
            score_stage(cfg, models, mine, device, part=f"@{index}of{count}" if count > 1 else "")
        if "report" in stages:
            if world > 1:  # the pictures of all must be there
                common.start_processes("cpu", minutes=24 * 60)
                dist.barrier()
            of_bench = bench_stage(cfg, models, rows, device)
            if rank == 0:
                report_stage(cfg, compute(cfg, models, rows, tags, of_bench), device)
        elif rank == 0:
            print(f"{out}: {' and '.join(sorted(stages))} done, part {part} of {parts}; then --stages report")


if __name__ == "__main__":
    main()
