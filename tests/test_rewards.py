"""Rewards: every scorer against its original's own preprocessing, tokenizer and modules, on random weights in
the original layout; what is not there, not the model or not whole is refused; the score cache; errors."""

import importlib
import itertools
import json
import os
import shutil
import sys
import types
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import fails, t5_tokenizer, write_rows
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import load_file, save_file

import rewards
from lib import common, scorers
from lib.pictures import open_image, read_image
from lib.scorers import Scorer, warn_cut
from rewards import load_reward, read_scores, score_rows
from toy import build, world

TEXTS = ["a red circle", "two squares", "a photo of a cross left of a circle"]
STATS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ODD = [  # prompts that tokenizers read differently, if they are not the same tokenizer
    "a photo of a cat",
    "A Red CIRCLE, two squares; a cross!",
    "don't you're it's I'd we'll",
    "  spaces   and\ttabs and a\nnew line ",
    "Café naïve Zürich smörgåsbord",
    "cafe\u0301 with a combining accent",
    "1234567890 12:30 3.14 50%",
    "&amp; &lt;b&gt; &quot;quoted&quot;",
    "donâ€™t mend mojibake",
    "ΑΣ ΟΔΥΣΣΕΥΣ Σ",
    "漢字 and かな",
    "emoji 🐱🐶 and 👩‍👩‍👧",
    "under_score hy-phen slash/slash",
    "<|endoftext|> in a prompt",
    "[SEP] and [MASK] and [DEC] in a prompt",
    "control\x07character and soft\u00adhyphen",
    "full width ＡＢＣ１２３",
    "non\u00a0breaking space",
    'she said "yes" (twice)',
    "word " * 90,
]


def picture(w=40, h=40, mode="RGB", seed=0):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8))
    return image if mode == "RGB" else image.convert(mode)


def see_through(mode, w=50, h=37):
    """A picture whose alpha differs from pixel to pixel."""
    image = picture(w, h, seed=9).convert("RGBA")
    image.putalpha(picture(w, h, "L", seed=8))
    return image.convert(mode)


IMAGES = [picture(40, 40, seed=0), picture(61, 40, seed=1), picture(36, 77, seed=2)]
ODD_IMAGES = [
    *IMAGES,
    picture(33, 47, seed=3),
    picture(20, 20, seed=4),
    picture(200, 31, seed=5),
    picture(45, 60, "L", seed=6),
    picture(60, 45, "P", seed=7),
    picture(50, 41, "1", seed=8),
    picture(41, 50, "CMYK", seed=9),
    see_through("RGBA"),
    see_through("LA"),
]
PAIRS = list(zip(itertools.cycle(ODD_IMAGES), ODD))  # 20 of them


@pytest.fixture(scope="module")
def table():
    """name -> (pixels, ids, score): largest differences, printed at the end."""
    rows = {}
    yield rows
    print("\n\nlargest difference from the original's own code, fp32 on a CPU, random weights")
    print(f"{'scorer':16s} {'pixels':>9s} {'ids':>9s} {'score':>9s}  {'of about':>9s}")
    for name, (pixels, ids, score, size) in rows.items():
        print(f"{name:16s} {pixels:9.1e} {ids:9d} {score:9.1e}  {size:9.3g}")


def same(table, name, pixels, ids, scores, atol=1e-5):
    """Pixels, ids and scores, ours and the original's, agree; and the scores differ, or the test could not
    fail."""
    ours, reference = (torch.as_tensor(s).float() for s in scores)
    apart = max((a - b).abs().max().item() for a, b in zip(*pixels))
    wrong = sum(list(a) != list(b) for a, b in zip(*ids))
    table[name] = apart, wrong, (ours - reference).abs().max().item(), reference.abs().max().item()
    assert ours.shape == reference.shape and ours.std() > 100 * atol
    assert apart < 1e-5 and wrong == 0 and torch.allclose(ours, reference, rtol=0, atol=atol)


def prepared(spec):
    """(scorer, its pixels of the odd pictures)."""
    scorer = load_reward(spec)
    return scorer, [scorer.prepare(open_image(i)) for i in ODD_IMAGES]


def score_odd(scorer):
    return scorer([i for i, _ in PAIRS], [p for _, p in PAIRS])


def of_pairs(pixels):
    """The originals' pixels of the pairs' pictures, as a batch."""
    return torch.stack([x for x, _ in zip(itertools.cycle(pixels), PAIRS)])


