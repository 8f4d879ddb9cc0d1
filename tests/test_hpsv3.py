"""HPSv3 against Qwen2-VL's own processor and forward pass and its head by hand, on random weights; both
layouts of its checkpoint; what is refused."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_rewards import ODD_IMAGES, PAIRS, picture

from lib import scorers
from rewards import load_reward

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE = (  # of Qwen2-VL-7B-Instruct, without what is for films
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIR = [picture(40, 30)], ["a red circle"]


def qwen_tokenizer(folder):
    """Qwen's: bytes and what they make of the question, and the special words behind."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    raw = Tokenizer(models.BPE())
    raw.normalizer, raw.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(words), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=letters, show_progress=False)
    raw.train_from_iterator([scorers.HPSV3_QUESTION.partition(" {")[0]] * 3, trainer)
    raw.add_special_tokens(SPECIAL)
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **ends)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def tiny_hpsv3(tmp_path_factory):
    """(folder, Qwen2-VL with a language model's head, HPSv3's head): HPSv3.safetensors in the layout of
    transformers 4.45, in which it was published."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("hpsv3")
    tokenizer = qwen_tokenizer(folder)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    text.update(num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=len(tokenizer))
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
    eye = dict(depth=2, embed_dim=32, num_heads=2, hidden_size=64, mlp_ratio=2)
    words = dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end")
    special = {f"{name}_token_id": ids[f"<|{word}|>"] for name, word in words.items()}
    config = Qwen2VLConfig(text_config=text, vision_config=eye, **special)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    n = torch.nn
    layers = [n.Linear(64, 1024), n.ReLU(), n.Dropout(0.05), n.Linear(1024, 16), n.ReLU(), n.Linear(16, 2)]
    head = n.Sequential(*layers).eval()
    for p in [*model.parameters(), *head.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    model.bfloat16()  # as the weights are published; also the rotary frequencies, as the original casts them
    config.text_config.vocab_size += 5  # Qwen's own file, whose vocabulary is rounded up
    config.save_pretrained(folder)
    state = {**model.state_dict(), **{f"rm_head.{k}": v for k, v in head.state_dict().items()}}
    save_file({old_key(k): v.contiguous().clone() for k, v in state.items()}, folder / "HPSv3.safetensors")
    return folder, model.float(), head


def old_key(key):
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def slow_scores(folder, model, head, pairs, three_axes=False):
    """One pair at a time: transformers' processor with its chat template, the whole of Qwen2-VL with
    positions 0, 1, 2, ..., both outputs of the head at the word <|Reward|>."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    pixels = Qwen2VLImageProcessorPil(min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28)
    processor = Qwen2VLProcessor(pixels, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    out, inputs = [], []
    for image, prompt in pairs:
        question = dict(type="text", text=scorers.HPSV3_QUESTION.format(text_prompt=prompt))
        chat = [dict(role="user", content=[dict(type="image"), question])]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        x = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
        if not three_axes:
            del x["mm_token_type_ids"]
            x["position_ids"] = torch.arange(x["input_ids"].shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            states = model(**x, output_hidden_states=True).hidden_states[-1]
            out.append(head(states[x["input_ids"] == len(tokenizer) - 1])[0])
        inputs.append(x)
    return torch.stack(out), inputs


def test_parity_of_hpsv3_with_qwens_processor_and_forward_pass_one_pair_at_a_time(tiny_hpsv3, monkeypatch):
    folder, model, head = tiny_hpsv3
    reference, inputs = slow_scores(folder, model, head, PAIRS)
    read, scorer = [], load_reward(f"hpsv3={folder}")
    prepared = [scorer.prepare(image) for image in ODD_IMAGES]
    for (patches, grid), x in zip(prepared, inputs):
        assert torch.allclose(patches, x["pixel_values"], rtol=0, atol=1e-6)
        assert list(grid) == x["image_grid_thw"][0].tolist()
    pad = torch.nn.utils.rnn.pad_sequence
    noted = lambda rows, **how: read.extend(rows) or pad(rows, **how)
    monkeypatch.setattr("torch.nn.utils.rnn.pad_sequence", noted)
    scores = scorer([i for i, _ in PAIRS], [p for _, p in PAIRS], batch_size=7)
    assert [r.tolist() for r in read] == [x["input_ids"][0].tolist() for x in inputs]
    apart = (scores - reference[:, 0]).abs().max()
    print(f"\nhpsv3: largest difference {apart:.1e}; the scores' deviation is {scores.std():.2g}")
    assert torch.allclose(scores, reference[:, 0], rtol=0, atol=2e-6) and scores.std() > 1e-2
    as_qwen = slow_scores(folder, model, head, PAIRS[:3], three_axes=True)[0]
    assert (as_qwen - reference[:3])[:, 0].abs().min() > 1e-3  # or the test would not see the positions
    half = load_reward(f"hpsv3-bf16={folder}")([i for i, _ in PAIRS], [p for _, p in PAIRS])
    assert torch.allclose(half, scores, rtol=0, atol=0.2 * scores.std()) and not torch.equal(half, scores)


def test_the_question_is_the_published_one():
    """A hash of INSTRUCTION + prompt_with_special_token of the package hpsv3 1.0.0."""
    digest = hashlib.sha256(scorers.HPSV3_QUESTION.encode()).hexdigest()
    assert digest == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


def test_a_picture_that_qwen_would_not_take_is_named(tiny_hpsv3):
    score = load_reward(f"hpsv3={tiny_hpsv3[0]}")
    assert score.load(picture(603, 3), "a circle") == (None, "too elongated: 603 x 3 pixels")
    assert score.load(picture(600, 3), "a circle")[1] is None


LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("key", ["rm_head.5.bias", "visual.merger.mlp.2.bias", LAYER])
def test_a_checkpoint_that_is_not_whole_or_not_the_model_is_refused_by_name(tiny_hpsv3, tmp_path, key):
    folder, name = shutil.copytree(tiny_hpsv3[0], tmp_path / "model"), scorers.hpsv3_key(key)
    state = load_file(folder / "HPSv3.safetensors")
    for says, change in (
        ("missing keys", {k: v for k, v in state.items() if k != key}),
        ("unexpected keys", {**state, f"{key}.extra": torch.zeros(2)}),
        ("wrong shapes", {**state, key: state[key][:-1].clone()}),
    ):
        save_file(change, folder / "HPSv3.safetensors")
        with pytest.raises(SystemExit, match=f"{says}.*{name}") as e:
            load_reward(f"hpsv3={folder}")
        assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_another_models_tokenizer_is_refused(tiny_hpsv3, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = shutil.copytree(tiny_hpsv3[0], tmp_path / "model")
    raw = json.loads((folder / "tokenizer.json").read_text())
    for change, says in (
        (lambda words: words.update(added_tokens=words["added_tokens"][:-1]), "wrong shapes.*embed_tokens"),
        (lambda words: words.update(added_tokens=words["added_tokens"][1:]), "tokenizer of .* does not fit"),
    ):
        words = json.loads(json.dumps(raw))
        change(words)
        (folder / "tokenizer.json").write_text(json.dumps(words))
        with pytest.raises(SystemExit, match=says):
            load_reward(f"hpsv3={folder}")
    with pytest.raises(SystemExit, match="no tokenizer at Qwen/Qwen2-VL-7B-Instruct"):
        load_reward(f"hpsv3={folder / 'HPSv3.safetensors'}")  # a file brings none


def test_a_word_of_the_template_in_a_prompt_is_refused(tiny_hpsv3):
    score = load_reward(f"hpsv3={tiny_hpsv3[0]}")
    for word in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(ValueError, match="would not be read as text"):
            score(PAIR[0], [f"a {word} cat"])


def test_the_published_sizes_are_those_of_qwen2_vl_7b():
    from transformers import Qwen2VLConfig, Qwen2VLModel

    with torch.device("meta"):
        config = Qwen2VLConfig(text_config=scorers.QWEN2_VL_7B)
        count = sum(p.numel() for p in Qwen2VLModel(config).parameters())
    assert count + 152064 * 3584 == 8_291_375_616  # with the language model's head, as its page says
