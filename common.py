"""What every script uses: errors, options, processes, files, readers, pictures. No model, no loss.

fail, one_line_errors        bad input ends in one line and an exit status that is not zero
option, parse                a dataclass becomes the command line; each range is written beside its option
process_rank, pick_device    rank, world size and device, with or without torchrun
publish, write_text, lock    files that are replaced whole: a reader never sees half of one
appending, whole_lines       files that grow line by line, where a killed run may leave half a line
read_jsonl, read_prompts, read_image
                             one reader a format, so that each complaint is written once
picture_grid, plot_curves    captioned pictures in rows; the curves of a log
"""

import argparse
import csv
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from safetensors import SafetensorError, safe_open

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------- errors


def fail(message, status=1):
    """Print one line on stderr, below any progress bar, and exit.

    Under torchrun the first process prints at once. The others wait three seconds: if the first process has
    failed too, torchrun ends them meanwhile, and the error is printed once."""
    message = " ".join(str(message).splitlines())  # it may quote a name or a library
    if process_rank()[0] > 0:
        with suppress(ValueError):  # a thread may not set a signal
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if status == 1:
        raise SystemExit(message)  # python prints it last and exits with 1
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)


def print_problems(problems, what):
    """Print at most 20 problems and how many there are."""
    if problems:
        print("\n".join(problems[:20]))
        print(f"{len(problems)} {what}; at most 20 of them are listed above")


def quoted(value):
    """The first 80 characters of repr, for a message: a damaged file may hold megabytes of text."""
    return repr(value)[:80]


cleanup = ExitStack()  # closed when a script ends, also by an error: locks, the process group


def one_line_errors(main):
    """Decorate main: Ctrl-C, a full disk and a folder that cannot be written also end in one line."""

    @functools.wraps(main)
    def guarded(argv=None):
        try:
            return main(argv)
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on from what is saved", 130)
        except Exception as e:
            if type(e).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
                smaller = "--images_per_forward 1 --gradient_checkpointing true, --lora_rank or more GPUs"
                fail(f"out of GPU memory: lower --batch_size; rankdpo.py: {smaller}; memory.py plans ahead")
            what = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else " ".join(str(e).split())
            # safetensors, torch and others report a full disk by exceptions of their own
            full = any(text in what for text in ("No space left", "Read-only file", "Permission denied"))
            if not isinstance(e, OSError) and not full:
                raise
            fail(f"{what[-200:]}; the same command goes on from what is saved")
        finally:
            cleanup.close()

    return guarded


# ----------------------------------------------------------------------------- options


def option(default, help, choices=None, above=None, at_least=None, below=None):
    """A field of a configuration dataclass. The annotation is its type; a number must be finite and in range.
    A default of None is derived later, as the help says."""
    return field(default=default, metadata=dict(help=help, choices=choices, range=(above, at_least, below)))


def in_range(name, value, limits):
    """The value; ValueError says what it must be. Whole numbers stay below 2^31, as torch and PIL need."""
    above, at_least, below = limits
    if isinstance(value, int) and below is None:
        below = 2**31
    checks = {
        "be a finite number": abs(value) < math.inf,
        f"be above {above}": above is None or value > above,
        f"be at least {at_least}" if at_least else "not be negative": at_least is None or value >= at_least,
        f"be below {below}": below is None or value < below,
    }
    if wrong := [wanted for wanted, right in checks.items() if not right]:
        raise ValueError(f"{name} must {wrong[0]}, got {value}")
    return value


KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def read_value(field, text):
    """Convert an option's text to its field's type; ArgumentTypeError says which values are allowed."""
    if field.type not in KINDS:
        if "\0" in text or (field.default and not text.strip()):  # "" is allowed where it is the default
            raise argparse.ArgumentTypeError(f"{text!r} names nothing")
        return text
    try:
        value = {"true": True, "false": False}[text.lower()] if field.type is bool else field.type(text)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{KINDS[field.type]} is wanted, not {text!r}") from None
    try:
        return in_range("the value", value, field.metadata["range"])
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def headings(config):
    """{option: heading}. A comment line inside the dataclass is the heading of the options below it."""
    found, heading = {}, "options"
    for cls in reversed(config.__mro__[:-1]):
        for line in inspect.getsource(cls).splitlines():
            if comment := re.match(r"    # (.+)", line):
                heading = comment[1]
            elif name := re.match(r"    (\w+): ", line):
                found[name[1]] = heading
    return found


