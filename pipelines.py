"""All that differs between model families: load, encode, noise and target, predict, sample.

    pipe = load_pipeline("folder or hub id")                           # or base+adapters, or random:sdxl
    family = family_of(pipe)                                           # the class below that fits
    cond = family.encode_prompts(pipe, ["a cat"], size=(1024, 1024))   # {name: (N, ...)}
    x = family.encode_images(pipe.vae, pixels)                         # (N, C, h, w)
    x_t, t, target = add_noise(pipe.scheduler, x, noise, u)            # u (N,) uniform in [0, 1)
    prediction = family.predict(pipe.unet, x_t, t, cond)

A family is one class: `StableDiffusion` is the base, the others say where they differ from it. A family that
is only sampled from (PixArt, Stable Cascade) needs `sampling` alone. Nothing else in this project asks which
family a model is of.
"""

import hashlib
import re
from contextlib import suppress
from inspect import signature
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from common import fail, parse_json, process_rank, publish, read_text

# ----------------------------------------------------------------------------- families


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a U-Net that predicts noise or v."""

    patch = 1  # the sides of latents are multiples of this
    nothing = ""  # what classifier-free guidance leads away from
    encoders = ("vae", "text_encoder", "tokenizer")  # those that it cannot do without

    def encode_prompts(self, pipe, prompts, size):
        """All that the denoiser is conditioned on: {name: (N, ...)}. `size` is (height, width) in pixels."""
        embeds, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)
        return {"embeds": embeds}

    def encode_images(self, vae, pixels):
        """(N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w): the mean of the posterior, so that a cache
        has one answer."""
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
        return (z - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor

    def predict(self, model, x_t, t, cond):
        """What the denoiser predicts, (N, C, h, w), of x_t (N, C, h, w), timesteps t (N,), prompts."""
        return model(x_t, t, encoder_hidden_states=cond["embeds"], return_dict=False)[0]

    def unused(self, model):
        """What names of the denoiser's parameters begin with whose results go nowhere, a tuple."""
        return ()

    def suits(self, pipe):
        """Steps and guidance of sampling where they are not given."""
        return SUITS[scale_of(pipe)]

    def sampling(self, pipe, steps, guidance, resolution=0):
        """The pipeline's arguments for sampling; resolution 0 is the pipeline's own."""
        size = dict(height=resolution, width=resolution) if resolution else {}
        return dict(num_inference_steps=steps, guidance_scale=guidance, **size)

    def texts(self, prompts):
        """The pipeline's arguments for a batch of prompts."""
        return {"prompt": list(prompts)}

    def prompt_arguments(self, cond, nothing):
        """encode_prompts' of prompts, and encode_nothing's -> the pipeline's arguments in their place."""
        arguments = {}
        names = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_embeds_mask"}
        for key, argument in names.items():
            if key in cond:
                arguments[argument] = cond[key]
                arguments[f"negative_{argument}"] = nothing[key].to(cond[key].device).expand_as(cond[key])
        return arguments

    def shapes(self, config):
        """Shapes of one image's latents and conditioning at the model's own size, from the config."""
        latents = (config.in_channels, config.sample_size, config.sample_size)
        return {"latents": latents, "embeds": (77, config.cross_attention_dim)}

    pipeline = diffusers.StableDiffusionPipeline

    def random_parts(self):
        """Denoiser, with random weights, and scheduler of the real model, as the pipeline calls them."""
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return dict(unet=unet, scheduler=diffusers.DDPMScheduler(**BETAS), requires_safety_checker=False)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled embedding, and the picture's size and crop as "time ids"."""

    encoders = (*StableDiffusion.encoders, "text_encoder_2", "tokenizer_2")

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

    def shapes(self, config):
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().shapes(config), "pooled": (pooled,), "time_ids": (6,)}

    pipeline = diffusers.StableDiffusionXLPipeline

    def random_parts(self):
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
        return dict(unet=unet, scheduler=diffusers.DDPMScheduler(**BETAS))


