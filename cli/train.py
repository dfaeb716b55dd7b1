"""`dwakd train`: any axolotl recipe, checked and distilled, through axolotl's own launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_plugin.errors import UserError, without_credentials
from dwakd_plugin.io.files import explaining_writes, replace_file
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.health import standing_in
from dwakd_plugin.train.preflight import check_all
from dwakd_plugin.train.run_folder import RUN_FILE, output_folder
from dwakd_plugin.train.signals import FOLDER, MESSAGE, STOP

PLUGIN = "dwakd_plugin.DWAKDPlugin"
RECIPE_FILE = Path("dwakd") / "recipe.yml"  # within the output folder: what axolotl was given

# What belongs to the teacher that a recipe names, and not to the one on the command line.
TEACHERS_OWN = ("tokenizer", "adapter", "revision", "chat_template")

# Keys that hold a secret, and the variables of the environment that serve as well: the recipe that
# axolotl gets lies in the output folder, which may be published.
SECRETS = {
    "hub_token": "HF_TOKEN",
    "hf_token": "HF_TOKEN",
    "wandb_api_key": "WANDB_API_KEY",
    "comet_api_key": "COMET_API_KEY",
}


@dataclass
class Launch:
    """What will run: the recipe for axolotl, how it came about, and the command."""

    recipe: dict[str, Any]
    changes: list[str]
    config: DWAKDConfig
    output: Path
    launcher: str
    processes: int
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.output / RECIPE_FILE


def run(
    recipe_file: Path,
    further: list[str],
    *,
    teacher: dict[str, Any],
    variant: str | None,
    launcher: str | None,
    processes: int | None,
    resume: bool,
    dry_run: bool,
    json_output: bool,
) -> int:
    """Checks, writes the effective recipe, and trains; returns the exit code.

    `teacher` and `variant` are what the command line says of them; `further` goes to axolotl, and
    after a `--` of its own to the launcher. Raises UserError.
    """
    console = PlainConsole(stderr=json_output)
    launch = prepare(
        recipe_file,
        further,
        teacher=teacher,
        variant=variant,
        launcher=launcher,
        processes=processes,
        resume=resume,
    )
    if dry_run:
        if json_output:
            print(json.dumps(_facts(launch), indent=1))
        else:
            console.print(_table(launch))
            console.print("Nothing was started or written: leave out --dry-run to train.")
        return 0
    for change in launch.changes:
        console.print(change, style="yellow")
    signed_before = _signature(launch)
    _write_recipe(launch, recipe_file)
    with _signals(launch) as signals:
        code, stopped_by = execute(
            launch.command,
            launch.environment,
            sys.stderr if json_output else None,
            # axolotl learns to stop when the models are loaded, right after the plugin signs.
            can_save=lambda: _on_several_machines(launch) or _signature(launch) != signed_before,
            signals=signals,
        )
        if signals is not None and (signals / MESSAGE).exists():
            raise UserError((signals / MESSAGE).read_text(encoding="utf-8"))
    trained = _signature(launch) != signed_before  # else the report is of another run
    warnings = standing_in(launch.output) if trained else []
    if stopped_by is not None:
        console.print(_how_to_go_on(launch, stopped_by))
        for warning in warnings:  # of a run that ends by itself they are the last words
            console.print(Text(f"Until then: {warning}", style="yellow"))
        code = 128 + stopped_by
    elif code != 0:
        console.print(f"axolotl ended with exit code {code}; its log is above.", style="red")
    elif not _on_several_machines(launch) and _signature(launch) == signed_before:
        raise UserError(
            f"axolotl ended well, but dwakd's plugin was not part of it: {launch.output / RUN_FILE}"
            " was not written. What it trained had no teacher. Run `axolotl train "
            f"{launch.file}` and look for `Failed to load plugin` in its log."
        )
    if json_output:
        facts = {**_facts(launch), "exit_code": code, "warnings": warnings}
        print(json.dumps(facts, indent=1))
    return code


def prepare(
    recipe_file: Path,
    further: list[str],
    *,
    teacher: dict[str, Any],
    variant: str | None,
    launcher: str | None,
    processes: int | None,
    resume: bool,
) -> Launch:
    """Everything before the start. Raises UserError with all that stands against it."""
    recipe = read_recipe(recipe_file)
    recipe, changes = with_distillation(recipe, teacher)
    if variant is not None and isinstance(recipe.get("dwakd"), dict):
        recipe["dwakd"] = recipe["dwakd"] | {"variant": variant}
    if resume:
        recipe["auto_resume_from_checkpoints"] = True
    launcher, processes, environment = _processes(launcher, processes)
    arguments, launcher_arguments = _split(further)
    seen = recipe | _overrides(arguments, recipe, recipe_file, launcher)
    config = check_all(seen)
    secrets = {key: recipe.pop(key) for key in SECRETS if isinstance(recipe.get(key), str)}
    for key, value in secrets.items():
        environment[SECRETS[key]] = value
        changes.append(f"{key} goes to axolotl as {SECRETS[key]}, and into no file")
    output = output_folder(seen)
    if processes > 1:
        option = {"accelerate": "--num_processes", "torchrun": "--nproc_per_node"}[launcher]
        launcher_arguments = [option, str(processes), *launcher_arguments]
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(output / RECIPE_FILE)]
    command += ["--launcher", launcher, *arguments]
    if launcher_arguments:
        command += ["--", *launcher_arguments]
    return Launch(recipe, changes, config, output, launcher, processes, command, environment)


# The recipe ---------------------------------------------------------------------------------


def read_recipe(file: Path) -> dict[str, Any]:
    """A recipe as axolotl reads it. Raises UserError where it is none."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except IsADirectoryError:
        recipes = sorted(path.name for path in file.glob("*.y*ml"))
        hint = f" It has: {', '.join(recipes)}." if recipes else ""
        raise UserError(f"The recipe `{file}` is a folder; give a YAML file.{hint}") from None
    except FileNotFoundError:
        raise UserError(
            f"The recipe `{file}` does not exist. Give an axolotl recipe (YAML); "
            "`dwakd recipes list` shows those that come with dwakd."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe `{file}` cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"The recipe `{file}` is no valid YAML: {error}") from error
    # What PyYAML lets through where a value does not fit its tag (2024-99-99, !!int x, !!bool x).
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The recipe `{file}` has a value that YAML cannot read: {type(error).__name__}: "
            f"{error}. Look at its dates, its `!!` tags and how deep its brackets go."
        ) from error
    if not isinstance(recipe, dict):
        raise UserError(f"The recipe `{file}` holds no keys; give an axolotl recipe (YAML).")
    return recipe


