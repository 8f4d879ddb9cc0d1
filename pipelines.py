"""All that differs between model families: load, encode, noise and target, predict, sample.

    pipe = load_pipeline("stabilityai/stable-diffusion-xl-base-1.0")     # or a folder, base+adapters,
    random:sdxl family = family_of(pipe)                                             # the class below that
    fits cond = family.encode_prompts(pipe, ["a cat"], size=(1024, 1024))     # {name: (N, ...)}
    x = family.encode_images(pipe.vae, pixels)                           # (N, C, h, w)
    x_t, t, target = add_noise(pipe.scheduler, x, noise, u)              # u (N,) uniform in [0, 1)
    prediction = family.predict(pipe.unet, x_t, t, cond)

A family is one class: `StableDiffusion` is the base, the others say where they differ from it. A family that
is only sampled from (PixArt, Stable Cascade) needs `sampling` alone. Nothing else in this project asks which
family a model is of.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from common import fail, process_rank, publish

# ----------------------------------------------------------------------------- families


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a U-Net that predicts noise or v. N prompts or images, errors raised by
    diffusers."""

    def encode_prompts(self, pipe, prompts, size):
        """All that the denoiser is conditioned on: {name: (N, ...) tensor}. `size` is (height, width) in
        pixels."""
        embeds, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)
        return {"embeds": embeds}

    def encode_images(self, vae, pixels):
        """(N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w): the mean of the posterior, so that a cache
        has one answer."""
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
        return (z - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor

    def predict(self, model, x_t, t, cond):
        """What the denoiser predicts, (N, C, h, w), of x_t (N, C, h, w) at timesteps t (N,), given
        encode_prompts'."""
        return model(x_t, t, encoder_hidden_states=cond["embeds"], return_dict=False)[0]

    def sampling(self, pipe, steps, guidance, resolution=0):
        """The pipeline's arguments for sampling; resolution 0 is the pipeline's own."""
        size = dict(height=resolution, width=resolution) if resolution else {}
        return dict(num_inference_steps=steps, guidance_scale=guidance, **size)

    def prompt_arguments(self, pipe, cond, nothing):
        """encode_prompts' of prompts and of "" -> the pipeline's arguments in their place."""
        return {"prompt_embeds": cond["embeds"], "negative_prompt_embeds": nothing["embeds"]}

    def shapes(self, config):
        """Shapes of one image's latents and of its conditioning at the model's own size, from the denoiser's
        config."""
        latents = (config.in_channels, config.sample_size, config.sample_size)
        return {"latents": latents, "embeds": (77, config.cross_attention_dim)}

    def random_pipeline(self):
        """A pipeline of the real size with random weights, nothing but denoiser and scheduler: to measure."""
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        scheduler = diffusers.DDPMScheduler(**BETAS)
        return diffusers.StableDiffusionPipeline(
            unet=unet, scheduler=scheduler, **nothing, requires_safety_checker=False
        )


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled embedding, and the picture's size and crop as "time ids"."""

    def encode_prompts(self, pipe, prompts, size):
        device = pipe.text_encoder.device
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        h, w = size  # micro-conditioning stays fp32: bf16 rounds 1023 to 1024
        time_ids = torch.tensor([h, w, 0, 0, h, w], dtype=torch.float32, device=device)
        return {"embeds": embeds, "pooled": pooled, "time_ids": time_ids.repeat(len(prompts), 1)}

    def predict(self, model, x_t, t, cond):
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        embeds = cond["embeds"]
        return model(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    def prompt_arguments(self, pipe, cond, nothing):
        keep = 0 if pipe.config.get("force_zeros_for_empty_prompt", False) else 1
        return {
            "prompt_embeds": cond["embeds"],
            "pooled_prompt_embeds": cond["pooled"],
            "negative_prompt_embeds": nothing["embeds"] * keep,
            "negative_pooled_prompt_embeds": nothing["pooled"] * keep,
        }

    def shapes(self, config):
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().shapes(config), "pooled": (pooled,), "time_ids": (6,)}

    def random_pipeline(self):
        unet = diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        nothing = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        return diffusers.StableDiffusionXLPipeline(
            unet=unet, scheduler=diffusers.DDPMScheduler(**BETAS), **nothing
        )


class StableDiffusion3(StableDiffusion):
    """SD3 and SD3.5: a transformer that predicts the velocity of a rectified flow; the T5 encoder may be
    absent."""

    def text_length(self, pipe):
        """T5's: 256 as the pipeline has it, unless the tokenizer is shorter than CLIP's 77 (the toy
        models)."""
        return 256 if pipe.tokenizer.model_max_length >= 77 else pipe.tokenizer.model_max_length

    def encode_prompts(self, pipe, prompts, size):
        more = dict(do_classifier_free_guidance=False, max_sequence_length=self.text_length(pipe))
        device = pipe.text_encoder.device
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=device, **more)
        return {"embeds": embeds, "pooled": pooled}

    def predict(self, model, x_t, t, cond):
        text = dict(encoder_hidden_states=cond["embeds"], pooled_projections=cond["pooled"])
        return model(x_t, timestep=t, **text, return_dict=False)[0]

    def sampling(self, pipe, steps, guidance, resolution=0):
        return {
            **super().sampling(pipe, steps, guidance, resolution),
            "max_sequence_length": self.text_length(pipe),
        }

    def prompt_arguments(self, pipe, cond, nothing):
        return {
            "prompt_embeds": cond["embeds"],
            "pooled_prompt_embeds": cond["pooled"],
            "negative_prompt_embeds": nothing["embeds"],
            "negative_pooled_prompt_embeds": nothing["pooled"],
        }

    def shapes(self, config):
        latents = (config.in_channels, 128, 128)  # sample_size is the position table's in some checkpoints
        if config.sample_size < 128:
            latents = (config.in_channels, config.sample_size, config.sample_size)
        pooled = (config.pooled_projection_dim,)
        return {"latents": latents, "embeds": (333, config.joint_attention_dim), "pooled": pooled}

    def random_pipeline(self):
        transformer = diffusers.SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            pos_embed_max_size=192,
            pooled_projection_dim=2048,
            caption_projection_dim=1536,
        )
        names = (
            "vae",
            "text_encoder",
            "text_encoder_2",
            "text_encoder_3",
            "tokenizer",
            "tokenizer_2",
            "tokenizer_3",
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return diffusers.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=scheduler, **dict.fromkeys(names)
        )


