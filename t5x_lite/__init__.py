"""t5x_lite: pretrain, fine-tune and scale Transformer language models in JAX."""

__version__ = "0.1.0"


def load(workdir, step: int = -1):
    """A trained model for a notebook: `load("runs/demo").fill("a ___ man")`.

    See `t5x_lite.notebook.Model`.
    """
    from t5x_lite import notebook

    return notebook.load(workdir, step)
