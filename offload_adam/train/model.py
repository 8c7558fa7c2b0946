"""The job's model (the built-in GPT, or the user's), its loss, and its evaluation."""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from offload_adam.config import ConfigError, Mistake, RunConfig
from offload_adam.config.sections import ModelSection, ModelSizes, TrainSection
from offload_adam.coordinator.launcher import launched
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.startup import World
from offload_adam.fsdp_private import fsdp_groups
from offload_adam.torch_private import is_lazy
from offload_adam.train.data import (
    VOCABULARY_SIZE,
    Batch,
    ByteTokens,
    cut_batch,
    evaluation_starts,
)

logger = logging.getLogger(__name__)

_KEY = "model.factory"
_INIT_STD = 0.02  # GPT-2's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(config: RunConfig) -> nn.Module:
    """Return the model on the CPU, in the configured dtype, initialised from the run's seed.

    Raises:
        ConfigError: the user's factory is missing, fails, or does not return a module; or the
            module has no trainable parameter, or tensors that cannot be trained.
    """
    torch.manual_seed(config.run.seed)
    if config.model.sizes is not None:
        model: nn.Module = GPT(config.model.sizes, config.train.sequence_length)
    else:
        model = _call_factory(config.model)
    _reject_unready(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError.at(
            _KEY,
            "the model has no parameter that requires a gradient: set requires_grad on those that "
            "are to be trained",
        )
    return model.to(DTYPES[config.train.dtype])


def _call_factory(section: ModelSection) -> nn.Module:
    """Call the user's `package.module:function` with `model.arguments` as keywords.

    It must return an nn.Module that maps (batch, time) int64 tokens below 256 to floating-point
    (batch, time, vocabulary) logits, where the vocabulary is 256 or more.
    """
    factory = find_factory(str(section.factory))
    try:
        model = factory(**section.arguments)
    except (Exception, SystemExit) as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in section.arguments.items())
        text = f"{section.factory}({arguments}) failed: {_described(error)}"
        raise ConfigError.at(_KEY, text + _log_traceback(error)) from error
    if not isinstance(model, nn.Module):
        raise ConfigError.at(
            _KEY, f"{section.factory} must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def find_factory(spec: str) -> Callable[..., Any]:
    """Import the function that `package.module:function` names, also from the working folder.

    Raises:
        ConfigError: the module or the function is missing, or the import fails. The traceback of an
            error in the user's code is logged.
    """
    module_name, _, function_name = spec.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python -m` adds it, the console script does not
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and _leads_to(error.name, module_name):
            problem = (
                f"there is no module {error.name}: put it into the working directory, {os.getcwd()}"
                ", or add its folder to PYTHONPATH"
            )
            raise ConfigError.at(_KEY, problem) from error
        text = f"cannot import {module_name}: {_described(error)}"
        raise ConfigError.at(_KEY, text + _log_traceback(error)) from error
    try:
        function: Callable[..., Any] = attrgetter(function_name)(found)
    except AttributeError as error:
        nearest = difflib.get_close_matches(function_name, dir(found), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        place = getattr(found, "__file__", None) or "built in"
        problem = f"{module_name} ({place}) has no function {function_name}{hint}"
        raise ConfigError.at(_KEY, problem) from error
    if not callable(function):
        raise ConfigError.at(_KEY, f"{spec} is not a function: it is a {type(function).__name__}")
    return function


def _leads_to(missing: str | None, module_name: str) -> bool:
    """Return whether a missing module is the wanted one or one of its packages.

    Any other missing module is one that the user's code imports.
    """
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")


def _log_traceback(error: BaseException) -> str:
    """Log the part of a traceback that is in the user's code; return what to say about it.

    Returns "" if the error comes from the call itself, such as one with wrong arguments.
    """
    own = error.__traceback__
    while own is not None and _is_not_the_users(own.tb_frame.f_code.co_filename):
        own = own.tb_next
    if own is None and not isinstance(error, SyntaxError):
        return ""
    if launched("LOCAL_RANK") == 0:  # the same on all ranks
        logger.error("model.factory raised an error:", exc_info=(type(error), error, own))
    return ". The error is in your own code: see the traceback above"


def _is_not_the_users(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")


def _reject_unready(model: nn.Module) -> None:
    """Reject parameters and buffers that are lazy, on the meta device, or complex.

    Meta tensors are accepted if meta is the default device: a plan builds the model there.
    """
    problems: dict[str, list[str]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        problem = _problem_of(tensor)
        if problem is not None:
            problems.setdefault(problem, []).append(name)
    mistakes = []
    for problem, names in problems.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        mistakes.append(Mistake(_KEY, f"{', '.join(names[:3])}{more}: {problem}"))
    if mistakes:
        raise ConfigError("configuration", mistakes)


def _problem_of(tensor: torch.Tensor) -> str | None:
    """Return why a parameter or buffer cannot be trained and what to do, or None."""
    if is_lazy(tensor):
        return (
            "no shape yet, because the module is lazy; call the model once in the factory, such as "
            "model(torch.zeros(1, 8, dtype=torch.int64))"
        )
    if tensor.is_meta and torch.get_default_device().type != "meta":
        return (
            "no values, because the tensor is on the meta device; call "
            "model.to_empty(device='cpu') in the factory, then initialize the tensors"
        )
    if tensor.is_complex():
        return (
            "complex numbers, which cannot be trained; store torch.view_as_real of the tensor, and "
            "use torch.view_as_complex in the forward"
        )
    return None


def _described(error: BaseException) -> str:
    """Return the error and, unless the import system itself raised it, where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}"
    if place.filename.startswith("<frozen importlib"):
        return text
    return f"{text} ({place.filename}, line {place.lineno})"


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean cross entropy in nats a token, 0-d, in fp32 for any dtype of the model.

    Raises:
        ConfigError: the model does not return (batch, time, vocabulary) logits.
    """
    logits: object = model(batch.inputs)
    if (
        not isinstance(logits, torch.Tensor)
        or logits.dim() != 3
        or logits.shape[:2] != batch.inputs.shape
        or logits.shape[2] < VOCABULARY_SIZE
        or not logits.is_floating_point()
    ):
        got = type(logits).__name__
        if isinstance(logits, torch.Tensor):
            got = f"{logits.dtype} of shape {tuple(logits.shape)}"
        batch_size, time = batch.inputs.shape
        raise ConfigError.at(
            _KEY,
            "the model must return floating-point logits of shape "
            f"({batch_size}, {time}, {VOCABULARY_SIZE} or more), got {got}",
        )
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, tokens: ByteTokens, train: TrainSection, world: World) -> float:
    """Return the mean loss in nats a token over `eval_sequences` sequences. Collective.

    The sequences are distributed over the ranks, and the mean is over those of all ranks. It is the
    same for any number of ranks. Each rank runs the same number of forwards, because that of a
    sharded model is collective.

    Args:
        model: not its DistributedDataParallel wrapper. That broadcasts buffers in its forward, and
            some ranks may have one batch more than others.
        tokens: the validation split.
    """
    starts = evaluation_starts(tokens.size, train.sequence_length, train.eval_sequences)
    own = starts[world.data_rank :: world.data_world_size]
    most = -(-len(starts) // world.data_world_size)  # sequences of a rank
    total = torch.zeros(2, dtype=torch.float64, device="cpu")  # sum of losses, number of sequences
    was_training = model.training
    model.eval()
    for first in range(0, most, train.batch_size):
        chosen = own[first : first + train.batch_size]
        used = chosen if len(chosen) > 0 else starts[:1]
        batch = cut_batch(tokens, used, train.sequence_length).to(world.device)
        loss = next_token_loss(model, batch)
        if len(chosen) > 0:
            total[0] += loss.item() * len(chosen)
            total[1] += len(chosen)
        PROGRESS.move()  # so that peers do not declare this rank hung during a long evaluation
    # Without a backward, FSDP2 keeps the root gathered. The model would show whole parameters to a
    # checkpoint.
    for group in fsdp_groups():
        group.reshard()
    model.train(was_training)
    world.ranks.all_reduce(total)
    return float(total[0] / total[1])


_PROJECTIONS = ("query", "key", "value")


class Attention(nn.Module):
    """Causal self-attention over (batch, time, width)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Each (batch, heads, time, head width). Tensor parallelism gives a rank some heads only.
        query, key, value = (
            part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in self._project(x)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def split_projection(self) -> None:
        """Store the weights of query, key and value apart, so that a rank can have some heads.

        A third of the rows of `query_key_value` is not a whole number of heads of each.
        """
        for name, rows in zip(_PROJECTIONS, self.query_key_value.weight.chunk(3), strict=True):
            layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(rows.detach().clone())
            setattr(self, name, layer)
        del self.query_key_value

    def _project(self, x: torch.Tensor) -> Iterable[torch.Tensor]:
        if hasattr(self, "query_key_value"):
            return self.query_key_value(x).chunk(3, dim=-1)  # type: ignore[no-any-return]
        return [getattr(self, name)(x) for name in _PROJECTIONS]


class Block(nn.Module):
    """A transformer block: pre-norm attention and GELU MLP, both added to the residual stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_input = nn.Linear(width, 4 * width)
        self.mlp_output = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_output(F.gelu(self.mlp_input(self.mlp_norm(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Maps (batch, time) int64 bytes to (batch, time, 256) logits of the next byte.

    max_length: the longest time; each position has its own embedding.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
    """

    def __init__(self, sizes: ModelSizes, max_length: int) -> None:
        super().__init__()
        width = sizes.width
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, sizes.num_heads) for _ in range(sizes.num_layers))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY_SIZE, bias=False)
        if sizes.tied_head:
            self.head.weight = self.token_embedding.weight
        self._init_weights()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], dtype=torch.int64, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))  # type: ignore[no-any-return]

    def _init_weights(self) -> None:
        """Draw matrices from a normal distribution; biases start at zero.

        Its standard deviation is 0.02, and smaller for matrices that write to the residual stream.

        The residual stream sums the output of two matrices per block, so their scale is divided by
        the square root of the number of these matrices, as in GPT-2.
        """
        residual_std = _INIT_STD / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                writes_residual = name.endswith(("attention.output.weight", "mlp_output.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else _INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
