"""FLUX.1 and Qwen-Image: tiny pipelines in the real formats, against their own calls, drawn, trained."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from conftest import PROMPTS, fails, rows_of, t5_tokenizer, tiny_vae, train, write_rows
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel

import rankdpo
from lib import pipelines
from lib.pipelines import add_noise, from_patches, generate, load_pipeline, to_patches
from toy import build

SIZE = dict(height=32, width=24)  # not a square, so that rows and columns cannot be confused
TEXTS = ["a red circle", "two squares and a cross"]
TINY = dict(in_channels=16, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)
TINY["axes_dims_rope"] = (4, 6, 6)
NAMES = pytest.mark.parametrize("name", ("flux", "qwen"))


def flux_pipeline(folder, dev):
    t5_tokenizer(folder)
    t5 = transformers.T5TokenizerFast.from_pretrained(folder, model_max_length=24)
    clip = build.make_tokenizer()
    text = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    pooled = dict(pooled_projection_dim=64, guidance_embeds=dev)
    shift = dict(shift=3.0, use_dynamic_shifting=True) if dev else dict(shift=1.0)
    vae = dict(shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, **pooled, **TINY),
        vae=tiny_vae(**vae),
        text_encoder=build.text_encoder(clip, False),
        tokenizer=clip,
        text_encoder_2=transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(t5), **text)),
        tokenizer_2=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    )


def qwen_tokenizer():
    """A Qwen2Tokenizer to which every word of the pipeline's template is one token, as to the real one: the
    template has 34. Other words are spelled."""
    template = diffusers.QwenImagePipeline(*[None] * 5).prompt_template_encode
    symbols = sorted(ByteLevel.alphabet())  # of all bytes
    merges, words = [], template.replace("<|im_start|>", "").replace("<|im_end|>", "").split("\n")
    for word in (part for line in words for part in line.replace(" ", " \u0120").split(" ")):
        word = word.strip(",:{}")
        merges += [(word[:n], word[n]) for n in range(1, len(word))]
    vocab = [*symbols, *map("".join, dict.fromkeys(merges))]
    return transformers.Qwen2Tokenizer(
        vocab={w: i for i, w in enumerate(dict.fromkeys(vocab))},
        merges=list(dict.fromkeys(merges)),
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=48,
    )


def qwen_pipeline():
    words = qwen_tokenizer()
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=len(words))
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e6)
    text.update(num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope)
    eye = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=eye)
    vae = dict(base_dim=8, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True])
    vae.update(latents_mean=[-0.1, 0.2, 0.0, 0.3], latents_std=[0.5, 2.0, 1.5, 0.7])
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(num_layers=2, out_channels=4, **TINY),
        vae=diffusers.AutoencoderKLQwenImage(**vae),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=words,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    )


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """flux, schnell and qwen: pipeline folders."""
    root = tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    flux_pipeline(root / "t5", True).save_pretrained(root / "flux")
    flux_pipeline(root / "t5", False).save_pretrained(root / "schnell")
    qwen_pipeline().save_pretrained(root / "qwen")
    return root


@pytest.fixture(scope="session")
def loaded(root):
    return {name: load_pipeline(root / name) for name in ("flux", "schnell", "qwen")}


def call(pipe, prompt, **more):
    """(inputs of the denoiser, its output) at the first step of the pipeline's own call without guidance."""
    seen = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, _, inputs, output: seen.append((inputs, output[0])), with_kwargs=True
    )
    guidance = {"true_cfg_scale": 1.0} if "Qwen" in type(pipe).__name__ else {"guidance_scale": 1.0}
    with torch.no_grad():
        pipe(prompt, **guidance, **SIZE, output_type="latent", **more)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ("flux", "schnell", "qwen"))
