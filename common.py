"""What every script stands on: options, one-line errors, processes and devices, atomic files, readers,
pictures.

Nothing of the method is here, and nothing of the project is imported. A reader of the method can skip this
file:

    option, parse                  a dataclass from the command line; an option's range stands where it is
    defined fail, one_line_errors          bad input ends in one line and a status that is not zero
    process_rank, pick_device      torchrun's processes, or one; the only place that knows rank and world
    publish, write_text, lock      a reader of a file sees the old one or the new one, never half
    read_jsonl, read_prompts, read_metadata, read_image
                                   one reader of each format, so that each complaint stands once
    picture_grid                   rows of captioned pictures
"""

import argparse
import ctypes
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from dataclasses import field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------- errors


def fail(message, status=1):
    """End with one line on stderr: the last one, below any progress bar."""
    if status == 1:
        raise SystemExit(message)  # python prints it at the very end and exits with 1
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)


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
        finally:
            at_end.close()

    return guarded


# ----------------------------------------------------------------------------- options


def option(default, help, choices=None, above=None, at_least=None, below=None):
    """A field of a configuration. Its type is its annotation; numbers must lie in the range and be finite. A
    default of None means: derived, as the help says."""
    return field(default=default, metadata=dict(help=help, choices=choices, range=(above, at_least, below)))


def in_range(name, value, limits):
    """The value, or ValueError with what it must be."""
    above, at_least, below = limits
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be {'positive' if above == 0 else f'above {above}'}, got {value}")
    if at_least is not None and not value >= at_least:
        wanted = "must not be negative" if at_least == 0 else f"must be at least {at_least}"
        raise ValueError(f"{name} {wanted}, got {value}")
    if below is not None and not value < below:
        raise ValueError(f"{name} must be below {below}, got {value}")
    return value


def parse(config, doc, argv=None):
    """A dataclass from the command line. Wrong options end in one line and exit status 2."""

    def reader(f):
        def read(text):
            if f.type is bool:
                if text.lower() not in ("true", "false"):
                    raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
                return text.lower() == "true"
            if f.type not in (int, float):
                return text
            try:
                number = f.type(text)
            except ValueError:
                kind = "a whole number" if f.type is int else "a number"
                raise argparse.ArgumentTypeError(f"{kind} is wanted, not {text!r}") from None
            try:
                return in_range("the value", number, f.metadata["range"])
            except ValueError as e:
                raise argparse.ArgumentTypeError(str(e)) from None

        return read

    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{parser.prog}: {message} (--help lists the options)", 2)
    for f in fields(config):
        more = {"choices": f.metadata["choices"]} if f.metadata["choices"] else {"metavar": f.name.upper()}
        default = f.default
        if f.type is bool:
            more.update(nargs="?", const=True)  # --flag, --flag true, --flag false
        if f.type is tuple:
            more.update(nargs="+")
            default = " ".join(f.default)
        text = f.metadata["help"] + ("" if default is None else f" (default: {default})")
        parser.add_argument(
            f"--{f.name}", type=reader(f), default=f.default, help=text.replace("%", "%%"), **more
        )
    values = vars(parser.parse_args(argv))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


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


def start_processes(device_name):
    """The device of this process, after it has joined the others where torchrun started several."""
    device, world = pick_device(device_name), process_rank()[1]
    if world > 1:  # the long timeout is for the first encoding of a data set: processes wait for the slowest
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
        at_end.callback(dist.destroy_process_group)
    return device


def gather(rows):
    """Rows (n, M) of every process, in the order of the processes -> (world n, M)."""
    if process_rank()[1] == 1:
        return rows
    whole = [torch.empty_like(rows) for _ in range(process_rank()[1])]
    dist.all_gather(whole, rows.contiguous())
    return torch.cat(whole)


def any_process(flag, device):
    """Is the flag set on any process? The same answer on all of them."""
    value = torch.tensor(float(flag), device=device)
    if process_rank()[1] > 1:
        dist.all_reduce(value)
    return bool(value)


def pick_dtype(precision, device):
    """The compute type that --precision names; auto is bf16 on a GPU, fp32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    return names[precision]


def provenance(device):
    """What a result depends on besides its options: commit, versions, device."""
    import diffusers
    import transformers

    describe = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} threads"
    return dict(
        commit=commit or "unknown",
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        device=name,
    )


# ----------------------------------------------------------------------------- writing


def publish(path, write, sync=True, unique=False):
    """write(temporary path), then rename: a reader of a file or folder sees the old one or the new one, never
    half.

    The temporary name is the same each time, so that what a killed run left is overwritten; `unique` is for
    files that several runs may write at once. `sync` waits until a file is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = f".{os.getpid()}" if unique else ""
    tmp = path.with_name(f".tmp{tag}.{path.name}")  # hidden, and with the suffix that names the format
    remove(tmp)
    try:
        write(tmp)
        if sync and tmp.is_file():
            with open(tmp, "rb") as f:
                os.fsync(f.fileno())
        if path.is_dir() and exchange(tmp, path):
            remove(tmp)  # the old one
            return
        if path.is_dir():
            os.rename(path, old := path.with_name(f".old.{path.name}"))
            os.rename(tmp, path)
            remove(old)
        else:
            os.replace(tmp, path)
    except BaseException:
        remove(tmp)
        raise


