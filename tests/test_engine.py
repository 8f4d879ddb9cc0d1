"""The trainer's engine: start-up, cache, communication, memory; what a run costs.

pytest -q tests/test_engine.py
"""

import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import train
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import common
import pipelines
import rankdpo


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ----------------------------------------------------------------------------- cache


def cache_of(data):
    (folder,) = (data / ".cache").iterdir()
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_cache_has_one_content_whoever_writes_it(lists, tiny, tmp_path, monkeypatch):
    """In chunks by place: what a killed run left, or another number of processes, changes no bit; and prompts
    encoded together are those encoded alone, to rounding."""
    data, read = tmp_path / "data", []
    shutil.copytree(lists, data, ignore=shutil.ignore_patterns(".cache"))
    load_parts = pipelines.load_parts

    def noted(*args):
        parts = load_parts(*args)
        read.append({name for name, part in parts.items() if part is not None})
        return parts

    monkeypatch.setattr(pipelines, "load_parts", noted)
    monkeypatch.setattr(rankdpo, "CHUNK", 4)
    train(data, tiny, tmp_path / "a", "--steps", 1)
    whole = cache_of(data)
    folder = next((data / ".cache").iterdir())
    for n in (1, 7):
        (folder / f"{n:07d}.safetensors").unlink()
    train(data, tiny, tmp_path / "b", "--steps", 1)
    assert cache_of(data) == whole and len(whole) == 10
    train(data, tiny, tmp_path / "c", "--steps", 1)  # VAE and text encoders only where they are needed:
    assert [parts == {"unet"} for parts in read] == [False, False, False, False, True, False]  # also to save

    pipe = pipelines.load_pipeline(tiny / "sdxl")
    for n, row in enumerate(common.read_metadata(data)):
        cond = pipelines.family_of(pipe).encode_prompts(pipe, [row["prompt"]], (32, 32))
        cached = load_file(folder / f"{n:07d}.safetensors")
        assert all(torch.allclose(cached[name], c[0], atol=1e-6) for name, c in cond.items())


def test_every_list_is_encoded_by_one_process(monkeypatch, tmp_path):
    shares, rows = [], [{"prompt": "", "file_names": []}] * 100
    cfg = rankdpo.Config(data=str(tmp_path), model="none")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        shares.append(rankdpo.lists_to_encode(cfg, rows, torch.float32)[1])
    assert sorted(sum(shares, [])) == list(range(100)) and all(len(share) >= 32 for share in shares)


def test_work_ahead_keeps_the_order_and_passes_errors_on():
    assert list(common.ahead(lambda n: n * n, range(20), depth=3, threads=4)) == [n * n for n in range(20)]
    with pytest.raises(SystemExit, match="list 3"):
        list(common.ahead(lambda n: common.fail("list 3") if n == 3 else n, range(9), depth=2))


# ----------------------------------------------------------------------------- start-up


def test_what_one_process_reads_the_others_receive(alone, monkeypatch):
    """Weights, buffers that are not saved and tensors that are mere attributes, through the meta device."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[0].register_buffer("unsaved", torch.arange(3.0), persistent=False)
    model[1].table = torch.arange(4) * 1j
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = rankdpo.to_meta(model)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    for _ in range(2):  # the policy and the reference
        rankdpo.receive(model, values, torch.device("cpu"))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model[0].unsaved, torch.arange(3.0))
        assert torch.equal(model[1].table, torch.arange(4) * 1j)
    monkeypatch.setenv("RANK", "1")
    assert rankdpo.to_meta(model) == ({}, {})


def test_other_processes_read_no_weights(tiny):
    pipe = pipelines.load_pipeline(tiny / "sd3", denoiser=False, encoders=False)
    assert pipe.vae is None and pipe.text_encoder is None and pipe.tokenizer is not None
    assert all(p.is_meta for p in pipe.transformer.parameters())


# ----------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("adapters", [True, False])
def test_the_card_of_a_tuned_folder(tmp_path, adapters):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\n---\n# Base\n")
    about = {"Options": {"beta": 2500.0, "data": "lists"}, "Last step": {"accuracy": 0.61}}
    for base, licence in ((str(tmp_path), "some-licence"), (f"{tmp_path}/none", None)):
        (tmp_path / "none").mkdir(exist_ok=True)
        card = ModelCard(pipelines.model_card(base, adapters, about))
        assert card.data.to_dict().get("license_name") == licence and card.data.library_name == "diffusers"
        assert card.data.pipeline_tag == "text-to-image" and ("lora" in card.data.tags) == adapters
        assert all(text in card.text for text in ("| beta | 2500.0 |", "| accuracy | 0.61 |", base))
        assert ("not known" in card.text) == (licence is None)
