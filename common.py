"""What every script stands on: options, errors, processes, files, readers, pictures. No model, no loss.

option, parse                a dataclass from the command line; a range stands where its option is defined
fail, one_line_errors        bad input ends in one line and a status that is not zero
process_rank, pick_device    torchrun's processes, or one; the only place that knows rank and world
publish, write_text, lock    a reader of a file sees the old one or the new one, never half
appending, whole_lines       files that grow by lines, of which a killed run may leave half of the last
read_jsonl, read_prompts, read_image
                             one reader of each format, so that each complaint stands once
picture_grid, plot_curves    rows of captioned pictures, curves of a log
"""

import argparse
import csv
import ctypes
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------- errors


def fail(message, status=1):
    """End with one line on stderr: the last one, below any progress bar. Under torchrun the first process
    speaks at once. The others wait three seconds, in which torchrun ends them if the first has failed; one
    that still lives had an error of its own, and says it."""
    message = " ".join(str(message).splitlines())  # it may quote a name or a library
    if process_rank()[0] > 0:
        with suppress(ValueError):  # a thread may not
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if status == 1:
        raise SystemExit(message)  # python prints it at the very end and exits with 1
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)


def print_problems(problems, what):
    if problems:
        print("\n".join(problems[:20]))
        print(f"{len(problems)} {what}; at most 20 of them are listed above")


at_end = ExitStack()  # what is undone when a script ends, however it ends: locks, the process group


def one_line_errors(main):
    """A decorator for main: Ctrl-C, a full disk, a folder that cannot be written end in one line, too."""

    @functools.wraps(main)
    def guarded(argv=None):
        try:
            return main(argv)
        except KeyboardInterrupt:
            fail("interrupted; what was complete is kept, and the same command goes on from there", 130)
        except OSError as e:
            what = f"{e.filename}: {e.strerror}" if e.filename else e.strerror or str(e)
            fail(f"{what}; what was complete is kept, and the same command goes on from there")
        except Exception as e:  # a full disk as safetensors, torch and others report it
            if not any(text in str(e) for text in ("No space left", "Read-only file", "Permission denied")):
                raise
            fail(f"{' '.join(str(e).split())[-200:]}; what was complete is kept")
        finally:
            at_end.close()

    return guarded


# ----------------------------------------------------------------------------- options


def option(default, help, choices=None, above=None, at_least=None, below=None):
    """A field of a configuration. Its type is its annotation; numbers must lie in the range and be finite. A
    default of None means: derived, as the help says."""
    return field(default=default, metadata=dict(help=help, choices=choices, range=(above, at_least, below)))


def in_range(name, value, limits):
    """The value, or ValueError with what it must be. Whole numbers fit in what torch and PIL count with."""
    above, at_least, below = limits
    if isinstance(value, int) and below is None:
        below = 2**31
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be {f'above {above}' if above else 'positive'}, got {value}")
    if at_least is not None and value < at_least:
        wanted = f"be at least {at_least}" if at_least else "not be negative"
        raise ValueError(f"{name} must {wanted}, got {value}")
    if below is not None and value >= below:
        raise ValueError(f"{name} must be below {below}, got {value}")
    return value


KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def read_value(field, text):
    """The text of an option as its field's type, within its range; ArgumentTypeError says what is wanted."""
    if field.type not in KINDS:
        if "\0" in text or (field.default and not text.strip()):  # "" may stand where it is the default
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


def parse(config, doc, argv=None):
    """A dataclass from the command line. Wrong options end in one line and exit status 2."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: fail(f"{parser.prog}: {message} (--help lists the options)", 2)
    for f in fields(config):
        choices, default = f.metadata["choices"], f.default
        more = {"choices": choices} if choices else {"metavar": f.name.upper()}
        if f.type is bool:
            more.update(nargs="?", const=True)  # --flag, --flag true, --flag false
        if f.type is tuple:
            more.update(nargs="+")
            default = " ".join(default or ())
        text = f.metadata["help"] + ("" if default in (None, "") else f" (default: {default})")
        more.update(type=functools.partial(read_value, f), default=f.default, help=text.replace("%", "%%"))
        parser.add_argument(f"--{f.name.rstrip('_')}", dest=f.name, **more)  # from_ is --from
    values = vars(parser.parse_args(argv))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fill_in(cfg, values, why):
    """The configuration with these values where an option was not given (is None); says so once."""
    taken = {name: value for name, value in values.items() if getattr(cfg, name) is None}
    if process_rank()[0] == 0 and taken:
        print(f"{why}:", *(f"--{name} {value:g}" for name, value in taken.items()))
    return replace(cfg, **taken)


# ----------------------------------------------------------------------------- processes and devices


def process_rank():
    """(rank, world) as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name="auto"):
    """The device of this process: under torchrun its own GPU, or the CPU."""
    world, local = process_rank()[1], int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if world == 1 and name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    if name == "cuda" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            fail(f"{world} processes, but {torch.cuda.device_count()} GPUs here; lower --nproc_per_node")
        torch.cuda.set_device(local)
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: {str(e).splitlines()[0]}")


