"""Pieces of HTML. Text is escaped here; what is HTML already is an Html."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

CSS = Path(__file__).with_name("page.css")


class Html(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its heading and its HTML."""

    name: str  # of its anchor
    title: str
    body: str


def text(value: Any) -> str:
    """Text as HTML shows it."""
    return value if isinstance(value, Html) else escape(str(value))


def paragraph(value: Any, kind: str = "") -> str:
    """A paragraph of text."""
    style = f' class="{kind}"' if kind else ""
    return f"<p{style}>{text(value)}</p>"


def missing(what: str, remedy: str = "") -> str:
    """What the run folder lacks, and what would bring it."""
    return paragraph(f"Not in this run: {what} {remedy}".strip(), "missing")


def picture(uri: str, description: str, kind: str = "plot") -> str:
    """An image inside the page."""
    words = escape(description)
    image = f'<img class="{kind}" src="{uri}" alt="{words}">'
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    numbers: Sequence[int] = (),
    kind: str = "",
) -> str:
    """numbers: the columns that are set to the right. kind: facts for few columns, whose lines
    break; others are scrolled sideways, and their edge shows that there is more."""

    def line(cells: Sequence[Any], tag: str) -> str:
        parts = []
        for column, cell in enumerate(cells):
            style = ' class="number"' if column in numbers else ""
            parts.append(f"<{tag}{style}>{text(cell)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    style = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{style}>{head}<tbody>{body}</tbody></table></div>'


def bar(share: float) -> Html:
    """A bar of a table's cell, share of its full length."""
    width = round(100 * min(max(share, 0.0), 1.0), 1)
    return Html(f'<div class="bars"><span class="bar" style="width:{width}%"></span></div>')


def document(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page, which needs nothing but itself."""
    links = "".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in sections)
    parts = "".join(
        f'<section id="{s.name}"><h2>{escape(s.title)}</h2>{s.body}</section>\n' for s in sections
    )
    told = "".join(paragraph(note, "note") for note in notes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS.read_text(encoding='utf-8')}</style>\n"
        f"</head>\n<body>\n<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n{told}\n{parts}"
        "</body>\n</html>\n"
    )
