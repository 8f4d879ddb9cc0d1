"""The study's runner on a tiny model: the order of its runs, a line each, resuming, the report.

pytest -q tests/test_study.py
"""

import json

import numpy as np
import pytest
from conftest import fails

from toy import study
from toy.world import CATEGORIES, grammar, held_out


def test_the_study_prompts_are_held_out_and_balanced():
    rows = study.study_prompts()
    assert len(rows) >= 300 and all(held_out(r["prompt"]) for r in rows)
    assert {t: sum(r["tag"] == t for r in rows) for t in CATEGORIES} == dict.fromkeys(
        CATEGORIES, len(rows) // 6
    )
    noises = {(r["prompt"], r["seed"] + n) for r in rows for n in range(study.NOISES)}
    assert len(noises) == len(rows) * study.NOISES  # no picture stands for two
    used = {json.loads(line)["prompt"] for line in (study.TOY / "heldout.jsonl").read_text().splitlines()}
    assert all(r["fresh"] == (r["prompt"] not in used) or not r["fresh"] for r in rows)
    assert not any(held_out(r["prompt"]) for r in study.grid_prompts())


def test_intervals():
    tags = ["a"] * 40 + ["b"] * 10  # categories of their own size count alike
    study_tags = study.CATEGORIES
    study.CATEGORIES = ("a", "b")
    try:
        values = np.tile([[1.0] * 40 + [0.0] * 10], (3, 1))
        assert study.interval(values, tags) == (0.5, 0.5, 0.5)
        noisy = np.random.default_rng(0).random((4, 50))
        mean, low, high = study.interval(noisy, tags)
        assert low < mean < high and study.between(noisy, noisy[:2], tags) == (0.0, 0.0, 0.0)
    finally:
        study.CATEGORIES = study_tags


@pytest.fixture()
def small(lists, tiny, tmp_path, monkeypatch):
    """Options of a study of one method on tiny models: six prompts, one rate, one seed."""
    rows = [
        dict(tag=t, prompt=next(p for p, s in grammar().items() if s["tag"] == t), seed=1) for t in CATEGORIES
    ]
    monkeypatch.setattr(study, "study_prompts", lambda: rows)
    monkeypatch.setattr(study, "grid_prompts", lambda: rows)
    monkeypatch.setattr(study, "BASE", tiny / "sdxl")
    monkeypatch.setattr(study, "PAGE", tmp_path / "study.md")
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"above\n{study.MARK}\nold\n{study.END}\nbelow\n")
    monkeypatch.setattr(study, "RATES", (2e-4,))
    monkeypatch.setattr(study, "SEEDS", 1)
    monkeypatch.setattr(study, "METHODS", {name: study.METHODS[name] for name in ("base", "gain")})
    out = ["--data", lists, "--out", tmp_path / "out", "--results", tmp_path / "study.jsonl"]
    return [str(a) for a in ("--only", "gain", "--steps", 2, "--lists", 4, *out)], tmp_path


def test_a_study_runs_resumes_and_reports(small):
    args, folder = small
    study.main(args)
    lines = [json.loads(line) for line in (folder / "study.jsonl").read_text().splitlines()]
    ran = [(line["kind"], line["method"], line["seed"]) for line in lines]
    assert ran == [("grid", "gain", 0), ("study", "base", 0), ("study", "gain", 0)]
    assert all(len(line["passes"]) == 6 and "problem" not in line for line in lines)
    assert all(set(line["wins"]) == set(study.REWARDS) for line in lines[-1:])
    torn = (folder / "study.jsonl").read_text()[:-20]  # killed while it wrote the last line: that run again
    (folder / "study.jsonl").write_text(torn)
    study.main(args)
    again = [json.loads(line) for line in (folder / "study.jsonl").read_text().splitlines()]
    same = ("passes", "wins", "means", "lr")
    assert [[a[k] for k in same if k in a] for a in again] == [[b[k] for k in same if k in b] for b in lines]
    study.main([*args, "--report"])
    text = (folder / "study.md").read_text()
    readme = (folder / "README.md").read_text()
    assert readme.startswith("above\n") and readme.endswith(f"{study.END}\nbelow\n") and "old" not in readme
    assert "| gain | 0." in readme and "79.15 / 87.43" in readme
    assert "| gain | 1 |" in text and (folder / "study.png").is_file()
    fails(study.main, [*args[:-1], folder / "none.jsonl", "--report"], "none.jsonl")
