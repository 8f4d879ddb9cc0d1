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
import io
import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from PIL import Image
from scipy.stats import binomtest, wilcoxon

import benchmarks
import draw
from common import (
    HERE,
    fail,
    fill_in,
    one_line_errors,
    option,
    parse,
    parse_json,
    pick_device,
    picture_grid,
    process_rank,
    provenance,
    publish,
    read_image,
    read_prompts,
    read_text,
    start_processes,
    writable_folder,
    write_text,
)
from lists import read_metadata
from pipelines import check_pipeline, family_of, load_pipeline
from rewards import TOY_REWARDS, check_rewards, load_reward, read_scores, reward_name, score_rows
from toy.world import COLORS, find_objects, grammar

STAGES = ("draw", "score", "report")
TEMPLATES = HERE / "docs/templates"


@dataclass
class Config:
    # what is compared
    models: tuple = option(
        (f"base={HERE}/toy/models/sdxl", "rankdpo=outputs/rankdpo/model"),
        "two or more, as name=pipeline or name=folder_of_pictures; the first is the baseline of the tables",
    )
    prompts: str = option(f"{HERE}/toy/heldout.jsonl", "held-out prompts; a column tag makes categories")
    bench: str = option(
        "", f"the benchmark that --prompts belongs to: {', '.join(benchmarks.BENCHES)}, or none"
    )
    bench_models: tuple = option((), "what judges it, as role=source: detector=DIR colours=DIR vqa=NAME ...")
    limit: int = option(0, "use the first that many prompts; 0 = all", at_least=0)
    rewards: tuple = option(
        None,
        "scorers, name or name=source; clip brings diversity (default: the toy world's, toyworld is exact; "
        "with --bench none but its own metric)",
    )
    seeds: int = option(4, "images a prompt and model", at_least=1)
    # how they draw
    steps: int = option(None, "sampling steps (default: what suits the first model)", at_least=1)
    guidance: float = option(None, "guidance scale (default: the same)", at_least=0)
    resolution: int = option(0, "side in pixels; 0 = the pipeline's own", at_least=0)
    seed: int = option(1234, "first seed of the starting noise, and of the bootstrap", at_least=0)
    precision: str = option("auto", "auto is bf16 on a GPU", ("auto", "fp32", "bf16", "fp16"))
    # how it is run
    out: str = option("outputs/evaluation", "folder to write")
    stages: tuple = option(STAGES, "which stages to run", STAGES)
    on_error: str = option(
        "stop", "prompts that a model cannot draw or score: stop, or skip", ("stop", "skip")
    )
    shard: str = option("0/1", "i/n: draw and score only part i of n; report when all are done")
    batch_size: int = option(64, "images a batch", at_least=1)
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")
    # people
    study: int = option(0, "a blind study in OUT/study: pairs of each model and the first", at_least=0)
    study_answers: tuple = option((), "files that people sent back: who wins, and how far people agree")


class Pictures(NamedTuple):
    """The pictures of one model: what draws them ("" for a folder from elsewhere), and [(prompt, files)]."""

    path: str
    folder: str
    rows: list


# ----------------------------------------------------------------------------- statistics


def wilson(wins, n):
    """95 % Wilson interval of a proportion."""
    interval = binomtest(wins, n).proportion_ci(confidence_level=0.95, method="wilson")
    return interval.low, interval.high


def holm(p):
    """Holm's adjustment of all p values that were looked at: below .05 together, not each by itself."""
    adjusted, largest = np.zeros(len(p)), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted.tolist()


def category_mean(values, tags):
    """Mean over categories of the mean in each; values (..., P), one a prompt."""
    tags = np.array(tags)
    return np.mean([values[..., tags == t].mean(-1) for t in dict.fromkeys(tags)], axis=0)