def exchange(a, b):
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
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / f".try.{os.getpid()}").touch()
        (Path(path) / f".try.{os.getpid()}").unlink()
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
def lock(path, message, shared=False):
    """Hold the lock of the file or folder `path`, or fail with the message. The system frees the locks of a
    process that ends, however it ends; where there are none (Windows), nothing is locked."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = Path(path).is_dir()
    f = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            fail(message)
        yield
    finally:
        os.close(f)


# ----------------------------------------------------------------------------- reading


def read_text(path):
    """A text file that must be UTF-8, with or without a byte order mark."""
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8")


def parse_json(text):
    """json.loads; ValueError also for what is nested too deep, and for half a surrogate pair, which no file
    can hold."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if "\\ud" in text.lower():
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


def read_prompts(path, limit=0, offset=0, column=""):
    """Rows (dicts with a text under "prompt") of a prompt file; blank and repeated prompts are dropped and
    counted.

    .txt: one a line; .json: a list of strings or objects (HPDv2); .jsonl, .csv, .tsv, .parquet: the column
    `column`, or prompt, caption or text. Other columns (GenEval's tag) stay in the row."""
    kind = Path(path).suffix.lower()
    if not Path(path).is_file():
        fail(f"--prompts {path}: no such file")
    if kind == ".txt":
        lines = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
        rows = [{"prompt": line} for line in lines]
    elif kind == ".jsonl":
        rows = [row for _, row in read_jsonl(path)]
    elif kind == ".json":
        try:
            rows = parse_json(read_text(path))
        except ValueError as e:
            fail(f"--prompts {path}: not JSON ({e})")
        if not isinstance(rows, list):
            fail(f"--prompts {path}: a .json file of prompts is a list of strings or objects")
        rows = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    elif kind in (".csv", ".tsv", ".parquet"):
        import pandas  # half a second; only here

        try:
            if kind == ".parquet":
                table = pandas.read_parquet(path)
            else:
                separator = "\t" if kind == ".tsv" else ","
                table = pandas.read_csv(
                    path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig"
                )
        except Exception as e:  # pandas and pyarrow have their own errors
            fail(f"--prompts {path}: not a readable {kind} file ({' '.join(str(e).split())[:200]})")
        rows = table.to_dict("records")
    else:
        fail(f"--prompts {path}: a file of prompts ends in .txt, .json, .jsonl, .csv, .tsv or .parquet")
    names = rows[0] if rows and isinstance(rows[0], dict) else {}
    known = [c for c in names if str(c).lower() in ("prompt", "caption", "text")]
    column = column or (known[0] if known else "prompt")
    kept, blank = {}, 0
    for n, row in enumerate(rows, 1):
        text = row.get(column, 0) if isinstance(row, dict) else 0
        if not isinstance(text, str | None):
            fail(f"--prompts {path}, row {n}: no text under {column!r}; name the column with --field")
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


def read_metadata(folder, labelled=False):
    """Rows of folder/metadata.jsonl, one a list of images: prompt, file_names and, where they are there,
    scores, phi.

    Rows of other programs may say text or caption, and file_name. With `labelled`, every row must be one that
    can be trained on: at least two images, which are there, and a phi in [0, 1] for each. A bad row ends the
    run with file, line and what to do."""
    path, rows = Path(folder) / "metadata.jsonl", []
    if not path.is_file():
        fail(f"{path}: no such file; make it with synpic.py, or name its folder with --data")
    for n, row in read_jsonl(path):
        try:
            rows.append(checked_row(Path(folder), row, labelled))
        except (ValueError, TypeError, AttributeError) as e:
            mend = "; mend or delete that row" + (
                " (synpic.py --stages label writes phi anew)" if labelled else ""
            )
            fail(f"{path}, line {n}: {e}{mend}")
    if not rows:
        fail(f"{path}: no rows; run synpic.py to the end first")
    return rows


def checked_row(folder, row, labelled):
    """A row of metadata.jsonl with its keys in our names; ValueError with what is wrong with it."""
    prompt = next((row[k] for k in ("prompt", "text", "caption") if k in row), None)
    files = row.get("file_names", [row["file_name"]] if "file_name" in row else None)
    if not isinstance(prompt, str) or not isinstance(files, list) or not files:
        raise ValueError("needs prompt (or text, caption) and file_names (or file_name)")
    for f in files:
        if not isinstance(f, str) or Path(f).is_absolute() or ".." in Path(f).parts:
            raise ValueError(f"image {f}: must be a path inside the folder")
    scores, k = row.get("scores", {}), len(files)
    for name, values in scores.items():
        if len(values) != k or not np.isfinite(np.array(values, dtype=float)).all():
            raise ValueError(f"scores of {name}: as many finite numbers as file_names are wanted")
    if labelled:
        phi = row.get("phi")
        if k < 2 or not isinstance(phi, list) or len(phi) != k:
            raise ValueError("needs at least two file_names, and as many phi as files")
        if not all(0 <= p <= 1 for p in phi):
            raise ValueError("phi must lie in [0, 1]")
        if missing := [f for f in files if not (folder / f).is_file()]:
            raise ValueError(f"image {missing[0]} is not in the folder")
    return {**row, "prompt": prompt, "file_names": files}


def random_order(k, seed, n):
    """A random permutation of the k images of list n: labels that say nothing, as a control. ndarray (k,)."""
    return np.random.default_rng([seed, n]).permutation(k)


# ----------------------------------------------------------------------------- pictures


def open_image(image):
    """A file or a PIL image, read to its end, in its own mode. 16-bit grey becomes 8-bit by its high byte, where
    PIL's own conversion would clip it to white. ValueError if it cannot be read."""
    try:
        image = image if isinstance(image, Image.Image) else Image.open(image)
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        return image
    except Exception as e:  # besides OSError, each format of PIL has its own
        raise ValueError(f"not a readable image ({e})") from None


def read_image(image):
    """The same, as 8-bit RGB: alpha is dropped."""
    return open_image(image).convert("RGB")


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
