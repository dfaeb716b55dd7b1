"""`dwakd export`: the student of a run as a folder of its own."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import TrustModels
from dwakd_cli.without_packages import without_packages
from dwakd_plugin.export.new_process import UNNEEDED, NewProcess


def export(
    run: Annotated[Path, typer.Argument(help="A run's output folder, or a checkpoint.")],
    dest: Annotated[Path, typer.Argument(help="The new folder.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            metavar="NAME",
            help="Precision of the weights: float32, bfloat16, float16, or auto: as they are.",
        ),
    ] = "auto",
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Export a LoRA adapter without merging it.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(help="The adapter's base model, where it is not at its recorded place."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights, as in 5GB.")] = "5GB",
    trust_remote_code: TrustModels = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model at DEST.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Then upload it to this hub repository; needs `hf auth login`."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a repository that is created public.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export the student of a run: weights, tokenizer and model card, and nothing else.

    RUN is a run's output folder or one of its checkpoints. A LoRA adapter is merged into its base
    model unless --keep-adapter. The new folder is read back in a process of its own and compared
    with the run's student before it appears at DEST; on any error nothing is left there.

    Computes in float32 on the CPU, which takes 4 bytes of memory a parameter.

    Exit codes: 0 the student is at DEST, and on the hub where that was asked for; 1 an error.
    """

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # peft warns of merges into tied embeddings; whether one went well is measured here.
    warnings.filterwarnings("ignore", module="peft")
    console = PlainConsole(stderr=json_output)
    # Its imports take as long as those of this one: both at once.
    with ExitStack() as stack:
        status = stack.enter_context(console.status("Starting"))
        process = stack.enter_context(NewProcess(lean=not trust_remote_code))
        if not trust_remote_code:
            stack.enter_context(without_packages(UNNEEDED))
        from transformers.utils.logging import disable_progress_bar

        from dwakd_plugin.export.export import export as export_student
        from dwakd_plugin.export.hub import check_push, push

        disable_progress_bar()
        if push_to_hub is not None:
            check_push(push_to_hub, run, keep_adapter=keep_adapter, base_model=base_model)
        report = export_student(
            run,
            dest,
            base_model=base_model,
            keep_adapter=keep_adapter,
            say=status.update,
            dtype=dtype,
            shard_size=shard_size,
            trust_remote_code=trust_remote_code,
            force=force,
            process=process,
        )
        if push_to_hub is not None:
            status.update(f"Uploading to {push_to_hub}")
            report["pushed_to"] = push(dest, push_to_hub, private=not public)
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
        **_trained(report),
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


def _trained(report: dict[str, Any]) -> dict[str, str]:
    """What the export is worth beside the student as it was trained, where that is known."""
    trained = report.get("trained")
    if trained is None:
        return {}
    words = (
        f"logits differ by {trained['relative_logit_difference']:.2g} of their size from those in "
        f"training ({trained['held']}); bits per byte of the labels of its first rows: "
        f"{trained['bits_per_byte']:.4f} in training, {trained['exported_bits_per_byte']:.4f} now"
    )
    if trained["held"].endswith("bit"):
        words += (
            f". The adapter learnt on a base in {trained['held']}, and this base is not quantised: "
            + (
                "load it so to have what was trained"
                if report["kind"] == "adapter"
                else "--keep-adapter, and a base loaded so, have what was trained"
            )
        )
    return {"as trained": words}
