"""Files that are kept: replaced whole, locked, or grown line by line, where a kill may leave half a line.

Content identifies, never a path or a date. A folder that publish wrote lists its files and their digests in
.contents; one that holds anything else, or a changed file, is not replaced.
"""

import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.common import cleanup, fail, one_line, process_rank

# ----------------------------------------------------------------------------- digests


def digest(value):
    """16 letters that stand for a value of JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def ends_digest(file, count):
    """16 letters that stand for an open file: its size and `count` bytes at each end. It is for what has a
    checksum there, or is too large to be read for this alone."""
    size, parts = os.fstat(file.fileno()).st_size, []
    for start in (0, max(0, size - count)):
        file.seek(start)
        parts.append(hashlib.sha256(file.read(count)).hexdigest())
    return digest([size, *parts])


def file_digest(path, ends=0):
    """16 letters that stand for all bytes of a file, which threads read; with `ends` its ends_digest."""
    if ends:
        with open(path, "rb") as file:
            return ends_digest(file, ends)
    size, step = os.stat(path).st_size, 32 << 20

    def part(start):
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(step)).hexdigest()

    with ThreadPoolExecutor(8) as threads:
        return digest([size, *threads.map(part, range(0, size, step))])


def whole(file):
    """`file` itself. ValueError for the pointer that git clone leaves in its place without git-lfs."""
    with open(file, "rb") as f:
        if f.read(99).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file}: is a pointer of git-lfs, not the file itself; run git lfs pull there")
    return file


# ----------------------------------------------------------------------------- replaced whole

UMASK = os.umask(0o022)  # there is no other way to read it
os.umask(UMASK)
CONTENTS, RECIPE, ENDS = ".contents", "recipe.json", 1 << 20


def read_record(path):
    """A dict of JSON that was written here; {} if it is not there, or damaged."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def contents(folder):
    """{name: digest} of the files in a folder, by their ends: a model has gigabytes."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != CONTENTS)
    return {path.relative_to(folder).as_posix(): file_digest(path, ENDS) for path in files}


def is_whole(folder):
    """Is all there, unchanged, that publish wrote into the folder and listed in .contents?"""
    wrote = read_record(Path(folder) / CONTENTS)
    return bool(wrote) and wrote.items() <= contents(folder).items()


def strangers(folder):
    """The names in a folder of what publish did not write there, and of files that were changed since."""
    wrote = read_record(Path(folder) / CONTENTS)
    return [name for name, is_now in contents(folder).items() if wrote.get(name) != is_now]


def discard(folder):
    """Delete a folder that publish wrote. One that holds anything else stays, and is named."""
    if found := strangers(folder):
        print(f"{folder}: holds {found[0]}, which was not written here; it is left as it is")
    else:
        remove(folder)


def begin(path, unique=False):
    """The temporary path of `path`; what a killed run left there is gone. Its name is always the same, but
    `unique` adds the process id, for files that several runs may write at once."""
    path = Path(path)
    if path.is_dir() and (found := strangers(path)):
        fail(f"{path}: holds {found[0]}, which was not written here; move it away or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = f".{os.getpid()}" if unique else ""
    tmp = path.with_name(f".tmp{tag}.{path.name}")  # the suffix stays: it names the format
    remove(tmp)
    return tmp


def finish(tmp, path, sync=True):
    """Rename what was written at begin(path). `sync` waits until a file is on the disk. A folder takes two
    renames: a kill between them leaves the old one as .old.NAME."""
    path, old = Path(path), tmp.with_name(tmp.name.replace(".tmp", ".old", 1))
    for file in filter(Path.is_file, [tmp, *tmp.rglob("*")]):  # safetensors leaves 0600
        os.chmod(file, 0o666 & ~UMASK)
    if tmp.is_dir():
        (tmp / CONTENTS).write_text(json.dumps(contents(tmp)))
    elif path.is_dir():
        fail(f"{path}: a file would replace this folder; move it away")
    elif sync:
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
    remove(old)
    if path.is_dir():
        os.rename(path, old)
    os.replace(tmp, path)
    remove(old)


def publish(path, write, sync=True, unique=False):
    """Replace a file, or a folder that publish wrote, as a whole: write(temporary path), then rename."""
    tmp = begin(path, unique)
    try:
        write(tmp)
        finish(tmp, path, sync)
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


# ----------------------------------------------------------------------------- what a folder was made with


def read_recipe(folder):
    """What same() wrote into a folder; {} if there is none, or it is damaged."""
    return read_record(Path(folder) / RECIPE)


def differences(before, now, name=""):
    """["key (before, now)", ...] of two recipes, through their dicts."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        each = [differences(before.get(key), now.get(key), f"{name} {key}".strip()) for key in keys]
        return sum(each, [])
    missing = lambda value: "missing" if value is None else one_line(repr(value), 80)
    return [] if before == now else [f"{name} (before {missing(before)}, now {missing(now)})"]


