"""Rewards: every scorer against its original modules on random weights in the original layout; preprocessing, the score
cache, errors.

    pytest -q test_rewards.py
    pytest -q test_rewards.py -k parity -s        # prints the largest difference of each scorer
"""
import importlib
import itertools
import json
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import rewards
import toyworld
from rewards import Scorer, crop, load_reward, pad, read_image, read_scores, score_rows, square, warn_cut

TEXTS = ["a red circle", "two squares", "a photo of a cross left of a circle"]


def picture(w=40, h=40, mode="RGB", seed=0):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8))
    return image if mode == "RGB" else image.convert(mode)


IMAGES = [picture(40, 40, seed=0), picture(61, 40, seed=1), picture(36, 77, seed=2)]


def same(ours, reference, what, atol=1e-5):
    print(f"parity {what}: largest difference {(ours - reference).abs().max().item():.1e} at scores near {reference.abs().max().item():.2f}")
    assert ours.shape == reference.shape == (len(TEXTS),) and torch.allclose(ours, reference, rtol=0, atol=atol)
    assert ours.std() > 100 * atol                                              # or the test could not fail


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random-weight CLIPs in the layouts of the real ones."""
    root, tok, out = tmp_path_factory.mktemp("rewards"), toyworld.make_tokenizer(), {}
    for i, name in enumerate(("clip", "hps", "pick")):
        torch.manual_seed(i)
        model = toyworld.build_reward(name, tok)
        for p in model.parameters():                                            # away from the small values of an initialisation
            p.data += .1 * torch.randn_like(p)
        toyworld.save_reward(name, model, tok, root / name)
        out[name] = root / name
    return out


def clip_config(folder):
    return json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]


# ----------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", ["clip", "hpsv2", "hpsv2.1"])
def test_parity_of_clip_and_hpsv2_with_open_clips_cosine(folders, name):
    model = open_clip.CLIP(**clip_config(folders["clip"])).eval()
    model.load_state_dict({k: v.float() for k, v in load_file(folders["clip"] / "open_clip_model.safetensors").items()})
    ids = toyworld.make_tokenizer()(TEXTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = model.encode_image(torch.stack([pad(i, 32) for i in IMAGES]), normalize=True), model.encode_text(ids, normalize=True)
    same(load_reward(f"{name}={folders['clip']}")(IMAGES, TEXTS), (a * b).sum(-1), name)


def test_parity_of_pickscore_with_the_diagonal_of_clipmodels_logits(folders):
    from transformers import CLIPModel
    model = CLIPModel.from_pretrained(folders["pick"], dtype=torch.float32).eval()
    ids = toyworld.make_tokenizer()(TEXTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.stack([crop(i, 32, floor=True) for i in IMAGES])).logits_per_image
    same(load_reward(f"pickscore={folders['pick']}")(IMAGES, TEXTS), logits.diagonal(), "pickscore")


def bert_vocabulary(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "square", "photo", "cross", "left", "of", "##s", "[DEC]", "[ENC]"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return len(words)


@pytest.fixture
def original_blip(monkeypatch):
    """(BertModel, VisionTransformer, MLP) of the `image-reward` package. Under transformers 5 the package does not import:
    its __init__ wants modules that nobody declares, and names that have moved; here they are put back."""
    from transformers import PreTrainedModel, modeling_utils, pytorch_utils
    root = Path(find_spec("ImageReward").submodule_search_locations[0])
    for name, path in (("ImageReward", root), ("ImageReward.models", root / "models")):
        package = types.ModuleType(name)                                        # the package without its __init__
        package.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, package)
    for name in ("apply_chunking_to_forward", "prune_linear_layer"):
        monkeypatch.setattr(modeling_utils, name, getattr(pytorch_utils, name), raising=False)
    monkeypatch.setattr(modeling_utils, "find_pruneable_heads_and_indices", None, raising=False)
    monkeypatch.setattr(PreTrainedModel, "get_head_mask", lambda self, mask, n: [None] * n, raising=False)
    monkeypatch.setattr(PreTrainedModel, "invert_attention_mask", lambda self, m: (1. - m[:, None, None].float()) * torch.finfo(torch.float32).min, raising=False)
    med, vit = importlib.import_module("ImageReward.models.BLIP.med"), importlib.import_module("ImageReward.models.BLIP.vit")
    monkeypatch.setattr(med.BertPreTrainedModel, "all_tied_weights_keys", {}, raising=False)
    monkeypatch.setattr(med.BertModel, "init_weights", lambda self: None, raising=False)
    yield med.BertModel, vit.VisionTransformer, importlib.import_module("ImageReward.ImageReward").MLP
    for name in [n for n in sys.modules if n.startswith("ImageReward")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("name", ["imagereward", "cyclereward"])
def test_parity_of_imagereward_and_cyclereward_with_the_package(original_blip, tmp_path, name):
    from transformers import BertConfig, BertTokenizer
    Bert, Vit, Mlp = original_blip
    torch.manual_seed(0)
    config = BertConfig(vocab_size=bert_vocabulary(tmp_path), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                        max_position_embeddings=160, add_cross_attention=True)
    config.encoder_width = 64
    model = torch.nn.ModuleDict({"blip": torch.nn.ModuleDict({
        "visual_encoder": Vit(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=1), "text_encoder": Bert(config=config, add_pooling_layer=False),
        "vision_proj": torch.nn.Linear(64, 8), "text_proj": torch.nn.Linear(128, 8)}), "mlp": Mlp(128)}).eval()
    if name == "cyclereward":                                                   # GELU between the layers, no dropout
        sizes = [128, 1024, 128, 64, 16, 1]
        layers = [m for i, o in itertools.pairwise(sizes) for m in (torch.nn.Linear(i, o), torch.nn.GELU())][:-1]
        model["mlp"].layers = torch.nn.Sequential(*layers)
    for p in model.parameters():
        p.data += .1 * torch.randn_like(p)
    torch.save(model.state_dict(), tmp_path / "weights.pt")

    mean, std = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
    from torchvision import transforms as T
    prepare = T.Compose([T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(), T.Normalize(mean, std)])
    length = 35 if name == "imagereward" else 128
    text = BertTokenizer.from_pretrained(tmp_path)(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        seen = model["blip"]["visual_encoder"](torch.stack([prepare(i) for i in IMAGES]))
        h = model["blip"]["text_encoder"](text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=seen,
                                          encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long), return_dict=True).last_hidden_state[:, 0]
        reference = model["mlp"](h)[:, 0]
    if name == "imagereward":
        reference = (reference - 0.16717362830052426) / 1.0333394966054072
    same(load_reward(f"{name}={tmp_path}")(IMAGES, TEXTS), reference, f"{name} (image-reward package)", 1e-5 * max(1, reference.abs().max().item()))

    state = model.state_dict()
    for change, says in ((lambda s: s.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"), "missing keys.*crossattention.self.key"),
                         (lambda s: s.update({"blip.visual_encoder.extra": torch.zeros(1)}), "unexpected keys.*extra"), (lambda s: s.clear(), "missing")):
        change(broken := dict(state))
        torch.save(broken, tmp_path / "weights.pt")
        with pytest.raises(SystemExit, match=f"weights.pt.*{says}"):
            load_reward(f"{name}={tmp_path}")


def slow_mps(state, clip, ids, condition, pixels, tau):
    """MPS for one pair with explicit loops over layers, heads and tokens, in float64, from the published architecture."""
    w = {k: v.double() for k, v in state.items()}
    with torch.no_grad():
        text = clip.text_projection(clip.text_model(ids[None]).last_hidden_state)[0].double()
        cond = clip.text_projection(clip.text_model(condition[None]).last_hidden_state)[0].double()
        x = clip.visual_projection(clip.vision_model(pixels[None]).last_hidden_state)[0].double()
    near = torch.stack([max(t @ c for c in cond) for t in text])
    keep = [i for i in range(len(text)) if near[i] / near.max() > tau]
    norm = lambda v, key: (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]
    gate = lambda v: v[:len(v) // 2] * F.silu(v[len(v) // 2:])

    def turn(v, position):                                                      # rotary embedding of one vector
        d, out = len(v), v.clone()
        for i in range(d // 2):
            a = torch.tensor(position / 10000 ** (2 * i / d), dtype=torch.float64)
            out[i], out[i + d // 2] = v[i] * a.cos() - v[i + d // 2] * a.sin(), v[i + d // 2] * a.cos() + v[i] * a.sin()
        return out

    def attend(q, keys, values):                                                # one query, every head against the one set of keys
        d = len(keys[0])
        return torch.cat([torch.softmax(torch.stack([h @ k for k in keys]) / d ** .5, 0) @ torch.stack(values) for h in q.split(d)])
    for n in range(2):
        p = f"mps.cross_model.layers.{n}."
        d = w[p + "0.fn.to_kv.weight"].shape[0] // 2
        kv = [w[p + "0.fn.to_kv.weight"] @ text[i] for i in keep]
        rows = []
        for v in x:
            h = norm(v, p + "0.fn.norm")
            mixed = attend(w[p + "0.fn.to_q.weight"] @ h, [t[:d] for t in kv], [t[d:] for t in kv])
            rows.append(v + w[p + "0.fn.to_out.weight"] @ mixed + w[p + "0.fn.ff.2.weight"] @ gate(w[p + "0.fn.ff.0.weight"] @ h))
        x, inner = torch.stack(rows), w[p + "1.fn.attn_out.weight"].shape[1]
        fused = [w[p + "1.fn.fused_attn_ff_proj.weight"] @ norm(v, p + "1.fn.norm") for v in x]
        keys, values = [turn(f[inner:inner + d], i) for i, f in enumerate(fused)], [f[inner + d:inner + 2 * d] for f in fused]
        x = torch.stack([v + w[p + "1.fn.attn_out.weight"] @ attend(torch.cat([turn(h, i) for h in f[:inner].split(d)]), keys, values)
                         + w[p + "1.fn.ff_out.1.weight"] @ gate(f[inner + 2 * d:]) for i, (v, f) in enumerate(zip(x, fused))])
    end = text[ids.argmax()]
    return clip.logit_scale.double().exp() * (x[0] @ end) / x[0].norm() / end.norm()


def mps_folder(tmp_path, tau):
    tok = toyworld.make_tokenizer()
    torch.manual_seed(3)
    clip, D, d, heads = toyworld.build_reward("pick", tok), 64, 16, 4
    for p in clip.parameters():
        p.data += .05 * torch.randn_like(p)
    state = {f"mps.model.{k}": v for k, v in clip.state_dict().items()}
    for n in range(2):
        for key, shape in {"0.fn.norm.weight": (D,), "0.fn.norm.bias": (D,), "0.fn.to_q.weight": (heads * d, D), "0.fn.to_kv.weight": (2 * d, D), "0.fn.to_out.weight": (D, heads * d),
                           "0.fn.ff.0.weight": (8 * D, D), "0.fn.ff.2.weight": (D, 4 * D), "1.fn.norm.weight": (D,), "1.fn.norm.bias": (D,), "1.fn.rotary_emb.inv_freq": (d // 2,),
                           "1.fn.fused_attn_ff_proj.weight": (heads * d + 2 * d + 8 * D, D), "1.fn.attn_out.weight": (D, heads * d), "1.fn.ff_out.1.weight": (D, 4 * D)}.items():
            state[f"mps.cross_model.layers.{n}.{key}"] = torch.randn(shape) / D ** .5
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    clip.config.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    return clip.eval(), state, tok


@pytest.mark.parametrize("tau", [.01, .7])                                      # .7 masks tokens out on these weights
def test_parity_of_mps_with_a_slow_loop_whatever_the_batch(tmp_path, monkeypatch, tau):
    clip, state, tok = mps_folder(tmp_path, tau)
    monkeypatch.setattr(rewards, "TAU", tau)
    encode = lambda texts: tok(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    reference = torch.stack([slow_mps(state, clip, ids, encode([rewards.CONDITION])[0], crop(i, 32, floor=True), tau) for ids, i in zip(encode(TEXTS), IMAGES)])
    score = load_reward(f"mps={tmp_path}")
    same(score(IMAGES, TEXTS), reference.detach().float(), f"mps at tau {tau} (float64 loops)")
    assert torch.allclose(score(IMAGES, TEXTS, batch_size=1), score(IMAGES, TEXTS), atol=1e-5)       # the largest similarity is each pair's own
    broken = {k: v.contiguous() for k, v in state.items() if "cross_model" not in k}
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="missing keys.*cross_model"):
        load_reward(f"mps={tmp_path}")


def t5_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581Yes", "\u2581a", "\u2581red", "\u2581circle", "\u2581two", "\u2581figure", "\u2581show", "\u2581USER", ":"] + [chr(c) for c in range(33, 127)]
    raw = Tokenizer(models.Unigram([(p, -float(len(pieces) - i) / 9) for i, p in enumerate(dict.fromkeys(pieces))], unk_id=2))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tok.save_pretrained(folder)
    return tok


@pytest.mark.parametrize("name", ["vqascore", "vqascore-xl"])
def test_parity_of_vqascore_with_the_loss_of_t5_one_pair_at_a_time(tmp_path, name):
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration
    torch.manual_seed(4)
    tok = t5_tokenizer(tmp_path)
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)).eval()
    tower.save_pretrained(tmp_path / "tower")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(tok), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                                             tie_word_embeddings=False, mm_hidden_size=48, mm_vision_tower=str(tmp_path / "tower"), decoder_start_token_id=0)).eval()
    projector = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    for p in [*t5.parameters(), *projector.parameters()]:
        p.data += .1 * torch.randn_like(p)
    t5.lm_head.weight.data *= .03                                               # probabilities well inside (0, 1)
    t5.config.save_pretrained(tmp_path)
    state = {**t5.state_dict(), **{f"mm_projector.{k}": v for k, v in projector.state_dict().items()}, "embed_tokens.weight": t5.shared.weight}   # as its class saves it
    torch.save({k: v.clone() for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    reference = []
    for image, prompt in zip(IMAGES, TEXTS):
        system = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
                  "questions. USER: <image>\n")
        left, right = (system + f'Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT: ').split("<image>")
        with torch.no_grad():
            patches = projector(tower(square(image, 32)[None], output_hidden_states=True).hidden_states[-2][:, 1:])
            sides = [t5.shared(tok(side, return_tensors="pt").input_ids) for side in (left, right)]
            loss = t5(inputs_embeds=torch.cat([sides[0], patches, sides[1]], 1), labels=tok("Yes", return_tensors="pt").input_ids).loss
        reference.append((-loss).exp())
    score = rewards.load_vqascore(name, str(tmp_path), "cpu", None, dtype=torch.float32)
    same(score(IMAGES, TEXTS), torch.stack(reference), f"{name} (T5's own loss)", 1e-6)
    half = load_reward(f"{name}={tmp_path}")(IMAGES, TEXTS)                     # bf16, as people run it
    assert torch.allclose(half, torch.stack(reference), rtol=.1) and not torch.equal(half, torch.stack(reference))
    torch.save({k: v for k, v in state.items() if "mm_projector.2" not in k}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="missing keys.*mm_projector.2"):
        load_reward(f"{name}={tmp_path}")


def test_parity_of_aesthetic_with_the_mlp_layer_by_layer(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    torch.manual_seed(5)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=768)).eval()
    for p in model.parameters():
        p.data += .2 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    n = torch.nn
    mlp = n.ModuleDict({"layers": n.Sequential(n.Linear(768, 1024), n.Dropout(.2), n.Linear(1024, 128), n.Dropout(.2), n.Linear(128, 64), n.Dropout(.1), n.Linear(64, 16), n.Linear(16, 1))}).eval()
    for p in mlp.parameters():
        p.data += .1 * torch.randn_like(p)
    torch.save(mlp.state_dict(), tmp_path / "aesthetic-model.pth")
    with torch.no_grad():
        e = model(torch.stack([crop(i, 32) for i in IMAGES])).image_embeds
        reference = mlp["layers"](e / e.norm(dim=-1, keepdim=True))[:, 0]
    same(load_reward(f"aesthetic={tmp_path}")(IMAGES, TEXTS), reference, "aesthetic", 1e-5 * max(1, reference.abs().max().item()))
    torch.save({"layers.0.weight": torch.zeros(1)}, tmp_path / "aesthetic-model.pth")
    with pytest.raises(SystemExit, match="aesthetic-model.pth.*layers.7.bias"):
        load_reward(f"aesthetic={tmp_path}")


def test_an_hps_checkpoint_file_loads_by_its_state_dict(folders, tmp_path, monkeypatch):
    """HPSv2's file is {"state_dict": ...} for ViT-H-14; a small architecture stands in for that name here."""
    config = clip_config(folders["hps"])
    torch.save({"state_dict": load_file(folders["hps"] / "open_clip_model.safetensors")}, tmp_path / "hps.pt")
    tok = toyworld.make_tokenizer()
    ids = lambda texts: tok(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    ids.encode = lambda text: tok(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(open_clip, "create_model", lambda name: open_clip.CLIP(**config))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: ids)
    from_file = load_reward(f"hpsv2.1={tmp_path / 'hps.pt'}")(IMAGES, TEXTS)
    assert torch.allclose(from_file, load_reward(f"hpsv2.1={folders['hps']}")(IMAGES, TEXTS), atol=1e-6)
    torch.save({"state_dict": {"wrong": torch.zeros(1)}}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit, match="bad.pt.*missing keys.*unexpected keys.*wrong"):
        load_reward(f"hpsv2.1={tmp_path / 'bad.pt'}")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "hps.pt").read_bytes()[:1000])
    with pytest.raises(SystemExit, match="torn.pt"):
        load_reward(f"hpsv2.1={tmp_path / 'torn.pt'}")


