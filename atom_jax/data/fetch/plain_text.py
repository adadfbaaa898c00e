"""Plain text that was wrapped and indented for a terminal, as running text."""

from __future__ import annotations

import re

_BOX = re.compile(r"^[|+]|[─-╿]|\S {3,}\S")  # the lines of a table, or columns
_ITEM = re.compile(r"([•*-]|\d+\.|[A-Za-z]:) ")
_CAPTION = re.compile(r"Table of Contents|List of Tables|Table \d+\.\d+\. .{,100}")
_SECTION = re.compile(r"\s*[\dA-Z]+(\.\d+)*\. ")
_LIST = 10  # so many headings one after another are a table of contents


def reflow(text: str) -> str:
    """Returns the text with every wrapped paragraph on one line and an empty line between paragraphs.

    Left out are tables drawn with characters, captions, rulers and tables of contents. Paragraphs that are not
    wrapped, such as verse and programs, keep their lines and their indentation relative to the first of them.
    """
    text = text.replace("\t", " " * 8).replace("\xa0", " ")
    found = ([x.rstrip() for x in block.split("\n") if x.strip()] for block in re.split(r"\n *(?=\n)", text))
    blocks = [paragraph for lines in found if (paragraph := _paragraph(lines))]
    parts: list[str] = []
    headings: list[str] = []
    for block in [*blocks, ""]:
        if block and _is_heading(block):
            headings.append(block)
            continue
        # The last one may head what follows.
        parts += headings if len(headings) < _LIST else headings[-1:]
        parts.append(block)
        headings = []
    return "\n\n".join(parts).strip("\n") + "\n" if blocks else ""


def _is_heading(block: str) -> bool:
    return "\n" not in block and len(block) < 60 and block[0] not in ":•*-"


def _paragraph(lines: list[str]) -> str:
    """Returns a block of lines as a paragraph; nothing where it is a table or a ruler."""
    if not lines or sum(bool(_BOX.search(line.strip())) for line in lines) * 2 > len(lines) > 1:
        return ""
    if not re.search(r"\w", "".join(lines)) or (len(lines) == 1 and _CAPTION.fullmatch(lines[0].strip())):
        return ""
    if len(lines) >= _LIST and sum(_SECTION.match(line) is not None for line in lines) * 2 > len(lines):
        return ""
    indents = [len(line) - len(line.lstrip()) for line in lines]
    hanging = _ITEM.match(lines[0].lstrip()) is not None
    commands = any(line.lstrip().startswith(("$ ", "# ")) for line in lines)
    wrapped = len(set(indents[1:])) <= 1 and (len(lines) == 1 or hanging or indents[0] == indents[1])
    if wrapped and not commands and all(len(line) > 50 for line in lines[:-1]):
        return re.sub(r"\s+", " ", " ".join(lines)).strip()
    return "\n".join(line[min(indents) :] for line in lines)
