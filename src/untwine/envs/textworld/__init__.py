"""TextWorld: text adventures made to measure, played by the real engine.

The extra `textworld` brings generator and engine (Côté et al., arXiv 1806.11532). The
list of tasks needs nothing; a game is made when it is first asked for, and kept on disk.
"""

from untwine.envs.protocol import EnvFamily
from untwine.envs.textworld.catalogue import CATALOGUE
from untwine.envs.textworld.env import Options, TextWorldEnv

FAMILY = EnvFamily(CATALOGUE, TextWorldEnv, tuple(Options.model_fields))

__all__ = ["FAMILY"]
