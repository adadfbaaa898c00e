"""What the commands of `python -m atom_jax` share: flags of their own, and texts from files."""

from __future__ import annotations

import codecs
import functools
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from absl import flags
from tqdm import tqdm

from atom_jax.files import check_output, read_regular
from atom_jax.typing import AtomError


class Flags:
    """The flags of one command. purpose: what the command does. values: all flags, before `parse` with defaults."""

    def __init__(self, usage: str, purpose: str):
        self.purpose, self.values = purpose, flags.FlagValues()
        self._usage, self._lines, self._beside = usage, {}, {}

    def add(self, define: Callable[..., Any], name: str, default: Any, text: str, beside: str = "") -> None:
        """Defines a flag with one of absl's DEFINE functions. beside: the flag without which it is refused."""
        if beside:
            text, self._beside[name] = f"with --{beside}: {text}", beside
        define(name, default, text, flag_values=self.values)
        said = default is not None and default is not False and default not in ("", [])
        self._lines[name] = f"{text} (default {default})" if said else text

    def parse(self, argv: list[str], positional: int | None, *needed: str) -> tuple[flags.FlagValues, list[str]]:
        """Returns the flags, of which those `needed` were given, and the arguments left over, of which there must be
        `positional` (None: any number). Raises AtomError for another number, for a flag that is needed and missing,
        and for one that has no meaning without another that is missing."""
        if any(a in ("--help", "-h", "-help", "--helpfull", "--helpshort") for a in argv):
            print(self._help())
            raise Done(self)
        rest = self.values(argv)[1:]
        if positional is not None and len(rest) != positional:
            given = " ".join(rest) or "nothing"
            raise AtomError(f"usage: {self._usage}; besides flags, {given} was given")
        for name, other in self._beside.items():
            if self.values[name].present and _is_missing(self.values[other].value):
                raise AtomError(f"--{name} has no meaning without --{other}")
        for name in needed:
            if not self.values[name].value:
                raise AtomError(f"--{name} is missing")
        return self.values, rest

    def _help(self) -> str:
        """What --help prints, as wide as the terminal."""
        width, names = min(shutil.get_terminal_size().columns, 118), max(map(len, self._lines), default=0)
        text = functools.partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
        lines = [text(f"python -m atom_jax {self._usage} [flags]"), "", text(self.purpose), ""]
        for name, meaning in self._lines.items():
            start = f"  --{name:<{names}}  "
            lines.append(text(meaning, initial_indent=start, subsequent_indent=" " * len(start)))
        return "\n".join(lines)


class Progress:
    """How far something has come, on stderr: a bar with the time left, where there is more than one part."""

    def __init__(self, what: str):
        self._what, self._bar = what, None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """So many tokens of all of them are done; what compiling the first part took is not in the time left."""
        if not 0 < done < total and self._bar is None:
            return
        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, desc=self._what, unit="token", mininterval=0.5)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.__exit__()
            self._bar = None


class Done(Exception):
    """The command has nothing left to do: its flags were explained."""

    def __init__(self, known: Flags):
        super().__init__()
        self.known = known


def _is_missing(value: Any) -> bool:
    """Whether a flag has the value of one that was not given: 0 is a value."""
    return value is None or value is False or value in ([], "")


def text_of(text: str | None, file: str | None) -> str | bytes:
    """What --text or --file says."""
    if (text is None) == (file is None):
        raise AtomError("--text or --file is missing" if text is None else "--text and --file were given: choose one")
    if text is not None:
        return text
    try:
        return read_regular(file).removeprefix(codecs.BOM_UTF8)
    except OSError as e:
        raise AtomError(f"--file={file}: {e.strerror}") from None


def document_of(file: str) -> str:
    """The text of --file. Raises AtomError where it cannot be read, or is not UTF-8."""
    return utf8(f"--file={file}", text_of(None, file))


def utf8(where: str, data: bytes) -> str:
    """Bytes as text. Raises AtomError, which begins with `where`, for what is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise AtomError(f"{where}: not valid UTF-8 at byte {e.start}") from None


def check_writable(flag: str, path: str | None, parents: bool = False) -> None:
    """Raises AtomError where a flag names a file (None: it names none) that cannot be written; see `check_output`."""
    try:
        if path is not None:
            check_output(path, parents)
    except OSError as e:
        raise AtomError(f"{flag}={path}: cannot be written ({e.strerror})") from None
