"""`dwakd check --data`: what both models would be given of a recipe's rows, side by side."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dwakd_cli.console import PlainConsole

if TYPE_CHECKING:
    from dwakd_plugin.recipe import Recipe

_SHOWN = 1_500  # characters of a rendering


def rows_of(recipe: Recipe, student: Any, teacher: Any) -> dict[str, Any]:
    """How many rows train and on what, how their answers differ, and an example of each kind.

    Raises UserError as training would, where no row has a teacher's side.
    """
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TRL_EXPERIMENTAL_SILENCE": "1"}
    from dwakd_plugin.data.dual_tokenization import SOURCE_COLUMN
    from dwakd_plugin.train.open_run import open_rows

    block = recipe.keys["dwakd"]
    # Neither dropped nor a reason to stop: they are what is asked for.
    recipe = recipe.but(dwakd={**block, "different_answers": "labels"})
    with open_rows(recipe) as (_, datasets, report):
        wanted = {place: kind for kind, place in report.example_rows.items()}
        examples: dict[str, dict[str, Any]] = {
            kind: {
                "row": report.locate(report.example_rows[kind]),
                **dict(zip(("student_answer", "teacher_answer"), answers, strict=True)),
            }
            for kind, answers in report.examples.items()
            if kind in report.example_rows
        }
        for rows in filter(None, datasets):
            if SOURCE_COLUMN not in rows.column_names:
                continue
            for index, place in enumerate(rows[SOURCE_COLUMN]):
                if place in wanted:
                    row = rows[index]
                    examples[wanted[place]] |= {
                        "student_rendering": student.decode(row["input_ids"]),
                        "teacher_rendering": teacher.decode(row["teacher_input_ids"]),
                    }
        return {
            "counts": dict(report.counts),
            "answers": dict(report.answers),
            "ends_on_one_side": dict(report.unpaired_ends),
            "unread": {
                what: {"rows": count, "row": report.locate(place), "text": text}
                for what, count in report.unread.items()
                for place, text in [report.unread_examples[what]]
            },
            "examples": examples,
        }


def show_rows(found: dict[str, Any], console: PlainConsole) -> None:
    """Counts, and for each kind of difference the first row in both renderings."""
    table = Table(title="Rows of the recipe, as both models would be given them", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for words, count in found["counts"].items():
        table.add_row(words, f"{count:,}")
    for kind, count in found["answers"].items():
        table.add_row(f"both sides' answers are {kind}", f"{count:,}")
    for side, count in found["ends_on_one_side"].items():
        table.add_row(f"the answer's end is a label on the {side}'s side only", f"{count:,}")
    for what, unread in found["unread"].items():
        table.add_row(f"neither side reads {what}", f"{unread['rows']:,}")
    console.print(table)
    for what, unread in found["unread"].items():
        console.print(Text(f"Neither side reads {what}: {unread['row']}: {unread['text']!r}"))
    for kind, example in found["examples"].items():
        sides = Table(title=Text(f"Answers {kind}: {example['row']}"), show_lines=True)
        for side in ("student", "teacher"):
            sides.add_column(side, overflow="fold", ratio=1)
        for part in ("answer", "rendering"):
            texts = [example.get(f"{side}_{part}") for side in ("student", "teacher")]
            if texts != [None, None]:
                sides.add_row(*(Text(_shortened(text or "")) for text in texts))
        console.print(sides)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