def with_distillation(
    recipe: dict[str, Any], teacher: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The recipe with all that distillation needs, and what that changed, one line each.

    `teacher` overrides keys of `dwakd.teacher`. The recipe itself is left as it is.
    Raises UserError where neither names a teacher.
    """
    recipe, changes = dict(recipe), []
    block = recipe.get("dwakd")
    if not teacher and block is None and recipe.get("distillation") is None:
        raise UserError(
            "The recipe names no teacher. Give one with `--teacher ID` (a hub id or a folder), or "
            "add\n  distillation: dwakd\n  dwakd:\n    teacher:\n      base_model: <hub id or "
            "folder>"
        )
    if recipe.get("distillation") is None:
        # What a recipe that was written without a teacher may have, and distillation cannot.
        if block is None:
            if recipe.get("batch_flattening"):
                recipe["batch_flattening"] = False
                changes.append(
                    "batch_flattening is off: it cannot be paired with the teacher's rows, which "
                    "`sample_packing: true` can"
                )
            if recipe.pop("loss_watchdog_threshold", None):
                changes.append(
                    "loss_watchdog_threshold is left out: it is for a cross-entropy, and the whole "
                    "objective is larger"
                )
        recipe["distillation"] = "dwakd"
    if teacher and (block is None or isinstance(block, dict)):
        block = dict(block or {})
        own = block.get("teacher")
        own = {"base_model": own} if isinstance(own, str) else dict(own or {})
        if "base_model" in teacher and own.get("base_model") != teacher["base_model"]:
            own = {key: value for key, value in own.items() if key not in TEACHERS_OWN}
        block["teacher"] = own | teacher
        recipe["dwakd"] = block
    plugins = recipe.get("plugins") or []
    if isinstance(plugins, list) and PLUGIN not in plugins:
        recipe["plugins"] = [*plugins, PLUGIN]
    return recipe, changes


def _write_recipe(launch: Launch, source: Path) -> None:
    with explaining_writes("The output folder"):
        launch.file.parent.mkdir(parents=True, exist_ok=True)
        recipe = yaml.safe_dump(launch.recipe, sort_keys=False, allow_unicode=True)
        comment = f"# {source.name} as `dwakd train` gave it to axolotl.\n"
        replace_file(launch.file, comment + recipe)


# axolotl's command --------------------------------------------------------------------------


def _processes(launcher: str | None, processes: int | None) -> tuple[str, int, dict[str, str]]:
    """Launcher, number of processes (0: as many as the launcher chooses), and environment."""
    environment = dict(os.environ)
    environment.setdefault("AXOLOTL_DO_NOT_TRACK", "1")  # it hangs at exit where it is offline
    # axolotl looks for `accelerate` and `torchrun` in PATH: they must be this environment's.
    binaries = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([binaries, environment.get("PATH", os.defpath)])
    devices = 0 if launcher == "python" else _gpus()
    if launcher is None:
        several = devices > 1 if processes is None else processes > 1
        # Without a GPU, accelerate starts one process whatever number it is given.
        launcher = ("accelerate" if devices else "torchrun") if several else "python"
    if launcher == "python" and (processes or 1) > 1:
        raise UserError(
            f"--launcher python is one process, and --nproc asks for {processes}. Use `--launcher "
            "torchrun` or `accelerate`."
        )
    if launcher != "python" and not devices:
        environment["ACCELERATE_USE_CPU"] = "true"
    return launcher, 1 if launcher == "python" else processes or 0, environment


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _split(further: list[str]) -> tuple[list[str], list[str]]:
    """axolotl's arguments, and after a `--` the launcher's."""
    if "--" not in further:
        return further, []
    middle = further.index("--")
    return further[:middle], further[middle + 1 :]


def _overrides(
    arguments: list[str], recipe: dict[str, Any], file: Path, launcher: str
) -> dict[str, Any]:
    """The recipe's keys that axolotl's command-line options will set, by axolotl's own parser.

    Needed for the checks alone: the arguments are handed over as they are.
    """
    if not arguments:
        return {}
    import click
    from axolotl.cli.main import train as axolotl_train

    try:
        context = axolotl_train.make_context("axolotl train", [str(file), *arguments])
    except click.ClickException as error:
        raise UserError(f"axolotl does not take its arguments: {error.format_message()}") from error
    except click.exceptions.Exit:  # --help was printed
        raise SystemExit(0) from None
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    for name in ("launcher", "sweep", "cloud"):
        if name in given:
            raise UserError(
                f"--{name} is no argument to hand over: "
                + (
                    "give it before the `--`."
                    if name == "launcher"
                    else "`dwakd train` runs one recipe, here. Use `axolotl train` itself, with "
                    f"`plugins: [{PLUGIN}]` and the `dwakd:` block in the recipe."
                )
            )
    if context.args:
        raise UserError(
            f"axolotl does not know: {' '.join(context.args)}. Arguments of the launcher go after "
            "a second `--`."
        )
    del given["config"]
    return {
        name: yaml.safe_load(value) if isinstance(value, str) else value
        for name, value in given.items()
        if name in recipe or not recipe.get("strict")  # strict: axolotl drops the others
    }


def execute(
    command: list[str],
    environment: dict[str, str],
    stdout: Any = None,
    can_save: Callable[[], bool] = lambda: True,
    signals: Path | None = None,
) -> tuple[int, int | None]:
    """Runs a command to its end; returns its exit code and the signal that stopped it, if one did.

    SIGINT, SIGTERM and SIGHUP reach the command as SIGTERM, on which it saves a checkpoint first,
    as soon as there is anything to save; a second one kills it. Where the command starts
    several processes, `signals` is the folder for `dwakd_plugin.train.signals`: they are asked
    there to stop, and killed when one of them has left its message or as long as none can save.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(group: int) -> None:
        saves = can_save()
        what = "axolotl saves first" if saves else "there is nothing to save yet"
        print(f"\nStopping: {what}. Once more to kill it.", file=sys.stderr)
        if signals is not None:
            (signals / STOP).touch() if saves else _kill(group)
            return
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
            # What loads its rows must live until it has saved.
            (os.kill if saves else os.killpg)(group, signal.SIGTERM)

    def pass_on(number: int, frame: Any = None) -> None:
        received.append(number)
        if process is None:
            return
        if len(received) == 1:
            stop(process.pid)
        else:
            _kill(process.pid)

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in caught}
    try:
        # In a session of its own, Ctrl-C reaches it through `pass_on` alone, and once.
        process = subprocess.Popen(command, env=environment, stdout=stdout, start_new_session=True)
        if received:
            stop(process.pid)
        while (code := _wait(process, None if signals is None else 0.2)) is None:
            if signals is not None and (signals / MESSAGE).exists():
                _kill(process.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), (received[0] if received else None)


