"""What a run takes, counted: FLOPs, bytes, and the setting that fits.

pytest -q tests/test_memory.py
"""

import re

import torch

import memory


def test_the_fastest_setting_that_fits_is_taken():
    """Full SDXL's bytes: on one GPU of 80 GB a list goes image by image or is computed again."""
    images, pick = {False: 8.7e9, True: 1.0e9}, memory.fastest
    cfg = memory.Plan(global_batch_size=64)
    weights = lambda cfg, gpus: lambda keep: memory.weight_bytes(cfg, 2.567e9, 0, torch.bfloat16, gpus, keep)
    one = pick(cfg, 4, images, weights(cfg, 1), 74e9, 1)
    assert one.fits and one.options["gradient_checkpointing"] and one.options["images_per_forward"] == 0
    eight = pick(cfg, 4, images, weights(cfg, 8), 74e9, 8)
    assert (
        eight.options["keep_gathered"]
        and not eight.options["gradient_checkpointing"]
        and eight.options["device_batch_size"] == 1
    )
    assert not pick(cfg, 4, images, weights(cfg, 1), 22e9, 1).fits
    given = memory.Plan(global_batch_size=64, images_per_forward=1, keep_gathered=False)
    eight = pick(given, 4, images, weights(given, 8), 22e9, 8)
    assert eight.fits and eight.options["images_per_forward"] == 1 and not eight.options["keep_gathered"]
    cpu = pick(cfg, 4, dict.fromkeys(images, 0), weights(cfg, 1), float("inf"), 1)
    assert cpu.options["device_batch_size"] == 32 and cpu.options["images_per_forward"] == 0 and cpu.time == 1


def test_memory_of_a_pass_is_counted(capsys):
    """SD3-Medium at 1024 px: what one image's pass keeps, and the table of what to run on which GPUs."""
    memory.main(["--model", "random:sd3"])
    said = capsys.readouterr().out
    kept, recomputed = map(float, re.findall(r"pass: ([\d.]+) GB, recomputed ([\d.]+) GB", said)[0])
    assert 4 < kept < 12 and recomputed < kept / 5
    assert all(f"{n} x {gb} GB: --device_batch_size" in said for n in (1, 8) for gb in (24, 40, 80))
    table = {line.split(":")[0]: line for line in said.splitlines()}
    assert "DOES NOT FIT" in table["1 x 24 GB"] and "DOES NOT FIT" not in table["8 x 40 GB"]
