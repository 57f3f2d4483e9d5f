"""Makes t5.npz, t5_1_1.npz and buckets.npz from Hugging Face's T5 (PyTorch).

    pip install -e '.[parity]' && python -m tests.goldens.make_t5

The reference runs in float64 on float32 weights, without dropout, with eager attention.
Run it again only to add a case: the numbers do not depend on this code base.
"""

import dataclasses
import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from t5x_lite.config import ModelConfig
from t5x_lite.interop import t5

HERE = pathlib.Path(__file__).parent

# Sizes are small and all different; N*H != D; depths differ and exceed 1.
TINY = ModelConfig(
    vocab_size=89,
    d_model=24,
    d_ff=36,
    heads=3,
    head_dim=10,
    encoder_layers=2,
    decoder_layers=3,
)
# What makes the numbers; how they are computed (scan, remat ...) is not stored.
SHAPE = (
    *("vocab_size", "d_model", "d_ff", "heads", "head_dim", "norm_eps"),
    *("encoder_layers", "decoder_layers", "activation", "gated", "tie_embeddings"),
    *("relative_buckets", "relative_max_distance"),
)
V1_0 = dataclasses.replace(TINY, activation="relu", gated=False, tie_embeddings=True)
V1_1 = dataclasses.replace(TINY, activation="gelu", gated=True, tie_embeddings=False)


def build(cfg: ModelConfig, rng: np.random.Generator):
    """Their model with float32 weights in which every path matters, as float64."""
    theirs = transformers.T5Config(**t5.hf_config(cfg), attn_implementation="eager")
    model = transformers.T5ForConditionalGeneration(theirs)
    if not cfg.tie_embeddings:
        # transformers 5 ties lm_head whatever the config says.
        model.lm_head.weight = torch.nn.Parameter(
            torch.empty_like(model.lm_head.weight)
        )
    assert (model.lm_head.weight is model.shared.weight) == cfg.tie_embeddings
    for name, p in model.named_parameters():
        value = rng.standard_normal(p.shape)
        if "layer_norm" in name:
            value = rng.uniform(0.5, 1.5, p.shape)
        elif name.endswith("Attention.q.weight"):
            value *= (cfg.d_model * cfg.head_dim) ** -0.5
        elif p.ndim == 2 and "relative" not in name and "shared" not in name:
            value *= p.shape[1] ** -0.5
        p.data = torch.tensor(value.astype(np.float32))
    return model.double().eval()


def draw_batch(cfg: ModelConfig, rng: np.random.Generator, inputs: int, targets: int):
    """Ragged rows: full, short, one token; one row padded on the left with a hole."""
    B = 4
    tokens = dict(
        inputs=rng.integers(0, cfg.vocab_size, (B, inputs)),
        decoder_inputs=rng.integers(0, cfg.vocab_size, (B, targets)),
        labels=rng.integers(0, cfg.vocab_size, (B, targets)),
    )
    inputs_mask = np.arange(inputs) < np.array([[inputs], [inputs // 2], [1], [inputs]])
    inputs_mask[3, : inputs // 4] = False
    inputs_mask[3, inputs // 2 : inputs // 2 + 5] = False
    lengths = np.array([[targets - 9], [1], [targets // 3], [targets]])
    decoder_mask = np.arange(targets) < lengths
    tokens["labels"][~decoder_mask] = -100
    tokens["labels"][3, 2::5] = -100  # seen by the decoder, not trained
    masks = dict(inputs_mask=inputs_mask, decoder_mask=decoder_mask)
    return {k: v.astype(np.int32) for k, v in (tokens | masks).items()}


def run(model, batch: dict, z_loss: float) -> dict[str, np.ndarray]:
    """Logits, loss (the model's own) and gradients of loss + z_loss * mean(log Z^2)."""
    ids = {k: torch.tensor(v, dtype=torch.long) for k, v in batch.items()}
    out = model(
        input_ids=ids["inputs"],
        attention_mask=ids["inputs_mask"],
        decoder_input_ids=ids["decoder_inputs"],
        decoder_attention_mask=ids["decoder_mask"],
        labels=ids["labels"],
    )
    log_z = torch.logsumexp(out.logits, dim=-1)[ids["labels"] >= 0]
    model.zero_grad()
    (out.loss + z_loss * (log_z**2).mean()).backward()
    grads = {f"grads/{k}": p.grad.numpy() for k, p in model.named_parameters()}
    return grads | dict(
        logits=out.logits.detach().numpy(), loss=np.array(out.loss.item())
    )


def weights_of(model) -> dict[str, np.ndarray]:
    """Their state dict in NumPy."""
    return {k: v.float().numpy() for k, v in model.state_dict().items()}


def save(name: str, arrays: dict) -> None:
    """Writes floats as float32, no pickles."""
    narrow = {
        k: v.astype(np.float32) if v.dtype == np.float64 else v
        for k, v in arrays.items()
    }
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, **narrow)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    versions = np.array(f"torch {torch.__version__}, transformers "
                        f"{transformers.__version__}")  # fmt: skip
    # Both sequences are longer than relative_max_distance in both cases.
    near = dataclasses.replace(V1_1, relative_buckets=12, relative_max_distance=40)
    cases = [("t5", V1_0, 0.0, (150, 140)), ("t5_1_1", near, 0.01, (64, 60))]
    for seed, (name, cfg, z_loss, (inputs, targets)) in enumerate(cases):
        rng = np.random.default_rng(seed)
        model, batch = build(cfg, rng), draw_batch(cfg, rng, inputs, targets)
        # A state dict repeats shared tensors; the file holds each once.
        once = {k for k, _ in model.named_parameters()}
        weights = {k: v for k, v in weights_of(model).items() if k in once}
        save(
            name,
            {f"weights/{k}": v for k, v in weights.items()}
            | batch
            | run(model, batch, z_loss)
            | dict(
                config=np.array(json.dumps({k: getattr(cfg, k) for k in SHAPE})),
                z_loss=np.array(z_loss),
                made_with=versions,
            ),
        )
    buckets = {}
    distances = np.arange(-300, 301)
    for count, far in [(32, 128), (12, 40), (64, 256), (7, 20)]:
        for direction in ("both", "back"):
            buckets[f"{direction}_{count}_{far}"] = (
                T5Attention._relative_position_bucket(
                    torch.tensor(distances), direction == "both", count, far
                )
                .numpy()
                .astype(np.int32)
            )
    save("buckets", buckets | dict(distances=distances, made_with=versions))


if __name__ == "__main__":
    main()
