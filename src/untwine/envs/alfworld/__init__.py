"""ALFWorld: household tasks in text, from a native engine that says what the real one says.

`engine.py` plays, `generate.py` makes games and `pack.py` holds the built-in ones, `game_file.py`
reads official ones, `stock.py` wraps the real engine (extra `alfworld`), `env.py` makes an
environment of them.
"""

from untwine.envs.alfworld.env import AlfWorldEnv, Catalogue, Options
from untwine.envs.protocol import EnvFamily

FAMILY = EnvFamily(
    catalogue=Catalogue(),
    make=AlfWorldEnv,
    option_names=tuple(Options.model_fields),
    catalogue_for=Catalogue,
)

__all__ = ["FAMILY"]
