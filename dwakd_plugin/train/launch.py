"""What `dwakd train` starts: the recipe that axolotl gets, and the command of its launcher."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, replace_file
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.reading import PLUGIN
from dwakd_plugin.train.preflight import check_all
from dwakd_plugin.train.run_folder import RUN_FILE
from dwakd_plugin.train.signals import FOLDER

RECIPE_FILE = Path("dwakd") / "recipe.yml"  # within the output folder: what axolotl was given

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
    """What will run: the recipe for axolotl, and the command.

    `seen` is the recipe as axolotl will see it, with the options that its command line sets.
    """

    recipe: Recipe
    seen: Recipe
    launcher: str
    processes: int
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.seen.output_dir

    @property
    def file(self) -> Path:
        return self.output / RECIPE_FILE

    @property
    def on_several_machines(self) -> bool:
        """Of them, only the first writes the output folder."""
        nodes = ("--nnodes", "--num_machines", "--rdzv", "--node_rank", "--machine_rank")
        return any(argument.startswith(nodes) for argument in self.command)

    @property
    def signature(self) -> int | None:
        """When the plugin last signed the output folder, in nanoseconds."""
        file = self.output / RUN_FILE
        return file.stat().st_mtime_ns if file.is_file() else None

    def write_recipe(self, source: str) -> None:
        """The recipe's file for axolotl, which was made of `source`. Raises UserError."""
        with explaining_writes("The output folder"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            recipe = yaml.safe_dump(self.recipe.keys, sort_keys=False, allow_unicode=True)
            comment = f"# {source} as `dwakd train` gave it to axolotl.\n"
            replace_file(self.file, comment + recipe)


def prepare(
    recipe_file: Path,
    further: list[str],
    *,
    teacher: dict[str, Any],
    variant: str | None,
    data: Mapping[str, Any] | None = None,
    launcher: str | None,
    processes: int | None,
    resume: bool,
) -> Launch:
    """Everything before the start; `data` are keys that go before the recipe's own.

    Raises UserError with all that stands against it.
    """
    recipe = Recipe.read(recipe_file, teacher).but(**(data or {}))
    if variant is not None and isinstance(block := recipe.keys.get("dwakd"), dict):
        recipe = recipe.but(dwakd=block | {"variant": variant})
    if resume:
        recipe = recipe.but(auto_resume_from_checkpoints=True)
    launcher, processes, environment = _processes(launcher, processes)
    arguments, launcher_arguments = _split(further)
    seen = recipe.but(**_overrides(arguments, recipe, recipe_file))
    check_all(seen)
    secrets = [key for key in SECRETS if isinstance(recipe.keys.get(key), str)]
    environment |= {SECRETS[key]: recipe.keys[key] for key in secrets}
    told = [f"{key} goes to axolotl as {SECRETS[key]}, and into no file" for key in secrets]
    recipe = replace(recipe.but(*secrets), changes=(*recipe.changes, *told))
    if processes > 1:
        option = {"accelerate": "--num_processes", "torchrun": "--nproc_per_node"}[launcher]
        launcher_arguments = [option, str(processes), *launcher_arguments]
    file = str(seen.output_dir / RECIPE_FILE)
    command = [*axolotl_train(file, launcher), *arguments]
    if launcher_arguments:
        command += ["--", *launcher_arguments]
    return Launch(recipe, seen, launcher, processes, command, environment)


def _processes(launcher: str | None, processes: int | None) -> tuple[str, int, dict[str, str]]:
    """Launcher, number of processes (0: as many as the launcher chooses), and environment."""
    environment = axolotl_environment()
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


def axolotl_environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment, this process's unless it is given, with what axolotl needs of ours."""
    environment = dict(base)
    environment.setdefault("AXOLOTL_DO_NOT_TRACK", "1")  # it hangs at exit where it is offline
    # Threads of a CPU that wait for each other spin by default, and hold up whatever else runs.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # `python -m` puts the working folder first on the path: a user's `evaluate.py` there would be
    # imported instead of the library of that name.
    environment["PYTHONSAFEPATH"] = "1"
    # axolotl looks for `accelerate` and `torchrun` in PATH: they must be this environment's.
    binaries = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([binaries, environment.get("PATH", os.defpath)])
    return environment


def axolotl_train(recipe: str, launcher: str) -> list[str]:
    """The command that trains a recipe's file in this Python."""
    return [sys.executable, "-m", "axolotl.cli.main", "train", recipe, "--launcher", launcher]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _split(further: list[str]) -> tuple[list[str], list[str]]:
    """axolotl's arguments, and after a `--` the launcher's."""
    if "--" not in further:
        return further, []
    middle = further.index("--")
    return further[:middle], further[middle + 1 :]


def _overrides(arguments: list[str], recipe: Recipe, file: Path) -> dict[str, Any]:
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
                f"--{name} isn't an argument to hand over: "
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
        if name in recipe.keys or not recipe.keys.get("strict")  # strict: axolotl drops the others
    }


@contextlib.contextmanager
def signals_of(launch: Launch) -> Iterator[Path | None]:
    """The folder for `dwakd_plugin.train.signals`, for a run of several processes on this machine.

    Of several machines each has its own command, so that none can speak for all.
    """
    launch.environment.pop(FOLDER, None)
    if launch.launcher == "python" or launch.on_several_machines:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="dwakd-") as folder:
        launch.environment[FOLDER] = folder
        yield Path(folder)
