"""Makes one .npz per model family from Hugging Face's PyTorch models (T5: make_t5.py).

    pip install -e '.[parity]' && python -m tests.goldens.make_families [NAME ...]

Nezha is only in transformers 4; beside the other version, in a process of its own:

    pip install --target DIR transformers==4.49.0 'numpy<2.4'
    PYTHONPATH=DIR:. python -m tests.goldens.make_families nezha

The references run in float64 on float32 weights, without dropout, with eager attention.
Nothing here imports t5x_lite. README.md lists what each file holds; common to all:

- Rows (B = 4): full; half; one token; and either a padded end or, where keys are not
  causal, padded on the left and with a hole. Logits at padded queries mean nothing.
- A padded position holds pad_token_id (GPT: 0); among tokens only UMT5's decoder start
  is pad_token_id. Its embedding row is not zero, unlike in a freshly built model.
- Tied tensors are stored once; `copies` (JSON) maps the other names to the stored one.
- `labels` are -100 where there is no loss. `loss` is the model's own mean.
- The gradient of a bias on attention keys is zero: softmax does not see it.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
IGNORED = -100


def ragged(length: int, hole: bool, first: int = 0) -> np.ndarray:
    """int32 [4, length], 1 = a token; a row with a hole keeps its `first` tokens."""
    ends = np.array([[length], [length // 2], [1], [length if hole else length - 3]])
    mask = np.arange(length) < ends
    if hole:
        mask[3, first : length // 4] = mask[3, length // 2 : length // 2 + 3] = False
    return mask.astype(np.int32)


def draw_ids(rng, mask_BT, sizes: dict):
    """Any id but pad's where there is a token; models without a pad id get zeros."""
    pad = sizes.get("pad_token_id", -1)
    ids_BT = rng.integers(0, sizes["vocab_size"] - (pad >= 0), mask_BT.shape)
    ids_BT += (ids_BT >= pad) & (pad >= 0)
    return np.where(mask_BT, ids_BT, max(pad, 0)).astype(np.int32)


def some(rng, mask_BT, labels_BT):
    """About half of the labels of every row."""
    kept_BT = mask_BT.astype(bool) & (rng.random(mask_BT.shape) < 0.5)
    return np.where(kept_BT, labels_BT, IGNORED).astype(np.int32)


def encoder(rng, sizes: dict, first: int = 0) -> dict:
    """Tokens to fill in; RoBERTa has one token type, XLNet compares any."""
    mask = ragged(21, hole=True, first=first)
    ids = draw_ids(rng, mask, sizes)
    types = rng.integers(0, sizes.get("type_vocab_size", 1), mask.shape)
    labels = some(rng, mask, draw_ids(rng, mask, sizes))
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
    return batch | dict(token_type_ids=types.astype(np.int32))


def sentence_pair(key: str):
    """-> a drawing function: `encoder` and a label per row; 1 = random or swapped.

    The pooler reads position 0 whatever is there, so position 0 is never padded here.
    """

    def draw(rng, sizes: dict) -> dict:
        classes = rng.permutation(np.array([0, 1, 1, 0], np.int32))
        return encoder(rng, sizes, first=1) | {key: classes}

    return draw


def detection(rng, sizes: dict) -> dict:
    """ELECTRA's discriminator: label 1 = replaced, at every token.

    The loss is over attention_mask, and -100 is not an ignored label here.
    """
    batch = encoder(rng, sizes)
    labels = rng.integers(0, 2, batch["labels"].shape)
    return batch | dict(labels=labels.astype(np.int32))


def causal(rng, sizes: dict) -> dict:
    """Labels stand on their own token: the model shifts, so the first is never used."""
    mask = ragged(19, hole=False)
    ids = draw_ids(rng, mask, sizes)
    return dict(input_ids=ids, attention_mask=mask, labels=some(rng, mask, ids))


