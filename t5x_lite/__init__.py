"""t5x_lite: pretrain, fine-tune and scale Transformer language models in JAX."""

__version__ = "0.1.0"
