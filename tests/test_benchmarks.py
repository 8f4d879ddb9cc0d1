"""benchmarks.py: readers and layouts on files in the official formats, the rules against slow references that
were written from their words, and tiny random-weight models through the real loading and measuring code."""

import json
import os

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import rewards
from lib import benchmarks as b
from lib import scorers
from lib.common import HERE
from lib.pictures import read_image
from toy import world

COCO = {i: name for i, name in enumerate(b.CLASSES)}


def draw(path, seed, size=(40, 40)):
    """A picture of coloured patches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)


def draw_all(folder, files):
    for n, file in enumerate(f for of_row in files for f in of_row):
        draw(folder / file, n)


def refuses(text, call, *args):
    with pytest.raises(SystemExit, match=text) as e:
        call(*args)
    assert "\n" not in str(e.value)


LEFT = {"class": "dog", "count": 1}
ROW = dict(tag="colors", include=[dict(LEFT, color="red")], prompt="a photo of a “red” dog")


def test_geneval_reads_its_metadata_and_writes_the_same_bytes(tmp_path):
    other = {**ROW, "tag": "counting", "exclude": [{"class": "dog", "count": 2}]}
    lines = [json.dumps(row) for row in (ROW, other, ROW)]  # a repeated prompt stays
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    rows = b.read_bench("geneval", tmp_path)
    assert rows == [ROW, other, ROW] and b.read_bench("geneval", tmp_path, limit=2) == [ROW, other]
    files = b.picture_files("geneval", rows, 2)
    assert files[2] == ["00002/samples/0000.png", "00002/samples/0001.png"]
    b.write_layout("geneval", tmp_path / "out", rows, files)
    for i, line in enumerate(lines):
        assert (tmp_path / f"out/0000{i}/metadata.jsonl").read_bytes() == line.encode()


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"include": [{"class": "dog", "count": 1, "color": "teal"}]}, "color 'teal'"),
        ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "position .'near'"),
        ({"prompt": " "}, "no prompt there"),
        ({"include": [LEFT | {"position": ["above", 1]}, LEFT | {"position": ["above", 0]}]}, "position"),
        ({"include": [LEFT | {"position": ["above", 0]}]}, "of an item with a position"),
    ],
)
def test_geneval_names_file_and_line_of_bad_metadata(tmp_path, change, complaint):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, **change}) + "\n")
    refuses(f"{path.name}, line 2.*{complaint}", b.read_bench, "geneval", path)


def test_compbench_keeps_prompts_as_file_names(tmp_path):
    (tmp_path / "color_val.txt").write_bytes(b'a "red" bench \r\na red bench\r\na red bench\tnote\r\n')
    (tmp_path / "non_spatial_val.txt").write_bytes(b"A dog's walk\r\nlast line")
    (tmp_path / "color.txt").write_text("of training")
    rows = b.read_bench("t2i-compbench", tmp_path)
    prompts = ['a "red" bench ', "a red bench", "a red bench", "A dog's walk", "last line"]
    assert [r["prompt"] for r in rows] == prompts
    assert [r["tag"] for r in rows] == ["color"] * 3 + ["non_spatial"] * 2
    files = b.picture_files("t2i-compbench", rows, 10)
    assert files[0][0] == 'color/samples/a "red" bench _000000.png'
    assert files[2][9] == "color/samples/a red bench_000029.png"  # numbered through the category
    assert files[3][1] == "non_spatial/samples/A dog's walk_000001.png"
    assert b.read_bench("t2i-compbench", tmp_path / "color_val.txt")[2] == rows[2]
    (tmp_path / "color_val.txt").write_text("a\u2028b\nc\n")  # a separator that ends no line
    assert [r["prompt"] for r in b.read_bench("t2i-compbench", tmp_path)][:2] == ["a\u2028b", "c"]
    (tmp_path / "color_val.txt").write_bytes(b"a\r\nb/c\r\n")
    refuses("color_val.txt, line 2: .*official file name", b.read_bench, "t2i-compbench", tmp_path)


DPG = '''item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
coco1,"A cat, ""asleep""",,1,0,entity,whole,entity - whole (cat),Is there a cat?
coco1,"A cat, ""asleep""",,2,1,attribute,state,attribute - state (cat),Is the cat asleep?
coco1,"A cat, ""asleep""",,3,"1, 2",relation,spatial,relation - spatial (cat),Is the cat on a sofa?
7,Rain,,1,0,global,,global,Does it rain?
'''


def test_dpg_reads_questions_and_dependencies(tmp_path):
    table = tmp_path / "dpg_bench.csv"
    table.write_text(DPG)
    asked = [[1, "Is there a cat?", []], [2, "Is the cat asleep?", [1]], [3, "Is the cat on a sofa?", [1, 2]]]
    rows = b.read_bench("dpg", table)
    assert rows[0] == {"prompt": 'A cat, "asleep"', "tag": None, "stem": "coco1", "questions": asked}
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/coco1.txt").write_bytes(b'A cat,\r\n "asleep" \r\n')
    (tmp_path / "prompts/7.txt").write_text("Rain")
    rows = b.read_bench("dpg", tmp_path)
    assert [r["stem"] for r in rows] == ["7", "coco1"] and rows[1]["prompt"] == 'A cat,\r\n "asleep" '
    (tmp_path / "prompts/8.txt").write_text("Snow")
    refuses("no questions about prompts/8.txt", b.read_bench, "dpg", tmp_path)
    (tmp_path / "prompts/8.txt").unlink()
    table.write_text(DPG.replace(",2,1,attribute", ",2,9,attribute"))
    refuses("item coco1 has no proposition 9", b.read_bench, "dpg", table)
    table.write_text(DPG.replace("7,Rain", "../../../evil,Rain"))
    refuses("row 4: .*can be no file name", b.read_bench, "dpg", table)


def test_parti_hpdv2_and_pickapic(tmp_path):
    lines = ["Prompt\tCategory\tChallenge\tNote", 'a "quote\tArts\tBasic\t']
    lines += ["bond\tAbstract\tBasic\tx"] * 2
    (tmp_path / "PartiPrompts.tsv").write_bytes("\r\n".join(lines).encode() + b"\r\n")
    rows = b.read_bench("parti", tmp_path)
    assert [(r["prompt"], r["tag"]) for r in rows] == [('a "quote', "Arts")] + [("bond", "Abstract")] * 2
    files = ["pictures/00001/0.png", "pictures/00001/1.png"]
    assert rows[1]["Note"] == "x" and b.picture_files("parti", rows, 2)[1] == files

    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark/anime.json").write_text(json.dumps(["  a girl, 4k ", "a girl", "a girl"]))
    (tmp_path / "benchmark/photo.json").write_text(json.dumps(["a bus"]))
    rows = b.read_bench("hpdv2", tmp_path)
    found = [(r["prompt"], r["tag"], r["index"]) for r in rows]
    assert found[::3] == [("  a girl, 4k ", "anime", 0), ("a bus", "photo", 0)]
    assert len(rows) == 4 and b.read_bench("hpdv2", tmp_path / "benchmark/photo.json") == rows[3:]
    test = [dict(prompt=p, image_path=["0.jpg", "1.jpg"], rank=[1, 2]) for p in ("a bus", "a cat", "a hat")]
    (tmp_path / "test.json").write_text(json.dumps(test))
    rows = b.read_bench("hpdv2", tmp_path / "test.json")
    assert [(r["prompt"], r["tag"]) for r in rows] == [("a bus", None), ("a cat", None), ("a hat", None)]
    (tmp_path / "keep.json").write_text('["a hat", "a  bus"]')
    assert b.read_bench("hpdv2", tmp_path / "test.json", keep=tmp_path / "keep.json") == [rows[0], rows[2]]

    pairs = pandas.DataFrame({"caption": ["b", "a", "b"], "label_0": [0.5, 1, 0]})
    pairs.to_parquet(tmp_path / "validation_unique-00000.parquet")
    assert [r["prompt"] for r in b.read_bench("pickapic", tmp_path)] == ["b", "a"]
    pairs[["label_0"]].to_parquet(tmp_path / "validation_unique-00000.parquet")
    refuses("validation_unique-00000.parquet, row 1: no prompt", b.read_bench, "pickapic", tmp_path)


def test_a_hub_without_a_net_is_one_line(monkeypatch):
    def none(*args, **kwargs):
        raise OSError("no net\nat all")

    monkeypatch.setattr(scorers, "hf_hub_download", none)
    refuses("zhwang/HPDv2 benchmark/anime.json cannot be had", b.read_bench, "hpdv2", "zhwang/HPDv2")
    refuses("there are geneval, t2i-compbench", b.read_bench, "drawbench", "x")


def test_dpg_grid_and_hps_jpgs_follow_their_pictures(tmp_path):
    rows = [dict(prompt="x", tag="anime", stem="coco1", index=3)]
    files = [[f"pictures/00000/{s}.png" for s in range(5)]]
    draw_all(tmp_path, files)
    pictures = [read_image(tmp_path / f) for f in files[0]]
    for name in ("dpg", "hpdv2"):
        b.write_layout(name, tmp_path, rows, files)
    grid = Image.open(tmp_path / "official/coco1.png")
    assert grid.size == (80, 80)
    for n, (x, y) in enumerate([(0, 0), (40, 0), (0, 40), (40, 40)]):  # the official crops
        assert grid.crop((x, y, x + 40, y + 40)).tobytes() == pictures[n].tobytes()
    pictures[0].save(tmp_path / "as_official.jpg")
    jpg = tmp_path / "official/anime/00003.jpg"
    assert jpg.read_bytes() == (tmp_path / "as_official.jpg").read_bytes()

    written = lambda: [(p.stat().st_mtime_ns, p.read_bytes()) for p in (jpg, tmp_path / "official/coco1.png")]
    before = written()
    for name in ("dpg", "hpdv2"):
        b.write_layout(name, tmp_path, rows, files)
    assert written() == before  # nothing was stale
    draw(tmp_path / files[0][0], 99)
    os.utime(tmp_path / files[0][0], (1, 1))  # copied with an old date
    for name in ("dpg", "hpdv2"):
        b.write_layout(name, tmp_path, rows, files)
    assert all(new != old for (_, new), (_, old) in zip(written(), before))


NAMES = ("dog", "cat", "bus", "kite")


def slow_keep(boxes, tag):
    kept, limit = [], 0.9 if tag == "counting" else 0.3
    while len(kept) < 16:
        rest = [i for i in range(len(boxes)) if i not in kept and boxes[i][4] > limit]
        if not rest:
            break
        kept.append(max(rest, key=lambda i: boxes[i][4]))
    return kept


def slow_relations(a, b):
    """By corners, in plain numbers: which of the four half planes the shortened offset points into."""
    ax, ay, bx, by = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2, (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
    dx, dy = ax - bx, ay - by
    margins = (abs(a[2] - a[0]) + abs(b[2] - b[0])) / 10, (abs(a[3] - a[1]) + abs(b[3] - b[1])) / 10
    sx = max(abs(dx) - margins[0], 0) * (1 if dx > 0 else -1)
    sy = max(abs(dy) - margins[1], 0) * (1 if dy > 0 else -1)
    if abs(sx) < 1e-3 and abs(sy) < 1e-3:
        return []
    half = (dx * dx + dy * dy) ** 0.5 / 2
    names = [("left of", -sx), ("right of", sx), ("above", -sy), ("below", sy)]
    return [name for name, reach in names if reach > half]


def slow_verdict(objects, row):
    lines, groups = [], []
    for item in row["include"]:
        name, count, problem = item["class"], item["count"], None
        best = objects.get(name, [])[:count]
        colours = [c for _, c in best]
        if len(best) < count:
            problem = f"expected {name}>={count}, found {len(best)}"
        elif "color" in item and colours.count(item["color"]) < count:
            seen = ", ".join(f"{colours.count(c)} {c}" for c in b.COLOURS if colours.count(c))
            want = item["color"]
            problem = f"expected {want} {name}>={count}, found {colours.count(want)} {want}; and {seen}"
        elif "position" in item and groups[item["position"][1]] is None:
            problem = f"no target for {name} to be {item['position'][0]}"
        elif "position" in item:
            for one, other in [(x, y) for x in best for y in groups[item["position"][1]]]:
                seen = slow_relations(one[0], other[0])
                if item["position"][0] not in seen and problem is None:
                    where = " and ".join(seen)
                    problem = f"expected {name} {item['position'][0]} target, found {where} target"
        groups.append(None if problem else best)
        lines += [problem] if problem else []
    for item in row.get("exclude", []):
        number = len(objects.get(item["class"], []))
        if number >= item["count"]:
            lines.append(f"expected {item['class']}<{item['count']}, found {number}")
    return not lines, "\n".join(lines)


def random_case(rng, tag):
    """Metadata as the tag has it, sometimes with more items, and detections {class: boxes, colours}."""
    pick = lambda: NAMES[rng.integers(len(NAMES))]
    colour = lambda: b.COLOURS[rng.integers(3)]
    row = {"tag": tag, "prompt": "x", "include": [{"class": pick(), "count": 1}]}
    if tag == "counting":
        n = int(rng.integers(1, 5))
        row["include"][0]["count"] = n
        row["exclude"] = [{"class": row["include"][0]["class"], "count": n + 1}]
    if tag in ("two_object", "position", "color_attr") or rng.random() < 0.3:
        name, count = pick(), int(rng.integers(1, 3)) if rng.random() < 0.3 else 1
        row["include"].append({"class": name, "count": count})
    for item in row["include"] if tag in ("colors", "color_attr") else []:
        item["color"] = colour()
    for i in range(1, len(row["include"])):
        if tag == "position" or rng.random() < 0.2:
            row["include"][i]["position"] = [b.RELATIONS[rng.integers(4)], int(rng.integers(i))]
    if rng.random() < 0.2:
        row.setdefault("exclude", []).append({"class": pick(), "count": int(rng.integers(1, 3))})
    found = {}
    for name in NAMES:
        n = rng.choice([0, 1, 1, 1, 2, 3, 20])
        corner, side = rng.integers(0, 60, (n, 2)), rng.integers(1, 30, (n, 2))
        boxes = np.concatenate([corner, corner + side, rng.uniform(0.2, 1, (n, 1)) ** 0.3], 1)
        found[name] = boxes, [colour() for _ in range(n)]
    return row, found


def test_geneval_rules_against_a_slow_reference():
    rng, passed, kinds = np.random.default_rng(0), 0, set()
    for n in range(800):
        row, found = random_case(rng, world.CATEGORIES[n % 6])
        objects = {}
        for name, (boxes, colours) in found.items():
            kept = b.geneval_keep(boxes, row["tag"])
            assert kept == slow_keep(boxes.tolist(), row["tag"])
            if kept:
                objects[name] = [(boxes[i], colours[i]) for i in kept]
        correct, reason = b.geneval_verdict(objects, row)
        assert (correct, reason) == slow_verdict(objects, row), row
        passed += correct
        for line in filter(None, reason.split("\n")):
            kinds.add((line.split()[0], "<" in line, " and " in line))
    assert 120 < passed < 680 and len(kinds) == 4  # every kind of failure was among them


def test_geneval_edges():
    box = lambda x, y, r=5: [x - r, y - r, x + r, y + r, 0.95]
    assert b.geneval_keep([[0, 0, 1, 1, 0.3], [0, 0, 1, 1, 0.31]], "colors") == [1]  # above, not at
    assert b.geneval_keep([[0, 0, 1, 1, 0.9], [0, 0, 1, 1, 0.91]], "counting") == [1]
    row = {"include": [LEFT, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
    at = lambda x, y: b.geneval_verdict({"dog": [(box(50, 50), None)], "cat": [(box(x, y), None)]}, row)
    assert at(30, 50) == (True, "")
    assert at(50, 50) == (False, "expected cat left of target, found  target")
    assert at(48.5, 50) == (False, "expected cat left of target, found  target")  # inside the margin of 2


def objects_around(found, half):
    """[(class or None, colour, x, y)] of world.find_objects -> the objects of geneval_verdict: boxes of
    2 half a side, of confidence 1. What is of no class is left out."""
    objects = {}
    for name, colour, x, y in found:
        if name is not None:
            objects.setdefault(name, []).append(((x - half, y - half, x + half, y + half, 1.0), colour))
    return objects


def test_geneval_on_the_toy_world_equals_the_exact_checker():
    """A slip of every held-out prompt, and a right picture of every third. Counting lists no `exclude` there,
    so that one more is right by GenEval's rule and wrong by the checker's: it is given one here."""
    rng, rows, shown = np.random.default_rng(0), b.read_bench("geneval", HERE / "toy/heldout.jsonl"), []
    for n, row in enumerate(rows):
        spec, judged = world.grammar()[row["prompt"]], dict(row)
        if row["tag"] == "counting":
            judged["exclude"] = [{**item, "count": item["count"] + 1} for item in row["include"]]
        for drawn in [world.slip(spec, rng)] + [spec] * (n % 3 == 0):
            image = world.render(drawn, rng)
            objects = objects_around(world.find_objects(image), half=4.5)
            right = drawn == spec
            assert b.geneval_verdict(objects, judged)[0] == world.check(row["prompt"], image) == right
            shown.append((row["tag"], right))
    assert {*shown} == {(tag, right) for tag in world.CATEGORIES for right in (True, False)}
    more = world.draw([("circle", "red"), ("square", "red")], np.array([[8, 8], [24, 24]]), (4.5, 4.5))
    image, row = Image.fromarray(more), {"include": [{"class": "circle", "count": 1}]}
    objects = objects_around(world.find_objects(image), half=4.5)  # something more: the rules part here
    assert b.geneval_verdict(objects, row)[0] and not world.check("a circle", image)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Mask2Former, CLIP and BLIP-VQA of random weights, in transformers' format: {role: folder}."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        CLIPConfig,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes = dict(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, image_size=64)
    swin = SwinConfig(**sizes, out_features=stages)
    sizes = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32)
    sizes.update(dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2)
    names = dict(id2label=COCO, label2id={v: k for k, v in COCO.items()})
    config = Mask2FormerConfig(backbone_config=swin, num_queries=12, **sizes, **names)
    detector = Mask2FormerForUniversalSegmentation(config)
    detector.class_predictor.weight.data *= 60  # sure of something
    detector.class_predictor.weight.data[-1] = 0
    detector.save_pretrained(root / "detector")

    tower = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text, eye = dict(tower, vocab_size=49408), dict(tower, image_size=32, patch_size=16)
    clip = CLIPModel(CLIPConfig(projection_dim=16, text_config=text, vision_config=eye))
    for p in clip.parameters():
        p.data += 0.2 * torch.randn_like(p)
    clip.save_pretrained(root / "clip")

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] yes no is a red green dog cat bench the there ? ,".split()
    words += "circle two square ##s [DEC] [ENC]".split()
    (root / "vqa").mkdir()
    (root / "vqa/vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(root / "vqa").save_pretrained(root / "vqa")
    text = dict(tower, vocab_size=len(words), encoder_hidden_size=32, max_position_embeddings=40)
    text["bos_token_id"] = len(words) - 2
    vqa = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=eye))
    for p in vqa.parameters():
        p.data += 0.3 * torch.randn_like(p)
    vqa.save_pretrained(root / "vqa")
    folders = dict(detector="detector", colours="clip", clip="clip", vqa="vqa")
    return {role: str(root / folder) for role, folder in folders.items()}


def slow_instances(model, x, cut, full):
    """mmdet's output by its words: each of the best 100 pairs of query and class for itself."""
    out = model(pixel_values=x)
    scores = out.class_queries_logits[0].softmax(-1)[:, :-1]
    pairs = sorted(((float(scores[q, c]), q, c) for q in range(len(scores)) for c in range(80)), reverse=True)
    masks = F.interpolate(out.masks_queries_logits, x.shape[-2:], mode="bilinear", align_corners=False)
    masks = F.interpolate(masks[..., : cut[0], : cut[1]], full, mode="bilinear", align_corners=False)[0]
    found = {}
    for score, q, c in pairs[:100]:
        ys, xs = np.nonzero(masks[q].numpy() > 0)
        if len(xs):
            quality = float(masks[q].sigmoid()[masks[q] > 0].double().mean())
            box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, score * quality]
            found.setdefault(b.CLASSES[c], []).append(box)
    sure = {c: [v for v in boxes if v[4] > 0.3] for c, boxes in found.items()}
    return {c: boxes for c, boxes in sure.items() if boxes}


def slow_colour(clip, image, box, mask, name):
    pixels = np.where(mask[..., None], np.asarray(image), 0x99).astype(np.uint8)
    x = scorers.crop(32)(Image.fromarray(pixels[box[1] : box[3], box[0] : box[2]]))[None]
    seen = clip.get_image_features(pixel_values=x).pooler_output[0]
    tokenizer, similarity = scorers.clip_tokenizer("", 49408), []
    for colour in b.COLOURS:
        kinds = (f"{colour} {name}", f"{colour}-colored {name}", f"{colour} object")
        ids = [tokenizer([f"a photo of a {kind}"], return_tensors="pt").input_ids for kind in kinds]
        texts = [F.normalize(clip.get_text_features(input_ids=i).pooler_output[0], dim=0) for i in ids]
        similarity.append(float(F.normalize(sum(texts), dim=0) @ seen))
    return b.COLOURS[int(np.argmax(similarity))]


@torch.no_grad()
def test_detector_and_colours_are_mmdets_and_the_originals(models, monkeypatch, tmp_path):
    from transformers import CLIPModel, Mask2FormerForUniversalSegmentation

    monkeypatch.setattr(b, "SIDES", (48, 96))
    draw(tmp_path / "a.png", 3, size=(60, 90))
    image = Image.open(tmp_path / "a.png").convert("RGB")
    found = b.load_detector(models["detector"], "cpu")(image)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(models["detector"]).eval()
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (72, 48), mode="bilinear", align_corners=False)  # 800 of 1333 at full size
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (x / 255 - mean) / std
    padded = torch.zeros(1, 3, 96, 64)
    padded[..., :72, :48] = x
    slow = slow_instances(model, padded, (72, 48), (90, 60))
    assert found.keys() == slow.keys() and found
    for name, (boxes, _) in found.items():
        np.testing.assert_allclose(sorted(boxes), sorted(slow[name]), rtol=1e-3)

    clip, name = CLIPModel.from_pretrained(models["clip"]).eval(), next(iter(found))
    boxes, masks = found[name]
    colours = b.load_colours(models["clip"], "cpu")(image, boxes, masks, name)
    assert colours == [slow_colour(clip, image, *pair, name) for pair in zip(boxes, masks)]


def test_geneval_is_measured_resumed_and_written_as_the_original_does(models, monkeypatch, tmp_path):
    monkeypatch.setattr(b, "SIDES", (48, 96))
    image = tmp_path / "probe/x.png"
    draw(image, 0)
    instances = b.load_detector(models["detector"], "cpu")(Image.open(image))
    seen = max(instances, key=lambda name: len(instances[name][0]))
    item = {"class": seen, "count": 1}
    rows = [
        {"tag": "single_object", "include": [item], "prompt": "a/b “c”"},
        {"tag": "colors", "include": [{**item, "color": "red"}], "prompt": "red"},
        {"tag": "counting", "include": [{**item, "class": "zebra"}], "exclude": [item], "prompt": "n"},
    ]
    folder = tmp_path / "out"
    files = b.picture_files("geneval", rows, 2)
    draw_all(folder, files)
    b.write_layout("geneval", folder, rows, files)
    sources = {role: models[role] for role in ("detector", "colours")}
    metrics, notes = b.measure("geneval", folder, rows, files, batch_size=2, sources=sources)
    passed, log = metrics["geneval"], folder / "measured/geneval.jsonl"
    assert passed.shape == (3, 2) and passed[0].all() and not passed[2].any() and len(notes) == 1
    written = [json.loads(line) for line in (folder / "results.jsonl").read_text().split("\n")[:-1]]
    assert [*written[0]] == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert [r["correct"] for r in written] == passed.flatten().tolist()
    assert json.loads(written[1]["metadata"]) == rows[0]
    assert written[0]["filename"] == f"{folder}/{files[0][0]}"
    boxes = json.loads(written[0]["details"])
    assert all(len(box) == 5 and box[4] > 0.3 for found in boxes.values() for box in found)

    whole, results = log.read_bytes(), (folder / "results.jsonl").read_bytes()
    log.write_bytes(whole[: len(whole) * 3 // 4])  # killed within a line
    again, _ = b.measure("geneval", folder, rows, files, batch_size=2, sources=sources)
    assert log.read_bytes() == whole and (folder / "results.jsonl").read_bytes() == results
    np.testing.assert_array_equal(again["geneval"], passed)
    monkeypatch.setattr(b, "load_finder", lambda *_: pytest.fail("nothing is left to look at"))
    b.measure("geneval", folder, rows, files, batch_size=2, sources=sources)
    monkeypatch.undo()
    monkeypatch.setattr(b, "SIDES", (48, 96))

    draw(folder / files[1][0], 77)  # replaced
    (folder / files[2][0]).write_bytes(b"torn")
    (folder / files[2][1]).unlink()
    metrics, notes = b.measure("geneval", folder, rows, files, batch_size=2, sources=sources)
    assert len(log.read_bytes().split(b"\n")) == len(whole.split(b"\n")) + 1
    assert np.isnan(metrics["geneval"]).tolist() == [[False, False], [False, False], [True, True]]
    assert notes[1] == f"2 pictures are missing or unreadable and do not count (the first: {files[2][0]})"
    rows[0]["include"][0]["class"] = "unicorn"
    refuses("COCO's classes only, not 'unicorn'", b.measure, "geneval", folder, rows, files)


@torch.no_grad()
def test_blip_vqa_is_the_first_word_of_its_answer(models, tmp_path):
    """Against transformers' own generate(), which is given [ENC] first as the original has it."""
    from transformers import BertTokenizer, BlipForQuestionAnswering

    model = BlipForQuestionAnswering.from_pretrained(models["vqa"]).eval()
    tokenizer = BertTokenizer.from_pretrained(models["vqa"])
    yes, no, enc, dec = tokenizer.convert_tokens_to_ids(["yes", "no", "[ENC]", "[DEC]"])
    files = [tmp_path / f"{n}.png" for n in range(3)]
    for n, file in enumerate(files):
        draw(file, n, size=(30 + 20 * n, 40))
    questions = ["a Red dog?", "the (green) bench?", "is there a cat, a dog?"]
    got = b.load_vqa(models, "cpu")(files, questions).tolist()
    for file, question, p in zip(files, ["a red dog?", "the green bench?", questions[2]], got):
        ids = torch.tensor([[enc, *tokenizer(question).input_ids[1:]]])
        x = Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        x = (torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 255 - scorers.MEAN) / scorers.STD
        seen = model.vision_model(pixel_values=x[None]).last_hidden_state
        read = model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        how = dict(max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
        how.update(encoder_hidden_states=read, encoder_attention_mask=torch.ones_like(ids))
        first = model.text_decoder.generate(input_ids=torch.tensor([[dec]]), **how)
        word = first.scores[0].softmax(-1)[0]
        assert p == pytest.approx(float(word[yes] / (word[yes] + word[no])), abs=1e-5)
    assert max(got) - min(got) > 1e-3
    assert b.plain_question('Is "A" (Red.) dog there?  ') == "is a red dog there?"


def test_vqascore_answers_free_questions(tmp_path):
    from test_rewards import vqa_folder

    vqa_folder(tmp_path / "t5")
    spec, image = f"vqascore={tmp_path / 't5'}", tmp_path / "a.png"
    draw(image, 0)
    asked = b.load_vqa({"vqa": spec}, "cpu")([image], ['Does this figure show "two squares"?']).tolist()
    assert asked == rewards.load_reward(spec)([image], ["two squares"]).tolist()


@torch.no_grad()
def test_two_processes_answer_as_one_does(models, monkeypatch, tmp_path):
    files = [f"pictures/{n}.png" for n in range(7)]
    draw_all(tmp_path, [files])
    jobs = [(file, q) for file in files for q in ("a red dog?", "is there a cat, a dog?")]
    ask = lambda: b.measured(tmp_path, "dpg", {"vqa": models["vqa"]}, b.load_vqa, jobs, "cpu", 3)
    alone = ask()
    (tmp_path / "measured/dpg.jsonl").unlink()
    monkeypatch.setattr("lib.common.wait_for_all", lambda slow: None)
    for rank in (1, 0):
        monkeypatch.setattr(b, "process_rank", lambda: (rank, 2))
        together = ask()
    assert together == alone and None not in alone.values()
    lines = [len((tmp_path / f"measured/dpg@{rank}of2.jsonl").read_text().split("\n")) - 1 for rank in (0, 1)]
    assert lines == [8, 6]


def test_dpg_dependencies_and_compbench_products():
    asked = [[1, "a", []], [2, "b", [1]], [3, "c", [2]], [4, "d", []]]
    assert b.dpg_score(asked, [0.9, 0.9, 0.9, 0.1]) == 0.75
    assert b.dpg_score(asked, [0.2, 0.9, 0.9, 0.9]) == 0.25  # the child of a zeroed child is zeroed
    assert b.dpg_score(asked, [0.9, 0.5, 0.9, 0.9]) == 0.5
    assert np.isnan(b.dpg_score(asked, [0.9, None, 0.9, 0.9]))
    assert b.compbench_score([0.50004, 0.99996]) == 0.5 and b.compbench_score([]) == 1
    assert b.compbench_score([0.77777, 0.33333]) == round(0.7778 * 0.3333, 4)


@torch.no_grad()
def test_dpg_and_compbench_are_measured(models, tmp_path):
    table = tmp_path / "dpg_bench.csv"
    table.write_text(DPG)
    rows = b.read_bench("dpg", table)
    files = b.picture_files("dpg", rows, 2)
    draw_all(tmp_path, files)
    metrics, notes = b.measure("dpg", tmp_path, rows, files, batch_size=3, sources={"vqa": models["vqa"]})
    answer = b.load_vqa(models, "cpu")
    for row, of_row, values in zip(rows, files, metrics["dpg"]):
        for file, value in zip(of_row, values):
            yes = [answer([tmp_path / file], [q])[0] for _, q, _ in row["questions"]]
            assert value == b.dpg_score(row["questions"], yes)
    assert notes == [f"answers by {models['vqa']}; official: mPLUG-large"]

    (tmp_path / "color_val.txt").write_text("a red dog and the green bench\na red dog and the green bench")
    (tmp_path / "non_spatial_val.txt").write_text("a dog\na cat")
    (tmp_path / "spatial_val.txt").write_text("a dog left of a cat")
    phrases = tmp_path / "phrases.json"
    phrases.write_text(json.dumps({"a red dog and the green bench": ["a red dog", "top", "the green bench"]}))
    rows = b.read_bench("t2i-compbench", tmp_path)
    files = b.picture_files("t2i-compbench", rows, 2)
    draw_all(tmp_path, files)
    sources = {"vqa": models["vqa"], "clip": models["clip"], "phrases": str(phrases)}
    metrics, notes = b.measure("t2i-compbench", tmp_path, rows, files, sources=sources)
    values = metrics["t2i-compbench"]
    two = answer([tmp_path / files[1][1]] * 2, ["a red dog?", "the green bench?"]).tolist()
    assert values[1, 1] == pytest.approx(two[0] * two[1], abs=2e-4)
    places = {row["tag"]: i for i, row in enumerate(rows)}
    spatial, i = places["spatial"], places["non_spatial"]
    assert np.isnan(values[spatial]).all() and np.isfinite(np.delete(values, spatial, 0)).all()
    scorer = b.load_clip_scorer({"clip": models["clip"]}, "cpu")
    score = scorer([tmp_path / files[i][0]], [rows[i]["prompt"]]).tolist()
    assert values[i, 0] == pytest.approx(score[0], abs=1e-6) and abs(score[0]) <= 1
    assert notes[0].startswith("answers by")
    assert notes[1] == "spatial: not run, the official scorers need UniDet"
    table = b.summarise_bench("t2i-compbench", rows, metrics)
    assert [*table] == ["Color", "Non-Spatial"]  # a column that was not run is not there
    phrases.write_text("{}")
    says = "phrases.json: no JSON .* with 'a red dog and"
    refuses(says, b.measure, "t2i-compbench", tmp_path, rows, files, "cpu", 32, sources)


def test_models_that_are_none_are_named(models, tmp_path):
    draw(tmp_path / "a.png", 0)
    rows, files = [{"tag": "colors", "include": [], "prompt": "x"}], [["a.png"]]
    clip = {"detector": models["clip"], "colours": models["clip"]}
    refuses("detector=.*could not be loaded", b.measure, "geneval", tmp_path, rows, files, "cpu", 1, clip)
    eye = (b.measure, "geneval", tmp_path, rows, files, "cpu", 1, {"eye": "x"})
    refuses("no role 'eye'; there are detector", *eye)
    assert b.measure("parti", tmp_path, rows, files) == ({}, [])


def test_tables_have_the_papers_columns_and_units():
    rows = [{"tag": tag} for tag in ("colors", "colors", "position")]
    table = b.summarise_bench("geneval", rows, {"geneval": np.array([[1, 0], [np.nan, 1], [0, 0]])})
    assert table == {"Mean": pytest.approx(1 / 3), "Colors": pytest.approx(2 / 3), "Position": 0}
    scores = {"dpg": np.array([[0.5, 1]]), "vqascore-xl": np.array([[0.8, 0.9]])}
    table = b.summarise_bench("dpg", rows[:1], scores)
    assert table == {"DSG Score": 75, "VQA Score": pytest.approx(85)}
    rows = [{"tag": "anime"}] * 200 + [{"tag": "photo"}] * 80
    scores = np.random.default_rng(0).uniform(0.2, 0.3, (280, 1))
    table = b.summarise_bench("hpdv2", rows, {"hpsv2.1": scores})
    groups = [100 * scores[n : min(n + 80, 200)].mean() for n in (0, 80, 160)]
    assert table["anime"] == pytest.approx(np.mean(groups))
    assert table["anime std"] == pytest.approx(np.std(groups))
    assert table["photo std"] == 0 and table["Average"] == pytest.approx(100 * scores.mean())
    for bench, paper in b.PAPER_TABLES.items():
        assert bench in tuple(b.READERS) and all([*row] == paper["columns"] for row in paper["rows"].values())


def test_tables_say_who_judged_and_how_many_prompts():
    rows = [{"tag": None, "prompt": p} for p in ("a", "b", "a")]
    win = lambda rate: {"best": {"rate": rate}}
    pair = {"hpsv2": win(0.5), "pickscore": win(0.25), "diversity": {"gain": {}}}
    results = {"base": {"against": {}}, "mine": {"against": {"base": pair}}}
    scores = {name: {r: np.zeros((3, 1)) for r in pair} for name in results}
    header, lines = b.paper_table("pickapic", results, rows, scores)
    assert "HPS is hpsv2" in header[0] and header[1:4] == ["n", "HPS", "CLIP"]
    assert ["mine vs base", "2", "50.00", "", "25.00", ""] == lines[2][:6]
    paper = {line[0]: line[1:] for line in lines}
    assert paper["BalancedDPO vs SD1.5 (paper)"][:2] == ["297", "85.19"]
    assert b.column_of("hpsv2.1", ["HPS"]) == "HPS" and b.column_of("hpsv3", ["HPS"]) is None

    scores = {"mine": {"dpg": np.ones((3, 1)), "q-align": np.full((3, 1), 0.7)}}
    trained = {"mine": {"Images": 232000.0, "GPU days": 5.5}}
    notes = ["answers by blip; official: mPLUG-large"]
    header, lines = b.paper_table("dpg", {"mine": {"against": {}}}, rows, scores, notes, trained)
    assert "answers by blip; official: mPLUG-large" in header[0]
    assert lines[0] == ["mine", "2", "100.00", "", "0.70", "232000.00", "5.50"]
    assert ["SDXL + DPO, HPSv2 (paper)", "1065", "78.04", "86.22", "0.83", "", ""] in lines