def processor(size=32):
    """transformers' CLIPImageProcessor as it was when PickScore, MPS and CLIP-FlanT5 were trained: on PIL.
    Pictures must be RGB: it dropped alpha in those days, today's composites on white."""
    from transformers import CLIPImageProcessorPil

    whole = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=3,
        image_mean=STATS[0], image_std=STATS[1],
    )  # fmt: skip
    return lambda image: torch.as_tensor(whole(image, return_tensors="pt").pixel_values[0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random-weight CLIPs in the layouts of the real ones, with the toy's tokenizer."""
    root, tok, out = tmp_path_factory.mktemp("rewards"), build.make_tokenizer(), {}
    for i, name in enumerate(("clip", "hps", "pick")):
        torch.manual_seed(i)
        model = build.build_reward(name, tok)
        for p in model.parameters():  # away from the small values of an initialisation
            p.data += 0.1 * torch.randn_like(p)
        build.save_reward(name, model, tok, root / name)
        out[name] = root / name
    return out


def clip_config(folder):
    return json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A small open_clip model and a small CLIPModel of CLIP's own 49408 words, 77 at a time."""
    from transformers import CLIPConfig, CLIPModel

    root = tmp_path_factory.mktemp("english")
    tower = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = dict(
        embed_dim=32,
        vision_cfg=dict(image_size=32, layers=2, width=64, head_width=32, patch_size=8),
        text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2),
    )
    torch.manual_seed(0)
    models = {"open": open_clip.CLIP(**config)}
    towers = dict(text_config=dict(tower, vocab_size=49408))
    towers["vision_config"] = dict(tower, image_size=32, patch_size=8)
    models["hf"] = CLIPModel(CLIPConfig(projection_dim=64, **towers))
    for name, model in models.items():
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        (root / name).mkdir()
        state = {k: v.contiguous() for k, v in model.eval().state_dict().items()}
        save_file(state, root / name / f"{'open_clip_' if name == 'open' else ''}model.safetensors")
    (root / "open/open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    models["hf"].config.save_pretrained(root / "hf")
    return root, models, config


@pytest.fixture(scope="module")
def clip_words(tmp_path_factory):
    """CLIP's vocabulary in transformers' files, as AutoProcessor reads them from the hub for PickScore and
    MPS."""
    from transformers import CLIPTokenizer

    root, bpe = tmp_path_factory.mktemp("words"), open_clip.SimpleTokenizer()
    words = {w: i for w, i in bpe.encoder.items() if i < 49406}
    (root / "vocab.json").write_text(json.dumps({**words, "<|startoftext|>": 49406, "<|endoftext|>": 49407}))
    (root / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in bpe.bpe_ranks) + "\n")
    (root / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    tokenizer = CLIPTokenizer.from_pretrained(root)
    return lambda texts: (
        tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    )


# ----------------------------------------------------------------------------- parity: CLIP


@pytest.mark.parametrize("name", ["clip", "hpsv2", "hpsv2.1"])
def test_parity_of_clip_and_hpsv2_with_open_clips_cosine(english, table, name):
    root, models, config = english
    if name == "clip":
        pixels = [image_transform(32, is_train=False)(i) for i in ODD_IMAGES]
    else:
        pixels = [hpsv2_pixels(i, 32) for i in ODD_IMAGES]
    ids = open_clip.SimpleTokenizer(context_length=77)(ODD)
    with torch.no_grad():
        a = models["open"].encode_image(of_pairs(pixels), normalize=True)
        b = models["open"].encode_text(ids, normalize=True)
    scorer, ours = prepared(f"{name}={root / 'open'}")
    our_ids = scorers.open_clip_ids(root / "open", config["text_cfg"], name)(ODD)
    same(table, name, (ours, pixels), (our_ids.tolist(), ids.tolist()), (score_odd(scorer), (a * b).sum(-1)))


def hpsv2_pixels(image, size):
    """What hpsv2's image_transform does: RGB, a tensor, longer side by torchvision's resize, zeros around,
    normalise. (It would hand a picture with alpha on as four channels, which the model does not take.)"""
    from torchvision.transforms import functional as TF

    x = TF.to_tensor(image.convert("RGB"))
    scale = size / max(x.shape[1:])
    if scale != 1:
        wanted = [max(1, round(n * scale)) for n in x.shape[1:]]
        x = TF.resize(x, wanted, TF.InterpolationMode.BICUBIC, antialias=True)
    h, w = x.shape[1:]
    left, top = (size - w) // 2, (size - h) // 2
    return TF.normalize(TF.pad(x, [left, top, size - w - left, size - h - top]), *STATS)


def test_parity_of_pickscore_with_the_diagonal_of_clipmodels_logits(english, clip_words, table):
    root, models, _ = english
    pixels, ids = [processor()(i.convert("RGB")) for i in ODD_IMAGES], clip_words(ODD)
    with torch.no_grad():
        logits = models["hf"](input_ids=ids, pixel_values=of_pairs(pixels)).logits_per_image
    scorer, ours = prepared(f"pickscore={root / 'hf'}")
    our_ids = scorers.tokenize(scorers.clip_tokenizer(root / "hf", 49408), ODD, 77, "pickscore")[0]
    scores = score_odd(scorer), logits.diagonal()
    same(table, "pickscore", (ours, pixels), (our_ids.tolist(), ids.tolist()), scores, 1e-4)


def test_pickscore_cosine_is_pickscore_in_the_papers_unit(english):
    """BalancedDPO's Table III sums rewards: as PickScore is defined, 100 times the cosine, it is the sum."""
    root, models, _ = english
    scaled, plain = (score_odd(load_reward(f"pickscore{of}={root / 'hf'}")) for of in ("", "-cosine"))
    assert torch.allclose(plain * models["hf"].logit_scale.exp(), scaled, atol=1e-5)
    assert plain.abs().max() <= 1 < scaled.abs().max() and plain.std() > 1e-3


def test_a_model_scores_the_same_as_folder_and_as_file(english, monkeypatch, tmp_path):
    """A file is the published architecture, whatever lies beside it: here a small one."""
    from transformers import CLIPConfig

    root, models, config = english
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    monkeypatch.setattr(scorers, "VIT_H", models["hf"].config.to_dict())
    for name, folder, file in (
        ("clip", "open", "open_clip_model.safetensors"),
        ("hpsv2", "open", "open_clip_model.safetensors"),
        ("pickscore", "hf", "model.safetensors"),
    ):
        by_folder = score_odd(load_reward(f"{name}={root / folder}"))
        assert torch.equal(by_folder, score_odd(load_reward(f"{name}={root / folder / file}")))
    torch.save({"state_dict": load_file(root / "open/open_clip_model.safetensors")}, tmp_path / "hps.pt")
    by_folder = score_odd(load_reward(f"hpsv2={root / 'open'}"))  # as HPSv2's own file is
    assert torch.equal(by_folder, score_odd(load_reward(f"hpsv2={tmp_path / 'hps.pt'}")))
    assert CLIPConfig(**scorers.VIT_H).text_config.vocab_size == 49408


# ----------------------------------------------------------------------------- parity: BLIP


def bert_vocabulary(folder):
    """A BERT vocabulary that can spell: pieces for every character of the odd prompts, and some words."""
    words = "a red circle two square photo cross left of ##s".split()
    letters = sorted({c for text in ODD for c in text.lower() + "ς" if not c.isspace()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = list(dict.fromkeys(special + words + letters + [f"##{c}" for c in letters] + ["[DEC]", "[ENC]"]))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return len(words)


@pytest.fixture
def original_blip(monkeypatch):
    """The modules med, vit and ImageReward of the `image-reward` package. Under transformers 5 the package
    does not import: its __init__ wants modules that nobody declares, and names that have moved; here they are
    put back."""
    from transformers import PreTrainedModel, modeling_utils, pytorch_utils

    root = Path(find_spec("ImageReward").submodule_search_locations[0])
    for name, path in (("ImageReward", root), ("ImageReward.models", root / "models")):
        package = types.ModuleType(name)  # the package without its __init__
        package.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, package)
    for name in ("apply_chunking_to_forward", "prune_linear_layer"):
        monkeypatch.setattr(modeling_utils, name, getattr(pytorch_utils, name), raising=False)
    monkeypatch.setattr(modeling_utils, "find_pruneable_heads_and_indices", None, raising=False)
    monkeypatch.setattr(PreTrainedModel, "get_head_mask", lambda self, mask, n: [None] * n, raising=False)
    low = torch.finfo(torch.float32).min
    invert = lambda self, m: (1.0 - m[:, None, None].float()) * low
    monkeypatch.setattr(PreTrainedModel, "invert_attention_mask", invert, raising=False)
    med = importlib.import_module("ImageReward.models.BLIP.med")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    monkeypatch.setattr(med.BertPreTrainedModel, "all_tied_weights_keys", {}, raising=False)
    monkeypatch.setattr(med.BertModel, "init_weights", lambda self: None, raising=False)
    yield med, vit, importlib.import_module("ImageReward.ImageReward")
    for name in [n for n in sys.modules if n.startswith("ImageReward")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def blip_folder(original_blip, folder, name):
    """A small BLIP with a head, made of the package's modules, in the layout of the checkpoints; sizes in
    config.json."""
    from transformers import BertConfig, BlipConfig

    med, vit, package = original_blip
    torch.manual_seed(0)
    size = bert_vocabulary(folder)
    text = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    text.update(vocab_size=size, max_position_embeddings=160, layer_norm_eps=1e-12)
    config = BertConfig(**text, add_cross_attention=True)
    config.encoder_width = 64
    eye = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1)
    eye.update(image_size=32, patch_size=8, layer_norm_eps=1e-6)
    BlipConfig(text_config=dict(text, encoder_hidden_size=64), vision_config=eye).save_pretrained(folder)
    blip = {
        "visual_encoder": vit.VisionTransformer(32, 8, embed_dim=64, depth=3, num_heads=1),
        "text_encoder": med.BertModel(config=config, add_pooling_layer=False),
        "vision_proj": torch.nn.Linear(64, 8),
        "text_proj": torch.nn.Linear(128, 8),
    }
    model = torch.nn.ModuleDict({"blip": torch.nn.ModuleDict(blip), "mlp": package.MLP(128)}).eval()
    if name == "cyclereward":  # GELU between the layers, no dropout
        sizes = [128, 1024, 128, 64, 16, 1]
        layers = [m for i, o in itertools.pairwise(sizes) for m in (torch.nn.Linear(i, o), torch.nn.GELU())]
        model["mlp"].layers = torch.nn.Sequential(*layers[:-1])
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    torch.save(model.state_dict(), folder / "weights.pt")
    return model, size


@pytest.mark.parametrize("name", ["imagereward", "cyclereward"])
def test_parity_of_imagereward_and_cyclereward_with_the_package(original_blip, tmp_path, table, name):
    from transformers import BertTokenizer
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    model, size = blip_folder(original_blip, tmp_path, name)
    pixels = [original_blip[2]._transform(32)(i) for i in ODD_IMAGES]
    tokenizer = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))  # the tokenizer of those days, in Python
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    length = 35 if name == "imagereward" else 128
    cut = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    text = tokenizer(ODD, **cut)
    with torch.no_grad():
        seen = model["blip"]["visual_encoder"](of_pairs(pixels))
        all_seen = torch.ones(seen.shape[:2], dtype=torch.long)
        crossed = dict(encoder_hidden_states=seen, encoder_attention_mask=all_seen, return_dict=True)
        read = model["blip"]["text_encoder"](text.input_ids, attention_mask=text.attention_mask, **crossed)
        reference = model["mlp"](read.last_hidden_state[:, 0])[:, 0]
    if name == "imagereward":
        reference = (reference - 0.16717362830052426) / 1.0333394966054072
    scorer, ours = prepared(f"{name}={tmp_path}")
    words = scorers.load_tokenizer(BertTokenizer, tmp_path, size, extra=("[DEC]", "[ENC]"))
    lowered = [scorers.lower(p, words.get_added_vocab()) for p in ODD]
    ids = scorers.tokenize(words, lowered, length, name)[0].tolist(), text.input_ids.tolist()
    atol = 1e-5 * max(1, reference.abs().max().item())
    same(table, name, (ours, pixels), ids, (score_odd(scorer), reference), atol)


# ----------------------------------------------------------------------------- parity: MPS


def slow_mps(state, clip, ids, condition, pixels, tau):
    """MPS for one pair with loops over layers, tokens and heads, in float64, from the published
    architecture."""
    w = {k: v.double() for k, v in state.items()}
    with torch.no_grad():
        text = clip.text_projection(clip.text_model(ids[None]).last_hidden_state)[0].double()
        cond = clip.text_projection(clip.text_model(condition[None]).last_hidden_state)[0].double()
        x = clip.visual_projection(clip.vision_model(pixels[None]).last_hidden_state)[0].double()
    near = torch.stack([max(t @ c for c in cond) for t in text])
    keep = [i for i in range(len(text)) if near[i] / near.max() > tau]
    gate = lambda v: v[: len(v) // 2] * F.silu(v[len(v) // 2 :])

    def norm(v, key):
        v = (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()
        return v * w[f"{key}.weight"] + w[f"{key}.bias"]

    def turn(v, position, inv_freq):  # rotary embedding of one vector
        half, angles = len(v) // 2, position * inv_freq
        a, b = v[:half], v[half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    def attend(q, keys, values):  # one query, every head against the one set of keys
        return torch.cat([torch.softmax(keys @ h / 8, 0) @ values for h in q.split(64)])

    for n in range(4):
        p = f"mps.cross_model.layers.{n}."
        kv = text[keep] @ w[p + "0.fn.to_kv.weight"].T
        rows = []
        for v in x:
            h = norm(v, p + "0.fn.norm")
            mixed = attend(w[p + "0.fn.to_q.weight"] @ h, kv[:, :64], kv[:, 64:])
            beside = w[p + "0.fn.ff.2.weight"] @ gate(w[p + "0.fn.ff.0.weight"] @ h)
            rows.append(v + w[p + "0.fn.to_out.weight"] @ mixed + beside)
        x, turns = torch.stack(rows), w[p + "1.fn.rotary_emb.inv_freq"]
        fused = [w[p + "1.fn.fused_attn_ff_proj.weight"] @ norm(v, p + "1.fn.norm") for v in x]
        keys = torch.stack([turn(f[1024:1088], i, turns) for i, f in enumerate(fused)])
        values, rows = torch.stack([f[1088:1152] for f in fused]), []
        for i, (v, f) in enumerate(zip(x, fused)):
            q = torch.cat([turn(h, i, turns) for h in f[:1024].split(64)])
            beside = w[p + "1.fn.ff_out.1.weight"] @ gate(f[1152:])
            rows.append(v + w[p + "1.fn.attn_out.weight"] @ attend(q, keys, values) + beside)
        x = torch.stack(rows)
    end = text[ids.argmax()]
    return clip.logit_scale.double().exp() * (x[0] @ end) / x[0].norm() / end.norm()


def mps_folder(english, folder):
    """A small MPS: the published cross-attention over a small CLIP."""
    clip, dim = english[1]["hf"], 64
    torch.manual_seed(3)
    state = {f"mps.model.{k}": v.contiguous() for k, v in clip.state_dict().items()}
    for n in range(4):
        shapes = {f"{part}.fn.norm.{name}": (dim,) for part in (0, 1) for name in ("weight", "bias")}
        shapes.update({"0.fn.to_q.weight": (1024, dim), "0.fn.to_kv.weight": (128, dim)})
        shapes.update({"0.fn.to_out.weight": (dim, 1024), "0.fn.ff.0.weight": (8 * dim, dim)})
        shapes.update({"0.fn.ff.2.weight": (dim, 4 * dim), "1.fn.attn_out.weight": (dim, 1024)})
        shapes["1.fn.fused_attn_ff_proj.weight"] = (1152 + 8 * dim, dim)
        shapes["1.fn.ff_out.1.weight"] = (dim, 4 * dim)
        for key, shape in shapes.items():
            state[f"mps.cross_model.layers.{n}.{key}"] = torch.randn(shape) / dim**0.5
        inv_freq = 10000 ** (-torch.arange(0, 64, 2).float() / 64)
        state[f"mps.cross_model.layers.{n}.1.fn.rotary_emb.inv_freq"] = inv_freq
    save_file(state, folder / "model.safetensors")
    clip.config.save_pretrained(folder)
    return clip.eval(), state


@pytest.mark.parametrize("tau", [0.01, 0.7])  # .7 masks tokens out on these weights
def test_parity_of_mps_with_a_slow_loop_whatever_the_batch(
    english, clip_words, table, tmp_path, monkeypatch, tau
):
    clip, state = mps_folder(english, tmp_path)
    monkeypatch.setattr(scorers, "TAU", tau)
    pixels, ids = [processor()(i.convert("RGB")) for i in ODD_IMAGES], clip_words(ODD)
    condition = clip_words([scorers.CONDITION])[0]
    chosen = range(0, len(PAIRS), 3)
    slow = partial(slow_mps, state, clip)
    reference = [slow(ids[n], condition, pixels[n % len(pixels)], tau).detach() for n in chosen]
    scorer, ours = prepared(f"mps={tmp_path}")
    scores = score_odd(scorer)
    our_ids = scorers.tokenize(scorers.clip_tokenizer(tmp_path, 49408), ODD, 77, "mps")[0]
    both = torch.stack([scores[n] for n in chosen]), torch.stack(reference)
    name = "mps" if tau == 0.01 else "mps, tau .7"
    same(table, name, (ours, pixels), (our_ids.tolist(), ids.tolist()), both, 1e-4)
    alone = scorer([i for i, _ in PAIRS[:4]], [p for _, p in PAIRS[:4]], batch_size=1)
    assert torch.allclose(alone, scores[:4], atol=1e-4)  # the largest similarity is each pair's own


# ----------------------------------------------------------------------------- parity: VQAScore


def vqa_folder(folder, surplus=0, tower_inside=False):
    """A small CLIP-FlanT5 in the layout of the checkpoints -> (tokenizer, t5, tower, projector, state
    dict)."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(4)
    tok = t5_tokenizer(folder)
    eye = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    tower = CLIPVisionModel(CLIPVisionConfig(**eye, image_size=32, patch_size=8)).eval()
    tower.save_pretrained(folder / "tower")
    size = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, mm_hidden_size=48)
    size.update(feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    config = T5Config(vocab_size=len(tok) + surplus, mm_vision_tower=str(folder / "tower"), **size)
    t5 = T5ForConditionalGeneration(config).eval()
    projector = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    for p in [*t5.parameters(), *projector.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    t5.lm_head.weight.data *= 0.03  # probabilities well inside (0, 1)
    config.save_pretrained(folder)
    state = {**t5.state_dict(), **{f"mm_projector.{k}": v for k, v in projector.state_dict().items()}}
    state["embed_tokens.weight"] = t5.shared.weight  # as its class saves it
    if tower_inside:
        for p in tower.parameters():
            p.data += 0.1 * torch.randn_like(p)
        names = {k: f"vision_model.{k.removeprefix('vision_model.')}" for k in tower.state_dict()}
        inside = {f"vision_tower.vision_tower.{names[k]}": v for k, v in tower.state_dict().items()}
        state.update(inside)
    torch.save({k: v.clone() for k, v in state.items()}, folder / "pytorch_model.bin")
    return tok, t5, tower, projector, state


def vqa_ids(tok, prompt):
    """The original's two sides of the image, each with its end token."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
    )
    whole = system + f'Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
    return [tok(side, return_tensors="pt").input_ids for side in whole.split("<image>")]


def vqa_reference(tok, t5, tower, projector, images, prompts):
    """T5's own loss, one pair at a time, with LLaVA's picture in a square."""
    out = []
    for image, prompt in zip(images, prompts):
        with torch.no_grad():
            seen = tower(llava_pixels(image, 32)[None], output_hidden_states=True).hidden_states[-2][:, 1:]
            left, right = (t5.shared(ids) for ids in vqa_ids(tok, prompt))
            embeds = torch.cat([left, projector(seen), right], 1)
            labels = tok("Yes", return_tensors="pt").input_ids
            out.append((-t5(inputs_embeds=embeds, labels=labels).loss).exp())
    return torch.stack(out)


def llava_pixels(image, size):
    """RGB, a square of the mean colour around it, then the CLIPImageProcessor."""
    image = image.convert("RGB")
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), tuple(int(x * 255) for x in STATS[0]))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return processor(size)(canvas)


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    """(folder, tokenizer, the pairs' scores one at a time)."""
    folder = tmp_path_factory.mktemp("vqa")
    tok, t5, tower, projector, _ = vqa_folder(folder)
    images, prompts = [i for i, _ in PAIRS], [p for _, p in PAIRS]
    return folder, tok, vqa_reference(tok, t5, tower, projector, images, prompts)


@pytest.mark.parametrize("name", ["vqascore", "vqascore-xl"])
def test_parity_of_vqascore_with_the_loss_of_t5_one_pair_at_a_time(vqa, table, name):
    folder, tok, reference = vqa
    scorer, ours = prepared(f"{name}={folder}")
    asked = [scorers.QUESTION.format(p) for p in ODD]
    ids = tok(asked).input_ids, [vqa_ids(tok, p)[1][0].tolist() for p in ODD]
    pixels = [llava_pixels(i, 32) for i in ODD_IMAGES]
    same(table, name, (ours, pixels), ids, (score_odd(scorer), reference), 1e-6)
    half = score_odd(load_reward(f"{name}-bf16={folder}"))
    assert torch.allclose(half, reference, rtol=0.1) and not torch.equal(half, reference)
    assert not torch.equal(half, half.bfloat16().float())  # the logits are rounded, the score is not


def test_vqascore_drops_surplus_words_and_takes_the_tower_of_the_checkpoint(tmp_path):
    tok, t5, tower, projector, _ = vqa_folder(tmp_path, surplus=28, tower_inside=True)
    with_surplus = vqa_reference(tok, t5, tower, projector, IMAGES, TEXTS)
    t5.lm_head.weight.data = t5.lm_head.weight.data[: len(tok)]  # the original resizes it to the tokenizer
    t5.config.vocab_size = len(tok)
    reference = vqa_reference(tok, t5, tower, projector, IMAGES, TEXTS)
    ours = load_reward(f"vqascore={tmp_path}")(IMAGES, TEXTS)
    assert torch.allclose(ours, reference, atol=1e-6) and not torch.allclose(ours, with_surplus, atol=1e-6)


# ----------------------------------------------------------------------------- parity: aesthetic


def aesthetic_folder(folder):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(5)
    eye = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    eye.update(image_size=32, patch_size=8, projection_dim=768)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**eye)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    n = torch.nn
    layers = [n.Linear(768, 1024), n.Dropout(0.2), n.Linear(1024, 128), n.Dropout(0.2), n.Linear(128, 64)]
    layers += [n.Dropout(0.1), n.Linear(64, 16), n.Linear(16, 1)]
    mlp = n.ModuleDict({"layers": n.Sequential(*layers)}).eval()
    for p in mlp.parameters():
        p.data += 0.1 * torch.randn_like(p)
    torch.save(mlp.state_dict(), folder / "aesthetic-model.pth")
    return model, mlp


