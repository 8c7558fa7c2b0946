"""The configuration of a run: a YAML file and command-line overrides, read as a `RunConfig`.

Nothing here imports torch, which takes seconds, so that mistakes are reported at once.
"""

from offload_adam.config.load import dump_config, explain_config, load_config
from offload_adam.config.mistakes import ConfigError, Mistake
from offload_adam.config.reference import explain_key, json_schema, keys_by_section
from offload_adam.config.sections import RunConfig

__all__ = [
    "ConfigError",
    "Mistake",
    "RunConfig",
    "dump_config",
    "explain_config",
    "explain_key",
    "json_schema",
    "keys_by_section",
    "load_config",
]
