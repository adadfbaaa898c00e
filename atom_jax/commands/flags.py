"""What the commands of `python -m atom_jax` share: flags of their own, and texts from files."""

from __future__ import annotations

import codecs
import contextlib
import functools
import os
import pathlib
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags
from tqdm import tqdm

from atom_jax.files import check_output, read_regular
from atom_jax.typing import AtomError


class Flags:
    """The flags of one command. purpose: what the command does. values: all flags, before `parse` with defaults."""

    def __init__(self, usage: str, purpose: str):
        self.purpose, self.values = purpose, flags.FlagValues()
        self._usage, self._lines, self._beside, self._empty, self._alone = usage, {}, {}, set(), {}

    def add(
        self, define: Callable[..., Any], name: str, default: Any, text: str, beside: str = "", empty: bool = False
    ) -> None:  # fmt: skip
        """Defines a flag with one of absl's DEFINE functions. beside: the flag without which it is refused. empty:
        whether an empty text is a value of it, and not a mistake such as a variable that is not set."""
        if beside:
            text, self._beside[name] = f"with --{beside}: {text}", beside
        if empty:
            self._empty.add(name)
        define(name, default, text, flag_values=self.values)
        said = default is not None and default is not False and default not in ("", [])
        self._lines[name] = f"{text} (default {default})" if said else text

    def alone(self, name: str, *others: str) -> None:
        """Has all flags refused beside this one but these, where it was given and is not false."""
        self._alone[name] = {name, *others}

    def parse(self, argv: list[str], positional: int | None, *needed: str) -> tuple[flags.FlagValues, list[str]]:
        """Returns the flags, of which those `needed` were given, and the arguments left over, of which there must be
        `positional` (None: any number). Raises AtomError for another number, for a flag that is needed and missing,
        for an empty one, and for one that has no meaning without one that is missing, or beside one that is there."""
        if any(a in ("--help", "-h", "-help", "--helpfull", "--helpshort") for a in argv):
            print(self._help())
            raise Done(self)
        rest = self.values(argv)[1:]
        if positional is not None and len(rest) != positional:
            given = " ".join(rest) or "nothing"
            raise AtomError(f"usage: {self._usage}; besides flags, {given} was given")
        given = [name for name in self._lines if self.values[name].present]
        for name in given:
            self._check_value(name)
            other = self._beside.get(name)
            if other and not (other in given and _is_said(self.values[other].value)):
                raise AtomError(f"--{name} has no meaning without --{other}")
        for name in (name for name in given if name in self._alone and _is_said(self.values[name].value)):
            if beside := [other for other in given if other not in self._alone[name]]:
                raise AtomError(f"--{beside[0]} has no meaning beside --{name}")
        for name in needed:
            if not self.values[name].value:
                raise AtomError(f"--{name} is missing")
        return self.values, rest

    def _check_value(self, name: str) -> None:
        """Raises AtomError for an empty text."""
        flag = self.values[name]
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        if name not in self._empty and (not values or "" in values):
            said = (
                "has an empty value among others" if len(values) > 1 else "is empty; leave it out, or give it a value"
            )
            raise AtomError(f"--{name} {said}")

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


def _is_said(value: Any) -> bool:
    """Whether a flag says something: 0 is a value."""
    return value is not None and value is not False and value not in ([], "")


@contextlib.contextmanager
def named(argv: list[str]) -> Iterator[None]:
    """Has an AtomError that begins with the name of a setting ("tokens: expected ...") begin with that of the flag
    ("--tokens: expected ..."), where one of that name, and no file, is among the arguments."""
    try:
        yield
    except AtomError as e:
        typed = {arg.lstrip("-").partition("=")[0] for arg in argv if arg.startswith("-")}
        word = re.match(r"[a-z]\w*(?=[:= ])", str(e))
        if word is None or word[0] not in typed or word[0] in argv:
            raise
        raise AtomError(f"--{e}") from None


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


def check_writable(
    flag: str, path: str | None, parents: bool = False, read: Callable[[pathlib.Path], Any] | None = None
) -> None:  # fmt: skip
    """Raises AtomError where a flag names a file (None: it names none) that cannot be written (see `check_output`),
    and where one is there that is not of the kind that is to be written: `read` raises AtomError for it."""
    if path is None:
        return
    try:
        check_output(path, parents)
    except OSError as e:
        raise AtomError(f"{flag}={path}: cannot be written ({e.strerror})") from None
    if read is not None and os.path.exists(path):
        try:
            read(pathlib.Path(path))
        except AtomError:
            raise AtomError(f"{flag}={path}: there is a file of another kind; name another one") from None
