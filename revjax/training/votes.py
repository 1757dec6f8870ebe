"""How the processes of a run decide alike: each votes, and a program tells all the outcome."""

from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from revjax.training.mesh import batch_sharding, put


class Votes(NamedTuple):
    """What the processes ask for.

    Going into a program int32 `[devices]`, split over the mesh, where each process has put its own
    on its devices; coming out of it int32 `[]`, what they agree on.
    """

    stop: Any  # 1: a signal has come; one is enough
    pace: Any  # how many steps the next dispatch may have; the smallest counts


def cast(mesh: Mesh, stop: bool, pace: int = 1) -> Votes:
    """The votes of this process, with those of the others where it has them."""
    own = np.ones(mesh.size, np.int32)
    return put(Votes(own * stop, own * pace), batch_sharding(mesh))


def count(votes: Votes) -> Votes:
    """What all agree on, in a program."""
    return Votes(votes.stop.max(), votes.pace.min())