def seq2seq(rng, sizes: dict) -> dict:
    """Labels stand where they are predicted; decoder inputs are shifted here.

    The models' own shift would put pad where a label is -100.
    """
    mask, decoder_mask = ragged(21, hole=True), ragged(18, hole=False)
    labels = draw_ids(rng, decoder_mask, sizes)
    start = np.full((len(labels), 1), sizes["decoder_start_token_id"], np.int32)
    shifted = np.concatenate([start, labels[:, :-1]], axis=1)
    return dict(
        input_ids=draw_ids(rng, mask, sizes),
        attention_mask=mask,
        decoder_input_ids=np.where(decoder_mask, shifted, sizes["pad_token_id"]),
        decoder_attention_mask=decoder_mask,
        labels=some(rng, decoder_mask, labels),
    )


def xlnet(rng, sizes: dict) -> dict:
    """No token types: then there is no segment term at all, not one of `same`."""
    batch = encoder(rng, sizes)
    del batch["token_type_ids"]
    return batch


def xlnet_mems(rng, sizes: dict) -> dict:
    """mems float32 [L, M, B, D]: inputs of each layer for the M tokens before.

    All of them are visible; their token type is 0, whatever it was.
    """
    batch = encoder(rng, sizes | dict(type_vocab_size=3))
    shape = sizes["n_layer"], 5, len(batch["labels"]), sizes["d_model"]
    return batch | dict(mems=rng.standard_normal(shape, dtype=np.float32))


