"""ScienceWorld: 30 science tasks in a simulated house, from the Java server of that name.

The extra `scienceworld` brings the server and a Java for it. The list of tasks needs
neither; Java starts with the first episode.
"""

from untwine.envs.protocol import EnvFamily
from untwine.envs.scienceworld.catalogue import ScienceWorldCatalogue
from untwine.envs.scienceworld.env import Options, ScienceWorldEnv

FAMILY = EnvFamily(
    catalogue=ScienceWorldCatalogue(),
    make=ScienceWorldEnv,
    option_names=tuple(Options.model_fields),
)

__all__ = ["FAMILY"]