def test_the_keys_of_hpsv2_are_those_of_open_clips_vit_h():
    with torch.device("meta"):
        keys = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
    assert sum(v.numel() for v in keys.values()) in range(985_000_000, 988_000_000) and "visual.transformer.resblocks.31.ln_1.weight" in keys


def test_a_pickscore_checkpoint_with_other_keys_is_refused(folders, tmp_path):
    import shutil
    shutil.copytree(folders["pick"], tmp_path / "pick")
    state = load_file(tmp_path / "pick/model.safetensors")
    save_file({k: v for k, v in state.items() if k != "visual_projection.weight"}, tmp_path / "pick/model.safetensors")
    with pytest.raises(SystemExit, match="pick.*missing keys.*visual_projection"):
        load_reward(f"pickscore={tmp_path / 'pick'}")
    (tmp_path / "pick/model.safetensors").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="pick"):
        load_reward(f"pickscore={tmp_path / 'pick'}")


def test_batches_do_not_change_scores(folders):
    images, texts = [picture(seed=s) for s in range(40)], (TEXTS * 14)[:40]
    score = load_reward(f"clip={folders['clip']}")
    assert torch.allclose(score(images, texts, batch_size=1), score(images, texts, batch_size=32), atol=1e-5)
    assert score([], []).shape == (0,)


