"""`dwakd export`: the student of a run as a folder of its own."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from rich.table import Table

from dwakd_cli.console import PlainConsole


def run(
    folder: Path,
    dest: Path,
    *,
    push_to: str | None,
    private: bool,
    json_output: bool,
    base_model: str | None,
    keep_adapter: bool,
    **options: Any,
) -> None:
    """Exports, reports, and uploads where that is asked for. Raises UserError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # peft warns of merges into tied embeddings; whether one went well is measured here.
    warnings.filterwarnings("ignore", module="peft")
    console = PlainConsole(stderr=json_output)
    with console.status("Starting") as status:
        from transformers.utils.logging import disable_progress_bar

        from dwakd_plugin.export.export import export
        from dwakd_plugin.export.hub import check_push, push

        disable_progress_bar()
        if push_to is not None:
            check_push(push_to, folder, keep_adapter=keep_adapter, base_model=base_model)
        report = export(
            folder,
            dest,
            base_model=base_model,
            keep_adapter=keep_adapter,
            say=status.update,
            **options,
        )
        if push_to is not None:
            status.update(f"Uploading to {push_to}")
            report["pushed_to"] = push(dest, push_to, private=private)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        console.print(_table(report))


def _table(report: dict[str, Any]) -> Table:
    check = report["verification"]
    rows = {
        "student": report["destination"],
        "contents": f"{report['kind']}, {report['parameters']:,} parameters, {report['dtype']}, "
        f"{report['bytes'] / 1e6:,.1f} MB",
        "weights": ", ".join(report["weights"]),
        "compared": f"logits differ by {check['relative_logit_difference']:.2g} of their size, "
        f"{check['tolerance']:g} allowed ({check['tokens_compared']} tokens, in a new process)",
        "took": f"{report['seconds']:.0f} s",
    }
    if "pushed_to" in report:
        rows["pushed to"] = report["pushed_to"]
    table = Table(title="Exported", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    return table