def test_parity_of_aesthetic_with_the_mlp_layer_by_layer(tmp_path, table):
    """OpenAI's clip.load has open_clip's order: resize, crop, RGB."""
    model, mlp = aesthetic_folder(tmp_path)
    pixels = [image_transform(32, is_train=False)(i) for i in ODD_IMAGES]
    with torch.no_grad():
        e = model(of_pairs(pixels)).image_embeds
        reference = mlp["layers"](e / e.norm(dim=-1, keepdim=True))[:, 0]
    scorer, ours = prepared(f"aesthetic={tmp_path}")
    atol = 1e-5 * max(1, reference.abs().max().item())
    same(table, "aesthetic", (ours, pixels), ([], []), (score_odd(scorer), reference), atol)


# ----------------------------------------------------------------------------- what is loaded


def test_the_published_sizes_are_those_of_the_papers():
    from transformers import BlipConfig, CLIPConfig, CLIPModel

    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**scorers.VIT_H))
        blip = scorers.BlipReward(BlipConfig(**scorers.BLIP_L), gelu=False)
        mps = scorers.MpsModel(CLIPConfig(**scorers.VIT_H))
        twin = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(clip) == count(twin) and count(blip.mlp) == 927_969
    assert "visual.transformer.resblocks.31.ln_1.weight" in twin.state_dict()
    assert round(4 * count(mps) / 1e7) == 442  # the size of its file, 4.42 GB of fp32
    shapes = {key: value.shape for key, value in blip.state_dict().items()}
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert "blip.visual_encoder.encoder.layers.23.layer_norm1.weight" in shapes