class StableDiffusion3(StableDiffusion):
    """SD3 and SD3.5: a transformer that predicts the velocity of a rectified flow; T5 may be absent."""

    def text_length(self, pipe):
        """T5's: 256 as the pipeline has it, unless the tokenizer is shorter than CLIP's 77: the toy's."""
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
        more = {"max_sequence_length": self.text_length(pipe)}
        return {**super().sampling(pipe, steps, guidance, resolution), **more}

    def shapes(self, config):
        side = min(config.sample_size, 128)  # sample_size is the position table's in some checkpoints
        embeds, pooled = (333, config.joint_attention_dim), (config.pooled_projection_dim,)
        return {"latents": (config.in_channels, side, side), "embeds": embeds, "pooled": pooled}

    pipeline = diffusers.StableDiffusion3Pipeline

    def random_parts(self):
        transformer = diffusers.SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            pos_embed_max_size=192,
            pooled_projection_dim=2048,
            caption_projection_dim=1536,
        )
        return dict(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


class Flux(StableDiffusion3):
    """FLUX.1 [dev], which takes guidance as an input, and [schnell], which does not: CLIP's pooled text and
    T5's, latents in 2 x 2 patches with their places. Text has no mask: T5's padding is part of the input."""

    patch = 2
    encoders = StableDiffusionXL.encoders

    def text_length(self, pipe):
        longest = 512 if pipe.transformer.config.guidance_embeds else 256
        return min(longest, pipe.tokenizer_2.model_max_length)  # the toy's is shorter

    def encode_prompts(self, pipe, prompts, size):
        length, device = self.text_length(pipe), pipe.text_encoder.device
        embeds, pooled, _ = pipe.encode_prompt(prompts, device=device, max_sequence_length=length)
        return {"embeds": embeds, "pooled": pooled}

    def predict(self, model, x_t, t, cond):
        h, w = (side // 2 for side in x_t.shape[-2:])
        places = [torch.arange(n, dtype=x_t.dtype, device=x_t.device) for n in (1, h, w)]
        guidance = torch.ones_like(t) if model.config.guidance_embeds else None  # 1: see docs/trainer.md
        prediction = model(
            to_patches(x_t),
            timestep=t / 1000,
            guidance=guidance,
            encoder_hidden_states=cond["embeds"],
            pooled_projections=cond["pooled"],
            img_ids=torch.cartesian_prod(*places),  # (h w, 3): 0, row, column
            txt_ids=x_t.new_zeros(cond["embeds"].shape[1], 3),
            return_dict=False,
        )[0]
        return from_patches(prediction, h, w)

    def suits(self, pipe):
        dev = pipe.transformer.config.guidance_embeds
        return dict(steps=28, guidance=3.5) if dev else dict(steps=4, guidance=0.0)

    def shapes(self, config):
        embeds = (512 if config.guidance_embeds else 256, config.joint_attention_dim)
        latents = (config.in_channels // 4, 128, 128)
        return {"latents": latents, "embeds": embeds, "pooled": (config.pooled_projection_dim,)}

    pipeline = diffusers.FluxPipeline

    def random_parts(self):
        """[dev]'s."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        return dict(transformer=transformer, scheduler=scheduler)


class QwenImage(Flux):
    """Qwen-Image: Qwen2.5-VL's text within a chat template, filled up to one length with a mask; a VAE of
    videos, of which a picture is the only frame; classifier-free guidance away from " "."""

    nothing = " "  # of its model card
    encoders = StableDiffusion.encoders

    def text_length(self, pipe):
        return min(512, pipe.tokenizer.model_max_length)  # as the pipeline cuts it; the toy's is shorter

    def encode_prompts(self, pipe, prompts, size):
        length, device = self.text_length(pipe), pipe.text_encoder.device
        embeds, mask = pipe.encode_prompt(prompts, device, max_sequence_length=length)
        if mask is None:  # the pipeline's word for: no padding
            mask = torch.ones(embeds.shape[:2], device=device)
        more = length - embeds.shape[1]
        pad = torch.nn.functional.pad
        return {"embeds": pad(embeds, (0, 0, 0, more)), "mask": pad(mask.bool(), (0, more))}

    def encode_images(self, vae, pixels):
        z = vae.encode(pixels[:, :, None].to(vae.device, vae.dtype)).latent_dist.mean[:, :, 0]
        of_channels = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (z.new_tensor(values)[:, None, None] for values in of_channels)
        return (z - mean) / std

    def predict(self, model, x_t, t, cond):
        h, w = (side // 2 for side in x_t.shape[-2:])
        prediction = model(
            to_patches(x_t),
            timestep=t / 1000,
            encoder_hidden_states=cond["embeds"],
            encoder_hidden_states_mask=cond["mask"],
            img_shapes=[[(1, h, w)]] * len(x_t),  # frames, rows, columns
            return_dict=False,
        )[0]
        return from_patches(prediction, h, w)

    def unused(self, model):  # the last block's text goes nowhere
        last = f"transformer_blocks.{len(model.transformer_blocks) - 1}."
        parts = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "txt_mlp.")
        return tuple(last + part for part in parts)

    def suits(self, pipe):
        return dict(steps=50, guidance=4.0)

    def texts(self, prompts):
        return {"prompt": list(prompts), "negative_prompt": [self.nothing] * len(prompts)}

    def sampling(self, pipe, steps, guidance, resolution=0):
        arguments = super().sampling(pipe, steps, guidance, resolution)
        return {"true_cfg_scale": arguments.pop("guidance_scale"), **arguments}

    def shapes(self, config):
        latents = (config.in_channels // 4, 128, 128)
        return {"latents": latents, "embeds": (512, config.joint_attention_dim), "mask": (512,)}

    pipeline = diffusers.QwenImagePipeline

    def random_parts(self):
        more = dict(base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **more)
        return dict(transformer=diffusers.QwenImageTransformer2DModel(), scheduler=scheduler)


def to_patches(x):
    """(N, C, 2h, 2w) -> (N, h w, 4C): 2 x 2 latent pixels a token."""
    return torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).mT


def from_patches(tokens, h, w):
    """(N, h w, 4C) -> (N, C, 2h, 2w)."""
    return torch.nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (h, w)), 2)


class PixArt(StableDiffusion):
    """PixArt-Sigma, sampled from only."""

    def sampling(self, pipe, steps, guidance, resolution=0):
        # cleaning captions would need packages that may or may not be there
        return {**super().sampling(pipe, steps, guidance, resolution), "clean_caption": False}


class StableCascade(StableDiffusion):
    """Stable Cascade, sampled from only: steps and guidance are the prior's, the decoder has 10 steps."""

    def sampling(self, pipe, steps, guidance, resolution=0):
        prior = dict(prior_num_inference_steps=steps, prior_guidance_scale=guidance)
        size = dict(height=resolution, width=resolution) if resolution else {}
        return dict(prior, num_inference_steps=10, **size)


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
TRAINABLE = {
    "sdxl": StableDiffusionXL(),
    "sd3": StableDiffusion3(),
    "sd15": StableDiffusion(),
    "flux": Flux(),
    "qwen": QwenImage(),
}
SUITS = {  # what suits a model where it is not said: sampling here, training in rankdpo.py
    "toy": dict(steps=16, guidance=2.0),
    "noise": dict(steps=40, guidance=5.0),
    "flow": dict(steps=28, guidance=7.0),
}
FAMILIES = {  # the first whose name the pipeline's class begins with
    "StableDiffusionXL": TRAINABLE["sdxl"],
    "StableDiffusion3": TRAINABLE["sd3"],
    "StableDiffusion": TRAINABLE["sd15"],
    "FluxPipeline": TRAINABLE["flux"],  # not FluxKontextPipeline or Flux2Pipeline
    "QwenImagePipeline": TRAINABLE["qwen"],
    "PixArt": PixArt(),
    "StableCascade": StableCascade(),
}


def family_of(pipe, trainable=False):
    """The family of a pipeline; one that nobody described is sampled from like Stable Diffusion."""
    kind = type(pipe).__name__
    family = next((f for name, f in FAMILIES.items() if kind.startswith(name)), StableDiffusion())
    if trainable and family not in TRAINABLE.values():
        fail(f"{kind}: the trainer knows Stable Diffusion 1.x / 2.x, SDXL, SD3, FLUX.1 and Qwen-Image")
    if trainable:
        if denoiser_of(pipe)[1] is None:
            fail(f"{pipe.name_or_path}: has no denoiser")
        check_scheduler(pipe.name_or_path, pipe.scheduler)
    return family


def check_scheduler(path, scheduler):
    """It must say how much noise there is at each timestep, and predict what add_noise can give."""
    levels = getattr(scheduler, "alphas_cumprod", getattr(scheduler, "sigmas", torch.zeros(0)))
    steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 0)
    if len(levels) != steps or not levels.any() or not ((0 <= levels) & (levels <= 1)).all():
        fail(
            f"{path}/scheduler: no level of noise from 0 to 1 for each of {steps} timesteps; mend its config"
        )
    kind = scheduler.config.get("prediction_type", "flow")
    if kind not in ("epsilon", "v_prediction", "flow"):
        fail(f"{path}/scheduler: predicts {kind!r}; only epsilon, v_prediction and rectified flow are known")


def scale_of(pipe):
    """toy, noise or flow: a small model, or one of real size that predicts noise (or v) or velocity."""
    if sum(p.numel() for p in denoiser_of(pipe)[1].parameters()) < 50e6:
        return "toy"
    return "flow" if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) else "noise"


# ----------------------------------------------------------------------------- noise and target


def noise_levels(scheduler, u, timesteps="logit_normal"):
    """alpha, sigma and the model's timestep t, each (N,), for u (N,) in [0, 1): x_t = alpha x + sigma eps.

    Diffusion: t = floor(1000 u). Rectified flow: sigma = u or logit-normal, then the scheduler's shift,
    alpha = 1 - sigma, t = 1000 sigma. A shift that depends on the resolution is of sampling alone."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if timesteps == "logit_normal":  # (0, 1), as SD3 was trained; mps lacks ndtri
            u = torch.sigmoid(torch.special.ndtri(u.cpu().clamp(1e-4, 1 - 1e-4))).to(u)
        shift = 1.0 if scheduler.config.use_dynamic_shifting else scheduler.config.shift
        sigma = shift * u / (1 + (shift - 1) * u)
        return 1 - sigma, sigma, 1000 * sigma
    t = (u * scheduler.config.num_train_timesteps).long()
    alpha_bar = scheduler.alphas_cumprod.to(u.device)[t]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), t


def add_noise(scheduler, x, noise, u, timesteps="logit_normal"):
    """x_t, the model's timestep and its target, for u (N,) uniform in [0, 1). x, noise: (N, C, h, w).

    The target of diffusion is eps or v = alpha eps - sigma x, that of rectified flow eps - x."""
    alpha, sigma, t = noise_levels(scheduler, u, timesteps)
    alpha, sigma = (level.view((-1,) + (1,) * (x.dim() - 1)) for level in (alpha, sigma))
    kind = scheduler.config.get("prediction_type", "flow")
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "flow": noise - x}[kind]
    return alpha * x + sigma * noise, t, target


def clean_latents(scheduler, x_t, prediction, alpha, sigma):
    """The latents x that a prediction of eps, v or velocity at x_t stands for; alpha, sigma fit x_t."""
    kind = scheduler.config.get("prediction_type", "flow")
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha
    return alpha * x_t - sigma * prediction if kind == "v_prediction" else x_t - sigma * prediction


# ----------------------------------------------------------------------------- load and save


def check_pipeline(path):
    """Fail now if no pipeline lies at `path`, a folder or a hub id, not after hours of work with another."""
    base, *adapters = str(path).split("+")
    index = Path(base) / "model_index.json"
    for folder in adapters:
        if folder.startswith((".", "/")) and not Path(folder).exists():
            fail(f"{path}: no such file or folder: {folder}")
    if index.is_file():
        try:
            parts = parse_json(read_text(index))
            names = [name for name, part in parts.items() if isinstance(part, list) and part[0]]
        except (ValueError, AttributeError, IndexError):
            fail(f"{index}: damaged; it is no list of a pipeline's parts")
        if missing := [name for name in names if not (Path(base) / name).is_dir()]:
            fail(f"{path}: not a whole pipeline folder, {', '.join(missing)} is missing")
    elif Path(base).exists() or base.startswith((".", "/")) or base.count("/") > 1:
        fail(f"{path}: not a diffusers pipeline folder (no model_index.json in it)")
    else:
        try:
            DiffusionPipeline.load_config(base)
        except Exception as e:  # the hub has many errors: not found, no licence agreed to, no network
            reason = " ".join(str(e).split())[:200]
            fail(f"{path}: no such folder, and the hub does not give such a pipeline ({reason})")


def load_pipeline(path, device="cpu", dtype=torch.float32, denoiser=True, encoders=True):
    """Any diffusers text-to-image pipeline from a folder or a hub id; "base+folder" adds LoRA weights to it,
    "base+first+second" one set after the other; "random:sdxl" is one of the real size with random weights.
    A part that was saved as null (a safety checker, the T5 of SD3) stays None. Without `denoiser` its weights
    are not read but stay on the meta device, without `encoders` VAE and text encoders are None; adapters may
    belong to any of them, so with them all are read."""
    if str(path).startswith("random:"):
        return random_pipeline(str(path).removeprefix("random:"), device if denoiser else "meta", dtype)
    check_pipeline(path)
    whole, (path, *adapters) = path, str(path).split("+")
    denoiser, encoders = denoiser or bool(adapters), encoders or bool(adapters)
    with suppress(ImportError):  # Stable Cascade's index looks for its VQGAN where it was before it moved
        from diffusers.pipelines.deprecated import wuerstchen

        diffusers.pipelines.wuerstchen = wuerstchen
    try:
        kwargs = dict(load_parts(path, dtype, denoiser, encoders), dtype=dtype, use_safetensors=True)
        try:  # the text-to-image pipeline of that family: Stable Cascade's has two halves
            pipe = AutoPipelineForText2Image.from_pretrained(path, **kwargs)
        except ValueError:  # a family for which diffusers has no such entry
            pipe = DiffusionPipeline.from_pretrained(path, **kwargs)
        for folder in adapters:
            load_adapters(pipe, folder)
            pipe.fuse_lora()  # into the weights: a model like any other, to tune or to save
            pipe.unload_lora_weights()
    except Exception as e:  # torn weights, no hub, another format: one line says which folder
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        fail(f"{whole}: could not load a pipeline: {reason}")
    check_tokenizers(path, pipe)
    for name, part in pipe.components.items():
        numbers = part.parameters() if isinstance(part, torch.nn.Module) else ()
        if not all(p.is_meta or p.isfinite().all() for p in numbers):
            fail(f"{whole}: {name} holds weights that are not finite")
    pipe.set_progress_bar_config(disable=True)
    return pipe if torch.device(device).type == "cpu" else pipe.to(device)


def load_parts(path, dtype, denoiser, encoders):
    """{name: module or None} of a pipeline's parts with weights, each with exactly the tensors that its
    configuration asks for: from_pretrained itself only warns, and draws what is missing at random."""
    parts = {}
    for name, value in DiffusionPipeline.load_config(path).items():
        library, kind = value if isinstance(value, list) and len(value) == 2 else ("", "")
        if kind is None:
            parts[name] = None  # some pipelines ask for that in so many words
        kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind or "", None)
        if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
            continue
        is_denoiser = name in ("unet", "transformer")
        if is_denoiser and not denoiser:
            with torch.device("meta"):
                parts[name] = kind.from_config(kind.load_config(path, subfolder=name))
        elif is_denoiser or encoders:
            more = dict(subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True)
            try:
                parts[name], info = kind.from_pretrained(path, **more)
            except Exception as e:
                raise ValueError(f"{name}: {e}") from None
            if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
                raise ValueError(f"{name}: tensors are missing or have another shape: {str(wrong)[:150]}")
            if surplus := [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]:
                print(f"{path}: {len(surplus)} tensors of {name} are not used by its config, as {surplus[0]}")
        else:
            parts[name] = None
    return parts


def load_adapters(pipe, path):
    """Those of a denoiser, whole: diffusers takes a file of another family for no adapters at all, and draws
    the half of a pair that is missing at random."""
    state = pipe.lora_state_dict(path)
    names = list(state[0] if isinstance(state, tuple) else state)
    down, up = (
        {re.sub(half, "", name) for name in names if re.search(half, name)}
        for half in (r"lora_A\.|lora\.down\.", r"lora_B\.|lora\.up\.")
    )
    if not down or down != up:
        raise ValueError(f"{path}: holds no whole adapters")
    pipe.load_lora_weights(path)
    if not pipe.get_list_adapters():
        raise ValueError(f"{path}: holds adapters of another kind of model")


def check_tokenizers(path, pipe):
    """transformers does not fail where a tokenizer's files are gone, but returns one of 2 to 5 words."""
    for name, encoder in text_encoders_of(pipe).items():
        tokenizer = pipe.components.get(name.replace("text_encoder", "tokenizer"))
        words, wanted = len(tokenizer or ()), encoder.get_input_embeddings().num_embeddings
        if not 0.99 * wanted <= words <= wanted:  # T5's embedding is padded to a multiple of 128
            folder, sizes = name.replace("text_encoder", "tokenizer"), f"{words} words, not {wanted}"
            fail(f"{path}/{folder}: {sizes} as {name} wants; put the model's tokenizer files there")
        if "clip" in encoder.config.model_type:
            if tokenizer.model_max_length > encoder.config.max_position_embeddings:  # 10**30 if nobody says
                folder = name.replace("text_encoder", "tokenizer")
                fail(f"{path}/{folder}: tokenizer_config.json lacks model_max_length; put the model's there")


def random_pipeline(name, device, dtype):
    """random:NAME, nothing but denoiser and scheduler: to measure. The same weights on every process."""
    if name not in TRAINABLE:
        fail(f"random:{name}: there are {', '.join(f'random:{n}' for n in TRAINABLE)}")
    torch.manual_seed(0)
    family = TRAINABLE[name]
    with torch.device(device):
        parts = family.random_parts()
    scheduler = parts["scheduler"]  # its levels are looked at, which have no values on the meta device
    parts["scheduler"] = type(scheduler).from_config(scheduler.config)
    wanted = signature(family.pipeline).parameters.values()
    missing = {p.name: None for p in wanted if p.default is p.empty and p.name not in parts}
    pipe = family.pipeline(**parts, **missing)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def denoiser_of(pipe):
    """("unet" or "transformer", the module that is trained)."""
    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    return name, getattr(pipe, name)


def text_encoders_of(pipe):
    return {n: m for n, m in pipe.components.items() if n.startswith("text_encoder") and m is not None}


def save_pipeline(pipe, folder, card=""):
    def write(tmp):
        pipe.save_pretrained(tmp, safe_serialization=True)
        if card:
            (tmp / "README.md").write_text(card, encoding="utf-8")

    publish(folder, write)


def add_adapters(model, rank, dtype):
    """LoRA on the attention projections, in fp32 or wider, over frozen weights of the compute type."""
    from peft import LoraConfig

    model.requires_grad_(False)
    torch.manual_seed(0)  # of A; B starts at 0, so the policy starts as the base
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    more = dict(init_lora_weights="gaussian", target_modules=projections)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, **more))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.promote_types(dtype, torch.float32))
    return model


