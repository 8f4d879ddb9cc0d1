"""Text that people and programs wrote: one reader for each format, so that each complaint is written once."""

import csv
import json
import re
from pathlib import Path

from lib.common import about, fail
from lib.store import whole

# ----------------------------------------------------------------------------- reading


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark."""
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8")


def parse_json(text):
    """json.loads that also raises ValueError for a repeated key, half a surrogate pair, or deep nesting."""

    def once(pairs):
        if len(row := dict(pairs)) < len(pairs):
            raise ValueError(f"a key stands twice in {list(row)}")
        return row

    try:
        value = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e})") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if "\\ud" in text.lower():  # half a pair can be read and printed, but no file can hold it
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_jsonl(path, torn_end=False):
    """[(line number, dict)] of a JSON lines file. With `torn_end` a last line without \\n is left out.

    Lines end at \\n alone: JSON may hold U+2028, where splitlines() would cut."""
    lines, rows = read_text(path).split("\n"), []
    for n, line in enumerate(lines, 1):
        if not line.strip() or (torn_end and n == len(lines)):
            continue
        with about(f"{path}, line {n}", "mend or delete that line"):
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        rows.append((n, row))
    return rows


TEXT = ("prompt", "caption", "text")  # the keys of a prompt, the first that is there


def shards(folder):
    """The .parquet files of a folder, sorted. Those of several splits are refused: a test split would be
    trained on without a word."""
    files = sorted(Path(folder).rglob("*.parquet"))
    splits = {match[1] for file in files if (match := re.match(r"(\w+)-\d+-of-\d+", file.stem))}
    if len(splits) > 1:
        fail(f"{folder}: holds shards of {', '.join(sorted(splits))}; move those of one to their own folder")
    return files


def prompt_column(names, column):
    """`column`, else the first of these column names that means a prompt."""
    known = {str(name).lower(): name for name in names}
    return column or next((known[name] for name in (*TEXT, "prompts") if name in known), "prompt")


def prompt_rows(path, column="", also=()):
    """Rows of a prompt file, including blank ones."""
    kind = Path(path).suffix.lower()
    if kind == ".txt":
        return [{"prompt": line} for line in read_text(path).removesuffix("\n").split("\n")]
    if kind == ".jsonl":
        return [row for _, row in read_jsonl(path)]
    with about(f"{path}: not a readable {kind} file"):  # pandas and pyarrow have their own errors
        if kind == ".json":
            rows = parse_json(read_text(path))
            if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
                rows = list(rows.values())  # GenAI-Bench: {id: {prompt, ...}}
            if not isinstance(rows, list):
                raise ValueError("not a list of strings or objects")
            return [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        if kind == ".parquet":
            from pyarrow.parquet import read_schema, read_table

            names = read_schema(whole(path)).names  # another column may hold pictures, gigabytes of them
            wanted = [name for name in (prompt_column(names, column), *also) if name in names]
            return read_table(path, columns=wanted).to_pylist() if wanted else [{}]
        import pandas  # half a second; only here

        if kind in (".csv", ".tsv"):
            how = dict(sep=",") if kind == ".csv" else dict(sep="\t", quoting=csv.QUOTE_NONE)  # PartiPrompts
            as_it_is = dict(dtype=str, keep_default_na=False, encoding="utf-8-sig")
            return pandas.read_csv(path, **how, **as_it_is).to_dict("records")
    fail(f"--prompts {path}: a file of prompts ends in .txt, .json, .jsonl, .csv, .tsv or .parquet")


def read_prompts(path, limit=0, column="", also=("tag",)):
    """Rows of a prompt file: dicts with a text under "prompt". Blank and repeated prompts are dropped.

    .txt: one prompt per line. .json: a list of strings or objects (HPDv2), or an object of objects. .jsonl,
    .csv, .tsv, .parquet: the column `column`, else prompt, prompts, caption or text. `path` may be a folder
    of .parquet shards. Other columns (GenEval's tag) stay in the row; of a parquet only those in `also`."""
    files = [Path(path)] if Path(path).is_file() else shards(path)
    if not files:
        fail(f"--prompts {path}: no such file, and no folder of .parquet shards")
    kept, total = {}, 0
    for file in files:
        rows = prompt_rows(file, column, also)
        name = prompt_column(rows[0] if rows else (), column)
        for n, row in enumerate(rows, 1):
            text = row.get(name, 0)
            if not isinstance(text, str | None):
                wanted = f"a column {', '.join(TEXT)} is wanted, or what --field names"
                fail(f"--prompts {file}, row {n}: no text under {name!r}; {wanted}")
            text = " ".join((text or "").split())
            if text:
                kept.setdefault(text, {**row, "prompt": text})
        total += len(rows)
    if dropped := total - len(kept):
        print(f"{path}: {total} rows, {dropped} blank or repeated ones dropped, {len(kept)} prompts kept")
    if not kept:
        fail(f"--prompts {path}: holds no prompt")
    return list(kept.values())[: limit or None]
