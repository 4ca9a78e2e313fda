"""Many episodes at once: slots in this process or in spawned workers.

A *slot* holds one live episode. `EnvPool.call` takes requests for distinct slots and returns one
reply for each, in order; workers act at the same time. A worker that dies or stays silent is
replaced, and every episode it held is answered with `Lost`: the caller begins it again (rollout.py
does, and counts it), so none is lost for good.
"""
