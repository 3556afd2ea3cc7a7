"""Make `.venv`, install this project into it and carry on inside it.

Standard library only, and readable by any Python 3.7 or later, so that an old one gets a clear
message. `pip` is run with whatever configuration the user has: index, proxy and cache are theirs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "sdprep-setup.json"
OLDEST_PYTHON = (3, 11)
QUIET_SECONDS = 10  # in a log, a sign of life at least this often


def enter(script: str, extras: Sequence[str] = ("test",)) -> None:
    """Return inside an environment that has everything, made now where it is missing.

    Args:
        script: `__file__` of the caller, run again inside `.venv` with the same arguments.
        extras: optional parts of the project to install.
    Raises:
        SystemExit: 2 where the user must act first; else the exit status of the script's rerun.
    """
    _require_python()
    installed = _installed_extras()
    if installed is None or not set(extras) <= set(installed):
        wanted = sorted({*extras, *(installed or [])})
        _make_venv()
        _install(wanted)
        _write_stamp(wanted)
    if Path(sys.prefix).resolve() != VENV.resolve():
        command = [str(venv_python()), str(Path(script).resolve()), *sys.argv[1:]]
        try:  # not exec: on Windows it would return to the shell at once
            sys.exit(subprocess.call(command, env=_environment()))
        except KeyboardInterrupt:
            sys.exit(130)
    advice = cuda_advice()
    if advice:
        print(advice, file=sys.stderr, flush=True)


def venv_python() -> Path:
    """The interpreter inside `.venv`."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _require_python() -> None:
    if sys.version_info < OLDEST_PYTHON:  # noqa: UP036  this file is what tells them
        wanted = ".".join(map(str, OLDEST_PYTHON))
        found = ".".join(map(str, sys.version_info[:3]))
        _stop(
            f"Python {wanted} or later is needed; this is {found} ({sys.executable}).",
            "Install a newer one from python.org or your package manager, and run this with it,\n"
            "such as: python3.12 " + " ".join(sys.argv),
        )


# --- is there anything to do? --------------------------------------------------------------------