class PixArt(StableDiffusion):
    """PixArt-Sigma, sampled from only."""

    def sampling(self, pipe, steps, guidance, resolution=0):
        # cleaning captions would need packages that may or may not be there
        return {**super().sampling(pipe, steps, guidance, resolution), "clean_caption": False}


class StableCascade(StableDiffusion):
    """Stable Cascade, sampled from only: steps and guidance are the prior's, the decoder keeps its card's 10
    steps."""

    def sampling(self, pipe, steps, guidance, resolution=0):
        prior = dict(prior_num_inference_steps=steps, prior_guidance_scale=guidance)
        size = dict(height=resolution, width=resolution) if resolution else {}
        return dict(prior, num_inference_steps=10, **size)


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
TRAINABLE = {"sdxl": StableDiffusionXL(), "sd3": StableDiffusion3(), "sd15": StableDiffusion()}
FAMILIES = {  # the first whose name the pipeline's class begins with
    "StableDiffusionXL": TRAINABLE["sdxl"],
    "StableDiffusion3": TRAINABLE["sd3"],
    "StableDiffusion": TRAINABLE["sd15"],
    "PixArt": PixArt(),
    "StableCascade": StableCascade(),
}


def family_of(pipe, trainable=False):
    """The family of a pipeline; one that nobody described is sampled from like Stable Diffusion."""
    kind = type(pipe).__name__
    family = next((f for name, f in FAMILIES.items() if kind.startswith(name)), StableDiffusion())
    if trainable and (family not in TRAINABLE.values() or not kind.startswith("StableDiffusion")):
        fail(f"{kind}: the trainer knows Stable Diffusion 1.x / 2.x, SDXL and SD3 pipelines")
    return family


# ----------------------------------------------------------------------------- noise and target