def model_card(base, adapters, about):
    """README.md of a tuned folder, as the hub shows it. `about`: {title: {name: value}}."""
    from huggingface_hub import ModelCard, ModelCardData

    source, licence = Path(base.split("+")[0]), {}
    with suppress(Exception):  # a base without a card
        card = ModelCard.load(source / "README.md" if source.is_dir() else str(source))
        licence = {k: v for k, v in card.data.to_dict().items() if k.startswith("license")}
    tags = ["text-to-image", "preference-alignment", *(["lora"] if adapters else [])]
    hub = {} if source.is_dir() else dict(base_model=str(source))
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **hub, **licence)
    lines = ["---", data.to_yaml(), "---", f"# {source.name}, tuned by rankdpo.py", ""]
    how = "pipe.load_lora_weights(FOLDER)" if adapters else "DiffusionPipeline.from_pretrained(FOLDER)"
    lines += [f"Base: {base}. Load with `{how}`.", ""]
    lines += [] if licence else ["Licence: not known; that of the base, whose card names none.", ""]
    for title, values in about.items():
        rows = [f"| {name} | {value} |" for name, value in values.items()]
        lines += [f"## {title}", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def save_tuned(folder, base, model, part, adapters, about):
    """The pipeline `base` with `model` as its `part`, or that model's adapters, and a card that says what it
    is. Called by every process; `about` is the first one's."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if base.startswith("random:"):
        print(f"{base}: measured, not trained; nothing is saved")
        return
    if not adapters:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)  # by all processes
        if process_rank()[0] == 0:
            pipe = load_pipeline(base, denoiser=False)
            getattr(pipe, part).load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
            save_pipeline(pipe, folder, model_card(base, adapters, about))
    elif process_rank()[0] == 0:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        state = {f"{part}.{n}": p.float().cpu().contiguous() for n, p in layers.items()}

        def write(tmp):  # the file that pipe.load_lora_weights looks for
            tmp.mkdir()
            save_file(state, tmp / "pytorch_lora_weights.safetensors", {"format": "pt"})
            (tmp / "README.md").write_text(model_card(base, adapters, about), encoding="utf-8")

        publish(folder, write)


# ----------------------------------------------------------------------------- sampling


def noise_seed(prompt, model, seed):
    """The starting noise of (prompt, model, seed): the same in any order, batch or process."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{model}|{prompt}".encode()).digest()[:7], "big")


