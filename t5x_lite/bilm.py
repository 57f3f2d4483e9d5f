"""ELMo's bidirectional language model (Peters et al. 2018, "Deep contextualized word
representations"): characters -> word vectors -> two LSTMs, and its losses.

Axis letters: B batch, T words, C characters or their vectors, P projection (a word's
vector), H LSTM units, G gates, L layers, F features of the CNN, E = 2 P, V words.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from t5x_lite.parameters import normal, param, stacked, zeros

DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class ElmoConfig:
    """The published model (bilm-tf's train_elmo.py); C characters, P projection."""

    characters: int = 261
    max_characters: int = 50
    char_dim: int = 16
    # (width, count)
    filters: tuple[tuple[int, int], ...] = (
        *((1, 32), (2, 32), (3, 64), (4, 128)),
        *((5, 256), (6, 512), (7, 1024)),
    )
    highway: int = 2
    projection: int = 512
    units: int = 4096
    layers: int = 2
    cell_clip: float = 3.0
    projection_clip: float = 3.0
    skip: bool = True
    dropout: float = 0.1


def uniform(limit: float):
    """Initializer of values in [-limit, limit)."""
    return lambda key, shape, dtype: jax.random.uniform(
        key, shape, dtype, -limit, limit
    )


def dropout(x: jax.Array, rate: float, key) -> jax.Array:
    """Independent for every number; `key` None: none."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


class Highway(nnx.Module):
    """g relu(x W) + (1 - g) x with a gate g (Srivastava et al. 2015)."""

    def __init__(self, F: int):
        weight, axes = normal(F**-0.5), ("embed", "mlp")
        self.carry = param((F, F), axes, weight)
        self.carry_bias = param((F,), ("mlp",), nnx.initializers.constant(-2.0))
        self.transform = param((F, F), axes, weight)
        self.transform_bias = param((F,), ("mlp",), zeros)

    def __call__(self, x_BTF):
        gate_BTF = jax.nn.sigmoid(
            x_BTF @ self.carry[...] + self.carry_bias[...][None, None]
        )
        new_BTF = jax.nn.relu(
            x_BTF @ self.transform[...] + self.transform_bias[...][None, None]
        )
        return gate_BTF * new_BTF + (1 - gate_BTF) * x_BTF


class CharacterCnn(nnx.Module):
    """Characters of a word -> its vector (Kim et al. 2016; Jozefowicz et al. 2016)."""

    def __init__(self, cfg: ElmoConfig):
        self.cfg = cfg
        C, P, F = cfg.char_dim, cfg.projection, sum(n for _, n in cfg.filters)
        self.embedding = param((cfg.characters, C), (None, "embed"), uniform(1.0))
        for i, (width, n) in enumerate(cfg.filters):
            weight = param((width, C, n), (None, "embed", "mlp"), uniform(0.05))
            setattr(self, f"filter_{i}", weight)
            setattr(self, f"filter_bias_{i}", param((n,), ("mlp",), zeros))
        self.highway = stacked(Highway(F), cfg.highway)
        self.project = param((F, P), ("mlp", "embed"), normal(F**-0.5))
        self.project_bias = param((P,), ("norm",), zeros)

    def __call__(self, characters_BTC):
        """int32 [B, T, max_characters], 0 = padding -> [B, T, P]."""
        B, T, length = characters_BTC.shape
        # Id 0 stands for a character whose vector is zero and stays so.
        table = jnp.pad(self.embedding[...], ((1, 0), (0, 0)))
        x_NCD = table[characters_BTC.reshape(B * T, length)]
        found = []
        for i in range(len(self.cfg.filters)):
            y_NCF = jax.lax.conv_general_dilated(
                x_NCD,
                getattr(self, f"filter_{i}")[...],
                window_strides=(1,),
                padding="VALID",
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            bias_1F = getattr(self, f"filter_bias_{i}")[...][None]
            found.append(jax.nn.relu(jnp.max(y_NCF, axis=1) + bias_1F))
        x_BTF = jnp.concatenate(found, axis=-1).reshape(B, T, -1)
        graph, params = nnx.split(self.highway)
        x_BTF, _ = jax.lax.scan(
            lambda x_BTF, layer: (nnx.merge(graph, layer)(x_BTF), None),
            x_BTF,
            nnx.to_pure_dict(params),
        )
        return x_BTF @ self.project[...] + self.project_bias[...][None, None]


class State(NamedTuple):
    """What the LSTMs of one direction remember; without the layers axis: of one."""

    cell: jax.Array  # [L, B, units]
    hidden: jax.Array  # [L, B, projection]


def zero_state(cfg: ElmoConfig, batch_size: int) -> dict[str, State]:
    """The state before any word, for each direction."""
    L, B = cfg.layers, batch_size
    of_one = State(jnp.zeros((L, B, cfg.units)), jnp.zeros((L, B, cfg.projection)))
    return {direction: of_one for direction in DIRECTIONS}


class Lstm(nnx.Module):
    """An LSTM with a projection of its output (Sak et al. 2014), both clipped.

    The gates are input, new value, forget (its bias is 1 higher) and output.
    """

    def __init__(self, cfg: ElmoConfig):
        self.cfg = cfg
        P, H = cfg.projection, cfg.units
        axes, weight = ("embed", None, "mlp"), uniform((6 / (2 * P + 4 * H)) ** 0.5)
        self.input = param((P, 4, H), axes, weight)
        self.hidden = param((P, 4, H), axes, weight)
        self.bias = param((4, H), (None, "mlp"), zeros)
        self.project = param((H, P), ("mlp", "embed"), uniform((6 / (H + P)) ** 0.5))

    def __call__(self, x_BTP, mask_BT, state: State, *, reverse: bool):
        """-> ([B, T, P], state after). Masked words give 0 and leave the state."""
        clip_cell, clip_out = self.cfg.cell_clip, self.cfg.projection_clip
        W_PGH, W_HP = self.hidden[...], self.project[...]
        gates_TBGH = jnp.einsum("BTP,PGH->TBGH", x_BTP, self.input[...])
        gates_TBGH += self.bias[...][None, None]

        def word(state: State, of_word):
            gates_BGH, mask_B1 = of_word
            gates_BGH = gates_BGH + jnp.einsum("BP,PGH->BGH", state.hidden, W_PGH)
            i_BH, new_BH, f_BH, o_BH = jnp.moveaxis(gates_BGH, 1, 0)
            cell_BH = jax.nn.sigmoid(f_BH + 1.0) * state.cell
            cell_BH += jax.nn.sigmoid(i_BH) * jnp.tanh(new_BH)
            cell_BH = jnp.clip(cell_BH, -clip_cell, clip_cell)
            out_BP = (jax.nn.sigmoid(o_BH) * jnp.tanh(cell_BH)) @ W_HP
            out_BP = jnp.clip(out_BP, -clip_out, clip_out)
            after = State(
                jnp.where(mask_B1, cell_BH, state.cell),
                jnp.where(mask_B1, out_BP, state.hidden),
            )
            return after, jnp.where(mask_B1, out_BP, 0.0)

        masks_TB1 = mask_BT.T[..., None]
        after, out_TBP = jax.lax.scan(
            word, state, (gates_TBGH, masks_TB1), reverse=reverse
        )
        return jnp.moveaxis(out_TBP, 0, 1), after


class Bilm(nnx.Module):
    """The bidirectional language model without its softmax."""

    def __init__(self, cfg: ElmoConfig):
        self.cfg = cfg
        self.words = CharacterCnn(cfg)
        self.forward = stacked(Lstm(cfg), cfg.layers)
        self.backward = stacked(Lstm(cfg), cfg.layers)

    def read(self, direction: str, x_BTP, mask_BT, state: State, key=None):
        """Word vectors through the LSTMs of one direction.

        Args:
          direction: "forward" or "backward": from which end the words are read.
          mask_BT: bool, False for padding.
          state: of this direction, [L, B, ...].
          key: of the dropout; None: none.

        Returns:
          ([L, B, T, P], state after the last word read). A layer's output at t has seen
          word t; the first layer's has no skip connection.
        """
        graph, params = nnx.split(getattr(self, direction))
        keys = jax.random.split(
            jax.random.key(0) if key is None else key, len(state[0])
        )

        def layer(carry, of_layer):
            x_BTP, skip = carry
            params, state, own = of_layer
            own = None if key is None else own
            x_BTP = dropout(x_BTP, self.cfg.dropout, own)
            y_BTP, after = nnx.merge(graph, params)(
                x_BTP, mask_BT, state, reverse=direction == "backward"
            )
            if self.cfg.skip:
                y_BTP += skip * x_BTP
            return (y_BTP, jnp.ones_like(skip)), (y_BTP, after)

        layers = (nnx.to_pure_dict(params), state, keys)
        start = (x_BTP, jnp.zeros((1, 1, 1), x_BTP.dtype))
        _, (out_LBTP, after) = jax.lax.scan(layer, start, layers)
        return out_LBTP, after

    def __call__(self, characters_BTC, state: dict[str, State]):
        """All layers of both directions.

        Args:
          characters_BTC: `data.words.characters`; BOS and EOS words are words here.
          state: `zero_state`, or what the batch before gave, as bilm-tf does.

        Returns:
          ([1 + L, B, T, 2 P], state). Layer 0 is the word's vector twice.
        """
        mask_BT = jnp.any(characters_BTC > 0, axis=-1)
        x_BTP = self.words(characters_BTC)
        found = {d: self.read(d, x_BTP, mask_BT, state[d]) for d in DIRECTIONS}
        out_LBTE = jnp.concatenate([found[d][0] for d in DIRECTIONS], axis=-1)
        twice_1BTE = jnp.concatenate([x_BTP, x_BTP], axis=-1)[None]
        after = {d: found[d][1] for d in DIRECTIONS}
        return jnp.concatenate([twice_1BTE, out_LBTE]), after


class Pretrained(nnx.Module):
    """The biLM and the softmax over words that both directions share."""

    def __init__(self, cfg: ElmoConfig, vocab_size: int):
        self.cfg = cfg
        P, V = cfg.projection, vocab_size
        self.bilm = Bilm(cfg)
        self.head = param((V, P), ("vocab", "embed"), normal(P**-0.5))
        self.head_bias = param((V,), ("vocab",), zeros)

    def loss(self, batch: dict, state: dict[str, State], key=None, negatives: int = 0):
        """({direction: mean negative log-likelihood in nats}, state after).

        Args:
          batch: {direction: {"characters": [B, T, C], "targets": [B, T] word ids}}; the
            targets of "forward" are the next words, of "backward" the previous ones.
            Padding (characters 0) has no weight.
          key: of dropout and negatives; None: no dropout.
          negatives: 0 = the full softmax, or how many sampled words stand for it.
        """
        losses, after = {}, {}
        for n, direction in enumerate(DIRECTIONS):
            own = None if key is None else jax.random.fold_in(key, n)
            keys = [None] * 3 if own is None else jax.random.split(own, 3)
            window = batch[direction]
            mask_BT = jnp.any(window["characters"] > 0, axis=-1)
            x_BTP = self.bilm.words(window["characters"])
            out_LBTP, after[direction] = self.bilm.read(
                direction, x_BTP, mask_BT, state[direction], keys[0]
            )
            y_BTP = dropout(out_LBTP[-1], self.cfg.dropout, keys[1])
            if negatives:
                nll_BT = self.sampled(y_BTP, window["targets"], negatives, keys[2])
            else:
                nll_BT = self.full(y_BTP, window["targets"])
            weights_BT = mask_BT.astype(jnp.float32)
            losses[direction] = jnp.sum(nll_BT * weights_BT) / jnp.sum(weights_BT)
        return losses, after

    def full(self, y_BTP, targets_BT):
        """-log softmax of the targets [B, T]."""
        logits_BTV = y_BTP @ self.head[...].T + self.head_bias[...][None, None]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)

    def sampled(self, y_BTP, targets_BT, negatives: int, key):
        """An estimate of `full` from words drawn by the log-uniform law of their ids.

        Ids must be sorted by frequency. The sum over words other than the target is
        estimated by importance sampling (Bengio and Senecal 2008), so it tends to
        `full` as `negatives` grows; one draw serves the whole batch. bilm-tf instead
        draws without replacement and also corrects the target.
        """
        if key is None:
            raise ValueError(f"negatives={negatives} needs a key to draw them with.")
        V = self.head.shape[0]
        rank_V = jnp.arange(V, dtype=jnp.float32)
        log_q_V = jnp.log(jnp.log1p(1 / (rank_V + 1)) / np.float32(np.log(V + 1)))
        drawn = jnp.exp(jax.random.uniform(key, (negatives,)) * np.log(V + 1)) - 1
        ids_S = jnp.clip(drawn.astype(jnp.int32), 0, V - 1)
        bias_S = self.head_bias[...][ids_S] - log_q_V[ids_S] - np.log(negatives)
        logits_BTS = y_BTP @ self.head[...][ids_S].T + bias_S[None, None]
        hits_BTS = ids_S[None, None] == targets_BT[..., None]
        logits_BTS = jnp.where(hits_BTS, -jnp.inf, logits_BTS)
        right_BT = jnp.sum(y_BTP * self.head[...][targets_BT], axis=-1)
        right_BT += self.head_bias[...][targets_BT]
        every_BTS = jnp.concatenate([right_BT[..., None], logits_BTS], axis=-1)
        return jax.nn.logsumexp(every_BTS, axis=-1) - right_BT