def same(folder, recipe, names, mend, write=True):
    """Refuse a folder that was made with another recipe, and name what differs; `mend` says what to do. One
    without a recipe is refused where it holds something called like `names`, which would be replaced."""
    folder, before = Path(folder), read_recipe(folder)
    recipe = json.loads(json.dumps(recipe))  # as it is read back: tuples are lists
    if before:
        if found := differences(before, recipe):
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            fail(f"{folder}: was made with another {', '.join(found[:4])}{more}; {mend}")
    elif found := [path.name for name in names for path in folder.glob(name)]:
        fail(f"{folder}: holds {found[0]}, but no {RECIPE} that says what made it; {mend}")
    elif write:
        write_text(folder / RECIPE, json.dumps(recipe, indent=1))


def set_aside(folder, names):
    """Move what is called like `names` into folder/before-1, -2, ...: nothing is deleted."""
    there = [path for name in names for path in sorted(Path(folder).glob(name))]
    place = next(path for n in itertools.count(1) if not (path := Path(folder) / f"before-{n}").exists())
    if there:
        place.mkdir()
        print(f"{folder}: what was there is now in {place.name}/")
    for path in there:
        os.rename(path, place / path.name)


# ----------------------------------------------------------------------------- folders and locks


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


@functools.lru_cache(maxsize=4096)
def real_folder(path):
    return os.path.realpath(path)


def path_inside(folder, name):
    """The path of `name` in the folder, as text. `name` comes from a file that anybody may have written, so
    ValueError unless it is a relative path that stays in the folder, links followed."""
    text = name if isinstance(name, str) else ""
    if not text or "\0" in text or os.path.isabs(text) or ".." in text.split("/"):
        raise ValueError(f"{one_line(repr(name), 80)}: must be a path inside the folder")
    path = f"{folder}/{name}"
    real = os.path.realpath(path) if os.path.islink(path) else f"{real_folder(os.path.dirname(path))}/"
    if not real.startswith(f"{real_folder(folder)}/"):
        raise ValueError(f"{one_line(repr(name), 80)}: a link out of the folder; copy what it links to")
    return path


def own_folder(name, path, busy):
    """writable_folder, locked until this run ends; another run of the same folder is refused."""
    folder = writable_folder(name, path)
    if process_rank()[0] == 0:
        message = f"--{name} {path}: {busy}; wait for it, or choose another folder"
        cleanup.enter_context(lock(folder / ".lock", message))
    return folder


@contextmanager
def lock(path, message="", shared=False, wait=False):
    """Hold the lock of a file. If another process holds it, fail with the message, or wait. The system frees
    the locks of a process that ends."""
    f = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            fail(message)
        yield f
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
def appending(path, busy):
    """Open and lock a file to append lines, after a torn last line is cut off. If another process holds the
    lock, this fails with `busy`; "" waits."""
    for link in (path, path.parent):
        if link.is_symlink():
            fail(f"{link}: is a link, and nothing is written through links; replace it by what it links to")
    path.parent.mkdir(exist_ok=True)
    with lock(path, f"{path}: {busy}", wait=not busy) as file:
        os.truncate(file, sum(len(line) + 1 for line in whole_lines(path)))
        with open(path, "ab") as f:
            yield f
