"""The command that has shells complete the others."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable

from atom_jax.commands.flags import Done, Flags
from atom_jax.typing import AtomError

Command = Callable[[list[str]], int | None]


def completion(commands: dict[str, Command], argv: list[str]) -> None:
    """Prints what makes a shell complete `commands`, their flags, and files. argv: the command and its arguments.
    Raises AtomError for bad input."""
    known = Flags(
        "completion SHELL",
        "Prints what makes a shell complete commands, flags and files: bash, zsh, fish, tcsh or powershell."
        ' In bash: eval "$(atom-jax completion bash)"; that takes seconds, so .bashrc should have a file of it.',
    )
    _, (shell,) = known.parse(argv, 1)

    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise AtomError(f"completion: no shell {shell!r}; known: {', '.join(shtab.SUPPORTED_SHELLS)}")
    print(shtab.complete(_parser(commands, shtab.FILE), shell))


def _parser(commands: dict[str, Command], files: dict[str, str]) -> argparse.ArgumentParser:
    """The commands as shtab reads them. files: its name for completing files."""
    whole = argparse.ArgumentParser("atom-jax")
    whole.add_argument("--version", action="store_true", help="print the version")
    parsers = whole.add_subparsers()
    for name, command in commands.items():
        known = _flags(name, command)
        one = parsers.add_parser(name, help=known.purpose)
        for flag in (known.values[flag] for flag in known.values):
            if flag.boolean:
                one.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
                continue
            value = one.add_argument(f"--{flag.name}", help=flag.help)
            if flag.flag_type().endswith("string"):
                value.complete = files
        # In bash what follows "=" is a word of its own, so that every command takes files.
        one.add_argument("files", nargs="*").complete = files
    return whole


def _flags(name: str, command: Command) -> Flags:
    """The flags of a command, which its help explains."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            command([name, "--help"])
    except Done as done:
        return done.known
    raise AssertionError(f"{name} has no help")