def parse(config, doc, argv=None):
    """Fill the dataclass `config` from the command line. A wrong option ends in one line and status 2.

    Scripts also call this before they import torch, so that --help and a misspelt option cost no seconds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    names = [f"--{f.name.rstrip('_')}" for f in fields(config)]  # from_ is --from

    def error(message):
        wrong = message.split()[2:] if message.startswith("unrecognized arguments") else []
        near = [name for word in wrong for name in get_close_matches(word.split("=")[0], names, 1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        fail(f"{parser.prog}: {message}{hint} (--help lists the options)", 2)

    parser.error, heading = error, headings(config)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(heading.values())}
    for f, name in zip(fields(config), names):
        choices, default = f.metadata["choices"], f.default
        more = {"choices": choices} if choices else {"metavar": f.name.upper()}
        if f.type is bool:
            more.update(nargs="?", const=True)  # --flag, --flag true, --flag false
        if f.type is tuple:
            more.update(nargs="+")
            default = " ".join(default or ())
        text = f.metadata["help"] + ("" if default in (None, "") else f" (default: {default})")
        more.update(type=functools.partial(read_value, f), default=f.default, help=text.replace("%", "%%"))
        groups[heading[f.name]].add_argument(name, dest=f.name, **more)
    values = vars(parser.parse_args(argv))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fill_in(cfg, values, why):
    """Replace options that are None, that is not given, by `values`. The first process prints them."""
    taken = {name: value for name, value in values.items() if getattr(cfg, name) is None}
    if process_rank()[0] == 0 and taken:
        print(f"{why}:", *(f"--{name} {value:g}" for name, value in taken.items()))
    return replace(cfg, **taken)


# ----------------------------------------------------------------------------- processes and devices


def process_rank():
    """(rank, world size) as torchrun sets them; (0, 1) without torchrun."""
    given = {n: os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if n in os.environ}
    rank, world = given.get("RANK", "0"), given.get("WORLD_SIZE", "1")
    if not all(map(str.isdecimal, given.values())) or int(rank) >= int(world):
        found = " ".join(f"{name}={value}" for name, value in given.items())
        raise SystemExit(f"{found}: not what torchrun sets; unset them, or start with torchrun")
    return int(rank), int(world)


def pick_device(name="auto"):
    """The device of this process: under torchrun its own GPU, or the CPU."""
    import torch

    world, local = process_rank()[1], int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if world == 1 and name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if name == "cpu" and os.path.exists("/dev/nvidiactl") and not hidden:
            fail("torch cannot use this machine's GPU (torch build, driver); --device cpu runs without it")
    if name == "cuda" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            fail(f"{world} processes, but {torch.cuda.device_count()} GPUs here; lower --nproc_per_node")
        torch.cuda.set_device(local)
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: {str(e).splitlines()[0]}")


slow_group = []  # one process group with a timeout of a day; wait_for_all(slow=True) waits in it


def start_processes(device_name, minutes=10):
    """Join the other processes of torchrun, if there are any; returns this process's device.

    A process that is lost, or silent for `minutes`, ends the run; torchrun may then restart it."""
    device, world = pick_device(device_name), process_rank()[1]
    if world > 1:
        import torch.distributed as dist

        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        except (dist.DistError, ValueError) as e:
            place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            why = f"{world} processes cannot meet there ({str(e).splitlines()[0][:200]})"
            fail(f"{place}: {why}; start with torchrun, or unset WORLD_SIZE")
        slow_group.append(dist.new_group(backend="gloo", timeout=timedelta(hours=24)))
        cleanup.callback(slow_group.clear)
        cleanup.callback(dist.destroy_process_group)
    return device


def gather(rows):
    """Concatenate the rows (n, M) of all processes in the order of their ranks -> (world n, M)."""
    if process_rank()[1] == 1:
        return rows
    import torch
    import torch.distributed as dist

    whole = [torch.empty_like(rows) for _ in range(process_rank()[1])]
    dist.all_gather(whole, rows.contiguous())
    return torch.cat(whole)


def to_device(t, device):
    """Copy a CPU tensor to the device; the caller does not wait for a copy to a GPU."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    return t.pin_memory().to(device, non_blocking=True) if on_gpu else t.to(device)


