"""What differs between model families: loading, encoding, noise and target, prediction, sampling.

    pipe = load_pipeline("folder or hub id")                           # or base+adapters, or random:sdxl
    family = family_of(pipe)                                           # the class below that fits
    cond = family.encode_prompts(pipe, ["a cat"], size=(1024, 1024))   # {name: (N, ...)}
    x = family.encode_images(pipe.vae, pixels)                         # (N, C, h, w)
    x_t, t, target = add_noise(pipe.scheduler, x, noise, u)            # u (N,) uniform in [0, 1)
    prediction = family.predict(pipe.unet, x_t, t, cond)

A family is one class. `StableDiffusion` is the base, and each other class overrides what differs. A family
that is only sampled (PixArt, Stable Cascade) overrides `sampling` alone. No other file names a family.
"""

import hashlib
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

from lib.common import fail, one_line, process_rank
from lib.formats import find_addition, load_adapters, load_denoiser, loading, quiet, split_spec, stored_as
from lib.store import publish

# ----------------------------------------------------------------------------- families


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a U-Net that predicts noise or v."""

    patch = 1  # the sides of latents are multiples of this
    negative_prompt = ""  # classifier-free guidance leads away from it
    flow = False  # whether only a rectified flow fits
    encoders = ("vae", "text_encoder", "tokenizer")  # the parts without which no data set can be encoded

    def encode_prompts(self, pipe, prompts, size):
        """N prompts -> the denoiser's conditioning, {name: (N, ...)}. `size` is (height, width) in pixels."""
        embeds, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)
        return {"embeds": embeds}

    def encode_images(self, vae, pixels):
        """Pixels (N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w). They are the posterior's mean, so
        that cached latents depend on no seed."""
        z = vae.encode(pixels.to(vae.device, vae.dtype))
        z = z.latent_dist.mean if hasattr(z, "latent_dist") else z.latents  # AutoencoderTiny has no posterior
        if (
            mean := getattr(vae.config, "latents_mean", None)
        ) is not None:  # per channel, as diffusers decodes
            mean, std = (torch.tensor(v).to(z).view(1, -1, 1, 1) for v in (mean, vae.config.latents_std))
            return (z - mean) * vae.config.scaling_factor / std
        return (z - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor

    def predict(self, model, x_t, t, cond):
        """The denoiser's prediction (N, C, h, w) at x_t (N, C, h, w), t (N,) and conditioning `cond`."""
        return model(x_t, t, encoder_hidden_states=cond["embeds"], return_dict=False)[0]

    def unused(self, model):
        """Prefixes of the parameters that do not change the prediction, a tuple: they get no gradient."""
        return ()

    def suits(self, pipe):
        """The default steps and guidance of sampling, {name: value}."""
        return SUITS[scale_of(pipe)]

    def sampling(self, pipe, steps, guidance, resolution=0):
        """Arguments of the pipeline's call. `resolution` is a side in pixels or "WIDTHxHEIGHT"; 0 is the
        pipeline's own size."""
        return dict(num_inference_steps=steps, guidance_scale=guidance, **size_arguments(resolution))

    def texts(self, prompts):
        """Arguments of the pipeline's call for a batch of prompts."""
        return {"prompt": list(prompts)}

    def prompt_arguments(self, cond, negative):
        """Conditioning of N prompts and of one negative prompt -> the arguments that replace texts()."""
        arguments = {}
        names = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_embeds_mask"}
        for key, argument in names.items():
            if key in cond:
                arguments[argument] = cond[key]
                arguments[f"negative_{argument}"] = negative[key].to(cond[key].device).expand_as(cond[key])
        return arguments

    def shapes(self, config):
        """Shapes of one image's latents and conditioning at the model's native size, from its config."""
        latents = (config.in_channels, config.sample_size, config.sample_size)
        return {"latents": latents, "embeds": (77, config.cross_attention_dim)}

    pipeline = diffusers.StableDiffusionPipeline

    def random_parts(self):
        """{part's name: part} of the real model's size: a denoiser with random weights, and a scheduler."""
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

    patch, flow = 2, True

    def text_length(self, pipe):
        """Tokens of T5's text: 256, the pipeline's default. The toy's tokenizer is shorter."""
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
        side = min(config.sample_size, 128)  # some checkpoints give the position table's size
        embeds, pooled = (333, config.joint_attention_dim), (config.pooled_projection_dim,)
        return {"latents": (config.in_channels, side, side), "embeds": embeds, "pooled": pooled}

    pipeline = diffusers.StableDiffusion3Pipeline

    def random_parts(self):
        transformer = diffusers.SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, pos_embed_max_size=192, caption_projection_dim=1536
        )
        return dict(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


class Flux(StableDiffusion3):
    """FLUX.1 [dev] and [schnell]; [dev] takes guidance as an input. Text is CLIP's pooled embedding and T5's
    tokens, whose padding is not masked. Latents enter as 2 x 2 patches with their positions."""

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
        positions = [torch.arange(n, dtype=x_t.dtype, device=x_t.device) for n in (1, h, w)]
        guidance = torch.ones_like(t) if model.config.guidance_embeds else None  # 1: see docs/trainer.md
        prediction = model(
            to_patches(x_t),
            timestep=t / 1000,
            guidance=guidance,
            encoder_hidden_states=cond["embeds"],
            pooled_projections=cond["pooled"],
            img_ids=torch.cartesian_prod(*positions),  # (h w, 3): 0, row, column
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
        """Those of [dev]."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        return dict(transformer=transformer, scheduler=scheduler)


class QwenImage(Flux):
    """Qwen-Image: Qwen2.5-VL encodes the prompt inside a chat template, and a mask marks the padding. The VAE
    encodes videos; an image is a video of one frame."""

    negative_prompt = " "  # as in the model card
    encoders = StableDiffusion.encoders

    def text_length(self, pipe):
        return min(512, pipe.tokenizer.model_max_length)  # the pipeline's default; the toy's is shorter

    def encode_prompts(self, pipe, prompts, size):
        length, device = self.text_length(pipe), pipe.text_encoder.device
        embeds, mask = pipe.encode_prompt(prompts, device, max_sequence_length=length)
        if mask is None:  # the pipeline returns none where no prompt is padded
            mask = torch.ones(embeds.shape[:2], device=device)
        more = length - embeds.shape[1]
        pad = torch.nn.functional.pad
        return {"embeds": pad(embeds, (0, 0, 0, more)), "mask": pad(mask.bool(), (0, more))}

    def encode_images(self, vae, pixels):
        z = vae.encode(pixels[:, :, None].to(vae.device, vae.dtype)).latent_dist.mean[:, :, 0]
        per_channel = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (z.new_tensor(values)[:, None, None] for values in per_channel)
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

    def unused(self, model):  # the last block's text output is not read
        last = f"transformer_blocks.{len(model.transformer_blocks) - 1}."
        parts = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "txt_mlp.")
        return tuple(last + part for part in parts)

    def suits(self, pipe):
        return dict(steps=50, guidance=4.0)

    def texts(self, prompts):
        return {"prompt": list(prompts), "negative_prompt": [self.negative_prompt] * len(prompts)}

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


def size_arguments(resolution):
    """{height, width} of a side in pixels or of "WIDTHxHEIGHT"; {} of 0."""
    width, _, height = str(resolution).partition("x")
    return dict(height=int(height or width), width=int(width)) if resolution else {}


class PixArt(StableDiffusion):
    """PixArt-Alpha and -Sigma; they are sampled and not trained."""

    pipeline = (diffusers.PixArtAlphaPipeline, diffusers.PixArtSigmaPipeline)

    def sampling(self, pipe, steps, guidance, resolution=0):
        # diffusers needs optional packages to clean captions
        return {**super().sampling(pipe, steps, guidance, resolution), "clean_caption": False}


class StableCascade(StableDiffusion):
    """Stable Cascade; it is sampled and not trained. Steps and guidance are the prior's."""

    pipeline = diffusers.StableCascadeCombinedPipeline

    def suits(self, pipe):
        return dict(steps=20, guidance=4.0)

    def sampling(self, pipe, steps, guidance, resolution=0):
        prior = dict(prior_num_inference_steps=steps, prior_guidance_scale=guidance)
        return dict(prior, num_inference_steps=10, **size_arguments(resolution))  # 10 of the decoder


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
TRAINABLE = {
    "sdxl": StableDiffusionXL(),
    "sd3": StableDiffusion3(),
    "sd15": StableDiffusion(),
    "flux": Flux(),
    "qwen": QwenImage(),
}
SUITS = {  # default steps and guidance of sampling; rankdpo.py has the defaults of training
    "toy": dict(steps=16, guidance=2.0),
    "noise": dict(steps=40, guidance=5.0),
    "flow": dict(steps=28, guidance=7.0),
}
FAMILIES = (*TRAINABLE.values(), PixArt(), StableCascade())


def family_of(pipe, trainable=False):
    """The family of a pipeline. An unknown class is sampled like Stable Diffusion, and refused if it is to be
    trained, as is a scheduler that add_noise does not fit."""
    family = next((f for f in FAMILIES if isinstance(pipe, f.pipeline)), StableDiffusion())
    if trainable and family not in TRAINABLE.values():
        known = "Stable Diffusion 1.x / 2.x, SDXL, SD3, FLUX.1 and Qwen-Image"
        fail(f"{type(pipe).__name__}: the trainer knows {known}")
    if trainable:
        check_scheduler(pipe.name_or_path, pipe.scheduler, family)
    return family


def shapes_at(pipe, resolution=0):
    """{"latents": (C, h, w), ...}: the shapes of one image's latents and conditioning at a resolution in
    pixels, without which it is the model's own."""
    family, denoiser = family_of(pipe), denoiser_of(pipe)[1]
    shapes, factor = family.shapes(denoiser.config), pipe.vae_scale_factor
    if resolution % (factor * family.patch):
        fail(f"--resolution {resolution}: must be a multiple of {factor * family.patch}")
    if resolution:
        shapes["latents"] = (shapes["latents"][0], resolution // factor, resolution // factor)
    return shapes


def check_scheduler(path, scheduler, family):
    """Fail unless the scheduler fits the family, has a noise level for each timestep and predicts a target
    that add_noise knows."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if family.flow or not hasattr(scheduler, "alphas_cumprod"):
            wanted = "FlowMatchEulerDiscreteScheduler" + ("" if family.flow else " or one of diffusion")
            fail(f"{path}/scheduler: is a {type(scheduler).__name__}, but the model needs {wanted}")
    levels = getattr(scheduler, "alphas_cumprod", getattr(scheduler, "sigmas", torch.zeros(0)))
    steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 0)
    if len(levels) != steps or not levels.any() or not ((0 <= levels) & (levels <= 1)).all():
        fail(f"{path}/scheduler: no noise level from 0 to 1 for each of {steps} timesteps; mend its config")
    kind = scheduler.config.get("prediction_type", "flow")
    if kind not in ("epsilon", "v_prediction", "flow"):
        fail(f"{path}/scheduler: predicts {kind!r}; only epsilon, v_prediction and rectified flow are known")


def scale_of(pipe):
    """The kind of a model, a key of SUITS: toy has under 50 M parameters; flow predicts velocity."""
    if sum(p.numel() for p in denoiser_of(pipe)[1].parameters()) < 50e6:
        return "toy"
    return "flow" if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) else "noise"


# ----------------------------------------------------------------------------- noise and target


def noise_levels(scheduler, u, timesteps="logit_normal"):
    """alpha, sigma and the model's timestep t, each (N,), for u (N,) in [0, 1): x_t = alpha x + sigma eps.

    Diffusion (DDPM, arXiv 2006.11239, Eq. 4): t = floor(1000 u). Rectified flow (SD3, arXiv 2403.03206,
    Section 3.1): sigma = u or logit-normal, then the scheduler's shift; alpha = 1 - sigma, t = 1000 sigma.
    A shift that depends on the resolution applies to sampling alone."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if timesteps == "logit_normal":  # mean 0, scale 1; mps has no ndtri
            u = torch.sigmoid(torch.special.ndtri(u.cpu().clamp(1e-4, 1 - 1e-4))).to(u)
        shift = 1.0 if scheduler.config.use_dynamic_shifting else scheduler.config.shift
        sigma = shift * u / (1 + (shift - 1) * u)
        return 1 - sigma, sigma, 1000 * sigma
    t = (u * scheduler.config.num_train_timesteps).long()
    alpha_bar = scheduler.alphas_cumprod.to(u.device)[t]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), t


def add_noise(scheduler, x, noise, u, timesteps="logit_normal"):
    """x_t (N, C, h, w), the model's timestep (N,) and target (N, C, h, w), for latents x and noise eps, both
    (N, C, h, w), and u (N,) uniform in [0, 1).

    Diffusion predicts eps, or v = alpha eps - sigma x (arXiv 2202.00512, Section 4); rectified flow predicts
    eps - x."""
    alpha, sigma, t = noise_levels(scheduler, u, timesteps)
    alpha, sigma = (level.view((-1,) + (1,) * (x.dim() - 1)) for level in (alpha, sigma))
    kind = scheduler.config.get("prediction_type", "flow")
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "flow": noise - x}[kind]
    return alpha * x + sigma * noise, t, target


SAMPLER_STEPS = 20  # of Diffusion-DRO's sampling paths; it divides 1000, so that every timestep is on one


def clean_latents(scheduler, x_t, prediction, alpha, sigma):
    """The latents x (N, C, h, w) that a prediction of eps, v or velocity at x_t implies: add_noise solved for
    x. alpha and sigma broadcast over x_t."""
    kind = scheduler.config.get("prediction_type", "flow")
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha
    return alpha * x_t - sigma * prediction if kind == "v_prediction" else x_t - sigma * prediction


# ----------------------------------------------------------------------------- load and save


def check_pipeline(path):
    """Fail early, before hours of work with another model, if `path` names no pipeline here or on the hub."""
    base, *additions = split_spec(path)
    local = Path(base).exists() or base.startswith((".", "/")) or base.count("/") > 1
    if local and not Path(base, "model_index.json").is_file():
        if Path(base).is_file():
            with loading(path):  # a model in a single file, or a pointer of git-lfs, says so
                find_addition(base)
        what = "not a diffusers pipeline folder (no model_index.json in it)"
        fail(f"{path}: {what}; adapters or a denoiser alone are named BASE+{base}")
    try:
        parts = DiffusionPipeline.load_config(base)
        names = [name for name, part in parts.items() if isinstance(part, list) and part[0]]
    except Exception as e:  # damaged; the hub has many errors: not found, no licence agreed to, no network
        where = f"{base}/model_index.json: damaged" if local else f"{path}: no such folder, nor on the hub"
        fail(f"{where} ({one_line(e)})")
    if local and (missing := [name for name in names if not Path(base, name).is_dir()]):
        fail(f"{path}: not a whole pipeline folder, {', '.join(missing)} is missing")
    if [None, None] in (parts.get("unet"), parts.get("transformer")):
        fail(f"{path}: has no denoiser: unet or transformer is null in model_index.json")
    for added in additions:
        if Path(added).exists():
            with loading(path):  # not clear, torn, or a pickle that is not of weights alone
                find_addition(added)
        elif added.startswith((".", "/")):
            fail(f"{path}: no such file or folder: {added}")


def load_pipeline(path, device="cpu", dtype=torch.float32, denoiser=True, encoders=True):
    """A diffusers text-to-image pipeline from a folder or a hub id. "base+folder" adds LoRA weights, or takes
    the weights of a denoiser that was saved alone; "base+first+second" adds two sets in turn. "random:sdxl"
    has random weights of the real size. A part that was saved as null (a safety checker, the T5 of SD3) stays
    None.

    Without `denoiser`, the denoiser stays on the meta device and its weights are not read. Without
    `encoders`, VAE and text encoders are None. Adapters may change any of these parts, so with them all are
    read."""
    if str(path).startswith("random:"):
        with quiet():
            return random_pipeline(str(path).removeprefix("random:"), device if denoiser else "meta", dtype)
    check_pipeline(path)
    base, *additions = split_spec(path)
    with suppress(ImportError):  # Stable Cascade's index names the module of its VQGAN before that moved
        from diffusers.pipelines.deprecated import wuerstchen

        diffusers.pipelines.wuerstchen = wuerstchen
    with loading(path):  # torn weights, no hub, another format: libraries raise many kinds
        found = [(added, *find_addition(added)) for added in additions]
        adapters = any(kind == "adapters" for _, kind, _ in found)
        denoiser, encoders = denoiser or adapters, encoders or adapters
        kwargs = dict(load_parts(base, dtype, denoiser, encoders), dtype=dtype, use_safetensors=True)
        try:  # it joins the two pipelines of Stable Cascade
            pipe = AutoPipelineForText2Image.from_pretrained(base, **kwargs)
        except ValueError:  # diffusers has no text-to-image entry for this family
            pipe = DiffusionPipeline.from_pretrained(base, **kwargs)
        for added, kind, files in found:
            if kind == "adapters":
                load_adapters(pipe, denoiser_of(pipe)[0], added, files[0])
            elif denoiser:
                load_denoiser(denoiser_of(pipe)[1], added, files)
    check_tokenizers(base, pipe)
    for name, part in pipe.components.items():
        numbers = part.parameters() if isinstance(part, torch.nn.Module) else ()
        if not all(p.is_meta or p.isfinite().all() for p in numbers):
            fail(f"{path}: {name} holds weights that are not finite")
    pipe.set_progress_bar_config(disable=True)
    return pipe if torch.device(device).type == "cpu" else pipe.to(device)


def load_parts(path, dtype, denoiser, encoders):
    """{name: module or None} of a pipeline's parts with weights. ValueError where a part lacks a tensor of
    its configuration: from_pretrained would only warn, and would draw that tensor at random."""
    parts = {}
    for name, value in DiffusionPipeline.load_config(path).items():
        library, kind = value if isinstance(value, list) and len(value) == 2 else ("", "")
        if kind is None:
            parts[name] = None  # some pipelines have no default for it
        known = {"diffusers": diffusers, "transformers": transformers}
        module = known.get(library) or getattr(diffusers.pipelines, library or "", None)
        kind = getattr(module, kind or "", None)
        if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
            continue
        is_denoiser = name in ("unet", "transformer")
        if is_denoiser and not denoiser:
            with torch.device("meta"):
                parts[name] = kind.from_config(kind.load_config(path, subfolder=name))
        elif is_denoiser or encoders:
            more = dict(subfolder=name, dtype=dtype, output_loading_info=True, **stored_as(path, name))
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


def check_tokenizers(path, pipe):
    """Fail where a tokenizer does not fit its encoder. If its files are missing, transformers raises no error
    and returns a tokenizer of 2 to 5 words."""
    for name, encoder in text_encoders_of(pipe).items():
        folder = name.replace("text_encoder", "tokenizer")
        tokenizer = pipe.components.get(folder)
        words, wanted = len(tokenizer or ()), encoder.get_input_embeddings().num_embeddings
        if not 0.99 * wanted <= words <= wanted:  # T5's embedding is padded to a multiple of 128
            sizes = f"{words} words, not {wanted} as {name} wants"
            fail(f"{path}/{folder}: {sizes}; put the model's tokenizer files there")
        if "clip" in encoder.config.model_type:
            if tokenizer.model_max_length > encoder.config.max_position_embeddings:  # 10**30 if not given
                fail(f"{path}/{folder}: tokenizer_config.json lacks model_max_length; put the model's there")


def random_pipeline(name, device, dtype):
    """random:NAME, a denoiser and a scheduler to measure with. The weights are the same on every process."""
    if name not in TRAINABLE:
        fail(f"random:{name}: there are {', '.join(f'random:{n}' for n in TRAINABLE)}")
    torch.manual_seed(0)
    family, default = TRAINABLE[name], torch.get_default_dtype()
    try:  # in the type and on the device where they stay: fp32 would take twice the memory at first
        torch.set_default_dtype(dtype)
        with torch.device(device):
            parts = family.random_parts()
    finally:
        torch.set_default_dtype(default)
    scheduler = parts["scheduler"]  # made anew: on the meta device its noise levels have no values
    parts["scheduler"] = type(scheduler).from_config(scheduler.config)
    wanted = signature(family.pipeline).parameters.values()
    missing = {p.name: None for p in wanted if p.default is p.empty and p.name not in parts}
    return family.pipeline(**parts, **missing)


def denoiser_of(pipe):
    """(the name of the trained part: "unet" or "transformer", the module)."""
    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    return name, getattr(pipe, name, None)


def text_encoders_of(pipe):
    """{name: module} of the text encoders that the pipeline has."""
    return {n: m for n, m in pipe.components.items() if n.startswith("text_encoder") and m is not None}


def add_adapters(model, rank, dtype, name="default"):
    """Add a set of LoRA of this rank to the attention projections and freeze the rest. Adapters are at least
    fp32; the frozen weights keep the compute type `dtype`. At first the model predicts as without them."""
    from peft import LoraConfig

    model.requires_grad_(False)
    torch.manual_seed(0)  # A is random and B is 0
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    more = dict(init_lora_weights="gaussian", target_modules=projections)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, **more), name)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.promote_types(dtype, torch.float32))
    return model


