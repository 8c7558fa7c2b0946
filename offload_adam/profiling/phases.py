"""The phases of a step: for the name of each span, the resource that it uses and its color."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Resource(Enum):
    """What the training thread spends time on."""

    COMPUTE = "the model's forward and backward"
    UPDATE = "the norm and the update"
    COPIES = "copies between host and device"
    LATENESS = "waiting for late ranks"
    TRANSFERS = "transfers between ranks"
    CHECKPOINTS = "waiting for a checkpoint that is being written"
    DATA = "reading the data"


BETWEEN_RANKS = (Resource.LATENESS, Resource.TRANSFERS)
"""Time between ranks, which less frequent collectives save. A diagnosis adds both up."""


class Phase(NamedTuple):
    """The resource that is charged with a span's time, and the color of its bars."""

    resource: Resource
    color: str


STEP = "train step"
"""The span of a whole step, which encloses all other spans of the training thread. In place of a
bucket it has the step's number."""
LATE = "late rank"
"""The part of a wait during which another rank is late. In place of a bucket it has that rank."""

PHASES = {
    # Okabe and Ito's palette, which color-blind readers can tell apart; shades of one color for one
    # resource.
    "data": Phase(Resource.DATA, "#E69F00"),
    "forward": Phase(Resource.COMPUTE, "#0072B2"),
    "backward": Phase(Resource.COMPUTE, "#009E73"),
    "loss": Phase(Resource.COMPUTE, "#8BC9B4"),
    "pack": Phase(Resource.COPIES, "#F2D29B"),
    "reduce": Phase(Resource.TRANSFERS, "#D55E00"),
    "agree": Phase(Resource.TRANSFERS, "#F0A875"),
    "all-reduce": Phase(Resource.TRANSFERS, "#F7CDB0"),
    "gather": Phase(Resource.TRANSFERS, "#CC79A7"),
    "D2H copy": Phase(Resource.COPIES, "#C9B400"),
    "H2D copy": Phase(Resource.COPIES, "#F0E442"),
    "norm": Phase(Resource.UPDATE, "#A9D8F5"),
    "update": Phase(Resource.UPDATE, "#56B4E9"),
    "device update": Phase(Resource.UPDATE, "#86C9EF"),
    "checkpoint wait": Phase(Resource.CHECKPOINTS, "#7F6A5A"),
    "update wait": Phase(Resource.UPDATE, "#D8E8F2"),
    "wait previous": Phase(Resource.UPDATE, "#BFD9E8"),
    "edits": Phase(Resource.UPDATE, "#9DB8C7"),
    LATE: Phase(Resource.LATENESS, "#B2182B"),
}
"""Spans with other names are charged to no resource."""

WAITS = frozenset({"update wait", "wait previous", "reduce", "norm"})
"""Spans in which the training thread may wait for another thread of its rank. If other threads work
meanwhile, the time is charged to the resources that they use."""
ENTERED_AND_WAITED = frozenset({"agree", "all-reduce"})
"""Collectives whose span begins when the rank enters the collective, and ends when it is over."""
