"""A page made of headings, paragraphs, lists, tables and pictures, written as one HTML file and as Markdown."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

# Cells that end in these words are in colour, in HTML.
GOOD, BAD = frozenset({"met"}), frozenset({"MISSED", "WRONG", "error"})

STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --muted: #5f6368; --line: #dcdfe3; --shade: #f5f6f8; --link: #0a5aa5; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0 0 1rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); font-size: 1.35rem; }
h3 { margin: 2rem 0 .6rem; font-size: 1.1rem; }
p, li { max-width: 56rem; }
a { color: var(--link); }
nav ul { columns: 17rem; padding: 0; margin: 0 0 1.5rem; list-style: none; }
nav .l3 { padding-left: 1.2rem; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { max-width: 100%; height: auto; }
figcaption { max-width: 56rem; color: var(--muted); font-size: .9rem; }
.table { overflow: auto; max-height: 40rem; margin: .8rem 0 1.4rem; border: 1px solid var(--line); border-radius: 6px;
  width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .7rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--shade); box-shadow: inset 0 -1px var(--line); }
.text { text-align: left; }
td.text { white-space: normal; min-width: 4rem; max-width: 52rem; }
tbody tr:nth-child(even) { background: #fafbfc; }
td.good { color: #00694c; font-weight: 600; }
td.bad { color: #a8380b; font-weight: 700; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; }
@page { size: landscape; margin: 10mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .table { overflow: visible; width: auto; max-width: none; max-height: none; border: 0; }
  table { width: 100%; font-size: 6pt; }
  th, td { white-space: normal; padding: 1pt 2pt; }
  th { position: static; }
  tr, figure { break-inside: avoid; }
  h2, h3, h2 + p, h3 + p, summary { break-after: avoid; }
  details::details-content { display: block; height: auto; content-visibility: visible; }
}
"""
# Nothing is loaded and nothing runs: pictures and style are in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2  # 2 or 3; the title is 1


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """The first `text_columns` columns are text, the others numbers; a `title` folds it away in HTML."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    title: str | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG: inside the HTML, and under `file` beside the Markdown."""

    file: str
    png: bytes
    alt: str
    caption: str = ""


Block = Heading | Text | Items | Table | Picture


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs no other file. Everything that is text is escaped."""
    links = "".join(
        f'<li class="l{block.level}"><a href="#s{i}">{html.escape(block.text)}</a></li>'
        for i, block in enumerate(blocks)
        if isinstance(block, Heading)
    )
    body = "\n".join(_html(block, f"s{i}") for i, block in enumerate(blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<nav><ul>{links}</ul></nav>\n{body}\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same with pictures as files."""
    return "\n\n".join([f"# {_plain(title)}", *map(_markdown, blocks)]) + "\n"


def pictures(blocks: Sequence[Block]) -> list[Picture]:
    return [block for block in blocks if isinstance(block, Picture)]


def _html(block: Block, anchor: str) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{anchor}">{html.escape(block.text)}</h{block.level}>'
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in block.lines) + "</ul>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.png).decode("ascii")
        caption = f"<figcaption>{html.escape(block.caption)}</figcaption>" if block.caption else ""
        return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(block.alt)}">{caption}</figure>'
    return _html_table(block)


def _html_table(block: Table) -> str:
    names = "".join(_html_cell("th", text, i < block.text_columns) for i, text in enumerate(block.columns))
    head = f"<thead><tr>{names}</tr></thead>" if any(block.columns) else ""
    rows = "".join(
        "<tr>" + "".join(_html_cell("td", text, i < block.text_columns) for i, text in enumerate(row)) + "</tr>\n"
        for row in block.rows
    )
    table = f'<div class="table"><table>{head}<tbody>\n{rows}</tbody></table></div>'
    if block.title is None:
        return table
    return f"<details><summary>{html.escape(block.title)}</summary>{table}</details>"


def _html_cell(tag: str, text: str, is_text: bool) -> str:
    last = text.split()[-1:]
    marks = {"text": is_text, "good": not GOOD.isdisjoint(last), "bad": not BAD.isdisjoint(last)}
    names = [name for name, wanted in marks.items() if wanted]
    attribute = f' class="{" ".join(names)}"' if names else ""
    return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + _plain(block.text)
    if isinstance(block, Text):
        return _plain(block.text)
    if isinstance(block, Items):
        return "\n".join(f"* {_plain(line)}" for line in block.lines)
    if isinstance(block, Picture):
        return f"![{_plain(block.alt)}]({block.file})" + (f"\n\n{_plain(block.caption)}" if block.caption else "")
    marks = ["---" if i < block.text_columns else "---:" for i in range(len(block.columns))]
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in (block.columns, *block.rows)]
    lines.insert(1, "| " + " | ".join(marks) + " |")
    return (f"{_plain(block.title)}:\n\n" if block.title else "") + "\n".join(lines)


def _plain(text: str) -> str:
    """On one line, with what Markdown would read as a table's edge, emphasis or a tag escaped."""
    text = " ".join(text.split())
    for character in "\\|*_<`[":
        text = text.replace(character, "\\" + character)
    return text