def weights_of(folder):
    path = next(p for p in sorted(folder.iterdir()) if p.suffix in scorers.WEIGHTS)
    return path, load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def save_weights(path, state):
    state = {k: v.contiguous().clone() for k, v in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.fixture(scope="module")
def every(folders, english, tmp_path_factory):
    """A folder of a small model for each kind of checkpoint."""
    root = tmp_path_factory.mktemp("every")
    for name in ("imagereward", "mps", "vqascore", "aesthetic"):
        (root / name).mkdir()
    patch = pytest.MonkeyPatch()
    generator = original_blip.__wrapped__(patch) if hasattr(original_blip, "__wrapped__") else None
    blip_folder(next(generator), root / "imagereward", "imagereward")
    patch.undo()
    mps_folder(english, root / "mps")
    vqa_folder(root / "vqascore", tower_inside=True)
    aesthetic_folder(root / "aesthetic")
    shutil.copytree(folders["clip"], root / "clip")
    shutil.copytree(folders["pick"], root / "pickscore")
    return root


@pytest.fixture(scope="module")
def scores_of_every(every):
    return {name: load_reward(f"{name}={every / name}")(IMAGES, TEXTS) for name in LAST}


# the last of something: a head's layer, a block, what would be tied or made up
LAST = {
    "clip": "visual.proj",
    "pickscore": "vision_model.encoder.layers.2.mlp.fc2.weight",
    "imagereward": "mlp.layers.7.weight",
    "mps": "mps.cross_model.layers.3.1.fn.ff_out.1.weight",
    "vqascore": "lm_head.weight",
    "aesthetic": "layers.7.weight",
}


@pytest.mark.parametrize("name", LAST)
def test_a_checkpoint_that_is_not_whole_or_not_the_model_is_refused_by_name(every, tmp_path, name):
    folder, key = shutil.copytree(every / name, tmp_path / "model"), LAST[name]
    path, state = weights_of(folder)
    if name == "aesthetic":
        path = folder / "aesthetic-model.pth"
        state = torch.load(path, weights_only=True)
    value = state[key]
    for says, key, change in (
        ("missing keys", key, {k: v for k, v in state.items() if k != key}),
        ("unexpected keys", f"{key}.extra", {**state, f"{key}.extra": torch.zeros(2)}),
        ("wrong shapes", key, {**state, key: value[:-1] if len(value) > 1 else value[:, :-1]}),
    ):
        save_weights(path, change)
        with pytest.raises(SystemExit, match=f"{folder}.*{says}.*{key.rpartition('.')[0]}") as e:
            load_reward(f"{name}={folder}")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage", ["gone", "half"])
@pytest.mark.parametrize("name", LAST)
def test_a_damaged_folder_is_refused_by_name_or_scores_the_same(
    every, scores_of_every, tmp_path, monkeypatch, name, damage
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for n, file in enumerate(sorted(p for p in (every / name).iterdir() if p.is_file())):
        folder = shutil.copytree(every / name, tmp_path / str(n))
        if damage == "gone":
            (folder / file.name).unlink()
        else:
            (folder / file.name).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        try:
            scores = load_reward(f"{name}={folder}")(IMAGES, TEXTS)
        except SystemExit as e:
            assert str(folder) in str(e) and "\n" not in str(e), (file.name, e)
        else:
            assert torch.equal(scores, scores_of_every[name]), file.name


def test_a_file_that_is_torn_or_gone_of_several_is_named(tmp_path):
    """VQAScore's weights are several files and an index."""
    *_, state = vqa_folder(tmp_path)
    whole = load_reward(f"vqascore={tmp_path}")(IMAGES, TEXTS)
    (tmp_path / "pytorch_model.bin").unlink()
    parts = [f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)]
    place = {key: parts[n % 3] for n, key in enumerate(state)}
    for part in parts:
        torch.save({k: v.clone() for k, v in state.items() if place[k] == part}, tmp_path / part)
    index = dict(metadata={}, weight_map=place)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(load_reward(f"vqascore={tmp_path}")(IMAGES, TEXTS), whole)
    content = (tmp_path / parts[1]).read_bytes()
    for damage in (content[: len(content) // 2], None):
        (tmp_path / parts[1]).unlink()
        if damage:
            (tmp_path / parts[1]).write_bytes(damage)
        with pytest.raises(SystemExit, match=f"{tmp_path}.*{parts[1]}") as e:
            load_reward(f"vqascore={tmp_path}")
        assert "\n" not in str(e.value) and parts[0] not in str(e.value)


def test_a_file_of_junk_is_refused_by_name(tmp_path):
    for file in ("junk.pt", "junk.safetensors"):
        for junk in (b"", b"PK\x03\x04junk", b"\x80\x02]q\x00."):
            (tmp_path / file).write_bytes(junk)
            with pytest.raises(SystemExit, match=f"reward hpsv2=.*could not be loaded.*{file}") as e:
                load_reward(f"hpsv2={tmp_path / file}")
            assert "\n" not in str(e.value) and len(str(e.value)) < 600
    torch.save({"a": 1}, tmp_path / "junk.pt")
    with pytest.raises(SystemExit, match="junk.pt: holds no state dict"):
        load_reward(f"hpsv2={tmp_path / 'junk.pt'}")


def test_loading_shows_no_bars_and_no_warnings_of_libraries(every, capfd):
    load_reward(f"vqascore={every}/vqascore")
    assert capfd.readouterr() == ("", "")


def test_what_is_named_is_what_is_loaded(folders, tmp_path):
    """A folder's config and tokenizer say nothing about a file in it; two weights in a folder are a
    question."""
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    file = folder / "HPS_v2.1_compressed.pt"
    torch.save(load_file(folders["hps"] / "open_clip_model.safetensors"), file)
    for spec in (f"hpsv2.1={file}", f"clip={folder / 'open_clip_model.safetensors'}"):
        with pytest.raises(SystemExit, match="not such a checkpoint"):  # no ViT-H-14
            load_reward(spec)
    of_hps = load_reward(f"hpsv2={folders['hps']}")(IMAGES, TEXTS)
    assert torch.allclose(load_reward(f"hpsv2.1={folder}")(IMAGES, TEXTS), of_hps, atol=1e-6)
    (folder / "open_clip_model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(SystemExit, match="open_clip_model.safetensors is wanted there, found HPS.*other"):
        load_reward(f"clip={folder}")


def test_a_preprocessing_other_than_clips_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    plain = load_reward(f"clip={folder}")(IMAGES, TEXTS)
    for mean, fits in ((list(STATS[0]), True), ([0.5, 0.5, 0.5], False)):
        config["preprocess_cfg"] = {"mean": mean, "std": list(STATS[1]), "interpolation": "bicubic"}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        if fits:
            assert torch.equal(load_reward(f"clip={folder}")(IMAGES, TEXTS), plain)
        else:
            with pytest.raises(SystemExit, match="another mean than CLIP's in preprocess_cfg"):
                load_reward(f"clip={folder}")


# ----------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("how", ["gone", "foreign"])
@pytest.mark.parametrize("name", ["clip", "pickscore", "imagereward", "vqascore"])
def test_a_tokenizer_that_is_gone_or_another_models_is_refused(every, tmp_path, monkeypatch, name, how):
    """transformers 5 returns a tokenizer of 2 to 5 words where the files are not there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = shutil.copytree(every / name, tmp_path / "model")
    files = [p for p in folder.iterdir() if "token" in p.name or p.name == "vocab.txt"]
    assert files
    for file in files:
        file.unlink()
    if how == "foreign":
        other = every / ("clip" if name in ("imagereward", "vqascore") else "vqascore")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(other / file, folder / file)
    with pytest.raises(SystemExit, match="tokenizer") as e:
        load_reward(f"{name}={folder}")
    assert "\n" not in str(e.value)


def test_a_weights_file_brings_no_tokenizer(every, tmp_path, monkeypatch):
    """imagereward=FILE.pt on a node without the hub: every prompt would get the same score."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(scorers, "BLIP_L", json.loads((every / "imagereward/config.json").read_text()))
    state = torch.load(every / "imagereward/weights.pt", weights_only=True)
    torch.save(state, tmp_path / "imagereward.pt")
    shutil.copy(every / "imagereward/vocab.txt", tmp_path)
    torch.save({k.replace("layers.7", "layers.8"): v for k, v in state.items()}, tmp_path / "cyclereward.pt")
    for name in ("imagereward", "cyclereward"):
        with pytest.raises(SystemExit, match="bert-base-uncased.*FOLDER.*vocab.txt"):
            load_reward(f"{name}={tmp_path / name}.pt")


def test_batches_do_not_change_scores(folders):
    images, texts = [picture(seed=s) for s in range(40)], (TEXTS * 14)[:40]
    score = load_reward(f"clip={folders['clip']}")
    assert torch.allclose(score(images, texts, batch_size=1), score(images, texts, batch_size=32), atol=1e-5)
    assert score([], []).shape == (0,)


# ----------------------------------------------------------------------------- preprocessing


def test_sixteen_bits_are_scaled_not_clipped(tmp_path, folders):
    grey = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], grey)
    eight = Image.fromarray(grey.astype(np.uint8))
    score = load_reward(f"clip={folders['clip']}")
    assert torch.equal(score([tmp_path / "deep.png"], ["a circle"]), score([eight], ["a circle"]))


def test_long_prompts_are_cut_and_said_so_once(folders, capsys):
    warn_cut.cache_clear()
    for name in ("clip", "pickscore"):
        score = load_reward(f"{name}={folders['pick' if name == 'pickscore' else 'clip']}")
        for _ in range(2):
            score([picture()], ["circle " * 40])
    err = capsys.readouterr().err
    assert err.count("clip: prompts of more than 16 tokens are cut there") == 1
    assert err.count("pickscore: prompts of more than 16 tokens are cut there") == 1


def bad_pictures(folder):
    """(name of a file that is no picture to be scored, what is said)."""
    (folder / "junk.png").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "dir.png").mkdir()
    good = folder / "good.png"
    picture(300, 300).save(good)
    (folder / "torn.png").write_bytes(good.read_bytes()[:5000])
    (folder / "changed.png").write_bytes(good.read_bytes()[:3000] + b"xxxx" + good.read_bytes()[3004:])
    Image.new("L", (1, 12000)).save(folder / "tall.png")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.new("F", (20, 20)).save(folder / "float.tiff")
    Image.fromarray(np.full((20, 20), 1 << 20, dtype=np.int32)).save(folder / "deep.tiff")
    names = [f"{name}.png" for name in ("junk", "empty", "dir", "torn", "changed", "bomb", "gone", "nul\0")]
    unread = [(n, "not a readable image") for n in (*names, "float.tiff", "deep.tiff")]
    return [*unread, ("tall.png", "too elongated")]


def test_pictures_that_cannot_be_read_are_problems_by_name(folders, tmp_path):
    scorer = load_reward(f"clip={folders['clip']}")
    for file, says in bad_pictures(tmp_path):
        loaded, problem = scorer.load(tmp_path / file, "a circle")
        assert loaded is None and says in problem, (file, problem)


# ----------------------------------------------------------------------------- stored scores


def test_the_checker_is_a_scorer():
    rng = np.random.default_rng(0)
    prompts = ["two circles", "a red square"]
    images = [world.render(p, rng) for p in prompts]
    assert load_reward("toyworld")(images, prompts).tolist() == [1, 1]
    assert load_reward("toyworld")(images[::-1], prompts).tolist() == [0, 0]
    with pytest.raises(SystemExit, match="reward toyworld:.*'a horse' is not a sentence of the toy world"):
        load_reward("toyworld")(images, ["a horse", "two circles"])


# ----------------------------------------------------------------------------- name=FILE.py:function


def test_the_function_of_the_documentation_scores_a_folder(album, monkeypatch, capsys):
    """docs/rewards.md's example as it stands there, by its own command; an edit of the file scores anew."""
    folder, rows = album
    page = (common.HERE / "docs/rewards.md").read_text()
    code = page.partition("```python\n# jpeg.py\n")[2].partition("```")[0]
    command = next(line for line in page.splitlines() if "=jpeg.py:" in line).split()
    monkeypatch.chdir(folder.parent)
    Path("jpeg.py").write_text(code)
    args = [str(folder) if word == "FOLDER" else word for word in command[2:]]
    rewards.main(args)
    spec, sizes = args[-1], {}
    for i, (_, files) in enumerate(rows):
        for file in files:
            Image.open(folder / file).save("one.jpg", quality=95)
            sizes.setdefault(i, []).append(-os.path.getsize("one.jpg") / 1000)
    scores = read_scores(folder, spec, rows)
    assert all(np.allclose(scores[i], sizes[i], atol=1e-6) for i in range(3)) and scores[0] != scores[1]
    monkeypatch.setattr(Scorer, "stream", None)
    rewards.main(args)  # all is there already
    Path("jpeg.py").write_text(code + "# edited\n")
    assert read_scores(folder, spec, rows) == {}
    assert read_scores(folder, spec.replace(":compressibility", ":kilobytes"), rows) == {}
    monkeypatch.undo()
    one = ["--image", f"{folder}/a0.png", "--prompt", "a"]
    rewards.main([*one, "--rewards", f"k={folder.parent}/jpeg.py:kilobytes"])
    assert f"{-sizes[0][0]:.4f}" in capsys.readouterr().out


OWN = """import torch

seen = []


def wide(images, prompts):
    seen.append([image.mode for image in images])
    return torch.tensor([image.width + len(p) for image, p in zip(images, prompts)])


def broken(images, prompts):
    halves = [image.width / 2 for image in images]
    return [1 / (h - h) for h in halves]


def nothing(images, prompts):
    return [1, float("nan")]
"""


def test_a_function_of_ones_own_gets_rgb_images_and_its_errors_are_told_with_its_line(tmp_path):
    file = tmp_path / "a:b = c.py"
    file.write_text(OWN)
    pictures = [see_through("RGBA"), picture(61, 40, "L")]
    score = load_reward(f"own={file}:wide")
    assert score(pictures, ["a", "bcd"]).tolist() == [51, 64] and score.name == "own"
    assert rewards.user_function("own", str(file), "wide").__globals__["seen"] == [["RGB", "RGB"]]
    with pytest.raises(SystemExit, match=f"^reward own: {file}, line 13: ZeroDivisionError: ") as e:
        load_reward(f"own={file}:broken")(pictures, TEXTS[:2])
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="own: pair 1: the score is nan"):
        load_reward(f"own={file}:nothing")(pictures, TEXTS[:2])


