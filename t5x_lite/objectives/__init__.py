"""The table of objectives: a new one is a function and a row."""

import dataclasses
from collections.abc import Callable

from t5x_lite.objectives import denoising


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        make: (tokens_BT int32, rng: Draws, vocab, **knobs) -> Pair.
        structures: the structures (layouts) that the objective can train.
        lengths: (inputs_length, **knobs) -> (raw, inputs, targets) lengths in tokens.
    """

    make: Callable
    structures: frozenset[str]
    lengths: Callable[..., tuple[int, int, int]]


OBJECTIVES = {
    "span_corruption": Objective(
        make=denoising.span_corruption,
        structures=frozenset({"encoder_decoder"}),
        lengths=denoising.span_corruption_lengths,
    ),
}