def test_encode_noise_predict_equal_the_pipelines_own_call(name, loaded):
    """Of a batch of two prompts, each alone in the pipeline's call: Qwen's text is not padded there."""
    pipe = loaded[name]
    family = pipelines.family_of(pipe, trainable=True)
    limit = dict(max_sequence_length=family.text_length(pipe))
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 4, 8, 6, generator=g)
    pixels = torch.rand(2, 3, 32, 24, generator=g) * 2 - 1
    with torch.no_grad():
        x = family.encode_images(pipe.vae, pixels)  # (2, 4, 8, 6)
        cond = family.encode_prompts(pipe, TEXTS, (32, 24))
    at = dict(sigmas=[0.6, 0.3], **limit)
    t = call(pipe, TEXTS[0], latents=to_patches(noise[:1]), **at)[0]["timestep"]  # (1,) in [0, 1], shifted
    x_t, timesteps, target = add_noise(pipe.scheduler, x, noise, t.expand(2), "uniform")
    assert torch.equal(target, noise - x) and torch.allclose(timesteps, 1000 * t)
    with torch.no_grad():
        prediction = family.predict(pipe.transformer, x_t, timesteps, cond)
    for i, text in enumerate(TEXTS):
        inputs, tokens = call(pipe, text, latents=to_patches(x_t[[i]]), **at)
        theirs = from_patches(tokens, 4, 3)[0]
        difference = (prediction[i] - theirs).abs().max().item()
        print(f"{name}: prediction {theirs.std():.3f}, largest difference {difference:.1e}")
        assert theirs.std() > 0.1 and difference < 1e-6
        if name == "qwen":
            length = inputs["encoder_hidden_states"].shape[1]
            assert cond["mask"][i].sum() == length < cond["mask"].shape[1] == 48
            assert length == len(pipe.tokenizer(text).input_ids) + 5  # the template's end
        else:
            assert (inputs["guidance"] is None) == (name == "schnell")


@NAMES
def test_patches_are_the_pipelines_own(name, loaded):
    pipe, x = loaded[name], torch.randn(2, 4, 8, 6)
    assert torch.equal(to_patches(x), pipe._pack_latents(x, 2, 4, 8, 6))
    assert torch.equal(from_patches(to_patches(x), 4, 3), x)


@NAMES
def test_latents_decode_to_what_the_vae_encoded(name, loaded):
    """The pipeline's own decoding of our latents gives what the VAE makes of its posterior's mean."""
    pipe = loaded[name]
    family, pixels = pipelines.family_of(pipe), torch.rand(1, 3, 32, 24) * 2 - 1
    axis = (slice(None), slice(None), None)[: 3 if name == "qwen" else 2]  # of frames
    with torch.no_grad():
        x = family.encode_images(pipe.vae, pixels)
        theirs = pipe.vae.decode(pipe.vae.encode(pixels[axis]).latent_dist.mean).sample.view(1, 3, 32, 24)
    ours = dict(callback_on_step_end=lambda *_: {"latents": to_patches(x)}, output_type="pt")
    picture = pipe("", **SIZE, num_inference_steps=2, **ours).images  # at its end it decodes x
    difference = (picture - (theirs / 2 + 0.5).clamp(0, 1)).abs().max().item()
    print(f"{name}: largest difference of pixels {difference:.1e}")
    assert picture.std() > 0.01 and difference < 1e-5


def test_the_templates_34_tokens_are_dropped(loaded):
    pipe = loaded["qwen"]
    ids = pipe.tokenizer(pipe.prompt_template_encode.format("")).input_ids
    assert pipe.tokenizer.decode(ids[:34]) == pipe.prompt_template_encode.partition("{}")[0]


@NAMES
def test_pictures_of_a_batch_are_those_drawn_alone(name, loaded):
    settings = dict(steps=2, guidance=3.0, resolution=32)
    together = [x for x, _ in generate(loaded[name], TEXTS, [1, 2], settings)]
    alone = [generate(loaded[name], [text], [seed], settings)[0][0] for text, seed in zip(TEXTS, (1, 2))]
    values = lambda image: torch.tensor(list(image.convert("RGB").tobytes())).int()
    assert all(image.size == (32, 32) for image in together)
    for a, b in zip(together, alone):
        assert (values(a) - values(b)).abs().max() <= 1  # of 255
    other = generate(loaded[name], TEXTS[:1], [1], dict(settings, guidance=1.5))[0][0]
    assert not torch.equal(values(other), values(alone[0]))  # guidance matters


def test_a_shift_that_depends_on_the_resolution_is_of_sampling_alone(loaded):
    u, x = torch.tensor([0.25, 0.5]), torch.zeros(2, 1, 1, 1)
    for name in ("flux", "schnell", "qwen"):
        _, t, _ = add_noise(loaded[name].scheduler, x, x, u, "uniform")
        assert torch.equal(t, 1000 * u), name


