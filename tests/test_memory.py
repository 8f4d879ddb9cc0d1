"""What a run takes, counted: FLOPs, bytes, hours, and the setting that fits."""

import os
import re

import pytest
import torch
from conftest import fails

import rankdpo
from lib import memory, pipelines

SDXL = {False: 8.7e9, True: 0.9e9}  # bytes an image, whole or recomputed


def sdxl_weights(cfg, gpus):
    return lambda keep: memory.weight_bytes(cfg, 2.567e9, 0, torch.bfloat16, gpus, keep)


def test_the_fastest_setting_that_fits_is_taken():
    """Full SDXL's bytes: on one GPU of 80 GB a list goes image by image or is computed again."""
    images, pick, weights = {False: 8.7e9, True: 1.0e9}, memory.fastest, sdxl_weights
    cfg = rankdpo.Config(global_batch_size=64)
    one = pick(cfg, 4, images, weights(cfg, 1), 74e9, 1)
    assert one.fits and one.options["gradient_checkpointing"] and one.options["images_per_forward"] == 0
    eight = pick(cfg, 4, images, weights(cfg, 8), 74e9, 8)
    assert eight.options["keep_gathered"] and not eight.options["gradient_checkpointing"]
    assert eight.options["device_batch_size"] == 1
    assert not pick(cfg, 4, images, weights(cfg, 1), 22e9, 1).fits
    given = rankdpo.Config(global_batch_size=64, images_per_forward=1, keep_gathered=False)
    eight = pick(given, 4, images, weights(given, 8), 22e9, 8)
    assert eight.fits and eight.options["images_per_forward"] == 1 and not eight.options["keep_gathered"]
    cpu = pick(cfg, 4, dict.fromkeys(images, 0), weights(cfg, 1), float("inf"), 1)
    assert cpu.options["device_batch_size"] == 32 and cpu.options["images_per_forward"] == 0 and cpu.time == 1


@pytest.mark.parametrize("gpus", [1, 8])
def test_fragments_fit_too_and_a_larger_card_is_not_slower(gpus):
    cfg, before = rankdpo.Config(global_batch_size=64), None
    for gb in range(16, 200, 4):
        setting = memory.fastest(cfg, 4, SDXL, sdxl_weights(cfg, gpus), gb * 1e9, gpus)
        assert setting.gb < setting.reserved and setting.fits == (setting.reserved <= gb)
        if before and before.fits:
            assert setting.fits and setting.time <= before.time
        before = setting


def test_samples_take_room_from_the_setting():
    """64 pictures at once would not fit beside what fits without them."""
    cfg, weights = rankdpo.Config(global_batch_size=64), 10e9
    alone = memory.fastest(cfg, 4, SDXL, lambda keep: weights, 24e9, 1)
    assert alone.fits and not memory.fastest(cfg, 4, SDXL, lambda keep: weights, 24e9, 1, samples=20e9).fits


def test_every_copy_of_the_policy_is_counted():
    """Of one parameter: weights, gradients and moments in fp32; copies of a whole network in bf16."""

    def taken(gpus=1, keep=False, **options):
        cfg = rankdpo.Config(**options)
        trained, frozen = (0.1, 1) if cfg.lora_rank else (1, 0)
        return memory.weight_bytes(cfg, trained, frozen, torch.bfloat16, gpus, keep)

    assert taken() == 16 + 2 + 2  # the reference; autocast's copy of the policy
    assert taken(loss="dro") == taken() + 2 and taken(ema=0.9) == taken() + 4
    assert taken(8) == pytest.approx(20 / 8) and taken(8, keep=True) == pytest.approx(20 / 8 + 2 + 2 + 4)
    assert taken(lora_rank=4) == pytest.approx(2 + 0.1 * 20)
    assert taken(8, lora_rank=4, loss="dro", ema=0.9) == pytest.approx(2 + 0.1 * 28)


