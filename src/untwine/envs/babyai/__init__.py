"""BabyAI as text: the gridworld levels of minigrid, told in words.

The extra `babyai` brings minigrid. The list of tasks needs nothing.
"""

from untwine.envs.babyai.catalogue import CATALOGUE
from untwine.envs.babyai.env import make
from untwine.envs.protocol import EnvFamily

FAMILY = EnvFamily(CATALOGUE, make, ("view",))

__all__ = ["FAMILY"]
