"""The parts of `benchmarks.gpu`: each takes the place where it runs, and returns its figures.

Times are medians in milliseconds of whole calls, the device waited for; bytes are the device's own
count. What is imported here is imported once for all of them, and touches no GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import measure

ROOT = Path(__file__).parents[2]
ROUNDS = 5
MIXED = "packed, rows that see each other"


@dataclass(frozen=True)
class Place:
    """Where a part runs: the device, whether its shapes are tiny, a folder to write into."""

    device: str
    tiny: bool
    folder: Path


def carry_out(function: str, given: tuple[Any, ...], place: Place, answer: Connection) -> None:
    """In a part's own process: sends its result, or what it failed with."""
    os.setsid()  # with all that it starts, so that all of it can be ended
    try:
        answer.send({"result": globals()[function](place, *given)})
    except BaseException as found:  # of any kind: it is recorded, and the others go on
        # A run of ours that ends by itself has said why before.
        error = (isinstance(found, SystemExit) and found.__context__) or found
        where = "".join(traceback.format_tb(error.__traceback__)[-4:])
        answer.send({"error": f"{type(error).__name__}: {error}"[:2000], "where": where[-4000:]})


# The parts --------------------------------------------------------------------------------------


def card_facts(_: Place) -> dict[str, Any]:
    """What torch says of the GPU; nothing where it sees none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory, bytes": properties.total_memory,
        "CUDA": torch.version.cuda,
    }


def timed(runs: dict[str, Callable[[], Any]], device: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Milliseconds of each, in turn."""

    def whole(run: Callable[[], Any]) -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    calls = {name: lambda run=run: whole(run) for name, run in runs.items()}
    seconds, _ = measure.alternate(calls, rounds)
    return {name: 1e3 * measure.spread(values)["median"] for name, values in seconds.items()}


def peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """The most that is allocated while it runs, above what is before; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def half(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16)


def tests(place: Place) -> dict[str, Any]:
    """The tests that are marked `gpu`, with the GPU to be seen."""
    files = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    ]
    report = place.folder / "tests.xml"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0" if place.device == "cuda" else "")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *files],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1) or not report.exists():
        raise RuntimeError(
            f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        )
    cases = xml.parse(report).getroot().findall(".//testcase")
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    failed += [case.get("name") for case in cases if case.find("error") is not None]
    passed = len(cases) - len(skipped) - len(failed)
    if failed or (place.device == "cuda" and not passed):
        raise AssertionError(
            f"{passed} passed, failed: {failed}, skipped: {skipped}\n{done.stdout[-1500:]}"
        )
    return {"files": files, "passed": passed, "skipped": len(skipped)}


def soft_dtw_kernels(place: Place) -> dict[str, Any]:
    """The Triton kernel beside torch's wavefront on the device and the compiled one on the CPU:
    value and gradient."""
    from benchmarks.soft_dtw import gradient, random_cost
    from dwakd_plugin.loss.soft_dtw import soft_dtw

    def function(backend: str, where: str) -> Callable[[Any, float], Any]:
        def of(cost: Any, gamma: float) -> Any:
            cost = cost.to(where)
            samples, n, m = cost.shape
            lengths = (torch.full((samples,), size, device=where) for size in (n, m))
            return soft_dtw(cost, *lengths, gamma, backend=backend)  # type: ignore[arg-type]

        return of

    kernels = {"numba, CPU": function("numba", "cpu"), "torch": function("torch", place.device)}
    if place.device == "cuda":
        kernels["triton"] = function("triton", "cuda")
    mine = "triton" if "triton" in kernels else "numba, CPU"
    sizes = [(2, 24, 30)] if place.tiny else [(8, 256, 300), (8, 512, 600), (2, 4096, 4096)]
    found: dict[str, Any] = {}
    for size in sizes:
        cost = random_cost(size).to(place.device)
        near = {name: cost.cpu() if "CPU" in name else cost for name in kernels}
        if size[1] > 1000:  # its wavefront keeps them all
            near.pop("torch")
        label = "×".join(map(str, size))
        runs = {
            name: lambda name=name, cost=cost: gradient(kernels[name], cost, 1.0)
            for name, cost in near.items()
        }
        found[f"{label}, ms"] = timed(runs, place.device, 3)
        found[f"{label}, bytes above the cost"] = peak_bytes(runs[mine], place.device)
        if "torch" in near:
            exact = gradient(kernels["torch"], cost.double(), 1.0).cpu()
            own = gradient(kernels[mine], near[mine], 1.0).cpu().double()
            found[f"{label}, largest gradient error"] = float((own - exact).abs().max())
    return found


def objective_steps(place: Place) -> dict[str, Any]:
    """From hidden states to gradients, beside the heads' products alone, in both precisions."""
    from contextlib import nullcontext

    from benchmarks import objective

    sizes = objective.QUICK if place.tiny else objective.FULL
    batch = objective.make_batch(sizes, place.device)
    found: dict[str, Any] = {"sizes": str(sizes)}
    for precision, within in (("float32", nullcontext), ("bfloat16", lambda: half(place.device))):

        def step(name: str, within: Any = within) -> float:
            with within():
                return objective.step(name, batch)

        runs = {name: lambda name=name: step(name) for name in ("DWA-KD", objective.PRODUCTS)}
        losses = {name: step(name) for name in ("DWA-KD",)}
        found[f"{precision}, ms"] = timed(runs, place.device, 3)
        found[f"{precision}, bytes"] = peak_bytes(runs["DWA-KD"], place.device)
        found[f"{precision}, loss a token"] = losses["DWA-KD"]
    return found


