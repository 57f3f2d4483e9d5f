"""The optimizer's state of the run before (config.init_optimizer='restore')."""

import jax
import jax.numpy as jnp
import optax

from t5x_lite import checkpoint, model, optim, parameters, recipes
from t5x_lite.config import Config
from t5x_lite.rows import Source


def check(cfg: Config, net, source: Source, changed: list[str]):
    """Refuses it where the states do not fit.

    Args:
        changed: our parameters that are not as they were in the source.

    Raises:
        ValueError: naming what differs.
    """

    def shapes(cfg: Config, net) -> dict[str, tuple]:
        params = jax.eval_shape(
            lambda: parameters.init_params(net, jax.random.key(0)),
        )
        state = jax.eval_shape(optim.make(cfg, net).init, params)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {jax.tree_util.keystr(path): x.shape for path, x in leaves}

    wrong = list(changed)
    if not wrong:
        ours, then = shapes(cfg, net), shapes(source.cfg, model.build(source.cfg.model))
        wrong = [
            f"{k}"
            for k in sorted(ours.keys() | then.keys())
            if ours.get(k) != then.get(k)
        ]
    _, _, meta = checkpoint.read_run(source.path, source.step)
    if meta.get("params_only"):
        wrong = ["it has parameters only"]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(
            f"config.init_optimizer='restore': the optimizer of {source.path!r} (step "
            f"{source.step}) does not fit this run: {', '.join(wrong[:6])}{more}. It "
            "needs the same parameters, optimizer and frozen names. Set it to 'reset'."
        )


def restore(cfg: Config, abstract_opt):
    """The state of config.init_from's optimizer, to go on with its moments.

    The moments' own counts stay (Adam's correction of the first steps is done); that of
    the schedule begins again: the learning rate is this run's.
    """
    given = Source.of(cfg.init_from, cfg.init_step)
    state = checkpoint.load_part(given.path, given.step, {"opt": abstract_opt})["opt"]

    def counts(x) -> bool:
        return isinstance(x, optax.ScaleByScheduleState | recipes.Counted)

    def begin(x):
        return x._replace(count=jnp.zeros_like(x.count)) if counts(x) else x

    return jax.tree.map(begin, state, is_leaf=counts)