def paired_gain(base, mine, tags, seed, n=2000):
    """Gain of mine over base, (P,) means a prompt: the interval resamples prompts within categories; p is
    Wilcoxon's, two-sided, which drops prompts without a difference."""
    difference, tags, samples = mine - base, np.array(tags), []
    rng = np.random.default_rng(seed)
    for tag in dict.fromkeys(tags):
        members = difference[tags == tag]
        samples.append(members[rng.integers(len(members), size=(n, len(members)))].mean(-1))  # (n,)
    low, high = np.percentile(np.mean(samples, axis=0), [2.5, 97.5]).tolist()
    changed = difference[mine != base]
    p = float(wilcoxon(changed).pvalue) if len(changed) else 1.0
    gain = float(category_mean(difference, tags))
    return dict(gain=gain, low=low, high=high, p=p, n=len(mine))


def win_rate(mine, base):
    """How often one is strictly higher; (P,) a score a prompt. p: two-sided sign test, without the ties."""
    wins, losses, n = int((mine > base).sum()), int((mine < base).sum()), len(mine)
    low, high = wilson(wins, n)
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return dict(wins=wins, ties=n - wins - losses, losses=losses, n=n, rate=wins / n, low=low, high=high, p=p)


def compare(scores, tags, seed):
    """{model: {reward: (P, S)}} -> {model: means, means by category, spread over all images; against each
    earlier model and reward the gain, the win rate of the best seed and of the mean over seeds}."""
    results, tests, every_tag = {}, {"gain": [], "best": [], "mean": []}, np.array(tags)
    lacking = {}  # (P,) prompts of a category for which a benchmark has no scorer here
    for reward in next(iter(scores.values())):
        lacking[reward] = np.isnan([of_model[reward] for of_model in scores.values()]).any((0, 2))
    for name, by_reward in scores.items():
        result = dict(means={}, categories={}, spread={}, against={other: {} for other in results})
        for reward, s in by_reward.items():
            if lacking[reward].all():
                continue
            s, tags = s[~lacking[reward]], every_tag[~lacking[reward]]
            per_prompt = s.mean(1)  # (P,)
            means = {t: float(per_prompt[tags == t].mean()) for t in dict.fromkeys(tags.tolist())}
            result["means"][reward] = float(category_mean(per_prompt, tags))
            result["categories"][reward] = means
            spread = dict(mean=s.mean(), min=s.min(), max=s.max(), std=s.std())
            result["spread"][reward] = {key: float(value) for key, value in spread.items()}
            for other in results:
                base = scores[other][reward][~lacking[reward]]
                pair = {"gain": paired_gain(base.mean(1), per_prompt, tags, seed)}
                if reward != "diversity":  # there is no best seed of it
                    pair["best"] = win_rate(s.max(1), base.max(1))
                    pair["mean"] = win_rate(per_prompt, base.mean(1))
                result["against"][other][reward] = pair
                for kind, test in pair.items():
                    tests[kind].append(test)
        results[name] = result
    for family in tests.values():
        for test, p in zip(family, holm([test["p"] for test in family])):
            test.update(p_holm=p, comparisons=len(family))
    return results


# ----------------------------------------------------------------------------- the toy world


def entropy(share):
    """Bits of a distribution; share (..., C) adds up to 1."""
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)


def colours_of(pictures):
    """(P, C): how the objects of each prompt are coloured, by the exact object finder; each picture counts
    once, however many objects it shows."""
    colours = np.zeros((len(pictures.rows), len(COLORS)))
    for i, (_, files) in enumerate(pictures.rows):
        for file in files:
            objects = find_objects(read_image(f"{pictures.folder}/{file}"))
            counts = Counter(color for _, color, _, _ in objects)
            colours[i] += [counts[color] / max(1, counts.total()) for color in COLORS]
    return colours


def colour_entropy(counts, seed, n=2000):
    """{model: (P', C)} -> {model: entropy in bits of the colours of all, share of each colour, and the change
    to the first model with a paired 95 % bootstrap interval over prompts}."""
    base, results = next(iter(counts.values())), {}
    if not base.sum() or not all(c.sum() for c in counts.values()):
        return {}
    sample = np.random.default_rng(seed).integers(len(base), size=(n, len(base)))
    bits = lambda c: entropy(c / np.maximum(c.sum(-1, keepdims=True), 1e-12))
    for name, c in counts.items():
        total, share = float(bits(c.sum(0))), dict(zip(COLORS, (c.sum(0) / c.sum()).tolist()))
        low, high = np.percentile(bits(c[sample].sum(1)) - bits(base[sample].sum(1)), [2.5, 97.5]).tolist()
        change = dict(gain=total - float(bits(base.sum(0))), low=low, high=high)
        results[name] = dict(bits=total, change=change, prompts=len(c), share=share)
    return results


