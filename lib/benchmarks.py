"""The papers' benchmarks: prompt files, the layouts of their scorers, their metrics as pure functions.

    python evaluate.py --bench geneval --prompts evaluation_metadata.jsonl --models sdxl=DIR mine=DIR
    python evaluate.py --bench t2i-compbench --prompts examples/dataset --bench_models phrases=phrases.json
    python evaluate.py --bench dpg --prompts dpg_bench --bench_models vqa=vqascore-xl

Pictures are where the official scorer looks for them; write_layout adds what else it reads. Answers of the
judging models are appended to FOLDER/measured/NAME.jsonl as they come; each report computes its verdicts from
them. docs/benchmarks.md lists the benchmarks and their files, and says what differs from each original;
lib/templates/papers.txt holds the papers' rows.
"""

import json
import re
from collections import Counter
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from lib import common, pictures, scorers, tables
from lib.answers import Store, answer_rows, files_version, read_answers
from lib.common import HERE, about, fail, process_rank
from lib.formats import loading
from lib.scorers import PUBLISHED, Scorer, clip_tokenizer, cosine, crop, find_weights, pretrained
from lib.store import publish, write_text
from lib.tables import parse_json, prompt_rows, read_text

MODELS = {  # role: its default; --bench_models role=folder_or_hub_id names another
    "detector": "facebook/mask2former-swin-small-coco-instance",
    "colours": "openai/clip-vit-large-patch14",
    "clip": "openai/clip-vit-base-patch32",
    "vqa": "Salesforce/blip-vqa-capfilt-large",  # or vqascore, vqascore-xl, ..., each also as vqascore=folder
    "phrases": "",  # a .json file, {prompt: [noun phrases]}; without it spaCy finds them
}

# ----------------------------------------------------------------------------- prompt files

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
STYLES = ("anime", "concept-art", "paintings", "photo")
RELATIONS = ("left of", "right of", "above", "below")


def read_bench(name, path, limit=0, keep=""):
    """Rows of a benchmark's own file or folder, in its order, repeated prompts included: dicts of `prompt`,
    `tag` (its category or None) and what else the file holds. `keep`: see kept_rows. A bad file, row or
    prompt ends the program with one line that names it."""
    if name not in READERS:
        others = "a file of your own is named by --prompts alone"
        fail(f"--bench {name}: there are {', '.join(READERS)}; {others}")
    with about(f"--prompts {path}"):
        rows = list(READERS[name](Path(path)))
    for where, row in rows:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            fail(f"{where}: no prompt there; is it {name}'s own file?")
    if not rows:
        fail(f"{path}: holds no prompts of {name}")
    return kept_rows([row for _, row in rows], keep)[: limit or None]


def kept_rows(rows, keep):
    """The rows whose prompts the file `keep` lists, a subset made elsewhere; all of them without such a file.
    A prompt there that no row has ends the program."""
    if not keep:
        return rows
    wanted = {row["prompt"]: None for row in tables.read_prompts(keep)}
    kept = [row for row in rows if " ".join(row["prompt"].split()) in wanted]
    there = {" ".join(row["prompt"].split()) for row in kept}
    if lost := [prompt for prompt in wanted if prompt not in there]:
        what = f"{len(lost)} of {len(wanted)} prompts are not in --prompts, the first: {lost[0]!r}"
        fail(f"--keep {keep}: {what}")
    return kept


def inside(path, *names):
    """`path` if it is a file, else the first of these files that its folder holds."""
    found = [p for p in (path, *(path / name for name in names)) if p.is_file()]
    if not found:
        fail(f"{path}: neither a file nor a folder that holds {' or '.join(names)}")
    return found[0]