# ----------------------------------------------------------------------------- preprocessing

SIZES = [(40, 40), (64, 24), (24, 64), (32, 32), (200, 1), (33, 47), (35, 32), (32, 37), (300, 299)]
STATS = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


@pytest.mark.parametrize("size", SIZES)
def test_crop_is_torchvisions_and_with_floor_transformers(size):
    from torchvision import transforms as T
    from transformers import CLIPImageProcessorPil
    image = picture(*size)
    reference = T.Compose([T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(), T.Normalize(*STATS)])(image)
    assert torch.allclose(crop(image, 32), reference, atol=1e-6)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3, image_mean=STATS[0], image_std=STATS[1])
    assert torch.allclose(crop(image, 32, floor=True), torch.as_tensor(processor(image, return_tensors="pt").pixel_values[0]), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_pad_is_hpsv2s_resize_of_the_longer_side(size):
    from torchvision.transforms import functional as TF
    x = TF.to_tensor(image := picture(*size))
    if max(size) != 32:
        scale = 32 / max(size)
        x = TF.resize(x, [max(1, round(n * scale)) for n in x.shape[1:]], TF.InterpolationMode.BICUBIC, antialias=True)
    h, w = x.shape[1:]
    x = TF.pad(x, [(32 - w) // 2, (32 - h) // 2, 32 - w - (32 - w) // 2, 32 - h - (32 - h) // 2])
    assert torch.allclose(pad(image, 32), TF.normalize(x, *STATS), atol=1e-5)


def test_square_pads_with_the_mean_colour():
    wide = square(picture(64, 16), 32)
    assert wide.shape == (3, 32, 32) and wide[:, 4].abs().max() < .02 and wide[:, 16].abs().max() > .5


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_image_mode_scores_as_its_rgb_version(folders, mode):
    image = picture(mode="L").convert("RGBA") if mode == "LA" else picture(mode=mode)
    image = image.convert("LA") if mode == "LA" else image
    score = load_reward(f"clip={folders['clip']}")
    assert torch.equal(score([image], ["a circle"]), score([image.convert("RGB")], ["a circle"]))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], grey)


def test_long_prompts_are_cut_and_said_so_once(folders, capsys):
    warn_cut.said.clear()
    for name in ("clip", "pickscore"):
        score = load_reward(f"{name}={folders['pick' if name == 'pickscore' else 'clip']}")
        for _ in range(2):
            score([picture()], ["circle " * 40])
    err = capsys.readouterr().err
    assert err.count("clip: a prompt of 42 tokens is cut at 16") == 1 and err.count("pickscore: a prompt of 42 tokens is cut at 16") == 1


# ----------------------------------------------------------------------------- stored scores, errors


def test_the_checker_is_a_scorer():
    rng = np.random.default_rng(0)
    prompts = ["two circles", "a red square"]
    images = [toyworld.render(p, rng) for p in prompts]
    assert load_reward("toyworld")(images, prompts).tolist() == [1, 1] and load_reward("toyworld")(images[::-1], prompts).tolist() == [0, 0]


@pytest.fixture
def album(tmp_path):
    """Three rows of two pictures, as synpic.py writes them."""
    rows = [("a circle", ["a0.png", "a1.png"]), ("two squares", ["b0.png", "b1.png"]), ("a cross", ["c0.png", "c1.png"])]
    for i, (_, files) in enumerate(rows):
        for j, file in enumerate(files):
            picture(seed=10 * i + j).save(tmp_path / file)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"prompt": p, "file_names": f}) + "\n" for p, f in rows))
    return tmp_path, rows