# ----------------------------------------------------------------------------- report


def interval_text(g, digits=3):
    return f"{g['gain']:+.{digits}f} ({g['low']:+.{digits}f} to {g['high']:+.{digits}f})"


def p_text(test):
    return "< 0.001" if test["p_holm"] < 0.001 else f"{test['p_holm']:.3f}"


def win_text(w):
    rate = f"{w['rate']:.0%} ({w['low']:.0%} to {w['high']:.0%})"
    return f"{rate}; {w['wins']} : {w['ties']} : {w['losses']}; {p_text(w)}"


def gain_cells(result, base, metric):
    """[gain with its interval, p] over the first model; empty in that model's own row."""
    if base not in result["against"]:
        return ["", ""]
    gain = result["against"][base][metric]["gain"]
    return [interval_text(gain), p_text(gain)]


def accuracy_table(results, metric, title):
    base, rows = next(iter(results)), []
    for name, result in results.items():
        cells = [f"{value:.2f}" for value in result["categories"][metric].values()]
        overall = f"**{result['means'][metric]:.3f}**"
        rows.append([name, overall, *cells, *gain_cells(result, base, metric)])
    return [title, "overall", *result["categories"][metric], "gain (95 %)", "p"], rows


def diversity_table(results, colours):
    """What the gain was paid with; it stands right below the accuracy."""
    base, rows = next(iter(results)), []
    header = ["diversity: what a prompt leaves free", "CLIP distance among seeds", "change (95 %)", "p"]
    if colours:
        header += [f"bits of free colours (of {np.log2(len(COLORS)):.2f})", "change (95 %)", *COLORS]
    for name, result in results.items():
        cells = ["", "", ""]
        if "diversity" in result["means"]:
            mean = result["means"]["diversity"]
            cells = [f"**{mean:.3f}**", *gain_cells(result, base, "diversity")]
        if own := colours.get(name):
            change = "" if name == base else interval_text(own["change"], 2)
            cells += [f"**{own['bits']:.2f}**", change, *(f"{own['share'][c]:.0%}" for c in COLORS)]
        rows.append([name, *cells])
    return header, rows


def pair_table(name, other, pair, seeds):
    """One model over another: BalancedDPO's table, with what it leaves out."""
    best, mean = f"best of {seeds} wins (95 %); win : tie : loss; p", "mean of seeds wins; the same"
    header = [f"{name} over {other}", "gain (95 %)", "p", "n", best, mean]
    rows = []
    for reward, tests in pair.items():
        gain = tests["gain"]
        wins = [win_text(tests[kind]) if kind in tests else "" for kind in ("best", "mean")]
        rows.append([reward, interval_text(gain), p_text(gain), str(gain["n"]), *wins])
    return header, rows


def tables_of(results, colours, seeds):
    """[(header, rows)]: accuracy, diversity, means, every pair, spread."""
    rewards, tables = list(next(iter(results.values()))["means"]), []
    for metric, title in (("toyworld", "accuracy, exact checker"), ("geneval", "accuracy, GenEval")):
        if metric in rewards:
            tables.append(accuracy_table(results, metric, title))
    if "diversity" in rewards or colours:
        tables.append(diversity_table(results, colours))
    names = [reward for reward in rewards if reward not in ("toyworld", "diversity")]
    if names:
        rows = [[model, *(f"{result['means'][r]:.3f}" for r in names)] for model, result in results.items()]
        tables.append((["mean reward over categories", *names], rows))
    for name, result in results.items():
        tables += [pair_table(name, other, pair, seeds) for other, pair in result["against"].items()]
    keys = ("mean", "min", "max", "std")
    spreads = {f"{model}, {reward}": of for model, r in results.items() for reward, of in r["spread"].items()}
    rows = [[title, *(f"{spread[key]:.4f}" for key in keys)] for title, spread in spreads.items()]
    tables.append((["over all images", *keys], rows))
    return tables


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells) + "\n"