def any_process(flag, device):
    """True on every process if the flag is set on one of them."""
    if process_rank()[1] == 1:
        return bool(flag)
    import torch
    import torch.distributed as dist

    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value)
    return bool(value)


def wait_for_all(slow=False):
    """Return once every process has called this. With `slow` it waits up to a day: for reading, encoding or
    writing by one of them."""
    if process_rank()[1] > 1:
        import torch.distributed as dist

        dist.barrier(slow_group[0] if slow else None)


def ahead(work, items, depth, threads=1):
    """Yield work(item) for all items in order. Threads compute the next `depth` while the caller uses one."""
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def check_finite(values, device, message):
    """End the run on every process if one of the tensors holds inf or nan."""
    import torch

    local = [p.to_local() if hasattr(p, "to_local") else p for p in values]
    if any_process(not torch.stack([p.isfinite().all() for p in local]).all(), device):
        fail(message)


def pick_dtype(precision, device):
    """The compute type of --precision; auto is bf16 on a GPU and fp32 elsewhere."""
    import torch

    if precision == "auto":
        precision = "bf16" if device.type in ("cuda", "meta") else "fp32"
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    return names[precision]


def provenance(device):
    """What a result depends on besides its options: the commit, library versions, the device."""
    import diffusers
    import torch
    import transformers

    describe, commit = ["git", "describe", "--always", "--dirty"], ""
    with suppress(OSError, subprocess.TimeoutExpired):
        commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, timeout=10).stdout.strip()
    name = f"{device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
    return dict(commit=commit or "unknown", **versions, device=name)


# ----------------------------------------------------------------------------- writing


MARKER = ".replaceable"  # publish() puts this file into its folders, and replaces only folders that have it


