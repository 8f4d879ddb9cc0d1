"""What every script uses: errors, options, processes. No model, no loss, no file."""

import argparse
import functools
import importlib.util
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent  # of the scripts

# ----------------------------------------------------------------------------- errors


def one_line(text, longest=400):
    """Text that may quote anybody's file on one printable line; what is long loses its middle."""
    text = " ".join(str(text).split())
    text = text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 4 :]}"
    return "".join(c if c.isprintable() else "?" for c in text)


def fail(message, status=1):
    """Print one line on stderr, below any progress bar, and exit.

    Under torchrun the first process prints at once. The others wait three seconds: if the first process has
    failed too, torchrun ends them meanwhile, and the error is printed once."""
    message = one_line(message, 1200)
    if process_rank()[0] > 0:
        with suppress(ValueError):  # a thread may not set a signal
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else ():
        bar.close()
    if status == 1:
        raise SystemExit(message)  # python prints it last and exits with 1
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def about(where, mend=""):
    """A `with` in which an error ends the run with one line: where it was, what it says, what to do."""
    try:
        yield
    except Exception as e:  # libraries have many of their own
        kind = "" if type(e) is ValueError else f"{type(e).__name__}: "
        fail(f"{where}: {kind}{one_line(e)}{'; ' * bool(mend)}{mend}")


def print_problems(problems, what):
    """Print at most 20 problems and how many there are."""
    if problems:
        print("\n".join(map(one_line, problems[:20])))
        print(f"{len(problems)} {what}; at most 20 of them are listed above")


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
                fail(f"out of GPU memory: lower --batch_size; rankdpo.py: {smaller}; --plan counts ahead")
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


PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "peft", "numpy", "PIL", "tqdm")
KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def read_value(field, text):
    """Convert an option's text to its field's type; ArgumentTypeError says which values are allowed."""
    if field.type not in KINDS:
        if "\0" in text or (field.default and not text.strip()):  # "" is allowed where it is the default
            raise argparse.ArgumentTypeError(f"{text!r} names nothing")
        if text.encode(errors="ignore").decode() != text:
            raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8, so no log could name it")
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
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        mend = "pip install -r requirements.txt, or source .venv/bin/activate after bash train.sh"
        fail(f"{parser.prog}: not installed for {sys.executable}: {', '.join(missing)}; {mend}")
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
    if "RANK" not in given and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # srun's alone
        mend = "let srun start torchrun (docs/slurm), or unset SLURM_STEP_NUM_TASKS"
        raise SystemExit(f"srun started several processes that do not know of each other; {mend}")
    if not all(map(str.isdecimal, given.values())) or int(rank) >= int(world):
        found = " ".join(f"{name}={value}" for name, value in given.items())
        raise SystemExit(f"{found}: not what torchrun sets; unset them, or start with torchrun")
    return int(rank), int(world)


def print_first(text):
    """print() on the first process alone."""
    if process_rank()[0] == 0:
        print(text)


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


def wait_for_all(slow=False):
    """Return once every process has called this. With `slow` it waits up to a day: for reading, encoding or
    writing by one of them."""
    if process_rank()[1] > 1:
        import torch.distributed as dist

        dist.barrier(slow_group[0] if slow else None)


def from_first(work, *args):
    """work(*args) on the first process alone -> what it returns, on every process."""
    rank, world = process_rank()
    found = [work(*args) if rank == 0 else None]
    if world > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(found, group=slow_group[0])
    return found[0]


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