def thumbnail(path, side=160):
    """A picture as a data URI: WebP, at most `side` pixels; a tiny one keeps every pixel."""
    image, file = read_image(path), io.BytesIO()
    small = max(image.size) <= 64
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(file, "WEBP", lossless=small, quality=60)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def write_html(path, head, rows):
    """report.html: `head` says all but the rows, which are written one by one: memory holds the pictures of
    one prompt, the page perhaps a thousand."""
    before, after = read_text(TEMPLATES / "report.html").split("<!-- DATA -->")
    safe = lambda value: json.dumps(value).replace("<", "\\u003c")  # a prompt may say </script>

    def write(tmp):
        with open(tmp, "w", encoding="utf-8") as f:
            f.write(before + safe(head)[:-1] + ', "rows": [\n')
            for n, row in enumerate(rows):
                f.write(",\n" * (n > 0) + safe(row))
            f.write("]}" + after)

    publish(path, write)


def rounded(values, digits=6):
    """For JSON: nested lists, null where there is no number."""
    values = np.asarray(values, float).round(digits)
    return np.where(np.isnan(values), None, values).tolist()


def html_rows(found, seeds, budget=1000):
    """What the page shows of each prompt; about `budget` pictures in all, from the first seeds."""
    models, scores = found.models, found.scores
    shown = int(np.clip(budget // (len(found.tags) * len(models)), 1, seeds))
    for i, tag in enumerate(found.tags):
        row = dict(prompt=found.rows[i]["prompt"], tag=tag)
        row["scores"] = [[rounded(s[i].mean(), 4) for s in scores[name].values()] for name in models]
        if all("toyworld" in by_reward for by_reward in scores.values()):
            row["passed"] = [scores[name]["toyworld"][i].astype(int).tolist() for name in models]
        row["pictures"] = [
            [thumbnail(f"{m.folder}/{file}") for file in m.rows[i][1][:shown]] for m in models.values()
        ]
        yield row


def draw_grid(path, found):
    """grid.png: two prompts of each category, at most twelve in all; up to four pictures of each model."""
    tags, rows = np.array(found.tags), []
    for i in [i for tag in dict.fromkeys(found.tags) for i in np.flatnonzero(tags == tag)[:2]][:12]:
        cells = []
        for name, pictures in found.models.items():
            passed = found.scores[name].get("toyworld")
            for s, file in enumerate(pictures.rows[i][1][:4]):
                verdict = "" if passed is None else (" -", " ok")[int(passed[i, s])]
                cells.append((read_image(f"{pictures.folder}/{file}"), name + verdict))
        rows.append((found.rows[i]["prompt"], cells))
    picture_grid(rows, path, side=96)


# ----------------------------------------------------------------------------- stages


def named_paths(specs):
    """{name: path} of --models, at least two."""
    models = dict(spec.partition("=")[::2] for spec in specs)
    if len(models) < 2 or not all(models.values()) or len(models) < len(specs):
        fail("--models: two or more different names are needed, each as name=path")
    for name, path in models.items():
        if not name[:1].isalnum() or not all(c.isalnum() or c in "-._" for c in name) or name == "study":
            fail(f"--models {name}={path}: a name is made of letters, digits, -, . and _: it names a folder")
        local = path.startswith(("outputs/", ".", "/"))
        if local and not all(map(os.path.isdir, path.split("+"))):  # base+adapters
            fail(f"--models {name}={path}: no such folder; train it with rankdpo.py first")
    return models


def pictures_of(cfg, name, path, rows):
    """A model's pictures, to be drawn into OUT/NAME, or those of a folder from elsewhere where they lie."""
    layout, here = benchmarks.picture_files(cfg.bench or "geneval", rows, cfg.seeds), Path(path)
    drawn = [(row["prompt"], files) for row, files in zip(rows, layout)]
    described = (here / "metadata.jsonl").is_file()
    laid_out = any((here / file).is_file() for files in layout for file in files)
    if (here / "model_index.json").is_file() or not (described or laid_out):
        check_pipeline(path)
        return Pictures(path, f"{cfg.out}/{name}", drawn)
    there = {}
    for row in read_metadata(path) if described else ():
        there.setdefault(" ".join(row["prompt"].split()), []).append(row)
    for i, (prompt, files) in enumerate(drawn):
        if same := there.get(" ".join(prompt.split())):
            row = same.pop(0) if len(same) > 1 else same[0]  # a benchmark may ask the same thing twice
            found = row["file_names"][: cfg.seeds]  # what is lacking is missed, and named, below
            drawn[i] = (row["prompt"], found + files[len(found) :])
        elif not described and (wrong := benchmarks.of_another_prompt(here, files[0], prompt)):
            fail(f"--models {name}={path}: {wrong}")
    return Pictures("", path, drawn)


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
    if cfg.resolution % 8:
        fail(f"--resolution must be a multiple of 8, got {cfg.resolution}")


def with_diversity(cfg):
    """The rewards, and diversity by the same weights wherever clip is one of them."""
    names = [reward_name(spec) for spec in cfg.rewards]
    if cfg.seeds < 2 or "clip" not in names or "diversity" in names:
        return cfg.rewards
    return (*cfg.rewards, "diversity" + cfg.rewards[names.index("clip")].removeprefix("clip"))


def suited(cfg, models):
    """The options with what suits the first model where they were not given. All models are drawn alike."""
    drawn = next((pictures for pictures in models.values() if pictures.path), None)
    if drawn is None or None not in (cfg.steps, cfg.guidance):
        return cfg
    if (Path(drawn.folder) / "settings.json").is_file():  # it was begun: no need to load a model
        began = next(iter(draw.read_settings(drawn.folder)[0]["models"].values()))
        return fill_in(cfg, {key: began[key] for key in ("steps", "guidance")}, "sampling, as before")
    pipe = load_pipeline(drawn.path, denoiser=False)  # its size says enough
    return fill_in(cfg, family_of(pipe).suits(pipe), "sampling")


def drawings(cfg, models):
    """[(options, settings, a model a seed, pictures)] for draw.py's stage of all models that are to be
    drawn. What lies there must have been drawn like that, also where it is only reported."""
    plans = []
    for name, pictures in models.items():
        if pictures.path:
            folder = writable_folder("out", pictures.folder)
            how = dict(steps=cfg.steps, guidance=cfg.guidance, resolution=cfg.resolution, dtype="bf16")
            how.update(name=name, path=pictures.path, noise="")
            seeds = [dict(how, seed=cfg.seed + s) for s in range(cfg.seeds)]
            drawing = replace(cfg, out=str(folder))
            settings = draw.settings_of(drawing, pictures.rows, seeds[:1])  # more seeds may follow
            draw.check_settings(folder, settings, drawing="draw" in cfg.stages)
            plans.append((drawing, settings, seeds, pictures))
    return plans


def draw_stage(plans, mine, device):
    """The missing pictures of every model, by draw.py's stage: there, a seed is another model."""
    todo = []
    for drawing, _, seeds, pictures in plans:
        batches = [[pictures.rows[i] for i in batch] for batch in mine]
        todo.append(draw.to_draw(drawing, batches, seeds))
    with draw.progress("draw", sum(todo, [])) as bar:
        for (drawing, settings, _, pictures), of_model in zip(plans, todo):
            draw.generate_stage(drawing, of_model, device, settings, bar)
            rows = [json.dumps(dict(prompt=p, file_names=f)) + "\n" for p, f in pictures.rows]
            write = lambda tmp: tmp.write_text("".join(rows), encoding="utf-8")
            publish(f"{drawing.out}/metadata.jsonl", write, unique=True)


def score_stage(cfg, models, mine, device, part):
    """Every reward is loaded once and scores what is not scored yet of every model."""
    for spec in with_diversity(cfg):
        load = lru_cache(1)(load_reward)  # the last one is let go before the next is loaded
        for name, pictures in models.items():
            rows = [pictures.rows[i] for batch in mine for i in batch]
            how = (device, cfg.batch_size, cfg.on_error, part)
            score_rows(pictures.folder, spec, rows, *how, load=load)


def is_readable(path):
    """Is this a PNG with its end, or else a picture that can be read?"""
    with suppress(ValueError):
        return draw.is_whole(path) or bool(read_image(path))
    return False


def missing_pictures(models, indices):
    """{prompt index: what is wrong with its pictures}, of all models."""
    problems = {}
    for name, pictures in models.items():
        for i in indices:
            prompt, files = pictures.rows[i]
            bad = [file for file in files if not is_readable(f"{pictures.folder}/{file}")]
            if bad:
                problems.setdefault(i, f"{name}: {pictures.folder}/{bad[0]} is missing or torn ({prompt!r})")
    return problems


def stop_or_skip(cfg, problems, count):
    """One line for what cannot be compared: the end, or a prompt less for every model."""
    if problems:
        first = problems[min(problems)]
        message = f"{len(problems)} of {count} prompts cannot be compared, the first: {first}"
        if cfg.on_error == "stop" or len(problems) == count:
            fail(f"{message}. Draw and score it, or leave such prompts out with --on_error skip")
        if process_rank()[0] == 0:
            print(f"{message}; they are left out for all models")


def stored(cfg, models):
    """Scores from disk: ({model: {reward: (P, S)}} of the prompts of which nothing is missing, their indices,
    {index: what is missing} of the others)."""
    count, found = len(next(iter(models.values())).rows), {}
    problems = missing_pictures(models, range(count))
    for name, pictures in models.items():
        for spec in with_diversity(cfg):
            found[name, spec] = read_scores(pictures.folder, spec, pictures.rows)
            for i in set(range(count)) - found[name, spec].keys():
                where = f"{pictures.folder}/scores/{reward_name(spec)}.jsonl"
                problems.setdefault(i, f"{name}: no scores of {pictures.rows[i][0]!r} in {where}")
    stop_or_skip(cfg, problems, count)
    complete = [i for i in range(count) if i not in problems]
    scores = {name: {} for name in models}
    for (name, spec), known in found.items():
        scores[name][reward_name(spec)] = np.array([known[i] for i in complete])
    return scores, complete, problems


def bench_stage(cfg, models, rows, device):
    """({model: {metric: (P, S)}}, notes) by the benchmark's judge, whose answers are kept on disk. Every
    process of torchrun calls this and gives its part."""
    sources, metrics, notes = dict(spec.partition("=")[::2] for spec in cfg.bench_models), {}, {}
    for name, pictures in models.items() if cfg.bench else ():
        files, how = [files for _, files in pictures.rows], (device, cfg.batch_size, sources)
        metrics[name], more = benchmarks.measure(cfg.bench, pictures.folder, rows, files, *how)
        notes.update(dict.fromkeys(more))  # each is said once
    return metrics, list(notes)


class Found(NamedTuple):
    """A comparison in numbers, of the prompts of which nothing is missing."""

    models: dict  # {name: Pictures}
    rows: list  # (P,) dicts of the prompt file
    tags: list  # (P,) categories
    scores: dict  # {model: {reward or metric: (P, S)}}
    results: dict  # compare() of the scores
    colours: dict  # colour_entropy() where a prompt names no colour; empty outside the toy world
    left_out: dict  # {prompt: what is missing}
    notes: list  # what the benchmark's judge differs in


def compute(cfg, models, every, tags, of_bench):
    """Everything that the report says, as numbers; `every` row of the prompt file, (P,) categories."""
    (metrics, notes), (scores, complete, problems) = of_bench, stored(cfg, models)
    for name in metrics:
        scores[name].update({metric: values[complete] for metric, values in metrics[name].items()})
    models = {n: Pictures(p.path, p.folder, [p.rows[i] for i in complete]) for n, p in models.items()}
    rows, tags, colours = [every[i] for i in complete], [tags[i] for i in complete], {}
    left_out = {every[i]["prompt"]: what for i, what in sorted(problems.items())}
    if "toyworld" in map(reward_name, cfg.rewards):
        free = [not any(color for _, color in grammar()[row["prompt"]]["objects"]) for row in rows]
        colours = {name: colours_of(pictures)[free] for name, pictures in models.items()}
        colours = colour_entropy(colours, cfg.seed)
    return Found(models, rows, tags, scores, compare(scores, tags, cfg.seed), colours, left_out, notes)


def phrase(cfg, found, where):
    """(setting, notes, tables) of the report, as text."""
    sampling = f"{cfg.steps} steps, guidance {cfg.guidance:g}; " if cfg.steps else ""
    setting = f"{len(found.rows)} held-out prompts x {cfg.seeds} seeds, {sampling}"
    setting += f"{where['device']}; commit {where['commit']}"
    if found.left_out:
        first = next(iter(found.left_out.values()))
        setting += f". {len(found.left_out)} prompts are left out for all models: {first}, ..."
    note = "p values: Wilcoxon's signed-rank test of gains, sign test of wins; Holm's correction covers all "
    note += "gains of this report, all wins of the best seed, all wins of the mean"
    tables = tables_of(found.results, found.colours, cfg.seeds)
    if cfg.bench:
        tables.insert(0, benchmarks.paper_table(cfg.bench, found.results, found.rows, found.scores))
    return setting, "; ".join([note, *found.notes]) + ".", tables


def write_report(cfg, found, setting, note, tables, where):
    """report.md, results.json, report.html and grid.png; the text is also printed."""
    out, raw = Path(cfg.out), {n: {r: rounded(s) for r, s in of.items()} for n, of in found.scores.items()}
    record = dict(config=asdict(cfg), **where, prompts=[row["prompt"] for row in found.rows])
    record.update(tags=found.tags, models=found.results, free_colours=found.colours, scores=raw)
    record["left_out"] = found.left_out
    write_text(out / "results.json", json.dumps(record))
    text = "\n\n".join([setting, "".join(markdown(*table) for table in tables).strip(), note]) + "\n"
    write_text(out / "report.md", text)
    head = dict(models=list(found.models), rewards=list(next(iter(found.scores.values()))))
    head.update(setting=f"{setting}. {note}", tables=tables)
    write_html(out / "report.html", head, html_rows(found, cfg.seeds))
    draw_grid(out / "grid.png", found)
    print(text)
    print(f"{out}/report.html; results.json, report.md; pictures side by side in grid.png")


def report_stage(cfg, models, rows, tags, device, of_bench):
    """The report of what lies on disk: computed, put in words, written."""
    found, where = compute(cfg, models, rows, tags, of_bench), provenance(device)
    for pictures in models.values():
        if cfg.bench and pictures.path:  # drawn here
            files = [files for _, files in pictures.rows]
            benchmarks.write_layout(cfg.bench, pictures.folder, rows, files)
    write_report(cfg, found, *phrase(cfg, found, where), where)
    if cfg.study:
        make_study(cfg, found.models)


# ----------------------------------------------------------------------------- a blind study


def make_study(cfg, models):
    """OUT/study, to be sent to people, and OUT/key.json, to be kept: who drew which picture of each pair."""
    rng, (base, *others) = np.random.default_rng(cfg.seed), models
    prompts, key, page = [prompt for prompt, _ in models[base].rows], [], []
    if cfg.study > len(prompts):
        fail(f"--study {cfg.study}: there are {len(prompts)} prompts; each pair of models takes one once")
    chosen = [(other, i) for other in others for i in rng.permutation(len(prompts))[: cfg.study].tolist()]
    for n, j in enumerate(rng.permutation(len(chosen))):
        sides, i = rng.permutation([base, chosen[j][0]]).tolist(), chosen[j][1]
        prompt, files = prompts[i], []
        for name in sides:
            files.append(f"{models[name].folder}/{models[name].rows[i][1][rng.integers(cfg.seeds)]}")
        key.append(dict(id=str(n), prompt=prompt, models=sides, files=files))
        page.append(dict(id=str(n), prompt=prompt, pictures=[f"{n}_{side}.webp" for side in (1, 2)]))
    name = f"{rng.integers(10**9):09d}"
    text = json.dumps({"study": name, "pairs": page}).replace("<", "\\u003c")

    def write(tmp):
        tmp.mkdir()
        for pair in key:
            for side, file in enumerate(pair["files"], 1):
                image = read_image(file)
                image.save(tmp / f"{pair['id']}_{side}.webp", lossless=max(image.size) <= 64, quality=92)
        (tmp / "index.html").write_text(read_text(TEMPLATES / "study.html").replace("STUDY", text), "utf-8")

    write_text(Path(cfg.out) / "key.json", json.dumps({"study": name, "pairs": key}, indent=1))
    publish(Path(cfg.out) / "study", write)
    print(f"{cfg.out}/study/index.html: {len(key)} pairs; send that folder, keep {cfg.out}/key.json")


def read_answers(cfg, key):
    """{pair id: [the answer of each file: "1", "2" or "tie"]}."""
    votes = {pair["id"]: [] for pair in key["pairs"]}
    for path in cfg.study_answers:
        try:
            answers = parse_json(read_text(path))
            if answers["study"] != key["study"]:
                raise ValueError(f"of study {answers['study']}, and {cfg.out}/key.json is of {key['study']}")
            for pair, answer in answers["answers"].items():
                if answer not in ("1", "2", "tie"):
                    raise ValueError(f"pair {pair}: {answer!r} is none of 1, 2, tie")
                votes[pair].append(answer)
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            fail(f"--study_answers {path}: no answers that the study page saved ({e})")
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
    by_models = {}
    for pair in key["pairs"]:
        base, mine = sorted(pair["models"])
        name_of = {"1": pair["models"][0], "2": pair["models"][1], "tie": "tie"}
        said = Counter(name_of[vote] for vote in votes[pair["id"]])
        by_models.setdefault((mine, base), []).append([said[mine], said["tie"], said[base]])
    results = {}
    for (mine, base), counts in by_models.items():
        counts = np.array([c for c in counts if sum(c)] or np.zeros((0, 3), int))  # (N, win tie loss)
        if len(counts):
            result = {"votes": win_rate(*np.repeat([[1, 0, 0], [0, 0, 1]], counts.sum(0), axis=1))}
            result["majority"] = win_rate(counts[:, 0], counts[:, 2])
            if len(several := counts[counts.sum(1) > 1]):
                result["agreement"], result["kappa"] = agreement(several)
            results[f"{mine} over {base}"] = result
    return results


def study_report(cfg):
    """Several people's answers -> OUT/study.json and a table."""
    path = Path(cfg.out) / "key.json"
    try:
        key = parse_json(read_text(path))
        results = study_results(key, read_answers(cfg, key))
    except (ValueError, TypeError, LookupError) as e:
        fail(f"{path}: damaged ({e}); --study writes it")
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


@one_line_errors
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    if cfg.study_answers:
        return study_report(cfg)
    paths = named_paths(cfg.models)
    if cfg.rewards is None:
        cfg = replace(cfg, rewards=() if cfg.bench else ("toyworld", *TOY_REWARDS))
    if cfg.bench:
        rows = benchmarks.read_bench(cfg.bench, cfg.prompts, cfg.limit)
    else:
        rows = read_prompts(cfg.prompts, cfg.limit)
    tags = ["all" if row.get("tag") is None else str(row["tag"]) for row in rows]
    check_choices(cfg, [row["prompt"] for row in rows])
    part, parts, index, count = draw.share_of(cfg.shard)
    models = {name: pictures_of(cfg, name, path, rows) for name, path in paths.items()}
    device, out = pick_device(cfg.device), writable_folder("out", cfg.out)
    stages = set(cfg.stages) - ({"report"} if parts > 1 else set())  # the parts do not wait for each other
    cfg = suited(cfg, models)
    plans = drawings(cfg, models)
    rank, world = process_rank()
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
                start_processes("cpu", minutes=24 * 60)
                dist.barrier()
            of_bench = bench_stage(cfg, models, rows, device)
            if rank == 0:
                report_stage(cfg, models, rows, tags, device, of_bench)
        elif rank == 0:
            print(f"{out}: {' and '.join(sorted(stages))} done, part {part} of {parts}; then --stages report")


if __name__ == "__main__":
    main()