def models(place: Place) -> tuple[Path, Path]:
    """Folders of a student of 0.3B and a teacher of 1B parameters, at random, with tokenizers."""
    from dwakd_plugin.tokenizers.training import train_tokenizer

    layers, width, words = (2, 64, (500, 700)) if place.tiny else (16, 1024, (151_936, 128_256))
    sizes = {
        "student": (width, width * 11 // 4, words[0]),
        "teacher": (2 * width, 8 * width, words[1]),
    }
    texts = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))]
    for name, (hidden, inner, vocabulary) in sizes.items():
        folder = place.folder / name
        if folder.exists():
            continue
        tokenizer = train_tokenizer(texts, 400)
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 256),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        with torch.device(place.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        partial = folder.with_suffix(".partial")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
        del model
    if place.device == "cuda":
        torch.cuda.empty_cache()
    return place.folder / "student", place.folder / "teacher"


def load_student(folder: Path, device: str, attention: str = "sdpa") -> Any:
    """As axolotl leaves it for training in bfloat16: norms and embeddings in float32."""
    student = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention
    ).to(device)
    for module in student.modules():
        if isinstance(module, torch.nn.Embedding) or "norm" in type(module).__name__.lower():
            module.float()
    return student.train()


def batch_of(rows: int, lengths: tuple[int, int], words: tuple[int, int], device: str) -> Any:
    """Random rows, all answer, on both sides, as the collator lays them out."""
    from dwakd_plugin.models.batches import response_positions, teacher_batch

    generator = torch.Generator().manual_seed(0)
    ids = [
        [torch.randint(count, (length,), generator=generator) for _ in range(rows)]
        for length, count in zip(lengths, words, strict=True)
    ]
    starts = [row * lengths[0] for row in range(rows)]
    batch = teacher_batch(ids[1], ids[1]) | response_positions("student", ids[0], starts)
    student = {"input_ids": torch.stack(ids[0]), "labels": torch.stack(ids[0])}
    student["attention_mask"] = torch.ones_like(student["input_ids"])
    return tuple({k: v.to(device) for k, v in each.items()} for each in (batch, student))


