"""What a path names: a base, what is added to it, formats that people have on disk, fingerprints."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from lib import pipelines
from lib.formats import fingerprint, load_adapters, split_spec
from lib.pipelines import load_pipeline
from toy import build
from toy.build import TOY

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


def restore(folder, change):
    """Store all weights of a pipeline anew: change(state, file) writes them under another name."""
    for file in list(folder.rglob("*.safetensors")):
        state = load_file(file)
        file.unlink()
        change(state, file)


def as_fp16(state, file):
    halves = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})


def as_bin(state, file):
    name = "pytorch_model" if file.stem == "model" else file.stem
    torch.save(state, file.with_name(f"{name}.bin"))


def weights(pipe):
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def equal(a, b, rounding=0.0):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= rounding for name in a)


@pytest.mark.parametrize("name", ("sdxl", "sd3"))
@pytest.mark.parametrize("store, rounding", ((as_fp16, 2e-3), (as_bin, 0.0)))
def test_fp16_files_and_bin_files_alone_are_a_pipeline(name, store, rounding, tiny, tmp_path):
    model = shutil.copytree(tiny / name, tmp_path / "model")
    restore(model, store)
    pipe = load_pipeline(model)
    assert {p.dtype for p in weights(pipe).values()} == {torch.float32}
    assert equal(pipe, load_pipeline(tiny / name), rounding)
    other = load_pipeline(model, denoiser=False, encoders=False)
    assert pipelines.denoiser_of(other)[1].device.type == "meta" and other.vae is None


def test_the_plain_files_count_where_several_are_there(tiny, model):
    for file in list(model.rglob("*.safetensors")):
        as_fp16({name: t + 1 for name, t in load_file(file).items()}, file)
    assert equal(load_pipeline(model), load_pipeline(tiny / "sdxl"))


class Planted:
    def __reduce__(self):
        return (print, ("planted code ran",))


def test_a_pickle_in_a_bin_file_runs_no_code(model, capsys):
    restore(model, as_bin)
    torch.save({"conv_in.weight": Planted()}, model / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(SystemExit, match="could not be loaded: unet"):
        load_pipeline(model)
    assert "planted" not in capsys.readouterr().out


def test_weights_of_another_variant_are_named(model):
    file = model / UNET
    file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(SystemExit, match="unet: weights are .*non_ema"):
        load_pipeline(model)


@pytest.mark.parametrize("name", ("sdxl", "sd3", "sd15"))
def test_diffusers_alone_draws_with_a_toy_model(name):
    """Its text encoders are stored in fp16, but must not be loaded so where the denoiser is fp32."""
    absent = dict(text_encoder_3=None, tokenizer_3=None) if name == "sd3" else {}
    pipe = DiffusionPipeline.from_pretrained(TOY / "models" / name, **absent)
    assert {p.dtype for p in weights(pipe).values()} == {torch.float32}
    more = dict(max_sequence_length=16) if name == "sd3" else {}
    assert pipe("a red circle", num_inference_steps=1, output_type="np", **more).images.any()


def lora_of(folder, part="unet", scale=1.0, names=("{}.lora.down.weight", "{}.lora.up.weight"), prefix=None):
    """{name: tensor} of rank-2 adapters on a part's attention, as diffusers names them."""
    module, state = getattr(load_pipeline(folder), part), {}
    generator = torch.Generator().manual_seed(0)
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ends):
            out, into = layer.weight.shape
            full = f"{part if prefix is None else prefix}.{name}"
            state[names[0].format(full)] = torch.randn(2, into, generator=generator)
            state[names[1].format(full)] = torch.randn(out, 2, generator=generator) * scale
    return state


@pytest.fixture
def base(tiny):
    return tiny / "sdxl"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "style").mkdir()
    return tmp_path / "style"


def refused(base, added, *says):
    """load_pipeline(base+added) ends in one line that says these words."""
    with pytest.raises(SystemExit) as e:
        load_pipeline(f"{base}+{added}")
    assert all(word in str(e.value) for word in says) and "\n" not in str(e.value), e.value