def test_scores_are_stored_and_taken_up_again(album, folders, monkeypatch):
    folder, rows = album
    spec, path = f"clip={folders['clip']}", folder / "scores/clip.jsonl"
    rewards.main(["--score", str(folder), "--rewards", spec, "--device", "cpu"])
    whole, scores = path.read_text(), read_scores(folder, spec, rows)
    expected = load_reward(spec)([folder / f for _, files in rows for f in files], [p for p, files in rows for _ in files]).view(3, 2)
    assert np.allclose([scores[i] for i in range(3)], expected, atol=1e-6)
    path.write_text(whole[:-20])                                                # killed while it wrote the last row
    assert sorted(read_scores(folder, spec, rows)) == [0, 1]
    seen = []
    stream = Scorer.stream
    monkeypatch.setattr(Scorer, "stream", lambda self, images, *a: seen.extend(images) or stream(self, images, *a))
    score_rows(folder, spec, rows)
    assert [p.name for p in seen] == ["c0.png", "c1.png"]
    resumed = read_scores(folder, spec, rows)                  # the last row alone in its batch: cosines of fp32 vectors, equal to a few ulp
    assert resumed[0] == scores[0] and resumed[1] == scores[1] and np.allclose(resumed[2], scores[2], rtol=0, atol=1e-6)
    moved = folders["clip"].rename(folders["clip"].with_name("moved"))          # the same weights elsewhere: nothing to do
    try:
        assert read_scores(folder, f"clip={moved}", rows) == resumed
        assert read_scores(folder, f"clip={folders['hps']}", rows) == {}        # other weights: nothing counts
    finally:
        moved.rename(folders["clip"])


