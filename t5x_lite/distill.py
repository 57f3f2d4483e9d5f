"""Knowledge distillation: a student also learns what a larger, frozen model says.

config.distill = dict(teacher=WORKDIR, step=-1, alpha=0.5, temperature=2.0, hidden=0.0)

    (1 - alpha) * own loss + alpha * T^2 * KL(teacher || student, both at T)
        + hidden * mean squared error of the layers' states

The first two as in Hinton et al. 2015 (section 2), over the vocabulary or a head's
classes (numbers: squared error); the third as in TinyBERT (Jiao et al. 2020, equations
8 and 9), from embeddings to the last layer, the student's layer i beside the teacher's
i * L_teacher / L_student, through a learned projection where the widths differ
(config.model.distill_width). Of an encoder-decoder it is the decoder's layers.

Axis letters: B batch, K predicted cells, D width, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import checkpoint, heads, losses, model, parameters, sharding
from t5x_lite.config import Config
from t5x_lite.sharding import constrain
from t5x_lite.vocab import Vocab


def knobs(cfg: Config) -> dict[str, Any]:
    """config.distill, whole; `config` has checked it."""
    return dict(step=-1, alpha=0.5, temperature=2.0, hidden=0.0) | dict(cfg.distill)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model of another workdir.

    Attributes:
        cfg: of its run, dropout off.
        alpha, temperature, hidden: see the module.
    """

    workdir: str
    step: int
    cfg: Config
    net: Any
    alpha: float
    temperature: float
    hidden: float

    @classmethod
    def of(cls, cfg: Config, words: Vocab) -> "Teacher | None":
        """That of config.distill, None without one.

        Raises:
            FileNotFoundError, ValueError: there is none, or it does not fit.
        """
        if not cfg.distill:
            return None
        asked = knobs(cfg)
        workdir = asked.pop("teacher")
        key = "config.distill.teacher"
        given, step, meta = checkpoint.read_run(workdir, asked.pop("step"), key)
        still = dataclasses.replace(given.model, dropout=0.0, scan=cfg.model.scan)
        given = dataclasses.replace(given, model=still)
        if meta["data"].get("vocab") != words.fingerprint:
            raise ValueError(
                f"config.distill.teacher={workdir!r} has another vocabulary than "
                f"config.data.vocab={cfg.data.vocab!r}; both must read the same ids. "
                "Train one of them with the other's vocabulary."
            )
        ours, theirs = cfg.model, given.model
        for key in ("structure", "head", "classes", "choices", "query_streams"):
            if getattr(ours, key) != getattr(theirs, key):
                raise ValueError(
                    f"config.distill.teacher={workdir!r}: its config.model.{key} is "
                    f"{getattr(theirs, key)!r}, here {getattr(ours, key)!r}; they must "
                    "agree, as both read the same batches."
                )
        found = cls(workdir, step, given, model.build(theirs), **asked)
        needed = 0 if ours.d_model == theirs.d_model else theirs.d_model
        needed = needed if found.hidden else 0
        if ours.distill_width != needed:
            raise ValueError(
                f"config.model.distill_width={ours.distill_width}: the teacher has "
                f"d_model={theirs.d_model}, this model {ours.d_model}, and "
                f"config.distill.hidden={found.hidden}. Set it to {needed}."
            )
        return found

    def abstract(self, mesh, rules) -> dict:
        """Its parameters as ShapeDtypeStructs, sharded like a student's."""
        flat = {}
        for name, p in parameters.declared(self.net).items():
            shape, axes = p.get_value().shape, p.get_metadata()["axes"]
            spec = sharding.spec(f"teacher {name}", axes, shape, rules, mesh)
            where = jax.sharding.NamedSharding(mesh, spec)
            flat[tuple(name.split("/"))] = jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=where
            )
        return parameters.nested(flat)

    def params(self, mesh, rules) -> dict:
        """Its parameters, which no checkpoint of the student holds."""
        abstract = self.abstract(mesh, rules)
        return checkpoint.load_params(self.workdir, self.step, abstract)

    def lessons(
        self, params, batch: dict, used_ids: int, student, out: model.Outputs
    ) -> dict[str, losses.Sums]:
        """Loss sums by name: `taught`, and `hidden` if it has a weight.

        Args:
            params: the teacher's.
            student: bound; `out` is what it made of the batch.
        """
        own = model.bind(self.net, jax.lax.stop_gradient(params), self.cfg.model.dtype)
        shown = jax.lax.stop_gradient(own.outputs(batch, keep=self.hidden > 0))
        stream = batch[model.trained_stream(self.cfg.model)]
        found = {"taught": self._taught(student, out, own, shown, stream, used_ids)}
        if self.hidden:
            found["hidden"] = hidden_sums(student, out, shown, stream)
        return found

    def _taught(self, student, out, own, shown, stream, used_ids: int) -> losses.Sums:
        cfg, T = self.cfg.model, self.temperature
        if not cfg.head:
            B, K, _ = out.cells_BKE.shape
            chunk = losses.chunk_length(0, B, K, cfg.vocab_size)
            return over_vocabulary(
                *(student, out.cells_BKE, own, shown.cells_BKE),
                *(stream["weights"], T, used_ids, chunk),
            )
        _, weights = heads.answers(cfg, stream)
        if heads.is_number(cfg):
            each = (out.head[:, 0] - shown.head[:, 0]) ** 2
        elif cfg.head == "span":
            each = sum(
                divergence(shown.head[..., e], out.head[..., e], T) for e in (0, 1)
            )
        else:
            each = divergence(shown.head, out.head, T)
        return _sums(each, weights)