def read_geneval(path):
    path = inside(path, "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
    for n, row in tables.read_jsonl(path):  # the row stays as it is: it is what metadata.jsonl says again
        with about(f"{path}, line {n}: no metadata of GenEval"):
            check_metadata(row)
        yield f"{path}, line {n}", row


def check_metadata(row):
    """An exception unless the rules of geneval_verdict can judge by this row."""
    wanted = row["include"]
    if not isinstance(row["tag"], str) or not isinstance(row["prompt"], str) or not isinstance(wanted, list):
        raise ValueError("tag and prompt must be text, include a list")
    for item in [*wanted, *row.get("exclude", [])]:
        if not isinstance(item["class"], str) or type(item["count"]) is not int or item["count"] < 1:
            raise ValueError("each item needs a class and a count")
        if item.get("color", COLOURS[0]) not in COLOURS:
            raise ValueError(f"color {item['color']!r} is none of {', '.join(COLOURS)}")
    for item in wanted:
        relation, target = item.get("position", (RELATIONS[0], None))
        odd = relation not in RELATIONS or ("position" in item and type(target) is not int)
        if odd or (target is not None and "position" in wanted[target]):
            raise ValueError(f"position {item['position']} is none, or of an item with a position")


def read_compbench(path):
    files = {category: path / f"{category}_val.txt" for category in CATEGORIES}
    if not path.is_dir():  # color.txt has the training prompts, too
        files = {path.stem.removesuffix("_val"): path} if path.stem.endswith("_val") else {}
    files = {category: file for category, file in files.items() if file.is_file() and category in CATEGORIES}
    if not files:
        fail(f"{path}: neither a folder with color_val.txt and such, nor one of those files")
    for category, file in files.items():
        for n, line in enumerate(read_text(file).removesuffix("\n").split("\n")):  # U+2028 ends no line
            prompt, where = line.removesuffix("\r").split("\t")[0], f"{file}, line {n + 1}"
            # it becomes a file name, which the official scorer reads back up to its first _
            if re.search("[/_\0]", prompt) or len(prompt.encode()) > 240:
                fail(f"{where}: a prompt with / or _, or of over 240 bytes, has no official file name")
            yield where, dict(prompt=prompt, tag=category, index=n)


def read_dpg(path):
    table, questions, texts = inside(path, "dpg_bench.csv"), {}, {}
    for n, row in enumerate(prompt_rows(table), 1):
        with about(f"{table}, row {n}: not as DPG-Bench has it"):
            item, number = row["item_id"], int(row["proposition_id"])
            if not item or item.startswith(".") or re.search(r"[/\\\0]", item):
                raise ValueError(f"item_id {item!r} can be no file name")
            known, question = questions.setdefault(item, {}), row["question_natural_language"].strip()
            if number in known:
                raise ValueError(f"proposition {number} stands twice in item {item}")
            known[number] = (question, [p for p in map(int, row["dependency"].split(",")) if p])  # 0: none
            texts.setdefault(item, row.get("text", ""))
    if files := sorted((table.parent / "prompts").glob("*.txt")):
        texts = {file.stem: read_text(file).rstrip("\r\n") for file in files}
    for item, text in texts.items():
        if item not in questions:
            fail(f"{table}: no questions about prompts/{item}.txt")
        rows = [[number, question, parents] for number, (question, parents) in questions[item].items()]
        if lost := [p for _, _, parents in rows for p in parents if p not in questions[item]]:
            fail(f"{table}: item {item} has no proposition {lost[0]}, on which another depends")
        yield f"{table}, item {item}", dict(prompt=text, tag=None, stem=item, questions=rows)


def read_parti(path):
    path = inside(path, "PartiPrompts.tsv")
    for n, row in enumerate(prompt_rows(path), 1):
        yield f"{path}, row {n}", {"prompt": row.get("Prompt"), "tag": row.get("Category"), **row}


def read_hpdv2(path):
    folder = path / "benchmark" if (path / "benchmark").is_dir() else path
    files = {style: folder / f"{style}.json" for style in STYLES}
    if path.is_file():  # one style, or test.json, which has none
        files = {path.stem if path.stem in STYLES else None: path}
    for style, file in files.items():
        if not path.exists():
            file = scorers.from_hub(str(path), f"benchmark/{style}.json", "dataset")
        elif not file.is_file():
            continue  # fewer styles
        for n, row in enumerate(prompt_rows(file)):
            yield f"{file}, prompt {n + 1}", {"prompt": row.get("prompt"), "tag": style, "index": n}


def read_pickapic(path):
    seen = set()
    for file in tables.shards(path) if path.is_dir() else [path]:
        for n, row in enumerate(prompt_rows(file, "caption"), 1):  # not gigabytes of pictures
            caption = row.get("caption")
            if caption not in seen:  # a caption has many pairs of pictures
                seen.add(caption)
                yield f"{file}, row {n}", dict(prompt=caption, tag=None)


READERS = {
    "geneval": read_geneval,
    "t2i-compbench": read_compbench,
    "dpg": read_dpg,
    "parti": read_parti,
    "hpdv2": read_hpdv2,
    "pickapic": read_pickapic,
}
JUDGED = ("geneval", "t2i-compbench", "dpg")  # by a metric of their own; the others' tables are of rewards


# ----------------------------------------------------------------------------- layouts


def picture_files(name, rows, seeds):
    """[[file of each seed] of each row], inside a model's folder: as the official scorer has them where it
    reads one png a picture."""
    if name == "geneval":
        return [[f"{i:05d}/samples/{s:04d}.png" for s in range(seeds)] for i in range(len(rows))]
    if name == "t2i-compbench":  # numbered through the category
        pattern = "{tag}/samples/{prompt}_{n:06d}.png"
        return [[pattern.format(**r, n=r["index"] * seeds + s) for s in range(seeds)] for r in rows]
    return [[f"pictures/{i:05d}/{s}.png" for s in range(seeds)] for i in range(len(rows))]


def pictures_from_elsewhere(name, folder, rows, seeds):
    """picture_files of a folder that another program drew: in our layout, as GenEval's own script
    numbers them (five digits), or HPSv2's, one jpg a prompt; None where there are none, and what was looked
    for, as text."""
    layouts = [picture_files(name or "geneval", rows, seeds)]
    if name in ("", "geneval"):
        layouts.append([[f"{i:05d}/samples/{s:05d}.png" for s in range(seeds)] for i in range(len(rows))])
    if name == "hpdv2" and seeds == 1:
        layouts.append([[f"{row['tag']}/{row['index']:05d}.jpg"] for row in rows])
    for layout in layouts:
        if any((Path(folder) / file).is_file() for files in layout for file in files):
            return layout, ""
    return None, " or ".join(["metadata.jsonl", *(layout[0][0] for layout in layouts)])


def of_another_prompt(folder, file, prompt):
    """What is wrong with GenEval's metadata.jsonl of a picture; "" where there is none, or the prompt's."""
    note, said = Path(folder) / Path(file).parts[0] / "metadata.jsonl", None
    if not note.is_file():
        return ""
    with suppress(ValueError, AttributeError):
        said = parse_json(read_text(note)).get("prompt")
    return "" if said == prompt else f"{note} is damaged, or of another prompt than {prompt!r}"


def write_layout(name, folder, rows, files):
    """What else the official scorer reads, where it is missing or older than its pictures: GenEval's
    NNNNN/metadata.jsonl; under official/ DPG-Bench's 2 x 2 grids and HPSv2's jpgs (the first seed)."""
    for i, (row, drawn) in enumerate(zip(rows, files)):
        sources = [Path(folder) / file for file in drawn]
        if name == "geneval":
            path, text = Path(folder) / f"{i:05d}/metadata.jsonl", json.dumps(row)
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)
        elif name == "dpg":
            as_needed(Path(folder) / f"official/{row['stem']}.png", sources[:4], dpg_grid)
        elif name == "hpdv2":
            path = Path(folder) / f"official/{row['tag']}/{row['index']:05d}.jpg"
            as_needed(path, sources[:1], lambda images: images[0])


