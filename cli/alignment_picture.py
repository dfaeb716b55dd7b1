"""Pictures of how a sample's tokens align: as tables in the terminal, as PNG and as HTML.

    S, T  student and teacher tokens of the sample's response: those that are predicted (D1)

A sample is drawn in one or two states (before training, a checkpoint), with three matrices (S, T)
each: the cross-model attention A with the band around it, and the expected soft-DTW paths E of the
hidden states and of the embeddings.
"""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from dwakd_cli.token_picture import columns_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from dwakd_plugin.loss import Alignment

LONGEST_LABEL = 18
MATRICES = {
    "attention": "cross-model attention A",
    "hidden_path": "soft-DTW path, hidden states",
    "embed_path": "soft-DTW path, embeddings",
}


@dataclass(frozen=True)
class AlignedSample:
    """One sample's tokens as text, and its alignment (matrices (S, T), on the CPU) by state."""

    number: int
    source: str
    student_tokens: list[str]
    teacher_tokens: list[str]
    states: dict[str, Alignment]

    @property
    def title(self) -> str:
        return f"Sample {self.number} ({self.source})"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as they are drawn: the text they stand for, white space and control characters made
    visible, and bytes that aren't a whole character as `\\xe6`."""
    from dwakd_plugin.tokenizers.pair import is_byte_level, token_bytes

    byte_level = is_byte_level(tokenizer)
    texts = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        text = token_bytes(token, byte_level=byte_level).decode("utf-8", "backslashreplace")
        texts.append("".join(column.glyph for column in columns_of(text)))
    return texts


# --- Figures ----------------------------------------------------------------------------------


def state_figures(alignment: Alignment) -> dict[str, float | None]:
    """Means over the student tokens of one sample.

    attention_entropy (nats), band_share of all cells, and the share of the expected paths that lies
    within the band; the last two None without a band.
    """
    from dwakd_plugin.loss import attention_entropy

    inside = alignment.inside
    return {
        "attention_entropy": attention_entropy(alignment.attention).mean().item(),
        "band_share": None if inside is None else inside.float().mean().item(),
        "hidden_path_in_band": _share_within(alignment.hidden_path, inside),
        "embed_path_in_band": _share_within(alignment.embed_path, inside),
    }


def _share_within(path: Tensor, inside: Tensor | None) -> float | None:
    return None if inside is None else ((path * inside).sum() / path.sum()).item()


def token_summaries(sample: AlignedSample, alignment: Alignment, top: int) -> list[dict[str, Any]]:
    """For each student token: the `top` teacher tokens that it attends to most, with their shares,
    the band's first and last teacher position, and the likeliest cell of each path in its row.

    Positions count from 1.
    """

    def cells(row: Tensor, count: int) -> list[dict[str, Any]]:
        values, places = row.topk(min(count, len(row)))
        return [
            {"position": place + 1, "token": sample.teacher_tokens[place], "share": value}
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]

    summaries = []
    for index, token in enumerate(sample.student_tokens):
        band = None
        if alignment.inside is not None:
            within = alignment.inside[index].nonzero().flatten().tolist()
            band = [within[0] + 1, within[-1] + 1] if within else None
        summaries.append(
            {
                "position": index + 1,
                "token": token,
                "attention": cells(alignment.attention[index], top),
                "band": band,
                "hidden_path": cells(alignment.hidden_path[index], 1)[0],
                "embed_path": cells(alignment.embed_path[index], 1)[0],
            }
        )
    return summaries


def what_is_drawn(sample: AlignedSample, tokens: int) -> str:
    """Says how much of the sample the first `tokens` of both sides are."""
    sides = {"student": len(sample.student_tokens), "teacher": len(sample.teacher_tokens)}
    if max(sides.values()) <= tokens:
        return " and ".join(f"{count} {side}" for side, count in sides.items()) + " tokens"
    parts = [f"{min(count, tokens)} of {count} {side}" for side, count in sides.items()]
    return f"the first {' and '.join(parts)} tokens (--tokens draws more)"


# --- Terminal ---------------------------------------------------------------------------------


def terminal_table(sample: AlignedSample, tokens: int, width: int) -> Table:
    """What each of the first student tokens attends to, by state; paths where `width` allows."""
    alone = len(sample.states) == 1
    top = 3 if alone and width >= 60 else 1 if width < 60 else 2
    with_path = alone and width >= 60
    table = Table(title=Text(sample.title), box=box.SIMPLE_HEAD)
    table.add_column("student", overflow="fold")
    for state in sample.states:
        table.add_column("attends to" if alone else state, overflow="fold")
    if with_path:
        table.add_column("soft-DTW path", overflow="fold")
    columns = [
        token_summaries(sample, alignment, top)[:tokens] for alignment in sample.states.values()
    ]
    for row in zip(*columns, strict=True):
        cells = [
            Text("  ").join(_cell(each) for each in _worth_a_word(summary["attention"]))
            for summary in row
        ]
        if with_path:
            cells.append(_cell(row[0]["hidden_path"]))
        table.add_row(Text(row[0]["token"]), *cells)
    return table