def _digest() -> str:
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    parts.append(str(ROOT).encode())  # an editable install points at this folder
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _installed_extras() -> list[str] | None:
    """Extras that the last set-up installed; None if something has changed since, or none ran."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if (stamp.get("digest"), stamp.get("python")) != (_digest(), _version_of_venv()):
        return None
    return stamp.get("extras")


def _write_stamp(extras: Sequence[str]) -> None:
    stamp = {"digest": _digest(), "python": _version_of_venv(), "extras": extras}
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    os.replace(partial, STAMP)


def _version_of_venv() -> str:
    """Version of the interpreter in `.venv`; empty if there is none that starts."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        return ".".join(map(str, sys.version_info[:3]))
    command = [str(venv_python()), "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, env=_environment())
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


# --- make it -------------------------------------------------------------------------------------


def _make_venv() -> None:
    version = _version_of_venv()
    if version and tuple(map(int, version.split("."))) >= OLDEST_PYTHON and _has_pip():
        return
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        release = ".".join(map(str, sys.version_info[:2]))
        _stop(
            f"This Python ({sys.executable}) comes without the modules venv and ensurepip.",
            f"On Debian and Ubuntu: sudo apt install python{release}-venv",
        )
    remade = " again: the one that is there does not work" if VENV.exists() else ""
    print(f"[1/2] making {VENV}{remade}", flush=True)
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        _stop(f"{VENV} could not be made.", (done.stdout + done.stderr).strip())


def _has_pip() -> bool:
    command = [str(venv_python()), "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True, env=_environment()).returncode == 0


def _install(extras: Sequence[str]) -> None:
    """Install the project, editable, with one line of progress; all of pip's words if it fails."""
    target = ".[" + ",".join(extras) + "]" if extras else "."
    print(f"[2/2] installing {target} with constraints.txt (1 to 2 GB at first)", flush=True)
    command = [str(venv_python()), "-m", "pip", "install", "--progress-bar", "off"]
    command += ["-c", "constraints.txt", "-e", target]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,  # so that no path of the user's, spaces and all, goes through pip's parser
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        said = _show_progress(process, start)
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        print("\nstopped; run it again to go on", file=sys.stderr)
        sys.exit(130)
    if status:
        _stop(
            "pip could not install the project. It said:\n\n" + "".join(said[-40:]).rstrip() + "\n",
            "Most often the package index cannot be reached (see: pip config list), or the disk\n"
            "is full. Then run this again; it goes on where it stopped.",
        )
    print(f"      installed in {_elapsed(start)}", flush=True)


def _show_progress(process: subprocess.Popen[str], start: float) -> list[str]:
    """Follow pip: one changing line on a terminal, a line now and then in a log."""
    is_terminal = sys.stdout.isatty()
    said: list[str] = []
    now, shown_at = "starting pip", -float(QUIET_SECONDS)
    for line in _lines(process):
        if line is not None:
            said.append(line)
            now = _doing(line) or now
        if is_terminal:
            width = shutil.get_terminal_size().columns
            text = f"      {_elapsed(start)}  {now}"
            print("\r" + text[: width - 1].ljust(width - 1), end="", flush=True)
        elif time.monotonic() - start - shown_at >= QUIET_SECONDS:
            shown_at = time.monotonic() - start
            print(f"      {_elapsed(start)}  {now}", flush=True)
    if is_terminal:
        print(flush=True)
    return said


def _lines(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """What the process prints, and None for each second in which it prints nothing."""
    lines: queue.Queue[str | None] = queue.Queue()
    output = process.stdout
    assert output is not None

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _doing(line: str) -> str:
    """What pip is at, in few words; empty for lines that say nothing new."""
    words = line.split()
    if not words:
        return ""
    if words[0] in ("Collecting", "Downloading", "Processing", "Building", "Preparing"):
        return re.sub(r"\S*/", "", " ".join(words))  # the file, without where it comes from
    if words[:3] == ["Installing", "collected", "packages:"]:
        return f"unpacking {len(words) - 3} packages"
    return ""


def _elapsed(start: float) -> str:
    seconds = int(time.monotonic() - start)
    return f"{seconds // 60}:{seconds % 60:02d}"


def _environment() -> dict[str, str]:
    """The user's environment, without what would make another Python or another place of it."""
    dropped = ("PYTHONHOME", "__PYVENV_LAUNCHER__", "PIP_TARGET", "PIP_PREFIX")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


# --- GPU -----------------------------------------------------------------------------------------


def cuda_advice() -> str:
    """How to get CUDA, where there is an NVIDIA GPU that the installed torch cannot use."""
    gpu, driver_cuda = nvidia_gpu()
    version, is_cpu_build = _torch_build()
    if not gpu or not is_cpu_build:
        return ""
    tags = [tag for tag in ((13, 0), (12, 8), (12, 6)) if tag <= driver_cuda]
    if not tags:
        found = ".".join(map(str, driver_cuda)) if any(driver_cuda) else "unknown"
        how = f"Update the NVIDIA driver first: it offers CUDA {found}, and 12.6 is needed."
    else:
        python = f'"{venv_python()}"' if " " in str(venv_python()) else str(venv_python())
        build = "cu{}{}".format(*tags[0])
        how = (
            f"{python} -m pip install torch=={version}+{build} "
            f"--index-url https://download.pytorch.org/whl/{build}\n"
            "  (if that build is missing, pytorch.org/get-started/locally lists the others)"
        )
    return f"note: {gpu} is here, but torch {version} is the CPU build. To use it:\n  {how}"


def nvidia_gpu() -> tuple[str, tuple[int, int]]:
    """Name of the first NVIDIA GPU, empty if there is none, and the CUDA its driver offers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "", (0, 0)
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
        status = subprocess.run([program], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "", (0, 0)
    name = re.search(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listed.stdout, re.MULTILINE)
    if listed.returncode or name is None:
        return "", (0, 0)
    cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", status.stdout)
    return name[1], (int(cuda[1]), int(cuda[2])) if cuda else (0, 0)


def _torch_build() -> tuple[str, bool]:
    """Version of torch without its local part, and whether it is a build for the CPU only."""
    spec = importlib.util.find_spec("torch")  # finds it without importing it
    if spec is None or spec.origin is None:
        return "", False
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__ = '([^'+]+)", text)
    is_cpu_build = re.search(r"^(cuda|hip)\b[^=]*= '", text, re.MULTILINE) is None
    return version[1] if version else "", is_cpu_build


def _stop(message: str, hint: str) -> NoReturn:
    print(f"\n{message}\n{hint}", file=sys.stderr, flush=True)
    sys.exit(2)
