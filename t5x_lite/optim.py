"""Optimizers (optax), learning-rate schedules, and regex tables over parameters."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from t5x_lite import mup, parameters, recipes
from t5x_lite.config import Config, OptimConfig
from t5x_lite.parameters import name_of


def schedule(cfg: Config) -> optax.Schedule:
    """Step -> learning rate.

    rsqrt: lr / sqrt(max(step, warmup)), T5's (Raffel et al. 2020, section 3.1.2).
    linear, cosine: warm-up, then down to `final_fraction` of the peak at `steps`.
    wsd: warm-up, stable, then linear decay over the last `decay_steps`.
    """
    o, steps = cfg.optim, cfg.steps
    peak, last, warmup = (
        o.learning_rate,
        o.learning_rate * o.final_fraction,
        o.warmup_steps,
    )
    up = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if o.schedule == "rsqrt":
        return lambda step: (
            peak
            * jax.lax.rsqrt(jnp.maximum(jnp.asarray(step, jnp.float32), max(warmup, 1)))
        )
    if o.schedule == "constant":
        parts = [up, optax.constant_schedule(peak)]
        return optax.join_schedules(parts, [warmup])
    if o.schedule == "wsd":
        down = o.decay_steps or max(1, steps // 5)
        parts = [
            up,
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, last, down),
        ]
        return optax.join_schedules(parts, [warmup, max(warmup, steps - down)])
    if o.schedule == "linear":
        decay = optax.linear_schedule(peak, last, steps - warmup)
    else:
        decay = optax.cosine_decay_schedule(peak, steps - warmup, o.final_fraction)
    return optax.join_schedules([up, decay], [warmup])


def table(key: str, rules, names) -> dict[str, float]:
    """Parameter name -> value of the first (regex, value) that matches all of it.

    Raises:
      ValueError: for a bad row, a name no row matches, or a row that is of no use.
    """
    compiled = []
    for rule in rules:
        try:
            pattern, value = rule
            compiled.append((re.compile(pattern), float(value)))
        except (TypeError, ValueError, re.error) as e:
            raise ValueError(
                f"{key}: {rule!r} is no (regex, number) row ({e}). "
                "Write e.g. (('.*/scale', 0.0), ('.*', 1.0))."
            ) from e
    used, values = set(), {}
    for name in names:
        for i, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(name):
                used.add(i)
                values[name] = value
                break
        else:
            raise ValueError(
                f"{key} has no row for parameter {name!r}. Add one that matches it, "
                "or a last row ('.*', 1.0) for the rest."
            )
    for i, (pattern, _) in enumerate(compiled[:-1]):
        if i not in used:
            raise ValueError(
                f"{key}: no parameter takes the row {pattern.pattern!r}. "
                f"Parameters: {', '.join(names)}."
            )
    return values


def make(cfg: Config, model: nnx.Module) -> optax.GradientTransformation:
    """The gradient transformation of a config for a model's parameters.

    Weight decay is decoupled and scaled by the learning rate (Loshchilov & Hutter
    2019), for Adafactor too; LAMB (You et al. 2020) scales it with the update by each
    layer's trust ratio. A learning-rate multiplier of 0 freezes a parameter: no
    update, no optimizer state, no share in the gradient norm. See `recipes` for what
    else freezes, and for rates by layer.

    Its `update` takes `start`, the parameters that config.optim.l2_start pulls to.
    """
    o, params = cfg.optim, parameters.declared(model)
    rate: dict[str, Any] = table("config.optim.lr_rules", o.lr_rules, params)
    decay = table("config.optim.decay_rules", o.decay_rules, params)
    frozen = recipes.frozen(cfg, rate)
    start = recipes.starts(cfg, params)
    if o.layer_decay != 1.0:
        layers = recipes.layer_factors(cfg, params)
        rate = {name: layers[name] * factor for name, factor in rate.items()}
    uneven = any(np.ndim(f) or f not in (0.0, 1.0) for f in rate.values())

    def leafwise(values: dict[str, Any]):
        """Multiplies updates by a static number per parameter, or per layer."""

        def update(updates, params):
            del params
            return jax.tree.map_with_path(
                lambda path, u: u * values[name_of(path)], updates
            )

        return optax.stateless(update)

    # Always the same parts: a checkpoint fits whichever of them are switched on.
    nothing = optax.identity()
    decayed = nothing
    if o.weight_decay or o.l2_start:
        decayed = recipes.decayed(o.weight_decay, decay, o.l2_start)
    eps = o.eps * mup.gradient_scale(cfg.model)
    if o.name == "adamw":
        core = optax.scale_by_adam(o.beta1, o.beta2, eps)
    elif o.name == "lamb":
        core = optax.chain(
            optax.scale_by_adam(o.beta1, o.beta2, o.eps),
            decayed,
            per_matrix(optax.scale_by_trust_ratio(), model),
        )
        decayed = nothing
    else:
        core = per_matrix(adafactor(o), model)
    if cfg.model.parametrisation == "mup":
        core = multiplied(core, mup.rates(params, o.name))
    clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else nothing
    if o.unfreeze:
        clip = optax.chain(recipes.gate(start), clip)
        core = recipes.unfreezing(optax.chain(core, decayed), start)
        decayed = nothing
    chain = optax.chain(
        clip,
        core,
        decayed,
        leafwise(rate) if uneven else nothing,
        optax.scale_by_learning_rate(schedule(cfg)),
    )
    if not frozen:
        return optax.with_extra_args_support(chain)

    def labels(tree):
        return jax.tree.map_with_path(
            lambda path, _: "frozen" if name_of(path) in frozen else "trained", tree
        )

    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)


def trainable(cfg: Config, model: nnx.Module) -> set[str]:
    """Names of the parameters that a gradient is made for."""
    params = parameters.declared(model)
    rate = table("config.optim.lr_rules", cfg.optim.lr_rules, params)
    return params.keys() - recipes.frozen(cfg, rate)


def multiplied(tx: optax.GradientTransformation, values: dict[str, float]):
    """`tx`, its updates times a number per parameter; the same state.

    Weight decay comes after it: under muP, rate times decay does not depend on width.
    """

    def times(path, u):
        factor = values[name_of(path)]
        return u if factor == 1.0 else u * factor

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state, params)
        return jax.tree.map_with_path(times, updates), state

    return optax.GradientTransformation(tx.init, update)


def adafactor(o: OptimConfig) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018) with T5's settings, without the learning rate.

    Factored second moments from 128 up, no momentum, update clipping by RMS, updates
    in proportion to the parameter's RMS (at least 1e-3).
    """
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=o.decay_rate, min_dim_size_to_factor=128, epsilon=1e-30
        ),
        optax.clip_by_block_rms(o.update_clip),
        optax.scale_by_param_block_rms(min_scale=1e-3),
    )


