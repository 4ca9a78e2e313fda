"""`untwine play`: a person acts in an environment, with nothing between them and its text."""

from __future__ import annotations

import yaml
from rich.console import Console
from rich.table import Table

from untwine.envs.protocol import Env, EnvInfo
from untwine.envs.registry import get_catalogue, make_env
from untwine.errors import EnvError
from untwine.records import Observation

_HELP = {
    "/commands": "list the commands that are possible now",
    "/expert": "show the expert's commands for this instance",
    "/restart": "begin again",
    "/quit": "leave",
}


def play_session(name: str, task: str, variation: int, options: list[str]) -> None:
    """Play one instance on the terminal; without a task, list the tasks."""
    console = Console()
    chosen = _options(options)
    catalogue = get_catalogue(name, chosen)
    if not task:
        table = Table(title=f"tasks of {catalogue.info.title}")
        table.add_column("task")
        table.add_column("variations", justify="right")
        for known in catalogue.tasks():
            table.add_row(known, str(len(catalogue.variations(known))))
        console.print(table)
        return
    env = make_env(name, chosen)
    try:
        _Session(env, catalogue.info, console, task, variation).run()
    finally:
        env.close()


class _Session:
    def __init__(
        self, env: Env, info: EnvInfo, console: Console, task: str, variation: int
    ) -> None:
        self._env, self._info, self._console = env, info, console
        self._task, self._variation = task, variation
        self._steps = 0

    def run(self) -> None:
        self._begin()
        while True:
            try:
                line = self._console.input("[bold cyan]> [/bold cyan]").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._special(line)
            elif line:
                self._steps += 1
                observation = self._env.step(line)
                self._show(observation)
                if observation.done:
                    word = "solved" if observation.success else "failed"
                    self._console.print(f"[bold]{word}[/bold] after {self._steps} steps")
                    return

    def _begin(self) -> None:
        self._steps = 0
        goal, observation = self._env.reset(self._task, self._variation)
        self._console.print(goal, style="bold", markup=False)
        self._show(observation)
        self._console.print("(/help lists what else you can type)", style="dim")

    def _show(self, observation: Observation) -> None:
        self._console.print(observation.text, markup=False, highlight=False)
        note = f"score {observation.score:g}"
        if observation.invalid:
            note += f", not understood: {observation.invalid}"
        self._console.print(note, style="dim", markup=False)

    def _special(self, line: str) -> None:
        if line == "/commands" and self._info.lists_commands:
            self._console.print("\n".join(self._env.admissible()), markup=False)
        elif line == "/expert" and self._info.has_expert:
            plan = self._env.expert(self._task, self._variation)
            self._console.print("\n".join(plan or ["no plan is known"]), markup=False)
            self._begin()
        elif line == "/restart":
            self._begin()
        else:
            for command, meaning in _HELP.items():
                self._console.print(f"{command:10} {meaning}", markup=False)


def _options(pairs: list[str]) -> dict[str, object]:
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise EnvError(f"option {pair!r} is not of the form KEY=VALUE")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise EnvError(f"the value of option {pair!r} is not valid YAML") from error
    return options
