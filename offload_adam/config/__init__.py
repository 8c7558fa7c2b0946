"""The validated configuration of a run: YAML text and dotted overrides in, one frozen model out.

Nothing here imports torch, so that a mistake is reported before anything slow or shared starts.
"""

from offload_adam.config.load import dump_config, explain_config, load_config
from offload_adam.config.mistakes import ConfigError, Mistake
from offload_adam.config.run_config import RunConfig

__all__ = ["ConfigError", "Mistake", "RunConfig", "dump_config", "explain_config", "load_config"]