def xlnet_permuted(rng, sizes: dict) -> dict:
    """Two streams: perm_mask[b, i, j] = 1 <=> i may not see j, in both streams.

    `ranks` (not a model input) made it: targets see lower ranks, and context tokens
    (rank -1, the first token of each row among them) see the context. In the content
    stream everyone sees itself too; logits are the query stream's, where only context
    tokens do. So at labels the token is hidden.
    """
    batch = encoder(rng, sizes | dict(type_vocab_size=3))
    labels, mask = batch["labels"], batch["attention_mask"]
    labels[np.arange(len(mask)), mask.argmax(axis=1)] = IGNORED
    target_BT = labels != IGNORED
    # What is trained is the token itself.
    batch["labels"] = np.where(target_BT, batch["input_ids"], labels)
    T = mask.shape[1]
    ranks_BT = np.where(
        target_BT, rng.permuted(np.tile(np.arange(T), (4, 1)), axis=1), -1
    )
    hidden = (ranks_BT[:, None, :] >= ranks_BT[:, :, None]) & target_BT[:, None, :]
    return batch | dict(
        ranks=ranks_BT.astype(np.int32),
        perm_mask=hidden.astype(np.int32),
        target_mapping=np.tile(np.eye(T, dtype=np.int32), (4, 1, 1)),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One file: a model class, its config's keywords and what is drawn and stored."""

    model: str
    sizes: dict
    draw: Callable
    outputs: dict  # our name -> attribute of their output
    grads: bool = False
    tied: bool = True
    version: str = "5"


LOGITS = dict(logits="logits")
MASKED = dict(logits="prediction_logits")
SENTENCE = MASKED | dict(sentence_logits="seq_relationship_logits")
# Sizes differ from each other and from case to case; T <= 21.
# fmt: off
BERT = dict(
    vocab_size=83, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=36, max_position_embeddings=31, type_vocab_size=2,
    hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=0,
)
FACTORED = BERT | dict(embedding_size=14, hidden_size=20, num_attention_heads=2)
XLNET = dict(
    vocab_size=71, d_model=24, n_layer=2, n_head=3, d_inner=34, ff_activation="gelu",
    layer_norm_eps=1e-12, mem_len=9, pad_token_id=5,
)
GPT = dict(
    vocab_size=89, n_positions=33, n_embd=20, n_layer=2, n_head=2, bos_token_id=None,
    eos_token_id=None,
)
BART = dict(
    vocab_size=77, max_position_embeddings=27, d_model=24, encoder_layers=2,
    decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=3,
    encoder_ffn_dim=34, decoder_ffn_dim=34, activation_function="gelu",
    scale_embedding=False, pad_token_id=1, decoder_start_token_id=2,
)
PROPHETNET = dict(
    vocab_size=67, hidden_size=24, num_encoder_layers=2, num_decoder_layers=2,
    num_encoder_attention_heads=3, num_decoder_attention_heads=3, encoder_ffn_dim=34,
    decoder_ffn_dim=34, max_position_embeddings=29, ngram=2, num_buckets=10,
    relative_max_distance=12, activation_function="gelu", pad_token_id=0,
    decoder_start_token_id=2, eps=0.0,
)
UMT5 = dict(
    vocab_size=71, d_model=24, d_kv=10, d_ff=34, num_layers=2, num_decoder_layers=3,
    num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=12,
    feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6, pad_token_id=0,
    decoder_start_token_id=0,
)
CASES = {
    # gelu is erf's; eps 1e-12 (all of BERT's kin). The MLM head is dense, gelu,
    # LayerNorm, tied decoder, bias; the pooler is under the sentence logits only.
    "bert": Case(
        "BertForPreTraining", BERT, sentence_pair("next_sentence_label"), SENTENCE,
        grads=True,
    ),
    # Positions count the ids that are not pad (attention_mask is not asked), from
    # pad_token_id + 1; pads are at pad_token_id. Token type 0 is added to everything.
    "roberta": Case(
        "RobertaForMaskedLM",
        BERT | dict(vocab_size=79, type_vocab_size=1, pad_token_id=1,
                    layer_norm_eps=1e-5),
        encoder, LOGITS,
    ),
    # gelu_new is tanh's. Embeddings (E) are normalised, then mapped to D with a bias;
    # one layer's weights serve all layers; the head goes back to E before its norm.
    "albert": Case(
        "AlbertForPreTraining",
        FACTORED | dict(vocab_size=73, hidden_act="gelu_new", num_hidden_layers=3),
        sentence_pair("sentence_order_label"),
        MASKED | dict(sentence_logits="sop_logits"),
    ),
    # embeddings_project (with bias) is there because E != D. The generator's head uses
    # erf's gelu whatever hidden_act is.
    "electra_generator": Case("ElectraForMaskedLM", FACTORED, encoder, LOGITS),
    # logits [B, T]; the head stays in D: dense, hidden_act, dense to 1; no LayerNorm.
    "electra_discriminator": Case("ElectraForPreTraining", FACTORED, detection, LOGITS),
    # BERT's computation; relu, the activation of ERNIE 1.0's checkpoints.
    "ernie": Case(
        "ErnieForPreTraining",
        BERT | dict(vocab_size=67, hidden_act="relu", use_task_id=False),
        sentence_pair("next_sentence_label"), SENTENCE,
    ),
    # No position embeddings: a sinusoid table (even columns sin, odd cos; depth H; not
    # a weight) of row clip(j - i) + max goes on keys, before scaling, and on values.
    "nezha": Case(
        "NezhaForPreTraining", BERT | dict(vocab_size=61, max_relative_position=5),
        sentence_pair("next_sentence_label"), SENTENCE, version="4",
    ),
    # score(i, j) = ((q_i + r_w) k_j + (q_i + r_r) W_r R(i + M - j)
    #                + (q_i + r_s) seg[type_i != type_j]) / sqrt(H); R = [sin | cos] of
    # distance / 10000^(2k/D). Post-norm; erf's gelu. q, k, v, o, r are [D, N, H] (o
    # too), without biases; feed-forward and lm_loss have them. Embeddings: no scale,
    # no norm. The query stream starts from mask_emb alone.
    "xlnet": Case("XLNetLMHeadModel", XLNET, xlnet, LOGITS),
    "xlnet_mems": Case(
        "XLNetLMHeadModel", XLNET, xlnet_mems, LOGITS | dict(new_mems="mems"),
    ),
    "xlnet_permuted": Case(
        "XLNetLMHeadModel", XLNET, xlnet_permuted, LOGITS, grads=True,
    ),
    # Post-norm, no norm at the end or on embeddings; `gelu` means tanh's; d_ff = 4 D.
    # Weights of c_attn (q, k, v side by side), c_proj, c_fc are [inputs, outputs].
    "gpt": Case("OpenAIGPTLMHeadModel", GPT | dict(afn="gelu"), causal, LOGITS),
    # Pre-norm and ln_f; tanh's gelu; positions count from 0 whatever is padded.
    "gpt2": Case(
        "GPT2LMHeadModel",
        GPT | dict(n_embd=24, n_head=3, n_inner=38, activation_function="gelu_new"),
        causal, LOGITS, grads=True,
    ),
    # Post-norm, LayerNorm on embeddings; positions start at row 2 of the table; erf's
    # gelu; final_logits_bias [1, V] is a buffer (no gradient), random here, else zero.
    "bart": Case("BartForConditionalGeneration", BART, seq2seq, LOGITS, grads=True),
    # Repaired (see `repaired`). logits [B, T, V] are predicting stream 0's (the next
    # token), logits_ngram [B, 1, T, V] stream 1's; the main stream has none. Stream s
    # starts from ngram_embeddings[s - 1] (0 takes the last row) + position t + 1 and at
    # t sees main tokens 0 .. t - s, always main token 0, and itself: labels[t] is the
    # next token of stream 0, the second next of stream 1; the loss is their mean.
    # Positions start at pad_token_id + 1 whatever is padded. erf's gelu, eps 1e-5. The
    # relative bias is a linear map (with bias) of the layer's input to (bucket, head),
    # not scaled; for predicting streams main tokens are one step farther (t - j + 1),
    # themselves at distance 0.
    "prophetnet": Case(
        "ProphetNetForConditionalGeneration", PROPHETNET, seq2seq,
        LOGITS | dict(logits_ngram="logits_ngram"), grads=True,
    ),
    # T5.1.1 with a relative bias in every layer; N * H != D; heads untied by hand, as
    # in the published models (transformers 5 would tie and scale by D^-0.5).
    "umt5": Case(
        "UMT5ForConditionalGeneration", UMT5, seq2seq, LOGITS, tied=False,
    ),
    # Pre-norm BART with a norm at the end of both stacks; embeddings times sqrt(D).
    "mbart": Case(
        "MBartForConditionalGeneration",
        BART | dict(vocab_size=59, d_model=28, encoder_attention_heads=2,
                    decoder_attention_heads=2, scale_embedding=True),
        seq2seq, LOGITS,
    ),
}
# fmt: on


def build(case: Case, rng: np.random.Generator):
    """Their model with float32 weights in which every path matters, as float64."""
    cls = getattr(transformers, case.model)
    model = cls(cls.config_class(**case.sizes, attn_implementation="eager"))
    if not case.tied:
        head = model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
        model.config.tie_word_embeddings = False
    kinds = torch.nn.Embedding, torch.nn.Linear
    embeddings, linear = (
        {f"{k}.weight" for k, m in model.named_modules() if isinstance(m, kind)}
        for kind in kinds
    )
    for name, p in model.named_parameters():
        value = rng.standard_normal(p.shape)
        short = name.split(".")[-2].lower()
        if name.endswith(".weight") and ("norm" in short or short.startswith("ln_")):
            value = rng.uniform(0.5, 1.5, p.shape)
        elif name in embeddings or "_bias" in name or name.endswith(("_emb", "_embed")):
            value *= 0.5
        elif p.ndim == 1:
            value *= 0.3
        else:
            # [outputs, inputs]; Conv1D and XLNet's attention start with the inputs.
            value *= p.shape[1 if name in linear else 0] ** -0.5
            if case.model.startswith("UMT5") and name.endswith("Attention.q.weight"):
                value *= case.sizes["d_kv"] ** -0.5
        p.data = torch.tensor(value.astype(np.float32))
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            buffer.copy_(torch.tensor(rng.standard_normal(buffer.shape)))
    return model.double().eval()


def predict_bias(self, hidden_states, attn_weights, position_ids, buckets_BTS):
    """[B, G, N, T, 2 T]: relative biases of the predicting streams, rows in order."""
    values = self.relative_pos_embeddings(hidden_states)  # [B, T, G, buckets * N]
    values = values.unflatten(-1, (self.num_buckets, self.num_attn_heads))
    values = values.permute(0, 2, 4, 1, 3)  # [B, G, N, T, buckets]
    index = buckets_BTS.long()[:, None, None].expand(*values.shape[:-1], -1)
    return values.gather(-1, index)


def repaired(model):
    """Their ProphetNet without a mistake (seen in transformers 4.49 and 5.23).

    get_predict_relative_pos_embeddings orders values by (position, stream, head) and
    reads them by (stream, head, position): a token is biased by another position's
    values, later ones too, so that logits_ngram see the future. Microsoft's original
    pairs them; `unrepaired/*` are the outputs without this.
    """
    attention = model.prophetnet.decoder.layers[0].self_attn
    method = "get_predict_relative_pos_embeddings"
    return mock.patch.object(type(attention), method, predict_bias)


def exact(case: Case):
    """Lets their code compute in float64 where it asks for float32."""
    if case.model.startswith("ProphetNet"):
        module = sys.modules[getattr(transformers, case.model).__module__]
        return mock.patch.object(
            module, "softmax", lambda x, dim, onnx_trace=False: x.softmax(dim)
        )
    if case.model.startswith("UMT5"):  # its .float() decides on buckets
        return contextlib.nullcontext()
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def array(value) -> np.ndarray:
    """Tensors or a tuple of them (mems), in NumPy."""
    if isinstance(value, tuple | list):
        return np.stack([array(one) for one in value])
    return value.detach().numpy()


def run(case: Case, model, batch: dict) -> dict[str, np.ndarray]:
    """Outputs, loss and, if the case stores them, gradients of the loss."""
    inputs = {k: torch.tensor(v).long() for k, v in batch.items() if k != "ranks"}
    floats = {"mems", "perm_mask", "target_mapping"}
    if case.model.startswith("ProphetNet"):  # 1 - integers is float32; then 0 * -inf
        floats |= {"attention_mask", "decoder_attention_mask"}
    for name in inputs.keys() & floats:
        inputs[name] = torch.tensor(batch[name]).double()
    if "mems" in inputs:
        inputs["mems"] = list(inputs["mems"])
    with exact(case):
        out = model(**inputs)
        arrays = {ours: array(out[theirs]) for ours, theirs in case.outputs.items()}
        arrays["loss"] = np.array(out.loss.item())
        if case.grads:
            model.zero_grad()
            out.loss.backward()
            arrays |= {f"grads/{k}": array(p.grad) for k, p in model.named_parameters()}
    assert all(np.isfinite(v).all() for v in arrays.values())
    return arrays


def weights_of(model) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """-> their state dict with each tensor once; other names -> the one kept."""
    kept, copies, first = {}, {}, {}
    parameters = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    for name in (*parameters, *(state.keys() - parameters.keys())):
        tensor = parameters.get(name, state.get(name))
        if id(tensor) in first:
            copies[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            kept[name] = tensor.detach().float().numpy()
    return kept, dict(sorted(copies.items()))


def make(name: str, seed: int) -> dict[str, np.ndarray]:
    """All arrays of one file: weights/*, inputs, outputs, grads/*, config ..."""
    case = CASES[name]
    if not transformers.__version__.startswith(f"{case.version}."):
        raise ValueError(
            f"case {name!r} needs transformers {case.version}, but this is "
            f"{transformers.__version__}. The docstring of make_families.py says how."
        )
    rng = np.random.default_rng(seed)
    model, batch = build(case, rng), case.draw(rng, case.sizes)
    weights, copies = weights_of(model)
    found, repair = {}, contextlib.nullcontext()
    if name == "prophetnet":
        plain = run(dataclasses.replace(case, grads=False), model, batch)
        found = {f"unrepaired/{k}": v for k, v in plain.items()}
        repair = repaired(model)
    with repair:
        found |= run(case, model, batch)
    if name == "roberta":
        real_BT = batch["input_ids"] != 1
        batch["position_ids"] = (1 + np.cumsum(real_BT, 1) * real_BT).astype(np.int32)
        batch.pop("token_type_ids")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return (
        {f"weights/{k}": v for k, v in weights.items()}
        | batch
        | found
        | dict(
            model=np.array(case.model),
            config=np.array(json.dumps(case.sizes)),
            copies=np.array(json.dumps(copies)),
            made_with=np.array(versions),
        )
    )


def main(names: Sequence[str] = ()) -> None:
    """Writes the files of these cases, or of all that this transformers has."""
    here = [k for k, c in CASES.items() if transformers.__version__[0] == c.version]
    for name in names or here:
        arrays = {
            k: v.astype(np.float32) if v.dtype == np.float64 else v
            for k, v in make(name, seed=list(CASES).index(name)).items()
        }
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
