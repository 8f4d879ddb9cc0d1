"""evaluate.py: statistics against hand-made ones, one comparison from end to end, what it refuses.

pytest -q tests/test_evaluate.py
"""

import json

import numpy as np
import pytest
import torch
from conftest import PROMPTS, fails, rewards

import evaluate
import toyworld


def test_evaluate_compares_two_models(tiny, tmp_path, capsys):
    (tmp_path / "held.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p, "tag": toyworld.grammar()[p]["tag"]}) for p in PROMPTS)
    )
    evaluate.main(
        [
            "--models",
            f"base={tiny}/sdxl",
            f"same={tiny}/sdxl",
            f"other={tiny}/sd15",
            "--prompts",
            str(tmp_path / "held.jsonl"),
            "--rewards",
            "toyworld",
            *rewards(tiny)[1:],
            "--seeds",
            "2",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    r = json.loads((tmp_path / "out/results.json").read_text())
    base, same, other = (r["models"][n] for n in ("base", "same", "other"))
    assert (
        base["means"] == same["means"]
        and same["win_rate"]["pickscore"]["ties"] == len(PROMPTS)
        and same["gain"]["pickscore"]["gain"] == 0
    )
    w = other["win_rate"]["pickscore"]
    assert (
        w["wins"] + w["ties"] + w["losses"] == w["n"] == len(PROMPTS) and w["low"] <= w["rate"] <= w["high"]
    )
    assert other["gain"]["pickscore"]["gain"] == pytest.approx(
        other["means"]["pickscore"] - base["means"]["pickscore"]
    )
    assert (
        "accuracy, exact checker" in (tmp_path / "out/report.md").read_text()
        and (tmp_path / "out/grid.png").is_file()
    )
    assert r["config"]["seeds"] == 2 and r["torch"] == torch.__version__


def test_wilson_interval_golden():
    low, high = evaluate.wilson(233, 297)  # 78.45 % of 297, BalancedDPO's Pick-a-Pic row
    assert (round(low, 3), round(high, 3)) == (0.734, 0.827)


def test_scores_become_win_rates_and_gains():
    tags = ["x", "x", "y"]
    scores = {
        "a": {"r": np.array([[0.0, 1.0], [0.0, 0.0], [2.0, 2.0]])},
        "b": {"r": np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])},
    }
    r = evaluate.compare(scores, tags, 0)["b"]
    assert {k: r["win_rate"]["r"][k] for k in ("wins", "ties", "losses", "n")} == dict(
        wins=1, ties=1, losses=1, n=3
    )
    assert r["means"]["r"] == pytest.approx((0.5 + 0.5) / 2) and r["gain"]["r"]["gain"] == pytest.approx(
        (0.25 - 1.5) / 2
    )
    assert r["gain"]["r"]["low"] <= r["gain"]["r"]["gain"] <= r["gain"]["r"]["high"]


def test_evaluate_errors(tiny, tmp_path, capsys):
    check = lambda args, *says: fails(evaluate.main, args, *says, capsys=capsys)
    two = ["--models", f"a={tiny}/sdxl", f"b={tiny}/sd15", "--out", tmp_path]
    check(["--models", f"a={tiny}/sdxl"], "two or more")
    check(["--models", f"a={tiny}/sdxl", f"b={tmp_path}/none"], "none", "no such folder")
    check(two + ["--prompts", "none.jsonl"], "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a circle"}\n{"promt": 1}\n')
    check(two + ["--prompts", tmp_path / "bad.jsonl"], "bad.jsonl, row 2")
    check(two + ["--what"], "--what")
    (tmp_path / "real.txt").write_text("a horse on the moon\n")
    check(
        two + ["--prompts", tmp_path / "real.txt", "--steps", "1", "--seeds", "1", "--rewards", "toyworld"],
        "a horse on the moon",
    )