patient = []  # the process group in which wait_for_all(hours=True) waits


def start_processes(device_name, minutes=10):
    """The device of this process, after it has joined the others where torchrun started several. A peer that
    is lost, or not there after some minutes, ends the run; torchrun may start it again."""
    device, world = pick_device(device_name), process_rank()[1]
    if world > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes)
        )
        patient.append(dist.new_group(backend="gloo", timeout=timedelta(hours=24)))
        at_end.callback(patient.clear)
        at_end.callback(dist.destroy_process_group)
    return device


def gather(rows):
    """Rows (n, M) of every process, in the order of the processes -> (world n, M)."""
    if process_rank()[1] == 1:
        return rows
    whole = [torch.empty_like(rows) for _ in range(process_rank()[1])]
    dist.all_gather(whole, rows.contiguous())
    return torch.cat(whole)


def to_device(t, device):
    """A tensor of the CPU, without waiting for the copy on a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    return t.pin_memory().to(device, non_blocking=True) if on_gpu else t.to(device)


USABLE = 0.92  # share of a GPU's free memory; the rest is for fragments, NCCL and kernels


def free_bytes(device):
    """Memory of a GPU that may be used, the least of all processes. Infinite elsewhere."""
    if device.type != "cuda":
        return math.inf
    free = torch.tensor(float(torch.cuda.mem_get_info(device)[0]), device=device)
    if process_rank()[1] > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return USABLE * free.item()


def any_process(flag, device):
    """Is the flag set on any process? The same answer on all of them."""
    value = torch.tensor(float(flag), device=device)
    if process_rank()[1] > 1:
        dist.all_reduce(value)
    return bool(value)


def wait_for_all(hours=False):
    """Until every process is here; `hours`: where one may read, encode or write that long."""
    if process_rank()[1] > 1:
        dist.barrier(patient[0] if hours else None)


def ahead(work, items, depth, threads=1):
    """work(item) of all items, in their order: threads compute the next `depth` while the caller uses one."""
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
    """No weights that are not finite are trained on or saved."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in values]
    if any_process(not torch.stack([p.isfinite().all() for p in local]).all(), device):
        fail(message)


def matrix_rate(device, n=8192, times=50):
    """bf16 FLOP/s of an (n, n) matrix product on a GPU: what a share of the peak is a share of; else 0."""
    if device.type != "cuda":
        return 0
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for i in range(times + 5):  # five to warm up
        if i == 5:
            torch.cuda.synchronize()
            start = time.time()
        a @ a
    torch.cuda.synchronize()
    return 2 * n**3 * times / (time.time() - start)


def pick_dtype(precision, device):
    """The compute type that --precision names; auto is bf16 on a GPU, fp32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if device.type in ("cuda", "meta") else "fp32"
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    return names[precision]


def provenance(device):
    """What a result depends on besides its options: commit, versions, device."""
    import diffusers
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


def publish(path, write, sync=True, unique=False):
    """write(temporary path), then rename: a reader sees the old file or folder or the new one, never half.

    The temporary name is the same each time, so that what a killed run left is overwritten; `unique` is for
    files that several runs may write at once. `sync` waits until a file is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = f".{os.getpid()}" if unique else ""
    tmp = path.with_name(f".tmp{tag}.{path.name}")  # the suffix stays: it names the format
    old = path.with_name(f".old{tag}.{path.name}")
    remove(tmp)
    try:
        write(tmp)
        if sync and tmp.is_file():
            with open(tmp, "rb") as f:
                os.fsync(f.fileno())
        if path.is_dir() and not swap_paths(tmp, path):
            # no such call here: there is a moment without a folder
            remove(old)
            os.rename(path, old)
        if not path.is_dir():
            os.replace(tmp, path)
    finally:  # what was there before, or what was not finished
        remove(tmp)
        remove(old)


