"""Models along a run, and errors of held-out lists against the base.

pytest -q tests/test_export.py
"""

import numpy as np
import pytest
import torch
from conftest import log_of, rows_of, train
from safetensors.torch import load_file

import rankdpo


def weights(folder):
    (path,) = [*folder.glob("unet/*.safetensors"), *folder.glob("*lora*.safetensors")]
    return load_file(path)


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("more", [(), ("--lora_rank", 2), ("--ema", 0.5)])
def test_an_exported_model_is_that_of_the_step(lists, tiny, tmp_path, more):
    """Bit for bit what a constant rate's run of so many steps ends with, and the run itself is unchanged."""
    args = ("--schedule", "constant", "--lr", "1e-3", *more)
    log = train(lists, tiny, tmp_path / "a", *args, "--steps", 4, "--export_every", 2)
    assert [row.get("exported") for row in log[1:]] == [None, "model-000002", None, "model-000004"]
    train(lists, tiny, tmp_path / "b", *args, "--steps", 2)
    assert same(tmp_path / "a/model-000002", tmp_path / "b/model")
    assert same(tmp_path / "a/model-000004", tmp_path / "a/model")
    assert not same(tmp_path / "a/model-000002", tmp_path / "a/model")
    plain = train(lists, tiny, tmp_path / "c", *args, "--steps", 4)
    assert [row["loss"] for row in plain[1:]] == [row["loss"] for row in log[1:]]


def test_exports_of_steps_that_are_taken_again_are_made_anew(lists, tiny, tmp_path):
    args = ("--schedule", "constant", "--lr", "1e-3", "--steps", 4, "--export_every", 1)
    train(lists, tiny, tmp_path / "whole", *args)
    train(lists, tiny, tmp_path / "part", *args, "--save_every", 2, "--keep", 9)
    later = tmp_path / "part/checkpoints/step-000004"
    later.rename(tmp_path / "gone")
    stale = tmp_path / "part/model-000009"
    (tmp_path / "part/model-000003").rename(stale)
    log = train(lists, tiny, tmp_path / "part", *args)  # from step 2
    assert [row.get("exported") for row in log[1:]] == [f"model-{n:06d}" for n in (1, 2, 3, 4)]
    assert not stale.exists()
    assert all(same(tmp_path / "part" / r["exported"], tmp_path / "whole" / r["exported"]) for r in log[1:])


def test_the_rate_stays_after_the_warm_up(lists, tiny, tmp_path):
    args = ("--lr", "1e-3", "--warmup_steps", 2, "--steps", 4)
    constant = train(lists, tiny, tmp_path / "a", *args, "--schedule", "constant")
    linear = train(lists, tiny, tmp_path / "b", *args)
    assert np.allclose([r["lr"] for r in constant[1:]], [0.5e-3, 1e-3, 1e-3, 1e-3])
    assert np.allclose([r["lr"] for r in linear[1:]], [0.5e-3, 0.75e-3, 0.5e-3, 0.25e-3])
