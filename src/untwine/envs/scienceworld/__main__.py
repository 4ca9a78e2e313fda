"""`python -m untwine.envs.scienceworld` writes catalogue.json from the installed server."""

from __future__ import annotations

import json

from untwine.envs.scienceworld.catalogue import CATALOGUE_FILE, ask_server
from untwine.envs.scienceworld.jvm import get_jvm, package_version


def write_catalogue() -> None:
    """Write `catalogue.json` anew. EnvError without Java."""
    tree = {"scienceworld": package_version(), "tasks": ask_server(get_jvm().new_server())}
    CATALOGUE_FILE.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_catalogue()
