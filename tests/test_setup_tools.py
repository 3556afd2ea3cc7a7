"""Set-up tools: what they say on machines that lack something, and that check.py runs it all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


@pytest.fixture
def setup(tmp_path, monkeypatch) -> ModuleType:
    """The set-up module, at work in a project folder with a space in its path."""
    module = load("_setup")
    root = tmp_path / "my project"
    root.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "VENV", root / ".venv")
    monkeypatch.setattr(module, "STAMP", root / ".venv" / "sdprep-setup.json")
    return module


def test_an_old_python_is_told_what_to_do(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup.sys, "version_info", (3, 10, 4, "final", 0))
    with pytest.raises(SystemExit) as stop:
        setup.enter("check.py")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Python 3.11 or later is needed; this is 3.10.4" in said
    assert not setup.VENV.exists()


def test_a_python_without_ensurepip_is_told_what_to_do(setup, monkeypatch, capsys):
    def find_spec(name: str) -> object:
        return None if name == "ensurepip" else object()

    monkeypatch.setattr(setup.importlib.util, "find_spec", find_spec)
    with pytest.raises(SystemExit) as stop:
        setup.enter("check.py")
    assert stop.value.code == 2
    assert f"apt install python3.{sys.version_info[1]}-venv" in capsys.readouterr().err


@pytest.mark.slow
def test_failed_install_shows_what_pip_said_and_leaves_no_stamp(setup, capfd):
    # pip stumbles over this before it asks any index.
    (setup.ROOT / "constraints.txt").write_text("-c no-such-file.txt\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        setup.enter("check.py", extras=())
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert f"making {setup.VENV}" in out
    assert setup.venv_python().exists()
    assert "pip could not install" in err
    assert "no-such-file.txt" in err
    assert "run this again" in err
    assert not setup.STAMP.exists()


def test_a_stamp_holds_until_something_changes(setup, monkeypatch):
    monkeypatch.setattr(setup, "_version_of_venv", lambda: "3.11.7")
    setup.VENV.mkdir()
    assert setup._installed_extras() is None
    setup._write_stamp(["test"])
    assert setup._installed_extras() == ["test"]
    (setup.ROOT / "constraints.txt").write_text("torch==1\n", encoding="utf-8")
    assert setup._installed_extras() is None
    setup._write_stamp(["test"])
    monkeypatch.setattr(setup, "_version_of_venv", lambda: "3.12.1")
    assert setup._installed_extras() is None
    setup.STAMP.write_text("{", encoding="utf-8")
    assert setup._installed_extras() is None


def test_the_script_runs_again_inside_the_environment(setup, monkeypatch, tmp_path):
    script = tmp_path / "a script.py"
    script.write_text(
        "import json, sys\n"
        f"json.dump([sys.prefix, sys.argv[1:]], open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
        "sys.exit(7)\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", setup.VENV], check=True)
    setup._write_stamp(["test"])
    monkeypatch.setattr(sys, "argv", [str(script), "-k", "two words"])
    with pytest.raises(SystemExit) as stop:
        setup.enter(str(script))
    assert stop.value.code == 7
    prefix, arguments = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert Path(prefix).resolve() == setup.VENV.resolve()
    assert arguments == ["-k", "two words"]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("cuda", "build"), [("13.1", "cu130"), ("12.9", "cu128"), ("12.6", "cu126"), ("12.2", None)]
)
def test_cuda_advice_fits_the_driver(setup, monkeypatch, tmp_path, cuda, build):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = -L ]; then echo "GPU 0: NVIDIA RTX 4090 (UUID: GPU-1)"\n'
        f'else echo "| Driver Version: 1.2    CUDA Version: {cuda}     |"; fi\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.nvidia_gpu() == ("NVIDIA RTX 4090", tuple(map(int, cuda.split("."))))
    monkeypatch.setattr(setup, "_torch_build", lambda: ("2.13.0", True))
    advice = setup.cuda_advice()
    assert "NVIDIA RTX 4090" in advice
    if build:
        python = f'"{setup.venv_python()}"'  # its path has a space
        assert f"{python} -m pip install torch==2.13.0+{build}" in advice
    else:
        assert "Update the NVIDIA driver" in advice
    monkeypatch.setattr(setup, "_torch_build", lambda: ("2.13.0", False))
    assert setup.cuda_advice() == ""


def test_no_gpu_no_advice(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.cuda_advice() == ""


def test_torch_build_agrees_with_torch():
    import torch

    version, is_cpu_build = load("_setup")._torch_build()
    assert version == torch.__version__.split("+")[0]
    assert is_cpu_build == (torch.version.cuda is None and torch.version.hip is None)


def test_check_passes_on_output_and_keeps_the_last_line(capfdbinary):
    run = load("check").run
    code = "import sys; print('one'); print('zwei ä'); print(' '); sys.exit(3)"
    assert run([sys.executable, "-c", code]) == (3, "zwei ä")
    assert "one" in capfdbinary.readouterr().out.decode()
    assert run([sys.executable, "-c", ""]) == (0, "")


def test_check_runs_every_step_and_fails_if_one_did(monkeypatch, capsys):
    check = load("check")
    seen = []

    def run(command: list[str]) -> tuple[int, str]:
        seen.append(command[2:])
        return (1, "bad") if "mypy" in command else (0, f"last of {command[2]}")

    monkeypatch.setattr(check._setup, "enter", lambda script: None)
    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(sys, "argv", ["check.py", "-k", "tags"])
    assert check.main() == 1
    assert [command[0] for command in seen] == ["ruff", "ruff", "mypy", "pytest"]
    assert seen[-1][0] == "pytest"
    assert seen[-1][-2:] == ["-k", "tags"]
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "last of pytest"
    assert sum("passed" in line for line in lines) == 3
    assert sum("FAILED" in line for line in lines) == 1


@pytest.mark.skipif(os.name == "nt", reason="continuous integration runs it under bash")
def test_ci_says_so_when_there_is_no_python(tmp_path):
    bash = Path("/bin/bash")
    if not bash.exists():
        pytest.skip("there is no /bin/bash")
    for name in ("dirname",):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    old = tmp_path / "python3"
    old.write_text("#!/bin/bash\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    script = TOOLS.parent / ".ci" / "run"
    done = subprocess.run([bash, script], env={"PATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 2
    assert b"Python 3.11 or later is needed" in done.stderr