def test_the_plan_of_training_drawing_and_scoring(lists, capsys):
    """SD3-Medium at 1024 px: what one image's pass keeps, and what to run on which GPUs. PyTorch's own
    allocator took 56.9 GB on null GPUs for one list, kept gathered (docs/memory.md)."""
    data = ["--data", str(lists), "--resolution", "1024"]
    rankdpo.main(["--model", "random:sd3", *data, "--plan", "24", "40", "80", "8x24", "8x40", "8x80"])
    training, drawing, scoring = re.split("---- drawing.*|---- scoring.*", capsys.readouterr().out)
    kept, recomputed = map(float, re.findall(r"pass: ([\d.]+) GB, recomputed ([\d.]+) GB", training)[0])
    assert 4 < kept < 12 and recomputed < kept / 5 and "hours of training" in training
    assert all(f"{n} x {gb} GB: --device_batch_size" in training for n in (1, 8) for gb in (24, 40, 80))
    table = {line.split(":")[0]: line for line in training.splitlines()}
    assert "DOES NOT FIT" in table["1 x 24 GB"] and "DOES NOT FIT" not in table["8 x 40 GB"]
    weights = memory.weight_bytes(rankdpo.Config(), 2028.3e6, 0, torch.bfloat16, 8, True)
    assert weights / 1e9 + 4 * kept == pytest.approx(56.9, rel=0.06)
    encoding = float(re.search(r"encoding lists of 4: ([\d.]+) GB", training)[1])
    assert 5.58 * 2 < encoding < 30  # its text encoders alone have 5.58 G parameters
    assert "hours of encoding 10 lists" in training
    sizes = {gb: int(n) for gb, n in re.findall(r"1 x (\d+) GB: --batch_size (\d+)", drawing)}
    assert 1 <= sizes["24"] < sizes["40"] and "hours of drawing 10 pictures on 1 GPU: " in drawing
    assert "vqascore, 45.2 GB in fp32; 24 GB: DOES NOT FIT" in scoring
    assert int(re.search(r"pickscore.*; 24 GB: --batch_size (\d+)", scoring)[1]) > 64


def test_counts_of_adapters_are_what_the_allocator_took():
    """Of rank 64 at 1024 px, recomputed: within 6 % of PyTorch's own allocator on null GPUs."""
    name, images, allocated = "flux", 16, 70.5
    pipe = pipelines.load_pipeline(f"random:{name}", "meta")
    family, (_, denoiser) = pipelines.TRAINABLE[name], pipelines.denoiser_of(pipe)
    item = {key: torch.empty(shape, device="meta") for key, shape in family.shapes(denoiser.config).items()}
    item["latents"] = item["latents"][None]
    network = memory.stand_in(denoiser, item, 64)[0]
    count = lambda trained: sum(p.numel() for p in network.parameters() if p.requires_grad is trained)
    trained, frozen = count(True), count(False)
    image = memory.count_bytes(family, denoiser, item, 64, torch.bfloat16, True)
    cfg = rankdpo.Config(lora_rank=64)
    weights = memory.weight_bytes(cfg, trained, frozen, torch.bfloat16, 1, False)
    assert (weights + images * image) / 1e9 == pytest.approx(allocated, rel=0.06)


def test_hours_of_the_papers_run(capsys):
    """RankDPO's 400 steps of 1024 lists of SDXL took 16 hours on 8 A100 (arXiv 2410.18013, Sec. 4)."""
    memory.print_hours("training", 400 * 1024 * 108.0e12, 8)
    assert "training on 8 GPUs: 15.4 on an A100 at 100 TFLOP/s, 7.7 on" in capsys.readouterr().out


def test_segments_expand_unless_the_environment_says_otherwise(monkeypatch):
    """Where the driver has virtual memory; this driver is a stand-in."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)

    class Driver:
        has_it = 0

        def cuInit(self, flags):
            pass

        def cuDeviceGetAttribute(self, out, attribute, device):
            assert attribute == 102 and device == 0
            out._obj.value = self.has_it

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Driver())
    settings = lambda: [os.environ.get(f"PYTORCH_{name}ALLOC_CONF") for name in ("", "CUDA_")]
    memory.use_expandable_segments()
    assert settings() == [None, None]
    Driver.has_it = 1
    memory.use_expandable_segments()
    assert "expandable_segments:True" in settings()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    memory.use_expandable_segments()
    assert settings() == [None, "max_split_size_mb:512"]


def test_cards_to_plan_for(capsys):
    assert memory.read_cards(("24", "8x80", "2x40.5")) == [(1, 24), (8, 80), (2, 40.5)]
    for wrong in ("x", "0x80", "8x", "8x-1", "80GB", "8xinf", "nan"):
        fails(memory.read_cards, [wrong], f"--plan {wrong}: expected the GB", capsys=capsys)


def test_a_resolution_that_cannot_be_is_refused(capsys):
    args = ["--model", "random:flux", "--resolution", "1000", "--plan", "24"]
    fails(rankdpo.main, args, "--resolution", "16", capsys=capsys)
