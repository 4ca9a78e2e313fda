"""Episodes begun without what the server does in vain.

Four fifths of a `load` go into making the objects of all 30 tasks and 7207 variations, to use those
of one. Here the same parts of the server are called in the same order, with the one family of tasks
registered that the episode needs. `tests/envs/test_scienceworld.py` compares the two, task by task.

A family is taken only if making its tasks draws no random numbers, as else what it makes would
depend on the families made before it. The others, and servers with other insides, are loaded as
ever.
"""

from __future__ import annotations

from typing import Any

_TASKS = "scienceworld.tasks"


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
        self._every_task: Any = None
        self._no_gold = gateway.new_array(jvm.java.lang.String, 0)
        self._families: dict[str, Any] = {}

    def load(self, server: Any, task: str, variation: int, simplifications: str) -> bool:
        """Begin an episode in the world of `server`; False when it has to be loaded as ever.

        Py4JError, in the middle of it too, when the server is built differently.
        """
        if self._every_task is None:
            self._every_task = server.taskMaker()  # no quick load has replaced it yet
        if task not in self._families:
            self._families[task] = self._family(task)
        family = self._families[task]
        if family is None:
            return False
        jvm = self._jvm
        jvm.util.UniqueIdentifier.reset()
        self._random.setSeed(variation)
        maker = self._maker(family)
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

    def _family(self, task: str) -> Any | None:
        """What registers `task` and its like; None for an unknown task, and where random numbers
        are drawn."""
        known = self._every_task.getTask(task)
        if known.isEmpty():
            return None
        name = known.get().getClass().getName()
        family = self._object(f"{name}$")
        self._random.setSeed(0)
        untouched = self._random.nextLong()
        self._random.setSeed(0)
        self._maker(family)
        return family if self._random.nextLong() == untouched else None

    def _maker(self, family: Any) -> Any:
        """A `TaskMaker1` with one family; its constructor, which makes all of them, is not run."""
        maker = self._unsafe.allocateInstance(self._maker_class)
        self._tasks_field.set(maker, self._jvm.scala.collection.mutable.HashMap())
        family.registerTasks(maker)
        return maker

    def _class(self, name: str) -> Any:
        return self._jvm.java.lang.Class.forName(name)

    def _object(self, name: str) -> Any:
        """The one instance of a Scala object."""
        return self._class(name).getField("MODULE$").get(None)
