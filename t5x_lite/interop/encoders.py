"""Names of BERT's kin: BERT, ERNIE, NEZHA, RoBERTa, ALBERT, ELECTRA."""

from t5x_lite.interop.tables import (
    HEADS_IN,
    HEADS_OUT,
    Row,
    Rows,
    Table,
    dense,
    norm,
    under,
)

# Buffers of older releases, and BERT's pooler in models without a class.
UNUSED = (r".*embeddings\.position_ids", r"\w+\.pooler\..*")

EMBEDDINGS: Rows = {
    "embedding": Row("embeddings.word_embeddings.weight"),
    "inputs/positions": Row("embeddings.position_embeddings.weight"),
    "inputs/types": Row("embeddings.token_type_embeddings.weight"),
    **norm("inputs/norm", "embeddings.LayerNorm"),
}
BLOCK: Rows = {
    **dense("attention/query", "attention.self.query", HEADS_IN),
    **dense("attention/key", "attention.self.key", HEADS_IN),
    **dense("attention/value", "attention.self.value", HEADS_IN),
    **dense("attention/out", "attention.output.dense", HEADS_OUT),
    **norm("attention_norm", "attention.output.LayerNorm"),
    **dense("mlp/up", "intermediate.dense"),
    **dense("mlp/down", "output.dense"),
    **norm("mlp_norm", "output.LayerNorm"),
}
STACK = under("blocks/", "encoder.layer.{i}.", BLOCK)
BODY = EMBEDDINGS | under("stack/", "", STACK)


def bert(name: str) -> Table:
    """BERT, and what has its names under another prefix (`BertForPreTraining` ...)."""
    rows = under("", f"{name}.", BODY) | {
        **dense("output/transform", "cls.predictions.transform.dense"),
        **norm("output/norm", "cls.predictions.transform.LayerNorm"),
        "output/bias": Row("cls.predictions.bias"),
        "output/kernel": Row("cls.predictions.decoder.weight"),
        **dense("classes/pooler", f"{name}.pooler.dense"),
        **dense("classes/kernel", "cls.seq_relationship", bias="classes/bias"),
    }
    copies = {
        "cls.predictions.decoder.weight": f"{name}.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    return Table(rows, copies, UNUSED)


# RobertaForMaskedLM.
ROBERTA = Table(
    under("", "roberta.", BODY)
    | {
        **dense("output/transform", "lm_head.dense"),
        **norm("output/norm", "lm_head.layer_norm"),
        "output/bias": Row("lm_head.bias"),
        "output/kernel": Row("lm_head.decoder.weight"),
    },
    {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    UNUSED,
)

# AlbertForPreTraining: one block for all layers.
ALBERT_BLOCK: Rows = {
    **dense("attention/query", "attention.query", HEADS_IN),
    **dense("attention/key", "attention.key", HEADS_IN),
    **dense("attention/value", "attention.value", HEADS_IN),
    **dense("attention/out", "attention.dense", HEADS_OUT),
    **norm("attention_norm", "attention.LayerNorm"),
    **dense("mlp/up", "ffn"),
    **dense("mlp/down", "ffn_output"),
    **norm("mlp_norm", "full_layer_layer_norm"),
}
ALBERT = Table(
    under("", "albert.", EMBEDDINGS)
    | under(
        "stack/blocks/",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.",
        ALBERT_BLOCK,
    )
    | {
        **dense("inputs/project", "albert.encoder.embedding_hidden_mapping_in"),
        **dense("output/transform", "predictions.dense"),
        **norm("output/norm", "predictions.LayerNorm"),
        "output/bias": Row("predictions.bias"),
        "output/kernel": Row("predictions.decoder.weight"),
        **dense("classes/pooler", "albert.pooler"),
        **dense("classes/kernel", "sop_classifier.classifier", bias="classes/bias"),
    },
    {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    UNUSED,
)


# ELECTRA is two models of theirs (ElectraForMaskedLM, ElectraForPreTraining) with the
# same embeddings and one of ours, so each table has a part of our parameters.
def tower(ours: str) -> Rows:
    """Embeddings and blocks of one of the two, whose names here begin with `ours`."""
    return (
        under("", "electra.", EMBEDDINGS)
        | under(f"{ours}/stack/", "electra.", STACK)
        | dense(f"{ours}/project", "electra.embeddings_project")
    )


GENERATOR_HEAD: Rows = {
    **dense("output/transform", "generator_predictions.dense"),
    **norm("output/norm", "generator_predictions.LayerNorm"),
    "output/bias": Row("generator_lm_head.bias"),
    "output/kernel": Row("generator_lm_head.weight"),
}
GENERATOR_COPIES = {
    "generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"
}
ELECTRA_GENERATOR = Table(
    tower("generator") | GENERATOR_HEAD, GENERATOR_COPIES, UNUSED, whole=False
)
# A generator by itself is a masked LM.
ELECTRA = Table(
    under("", "electra.", EMBEDDINGS)
    | under("stack/", "electra.", STACK)
    | dense("inputs/project", "electra.embeddings_project")
    | GENERATOR_HEAD,
    GENERATOR_COPIES,
    UNUSED,
)
ELECTRA_DISCRIMINATOR = Table(
    tower("discriminator")
    | {
        **dense("dense", "discriminator_predictions.dense"),
        **dense("score", "discriminator_predictions.dense_prediction"),
    },
    unused=UNUSED,
    whole=False,
)