def _worth_a_word(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first, and those of the others that have a percent of the share."""
    return found[:1] + [each for each in found[1:] if each["share"] >= 0.01]


def _cell(found: dict[str, Any]) -> Text:
    """A teacher token and its share; in bold where it has most of it."""
    style = "bold" if found["share"] >= 0.5 else ""
    return Text(found["token"], style=style) + Text(f" {found['share']:.0%}", style="dim")


# --- PNG --------------------------------------------------------------------------------------


def figure_of(sample: AlignedSample, tokens: int) -> Figure:
    """The three matrices of each state, at most `tokens` tokens a side; states side by side.

    White lines are the band's edges. A glyph that the font lacks is drawn as □.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    students = _labels(sample.student_tokens[:tokens])
    teachers = _labels(sample.teacher_tokens[:tokens])
    rows, columns = (1, 3) if len(sample.states) == 1 else (3, len(sample.states))
    width, height = 1.6 + 0.13 * max(12, len(teachers)), 1.9 + 0.13 * max(12, len(students))
    figure = Figure(figsize=(columns * width + 0.8, rows * height + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    if rows == 1:
        panels = panels.T
    for column, (state, alignment) in enumerate(sample.states.items()):
        for axes, (name, meaning) in zip(panels[:, column], MATRICES.items(), strict=True):
            matrix = getattr(alignment, name)[:tokens, :tokens]
            # The square root keeps small shares visible, on one scale for all.
            image = axes.imshow(matrix.numpy(), norm=PowerNorm(0.5, 0, 1), aspect="auto")
            if alignment.inside is not None:
                for edge in band_edges(alignment.inside[:tokens]):
                    axes.plot(*edge, color="white", linewidth=0.8, scalex=False, scaley=False)
            axes.set_title(f"{meaning}\n{state}".replace("$", r"\$"), size=9)
            font = {"size": 6.5, "family": "DejaVu Sans Mono"}
            axes.set_xticks(range(len(teachers)), teachers, rotation=90, **font)
            axes.set_yticks(range(len(students)), students, **font)
            axes.set_xlabel("teacher", size=8)
            axes.set_ylabel("student", size=8)
    figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.6, label="share")
    figure.suptitle(sample.title.replace("$", r"\$"), size=10)
    return figure


def band_edges(inside: Tensor) -> list[tuple[list[float], list[float]]]:
    """The band's left and right edge, as x and y of lines along cell borders.

    inside: (S, T) bool, one run of cells a row; a row without any interrupts the lines.
    """
    left: tuple[list[float], list[float]] = ([], [])
    right: tuple[list[float], list[float]] = ([], [])
    for index, row in enumerate(inside):
        within = row.nonzero().flatten().tolist()
        first, last = (within[0] - 0.5, within[-1] + 0.5) if within else (float("nan"),) * 2
        for line, x in ((left, first), (right, last)):
            line[0].extend([x, x])
            line[1].extend([index - 0.5, index + 0.5])
    return [left, right]


def _labels(tokens: Sequence[str]) -> list[str]:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    labels = []
    for token in tokens:
        token = token if len(token) <= LONGEST_LABEL else token[: LONGEST_LABEL - 1] + "…"
        drawn = "".join(each if font.get_char_index(ord(each)) else "□" for each in token)
        labels.append(drawn.replace("$", r"\$"))  # a dollar would begin a formula
    return labels


def png_image(sample: AlignedSample, tokens: int) -> bytes:
    image = BytesIO()
    figure_of(sample, tokens).savefig(image, format="png", dpi=110)
    return image.getvalue()


# --- HTML -------------------------------------------------------------------------------------


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; background: #fff; color: #222;
       overflow-wrap: break-word }
.wide { overflow-x: auto } img { width: max(100%, 75rem); background: #fff }
table { border-collapse: collapse; margin: 1rem 0 2rem }
td, th { padding: .1rem .9rem .1rem 0; text-align: left; vertical-align: top }
td { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 13px }
small { color: #777 } th small { font-weight: normal }
@media (prefers-color-scheme: dark) { body { background: #1c1c1c; color: #ddd } }
"""


def html_page(
    facts: dict[str, Any], samples: Sequence[tuple[AlignedSample, bytes]], tokens: int
) -> str:
    """A page that needs no other file: each sample's PNG and a table of its drawn tokens.

    facts: `student`, `teacher` and `gamma`, as `--json` prints them.
    """
    e = html.escape
    parts = [
        "<h1>Alignment</h1>",
        f"<p>student <b>{e(facts['student'])}</b>, teacher <b>{e(facts['teacher'])}</b>. "
        f"Attention A: where each student token looks, a row sums to 1. Paths: the probability "
        f"that soft-DTW with γ = {facts['gamma']:g} goes through a cell. White lines: the band. "
        "Colours follow the square root of the share.</p>",
    ]
    for sample, image in samples:
        data = b64encode(image).decode()
        parts += [
            f"<h2>{e(sample.title)}</h2><p>Drawn: {e(what_is_drawn(sample, tokens))}.</p>",
            f'<div class="wide"><img alt="{e(sample.title)}" '
            f'src="data:image/png;base64,{data}"></div>',
            '<div class="wide"><table><tr><th>student</th>',
        ]
        columns = []
        for state, alignment in sample.states.items():
            parts.append(
                f"<th>attends to <small>{e(state)}</small></th>"
                f"<th>path, hidden <small>{e(state)}</small></th>"
                f"<th>path, embeddings <small>{e(state)}</small></th>"
            )
            columns.append(token_summaries(sample, alignment, 3)[:tokens])
        parts.append("</tr>")
        for row in zip(*columns, strict=True):
            parts.append(f"<tr><td>{e(row[0]['token'])}</td>")
            for summary in row:
                cells = [summary["attention"], [summary["hidden_path"]], [summary["embed_path"]]]
                for found in cells:
                    shown = " ".join(
                        f"{e(each['token'])}&nbsp;<small>{each['share']:.0%}</small>"
                        for each in _worth_a_word(found)
                    )
                    parts.append(f"<td>{shown}</td>")
            parts.append("</tr>")
        parts.append("</table></div>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>dwakd align</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body>"
        "</html>\n"
    )