def add_noise(scheduler, x, noise, u, timesteps="logit_normal"):
    """x_t, the model's timestep and its target, for u (N,) uniform in [0, 1). x, noise: (N, C, h, w) fp32 or
    wider.

    Diffusion: t = floor(1000 u), x_t = alpha x + sigma eps, target eps or v = alpha eps - sigma x.
    Rectified flow: sigma = u or logit-normal, then the scheduler's shift, x_t = (1 - sigma) x + sigma eps,
    target eps - x."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if timesteps == "logit_normal":  # (0, 1), as SD3 was trained; mps lacks ndtri
            u = torch.sigmoid(torch.special.ndtri(u.cpu().clamp(1e-4, 1 - 1e-4))).to(u)
        sigma = scheduler.config.shift * u / (1 + (scheduler.config.shift - 1) * u)  # (N,)
        s = sigma.view(shape)
        return (1 - s) * x + s * noise, 1000 * sigma, noise - x
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        fail(f"the scheduler predicts {kind!r}; only epsilon, v_prediction and rectified flow are known")
    t = (u * scheduler.config.num_train_timesteps).long()  # (N,)
    alpha_bar = scheduler.alphas_cumprod.to(x.device)[t].view(shape)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    target = alpha * noise - sigma * x if kind == "v_prediction" else noise
    return alpha * x + sigma * noise, t, target


# ----------------------------------------------------------------------------- load and save


def load_pipeline(path, device="cpu", dtype=torch.float32):
    """Any diffusers text-to-image pipeline from a folder or a hub id; "base+folder" adds LoRA weights to it,
    and "random:sdxl" is one of the real size with random weights. A component that was saved as null (a
    safety checker, the T5 of SD3) stays None: some pipelines ask for that in so many words."""
    if str(path).startswith("random:"):
        return random_pipeline(str(path)[7:], device, dtype)
    path, _, adapters = str(path).partition("+")
    kwargs, index = {}, Path(path) / "model_index.json"
    if not index.is_file() and (Path(path).exists() or path.startswith((".", "/"))):
        fail(f"{path}: not a diffusers pipeline folder (no model_index.json in it)")
    if not hasattr(
        diffusers.pipelines, "wuerstchen"
    ):  # where Stable Cascade's index looks for its VQGAN; it moved
        with suppress(ImportError):
            from diffusers.pipelines.deprecated import wuerstchen

            diffusers.pipelines.wuerstchen = wuerstchen
    try:
        if index.is_file():
            parts = json.loads(index.read_text())
            kwargs = {k: None for k, v in parts.items() if isinstance(v, list) and v[0] is None}
        kwargs.update(dtype=dtype, use_safetensors=True)
        try:  # the text-to-image pipeline of that family: Stable Cascade's has two halves
            pipe = AutoPipelineForText2Image.from_pretrained(path, **kwargs)
        except ValueError:  # a family for which diffusers has no such entry
            pipe = DiffusionPipeline.from_pretrained(path, **kwargs)
        if adapters:
            pipe.load_lora_weights(adapters)
            pipe.fuse_lora()  # into the weights: a model like any other, to tune or to save
            pipe.unload_lora_weights()
    except Exception as e:  # torn weights, no hub, another format: one line says which folder
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        fail(f"{path}: could not load a pipeline: {reason}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def random_pipeline(name, device, dtype):
    """random:NAME, the same weights on every process."""
    if name not in TRAINABLE:
        fail(f"random:{name}: there are {', '.join(f'random:{n}' for n in TRAINABLE)}")
    torch.manual_seed(0)
    with torch.device(device):
        pipe = TRAINABLE[name].random_pipeline()
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def denoiser_of(pipe):
    """("unet" or "transformer", the module that is trained)."""
    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    return name, getattr(pipe, name)


def text_encoders_of(pipe):
    return {n: m for n, m in pipe.components.items() if n.startswith("text_encoder") and m is not None}


def save_pipeline(pipe, folder):
    publish(folder, lambda tmp: pipe.save_pretrained(tmp, safe_serialization=True))


def add_adapters(model, rank, dtype):
    """LoRA on the attention projections, in fp32 or wider, over frozen weights of the compute type."""
    from peft import LoraConfig

    model.requires_grad_(False).to(dtype)
    torch.manual_seed(0)  # of A; B starts at 0, so the policy starts as the base
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    more = dict(init_lora_weights="gaussian", target_modules=projections)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, **more))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.promote_types(dtype, torch.float32))
    return model


def save_tuned(folder, base, model, part, adapters):
    """The pipeline `base` with `model` as its `part`, or that model's adapters. Called by every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not adapters:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)  # by all processes
        if process_rank()[0] == 0:
            pipe = load_pipeline(base)
            getattr(pipe, part).load_state_dict(state)
            save_pipeline(pipe, folder)
    elif process_rank()[0] == 0:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        state = {f"{part}.{n}": p.float().cpu().contiguous() for n, p in layers.items()}

        def write(tmp):  # the file that pipe.load_lora_weights looks for
            tmp.mkdir()
            save_file(state, tmp / "pytorch_lora_weights.safetensors", {"format": "pt"})

        publish(folder, write)