class View(NamedTuple):
    """A parameter as the (stack of) matrices that T5's Adafactor sees."""

    stacked: bool
    shape: tuple[int, ...]
    axes: tuple[str, ...]


def view(p: nnx.Param) -> View:
    """Heads and head dim joined into one; a leading layers axis kept apart."""
    shape, axes = list(p.get_value().shape), list(p.get_metadata()["axes"])
    for i in reversed(range(len(axes) - 1)):
        if (axes[i], axes[i + 1]) == ("heads", "kv"):
            shape[i : i + 2], axes[i : i + 2] = [shape[i] * shape[i + 1]], ["heads"]
    return View(axes[0] == "layers", tuple(shape), tuple(axes))


def per_matrix(tx: optax.GradientTransformation, model: nnx.Module):
    """Applies `tx` to every matrix of every layer by itself.

    Optax's Adafactor would factor a stacked [L, D, N, H] array over its two largest
    dimensions and take RMS norms over all layers at once; T5's works on the [D, N*H]
    matrix of one layer. Scanned and unrolled layers so train alike.
    """
    views = {name: view(p) for name, p in parameters.declared(model).items()}
    # With jit the parameters of one shape share what is traced and lowered.
    init_of = {False: jax.jit(tx.init), True: jax.jit(jax.vmap(tx.init))}
    update_of = {False: jax.jit(tx.update), True: jax.jit(jax.vmap(tx.update))}

    def init(params):
        def one(path, p: Any):
            v = views[name_of(path)]
            return init_of[v.stacked](p.reshape(v.shape))

        return jax.tree.map_with_path(one, params)

    def update(updates, state, params=None):
        flat, tree = jax.tree.flatten_with_path(updates)
        states: list[Any] = tree.flatten_up_to(state)
        leaves: list[jax.Array] = tree.flatten_up_to(params)
        outs, news = [], []
        for (path, u), s, p in zip(flat, states, leaves, strict=True):
            v = views[name_of(path)]
            run = update_of[v.stacked]
            out, new = run(u.reshape(v.shape), s, p.reshape(v.shape))
            outs.append(out.reshape(u.shape))
            news.append(new)
        return tree.unflatten(outs), tree.unflatten(news)

    return optax.GradientTransformation(init, update)


def state_axes(path, leaf, params: dict[str, nnx.Param]) -> tuple:
    """Logical axes of one leaf of the optimizer state, from its path and shape.

    Args:
      path: of the leaf in the state; its dict keys spell the parameter's name.
      leaf: anything with a shape.
      params: `parameters.declared(model)`.
    """
    # optax.partition keeps states under 'trained' (frozen ones) and 'from STEP'.
    p = params.get(re.sub(r"^(trained/)?(from \d+/)?", "", name_of(path)))
    if p is None or leaf.ndim == 0:
        return (None,) * leaf.ndim
    if leaf.shape == p.get_value().shape:
        return p.get_metadata()["axes"]
    v = view(p)
    if leaf.shape == v.shape:
        return v.axes
    lead = ("layers",) if v.stacked else ()
    field = next(k.name for k in path[::-1] if isinstance(k, jax.tree_util.GetAttrKey))
    if field in ("v_row", "v_col") and leaf.shape[-1] > 1:
        # optax drops the larger dimension for v_row, the smaller one for v_col.
        larger = int(np.argsort(v.shape[-2:])[-1])
        dropped = larger if field == "v_row" else 1 - larger
        return (*lead, v.axes[-2:][1 - dropped])
    return (*lead, *(None,) * (leaf.ndim - len(lead)))