def divergence(teacher, student, temperature: float) -> jax.Array:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), over the last axis."""
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def over_vocabulary(
    student, x_BKE, teacher, y_BKF, weights_BK, temperature, used_ids, chunk: int
) -> losses.Sums:
    """`divergence` of two models' logits over the used ids.

    A few cells at a time, computed again in the backward pass, so that [B, K, V] is
    never held.
    """
    B, K, _ = x_BKE.shape
    chunks = -(-K // chunk)

    def split(a):
        fill = ((0, 0), (0, chunks * chunk - K)) + ((0, 0),) * (a.ndim - 2)
        a = jnp.pad(a, fill).reshape(B, chunks, chunk, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    @jax.checkpoint
    def body(total, of_chunk):
        x_BCE, y_BCF, weights_BC = of_chunk
        given, own = teacher.logits(y_BCF), student.logits(x_BCE)
        each_BC = divergence(given[..., :used_ids], own[..., :used_ids], temperature)
        return total + jnp.sum(each_BC * weights_BC), None

    zero = jnp.zeros((), jnp.float32)
    xs = (split(x_BKE), split(y_BKF), split(weights_BK))
    total, _ = jax.lax.scan(body, zero, xs)
    return losses.Sums(total, total, zero, zero, jnp.sum(weights_BK))


def hidden_sums(student, out, shown, stream: dict) -> losses.Sums:
    """Squared error of the states of text cells, its mean over width and layers."""
    ours, theirs = out.layers_LBTD, shown.layers_LBTD
    pairs = [
        (i, round(i * (len(theirs) - 1) / (len(ours) - 1))) for i in range(len(ours))
    ]
    text_BT = (stream["segments"] > 0).astype(jnp.float32)
    each_BT = jnp.zeros_like(text_BT)
    for i, j in pairs:
        x_BTD, y_BTD = ours[i], theirs[j].astype(jnp.float32)
        if hasattr(student, "distill"):
            kernel_DE = student.distill[...]
            x_BTD = jnp.einsum("BTD,DE->BTE", x_BTD, kernel_DE)
            x_BTD = constrain(x_BTD, "batch", "length", "residual")
        error_BTD = (x_BTD.astype(jnp.float32) - y_BTD) ** 2
        each_BT += jnp.mean(error_BTD, axis=-1)
    return _sums(each_BT / len(pairs), text_BT)


def _sums(each, weights) -> losses.Sums:
    total, zero = jnp.sum(each * weights), jnp.zeros((), jnp.float32)
    return losses.Sums(total, total, zero, zero, jnp.sum(weights))
