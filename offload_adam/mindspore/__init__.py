"""Adam as the documentation of MindSpore specifies it: arguments, groups, schedules."""

from offload_adam.mindspore.adam import Adam

__all__ = ["Adam"]