def model_card(base, adapters, about):
    """The README.md of a tuned model, in the hub's format. `about` is {title: {name: value}}."""
    from huggingface_hub import ModelCard, ModelCardData

    source, licence = Path(split_spec(base)[0]), {}
    with suppress(Exception):  # a base without a card
        card = ModelCard.load(source / "README.md" if source.is_dir() else str(source))
        licence = {k: v for k, v in card.data.to_dict().items() if k.startswith("license")}
    tags = ["text-to-image", "preference-alignment", *(["lora"] if adapters else [])]
    more = dict(base_model=None if source.is_dir() else str(source), tags=tags, **licence)
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", **more)
    lines = ["---", data.to_yaml(), "---", f"# {source.name}, tuned by rankdpo.py", ""]
    how = "pipe.load_lora_weights(FOLDER)" if adapters else "DiffusionPipeline.from_pretrained(FOLDER)"
    lines += [f"Base: {base}. Load with `{how}`.", ""]
    lines += [] if licence else ["Licence: not known; that of the base, whose card names none.", ""]
    for title, values in about.items():
        rows = [f"| {name} | {value} |" for name, value in values.items()]
        lines += [f"## {title}", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def save_tuned(folder, base, model, part, adapters, about):
    """Save the pipeline `base` with the trained `model` as its `part`, or the set of adapters of `model` that
    is called `adapters`, with a model card. Every process must call it; `about` counts on the first alone."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if base.startswith("random:"):
        print(f"{base}: measured, not trained; nothing is saved")
        return
    if not adapters:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)  # by all processes

    def write(tmp):
        if adapters:
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name=adapters))
            weights = {f"{part}.{n}": p.float().cpu().contiguous() for n, p in layers.items()}
            tmp.mkdir()  # pipe.load_lora_weights looks for this file name
            save_file(weights, tmp / "pytorch_lora_weights.safetensors", {"format": "pt"})
        else:
            pipe = load_pipeline(base, denoiser=False)
            getattr(pipe, part).load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
            pipe.save_pretrained(tmp)
        (tmp / "README.md").write_text(model_card(base, bool(adapters), about), encoding="utf-8")

    if process_rank()[0] == 0:
        publish(folder, write)


# ----------------------------------------------------------------------------- sampling


def noise_seed(prompt, model, seed):
    """The seed of an image's starting noise. It depends on (prompt, model, seed) and on no order or batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{model}|{prompt}".encode()).digest()[:7], "big")


def generate(pipe, prompts, seeds, settings):
    """Draw a batch -> [(PIL image, None) or (None, the problem)]. Each image's noise comes from its own
    generator on the CPU, so that it is the same on every device. `settings`: steps, guidance, resolution."""
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
    """generate(). If it raises, the images of the batch are drawn one by one, to find the one that fails."""
    try:
        return generate(pipe, prompts, seeds, settings)
    except torch.cuda.OutOfMemoryError:
        fail(f"out of GPU memory; lower --batch_size (now {len(prompts)} images)")
    except Exception as e:
        if len(prompts) == 1:
            return [(None, f"the generator raised {type(e).__name__}: {one_line(e)}")]
        each = (generate_each(pipe, [p], [s], settings) for p, s in zip(prompts, seeds))
        return [result for one in each for result in one]


@torch.no_grad()
def encode_nothing(pipe, device, dtype):
    """Conditioning of the negative prompt, {name: tensor} of one image, as sampling has it: SDXL's is 0. The
    size of a picture is no part of it: it stays when the caption goes."""
    for encoder in text_encoders_of(pipe).values():
        encoder.to(device, dtype)
    family = family_of(pipe)
    cond = family.encode_prompts(pipe, [family.negative_prompt], (0, 0))
    zero = pipe.config.get("force_zeros_for_empty_prompt", False)
    return {name: (c[0] * (not zero)).cpu() for name, c in cond.items() if name != "time_ids"}


@torch.no_grad()
def encode_and_drop_encoders(pipe, prompts, size, device, dtype):
    """N prompts -> the arguments with which `pipe` draws them, (N, ...) each. Drops its text encoders."""
    family, negative = family_of(pipe), encode_nothing(pipe, device, dtype)  # moves the encoders too
    arguments = family.prompt_arguments(family.encode_prompts(pipe, prompts, size), negative)
    for name in [*text_encoders_of(pipe), "safety_checker"]:
        if hasattr(pipe, name):
            setattr(pipe, name, None)
    decode_in_tiles_where_needed(pipe.vae)
    pipe.vae.enable_slicing()  # one image at a time: decoding 1024 px takes gigabytes each
    wide = torch.promote_types(dtype, torch.float32)
    return {"height": size[0], "width": size[1], **{k: v.to(wide) for k, v in arguments.items()}}


def decode_in_tiles_where_needed(vae):
    """Let a VAE decode in tiles, and say so, once a whole picture does not fit in the GPU's memory."""
    whole = vae.decode

    def decode(z, *args, **kwargs):
        try:
            return whole(z, *args, **kwargs)
        except torch.OutOfMemoryError:
            if vae.use_tiling:
                raise
        torch.cuda.empty_cache()
        vae.enable_tiling()
        if hasattr(vae, "tile_latent_min_size"):  # a tile of AutoencoderKL is as large as its own pictures
            vae.tile_latent_min_size //= 2
            vae.tile_sample_min_size //= 2
        print("samples are decoded in tiles, since a whole picture does not fit in the GPU's memory")
        return whole(z, *args, **kwargs)

    vae.decode = decode
