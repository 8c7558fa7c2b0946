"""The sizes of a model that its activations, and FSDP2's gathered layers, are estimated from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LOGIT_NBYTES = 8
"""Bytes of a logit beside itself: an fp32 copy for the loss, and the gradient of this copy."""
CONTEXT_NBYTES = 640 * 2**20
"""Estimate of what CUDA, cuBLAS and their workspaces take of a GPU in each process."""
COMMUNICATION_NBYTES = 512 * 2**20
"""Estimate of NCCL's buffers, with more than one rank."""

_WIDTH_PER_LAYER = 128  # of transformers between 1e9 and 1e12 parameters; GPT-3 has 12288 / 96
_VOCABULARY = 128_000


def saved_numel_of(matrices: Iterable[tuple[float, float]], width: int) -> int:
    """Return an estimate of the elements that a layer saves for its backward, for each token.

    They are the inputs and outputs of its matrix products, and two norms that compute in fp32. This
    assumes that attention saves no scores, as torch's `scaled_dot_product_attention` does. Inputs
    that products share are counted for each, which makes up for what activations and gates save.

    Args:
        matrices: rows and columns of each matrix.
        width: elements of a token between two layers.
    """
    return round(sum(rows + columns for rows, columns in matrices)) + 4 * width


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a transformer, or of another model with a list of layers.

    num_layers: number of layers that a token passes through.
    layer_numel: parameters of the largest layer.
    root_numel: parameters outside of layers, such as embeddings.
    width: elements of a token between two layers.
    saved_numel: elements that all layers save for their backward, for each token; see
        `saved_numel_of`. 0 if it is not known, and then there is no estimate of activations.
    largest_saved_numel: those of the layer that saves most.
    vocabulary: logits for each token; 0 if the model has none.
    itemsize: bytes of an element of an activation.
    is_typical: the sizes are those of a typical transformer with this number of parameters.
    """

    num_layers: int
    layer_numel: int
    root_numel: int
    width: int
    saved_numel: int
    largest_saved_numel: int
    vocabulary: int
    itemsize: int = 2
    is_typical: bool = False

    def activation_nbytes(self, num_tokens: int, *, checkpointing: bool) -> int:
        """Return an estimate of the bytes of activations at the end of a forward; 0 if unknown.

        Args:
            num_tokens: tokens of a microbatch.
            checkpointing: each layer saves its input alone, and one layer is recomputed at a time.
        """
        if not self.saved_numel:
            return 0
        saved = self.saved_numel
        if checkpointing:
            saved = self.num_layers * self.width + self.largest_saved_numel
        of_token = self.itemsize * (saved + self.vocabulary) + LOGIT_NBYTES * self.vocabulary
        return num_tokens * of_token

    def formula(self, *, checkpointing: bool) -> str:
        """Return the formula of `activation_nbytes` with this model's sizes."""
        layers = f"{self.saved_numel:,} elements of {self.num_layers} layers"
        if checkpointing:
            layers = (
                f"({self.num_layers} layers x {self.width:,} elements + "
                f"{self.largest_saved_numel:,} of one layer)"
            )
        of_logit = self.itemsize + LOGIT_NBYTES
        logits = f" + {self.vocabulary:,} logits x {of_logit} B" if self.vocabulary else ""
        return f"{layers} x {self.itemsize} B{logits}"

    @classmethod
    def transformer(
        cls,
        *,
        num_layers: int,
        width: int,
        mlp_width: int,
        kv_width: int,
        vocabulary: int,
        num_mlp_matrices: int = 3,
        tied: bool = False,
        itemsize: int = 2,
        is_typical: bool = False,
    ) -> ModelShape:
        """Return the shape of a decoder.

        Args:
            mlp_width: elements of a token within an MLP.
            kv_width: elements of a token's keys, and of its values.
            num_mlp_matrices: 3 for a gated MLP, 2 for another.
            tied: embedding and output share their matrix.
        """
        attention = [(width, width), (width, kv_width), (width, kv_width), (width, width)]
        matrices = [*attention, *[(width, mlp_width)] * num_mlp_matrices]
        saved = saved_numel_of(matrices, width)
        return cls(
            num_layers=num_layers,
            layer_numel=sum(rows * columns for rows, columns in matrices) + 2 * width,
            root_numel=(1 if tied else 2) * vocabulary * width + width,
            width=width,
            saved_numel=num_layers * saved,
            largest_saved_numel=saved,
            vocabulary=vocabulary,
            itemsize=itemsize,
            is_typical=is_typical,
        )

    @classmethod
    def typical(cls, numel: int, itemsize: int = 2) -> ModelShape:
        """Return the shape of a typical transformer with about `numel` parameters.

        Its layers have 12 * width**2 parameters, and it has a layer for each 128 of width.
        """
        width = max(1, round((numel * _WIDTH_PER_LAYER / 12) ** (1 / 3)))
        return cls.transformer(
            num_layers=max(1, round(width / _WIDTH_PER_LAYER)),
            width=width,
            mlp_width=4 * width,
            kv_width=width,
            vocabulary=min(_VOCABULARY, max(1, numel // (8 * width))),
            num_mlp_matrices=2,
            tied=True,
            itemsize=itemsize,
            is_typical=True,
        )

    @property
    def numel(self) -> int:
        """Number of parameters, if all layers have the size of the largest."""
        return self.num_layers * self.layer_numel + self.root_numel
