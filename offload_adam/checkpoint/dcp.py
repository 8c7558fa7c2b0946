"""The optimizer state for `torch.distributed.checkpoint` (DCP).

    state = {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}
    dcp.save(state, checkpoint_id="folder")
    dcp.load(state, checkpoint_id="folder")  # in any world size, directly into the state

torch writes and reads these files. Unlike `save_checkpoint`, DCP pickles its metadata and all
values that are not tensors, casts silently on load, and does not commit a save by one rename.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from offload_adam.checkpoint.format import (
    FORMAT_VERSION,
    PlainState,
    decoded_optimizer,
    validated,
    without_repetition,
)
from offload_adam.checkpoint.optimizer_access import (
    ParameterNames,
    check_optimizer,
    locked,
    plain_state,
    plan_plain_state,
)
from offload_adam.encoding import encode
from offload_adam.errors import CheckpointError
from offload_adam.memory.codes import CodedMoment, values_of
from offload_adam.printable import show
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.load_plan import copy_all
from offload_adam.state.state_shard import BoxTensor, box_sources, shards_of


class OptimizerState:
    """An optimizer as torch's `Stateful`, for `dcp.save` and `dcp.load`.

    It holds no parameters: save the model's state dict too. State is saved under the parameters'
    names in the model, so the world size may change between save and load.
    """

    def __init__(self, model: nn.Module, optimizer: ShardedOptimizer) -> None:
        check_optimizer(optimizer)
        self._model = model
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the state. `dcp.load` writes into it in place.

        Returns:
            "state": parameter name -> key -> `BoxTensor`, whose boxes are views of the state. Those
            of a moment in codes are copies of its values, which `load_state_dict` encodes.
            "plain": all state except tensors, as JSON.
        """
        with locked(self._optimizer):
            core = self._optimizer._settled()
            # dcp.load overwrites this memory, which a background checkpoint may still read.
            core.external_edits.before_writing()
            name_of = ParameterNames(self._model, core)
            plain = encode(plain_state(self._optimizer, core, name_of), "optimizer")
            state: dict[str, dict[str, BoxTensor]] = {}
            for shard in shards_of(core.states):
                # All ranks list their boxes, counted or not: `dcp.load` reads into them, and
                # `dcp.save` writes equal boxes once.
                shape, order, boxes = shard.parameter.shape, shard.order, shard.boxes()
                entry = state[name_of(shard.parameter)] = {}
                for key, plane in shard.planes.items():
                    values = values_of(plane)
                    sources = box_sources(shape, order, boxes, values)
                    entry[key] = BoxTensor(shape, values.dtype, sources, values)
            text = plain_text(core.num_steps, FORMAT_VERSION, plain)
        return {"state": state, "plain": text}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load all state except tensors that `dcp.load` has already read in place.

        Raises:
            CheckpointError: parameter groups or parameters differ from those of this optimizer, or
                the state is damaged.
        """
        saved = _read_plain(state_dict)
        plain = decoded_optimizer(saved.optimizer.model_dump(), saved.format_version)
        with locked(self._optimizer):
            core = self._optimizer._settled()
            name_of = ParameterNames(self._model, core)
            for shard in shards_of(core.states):
                name = name_of(shard.parameter)
                saved_format = saved.optimizer.format_of(name)
                if saved_format != shard.state_format:
                    raise CheckpointError(
                        f"The state of {name!r} was saved with state_format={saved_format!r}, but "
                        f"this optimizer stores it with {shard.state_format!r}. Construct the "
                        "optimizer with the saved format."
                    )
            load_plain = plan_plain_state(self._optimizer, core, plain, name_of)
            core.external_edits.before_writing()
            copies = (
                (plane, state_dict["state"][name_of(shard.parameter)][key].local)
                for shard in shards_of(core.states)
                for key, plane in shard.planes.items()
                if isinstance(plane, CodedMoment)
            )
            copy_all(copies, had_codes=True)
            load_plain()
            self._optimizer.num_steps = saved.num_steps
            self._optimizer.refresh_master()


def _read_plain(state_dict: Mapping[str, Any]) -> PlainState:
    text = state_dict.get("plain")
    if not isinstance(text, str):
        raise CheckpointError(
            f"The saved optimizer has no text under 'plain', but {show(text)}. Load a folder that "
            "was saved with OptimizerState."
        )
    try:
        values = json.loads(text, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The saved optimizer is not valid JSON: {error}.") from error
    return validated(PlainState, values, "The saved optimizer")


def plain_text(num_steps: int, format_version: int, plain: Mapping[str, Any]) -> str:
    """Return an optimizer's state except tensors as JSON.

    Args:
        num_steps: steps of the optimizer.
        format_version: the version of the checkpoint format in which `plain` is encoded.
        plain: a `format.OptimizerEntry` as a dict.
    """
    values = {"format_version": format_version, "num_steps": num_steps, "optimizer": plain}
    return json.dumps(values, allow_nan=False)