def test_adapters_that_name_no_module_of_the_base_are_refused(base, folder, capfd):
    state = lora_of(base)
    other = lambda name: name.replace("transformer_blocks.0", "transformer_blocks.7", 1)
    renamed = {other(name): t for name, t in state.items()}
    mixed = dict([*state.items()][:8], **dict([*renamed.items()][8:]))
    save_file(mixed, folder / "pytorch_lora_weights.safetensors")
    refused(base, folder, f"{len(mixed) - 8} of {len(mixed)} tensors fit no module", "transformer_blocks.7")
    said = capfd.readouterr()
    assert not said.out and not said.err  # the libraries' own warnings are not shown


TEXT = ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight")


def test_half_of_a_text_encoders_pair_is_refused(base, folder):
    text = lora_of(base, "text_encoder", names=TEXT, prefix="text_encoder.text_model")
    del text[next(name for name in text if "linear_layer.down" in name)]
    save_file(text, folder / "pytorch_lora_weights.safetensors")
    refused(base, folder, "holds no whole adapters", "one half is missing")


def test_one_of_two_files_must_be_named(base, folder):
    save_file(lora_of(base), folder / "style.safetensors")
    save_file(lora_of(base, scale=1e-4), folder / "style-000010.safetensors")
    refused(base, folder, "style-000010.safetensors, style.safetensors", "BASE+FILE")
    one, other = (load_pipeline(f"{base}+{folder}/{name}.safetensors") for name in ("style", "style-000010"))
    assert not equal(one, other, 1e-2) and equal(other, load_pipeline(base), 1e-2)


OTHER_KINDS = {"hada_w1_a": "LoHa", "lokr_w1": "LoKr", "dora_scale": "DoRA"}


@pytest.mark.parametrize("mark", OTHER_KINDS)
def test_other_kinds_of_adapters_are_named(mark, base, folder):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    save_file({f"{name}.{mark}": torch.zeros(2, 2)}, folder / "a.safetensors")
    refused(base, folder, OTHER_KINDS[mark], "not supported", "a.safetensors")