def generate(pipe, prompts, seeds, settings):
    """One batch -> [(PIL image, None) or (None, what is wrong with it)]. Every image has its own generator,
    on the CPU: the same noise on every device. `settings` has steps, guidance and resolution."""
    family = family_of(pipe)
    kwargs = family.sampling(pipe, settings["steps"], settings["guidance"], settings["resolution"])
    kwargs.update(family.texts(prompts))
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    images = pipe(**kwargs, generator=generators, output_type="np").images  # (N, H, W, 3)
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
def encode_nothing(pipe, size, device, dtype):
    """encode_prompts' of no caption, {name: tensor} of an image, as guidance has it: SDXL's text is zeros."""
    for encoder in text_encoders_of(pipe).values():
        encoder.to(device, dtype)
    family = family_of(pipe)
    cond = family.encode_prompts(pipe, [family.nothing], size)
    zero = pipe.config.get("force_zeros_for_empty_prompt", False)
    return {name: (c[0] * (not zero or name == "time_ids")).cpu() for name, c in cond.items()}


@torch.no_grad()
def encode_and_drop_encoders(pipe, prompts, size, device, dtype):
    """Prompts -> the arguments with which `pipe` draws them without its text encoders, which are dropped."""
    family, nothing = family_of(pipe), encode_nothing(pipe, size, device, dtype)  # moves the encoders, too
    arguments = family.prompt_arguments(family.encode_prompts(pipe, prompts, size), nothing)
    for name in [*text_encoders_of(pipe), "safety_checker"]:
        if hasattr(pipe, name):
            setattr(pipe, name, None)
    pipe.vae.enable_slicing()  # one image at a time: at 1024 px each takes gigabytes to decode
    wide = torch.promote_types(dtype, torch.float32)
    return {"height": size[0], "width": size[1], **{k: v.to(wide) for k, v in arguments.items()}}
