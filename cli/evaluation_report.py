"""What `dwakd evaluate` found, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

from rich.table import Table

from dwakd_cli.console import PlainConsole

_TITLES = {"rouge_l": "ROUGE-L", "bits_per_byte": "bits per byte"}
_UNFINISHED = 0.2


def show(report: dict[str, Any], console: PlainConsole) -> None:
    """Figures of all models, the first against the others, and what to know of them."""
    models = report["models"]
    seeds = len(report["seeds"])
    table = Table(
        title=f"{report['rows']:,} rows of {report['data']}",
        caption="in brackets: 95 % intervals, bootstrap over rows",
    )
    table.add_column("", overflow="fold")
    for one in models:
        name = one["name"] + (" (teacher)" if one["role"] == "teacher" else "")
        table.add_column(name, justify="right", overflow="fold")

    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        cells = [cell(one) for one in models]
        if any(cells):
            table.add_row(title, *cells)

    row(f"ROUGE-L, {seeds} seed" + ("" if seeds == 1 else "s"), _rouge)
    row("the same, Unicode words", lambda one: _value(one.get("rouge_l_unicode"), "{:.2f}"))
    row("tokens an answer", lambda one: _of(one, "responses", "mean_tokens", "{:.0f}"))
    row("answers cut off", lambda one: _of(one, "responses", "unfinished_share", "{:.0%}"))
    row("bits per byte", lambda one: _value(one.get("bits_per_byte"), "{:.3f}"))
    row("without the end", lambda one: _of(one, "bits_per_byte", "without_end", "{:.3f}"))
    for key, title, form in (
        ("next_byte_agreement", "next byte as teacher's", "{:.1%}"),
        ("next_byte_divergence_bits", "its divergence (bits)", "{:.3f}"),
        ("teacher_bits_per_byte_of_samples", "teacher's bits per byte of answers", "{:.3f}"),
    ):
        row(title, lambda one, key=key, form=form: _value(_nearness(one).get(key), form))
    for key, title in (
        ("structure_cosine", "structure, cosine (median)"),
        ("structure_inner_product", "structure, products (median)"),
    ):
        row(title, lambda one, key=key: _of(_nearness(one), key, "median", "{:.3f}"))
    console.print(table)
    if report["paired"]:
        console.print(_paired(report))
    for line in remarks(report):
        console.print(line, style="yellow")
    console.print(f"All figures and answers are in {report['output']}. {report['seconds']:.0f} s.")


def _nearness(one: dict[str, Any]) -> dict[str, Any]:
    return one.get("to_teacher") or {}


def _rouge(one: dict[str, Any]) -> str:
    found = one.get("rouge_l")
    if found is None:
        return ""
    std = "" if found["std"] is None else f" ± {found['std']:.2f}"
    return f"{found['mean']:.2f}{std} {_brackets(found['interval'], '{:.2f}')}"


def _value(found: dict[str, Any] | None, form: str) -> str:
    if found is None:
        return ""
    return f"{form.format(found['value'])} {_brackets(found['interval'], form)}"


def _of(one: dict[str, Any], part: str, key: str, form: str) -> str:
    found = one.get(part)
    return "" if found is None else form.format(found[key])


def _brackets(interval: tuple[float, float], form: str) -> str:
    low, high = (form.format(value) for value in interval)
    return f"({low} to {high})"


def _paired(report: dict[str, Any]) -> Table:
    first = report["paired"][0]["model"]
    table = Table(title=f"{first}, compared row by row", caption="clear: the interval excludes 0")
    for title in ("against", "figure"):
        table.add_column(title, overflow="fold")
    table.add_column("difference", justify="right")
    table.add_column("", justify="right")
    for pair in report["paired"]:
        form = "{:+.2f}" if pair["metric"] == "rouge_l" else "{:+.4f}"
        low, high = pair["interval"]
        better = (low > 0) if pair["metric"] == "rouge_l" else (high < 0)
        verdict = ("better" if better else "worse") if low > 0 or high < 0 else "not clear"
        table.add_row(
            pair["against"],
            _TITLES[pair["metric"]],
            f"{form.format(pair['difference'])} {_brackets(pair['interval'], form)}",
            verdict,
        )
    return table


def remarks(report: dict[str, Any]) -> list[str]:
    """What makes a figure mean less than it seems."""
    lines = []
    for one in report["models"]:
        if one.get("responses", {}).get("unfinished_share", 0) > _UNFINISHED:
            lines.append(
                f"{one['name']}: {one['responses']['unfinished_share']:.0%} of the answers were "
                "cut off before their end. Was the model trained on this prompt format?"
            )
        near = one.get("to_teacher")
        lost = report["rows"] - near.get("rows_compared", report["rows"]) if near else 0
        if lost:
            lines.append(
                f"{one['name']}: {lost:,} rows cannot be compared with the teacher: the tokens of "
                "a side do not spell the text, or share one place."
            )
    if report["references_without_words"]:
        lines.append(
            f"{report['references_without_words']:,} rows have no word in a-z or 0-9 in their "
            "references. ROUGE-L knows no other, and is 0 for them."
        )
    if unseen := report.get("references_mostly_unseen"):  # of a report from before it was counted
        lines.append(
            f"{unseen:,} of {report['rows']:,} rows have references whose letters are mostly none "
            "of a-z and 0-9, and ROUGE-L compares what is left of them: read the figure of Unicode "
            "words instead."
        )
    return lines


def picture(report: dict[str, Any]) -> bytes:
    """A PNG: a panel for each figure, with its interval; structure as box plots."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    models = report["models"]
    students = [one for one in models if one["role"] != "teacher"]
    panels: list[tuple[str, list[dict[str, Any]], Callable[[Any, list[dict[str, Any]]], None]]] = []
    if any("rouge_l" in one for one in models):
        panels.append(("ROUGE-L (dots: seeds)", students, _draw_rouge))
    if any("bits_per_byte" in one for one in models):
        panels.append(("bits per byte", models, _draw_bits))
    near = [one for one in students if _nearness(one)]
    if any("next_byte_agreement" in _nearness(one) for one in near):
        panels.append(("next byte as teacher's", near, _draw_agreement))
    for key, title in (
        ("structure_cosine", "distance of structure, cosine"),
        ("structure_inner_product", "distance of structure, inner products"),
    ):
        boxed = [one for one in near if key in _nearness(one)]
        if boxed:
            panels.append((title, boxed, lambda axes, some, key=key: _draw_boxes(axes, some, key)))
    figure, all_axes = pyplot.subplots(
        1,
        max(1, len(panels)),
        figsize=(3.4 * max(1, len(panels)), 3.6),
        layout="constrained",
        squeeze=False,
    )
    for axes, (title, some, draw) in zip(all_axes[0], panels, strict=False):
        draw(axes, some)
        axes.set_title(title, fontsize=9)
        names = [one["name"].replace("$", r"\$") for one in some]
        axes.set_xticks(range(len(some)), names, rotation=20, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(some) - 0.4)
        axes.grid(axis="y", linestyle=":")
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    return image.getvalue()


