"""Commands in poor surroundings: terminals without UTF-8, full disks, closed pipes. A sentence, never a traceback."""

import os
import pathlib
import subprocess
import sys

import pytest

from atom_jax import terminal
from atom_jax.typing import AtomError

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = {
    "info": ["-m", "atom_jax", "info", "tests/golden/hf_tiny/llama"],
    "help": ["-m", "atom_jax", "--help"],
    "train": ["train.py", "--helpfull"],
    "eval": ["eval.py", "--helpfull"],
}


def start(args, **options):
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_and_a_closed_pipe(name):
    with open("/dev/full", "w") as full:
        process = start(COMMANDS[name], stdout=full)
    read, write = os.pipe()
    os.close(read)
    other = start(COMMANDS[name], stdout=write)
    os.close(write)
    for one, expected in ((process, "No space left on device"), (other, "")):
        error = one.communicate(timeout=120)[1]
        assert one.returncode == 1 and "Traceback" not in error and "Exception ignored" not in error
        assert expected in error


def test_a_terminal_without_utf8():
    env = {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
    process = start(["-m", "atom_jax", "info", "nowhere-ä漢"], stdout=subprocess.PIPE, env=env)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1 and not out
    assert error == "error: nowhere-\\xe4\\u6f22: no such file or directory\n"


@pytest.mark.parametrize(
    "error, code, said",
    [
        (AtomError("bad input"), 1, "x: bad input"),
        (OSError(28, "No space left on device", "a.txt"), 1, "x: a.txt: No space left on device"),
        (MemoryError(), 1, "x: there is not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte"), 1, "not enough memory on the device"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 3, ""),
        (SystemExit("words"), 1, "x: words"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_command(capsys, error, code, said):
    def command():
        raise error

    assert terminal.run("x", command) == code
    assert said in capsys.readouterr().err


def test_faults_of_the_program_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        terminal.run("x", lambda: 1 / 0)
    assert terminal.run("x", lambda: None) == 0 and terminal.run("x", lambda: 7) == 7
