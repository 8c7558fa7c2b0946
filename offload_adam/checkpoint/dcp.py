"""The optimizer state for `torch.distributed.checkpoint` (DCP).

    state = {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}
    dcp.save(state, checkpoint_id="folder")
    dcp.load(state, checkpoint_id="folder")  # in any world size, directly into the state

torch writes and reads these files. Unlike `save_checkpoint`, DCP pickles metadata and all values
that are not tensors, casts silently on load, and does not commit a save by one rename.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from offload_adam.checkpoint.encoding import encode
from offload_adam.checkpoint.format import FORMAT_VERSION, decoded_optimizer
from offload_adam.checkpoint.optimizer_access import (
    ParameterNames,
    check_optimizer,
    locked,
    plain_state,
    plan_plain_state,
)
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.state_shard import BoxTensor, memory_order, range_sources, shards_of


class OptimizerState:
    """An optimizer as torch's `Stateful`, for `dcp.save` and `dcp.load`.

    It holds no weights: save the model's state dict too. Parameters are identified by their names
    in the model, so the world size may change.
    """

    def __init__(self, model: nn.Module, optimizer: ShardedOptimizer) -> None:
        check_optimizer(optimizer)
        self._name_of = ParameterNames(model)
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's boxes, which are views of the state, and all other state as JSON."""
        with locked(self._optimizer):
            core = self._optimizer._settled()
            # dcp.load writes into these boxes, which a background checkpoint may still read.
            core.external_edits.wait_for_snapshot()
            plain = encode(plain_state(self._optimizer, core, self._name_of), "optimizer")
            state: dict[str, dict[str, BoxTensor]] = {}
            for shard in shards_of(core.states):
                shape, order = shard.parameter.shape, memory_order(shard.parameter)
                state[self._name_of(shard.parameter)] = {
                    key: BoxTensor(
                        shape, plane.dtype, range_sources(shape, order, shard.start, plane)
                    )
                    for key, plane in shard.planes.items()
                }
            text = plain_text(core.num_steps, FORMAT_VERSION, plain)
        return {"state": state, "plain": text}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state that is not tensors. `dcp.load` has already read the boxes in place.

        Raises:
            CheckpointError: groups or parameters differ.
        """
        values = json.loads(state_dict["plain"])
        plain = decoded_optimizer(values["optimizer"], values.get("format_version", 2))
        with locked(self._optimizer):
            core = self._optimizer._settled()
            plan_plain_state(self._optimizer, core, plain, self._name_of)()
            self._optimizer.num_steps = values["num_steps"]
            self._optimizer.refresh_master()


def plain_text(num_steps: int, format_version: int, plain: Mapping[str, Any]) -> str:
    """Return the state that is not tensors as JSON.

    Args:
        format_version: of the encoding of `plain`, see `decoded_optimizer`.
    """
    values = {"format_version": format_version, "num_steps": num_steps, "optimizer": plain}
    return json.dumps(values, allow_nan=False)
