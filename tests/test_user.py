"""A user's week: what is typed wrong, watched, stopped and kept, and the loss copied elsewhere.

pytest -q tests/test_user.py
"""

import json
import os
import re

import pytest
import torch
from conftest import HERE
from test_train_sh import commands_of, train_sh
from transformers import get_linear_schedule_with_warmup

import losses
import rankdpo
from lib import common, lists, store

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


def test_a_padded_list_has_the_loss_of_the_list_alone():
    """Also where what is padded ties with a real image by its phi of 0."""
    g = torch.Generator().manual_seed(0)
    policy, ref = torch.rand(2, 1, 5, generator=g, dtype=torch.float64)
    phi, mask = torch.tensor([[1.0, 0.5, 0, 0, 0]]), torch.tensor([[True, True, True, False, False]])
    padded, metrics = losses.rankdpo_loss(policy, ref, phi, 10.0, mask)
    alone, its = losses.rankdpo_loss(policy[:, :3], ref[:, :3], phi[:, :3], 10.0)
    assert torch.allclose(padded, alone, rtol=1e-12)
    assert all(torch.allclose(metrics[name], value, rtol=1e-12) for name, value in its.items())
    assert not torch.allclose(padded, losses.rankdpo_loss(policy, ref, phi, 10.0)[0], rtol=1e-3)


def test_flat_predictions_name_k_and_lists_are_no_phi():
    flat, target = torch.rand(2, 6, 4, 8, 8)
    with pytest.raises(ValueError, match="give K"):
        losses.denoising_error(flat, target)
    err = losses.denoising_error(flat, target, 3)
    assert torch.equal(err, losses.denoising_error(flat.unflatten(0, (2, 3)), target.unflatten(0, (2, 3))))
    with pytest.raises(ValueError, match="with K given"):
        losses.denoising_error(flat, target, 4)
    for loss in (losses.dcg_weights, losses.dpo_weights, losses.gain_weights):
        with pytest.raises(ValueError, match="must be a tensor .B, K., got list"):
            loss([[1.0, 0.5, 0.0]])


def test_published_files_have_the_mode_of_the_umask(tmp_path):
    def write(tmp):
        (tmp / "unet").mkdir(parents=True)
        os.close(os.open(tmp / "unet/model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))

    (tmp_path / "plain").write_text("")
    store.publish(tmp_path / "model", write)
    mode = lambda name: (tmp_path / name).stat().st_mode & 0o777
    assert mode("model/unet/model.safetensors") == mode("plain") == mode("model/.contents")


def read_ranks(folder, rank):
    row = {"prompt": "a", "file_names": ["1.png", "2.png", "3.png", "4.png"], "rank": rank}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    return lists.read_metadata(folder, lists=True, labelled=True)[0]


def test_ranks_alone_are_one_judge(tmp_path):
    row = read_ranks(tmp_path, [1, 2, 2, 4])
    assert row["phi"] == pytest.approx([1, 1 / 3, 1 / 3, 0]) and row["scores"] == {"rank": [-1, -2, -2, -4]}


@pytest.mark.parametrize("rank", [[1, 2, 3], [1, 2, "3", 4], 3, {}])
def test_ranks_that_fit_no_pictures_are_refused_with_their_line(tmp_path, rank):
    with pytest.raises(SystemExit, match="metadata.jsonl, line 1: scores of rank: as many finite numbers"):
        read_ranks(tmp_path, rank)


def test_a_process_that_srun_started_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="srun started several"):
        common.process_rank()
    for name, value in dict(RANK="1", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    assert common.process_rank() == (1, 2)
