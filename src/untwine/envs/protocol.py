"""What an environment must be: text in, text out.

An environment is usable alone, without model, trainer or pool:

    env = make_env("rooms")
    goal, observation = env.reset("fetch", 0)
    observation = env.step("go north")

Required: `reset`, `step`, `close`, and a catalogue of tasks. Everything else is optional and
declared in `EnvInfo`, so that callers ask before they use it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from untwine.records import Observation

Split = Literal["train", "dev", "test"]


class Reset(NamedTuple):
    """Start of an episode: the goal in words, and the first observation."""

    goal: str
    observation: Observation


@dataclass(frozen=True, slots=True)
class EnvInfo:
    """What an environment family offers.

    deterministic   the same commands give the same observations, so a run can be repeated exactly
    snapshots       `snapshot` and `restore` work; elsewhere a state is reached by sending the
                    commands again, which needs `deterministic`
    lists_commands  `admissible` works
    has_expert      `expert` works
    replans         `plan` works, and so do experts that err (wandering.py); needs `lists_commands`
    searches        `search` works: an expert that knows what it has read; needs `replans`
    remote          starts a heavy process of its own (a JVM): keep it in spawned workers
    inspecting      first words of commands that look without changing anything; looking twice is
                    a repeat, looking once is not a flaw (gcd/labels.py)
    blocked         commands an agent may never send
    title           what is acted in, as shown with results; by default the name of the family
    """

    name: str
    deterministic: bool
    snapshots: bool
    lists_commands: bool
    has_expert: bool
    replans: bool = False
    searches: bool = False
    remote: bool = False
    inspecting: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)


@runtime_checkable
class Catalogue(Protocol):
    """Which task instances an environment family has. Cheap: needs no running environment.

    Three more attributes are optional, and only the default split files (splits.py) read them:

    held_out_tasks         names of tasks that are not seen in training
    kin(task, variation)   what an instance is about; those with equal kin go to the same set
    fingerprint()          a checksum of which instances there are, where options choose them
    """

    @property
    def info(self) -> EnvInfo: ...

    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, in a fixed order."""

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        """Variation numbers of a task, of one split or of all. EnvError for an unknown task."""


@runtime_checkable
class Env(Protocol):
    """One live environment; holds at most one episode at a time."""

    def reset(self, task: str, variation: int) -> Reset:
        """Begin an episode. EnvError for an unknown task or a variation out of range."""

    def step(self, command: str) -> Observation:
        """Send one command. Never raises for a bad command: that is `Observation.invalid`."""

    def admissible(self) -> tuple[str, ...]:
        """Commands that are valid now (only where `EnvInfo.lists_commands`)."""

    def snapshot(self) -> Any:
        """The present state, to be given to `restore` (only where `EnvInfo.snapshots`). It can be
        pickled, and later steps leave it as it is."""

    def restore(self, snapshot: Any) -> Observation:
        """Return to a snapshot taken from any environment of this family with the same options,
        in this process or another. The state key is the same as when it was taken; so is what
        follows, where the environment is deterministic."""

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        """Commands that solve the instance, or None (only where `EnvInfo.has_expert`).
        May reset the environment: call it between episodes."""

    def close(self) -> None:
        """Free processes and files. Safe to call twice."""


@runtime_checkable
class Planner(Env, Protocol):
    """An environment whose expert can start anywhere (`EnvInfo.replans`)."""

    def plan(self) -> tuple[str, ...] | None:
        """Commands that solve the instance from the present state, or None when it is lost."""


ExpertKind = Literal["oracle", "search", "systematic"]
"""oracle knows everything; search knows what it has read, and looks for the rest at random;
systematic does so place after place, in order."""


class Due(NamedTuple):
    """The next command of an expert that searches, and whether it looks for what was not read of,
    so that other places were as good to look into."""

    command: str
    looks: bool


@runtime_checkable
class Searcher(Planner, Protocol):
    """An environment with an expert that knows no more than what it has read
    (`EnvInfo.searches`)."""

    def search(
        self,
        plan: Sequence[str],
        read: Sequence[str],
        said: Sequence[str],
        rng: random.Random | None,
    ) -> Due:
        """Its next command, given a plan from here, and the observations and commands of the
        episode so far. `rng` decides where to look for what was not read of; None: the order of the
        places does."""


class EnvFactory(Protocol):
    """Builds an environment from the `options` of its recipe section."""

    def __call__(self, options: Mapping[str, Any]) -> Env: ...


@dataclass(frozen=True, slots=True)
class EnvFamily:
    """An entry of the registry: how to list tasks, how to make an environment.

    catalogue      what there is without options
    catalogue_for  the catalogue of some options, when they change it
    """

    catalogue: Catalogue
    make: EnvFactory
    option_names: Sequence[str]
    catalogue_for: Callable[[Mapping[str, Any]], Catalogue] | None = None