def count_flops(family, denoiser, item, lora_rank=0):
    """(FLOPs, trained parameters, frozen ones) of one image a step: forward of the reference, forward and
    backward of the policy. On the meta device, where nothing is computed; `item` is a list as cached."""
    with torch.device("meta"):
        network = type(denoiser).from_config(denoiser.config).eval()
        cond = {name: torch.empty(1, *t.shape) for name, t in item.items() if name != "latents"}
        x, t = torch.empty(1, *item["latents"].shape[1:]), torch.empty(1)
        if lora_rank:
            add_adapters(network, lora_rank, torch.float32)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            family.predict(network, x, t, cond)
        family.predict(network, x, t, cond).sum().backward()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return counter.get_total_flops(), trained, sum(p.numel() for p in network.parameters()) - trained


# ----------------------------------------------------------------------------- sampling


def noise_seed(prompt, model, seed):
    """The starting noise of (prompt, model, seed): the same in any order, batch or process."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{model}|{prompt}".encode()).digest()[:7], "big")


def generate(pipe, prompts, seeds, settings):
    """One batch -> [(PIL image, None) or (None, what is wrong with it)]. Every image has its own generator,
    on the CPU: the same noise on every device. `settings` has steps, guidance and resolution."""
    kwargs = family_of(pipe).sampling(pipe, settings["steps"], settings["guidance"], settings["resolution"])
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    images = pipe(
        prompt=list(prompts), generator=generators, output_type="np", **kwargs
    ).images  # (N, H, W, 3)
    results = []
    for x in images:  # in [0, 1]
        if not np.isfinite(x).all():
            results.append((None, "not a number in the image"))
        elif not x.any():
            results.append((None, "an all-black image (a safety checker?)"))
        else:
            results.append((Image.fromarray((x * 255).round().astype(np.uint8)), None))
    return results


def generate_each(pipe, prompts, seeds, settings):
    """generate(), and where it raises, the batch's images one by one, so that the one that fails is named."""
    try:
        return generate(pipe, prompts, seeds, settings)
    except torch.cuda.OutOfMemoryError:
        fail(f"out of GPU memory; lower --batch_size (now {len(prompts)} images)")
    except Exception as e:
        if len(prompts) == 1:
            reason = " ".join(str(e).split())[:200]
            return [(None, f"the generator raised {type(e).__name__}: {reason}")]
        each = (generate_each(pipe, [p], [s], settings) for p, s in zip(prompts, seeds))
        return [result for one in each for result in one]


@torch.no_grad()
def encode_and_drop_encoders(pipe, prompts, size, device, dtype):
    """Prompts -> the arguments with which `pipe` draws them once its text encoders are gone, as they are from
    here on."""
    encoders, family = text_encoders_of(pipe), family_of(pipe)
    for m in encoders.values():
        m.to(device, dtype)
    cond, nothing = (family.encode_prompts(pipe, texts, size) for texts in (prompts, [""] * len(prompts)))
    arguments = family.prompt_arguments(pipe, cond, nothing)
    for name in [*encoders, "safety_checker"]:
        if hasattr(pipe, name):
            setattr(pipe, name, None)
    pipe.vae.enable_slicing()  # one image at a time: at 1024 px each takes gigabytes to decode
    return {"height": size[0], "width": size[1], **{k: v.float() for k, v in arguments.items()}}
