"""Episodes begun without what the server does in vain.

Four fifths of a `load` go into making the objects of all 30 tasks and 7207 variations, to use those
of one. Here the same parts of the server are called in the same order, and of its 19 families of
tasks only those are made that the episode depends on: its own, and if that one draws random numbers
those that draw some before it. Whether this is so is asked of the server itself, by the state of
its random numbers; where it is not, or its insides are others, episodes are loaded as ever.
`tests/envs/test_scienceworld.py` compares the two, task by task.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

_TASKS = "scienceworld.tasks"
_DRAWING = (
    "ChangeOfState",
    "ElectricalConductivity2",
    "FindLivingNonLiving",
    "ChemistryMixPaint",
    "IdentifyLifeStages2",
    "MendelianGenetics1",
    "MendelianGenetics2",
    "UseInstrumentThermometer",
    "UseInstrumentThermometer2",
    "UseInstrumentThermometer3",
)
"""Families that draw random numbers when they are made, in the order in which the server makes
them."""


class QuickLoader:
    """Begins episodes in the worlds of one JVM."""

    def __init__(self, gateway: Any) -> None:
        """Py4JError when the server inside is built differently."""
        self._jvm = jvm = gateway.jvm
        self._random = self._object("scala.util.Random$")
        unsafe = self._class("sun.misc.Unsafe").getDeclaredField("theUnsafe")
        unsafe.setAccessible(True)
        self._unsafe = unsafe.get(None)
        self._maker_class = self._class(f"{_TASKS}.TaskMaker1")
        self._tasks_field = self._maker_class.getDeclaredField("tasks")
        self._tasks_field.setAccessible(True)
        self._no_gold = gateway.new_array(jvm.java.lang.String, 0)
        self._every_task: Any = None
        self._needed: dict[str, list[Any]] = {}

    def load(self, server: Any, task: str, variation: int, simplifications: str) -> bool:
        """Begin an episode in the world of `server`; False when it has to be loaded as ever.

        Py4JError, in the middle of it too, when the server is built differently.
        """
        if self._every_task is None:
            self._every_task = server.taskMaker()  # no quick load has replaced it yet
        if task not in self._needed:
            self._needed[task] = self._families(task)
        if not self._needed[task]:
            return False
        jvm = self._jvm
        jvm.util.UniqueIdentifier.reset()
        self._random.setSeed(variation)
        maker = self._maker(self._needed[task])
        self._random.setSeed(variation)
        world = jvm.scienceworld.environments.EnvironmentMaker.mkKitchenEnvironment(variation)
        universe, agent = world._1, world._2
        goals = maker.doTaskSetup(task, variation, universe, agent)._1
        if goals.isEmpty():
            return False
        acting = jvm.scienceworld.runtime.AgentInterface(
            universe, agent, goals.get(), simplifications
        )
        history = jvm.scienceworld.goldagent.RunHistory(
            task, 0, variation, acting.getTaskDescription(), simplifications, ""
        )
        some = jvm.scala.Some
        for name, value in {
            "taskStr": task,
            "taskVariationIdx": variation,
            "simplificationStr": simplifications,
            "errorStr": "",
            "errorUnknownEnvironment": False,
            "goldActionsStr": self._no_gold,
            "taskMaker": maker,
            "agent": some(agent),
            "agentInterface": some(acting),
            "currentHistory": history,
        }.items():
            getattr(server, f"{name}_$eq")(value)
        return True

    def _families(self, task: str) -> list[Any]:
        """What has to be made for `task`; nothing where that is not known."""
        known = self._every_task.getTask(task)
        if known.isEmpty():
            return []
        name = known.get().getClass().getSimpleName().removeprefix("Task")
        if name not in _DRAWING:
            family = self._family(name)
            return [family] if self._draws([family]) == self._draws([]) else []
        if not self._order_is_right:
            return []
        return [self._family(drawing) for drawing in _DRAWING[: _DRAWING.index(name) + 1]]

    @cached_property
    def _order_is_right(self) -> bool:
        """Whether the drawing families leave the random numbers where all of them do."""
        ours = self._draws([self._family(name) for name in _DRAWING])
        self._random.setSeed(0)
        self._jvm.scienceworld.tasks.TaskMaker1()
        return bool(self._random.nextLong() == ours)

    def _draws(self, families: list[Any]) -> int:
        """The random number that follows when they are made."""
        self._random.setSeed(0)
        self._maker(families)
        return int(self._random.nextLong())

    def _maker(self, families: list[Any]) -> Any:
        """A `TaskMaker1` with these; its constructor, which makes all of them, is not run."""
        maker = self._unsafe.allocateInstance(self._maker_class)
        self._tasks_field.set(maker, self._jvm.scala.collection.mutable.HashMap())
        for family in families:
            family.registerTasks(maker)
        return maker

    def _family(self, name: str) -> Any:
        return self._object(f"{_TASKS}.specifictasks.Task{name}$")

    def _class(self, name: str) -> Any:
        return self._jvm.java.lang.Class.forName(name)

    def _object(self, name: str) -> Any:
        """The one instance of a Scala object."""
        return self._class(name).getField("MODULE$").get(None)
