"""`Setup`: a model, how it is trained, and whether FSDP2 shards it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from offload_adam.layout.flat import ParameterSpec
from offload_adam.plan.inputs import Training
from offload_adam.plan.prediction import Prediction, predict


@dataclass(frozen=True, slots=True)
class Fsdp2:
    """How FSDP2 shards a model.

    replicate: copies of the parameters, each sharded over an equal part of the ranks (HSDP).
    offload_weights: the shards are in host memory (`CPUOffloadPolicy`).
    """

    replicate: int = 1
    offload_weights: bool = False


@dataclass(frozen=True)
class Setup:
    """The subject of a plan.

    specs: the trainable parameters. If `training` is sharded already, the parts of one rank.
    fsdp2: FSDP2 shards these parameters; None if it does not, or has already.
    rows: size of the first dimension of each parameter, along which FSDP2 shards it; None if only
        the number of parameters is known, and then all ranks have equal parts.
    """

    specs: Sequence[ParameterSpec]
    training: Training
    fsdp2: Fsdp2 | None = None
    rows: Sequence[int] | None = None

    def resolve(self) -> tuple[Sequence[ParameterSpec], Training]:
        """Return the parameters of one rank, and how they are trained.

        The rank is the first one, whose parts are the largest. The bytes of gathered layers are an
        estimate: those outside of layers and of two layers, and the gradients of one layer, which
        FSDP2 copies once.

        Raises:
            ValueError: the copies do not divide the ranks.
        """
        specs, training, fsdp2 = self.specs, self.training, self.fsdp2
        if fsdp2 is None:
            return specs, training
        num_shards, rest = divmod(training.world_size, fsdp2.replicate)
        if rest or num_shards == 0:
            raise ValueError(
                f"--replicate {fsdp2.replicate} does not divide the {training.world_size} rank(s): "
                "change it or --world-size"
            )
        numels = [spec.numel for spec in specs]
        rows = numels if self.rows is None else self.rows
        parts = []
        for spec, num_rows in zip(specs, rows, strict=True):
            # Whole rows: FSDP2 gives a stack of eight experts to eight ranks at most.
            share = -(-num_rows // num_shards)
            numel = -(-share * spec.numel // num_rows)
            parts.append(replace(spec, numel=numel, num_shards=fsdp2.replicate))
        shape = training.shape
        gathered = 0 if shape is None else shape.root_numel + 4 * shape.layer_numel
        return parts, replace(
            training,
            on_device=training.on_device and not fsdp2.offload_weights,
            sharded=True,
            reduces=False,
            gathered_nbytes=gathered * max(spec.itemsize for spec in specs),
            gathers_on_device=training.on_device,
            frozen_nbytes=-(-training.frozen_nbytes // num_shards),
        )

    def predict(self) -> Prediction:
        """Return the bytes of one rank."""
        return self._prediction

    @cached_property
    def _prediction(self) -> Prediction:  # of 1e12 parameters it takes 40 ms
        return predict(*self.resolve())

    def with_training(self, **changes: Any) -> Setup:
        """Return a copy whose training has changed fields."""
        return replace(self, training=replace(self.training, **changes))
