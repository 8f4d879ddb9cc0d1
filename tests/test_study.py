"""The study's runner on a tiny model: the order of its runs, a line each, resuming, the report."""

import json

import numpy as np
import pytest
from conftest import fails

from lib.lists import read_metadata
from toy import study
from toy.world import CATEGORIES, grammar, held_out, render


def test_no_study_prompt_is_trained_on_and_categories_count_alike():
    rows, trained = study.study_prompts(), set((study.TOY / "prompts.txt").read_text().splitlines())
    assert not trained & {row["prompt"] for row in rows}
    counts = {t: sum(r["tag"] == t for r in rows) for t in CATEGORIES}
    assert counts == dict.fromkeys(CATEGORIES, len(rows) // 6)
    noises = {(r["prompt"], r["seed"] + n) for r in rows for n in range(study.NOISES)}
    assert len(noises) == len(rows) * study.NOISES  # no picture stands for two
    seeds = [r["seed"] for r in rows]
    assert max(seeds) - min(seeds) + study.NOISES <= 100  # nor of two seeds
    assert {r["prompt"] for r in study.choice_prompts()} <= trained
    assert not any(held_out(r["prompt"]) for r in study.choice_prompts())


def test_the_exact_rewards_disagree_where_they_should():
    prompt = "a red circle and a blue square"
    right = study.exact_rewards(prompt, render(prompt, np.random.default_rng(0)))
    assert right["colours"] == 1 and right["count"] == 0 and 0.05 < right["ink"] < 0.3
    more = study.exact_rewards("a red circle", render("four circles", np.random.default_rng(0)))
    assert more["count"] == -3 and more["ink"] > right["ink"]
    assert study.exact_rewards("two circles", render("two circles", np.random.default_rng(1)))["colours"] == 0


def test_conflicting_lists_can_be_trained_on(lists, tmp_path):
    """They linked the pictures, out of their folder, which readers of lists refuse."""
    cfg = study.Config(data=str(lists), out=str(tmp_path))
    rows = read_metadata(study.conflict_lists(cfg), lists=True, labelled=True)
    assert rows and all(set(row["scores"]) == set(study.CONFLICT) for row in rows)
    made = (tmp_path / "conflict").stat().st_mtime_ns
    assert study.conflict_lists(cfg) and (tmp_path / "conflict").stat().st_mtime_ns == made


def test_intervals_are_students():
    mean, low, high = study.mean_interval([0.1, 0.3])
    assert mean == pytest.approx(0.2) and high - mean == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert low == pytest.approx(mean - (high - mean)) and np.isnan(study.mean_interval([0.5])[1])
    assert study.win("012") == pytest.approx(0.5)


def line(row, setting, seed, passes, **more):
    at = {"30": passes[0], "60": passes[1]}
    found = {step: {"choice": {"passes": str(n) * 60}} for step, n in at.items()}
    return dict(row=row, setting=setting, seed=seed, at=found, **more)


def test_a_rows_point_is_the_best_of_all_steps_and_settings(monkeypatch):
    rows = [dict(tag=tag, prompt="", seed=0) for tag in CATEGORIES for _ in range(10)]
    monkeypatch.setattr(study, "choice_prompts", lambda: rows)
    monkeypatch.setattr(study, "ROWS", {"dpo": study.Row("", ("a", "b"))})
    monkeypatch.setattr(study, "SEEDS", (2, 10))
    lines = [line("dpo", "a", 0, (1, 2)), line("dpo", "a", 1, (1, 2)), line("dpo", "b", 0, (4, 1))]
    assert study.best_point(lines, "dpo") is None  # finalist b lacks a seed
    assert study.best_point([*lines, line("dpo", "b", 1, (1, 1))], "dpo") == ("b", "30")
    ruined = dict(row="dpo", setting="b", seed=1, problem="lower --lr")
    assert study.best_point([*lines, ruined], "dpo") == ("a", "60")


def test_the_best_settings_of_one_seed_get_more_and_a_row_all_of_its_seeds(monkeypatch):
    rows = [dict(tag=tag, prompt="", seed=0) for tag in CATEGORIES for _ in range(10)]
    monkeypatch.setattr(study, "choice_prompts", lambda: rows)
    monkeypatch.setattr(study, "ROWS", {"base": study.Row(""), "dpo": study.Row("", ("a", "b", "c"))})
    monkeypatch.setattr(study, "SEEDS", (2, 4))
    cfg = study.Config(only=("dpo",))
    after = lambda lines: [job for job in study.jobs(cfg, lines) if job[0] == "dpo"]
    lines = [line("dpo", "a", 0, (1, 1)), line("dpo", "b", 0, (4, 1))]
    assert after(lines) == [("dpo", setting, 0) for setting in "abc"]
    lines.append(line("dpo", "c", 0, (1, 2)))
    assert after(lines)[3:] == [("dpo", "b", 1), ("dpo", "c", 1)]
    lines += [line("dpo", "b", 1, (1, 1)), line("dpo", "c", 1, (1, 4))]
    assert after(lines)[5:] == [("dpo", "c", 2), ("dpo", "c", 3)]


@pytest.fixture()
def small(lists, tiny, tmp_path, monkeypatch):
    """Options of a study of one row on tiny models: six prompts, one setting, one seed."""
    prompts = {spec["tag"]: prompt for prompt, spec in grammar().items()}
    rows = [dict(tag=tag, prompt=prompts[tag], seed=1) for tag in CATEGORIES]
    monkeypatch.setattr(study, "study_prompts", lambda: rows)
    monkeypatch.setattr(study, "choice_prompts", lambda: rows)
    monkeypatch.setattr(study, "BASE", tiny / "sdxl")
    monkeypatch.setattr(study, "PAGE", tmp_path / "study.md")
    (tmp_path / "study.md").write_text(f"above\n{study.MARK}\nold\n")
    monkeypatch.setattr(study, "SEEDS", (1, 2))
    monkeypatch.setattr(study, "POINTS", 2)
    gain = study.Row("--loss gain", ("--lr 1e-4",))
    monkeypatch.setattr(study, "ROWS", {"base": study.Row(""), "gain": gain})
    monkeypatch.setattr(study, "CONTRASTS", (("gain", "base"),))
    out = ["--data", lists, "--out", tmp_path / "out", "--results", tmp_path / "study.jsonl"]
    return [str(a) for a in ("--only", "gain", "--steps", 2, "--lists", 4, *out)], tmp_path


def test_a_study_runs_resumes_and_reports(small):
    args, folder = small
    study.main(args)
    lines = [json.loads(text) for text in (folder / "study.jsonl").read_text().splitlines()]
    ran = [(line["row"], line["seed"]) for line in lines]
    assert ran == [("base", 0), ("gain", 0), ("base", 1), ("gain", 1)]
    assert [("choice" in line["at"][step]) for line in lines for step in line["at"]] == [1] * 3 + [0] * 3
    assert list(lines[1]["at"]) == ["1", "2"] and set(lines[1]["held_out"]) == {"1", "2"}
    assert all(len(line["at"]["1"]["study"]["wins"]["ink"]) == 6 for line in lines if line["row"] != "base")
    torn = (folder / "study.jsonl").read_text()[:-20]  # killed while it wrote the last line: that run again
    (folder / "study.jsonl").write_text(torn)
    study.main(args)
    again = [json.loads(text) for text in (folder / "study.jsonl").read_text().splitlines()]
    assert [line["at"] for line in again] == [line["at"] for line in lines]
    study.main([*args, "--report"])
    text = (folder / "study.md").read_text()
    assert text.startswith("above\n") and "old" not in text and (folder / "study.png").is_file()
    assert "| gain | 2 |" in text and "| gain - base | 2 |" in text
    fails(study.main, [*args[:-1], folder / "none.jsonl", "--report"], "none.jsonl")
