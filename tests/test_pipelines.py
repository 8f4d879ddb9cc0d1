"""What a path names: a base, what is added to it, formats that people have on disk, fingerprints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
from pipelines import fingerprint, split_spec

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny SDXL that a test may change."""
    return shutil.copytree(tiny / "sdxl", tmp_path / "model")


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change(path, key, index):
    """Add 1 to one number of one tensor of a safetensors file."""
    state = load_file(path)
    state[key].view(-1)[index] += 1
    save_file(state, path, {"format": "pt"})


# ----------------------------------------------------------------------------- paths and fingerprints


def test_a_path_that_exists_is_not_split(tmp_path):
    base, style = tmp_path / "sdxl+vae", tmp_path / "style"
    base.mkdir()
    style.mkdir()
    assert split_spec(base) == [str(base)]
    assert split_spec(f"{base}+{style}+{style}") == [str(base), str(style), str(style)]
    assert split_spec(f"{style}+{base}+ink") == [str(style), str(base), "ink"]
    assert split_spec("owner/base+owner/style") == ["owner/base", "owner/style"]
    assert split_spec("owner/base") == ["owner/base"]


EDITS = {
    "pipeline": lambda m: edit(m / "model_index.json", force_zeros_for_empty_prompt=False),
    "scheduler": lambda m: edit(m / "scheduler/scheduler_config.json", prediction_type="v_prediction"),
    "tokenizer": lambda m: edit(m / "tokenizer/tokenizer_config.json", model_max_length=7),
    "unet": lambda m: change(m / UNET, "conv_out.bias", 0),
    "vae": lambda m: change(m / "vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias", 0),
    "text_encoder_2": lambda m: change(m / "text_encoder_2/model.safetensors", "text_projection.weight", 3),
    "+1": lambda m: change(m.parent / "style.safetensors", "lora.down", 2),
}


@pytest.mark.parametrize("part", EDITS)
def test_a_fingerprint_names_the_part_that_was_changed(part, model, tmp_path):
    save_file({"lora.down": torch.zeros(4)}, tmp_path / "style.safetensors")
    before = fingerprint(f"{model}+{tmp_path}/style.safetensors")
    EDITS[part](model)
    after = fingerprint(f"{model}+{tmp_path}/style.safetensors")
    assert before.keys() == after.keys() and {n for n in before if before[n] != after[n]} == {part}


def test_a_fingerprint_is_of_content_alone(tiny, model, tmp_path):
    (model / "README.md").write_text("another card")
    assert fingerprint(model) == fingerprint(tiny / "sdxl")
    assert fingerprint("owner/base+owner/style") == {"pipeline": "owner/base", "+1": "owner/style"}
    for name in ("a", "b"):
        save_file({"lora.down": torch.zeros(4)}, tmp_path / f"{name}.safetensors")
    one, other = (fingerprint(f"{model}+{tmp_path}/{name}.safetensors") for name in ("a", "b"))
    assert one == other
    assert one["+1"] != fingerprint(f"{model}+{model}/unet")["+1"]


@pytest.mark.parametrize("suffix", (".safetensors", ".bin"))
def test_a_large_file_is_known_by_each_of_its_tensors(suffix, tmp_path):
    """Also by a small one in the middle, where both ends of the file stay as they were."""
    state = {"a": torch.zeros(6 << 20), "b": torch.zeros(8), "c": torch.zeros(6 << 20)}
    seen, file = set(), tmp_path / f"model{suffix}"
    for value in (0, 1):
        state["b"][:] = value
        torch.save(state, file) if suffix == ".bin" else save_file(state, file)
        seen.add(tuple(pipelines.file_digest(file)))
    assert file.stat().st_size > 40 << 20 and len(seen) == 2
    file.write_bytes(file.read_bytes()[: 30 << 20])  # torn: the loader says so
    assert len(pipelines.file_digest(file)) == 2