def as_needed(path, sources, draw):
    """draw([PIL of each source]) -> path, unless it is newer than all of them or one is not there."""
    if not all(source.is_file() for source in sources):
        return
    changed = max(source.stat().st_ctime_ns for source in sources)
    if not path.is_file() or path.stat().st_mtime_ns <= changed:
        with about(f"{path}: cannot be drawn from {sources[0]} and its seeds"):
            image = draw([pictures.read_image(source) for source in sources])
        publish(path, image.save, sync=False)


def dpg_grid(images):
    """Up to four square pictures row by row, as DPG-Bench's scorer cuts them out; one stays as it is."""
    side, columns = images[0].width, min(2, len(images))
    if any(image.size != (side, side) for image in images):
        raise ValueError("DPG-Bench's scorer wants square pictures of one size")
    canvas = Image.new("RGB", (columns * side, columns * side))
    for n, image in enumerate(images):
        canvas.paste(image, (n % 2 * side, n // 2 * side))
    return canvas


# ----------------------------------------------------------------------------- GenEval: the rules

CONFIDENCE, COUNTING_CONFIDENCE, MOST_OBJECTS = 0.3, 0.9, 16
POSITION_MARGIN = 0.1  # of both objects' extents
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def geneval_keep(boxes, tag):
    """Which detections of one class count: indices into boxes (N, 5) = x0, y0, x1, y1, confidence, the best
    first. Above .3 (.9 for the tag counting), at most 16. GenEval's limit on overlap is 1: none is
    dropped."""
    confidence = np.asarray(boxes).reshape(-1, 5)[:, 4]
    order = np.argsort(confidence)[::-1]  # as the original, whatever its order of equals
    limit = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    return order[confidence[order] > limit][:MOST_OBJECTS].tolist()


def geneval_verdict(objects, metadata):
    """(correct, reason) of a picture by GenEval's rules (djghosh13/geneval, evaluation/evaluate_images.py).

    objects {class: [(box of 5 numbers, colour or None), ...]}, the best first. Only the best `count` of a
    class are looked at. An item of `include` needs its count, then its colour, then its relation to what item
    `position[1]` matched; an item of `exclude` fails from its count on. The reason has a line for each
    failure, in their order. The original joins two relations in a set's order, which changes from run to run;
    here it is left, right, above, below. It knows targets before an item only; here one may come after."""
    wanted, matched, reasons = metadata.get("include", []), {}, {}
    for i in sorted(range(len(wanted)), key=lambda i: "position" in wanted[i]):
        found = objects.get(wanted[i]["class"], [])[: wanted[i]["count"]]
        relation, target = wanted[i].get("position", (None, None))
        reasons[i] = wrong_number_or_colour(wanted[i], found)
        if not reasons[i] and relation:
            reasons[i] = wrong_relation(wanted[i]["class"], found, relation, matched[target])
        matched[i] = None if reasons[i] else found
    lines = [reasons[i] for i in sorted(reasons) if reasons[i]]
    for item in metadata.get("exclude", []):
        number = len(objects.get(item["class"], []))
        if number >= item["count"]:
            lines.append(f"expected {item['class']}<{item['count']}, found {number}")
    return not lines, "\n".join(lines)


def wrong_number_or_colour(item, found):
    """What is wrong with the best objects `found` of an item's class, or ""."""
    name, count, colour = item["class"], item["count"], item.get("color")
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    seen = Counter(c for _, c in found)
    if colour is None or seen[colour] >= count:
        return ""
    listed = ", ".join(f"{seen[c]} {c}" for c in COLOURS if c in seen)
    return f"expected {colour} {name}>={count}, found {seen[colour]} {colour}; and {listed}"


def wrong_relation(name, found, expected, targets):
    """The first pair that is not placed as expected, or ""; targets None: the target itself failed."""
    if targets is None:
        return f"no target for {name} to be {expected}"
    for box, _ in found:
        for target, _ in targets:
            seen = relations(box, target)
            if expected not in seen:
                return f"expected {name} {expected} target, found {' and '.join(seen)} target"
    return ""


def relations(a, b):
    """Where box a is relative to box b, by their centres. A tenth of both extents is taken off the offset
    (dx, dy) first; a relation holds where more than half of the distance points that way."""
    a, b = (np.asarray(box)[:4].reshape(2, 2) for box in (a, b))  # (x0, y0), (x1, y1)
    offset = a.mean(0) - b.mean(0)
    extent = abs(a[1] - a[0]) + abs(b[1] - b[0])
    shift = np.maximum(abs(offset) - POSITION_MARGIN * extent, 0) * np.sign(offset)
    if (abs(shift) < 1e-3).all():
        return []
    dx, dy = shift / np.linalg.norm(offset)
    held = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return [relation for relation, holds in zip(RELATIONS, held) if holds]


# ----------------------------------------------------------------------------- answers that are kept


def measured(folder, name, sources, load, jobs, device, batch_size):
    """{(file, question): answer, or None where the picture is missing or unreadable} of these jobs. The store
    is folder/measured/NAME.jsonl; load(sources, device) -> a Scorer that answers what is not there.

    Batches are cut by position: a resumed run, and several processes (all of which must call this), answer as
    an unbroken one does."""
    version = []
    for role, source in sources.items():
        path = source.rpartition("=")[2]  # folder or vqascore=folder; else a name on the hub
        version.append(files_version([role, 1, source], path if Path(path).exists() else ""))
    store = Store(str(folder), name, "-".join(version), "measured")
    rows, (rank, world) = [(question, [file]) for file, question in jobs], process_rank()
    starts = range(0, len(rows), batch_size)[rank::world]
    mine = [row for start in starts for row in rows[start : start + batch_size]]
    mine = [(question, files) for question, files in mine if (Path(folder) / files[0]).is_file()]
    part, names = f"@{rank}of{world}" * (world > 1), " ".join(map("=".join, sources.items()))

    def judge():
        with loading(f"--bench_models {names}"):
            return load(sources, device)

    answer_rows(store, mine, judge, batch_size, "skip", part)
    common.wait_for_all(slow=True)
    known = read_answers(store, rows)
    there = lambda i: i in known and (Path(folder) / rows[i][1][0]).is_file()
    return {job: known[i][0] if there(i) else None for i, job in enumerate(jobs)}


def lost_pictures(answers):
    """[a note] where pictures could not be measured."""
    lost = list(dict.fromkeys(file for (file, _), answer in answers.items() if answer is None))
    what = f"{len(lost)} pictures are missing or unreadable and do not count"
    return [f"{what} (the first: {lost[0]})"] if lost else []


# ----------------------------------------------------------------------------- models


def load_clip(source, device):
    """A CLIPModel -> (pixels (N, 3, H, W) -> (N, D), texts -> (N, D), picture -> pixels)."""
    model = pretrained(transformers.CLIPModel, source)[0].to(device)
    words, eye = model.config.text_config, model.config.vision_config
    tokenizer = clip_tokenizer(source, words.vocab_size)

    def read(texts):
        ids = scorers.tokenize(tokenizer, list(texts), words.max_position_embeddings, source)[0]
        return model.get_text_features(input_ids=ids.to(device)).pooler_output

    see = lambda x: model.get_image_features(pixel_values=x.to(device)).pooler_output
    return see, read, crop(eye.image_size)


def load_clip_scorer(sources, device):
    """T2I-CompBench's CLIPScore: the cosine of a picture and its prompt."""
    see, read, prepare = load_clip(sources["clip"], device)
    return Scorer("clip", prepare, lambda x, prompts: cosine(1.0, see(x), read(prompts)), device)


def load_vqa(sources, device):
    """P(yes) of pictures and questions: BLIP-VQA as T2I-CompBench has it, or VQAScore."""
    source = sources["vqa"]
    name, _, folder = source.partition("=")
    if name.startswith("vqascore") and name in PUBLISHED:
        loader, *hub = PUBLISHED[name]
        question = "\n{} Please answer yes or no. ASSISTANT: "
        return loader(name, folder, find_weights(folder, *hub), device, question=question)
    model = pretrained(transformers.BlipForQuestionAnswering, source)[0].to(device)
    words, side = model.config.text_config.vocab_size, model.config.vision_config.image_size
    hub = scorers.BERT, scorers.BLIP_WORDS
    tokenizer = scorers.load_tokenizer(transformers.BertTokenizer, source, words, *hub)
    yes, no, start, ask = tokenizer.convert_tokens_to_ids(["yes", "no", "[DEC]", "[ENC]"])

    def forward(x, questions):
        seen = model.vision_model(pixel_values=x).last_hidden_state  # (N, 1 + patches, D)
        plain = [plain_question(question) for question in questions]
        ids = [tokenizer(text, truncation=True, max_length=35).input_ids for text in plain]
        lengths, chance = np.array([len(i) for i in ids]), torch.zeros(len(ids), device=device)
        # without padding: transformers 5 drops the mask of it on the way to the decoder's cross-attention
        for length in set(lengths.tolist()):
            rows = np.flatnonzero(lengths == length)
            text = torch.tensor([[ask, *ids[n][1:]] for n in rows], device=device)  # its own processor: [CLS]
            read = model.text_encoder(input_ids=text, encoder_hidden_states=seen[rows]).last_hidden_state
            first = torch.full((len(rows), 1), start, device=device)
            logits = model.text_decoder(input_ids=first, encoder_hidden_states=read).logits  # (n, 1, words)
            chance[rows] = (logits[:, 0, yes] - logits[:, 0, no]).sigmoid()  # P(yes) / (P(yes) + P(no))
        return chance

    return Scorer("vqa", scorers.processed(transformers.BlipImageProcessorPil(size=side)), forward, device)


def plain_question(text):
    """A question as BLIP was trained on: lower case, without some marks, at most 50 words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', "", text.lower()).rstrip(" ").split(" ")[:50])


# ----------------------------------------------------------------------------- GenEval: detector and colours

CLASSES = read_text(HERE / "lib/templates/geneval.txt").split("\n")[:-1]  # of COCO, as GenEval spells them
SIDES = (800, 1333)  # of the detector's input: the shorter side, and at most the longer
PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]  # ImageNet's
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]


def load_detector(source, device):
    """detect(RGB picture) -> {class: (boxes (n, 5), masks (n, H, W) bool)}, of confidence above .3.

    Input and output as in mmdet's test pipeline: resized with its proportions, bilinear without antialias,
    normalised, zero-padded right and below to a multiple of 32."""
    # old checkpoints bring buffers that today's class does not keep, so any tensor may be left over; the
    # criterion is of training
    kind = transformers.Mask2FormerForUniversalSegmentation
    model = pretrained(kind, source, unused=("",), optional=("criterion.",))[0].to(device)
    names = model.config.id2label
    if len(names) != len(CLASSES) or any(names[i] != CLASSES[i] for i in (0, 15, 79)):
        raise ValueError("its labels are not COCO's 80 classes of instances")

    @torch.inference_mode()
    def detect(image):
        w, h = image.size
        scale = min(SIDES[0] / min(w, h), SIDES[1] / max(w, h))
        size = tuple(max(1, int(n * scale + 0.5)) for n in (h, w))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None].to(device)
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        x = (x - PIXEL_MEAN.to(device)) / PIXEL_STD.to(device)
        x = F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32))
        out = model(pixel_values=x)
        return instances(out.class_queries_logits[0], out.masks_queries_logits[0], x.shape[-2:], size, (h, w))

    return detect


def instances(classes, masks, padded, size, full):
    """Instances by class of classes (Q, C + 1) and masks (Q, h, w), as mmdet's MaskFormerFusionHead has them.

    The 100 best pairs of query and class; confidence = softmax(class) x mean sigmoid(mask) inside the mask;
    the box of a mask ends one pixel after it. Masks are those of the `padded` input, of which `size` is the
    picture, resized to its `full` size."""
    scores = classes.softmax(-1)[:, :-1]  # (Q, C)
    best, index = scores.flatten().topk(min(100, scores.numel()))
    above = best > CONFIDENCE  # the second factor is at most 1
    best, index = best[above], index[above]
    query, label = index // scores.shape[1], index % scores.shape[1]
    found = {}
    for n, score, c in zip(query, best, label.tolist()):
        mask = F.interpolate(masks[None, n[None]], padded, mode="bilinear", align_corners=False)
        mask = mask[..., : size[0], : size[1]]
        mask = F.interpolate(mask, full, mode="bilinear", align_corners=False)[0, 0]  # (H, W)
        inside = mask > 0
        confidence = float(score * (mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6))
        if confidence > CONFIDENCE:
            ys, xs = (inside.any(side).nonzero()[:, 0].tolist() for side in (1, 0))
            box = [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1, confidence]
            boxes, insides = found.setdefault(CLASSES[c], ([], []))
            boxes.append(box)
            insides.append(inside.cpu().numpy())
    return {name: found[name] for name in CLASSES if name in found}


COLOUR_TEXTS = ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")


def load_colours(source, device):
    """colours(picture, boxes, masks, class) -> [colour]: zero-shot CLIP of crops on grey."""
    see, read, prepare = load_clip(source, device)

    @lru_cache(maxsize=None)
    def classifier(name):
        texts = [text.format(colour, name) for colour in COLOURS for text in COLOUR_TEXTS]
        mean = F.normalize(read(texts), dim=-1).unflatten(0, (len(COLOURS), -1)).mean(1)
        return F.normalize(mean, dim=-1)  # (10, D)

    @torch.inference_mode()
    def colours(image, boxes, masks, name):
        grey = Image.new("RGB", image.size, "#999")
        crops = [Image.composite(image, grey, Image.fromarray(m)).crop(b[:4]) for b, m in zip(boxes, masks)]
        seen = F.normalize(see(torch.stack([prepare(c) for c in crops])), dim=-1)
        return [COLOURS[i] for i in (seen @ classifier(name).T).argmax(-1).tolist()]

    return colours


def load_finder(sources, device):
    """A Scorer whose answer about a picture is {class: [[x0, y0, x1, y1, confidence, colour or None]]}."""
    detect, colours = load_detector(sources["detector"], device), load_colours(sources["colours"], device)

    def find(image):
        answer = {}
        for name, (boxes, masks) in detect(image).items():
            best = geneval_keep(boxes, "")  # no other is ever looked at
            seen = colours(image, [boxes[i] for i in best], [masks[i] for i in best], name)
            named = dict(zip(best, seen))
            answer[name] = [[*box, named.get(i)] for i, box in enumerate(boxes)]
        return answer

    convert = lambda image: image.convert("RGB")
    return Scorer("finder", convert, lambda images, _: list(map(find, images)), device)


# ----------------------------------------------------------------------------- metrics


def measure(name, folder, rows, files, device="cpu", batch_size=32, sources=None):
    """({metric: (P, S) array}, notes) of the pictures files (P, S) in a model's folder: NaN where a picture
    is missing or unreadable, or where its category has no scorer here. `sources` replaces some of MODELS;
    `notes` say what is not the official scorer's, and what was left out. parti, hpdv2 and pickapic have no
    metric of their own: their tables are of rewards."""
    sources = {**MODELS, **(sources or {})}
    if unknown := sources.keys() - MODELS.keys():
        fail(f"--bench_models: no role {unknown.pop()!r}; there are {', '.join(MODELS)}")
    measures = {"geneval": measure_geneval, "t2i-compbench": measure_compbench, "dpg": measure_dpg}
    if name not in measures:
        return {}, []
    ask = partial(measured, folder, device=device, batch_size=batch_size)
    values, notes = measures[name](folder, rows, files, sources, ask)
    return {name: np.array(values, float)}, notes


def measure_geneval(folder, rows, files, sources, ask):
    """1 where a picture passes, else 0. Writes results.jsonl as the original does."""
    models = {role: sources[role] for role in ("detector", "colours")}
    for row in rows:
        if lost := {item["class"] for item in row["include"] + row.get("exclude", [])} - {*CLASSES}:
            fail(f"GenEval's detector knows COCO's classes only, not {lost.pop()!r} ({row['prompt']!r})")
    jobs = [(file, "objects") for of_row in files for file in of_row]
    answers = ask("geneval", models, load_finder, jobs)
    values, results = np.full((len(rows), len(files[0])), np.nan), []
    for i, (row, of_row) in enumerate(zip(rows, files)):
        for s, file in enumerate(of_row):
            answer = answers[file, "objects"]
            if answer is not None:
                results.append(geneval_result(f"{folder}/{file}", row, answer))
                values[i, s] = results[-1]["correct"]
    if process_rank()[0] == 0 and results:
        write_text(Path(folder) / "results.jsonl", "".join(json.dumps(r) + "\n" for r in results))
    note = f"detector {models['detector']} in transformers; official: the same architecture trained in mmdet"
    return values, [note, *lost_pictures(answers)]


def geneval_result(filename, row, answer):
    """A line of the official results.jsonl, of an answer of load_finder."""
    objects = {}
    for name, found in answer.items():
        if kept := geneval_keep([f[:5] for f in found], row["tag"]):
            objects[name] = [(found[i][:5], found[i][5]) for i in kept]
    correct, reason = geneval_verdict(objects, row)
    boxes = {name: [box for box, _ in found] for name, found in objects.items()}
    result = dict(filename=filename, tag=row["tag"], prompt=row["prompt"], correct=correct, reason=reason)
    return {**result, "metadata": json.dumps(row), "details": json.dumps(boxes)}


def measure_dpg(folder, rows, files, sources, ask):
    """Share of yes among a prompt's questions."""
    jobs = [(file, q) for row, of_row in zip(rows, files) for file in of_row for _, q, _ in row["questions"]]
    answers = ask("dpg", {"vqa": sources["vqa"]}, load_vqa, jobs)
    score = lambda file, asked: dpg_score(asked, [answers[file, q] for _, q, _ in asked])
    values = [[score(file, row["questions"]) for file in of_row] for row, of_row in zip(rows, files)]
    return values, [f"answers by {sources['vqa']}; official: mPLUG-large", *lost_pictures(answers)]


def dpg_score(questions, answers):
    """Mean over [[number, question, parents], ...] of "yes" (P > .5), 0 where a parent is no; in the file's
    order, so that a child of such a child is no, too."""
    if None in answers:
        return np.nan
    scores = {number: float(p > 0.5) for (number, _, _), p in zip(questions, answers)}
    for number, _, parents in questions:
        if any(scores[parent] == 0 for parent in parents):
            scores[number] = 0.0
    return sum(scores.values()) / len(scores)


ATTRIBUTES, MOST_PHRASES = ("color", "shape", "texture"), 8
NO_PHRASES = ("top", "the side", "the left", "the right")  # of places, not of things


def measure_compbench(folder, rows, files, sources, ask):
    """Color, shape, texture: product of P(yes) over the noun phrases. Non-spatial: cosine of CLIP."""
    bound = [i for i, row in enumerate(rows) if row["tag"] in ATTRIBUTES]
    questions = dict(zip(bound, noun_phrases([rows[i]["prompt"] for i in bound], sources["phrases"])))
    jobs = [(file, question) for i in bound for file in files[i] for question in questions[i]]
    yes = ask("blip_vqa", {"vqa": sources["vqa"]}, load_vqa, jobs)
    plain = [(file, r["prompt"]) for r, o in zip(rows, files) if r["tag"] == "non_spatial" for file in o]
    cosines = ask("clip_score", {"clip": sources["clip"]}, load_clip_scorer, plain)
    values = np.full((len(rows), len(files[0])), np.nan)
    for i, row in enumerate(rows):
        for s, file in enumerate(files[i]):
            if i in questions:
                values[i, s] = compbench_score([yes[file, question] for question in questions[i]])
            elif cosines.get((file, row["prompt"])) is not None:
                values[i, s] = cosines[file, row["prompt"]]
    notes = lost_pictures({**yes, **cosines})
    if bound and sources["vqa"] != MODELS["vqa"]:
        notes.append(f"answers by {sources['vqa']}; official: BLIP-VQA, capfilt-large")
    if left_out := sorted({row["tag"] for row in rows} - {*ATTRIBUTES, "non_spatial"}):
        notes.append(f"{', '.join(left_out)}: not run, the official scorers need UniDet")
    return values, notes


def compbench_score(answers):
    """Product of P(yes), each and the product with four decimals as the original's files hold them."""
    if None in answers:
        return np.nan
    return round(float(np.prod([round(p, 4) for p in answers])), 4)


def noun_phrases(prompts, file):
    """["phrase?", ...] of each prompt, at most 8: of a .json {prompt: [phrases]}, or as spaCy finds them."""
    phrases = {}
    if file:
        with suppress(ValueError):  # what is no JSON holds no prompt either
            phrases = parse_json(read_text(file))
        known = phrases if isinstance(phrases, dict) else {}
        if missing := [prompt for prompt in prompts if not isinstance(known.get(prompt), list)]:
            fail(f"{file}: no JSON {{prompt: [noun phrases]}} with {missing[0]!r}")
    elif prompts:
        try:
            import spacy

            find = spacy.load("en_core_web_sm")
        except (ImportError, OSError):
            advice = "install both, or name a file of them with --bench_models phrases=FILE.json"
            fail(f"T2I-CompBench's noun phrases: spaCy or its en_core_web_sm is not here; {advice}")
        phrases = {prompt: [chunk.text for chunk in find(prompt).noun_chunks] for prompt in prompts}
    return [[f"{p}?" for p in phrases[prompt] if p not in NO_PHRASES][:MOST_PHRASES] for prompt in prompts]


# ----------------------------------------------------------------------------- tables

COLUMNS = dict(single_object="Single", two_object="Two", color_attr="Color Attribution")
COLUMNS["non_spatial"] = "Non-Spatial"  # RankDPO's tables call the other categories by their names


def mean(values):
    """Of what is there; NaN of nothing."""
    values = np.asarray(values, float)
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")


def summarise_bench(name, rows, metrics):
    """{column: number} of {metric or reward: (P, S)}, as the papers' tables have their columns and units."""
    tags = np.array([str(row["tag"] or "all") for row in rows])
    by_tag = lambda values: {t: mean(values[tags == t]) for t in dict.fromkeys(tags.tolist())}
    if name == "geneval":
        found = by_tag(metrics[name])
        columns = {COLUMNS.get(tag, tag.title()): value for tag, value in found.items()}
        return {"Mean": mean([*found.values()]), **columns}
    if name == "t2i-compbench":
        there = {tag: v for tag, v in by_tag(metrics[name]).items() if not np.isnan(v)}
        return {COLUMNS.get(tag, tag.title()): 100 * v for tag, v in there.items()}
    if name == "dpg":
        vqa = {"VQA Score": 100 * mean(v) for reward, v in metrics.items() if reward.startswith("vqascore")}
        own = {"Q-Align Score": mean(v) for r, v in metrics.items() if column_of(r, ["Q-Align Score"])}
        return {"DSG Score": 100 * mean(metrics[name]), **vqa, **own}  # Q-Align: a function of the user's
    if name == "hpdv2":
        scores = next((metrics[reward] for reward in ("hpsv2.1", "hpsv2") if reward in metrics), None)
        return {} if scores is None else hps_table(tags, scores)
    return {metric: mean(values) for metric, values in metrics.items()}


def hps_table(tags, scores):
    """HPSv2's table of cosines (P, S): 100 x mean of each style, std over its groups of 80, mean over the
    seeds."""
    columns = {}
    for style in dict.fromkeys(tags.tolist()):
        values = 100 * scores[tags == style]  # (n, S)
        groups = np.array([values[n : n + 80].mean(0) for n in range(0, len(values), 80)])  # (groups, S)
        columns[style] = float(groups.mean())
        columns[f"{style} std"] = float(groups.std(0).mean())
    return {**columns, "Average": float(100 * scores.mean())}


def read_papers(path=HERE / "lib/templates/papers.txt"):
    """{benchmark: dict(source, columns, rows {model: {column: number}}, n {model: prompts})}."""
    tables = {}
    for block in re.sub("(?m)^#.*\n", "", read_text(path)).strip().split("\n\n"):
        (bench, source, header), *lines = (line.split("; ") for line in block.split("\n"))
        table = dict(source=source, columns=header.split(", "), rows={}, n={})
        for n, model, text in lines:
            values = [float("nan" if cell == "-" else cell) for cell in text.split()]
            table["rows"][model], table["n"][model] = dict(zip(table["columns"], values)), int(n)
        tables[bench] = table
    return tables


PAPER_TABLES = read_papers()


def column_of(reward, columns):
    """The paper's column that a reward fills: pickscore, q-align, ...; hpsv2 or hpsv2.1 the one of HPS."""
    plain = lambda name: re.sub(r"score|v2(\.1)?$|[^a-z\d]", "", name.lower())
    return next((column for column in columns if plain(reward) == plain(column)), None)


def paper_table(bench, results, rows, scores, notes=(), trained=None):
    """(header, rows): ours above the papers', in the papers' own columns: values of scores {model: {metric:
    (P, S)}}, or win rates of the best seed from evaluate.py's results. The title says who judged (`notes`)
    and which reward filled a column. `trained`: {model: {column: number}} from the logs of training."""
    paper, filled = PAPER_TABLES[bench], {}
    title, columns = [bench, paper["source"], *notes], paper["columns"]
    ours = {
        name: summarise_bench(bench, rows, of) | (trained or {}).get(name, {}) for name, of in scores.items()
    }
    if "win rates" in paper["source"]:
        for reward in next(iter(scores.values())):
            filled.setdefault(column_of(reward, columns), reward)
        filled.pop(None, None)  # those without a column
        title += [f"{column} is {reward}" for column, reward in filled.items()]
        for name, result in results.items():
            for other, pair in result["against"].items():
                wins = {column: 100 * pair[r]["best"]["rate"] for column, r in filled.items() if r in pair}
                ours[f"{name} vs {other}"] = wins
    columns = dict.fromkeys([*columns, *(column for values in ours.values() for column in values)])
    cells = lambda values: [f"{values[c]:.2f}" if np.isfinite(values.get(c, np.nan)) else "" for c in columns]
    n = str(len({row["prompt"] for row in rows}))
    lines = [[name, n, *cells(values)] for name, values in ours.items()]
    for name, values in paper["rows"].items():
        lines.append([f"{name} (paper)", str(paper["n"][name]), *cells(values)])
    return ["; ".join(title), "n", *columns], lines
