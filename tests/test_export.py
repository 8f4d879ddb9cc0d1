"""Models along a run, and errors of held-out lists against the base."""

import shutil

import numpy as np
import pytest
import torch
from conftest import train
from safetensors.torch import load_file

import rankdpo
from lib import engine, pipelines
from lib.lists import find_cache, read_lists


def weights(folder):
    (path,) = [*folder.glob("unet/*.safetensors"), *folder.glob("*lora*.safetensors")]
    return load_file(path)


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("more", ["--lora_rank 2", "--ema 0.5"])
def test_an_exported_model_is_that_of_the_step(lists, tiny, tmp_path, more):
    """Bit for bit what a constant rate's run of so many steps ends with, and the run itself is unchanged."""
    args = ("--schedule", "constant", "--lr", "1e-3", more)
    log = train(lists, tiny, tmp_path / "a", *args, "--steps", 4, "--export_every", 2)
    assert [row.get("exported") for row in log[1:]] == [None, "model-000002", None, "model-000004"]
    train(lists, tiny, tmp_path / "b", *args, "--steps", 2)
    assert same(tmp_path / "a/model-000002", tmp_path / "b/model")
    assert same(tmp_path / "a/model-000004", tmp_path / "a/model")
    assert not same(tmp_path / "a/model-000002", tmp_path / "a/model")
    if "--ema" in more:
        plain = train(lists, tiny, tmp_path / "c", *args, "--steps", 4)
        assert [row["loss"] for row in plain[1:]] == [row["loss"] for row in log[1:]]


def test_exports_of_steps_that_are_taken_again_are_made_anew(lists, tiny, tmp_path):
    args = ("--schedule", "constant", "--lr", "1e-3", "--steps", 4, "--export_every", 1)
    train(lists, tiny, tmp_path / "whole", *args)
    train(lists, tiny, tmp_path / "part", *args, "--save_every", 2, "--keep", 9)
    for gone in ("checkpoints/step-000004", "model"):
        shutil.rmtree(tmp_path / "part" / gone)
    log = train(lists, tiny, tmp_path / "part", *args)  # from step 2
    assert [row.get("exported") for row in log[1:]] == [f"model-{n:06d}" for n in (1, 2, 3, 4)]
    assert all(same(tmp_path / "part" / r["exported"], tmp_path / "whole" / r["exported"]) for r in log[1:])


def test_the_rate_stays_after_the_warm_up():
    rates = lambda schedule: [
        rankdpo.learning_rate(rankdpo.Config(lr=1e-3, warmup_steps=2, steps=4, schedule=schedule), step)
        for step in range(4)
    ]
    assert np.allclose(rates("constant"), [0.5e-3, 1e-3, 1e-3, 1e-3])
    assert np.allclose(rates("linear"), [0.5e-3, 1e-3, 1e-3, 0.5e-3])


def held_out(log):
    names = ("held_out_accuracy", "held_out_best_s", "held_out_worst_s")
    return np.array([[r[name] for name in names] for r in log[1:]], dtype=float)  # null is NaN


HELD_OUT = ("--holdout", 0.3, "--eval_every", 1, "--lr", "1e-3", "--precision", "fp64", "--steps", 4)


@pytest.mark.parametrize("lora", [0, 2])
def test_held_out_errors_are_those_against_the_base(uneven, tiny, tmp_path, lora):
    """Fine-tuning does not look at the reference, so a refresh changes nothing but what s is measured against
    in training: on held-out lists s stays what it is without a refresh."""
    args = (*HELD_OUT, "--lora_rank", lora, "--loss", "sft")
    plain = train(uneven, tiny, tmp_path / "plain", *args)
    fresh = train(uneven, tiny, tmp_path / "fresh", *args, "--ref_refresh", 2)
    assert np.array_equal(held_out(fresh)[:, 1:], held_out(plain)[:, 1:])
    assert fresh[3]["best_s"] == 0 and (np.abs(held_out(fresh)[:, 1:]) > 1e-9).all()


def test_a_resumed_run_measures_against_the_same_base(lists, tiny, tmp_path):
    args = (*HELD_OUT, "--ref_refresh", 1)
    whole = train(lists, tiny, tmp_path, *args, "--save_every", 3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    shutil.rmtree(tmp_path / "model")
    again = train(lists, tiny, tmp_path, *args)
    assert "resumed" in again[0] and np.array_equal(held_out(again), held_out(whole))


def test_held_out_errors_are_the_policys_minus_the_bases(lists, tiny, tmp_path):
    """Computed once more, from the saved model, by the trainer's own pieces."""
    args = ("--holdout", 0.3, "--eval_every", 4, "--lr", "1e-3", "--steps", 4, "--ref_refresh", 2)
    log = train(lists, tiny, tmp_path / "run", *args)
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in log[0]["config"].items()}
    cfg, rows = read_lists(rankdpo.Config(**config))
    labels, (_, held) = rankdpo.stack_labels(cfg, rows), rankdpo.split(rows, cfg.holdout, cfg.seed)
    cache, _ = find_cache(cfg, rows, torch.float32, [])
    errs = []
    for path in (tmp_path / "run/model", tiny / "sdxl"):
        pipe = pipelines.load_pipeline(path)
        family = pipelines.family_of(pipe)
        data = rankdpo.Data(cache, labels, pipe.scheduler, {}, "cpu", torch.float32)
        batch = rankdpo.load_batch(cfg, data, [(rankdpo.HELD_OUT, n) for n in held])
        with torch.no_grad():
            predicted = family.predict(pipe.unet.eval(), batch.x_t, batch.t, batch.cond)
        err = (predicted.double() - batch.target.double()).square().flatten(1).mean(1)
        errs.append(err.view(batch.mask.shape))
    s = errs[0] - errs[1]  # (B, K)
    place = lambda pick: [pick(range(len(rows[n]["phi"])), key=rows[n]["phi"].__getitem__) for n in held]
    for name, pick in (("best_s", max), ("worst_s", min)):
        expected = s[range(len(held)), place(pick)].mean().item()
        assert log[-1][f"held_out_{name}"] == pytest.approx(expected, abs=1e-6)


def test_the_log_warns_of_growth_and_not_of_noise(tmp_path, capsys):
    def warned(**row):
        cfg = rankdpo.Config(out=str(tmp_path))
        log = engine.Log(cfg, 0, 0, 0, 0, torch.device("cpu"), torch.float32)
        for step in range(50):
            log.write(dict(step=step, loss=1, accuracy=1, worst_s=0, **row))
        log.file.close()
        return "above" in capsys.readouterr().out

    assert warned(best_s=0.02) and not warned(best_s=7e-4)
    assert warned(best_s=0.0, held_out_best_s=0.02) and not warned(best_s=0.02, held_out_best_s=1e-3)