def test_rows_that_cannot_be_scored_stop_or_are_skipped_by_name(album, folders, capsys, monkeypatch):
    folder, rows = album
    spec = f"clip={folders['clip']}"
    (folder / "b1.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="b1.png.*two squares.*not a readable image.*--on_error skip"):
        score_rows(folder, spec, rows)
    assert sorted(read_scores(folder, spec, rows)) == [0]                       # what came before is kept
    assert list(score_rows(folder, spec, rows, on_error="skip")[1]) == [1]
    assert "1 of 3 rows skipped" in capsys.readouterr().err and sorted(read_scores(folder, spec, rows)) == [0, 2]
    picture(seed=11).save(folder / "b1.png")                                    # mended: scored next time
    assert score_rows(folder, spec, rows, on_error="skip") == (1, {}) and sorted(read_scores(folder, spec, rows)) == [0, 1, 2]
    bad = Scorer("bad", lambda i: torch.zeros(1), lambda x, prompts: torch.tensor([float("nan") if p == "a cross" else 1. for p in prompts]))
    monkeypatch.setattr(rewards, "load_reward", lambda *a: bad)
    assert "the score is nan" in score_rows(folder, "hpsv2=" + str(folders["clip"]), rows, on_error="skip")[1][2]
    assert list(score_rows(folder, "hpsv2.1=" + str(folders["clip"]), [(" ", ["a0.png"])], on_error="skip")[1].values())[0].endswith("an empty prompt cannot be scored")


def test_a_folder_of_pictures_with_captions_is_scored(tmp_path, folders, capsys):
    for i, text in enumerate(TEXTS):
        picture(seed=i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text + "\n")
    rewards.main(["--score", str(tmp_path), "--rewards", f"clip={folders['clip']}", f"pickscore={folders['pick']}", "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.count("over 3 images") == 2 and len((tmp_path / "scores/pickscore.jsonl").read_text().splitlines()) == 3


def test_errors_are_one_clear_line(folders, tmp_path):
    for spec, says in (("beauty", "unknown reward"), ("clip=nowhere", "no such file"), (f"pickscore={tmp_path}", "pickscore="), (f"clip={tmp_path}", "model.safetensors"),
                       (f"imagereward={tmp_path}", "ImageReward.pt|model.safetensors")):
        with pytest.raises(SystemExit, match=says) as e:
            load_reward(spec)
        assert "\n" not in str(e.value)
    score = load_reward(f"clip={folders['clip']}")
    with pytest.raises(ValueError, match="pair 0: an empty prompt"):
        score([picture()], [" "])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        score([picture(), picture()], ["a circle"])
    (tmp_path / "metadata.jsonl").write_text('{"prompt": "a", "file_name": "x.png"}\n{"file_name": "y.png"}\n')
    for args, says in ((["--score", tmp_path], "metadata.jsonl, line 2"), (["--score", tmp_path / "none"], "neither metadata.jsonl nor pictures"),
                       (["--image", "nowhere.png", "--prompt", "a"], "nowhere.png"), (["--score", tmp_path, "--rewards", "beauty"], "unknown reward 'beauty'"),
                       (["--score", tmp_path, "--batch_size", "0"], "--batch_size")):
        with pytest.raises(SystemExit, match=says):
            rewards.main([str(a) for a in args])


def test_importing_rewards_needs_no_scorers_package():
    code = "import sys, rewards; assert not {'ImageReward', 'clip', 'timm', 'open_clip', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(rewards.__file__).parent)
