"""Pictures of one text cut by two tokenizers: in the terminal, as PNG and as HTML.

Both rows show the same text at the same columns, so that a boundary of one side can be compared
with the other's by eye. A token with the same first and last byte on both sides is `same`.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.text import Text

from dwakd_plugin.errors import UserError
from dwakd_plugin.tokenizers.pair import Cut, PairCut

SIDES = ("teacher", "student")
_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
# Same, same, differing, differing: neighbours take turns.
_TERMINAL_STYLES = ("black on green", "black on bright_green", "black on yellow", "black on white")
_COLOURS = ("#a8d8a0", "#c6e8bf", "#f3c98b", "#f8dfb6")


class Column(NamedTuple):
    """A character as it is drawn: what stands for it, its width in cells, its bytes in the text."""

    glyph: str
    width: int
    begin: int
    end: int


class Box(NamedTuple):
    """A token, or its part on one line, as drawn: left edge and width in cells, and its colour."""

    left: float
    width: float
    colour: int
    token: int


def columns_of(text: str) -> list[Column]:
    """One column a character; what has no width of its own (accents, joiners) goes with the one
    before, and what cannot be drawn is a replacement character."""
    columns: list[Column] = []
    end = 0
    for character in text:
        begin, end = end, end + len(character.encode())
        category = unicodedata.category(character)
        glyph = _VISIBLE.get(character, character)
        if category[0] in "CZ" and glyph == character and category != "Cf":
            glyph = "\N{REPLACEMENT CHARACTER}"
        if columns and (category[0] == "M" or category == "Cf" or cell_len(glyph) == 0):
            last = columns[-1]
            joined = last.glyph + ("" if category == "Cf" else glyph)
            columns[-1] = Column(joined, max(last.width, cell_len(joined)), last.begin, end)
        else:
            glyph = glyph if cell_len(glyph) else "\N{REPLACEMENT CHARACTER}"
            columns.append(Column(glyph, cell_len(glyph), begin, end))
    return columns


def token_colours(cut: Cut, other: Cut) -> list[int]:
    """For each token 0 or 1 if it is the same on the other side, else 2 or 3; neighbours differ."""
    theirs = set(pairwise([0, *other.ends]))
    return [
        index % 2 + (0 if span in theirs else 2)
        for index, span in enumerate(pairwise([0, *cut.ends]))
    ]


# --- Terminal ---------------------------------------------------------------------------------


def terminal_rows(pair: PairCut, width: int) -> Iterator[Text]:
    """The rows of both sides, line by line: `│` ends a token, `┆` ends one within a character.

    width: cells of the terminal.
    """
    cuts = (pair.teacher, pair.student)
    colours = [token_colours(cuts[0], cuts[1]), token_colours(cuts[1], cuts[0])]
    token = [0, 0]
    label = max(map(len, SIDES)) + 2
    rows = [Text(), Text()]
    used = 0

    def lines() -> Iterator[Text]:
        for name, row in zip(SIDES, rows, strict=True):
            yield Text(name.ljust(label), style="bold") + row
        yield Text()

    def style(side: int) -> str:
        return _TERMINAL_STYLES[colours[side][min(token[side], len(colours[side]) - 1)]]

    def pass_ends(side: int, until: int) -> int:
        """Counts, and passes, the tokens that end at `until` or before."""
        passed = 0
        while token[side] < len(cuts[side].ends) and cuts[side].ends[token[side]] <= until:
            token[side] += 1
            passed += 1
        return passed

    blank = [pass_ends(side, 0) for side in (0, 1)]  # the space before a text, holding no byte
    for side in (0, 1):
        rows[side].append(("│" * blank[side]).rjust(max(blank)))
    used = max(blank)
    for column in columns_of(pair.text):
        inner = [sum(column.begin < end < column.end for end in cut.ends) for cut in cuts]
        last = [column.end in cut.ends for cut in cuts]
        size = column.width + max(inner) + max(last)
        if used and label + used + size > width:
            yield from lines()
            rows, used = [Text(), Text()], 0
        for side in (0, 1):
            rows[side].append(column.glyph, style(side))
            rows[side].append(("┆" * inner[side]).ljust(max(inner)), style(side))
            pass_ends(side, column.end - 1)
            if max(last):
                rows[side].append("│" if last[side] else " ", "" if last[side] else style(side))
            pass_ends(side, column.end)
        used += size
    yield from lines()


# --- PNG and HTML -----------------------------------------------------------------------------


def layout(pair: PairCut, width: int) -> list[tuple[list[tuple[float, Column]], list[list[Box]]]]:
    """For each line of at most `width` cells: its columns with their left edges, and each side's
    boxes. A boundary within a character lies within its column, in proportion to the bytes."""
    lines: list[list[tuple[float, Column]]] = [[]]
    left = 0
    for column in columns_of(pair.text):
        if left + column.width > width and lines[-1]:
            lines.append([])
            left = 0
        lines[-1].append((left, column))
        left += column.width
    cuts = (pair.teacher, pair.student)
    colours = [token_colours(cuts[0], cuts[1]), token_colours(cuts[1], cuts[0])]
    laid = []
    for line in lines:
        boxes: list[list[Box]] = [[], []]
        for side, cut in enumerate(cuts):
            for token, (begin, end) in enumerate(pairwise([0, *cut.ends])):
                parts = [
                    (
                        left + column.width * (max(begin, column.begin) - column.begin) / size,
                        left + column.width * (min(end, column.end) - column.begin) / size,
                    )
                    for left, column in line
                    if (size := column.end - column.begin)
                    and begin < column.end
                    and column.begin < end
                ]
                if parts:
                    box = Box(parts[0][0], parts[-1][1] - parts[0][0], colours[side][token], token)
                    boxes[side].append(box)
        laid.append((line, boxes))
    return laid


def png_image(pair: PairCut, names: Sequence[str]) -> bytes:
    """Draws one text; a glyph that the font lacks is drawn as □.

    Raises UserError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("--png draws with matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot
    from matplotlib.patches import Patch, Rectangle

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    width = 96
    lines = layout(pair, width)
    figure, axes = pyplot.subplots(figsize=(14, 0.9 + 0.85 * len(lines)), layout="constrained")
    for number, (line, boxes) in enumerate(lines):
        for side in (0, 1):
            bottom = -3 * number - 1.15 * side
            for box in boxes[side]:
                axes.add_patch(
                    Rectangle(
                        (box.left, bottom),
                        box.width,
                        1,
                        facecolor=_COLOURS[box.colour],
                        edgecolor="#404040",
                        linewidth=0.7,
                    )
                )
            for left, column in line:
                known = all(font.get_char_index(ord(each)) for each in column.glyph)
                axes.text(
                    left + column.width / 2,
                    bottom + 0.47,
                    # A dollar would begin a formula.
                    (column.glyph if known else "□").replace("$", r"\$"),
                    family="DejaVu Sans Mono",
                    size=11,
                    ha="center",
                    va="center",
                )
            axes.text(-0.7, bottom + 0.47, SIDES[side], size=9, ha="right", va="center")
    axes.set_xlim(-8, width)
    axes.set_ylim(-3 * len(lines) + 1.2, 1.3)
    axes.axis("off")
    title = "   ".join(f"{side}: {name}" for side, name in zip(SIDES, names, strict=True))
    axes.set_title(title.replace("$", r"\$"), size=10, loc="left")
    axes.legend(
        handles=[
            Patch(facecolor=_COLOURS[0], edgecolor="#404040", label="same token on both sides"),
            Patch(facecolor=_COLOURS[2], edgecolor="#404040", label="other boundaries"),
        ],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    return image.getvalue()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       background: #fff; color: #222; overflow-wrap: break-word }
table { border-collapse: collapse } td, th { padding: .1rem .8rem .1rem 0; text-align: left }
.text { font: 14px/1.6 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
        overflow-x: auto; margin-bottom: 2rem }
.row { position: relative; height: 1.7em; white-space: pre; padding-left: 9ch }
.row b { position: absolute; left: 0; font-weight: normal; color: #777 }
.row span { position: absolute; margin-left: 9ch; box-sizing: border-box; height: 1.6em;
            color: #111; text-align: center }
.row span.token { border: 1px solid #555; border-radius: 2px }
.row span.glyph { pointer-events: none }
.line { margin-bottom: .8em }
.problem { color: #b00020 } .warning { color: #8a5a00 }
@media (prefers-color-scheme: dark) { body { background: #1c1c1c; color: #ddd }
  .problem { color: #ff8a80 } .warning { color: #ffcc80 } }
"""


def html_page(
    report: Mapping[str, Any],
    rows: Iterable[tuple[str, str]],
    pictures: Sequence[tuple[str, PairCut]],
    tokenizers: Sequence[Any],
) -> str:
    """A page that needs no other file: verdict, figures, findings, and the texts' pictures.

    report: what `--json` prints; rows: figures as they are named to people; pictures: title and
    text, cut by both; tokenizers: teacher's and student's, for the tokens' names.
    """
    e = html.escape
    parts = [
        f"<h1>Tokenizer pair: {e(report['verdict'])}</h1>",
        f"<p>teacher <b>{e(report['teacher'])}</b>, student <b>{e(report['student'])}</b></p>",
        "".join(f"<p>{e(reason)}</p>" for reason in report["verdict_reasons"]),
        "<table>",
        *(f"<tr><td>{e(name)}</td><td>{e(value)}</td></tr>" for name, value in rows),
        "</table><h2>Findings</h2><ul>",
        *(
            f'<li><b class="{e(each["severity"])}">{e(each["severity"])}</b> '
            f"{e(each['message'])} <code>{e(each['code'])}</code></li>"
            for each in report["findings"]
        ),
        "</ul><h2>Texts</h2><p>Green: the same token on both sides. Orange: other boundaries. "
        "Point at a token for its name, id and bytes.</p>",
    ]
    for title, pair in pictures:
        parts.append(f'<h3>{e(title)}</h3><div class="text">')
        for line, boxes in layout(pair, 110):
            parts.append('<div class="line">')
            for side, cut in enumerate((pair.teacher, pair.student)):
                parts.append(f'<div class="row"><b>{SIDES[side]}</b>')
                for box in boxes[side]:
                    token = cut.ids[box.token]
                    name = tokenizers[side].convert_ids_to_tokens(token)
                    begin = cut.ends[box.token - 1] if box.token else 0
                    hint = f"{name!r}, id {token}, bytes {begin} to {cut.ends[box.token]}"
                    parts.append(
                        f'<span class="token" title="{e(hint)}" style="left:{box.left:.6g}ch;'
                        f'width:{box.width:.6g}ch;background:{_COLOURS[box.colour]}"></span>'
                    )
                parts += [
                    f'<span class="glyph" style="left:{left}ch;width:{column.width}ch">'
                    f"{e(column.glyph)}</span>"
                    for left, column in line
                ]
                parts.append("</div>")
            parts.append("</div>")
        parts.append("</div>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>dwakd check</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body>"
        "</html>\n"
    )
