"""The table of objectives: a new one is a function and a row."""

import dataclasses
from collections.abc import Callable

from t5x_lite.objectives import bart, denoising, entities, lm, masking, pairs, pseudo


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        make: (tokens_BT int32 or Passages, rng: Draws, vocab, **knobs) -> Pair or
            Example.
        structures: the structures (layouts) that the objective can train.
        lengths: (inputs_length, **knobs) -> (raw, inputs, targets) lengths in tokens.
        kind: what `make` returns: "pair" or "example".
        source: what `make` gets: "tokens" (windows of the store) or "passages".
    """

    make: Callable
    structures: frozenset[str]
    lengths: Callable[..., tuple[int, int, int]]
    kind: str = "pair"
    source: str | Callable[[dict], str] = "tokens"

    def reads(self, knobs: dict) -> str:
        """`source`, which may depend on the knobs."""
        return self.source if isinstance(self.source, str) else self.source(knobs)


# Text in, text out; those that keep what they hide also predict it in place.
TEXT_TO_TEXT = frozenset({"encoder_decoder", "prefix_lm", "decoder"})
ANY = TEXT_TO_TEXT | {"encoder", "permuted"}
ENCODER_DECODER = frozenset({"encoder_decoder"})
ENCODER = frozenset({"encoder"})


def _by_sentences(knobs: dict) -> str:
    return "tokens" if knobs.get("sentence", "none") == "none" else "passages"


OBJECTIVES = {
    "span_corruption": Objective(
        denoising.span_corruption, ANY, denoising.span_corruption_lengths
    ),
    "iid_denoising": Objective(
        denoising.iid_denoising, ANY, denoising.iid_denoising_lengths
    ),
    "drop_tokens": Objective(
        denoising.drop_tokens, TEXT_TO_TEXT, denoising.drop_tokens_lengths
    ),
    "ul2": Objective(pairs.ul2, TEXT_TO_TEXT, pairs.ul2_lengths),
    "prefix_lm": Objective(pairs.prefix_lm, TEXT_TO_TEXT, pairs.prefix_lm_lengths),
    "deshuffling": Objective(
        pairs.deshuffling, TEXT_TO_TEXT, pairs.deshuffling_lengths
    ),
    "bart": Objective(bart.bart, TEXT_TO_TEXT, bart.bart_lengths),
    "mass": Objective(pairs.mass, ENCODER_DECODER, pairs.mass_lengths),
    "prophetnet": Objective(
        pairs.prophetnet, ENCODER_DECODER, pairs.prophetnet_lengths
    ),
    "masked_lm": Objective(
        masking.masked_lm, ENCODER, masking.masked_lm_lengths, "example", _by_sentences
    ),
    "masked_lm_entities": Objective(
        entities.masked_lm_entities,
        ENCODER,
        masking.masked_lm_lengths,
        "example",
        _by_sentences,
    ),
    "causal_lm": Objective(
        lm.causal_lm, frozenset({"decoder"}), lm.causal_lm_lengths, "example"
    ),
    "permuted_lm": Objective(
        lm.permuted_lm, frozenset({"permuted"}), lm.permuted_lm_lengths, "example"
    ),
    "unilm": Objective(lm.unilm, ENCODER, lm.unilm_lengths, "example"),
    "pseudo_masked": Objective(
        pseudo.pseudo_masked, ENCODER, pseudo.pseudo_masked_lengths, "example"
    ),
    "span_flow": Objective(
        pseudo.span_flow,
        frozenset({"prefix_lm"}),
        pseudo.span_flow_lengths,
        "example",
    ),
}