def publish(path, write, sync=True, unique=False):
    """Replace a file, or a folder of its own, as a whole: write(temporary path), then rename.

    The temporary name is always the same, so that a run overwrites what a killed run left. `unique` adds the
    process id, for files that several runs may write at once. `sync` waits until a file is on the disk. A
    folder takes two renames: a kill between them leaves the old one as .old.NAME."""
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not (path / MARKER).is_file():
        fail(f"{path}: would replace a folder that was not written here; move it away or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = f".{os.getpid()}" if unique else ""
    tmp = path.with_name(f".tmp{tag}.{path.name}")  # the suffix stays: it names the format
    old = path.with_name(f".old{tag}.{path.name}")
    remove(tmp)
    try:
        write(tmp)
        if tmp.is_dir():
            (tmp / MARKER).touch()
        elif path.is_dir():
            fail(f"{path}: a file would replace this folder; move it away")
        elif sync:
            with open(tmp, "rb") as f:
                os.fsync(f.fileno())
        if path.is_dir():
            remove(old)
            os.rename(path, old)
        os.replace(tmp, path)
        remove(old)
    finally:
        remove(tmp)  # what was not finished


def remove(path):
    """Delete a file or a folder, if it exists."""
    if Path(path).is_dir() and not Path(path).is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        Path(path).unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    publish(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def writable_folder(name, path):
    """Make the folder of option --name and try to write there: an error should come before hours of work."""
    if not str(path).strip():
        fail(f"--{name}: a folder must be named")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        fail(f"--{name} {path}: cannot be written ({e.strerror})")
    return Path(path)


def path_inside(folder, name):
    """The path of `name` in the folder, as text. `name` comes from a file that anybody may have written, so
    ValueError unless it is a relative path that stays in the folder, links followed."""
    text = name if isinstance(name, str) else ""
    if not text or "\0" in text or os.path.isabs(text) or ".." in text.split("/"):
        raise ValueError(f"{quoted(name)}: must be a path inside the folder")
    if not os.path.realpath(f"{folder}/{name}").startswith(f"{os.path.realpath(folder)}/"):
        raise ValueError(f"{quoted(name)}: a link out of the folder; copy what it links to")
    return f"{folder}/{name}"


def own_folder(name, path, busy):
    """writable_folder, locked until this run ends; another run of the same folder is refused."""
    folder = writable_folder(name, path)
    if process_rank()[0] == 0:
        cleanup.enter_context(lock(folder, f"--{name} {path}: {busy}; wait for it, or choose another folder"))
    return folder


@contextmanager
def lock(path, message="", shared=False, wait=False):
    """Hold the lock of a file or folder. If another process holds it, fail with the message, or wait.
    The system frees the locks of a process that ends."""
    how = os.O_RDONLY if Path(path).is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    f = os.open(path, how, 0o644)
    try:
        try:
            fcntl.flock(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            fail(message)
        yield
    finally:
        os.close(f)


# ----------------------------------------------------------------------------- append-only files


def whole_lines(path):
    """The complete lines of an append-only file, as bytes; a torn last line is left out."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def parallel_files(folder, name):
    """folder/NAME.jsonl, and NAME@0of8.jsonl ... which processes write side by side."""
    return [Path(folder) / f"{name}.jsonl", *sorted(Path(folder).glob(f"{name}@*.jsonl"))]


@contextmanager
def appending(path, busy, keep=lambda line: True):
    """Open a file to append lines, after a torn last line and the lines that `keep` refuses are removed.

    The file is locked meanwhile. If another process holds the lock, this fails with `busy`; "" waits."""
    for link in (path, path.parent):
        if link.is_symlink():
            fail(f"{link}: is a link, and nothing is written through links; replace it by what it links to")
    path.parent.mkdir(exist_ok=True)
    with lock(path.with_name(f".{path.stem}.lock"), f"{path}: {busy}", wait=not busy):
        whole = b"".join(line + b"\n" for line in whole_lines(path) if keep(line))
        if path.is_file() and path.read_bytes() != whole:
            publish(path, lambda tmp: tmp.write_bytes(whole))
        with open(path, "ab") as f:
            yield f


# ----------------------------------------------------------------------------- reading


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark."""
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8")


def ends_of(path, count):
    """(size, hash of the first and last `count` bytes): identifies a file without reading 23 GB."""
    size = os.stat(path).st_size
    with open(path, "rb") as f:
        head = f.read(count)
        f.seek(max(0, size - count))
        return size, hashlib.sha256(head + f.read()).hexdigest()


def is_whole_safetensors(path):
    """True if the safetensors file exists and is complete."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


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
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as e:
            fail(f"{path}, line {n}: {e}; mend or delete that line")
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
    try:
        if kind == ".json":
            rows = parse_json(read_text(path))
            if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
                rows = list(rows.values())  # GenAI-Bench: {id: {prompt, ...}}
            if not isinstance(rows, list):
                raise ValueError("not a list of strings or objects")
            return [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        if kind == ".parquet":
            from pyarrow.parquet import read_schema, read_table

            names = read_schema(path).names  # another column may hold pictures, gigabytes of them
            wanted = [name for name in (prompt_column(names, column), *also) if name in names]
            return read_table(path, columns=wanted).to_pylist() if wanted else [{}]
        import pandas  # half a second; only here

        if kind in (".csv", ".tsv"):
            how = dict(sep=",") if kind == ".csv" else dict(sep="\t", quoting=csv.QUOTE_NONE)  # PartiPrompts
            as_it_is = dict(dtype=str, keep_default_na=False, encoding="utf-8-sig")
            return pandas.read_csv(path, **how, **as_it_is).to_dict("records")
    except Exception as e:  # pandas and pyarrow have their own errors
        fail(f"--prompts {path}: not a readable {kind} file ({' '.join(str(e).split())[:200]})")
    fail(f"--prompts {path}: a file of prompts ends in .txt, .json, .jsonl, .csv, .tsv or .parquet")


def read_prompts(path, limit=0, column="", also=("tag",)):
    """Rows of a prompt file: dicts with a text under "prompt". Blank and repeated prompts are dropped.

    .txt: a prompt a line. .json: a list of strings or objects (HPDv2), or an object of objects. .jsonl, .csv,
    .tsv, .parquet: the column `column`, else prompt, prompts, caption or text. `path` may be a folder of
    .parquet shards. Other columns (GenEval's tag) stay in the row; of a parquet only those in `also`."""
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


# ----------------------------------------------------------------------------- pictures


# PIL would start Ghostscript for a PostScript file, whatever its name is: these formats only
IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"]
IMAGE_FORMATS += ["AVIF"] if features.check("avif") else []
ORIENTATION = 0x0112  # EXIF: how a camera was held


def open_image(image):
    """Read a file, or a PIL image, in its own mode; ValueError if it cannot be read.

    16-bit grey becomes 8-bit by its high byte. PIL's own conversion would clip it to white. A picture is
    turned as its EXIF orientation says, as viewers and datasets' imagefolder show it."""
    try:
        if isinstance(image, str | Path) and os.path.exists(image) and not os.path.isfile(image):
            raise ValueError("a folder, a pipe or a device")
        opened = isinstance(image, Image.Image)
        with nullcontext(image) if opened else Image.open(image, formats=IMAGE_FORMATS) as image:
            image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            deep = np.asarray(image)
            if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
                raise ValueError("32-bit pixels have no fixed range; save it with 8 or 16 bits")
            image = Image.fromarray((deep // 256).astype(np.uint8))
        return image
    except Exception as e:  # besides OSError, each format of PIL has its own
        raise ValueError(f"not a readable image ({e})") from None


def read_image(image):
    """open_image, converted to 8-bit RGB; alpha is dropped."""
    return open_image(image).convert("RGB")


def read_pixels(path, resolution):
    """An image file as (3, H, W) in [-1, 1]. With a resolution: shorter side resized to it, centre crop."""
    try:
        image = read_image(path)
    except ValueError as e:
        fail(f"{path}: {e}; delete it and run synpic.py again")
    if resolution:
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def plot_curves(rows, panels, path):
    """Draw the rows of a log as a PNG. `panels` is {title: {key: label}}; a bold line is the mean over a
    twentieth of the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, lines) in zip(axes, panels.items()):
        for key, label in lines.items():
            y = np.array([np.nan if row[key] is None else row[key] for row in rows])
            (line,) = axis.plot(y, alpha=0.3)
            width = max(1, len(y) // 20)
            smooth = np.convolve(y, np.ones(width) / width, "valid")
            axis.plot(np.arange(len(smooth)) + width // 2, smooth, color=line.get_color(), label=label)
        axis.set(title=title, xlabel="step")
        if len(lines) > 1:
            axis.axhline(0, color="k", lw=0.5)
            axis.legend()
    publish(path, lambda tmp: figure.savefig(tmp, dpi=100))


@functools.lru_cache(maxsize=1)
def grid_font():
    import matplotlib  # it brings DejaVu Sans: Latin, Greek, Cyrillic, Arabic, Hebrew

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(path, 10, layout_engine=ImageFont.Layout.BASIC)  # raqm raises for lone marks


def in_font(text):
    """The text on one line; what the font of picture_grid cannot draw is counted and named, as in [3 CJK]."""
    box, parts = bytes(grid_font().getmask("\uffff")), []
    for lacking, group in itertools.groupby(text[:500], lambda c: bytes(grid_font().getmask(c)) == box):
        part = "".join(group)
        symbol = unicodedata.category(part[0]) == "So"  # an emoji
        kind = "SYMBOL" if symbol else unicodedata.name(part[0], "CHARACTERS").split()[0]
        parts.append(f"[{len(part)} {kind}]" if lacking else part)
    return " ".join("".join(parts).split())


def picture_grid(rows, path, side=128):
    """Draw [(title, [(image, caption), ...]), ...] as a PNG: a row of pictures under each title, which has at
    most four lines. A picture fits into `side` pixels, its proportions kept; a caption has at most three."""
    columns = max(len(cells) for _, cells in rows)
    width, canvas, top = max(columns * (side + 8) + 8, 420), [], 6
    for title, cells in rows:
        lines = textwrap.wrap(in_font(title), width // 6)[:4]
        captions = [textwrap.wrap(in_font(caption), side // 6)[:3] for _, caption in cells]
        canvas.append((lines, captions, top))
        top += 13 * len(lines) + side + 13 * max(map(len, captions), default=0) + 16
    page = Image.new("RGB", (width, top), "white")
    pen = ImageDraw.Draw(page)
    for (_, cells), (lines, captions, top) in zip(rows, canvas):
        pen.text((8, top), "\n".join(lines), fill="black", font=grid_font(), spacing=2)
        top += 13 * len(lines) + 4
        for c, ((image, _), caption) in enumerate(zip(cells, captions)):
            left, smaller = 8 + c * (side + 8), max(image.size) < side
            how = Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS
            page.paste(ImageOps.pad(image.convert("RGB"), (side, side), how, "white"), (left, top))
            pen.text((left, top + side + 2), "\n".join(caption), fill="black", font=grid_font(), spacing=1)
    publish(path, page.save)