def test_a_function_returns_a_list_tuple_array_or_tensor_and_nothing_else():
    """A dict would give its keys, a set its own order, bytes their codes."""
    tensor = torch.tensor([1, 2.5], requires_grad=True)
    for found in ([1, 2.5], (1, np.float32(2.5)), np.array([[1], [2.5]]), tensor, [tensor[0], tensor[1:]]):
        assert rewards.as_numbers(found, 2).tolist() == [1, 2.5]
    of_two = {0: 1, 1: 2}
    for found in (of_two, of_two.keys(), {1, 2}, b"ab", memoryview(b"ab"), iter([1, 2]), range(2), None, 1.0):
        with pytest.raises(ValueError, match=f"array or tensor is wanted, not a {type(found).__name__}$"):
            rewards.as_numbers(found, 2)
    for found, says in (([0.0], "1 scores for 2 pairs"), (["1", 2], "'1', which is no number")):
        with pytest.raises(ValueError, match=says):
            rewards.as_numbers(found, 2)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("own={}/gone.py:f", "reward own: .*gone.py: no such file"),
        ("own={}/good.py:f", "reward own: .*good.py defines no function f"),
        ("own={}/syntax.py:f", "reward own: .*syntax.py, line 2: SyntaxError: "),
        ("clip={}/good.py:wide", "clip means something else already"),
        ("a/b={}/good.py:wide", "must be a word, not 'a/b'"),
        ("own={}/good.py", "unknown reward .*name=FILE.py:function"),
    ],
)
def test_a_function_that_cannot_be_had_ends_at_the_start(tmp_path, spec, says):
    (tmp_path / "good.py").write_text(OWN)
    (tmp_path / "syntax.py").write_text("def f(images, prompts):\n    return [")
    with pytest.raises(SystemExit, match=says) as e:
        rewards.check_rewards([spec.format(tmp_path)])
    assert "\n" not in str(e.value)