@NAMES
def test_all_weights_are_trained_and_diffusers_loads_them(name, lists, root, tmp_path):
    pictures = ["--sample_every", 2, "--sample_prompts", 2, "--sample_steps", 2, "--sample_guidance", 2]
    log = train(lists, root, tmp_path, "--steps", 2, *pictures, model=name)
    assert log[1]["accuracy"] == 0.5 and log[1]["grad_norm"] > 0 and (tmp_path / "samples.png").is_file()
    kind = type(pipelines.TRAINABLE[name]).pipeline
    tuned, base = (kind.from_pretrained(p).transformer for p in (tmp_path / "model", root / name))
    assert type(load_pipeline(tmp_path / "model")) is kind
    moved = [n for n, p in tuned.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert len(moved) > 0.8 * len(list(base.parameters()))


@NAMES
def test_adapters_are_trained_and_diffusers_loads_them(name, lists, root, tmp_path):
    log = train(lists, root, tmp_path, "--lora_rank", 2, "--steps", 2, "--images_per_forward", 8, model=name)
    assert log[1]["accuracy"] == 0.5 and log[-1]["best_s"] != 0
    pipe = type(pipelines.TRAINABLE[name]).pipeline.from_pretrained(root / name)
    pipe.load_lora_weights(tmp_path / "model")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    before = load_pipeline(root / name).transformer
    after = load_pipeline(f"{root / name}+{tmp_path / 'model'}").transformer  # fused
    assert not torch.equal(*(m.transformer_blocks[0].attn.to_q.weight for m in (before, after)))


def test_all_weights_go_on_from_a_checkpoint(lists, root, tmp_path):
    """Also where some never get a gradient, and so no moments: of Qwen-Image's last block the text's."""
    run = lambda: train(lists, root, tmp_path, "--save_every 2 --keep 9 --steps 4 --lr 1e-3", model="qwen")
    whole = run()
    for gone in ("checkpoints/step-000004", "model"):
        shutil.rmtree(tmp_path / gone)
    again = run()
    assert [r["loss"] for r in again[1:]] == [r["loss"] for r in whole[1:]]
    assert [part["step"] for part in again[0]["resumed"]] == [2] and "commit" in again[0]["resumed"][0]


def test_two_processes_give_the_curve_of_one(lists, root, tmp_path):
    run = lambda n: train(lists, root, tmp_path / str(n), "--device_batch_size 2", model="qwen", processes=n)
    for a, b in zip(run(1)[1:], run(2)[1:], strict=True):
        assert (a["loss"], a["best_s"]) == pytest.approx((b["loss"], b["best_s"]), abs=1e-5)


@NAMES
def test_steps_teach_the_order_of_a_list(name, lists, root, tmp_path):
    """Held-out accuracy: of the same images with other prompts, at noise and timesteps never trained on."""
    row = rows_of(lists)[0]
    row.update(phi=[1.0, 2 / 3, 1 / 3, 0.0], rank=[1, 2, 3, 4])
    data = tmp_path / "data"
    shutil.copytree(lists / "images", data / "images")
    write_rows(data, [dict(row, prompt=prompt) for prompt in PROMPTS[:8]])
    more = ["--holdout", 0.5, "--eval_every", 30, "--lr", 5e-3, "--beta", 10, "--loser_weight", 1]
    log = train(data, root, tmp_path / "out", "--steps", 30, *more, model=name)
    print(name, [round(r["accuracy"], 2) for r in log[1::7]], log[-1]["held_out_accuracy"])
    assert log[1]["accuracy"] == 0.5 and log[-1]["held_out_accuracy"] > 0.95


@NAMES
def test_sides_that_cannot_be_patched_are_refused(name, lists, root, tmp_path):
    args = ["--data", lists, "--model", root / name, "--out", tmp_path, "--device", "cpu", "--resolution", 20]
    fails(rankdpo.main, args, "20 x 20 pixels, but sides must be multiples of 8")


def test_tokenizers_of_another_size_are_refused(root, tmp_path, loaded):
    pipe = loaded["qwen"]
    parts = {"text_encoder": pipe.text_encoder, "tokenizer": range(500)}
    with pytest.raises(SystemExit, match="500 words, not"):
        pipelines.check_tokenizers("here", SimpleNamespace(components=parts))


@NAMES
def test_a_velocity_is_not_trained_with_a_scheduler_of_diffusion(name, lists, root, tmp_path):
    model = shutil.copytree(root / name, tmp_path / "model")
    diffusers.DDPMScheduler(**pipelines.BETAS).save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    args = ["--data", lists, "--model", model, "--out", tmp_path / "out", "--device", "cpu"]
    fails(rankdpo.main, args, "is a DDPMScheduler, but the model needs FlowMatchEulerDiscreteScheduler")
    index["transformer"] = [None, None]
    (model / "model_index.json").write_text(json.dumps(index))
    fails(rankdpo.main, args, "has no denoiser")


def test_a_flow_scheduler_whose_noise_is_not_known_is_refused(loaded):
    other = diffusers.FlowMatchHeunDiscreteScheduler()
    for family in (pipelines.TRAINABLE["sdxl"], pipelines.TRAINABLE["qwen"]):
        with pytest.raises(SystemExit, match="is a FlowMatchHeunDiscreteScheduler, but the model needs"):
            pipelines.check_scheduler("here", other, family)
