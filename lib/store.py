"""Files that are kept: replaced whole, locked, or grown line by line, where a kill may leave half a line.

publish(path, write)            # write(temporary path), then rename: a reader never sees half of a file
write_text(path, text)
with appending(path, busy) as f: f.write(line)
own_folder(name, path, busy)    # a folder for this run alone
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lib.common import cleanup, fail, process_rank, quoted

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