def beside_a_teacher(
    place: Place, settings: dict[str, Any], folder: Path | None = None
) -> dict[str, Any]:
    """Steps of a student beside a teacher: time, peak memory and what `dwakd plan` says of it."""
    from dwakd_plugin.loss import dwakd_loss
    from dwakd_plugin.models.projectors import Projectors
    from dwakd_plugin.models.student import student_states
    from dwakd_plugin.models.teacher.loaded import load_teacher
    from dwakd_plugin.plan import card, plan
    from dwakd_plugin.recipe import Recipe
    from dwakd_plugin.recipe.schema import LossConfig, TeacherConfig

    device, steps = place.device, 4
    rows, length = (2, 24) if place.tiny else (4, 512)
    student_folder, teacher_folder = models(place)
    teacher_folder = folder or teacher_folder
    student = load_student(student_folder, device)
    teacher = load_teacher(
        TeacherConfig.model_validate({"base_model": str(teacher_folder), **settings}), device
    )
    projectors = Projectors(student.config.hidden_size, teacher.hidden_size).to(device)
    trained = [*student.parameters(), *projectors.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
    words = student.config.vocab_size, teacher.head.weight.shape[0]
    batch, own = batch_of(rows, (length, length), words, device)
    loss_config, seconds, losses = LossConfig(), [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        begun = time.perf_counter()
        with half(device):
            terms = dwakd_loss(
                student_states(student, batch, **own),
                teacher.states(batch),
                projectors,
                loss=loss_config,
            )
        loss = terms.total(loss_config) / terms.student_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - begun)
    if not all(map(torch.isfinite, map(torch.tensor, losses))) or losses[-1] >= losses[0]:
        raise AssertionError(f"the loss doesn't fall: {losses}")
    recipe = {
        "base_model": str(student_folder),
        "distillation": "dwakd",
        "plugins": ["dwakd_plugin.DWAKDPlugin"],
        "dwakd": {"variant": "paper", "teacher": {"base_model": str(teacher_folder), **settings}},
        "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "sequence_len": length,
        "micro_batch_size": rows,
        "optimizer": "adamw_torch_fused",
        "attn_implementation": "sdpa",
        "bf16": True,
    }
    planned = plan(Recipe(recipe), card(None if device == "cuda" else "cpu"))
    found = {
        "teacher": f"{teacher.parameters:,} parameters, {teacher.precision}, {teacher.attention}",
        "student's parameters": sum(each.numel() for each in student.parameters()),
        "rows × tokens": f"{rows} × {length}",
        "losses": losses,
        "first step, ms": 1e3 * seconds[0],
        "a step, ms": 1e3 * sorted(seconds[1:])[1],
        "planned step, ms": 1e3 * planned.seconds_per_step,
        "planned bytes": round(planned.total),
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        peak = torch.cuda.max_memory_allocated()
        found |= {"allocated": peak, "reserved": torch.cuda.max_memory_reserved()}
        found |= {
            "beside torch's memory": context,
            "plan off by": planned.total / (peak + context) - 1,
        }
    return found


def real_teacher(place: Place) -> dict[str, Any]:
    """The embedded SmolLM2-135M-Instruct in the teacher's place, read as the CPU reads it."""
    from dwakd_plugin.models.smollm2 import prepare_teacher

    # Its conversion takes half a minute of a CPU.
    folder = models(place)[1] if place.tiny else prepare_teacher(place.folder / "smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    ids = tokenizer(text[: 200 if place.tiny else 4000], return_tensors="pt")["input_ids"]
    bits: dict[str, float] = {}
    for device in dict.fromkeys(("cpu", place.device)):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        with torch.no_grad():
            found = model(input_ids=ids.to(device), labels=ids.to(device)).loss
        bits[f"cross-entropy of a text, {device}, {dtype}"] = float(found)
    return bits | beside_a_teacher(place, {}, folder)


def attention_kernels(place: Place) -> dict[str, Any]:
    """The student's body forward and backward over rows of many lengths, packed and not."""
    import importlib.util

    from dwakd_plugin.models.batches import teacher_batch
    from dwakd_plugin.models.causal_lm import gather_positions, hidden_states

    folder, _ = models(place)
    found: dict[str, Any] = {}
    kinds = ["sdpa"]
    if place.device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        kinds.append("flash_attention_2")
    else:
        found["left out"] = "flash_attention_2: it takes a GPU and the package flash_attn"
    longest = 32 if place.tiny else 1024
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(400, (longest * share // 8,), generator=generator)
        for share in (8, 1, 2, 1, 3, 1, 4, 2)
    ]
    packed = teacher_batch(rows, rows, packed=True, sequence_len=2 * longest)
    places = packed["teacher_position_ids"]
    batches = {
        "padded": teacher_batch(rows, rows),
        "packed": packed,
        # For comparison: one row as long as the sequence, whose parts see all before them.
        MIXED: packed
        | {"teacher_position_ids": torch.arange(places.shape[1]).expand_as(places).clone()},
    }
    runs: dict[str, Callable[[], Any]] = {}
    reference, apart = None, {}
    for kind in kinds:
        model = load_student(folder, place.device, kind)
        for layout, batch in batches.items():
            batch = {name: tensor.to(place.device) for name, tensor in batch.items()}

            def states(model: Any = model, batch: Any = batch) -> Any:
                given = {
                    name: batch[f"teacher_{name}"]
                    for name in ("input_ids", "position_ids")
                    if f"teacher_{name}" in batch
                }
                with half(place.device):
                    hidden = hidden_states(model, mask=batch.get("teacher_attention_mask"), **given)
                real = gather_positions(hidden, batch["teacher_positions"]).flatten(0, 1)
                return real[batch["teacher_index"]].float()

            def step(model: Any = model, states: Any = states) -> None:
                states().square().mean().backward()
                model.zero_grad()

            with torch.no_grad():
                own = states()
            reference = own if reference is None else reference
            apart[f"{kind}, {layout}"] = float((own - reference).norm() / reference.norm())
            if layout != MIXED:
                runs[f"{kind}, {layout}"] = step
        seen = apart[f"{kind}, {MIXED}"]
        if not all(apart[f"{kind}, {layout}"] < seen / 4 for layout in ("padded", "packed")):
            raise AssertionError(f"packed rows see each other: states apart by {apart}")
    found["tokens"] = sum(map(len, rows))
    found["ms"] = timed(runs, place.device, 3)
    found["bytes"] = {name: peak_bytes(run, place.device) for name, run in runs.items()}
    found["states apart from the first, relative"] = apart
    return found


def short_run(place: Place) -> dict[str, Any]:
    """Four steps through axolotl, and the last two again from the checkpoint between."""
    import json

    import yaml
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.integrations.base import PluginManager
    from safetensors.torch import load_file

    from benchmarks.plan import short_run as recipe_of

    student, teacher = models(place)
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split("\n\n")
    (place.folder / "rows.jsonl").write_text(
        "".join(
            json.dumps({"instruction": "Go on.", "input": "", "output": paragraph}) + "\n"
            for paragraph in text[:40]
        )
    )
    recipe = recipe_of(place.folder, str(student), str(teacher), 2, 256 if place.tiny else 512)
    recipe |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    recipe |= {"bf16": place.device == "cuda", "auto_resume_from_checkpoints": True}

    def train(name: str) -> tuple[dict[str, Any], list[float]]:
        out = place.folder / name
        file = place.folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(recipe | {"output_dir": str(out)}))
        PluginManager.get_instance().plugins.clear()
        do_train(load_cfg(str(file)), TrainerCliArgs())
        weights = load_file(out / "model.safetensors")
        weights |= load_file(out / "dwakd" / "projectors.safetensors")
        state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
        return weights, [line["loss"] for line in state["log_history"] if "loss" in line]

    whole, losses = train("whole")
    shutil.copytree(place.folder / "whole/checkpoint-2", place.folder / "resumed/checkpoint-2")
    resumed, again = train("resumed")
    apart = max(float((whole[name].float() - resumed[name].float()).abs().max()) for name in whole)
    if max(abs(a - b) for a, b in zip(losses, again, strict=True)) > 0.01 * losses[0]:
        raise AssertionError(f"the resumed run has other losses: {losses}, {again}")
    return {"losses": losses, "losses of the resumed run": again, "weights apart by": apart}