def swap_paths(a, b):
    """Swap two paths in one system call, where there is one (Linux): a folder is then never missing."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0  # AT_FDCWD, RENAME_EXCHANGE


def remove(path):
    """A file or a folder, if it is there."""
    if Path(path).is_dir() and not Path(path).is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        Path(path).unlink(missing_ok=True)


def write_text(path, text):
    """A text file, whole or not at all."""
    publish(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def writable_folder(name, path):
    """Make the folder of option --name and try to write into it: now, not after hours of work."""
    if not str(path).strip():
        fail(f"--{name}: a folder must be named")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        fail(f"--{name} {path}: cannot be written ({e.strerror})")
    return Path(path)


def own_folder(name, path, busy):
    """A folder of option --name that can be written and that no other process of this kind is at work in."""
    folder = writable_folder(name, path)
    if process_rank()[0] == 0:
        at_end.enter_context(lock(folder, f"--{name} {path}: {busy}; wait for it, or choose another folder"))
    return folder


@contextmanager
def lock(path, message="", shared=False, wait=False):
    """Hold the lock of the file or folder `path`; if another process does, fail with the message, or wait.
    The system frees the locks of a process that ends, however it ends; where there are none (Windows),
    nothing is locked."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = Path(path).is_dir()
    f = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o644)
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
    """The lines of such a file, as bytes, without what a killed run left of a last one."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def parallel_files(folder, name):
    """folder/NAME.jsonl and the NAME@0of8.jsonl ... of processes that work side by side."""
    return [Path(folder) / f"{name}.jsonl", *sorted(Path(folder).glob(f"{name}@*.jsonl"))]


@contextmanager
def appending(path, busy, keep=lambda line: True):
    """The file, open to append to, without a torn last line and lines that are not to `keep`. Its lock is
    held meanwhile; `busy` says why this fails where another process holds it, "" waits for that one."""
    path.parent.mkdir(exist_ok=True)
    with lock(path.with_name(f".{path.stem}.lock"), f"{path}: {busy}", wait=not busy):
        whole = b"".join(line + b"\n" for line in whole_lines(path) if keep(line))
        if path.is_file() and path.read_bytes() != whole:
            publish(path, lambda tmp: tmp.write_bytes(whole))
        with open(path, "ab") as f:
            yield f


# ----------------------------------------------------------------------------- reading


def read_text(path):
    """A text file that must be UTF-8, with or without a byte order mark."""
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8")


def ends_of(path, count):
    """(size, hash of the first and last `count` bytes) of a file: to know it again without reading 23 GB."""
    size = os.stat(path).st_size
    with open(path, "rb") as f:
        head = f.read(count)
        f.seek(max(0, size - count))
        return size, hashlib.sha256(head + f.read()).hexdigest()


def is_whole_safetensors(path):
    """A safetensors file that is there, to its end."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def parse_json(text):
    """json.loads; ValueError also for what is nested too deep, for half a surrogate pair and for a key that
    stands twice."""

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
    """[(line number, dict)] of a JSON lines file. Lines end at \\n alone: JSON may hold U+2028, where
    splitlines() would cut. With `torn_end`, a last line without its end is left out: an append-only file of a
    run that was killed."""
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


