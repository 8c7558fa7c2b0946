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
    # Okabe and Ito's palette for six of them. The others were searched for the largest distance
    # between any two, as seen with normal, protanopic and deuteranopic vision.
    "data": Phase(Resource.DATA, "#E69F00"),
    "forward": Phase(Resource.COMPUTE, "#0072B2"),
    "backward": Phase(Resource.COMPUTE, "#009E73"),
    "loss": Phase(Resource.COMPUTE, "#6AEB8A"),
    "pack": Phase(Resource.COPIES, "#FFB9FF"),
    "reduce": Phase(Resource.TRANSFERS, "#D55E00"),
    "agree": Phase(Resource.TRANSFERS, "#13CB68"),
    "all-reduce": Phase(Resource.TRANSFERS, "#5D0002"),
    "gather": Phase(Resource.TRANSFERS, "#CC79A7"),
    "D2H copy": Phase(Resource.COPIES, "#DED326"),
    "H2D copy": Phase(Resource.COPIES, "#1246BE"),
    "norm": Phase(Resource.UPDATE, "#4C198F"),
    "update": Phase(Resource.UPDATE, "#56B4E9"),
    "device update": Phase(Resource.UPDATE, "#0795FD"),
    "checkpoint wait": Phase(Resource.CHECKPOINTS, "#4C1647"),
    "update wait": Phase(Resource.UPDATE, "#80416D"),
    "wait previous": Phase(Resource.UPDATE, "#C263DB"),
    "edits": Phase(Resource.UPDATE, "#075545"),
    LATE: Phase(Resource.LATENESS, "#A8002A"),
}
"""Spans with other names are charged to no resource."""
EXPOSED = "exposed"
"""Time that the optimizer takes of the training thread."""
COLORS = {name: phase.color for name, phase in PHASES.items()} | {
    "step": "#737373",
    "other": "#C4C4C4",
    EXPOSED: "#000000",
}
"""The colors of charts by name; spans with other names have that of "other"."""

WAITS = frozenset({"update wait", "wait previous", "reduce", "norm"})
"""Spans in which the training thread may wait for another thread of its rank. If other threads work
meanwhile, the time is charged to the resources that they use."""
ENTERED_AND_WAITED = frozenset({"agree", "all-reduce"})
"""Collectives whose span begins when the rank enters the collective, and ends when it is over."""