def _wait(process: subprocess.Popen[bytes], seconds: float | None) -> int | None:
    """A process's exit code, or None where it has not ended after so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


@contextlib.contextmanager
def _signals(launch: Launch) -> Iterator[Path | None]:
    """The folder for `dwakd_plugin.train.signals`, for a run of several processes on this machine.

    Of several machines each has its own command, so that none can speak for all.
    """
    launch.environment.pop(FOLDER, None)
    if launch.launcher == "python" or _on_several_machines(launch):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="dwakd-") as folder:
        launch.environment[FOLDER] = folder
        yield Path(folder)


def _kill(pid: int) -> None:
    """Kills a process and all it started: torchrun's workers have sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        # The launcher first: it would have a word to say on each of its workers.
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


# What is said -------------------------------------------------------------------------------


def _signature(launch: Launch) -> int | None:
    """When the plugin last signed the output folder, in nanoseconds."""
    file = launch.output / RUN_FILE
    return file.stat().st_mtime_ns if file.is_file() else None


def _on_several_machines(launch: Launch) -> bool:
    """Of them, only the first writes the output folder."""
    nodes = ("--nnodes", "--num_machines", "--rdzv", "--node_rank", "--machine_rank")
    return any(argument.startswith(nodes) for argument in launch.command)


def _how_to_go_on(launch: Launch, stopped_by: int) -> str:
    words = [f"Stopped by {signal.Signals(stopped_by).name}."]
    if any(launch.output.glob("*.safetensors")):
        words.append(f"The student as it was then is in {launch.output}.")
    if any(launch.output.glob("checkpoint-*/trainer_state.json")):
        words.append("`--resume` goes on from the last checkpoint.")
    else:
        words.append("There is no checkpoint to go on from.")
    return " ".join(words)


def _facts(launch: Launch) -> dict[str, Any]:
    teacher, recipe = launch.config.teacher, launch.recipe
    datasets = recipe.get("datasets") or []
    return {
        "student": recipe["base_model"],
        "adapter": recipe.get("adapter"),
        "teacher": teacher.base_model,
        "teacher_precision": "8 bit"
        if teacher.load_in_8bit
        else "4 bit"
        if teacher.load_in_4bit
        else teacher.dtype,
        "teacher_cache": teacher.cache,
        "datasets": [
            without_credentials(f"{data.get('path')} ({data.get('type')})") for data in datasets
        ],
        "output_dir": str(launch.output),
        "recipe": str(launch.file),
        "changes": launch.changes,
        "launcher": launch.launcher,
        "processes": launch.processes or "one a GPU",
        "command": launch.command,
    }


def _table(launch: Launch) -> Table:
    table = Table(title="What would run", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(launch).items():
        if name == "command":
            value = " ".join(["python", *value[1:]])
        elif isinstance(value, list):
            value = "\n".join(value)
        if value:
            table.add_row(name.replace("_", " "), str(value))
    return table