def prompt_rows(path, kind):
    """Rows of a prompt file, blank ones included. `kind` is its suffix."""
    if kind == ".txt":
        return [{"prompt": line} for line in read_text(path).removesuffix("\n").split("\n")]
    if kind == ".jsonl":
        return [row for _, row in read_jsonl(path)]
    try:
        if kind == ".json":
            rows = parse_json(read_text(path))
            if not isinstance(rows, list):
                raise ValueError("not a list of strings or objects")
            return [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        import pandas  # half a second; only here

        if kind == ".parquet":
            return pandas.read_parquet(path).to_dict("records")
        if kind in (".csv", ".tsv"):
            how = dict(sep=",") if kind == ".csv" else dict(sep="\t", quoting=csv.QUOTE_NONE)  # PartiPrompts
            as_it_is = dict(dtype=str, keep_default_na=False, encoding="utf-8-sig")
            return pandas.read_csv(path, **how, **as_it_is).to_dict("records")
    except Exception as e:  # pandas and pyarrow have their own errors
        fail(f"--prompts {path}: not a readable {kind} file ({' '.join(str(e).split())[:200]})")
    fail(f"--prompts {path}: a file of prompts ends in .txt, .json, .jsonl, .csv, .tsv or .parquet")


TEXT = ("prompt", "caption", "text")  # the keys of a prompt, the first that is there


def read_prompts(path, limit=0, offset=0, column=""):
    """Rows (dicts with a text under "prompt") of a prompt file; blank and repeated prompts are dropped.

    .txt: one a line; .json: a list of strings or objects (HPDv2); .jsonl, .csv, .tsv, .parquet: the column
    `column`, or prompt, caption or text. Other columns (GenEval's tag) stay in the row."""
    kind = Path(path).suffix.lower()
    if not Path(path).is_file():
        fail(f"--prompts {path}: no such file")
    rows = prompt_rows(path, kind)
    columns = {str(c).lower(): c for c in (rows[0] if rows else ())}
    column = column or next((columns[name] for name in TEXT if name in columns), "prompt")
    kept, blank = {}, 0
    for n, row in enumerate(rows, 1):
        text = row.get(column, 0)
        if not isinstance(text, str | None):
            wanted = f"{', '.join(TEXT)} is wanted, or for synpic.py what --field names"
            fail(f"--prompts {path}, row {n}: no text under {column!r}; a column {wanted}")
        text = " ".join((text or "").split())
        blank += not text
        if text:
            kept.setdefault(text, {**row, "prompt": text})
    repeated = len(rows) - blank - len(kept)
    if repeated or blank:
        dropped = f"{blank} blank and {repeated} repeated ones dropped"
        print(f"{path}: {len(rows)} rows, {dropped}, {len(kept)} prompts kept")
    chosen = list(kept.values())[offset : offset + limit if limit else None]
    if not chosen:
        fail(f"--prompts {path}: holds no prompt" + (f" after --offset {offset}" if offset else ""))
    return chosen


# ----------------------------------------------------------------------------- pictures


def open_image(image):
    """A file or a PIL image, read to its end, in its own mode. 16-bit grey becomes 8-bit by its high byte,
    where PIL's own conversion would clip it to white. ValueError if it cannot be read."""
    try:
        with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as image:
            image.load()
        if image.mode.startswith(("I", "F")):
            deep = np.asarray(image)
            if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
                raise ValueError("32-bit pixels, whose range nobody says; save it with 8 or 16")
            image = Image.fromarray((deep // 256).astype(np.uint8))
        return image
    except Exception as e:  # besides OSError, each format of PIL has its own
        raise ValueError(f"not a readable image ({e})") from None


def read_image(image):
    """The same, as 8-bit RGB: alpha is dropped."""
    return open_image(image).convert("RGB")


def read_pixels(path, resolution):
    """An image file as (3, H, W) in [-1, 1]; with a resolution, shorter side to that and centre crop."""
    try:
        image = read_image(path)
    except ValueError as e:
        fail(f"{path}: {e}; delete it and run synpic.py again")
    if resolution and image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        w, h = (max(resolution, round(side * scale)) for side in image.size)
        left, top = (w - resolution) // 2, (h - resolution) // 2
        box = (left, top, left + resolution, top + resolution)
        image = image.resize((w, h), Image.Resampling.LANCZOS).crop(box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def plot_curves(rows, panels, path):
    """Rows of a log -> a PNG: a panel {title: {key: label}} each, smoothed over a twentieth of its length."""
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


def picture_grid(rows, path, side=128):
    """[(title, [(image, caption), ...]), ...] -> a PNG: a row of pictures, `side` pixels wide, under each
    title, and the captions under them, at most three lines each."""
    wrap = [[textwrap.wrap(caption, side // 6)[:3] for _, caption in cells] for _, cells in rows]
    heights = [side + 18 + 11 * max((len(lines) for lines in row), default=0) + 8 for row in wrap]
    columns = max(len(cells) for _, cells in rows)
    canvas = Image.new("RGB", (max(columns * (side + 8) + 8, 420), sum(heights) + 8), "white")
    pen, top = ImageDraw.Draw(canvas), 6
    for (title, cells), captions, height in zip(rows, wrap, heights):
        pen.text((8, top), title, fill="black")
        for c, ((image, _), lines) in enumerate(zip(cells, captions)):
            smooth = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            left = 8 + c * (side + 8)
            canvas.paste(image.convert("RGB").resize((side, side), smooth), (left, top + 14))
            pen.text((left, top + side + 16), "\n".join(lines), fill="black", spacing=0)
        top += height
    publish(path, canvas.save)