@pytest.fixture
def album(tmp_path):
    """Three rows of two pictures, as synpic.py writes them."""
    prompts = {"a": "a circle", "b": "two squares", "c": "a cross"}
    rows = [(prompt, [f"{name}0.png", f"{name}1.png"]) for name, prompt in prompts.items()]
    for i, (_, files) in enumerate(rows):
        for j, file in enumerate(files):
            picture(seed=10 * i + j).save(tmp_path / file)
    write_rows(tmp_path, [{"prompt": p, "file_names": f} for p, f in rows])
    return tmp_path, rows


def test_scores_are_stored_and_taken_up_again(album, folders, monkeypatch):
    folder, rows = album
    spec, path = f"clip={folders['clip']}", folder / "scores/clip.jsonl"
    args = ["--score", str(folder), "--rewards", spec, "--device", "cpu", "--batch_size", "2"]
    rewards.main(args)
    whole, scores = path.read_text(), read_scores(folder, spec, rows)
    files, prompts = [folder / f for _, files in rows for f in files], [p for p, f in rows for _ in f]
    expected = load_reward(spec)(files, prompts).view(3, 2)
    assert np.allclose([scores[i] for i in range(3)], expected, atol=1e-6)
    path.write_text(whole[:-20])  # killed while it wrote the last row
    assert sorted(read_scores(folder, spec, rows)) == [0, 1]
    seen, stream = [], Scorer.stream
    record = lambda self, images, *a: seen.extend(images) or stream(self, images, *a)
    monkeypatch.setattr(Scorer, "stream", record)
    rewards.main(args)
    assert [p.name for p in seen] == ["c0.png", "c1.png"]
    assert read_scores(folder, spec, rows) == scores and path.read_text() == whole
    moved = folders["clip"].rename(folders["clip"].with_name("moved"))
    try:  # the same weights elsewhere: nothing to do
        assert read_scores(folder, f"clip={moved}", rows) == scores
        assert read_scores(folder, f"clip={folders['hps']}", rows) == {}  # other weights: nothing counts
    finally:
        moved.rename(folders["clip"])


