"""A blind study for people: a page of picture pairs, a key to keep, and what the answers say.

make_study(cfg, models)         # evaluate.py --study 50: OUT/study to send away, OUT/key.json to keep
study_report(cfg)               # evaluate.py --study_answers answers-*.json
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from lib.common import fail
from lib.pictures import read_image
from lib.stats import agreement, win_rate
from lib.store import publish, write_text
from lib.tables import markdown, parse_json, read_text, write_page


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
    try:
        key = parse_json(read_text(path))
        pairs = {pair["id"]: sorted(pair["models"]) for pair in key["pairs"]}
        if not isinstance(key["study"], str) or not all(len(set(models)) == 2 for models in pairs.values()):
            raise ValueError("no pairs of two models")
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        fail(f"{path}: damaged ({e}), so no answer can be read; take it from a copy, or make another study")
    return key


def read_answers(cfg, key):
    """{pair id: [the answer of each file: "1", "2" or "tie"]}."""
    votes, people = {pair["id"]: [] for pair in key["pairs"]}, {}
    for path in cfg.study_answers:
        try:
            answers = parse_json(text := read_text(path))
            if answers["study"] != key["study"]:
                raise ValueError(f"of study {answers['study']}, and {cfg.out}/key.json is of {key['study']}")
            for pair, answer in answers["answers"].items():
                if answer not in ("1", "2", "tie"):
                    raise ValueError(f"pair {pair}: {answer!r} is none of 1, 2, tie")
                votes[pair].append(answer)
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            fail(f"--study_answers {path}: no answers that the study page saved ({e})")
        if text in people:
            fail(f"--study_answers {path}: the same answers as {people[text]}; a person counts once")
        people[text] = path
    return votes


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