def _points(axes: Any, values: list[float], intervals: list[tuple[float, float]]) -> None:
    errors = [
        [value - low for value, (low, _) in zip(values, intervals, strict=True)],
        [high - value for value, (_, high) in zip(values, intervals, strict=True)],
    ]
    axes.errorbar(range(len(values)), values, yerr=errors, fmt="o", capsize=4, color="tab:blue")


def _draw_rouge(axes: Any, some: list[dict[str, Any]]) -> None:
    found = [one["rouge_l"] for one in some]
    _points(axes, [each["mean"] for each in found], [each["interval"] for each in found])
    for place, each in enumerate(found):
        seeds = list(each["per_seed"].values())
        axes.plot([place + 0.2] * len(seeds), seeds, ".", color="tab:grey")


def _draw_bits(axes: Any, some: list[dict[str, Any]]) -> None:
    found = [one["bits_per_byte"] for one in some]
    _points(axes, [each["value"] for each in found], [each["interval"] for each in found])


def _draw_agreement(axes: Any, some: list[dict[str, Any]]) -> None:
    found = [_nearness(one)["next_byte_agreement"] for one in some]
    _points(axes, [each["value"] for each in found], [each["interval"] for each in found])


def _draw_boxes(axes: Any, some: list[dict[str, Any]], key: str) -> None:
    boxes = [
        {
            "med": each["median"],
            "q1": each["q1"],
            "q3": each["q3"],
            "whislo": each["whisker_low"],
            "whishi": each["whisker_high"],
        }
        for each in (_nearness(one)[key] for one in some)
    ]
    axes.bxp(boxes, positions=range(len(boxes)), showfliers=False)