@pytest.mark.parametrize("name, part", (("sdxl", "unet"), ("sd3", "transformer")))
def test_a_folder_of_peft_is_fused_with_its_scale(name, part, tiny, folder):
    """W + alpha / r B A, against a product by hand; also its file by name."""
    halves = ("{}.lora_A.weight", "{}.lora_B.weight")
    state = lora_of(tiny / name, part, 0.3, halves, "base_model.model")
    save_file(state, folder / "adapter_model.safetensors")
    options = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["to_q"])
    (folder / "adapter_config.json").write_text(json.dumps(options))
    before = getattr(load_pipeline(tiny / name), part).state_dict()
    pipe = load_pipeline(f"{tiny / name}+{folder}")
    after, changed = getattr(pipe, part).state_dict(), 0
    for key, w in before.items():
        module = f"base_model.model.{key.removesuffix('.weight')}"
        if halves[0].format(module) in state:
            w = w + 2 * state[halves[1].format(module)] @ state[halves[0].format(module)]
            changed += 1
        assert torch.allclose(after[key], w, atol=1e-5), key
    assert changed == len(state) / 2
    assert equal(pipe, load_pipeline(f"{tiny / name}+{folder}/adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(dict(options, use_dora=True)))
    refused(tiny / name, folder, "use_dora is not supported")


A_B, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
BLOCK, SINGLE = "transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.0"
QKV = [f"{BLOCK}.to_{name}" for name in "qkv"]
ADDED = [f"{BLOCK}.add_{name}_proj" for name in "qkv"]
MID = "unet.mid_block.attentions.0.transformer_blocks.0"
KOHYA_MID = "mid_block_attentions_0_transformer_blocks_0"
ATTN, FILES_ATTN = "encoder.layers.0.self_attn", "text_model.encoder.layers.0.self_attn"
KOHYA_TEXT = FILES_ATTN.replace(".", "_")
FORMATS = {}  # family, names of A and B, whether alpha is beside them, {module in the file: the pipeline's}
same, short = {name: name for name in QKV}, {name.partition(".")[2]: name for name in QKV}
FORMATS["qwen"] = "qwen", A_B, False, {name: name for name in [*QKV, *ADDED, f"{BLOCK}.to_out.0"]}
FORMATS["qwen with alpha"] = "qwen", DOWN_UP, True, short
comfyui = {name.replace("transformer", "diffusion_model", 1): name for name in QKV}
FORMATS["qwen comfyui"] = "qwen", A_B, True, comfyui
FORMATS["qwen diffsynth"] = "qwen", ("lora_A.default.weight", "lora_B.default.weight"), False, short
kohya = {"lora_unet_transformer_blocks_0_attn_to_q": QKV[0]}
FORMATS["qwen kohya"] = "qwen", DOWN_UP, True, kohya
FORMATS["flux"] = "flux", A_B, True, same
FORMATS["flux mixed"] = "flux", DOWN_UP, True, same
xlabs = {f"double_blocks.0.processor.qkv_lora{n}": part for n, part in ((1, QKV), (2, ADDED))}
xlabs["double_blocks.0.processor.proj_lora1"] = f"{BLOCK}.to_out.0"
xlabs["single_blocks.0.processor.proj_lora"] = f"{SINGLE}.proj_out"
FORMATS["flux xlabs"] = "flux", ("down.weight", "up.weight"), False, xlabs
comfyui = {"diffusion_model.double_blocks.0.img_attn.qkv": QKV}
comfyui[f"text_encoders.clip_l.transformer.{FILES_ATTN}.k_proj"] = f"text_encoder.{ATTN}.k_proj"
FORMATS["flux comfyui"] = "flux", DOWN_UP, True, comfyui
kohya = {"lora_unet_double_blocks_0_txt_attn_qkv": ADDED, "lora_unet_img_in": "transformer.x_embedder"}
kohya["lora_unet_single_blocks_0_linear2"] = f"{SINGLE}.proj_out"
kohya["lora_unet_final_layer_linear"] = "transformer.proj_out"
kohya[f"lora_te1_{KOHYA_TEXT}_q_proj"] = f"text_encoder.{ATTN}.q_proj"
FORMATS["flux kohya"] = "flux", DOWN_UP, True, kohya
FORMATS["sd3"] = "sd3", A_B, False, {name: name for name in [*QKV, *ADDED]}
with_text = {name: name for name in (QKV[0], f"text_encoder_2.{FILES_ATTN}.q_proj")}
FORMATS["sd3 with alpha"] = "sd3", A_B, True, with_text
kohya = {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": f"{MID}.attn1.to_q"}
kohya["lora_unet_input_blocks_3_0_in_layers_2"] = "unet.down_blocks.1.resnets.0.conv1"
kohya[f"lora_te1_{KOHYA_TEXT}_q_proj"] = f"text_encoder.{ATTN}.q_proj"
kohya[f"lora_te2_{KOHYA_TEXT}_out_proj"] = f"text_encoder_2.{FILES_ATTN}.out_proj"
FORMATS["sdxl kohya"] = "sdxl", DOWN_UP, True, kohya
kohya = {f"lora_unet_{KOHYA_MID}_attn1_to_out_0": f"{MID}.attn1.to_out.0"}
FORMATS["sdxl kohya, diffusers' blocks"] = "sdxl", DOWN_UP, True, kohya
once = {f"{MID}.attn1.processor.to_out_lora": f"{MID}.attn1.to_out.0"}
once[f"text_encoder.{FILES_ATTN}.to_out_lora"] = f"text_encoder.{ATTN}.out_proj"
FORMATS["sdxl as diffusers once wrote it"] = "sdxl", ("down.weight", "up.weight"), False, once
kohya = {f"lora_unet_{KOHYA_MID}_attn1_to_q": f"{MID}.attn1.to_q"}
kohya[f"lora_te_{KOHYA_TEXT}_q_proj"] = f"text_encoder.{ATTN}.q_proj"
FORMATS["sd15 kohya"] = "sd15", DOWN_UP, True, kohya


def family(name):
    """A tiny pipeline with random weights, of the parts that adapters change."""
    torch.manual_seed(0)
    if name in build.PIPELINES:
        return build.build_pipeline(name, None)
    size = dict(in_channels=16, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)
    size.update(num_layers=1, axes_dims_rope=(4, 6, 6))
    if name == "qwen":
        return diffusers.QwenImagePipeline(*[None] * 4, diffusers.QwenImageTransformer2DModel(**size))
    clip = build.text_encoder(build.make_tokenizer(), False)
    transformer = diffusers.FluxTransformer2DModel(num_single_layers=1, pooled_projection_dim=64, **size)
    return diffusers.FluxPipeline(None, None, clip, None, None, None, transformer)


def pair(module, names, out, into, kernel=()):
    """Adapters of rank 4 under a module's name, {name: A, name: B}."""
    a, b = torch.randn(4, into, *kernel), torch.randn(out, 4, *[1] * len(kernel))
    return {f"{module}.{names[0]}": a, f"{module}.{names[1]}": b}


def load(pipe, state, folder):
    save_file(state, folder / "a.safetensors")
    load_adapters(pipe, pipelines.denoiser_of(pipe)[0], folder, folder / "a.safetensors")


@pytest.mark.parametrize("form", FORMATS)
def test_adapters_are_fused_whatever_their_names(form, folder):
    """W + alpha / r B A in float64, of weights that share an A by their rows of B; no other weight moves."""
    name, names, alpha, modules = FORMATS[form]
    pipe, state, wanted = family(name), {}, {}
    before = {key: p.detach().double() for key, p in weights(pipe).items()}
    for module, shared in modules.items():
        keys = [f"{key}.weight" for key in ([shared] if isinstance(shared, str) else shared)]
        rows, (into, *kernel) = [len(before[key]) for key in keys], before[keys[0]].shape[1:]
        factors = pair(module, names, sum(rows), into, kernel)
        state.update(factors, **{f"{module}.alpha": torch.tensor(1.0)} if alpha else {})
        a, b = (t.double().flatten(1) for t in factors.values())
        for key, part in zip(keys, b.split(rows)):
            wanted[key] = before[key] + (0.25 if alpha else 1) * (part @ a).view_as(before[key])
    load(pipe, state, folder)
    after = weights(pipe)
    assert all((after[key] - w).abs().max() < 1e-5 for key, w in {**before, **wanted}.items())
    assert {key for key in after if not torch.equal(after[key].double(), before[key])} == wanted.keys()


def test_the_scale_may_be_in_the_header(folder):
    state = pair(QKV[0], A_B, 96, 96)
    options = {"transformer.lora_alpha": 6, "transformer.use_rslora": True}
    pipes = [family("sd3") for _ in range(2)]
    before = pipes[0].transformer.transformer_blocks[0].attn.to_q.weight.detach().clone()
    load(pipes[0], state, folder)
    save_file(state, folder / "a.safetensors", {"lora_adapter_metadata": json.dumps(options)})
    load_adapters(pipes[1], "transformer", folder, folder / "a.safetensors")
    one, three = (pipe.transformer.transformer_blocks[0].attn.to_q.weight - before for pipe in pipes)
    assert torch.allclose(three, 3 * one, atol=1e-5)  # 6 / 4 ** .5


T5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
FIRST = {"lora_unet_double_blocks_0_img_attn_proj": (32, 32)}
REFUSED = {  # family, {module: (out, in)}, other tensors of one number, what the message says
    "T5 of FLUX": ("flux", {**FIRST, T5: (32, 32)}, [], f"2 of 4 tensors fit no module of the base: {T5}"),
    "no known name": ("sdxl", {f"lora_unet_{KOHYA_MID}_attn9_to_q": (48, 48)}, [], "2 of 2 .*attn9"),
    "biases": ("flux", FIRST, [f"{next(iter(FIRST))}.diff_b"], "img_attn_proj.diff_b is no LoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tensor_that_is_not_applied_is_named(kind, folder):
    name, modules, others, says = REFUSED[kind]
    state = {key: torch.ones(1) for key in others}
    for module, shape in modules.items():
        state.update(pair(module, DOWN_UP, *shape))
    with pytest.raises(ValueError, match=says):
        load(family(name), state, folder)


ORIGINAL = {
    "model.diffusion_model.input_blocks.0.0.weight, conditioner.embedders.0.x": "StableDiffusionXLPipeline",
    "model.diffusion_model.double_blocks.0.x": "FluxPipeline",
}


@pytest.mark.parametrize("names", ORIGINAL)
def test_a_model_in_a_single_file_is_told_how_to_convert(names, base, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({name: torch.ones(1) for name in names.split(", ")}, file)
    for path in (file, f"{base}+{file}"):
        with pytest.raises(SystemExit, match=f"{ORIGINAL[names]}.from_single_file.*{file}"):
            pipelines.check_pipeline(str(path))


def test_a_pointer_of_git_lfs_is_named(base, model, tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    added = tmp_path / "style.safetensors"
    for file, path in ((model / UNET, model), (added, f"{base}+{added}")):
        file.write_text(pointer)
        with pytest.raises(SystemExit, match=f"{file}: is a pointer of git-lfs.*git lfs pull"):
            load_pipeline(path)


ALONE = [("sdxl", "unet", form) for form in ("folder", "fp16", "torch")]


@pytest.mark.parametrize(
    "name, part, form", [*ALONE, ("sd3", "transformer", "inner"), ("sd15", "unet", "file")]
)
def test_a_denoiser_alone_takes_the_place_of_the_bases(name, part, form, tiny, tmp_path):
    alone = shutil.copytree(tiny / name / part, tmp_path / "dpo" / part)
    file = alone / "diffusion_pytorch_model.safetensors"
    state = {key: t + 1 if t.is_floating_point() else t for key, t in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    if form == "fp16":
        file.unlink()
        as_fp16(state, file)
    if form == "torch":
        torch.save({"state_dict": state}, tmp_path / "dpo.pth")
    paths = dict(folder=tmp_path / "dpo", inner=alone, file=file, torch=tmp_path / "dpo.pth")
    paths["fp16"] = paths["folder"]
    pipe, before = load_pipeline(f"{tiny / name}+{paths[form]}"), load_pipeline(tiny / name)
    moved = {key for key, p in weights(before).items() if not torch.equal(p, weights(pipe)[key])}
    assert moved == {key for key in weights(before) if key.startswith(f"{part}.")}
    rounding = 4e-3 if form == "fp16" else 0
    assert all((t - state[key]).abs().max() <= rounding for key, t in getattr(pipe, part).named_parameters())
    how = dict(steps=1, guidance=2.0, resolution=0)
    assert any(pipelines.generate(pipe, ["a red circle"], [0], how)[0])


def test_a_denoiser_that_does_not_fit_is_refused(tiny, base, tmp_path):
    refused(base, tiny / "sd15/unet", "missing, unknown or of another shape")
    refused(base, tiny / "sd3", "is a whole pipeline")
    alone = shutil.copytree(base / "unet", tmp_path / "unet")
    edit(alone / "config.json", act_fn="gelu")
    refused(base, alone, "act_fn is gelu, but silu in the base")
    with pytest.raises(SystemExit, match=r"named BASE\+"):
        load_pipeline(alone)
    assert load_pipeline(f"{base}+{base}/unet", denoiser=False).unet.device.type == "meta"


@pytest.mark.parametrize("name", pipelines.TRAINABLE)
def test_random_models_are_made_in_the_type_in_which_they_stay(name):
    kinds = {p.dtype for p in weights(load_pipeline(f"random:{name}", "meta", torch.bfloat16)).values()}
    assert kinds == {torch.bfloat16} and torch.get_default_dtype() == torch.float32


def test_samples_are_decoded_in_tiles_once_a_whole_picture_does_not_fit(base, capsys, monkeypatch):
    pipe, tried = load_pipeline(base), []
    decode = type(pipe.vae).decode

    def small(vae, *args, **kwargs):
        tried.append(vae.use_tiling)
        if not vae.use_tiling:
            raise torch.OutOfMemoryError("4.5 GiB")
        return decode(vae, *args, **kwargs)

    monkeypatch.setattr(type(pipe.vae), "decode", small)
    arguments = pipelines.encode_and_drop_encoders(pipe, ["a red circle"], (32, 32), "cpu", torch.float32)
    for _ in range(2):
        images = pipe(**arguments, num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3) and tried == [False, True, True]
    assert pipe.vae.tile_latent_min_size < images.shape[1] // pipe.vae_scale_factor  # else it decodes whole
    assert capsys.readouterr().out.count("in tiles") == 1
