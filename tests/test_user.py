"""A user's week: what is typed wrong, watched, stopped and kept, and the loss copied elsewhere."""

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
from lib import common, engine, lists, store

RECIPE = dict(BIN="", GPUS="8", PROMPTS="README.md", EVAL_PROMPTS="README.md")


def test_options_are_added_to_those_of_a_recipe_and_win():
    more = dict(TRAIN_OPTIONS="--lora_rank 64 --sample_every 7", EVAL_OPTIONS="--on_error skip --steps 9")
    _, train, evaluation = commands_of(train_sh("sdxl", check=True, **RECIPE, **more))
    assert "100" in train and train[-2:] == ["--sample_every", "7"] and "--sample_steps" not in train
    assert evaluation[-2:] == ["--steps", "9"] and evaluation[evaluation.index("--guidance") + 1] == "5"


@pytest.mark.parametrize("name, meant", [("STEP", "STEPS"), ("BTEA", "BETA"), ("GPU", "GPUS")])
def test_a_mistyped_variable_is_named(name, meant):
    done = train_sh("sdxl", **RECIPE, **{name: "10"})
    assert done.returncode and f"{name}=10: is no variable of train.sh; did you mean {meant}?" in done.stderr


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
    with pytest.raises(ValueError, match="must be a tensor .B, K., got list"):
        losses.dcg_weights([[1.0, 0.5, 0.0]])


def test_published_files_have_the_mode_of_the_umask(tmp_path):
    def write(tmp):
        (tmp / "unet").mkdir(parents=True)
        os.close(os.open(tmp / "unet/model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))

    (tmp_path / "plain").write_text("")
    store.publish(tmp_path / "model", write)
    mode = lambda name: (tmp_path / name).stat().st_mode & 0o777
    assert mode("model/unet/model.safetensors") == mode("plain") == mode("model/.contents")


def test_ranks_alone_are_one_judge_and_others_are_refused_with_their_line(tmp_path):
    def read(rank):
        row = {"prompt": "a", "file_names": ["1.png", "2.png", "3.png", "4.png"], "rank": rank}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        return lists.read_metadata(tmp_path, lists=True, labelled=True)[0]

    row = read([1, 2, 2, 4])
    assert row["phi"] == pytest.approx([1, 1 / 3, 1 / 3, 0]) and row["scores"] == {"rank": [-1, -2, -2, -4]}
    for wrong in ([1, 2, 3], [1, 2, "3", 4], 3, {}):
        with pytest.raises(SystemExit, match="line 1: scores of rank: as many finite numbers"):
            read(wrong)


def test_a_process_that_srun_started_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="srun started several"):
        common.process_rank()


def test_curves_are_drawn_on_the_way_and_labels_known_by_heart_are_said(tmp_path, capsys):
    def said(accuracy, **options):
        cfg = rankdpo.Config(out=str(tmp_path), **options)
        log = engine.Log(cfg, 0, 0, 0, 0, torch.device("cpu"), torch.float32)
        for step in range(50):
            row = dict(step=step, loss=1, accuracy=accuracy, best_s=0, worst_s=0, grad_norm=1)
            log.write(row, stopping=step == 49)
            assert (tmp_path / "curves.png").exists() == (step == 49)
        os.remove(tmp_path / "curves.png")
        log.file.close()
        return "known by heart" in capsys.readouterr().out

    assert said(0.99) and not said(0.97) and not said(0.99, holdout=0.1)