def test_a_run_killed_anywhere_leaves_the_bytes_of_an_unbroken_one(album, folders):
    """Rows straddle batches of 4: a resumed run computes whole batches, cut by position."""
    folder, rows = album
    spec, path = f"clip={folders['clip']}", folder / "scores/clip.jsonl"
    rows = rows + [(f"{p} above a circle", files) for p, files in rows]
    score, scorer = partial(score_rows, folder, spec, rows, batch_size=4), load_reward(spec)
    score()
    whole = path.read_bytes()
    ends = [n + 1 for n, c in enumerate(whole) if c == 10]
    for cut in sorted({0, 1, *ends, *(e - 1 for e in ends), *(e - 30 for e in ends)}):
        path.write_bytes(whole[:cut])
        score(load=lambda spec, device: scorer)
        assert path.read_bytes() == whole, cut


def test_rows_that_cannot_be_scored_stop_or_are_skipped_by_name(album, folders, capsys, monkeypatch):
    folder, rows = album
    spec = f"clip={folders['clip']}"
    (folder / "b1.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="b1.png.*two squares.*not a readable image.*--on_error skip"):
        score_rows(folder, spec, rows)
    assert sorted(read_scores(folder, spec, rows)) == [0]  # what came before is kept
    assert list(score_rows(folder, spec, rows, on_error="skip")[1]) == [1]
    assert "1 of 3 rows skipped" in capsys.readouterr().err
    assert sorted(read_scores(folder, spec, rows)) == [0, 2]
    picture(seed=11).save(folder / "b1.png")  # mended: scored next time
    assert score_rows(folder, spec, rows, on_error="skip") == (1, {})
    mended = read_scores(folder, spec, rows)
    (folder / "scores/clip.jsonl").unlink()
    score_rows(folder, spec, rows)
    assert read_scores(folder, spec, rows) == mended  # bit for bit, whatever was skipped beside them
    value = lambda p: float("nan") if p == "a cross" else 1.0
    bad = Scorer("bad", lambda i: torch.zeros(1), lambda x, prompts: torch.tensor(list(map(value, prompts))))
    monkeypatch.setattr(rewards, "load_reward", lambda *a: bad)
    skipped = score_rows(folder, f"hpsv2={folders['clip']}", rows, on_error="skip")[1]
    assert "the score is nan" in skipped[2]
    skipped = score_rows(folder, f"hpsv2.1={folders['clip']}", [(" ", ["a0.png"])], on_error="skip")[1]
    assert list(skipped.values())[0].endswith("an empty prompt cannot be scored")


def test_a_version_is_that_of_the_weights_whatever_their_file_is_called(tmp_path, monkeypatch):
    for n, file in enumerate(("a.ckpt", "b.weights")):
        (tmp_path / file).write_bytes(bytes([n]))
    specs = ["hpsv2.1", f"hpsv2.1={tmp_path}/a.ckpt", f"hpsv2.1={tmp_path}/b.weights"]
    assert len({rewards.reward_version(spec) for spec in specs}) == 3
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: pytest.fail(f"looks into {self}"))
    rewards.reward_version("toyworld")  # without a source no folder is searched


