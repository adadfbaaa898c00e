"""The text of an HTML page."""

from __future__ import annotations

import html.parser
import re

# What is no text, and what stands on every page.
_SKIPPED = {"head", "script", "style", "header", "footer", "nav", "aside"}
_BLOCKS = {
    "address",
    "blockquote",
    "br",
    "dd",
    "div",
    "dl",
    "dt",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "li",
    "ol",
}
_BLOCKS |= {"p", "pre", "section", "table", "td", "th", "tr", "ul"}


def page_text(page: str) -> str:
    """Returns the text of a page, a block (paragraph, heading, table cell) per line, without page headers, navigation
    and scripts. Blank runs are one space; nothing is left of a page without text."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(parser.parts).split("\f"))
    return "".join(line + "\n" for line in lines if line)


class _Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.inside: list[str] = []  # skipped elements that are open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _SKIPPED:
            self.inside.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\f")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        if tag in _BLOCKS:
            self.parts.append("\f")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            del self.inside[self.inside.index(tag) :]
        elif tag in _BLOCKS:
            self.parts.append("\f")

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.parts.append(data)
