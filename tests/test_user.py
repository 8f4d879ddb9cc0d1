"""A user's week: what is typed wrong, watched, stopped and kept, and the loss copied elsewhere.

pytest -q tests/test_user.py
"""

import re

import pytest
import torch
from conftest import HERE
from test_train_sh import commands_of, train_sh
from transformers import get_linear_schedule_with_warmup

import rankdpo

RECIPE = dict(BIN="", GPUS="8", PROMPTS="README.md", EVAL_PROMPTS="README.md")


def test_options_are_added_to_those_of_a_recipe_and_win():
    more = dict(TRAIN_OPTIONS="--lora_rank 64 --sample_every 7", EVAL_OPTIONS="--on_error skip --steps 9")
    _, train, evaluation = commands_of(train_sh("sdxl", check=True, **RECIPE, **more))
    last = lambda words, name: words[len(words) - words[::-1].index(name)]
    assert "100" in train and last(train, "--sample_every") == "7" and "--sample_steps" not in train
    assert last(evaluation, "--steps") == "9" and last(evaluation, "--guidance") == "5"
    assert last(evaluation, "--seeds") == "5" and last(evaluation, "--on_error") == "skip"


@pytest.mark.parametrize("name, meant", [("STEP", "STEPS"), ("BTEA", "BETA"), ("GPU", "GPUS")])
def test_a_mistyped_variable_is_named(name, meant):
    done = train_sh("sdxl", **RECIPE, **{name: "10"})
    assert done.returncode and f"{name}=10" in done.stderr and f"mean {meant}?" in done.stderr
    assert not done.stdout


def test_help_has_every_variable_that_train_sh_reads():
    text = train_sh("--help", check=True).stdout
    code = (HERE / "train.sh").read_text().split("set -euo pipefail")[1]
    read = set(re.findall(r"\$\{([A-Z_]+)[:-]", code)) - {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    assert len(read) > 20 and not read - set(re.findall(r"[A-Z_]+", text))


@pytest.mark.parametrize("warmup", [0, 1, 4, 9, 12])
def test_the_rate_is_that_of_transformers_linear_schedule(warmup):
    """After the warm-up equal at every step; within it one step ahead, for theirs begins with rate 0."""
    cfg = rankdpo.Config(lr=2e-5, steps=10, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=cfg.lr)
    schedule, theirs = get_linear_schedule_with_warmup(optimizer, warmup, cfg.steps), []
    for _ in range(cfg.steps + 1):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    wanted = [theirs[step + (step < warmup)] for step in range(cfg.steps)]
    assert [rankdpo.learning_rate(cfg, step) for step in range(cfg.steps)] == pytest.approx(wanted, abs=1e-20)
    assert warmup > 10 or max(wanted) == cfg.lr  # the peak is reached