def test_a_picture_that_was_replaced_is_scored_again(album, folders, capsys):
    folder, rows = album
    spec = f"clip={folders['clip']}"
    score_rows(folder, spec, rows)
    before = read_scores(folder, spec, rows)
    stat = os.stat(folder / "b0.png")
    picture(seed=99).save(folder / "b0.png", compress_level=0)
    os.utime(folder / "b0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a date says nothing
    capsys.readouterr()
    assert sorted(read_scores(folder, spec, rows)) == [0, 2]
    assert "pictures of 1 rows were replaced since clip scored them" in capsys.readouterr().err
    assert score_rows(folder, spec, rows) == (1, {})
    after = read_scores(folder, spec, rows)
    assert after[0] == before[0] and after[1] != before[1] and after[2] == before[2]


def test_lines_that_are_no_scores_are_named_and_scored_again(album, folders, capsys):
    folder, rows = album
    spec, path = f"clip={folders['clip']}", folder / "scores/clip.jsonl"
    score_rows(folder, spec, rows)
    lines, row = path.read_bytes().split(b"\n"), json.loads(path.read_bytes().split(b"\n")[1])
    changes = [{"scores": [1.0]}, {"scores": [1.0, float("inf")]}, {"file_names": 3}, {"pictures": ["a"]}]
    foreign = [b"garbage", b"\xff\xfe\x00", b"[1, 2]"]
    for line in [*foreign, *(json.dumps({**row, **change}).encode() for change in changes)]:
        path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
        capsys.readouterr()
        assert sorted(read_scores(folder, spec, rows)) == [0, 2], line
        err = capsys.readouterr().err
        assert "clip.jsonl, line 2: no row of scores; 1 such lines" in err and err.count("\n") == 1, err
    assert score_rows(folder, spec, rows) == (1, {}) and len(read_scores(folder, spec, rows)) == 3
    assert path.read_bytes().split(b"\n")[1] == line  # passed over, and left as it is


def test_a_folder_of_pictures_with_captions_is_scored(tmp_path, folders, capsys):
    for i, text in enumerate(TEXTS):
        picture(seed=i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text + "\n")
    specs = [f"clip={folders['clip']}", f"pickscore={folders['pick']}"]
    rewards.main(["--score", str(tmp_path), "--rewards", *specs, "--device", "cpu"])
    assert capsys.readouterr().out.count("over 3 images") == 2
    assert len((tmp_path / "scores/pickscore.jsonl").read_text().splitlines()) == 3
    (tmp_path / "0.txt").unlink()
    rewards.main(["--score", str(tmp_path), "--rewards", *specs, "--device", "cpu"])
    says = "1 of 3 pictures have no .txt caption and are left out (the first: 0.png)"
    assert says in capsys.readouterr().err
    (tmp_path / "1.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(SystemExit, match="1.txt: not UTF-8"):
        rewards.main(["--score", str(tmp_path), "--rewards", *specs, "--device", "cpu"])


def test_the_toy_worlds_scorers_are_no_default_for_other_pictures(tmp_path, capsys):
    """They judge 32 x 32 pixels and the sentences of the toy world."""
    for side, prompt in ((64, "a photo of my cat"), (64, "a red circle"), (32, "a photo of my cat")):
        picture(side, side).save(tmp_path / "0.png")
        (tmp_path / "0.txt").write_text(prompt)
        for args in (["--score", tmp_path], ["--image", tmp_path / "0.png", "--prompt", prompt]):
            fails(rewards.main, args, str(tmp_path), "not of the toy world", "name --rewards", capsys=capsys)
    assert not (tmp_path / "scores").exists()


def test_the_toy_worlds_scorers_are_the_default_for_its_own_pictures(tmp_path, capsys):
    rng, prompts = np.random.default_rng(0), ["a red circle", "two squares"]
    for i, prompt in enumerate(prompts):
        world.render(prompt, rng).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(prompt)
    rewards.main(["--score", str(tmp_path), "--device", "cpu"])
    rewards.main(["--image", str(tmp_path / "0.png"), "--prompt", prompts[0], "--device", "cpu"])
    named = [rewards.reward_name(spec) for spec in rewards.TOY_REWARDS]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == named + named
    assert sorted(p.stem for p in (tmp_path / "scores").glob("*.jsonl")) == sorted(named)


# ----------------------------------------------------------------------------- errors


def test_errors_are_one_clear_line(folders, tmp_path):
    for spec, says in (
        ("beauty", "unknown reward"),
        ("clip=nowhere", "no such file"),
        (f"clip={tmp_path}", "model.safetensors"),
        ("clip=", "a folder or file is wanted after ="),
        (f"toyworld={tmp_path}", "it has no weights"),
        (f"vqascore={tmp_path}", "a FOLDER with config.json"),
    ):
        with pytest.raises(SystemExit, match=says) as e:
            load_reward(spec)
        assert "\n" not in str(e.value)
    score = load_reward(f"clip={folders['clip']}")
    with pytest.raises(ValueError, match="pair 0: an empty prompt"):
        score([picture()], [" "])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        score([picture(), picture()], ["a circle"])
    (tmp_path / "metadata.jsonl").write_text(
        '{"prompt": "a", "file_name": "x.png"}\n{"file_name": "y.png"}\n'
    )
    for args, says in (
        (["--score", tmp_path], "metadata.jsonl, line 2"),
        (["--score", tmp_path / "none"], "none: no such folder"),
        (["--image", "nowhere.png", "--prompt", "a"], "nowhere.png"),
        (["--score", tmp_path, "--rewards", "beauty"], "unknown reward 'beauty'"),
        (["--score", tmp_path, "--rewards", "clip", f"clip={folders['clip']}"], "clip is named twice"),
    ):
        with pytest.raises(SystemExit, match=says):
            rewards.main([str(a) for a in args])
