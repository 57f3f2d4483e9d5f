"""Makes optim.npz: torch's AdamW and transformers' Adafactor over a few steps.

    pip install -e '.[parity]' && python -m tests.goldens.make_optim

The references run in float64. Values start on a grid of 8-bit integers, so that the
file is small; a step's gradient is `step_gradient` of one stored array.
"""

import numpy as np
import torch
import transformers
from transformers.optimization import Adafactor

from tests.goldens.make_t5 import save
from tests.test_optim_goldens import GRID, KEPT, SCALES, step_gradient

# Name -> shape in our model, and in the reference if that is not the same: one matrix
# (or vector) per layer, heads and head dim joined. All matrices have sides >= 128,
# below which T5's Adafactor does not factor but transformers' does.
SHAPES = {
    "wide": ((128, 136), None),
    "tall": ((150, 128), None),
    "norm/scale": ((40,), None),
    "blocks/query": ((2, 128, 2, 66), (2, 128, 132)),
    "blocks/out": ((2, 2, 65, 128), (2, 130, 128)),
    "blocks/norm/scale": ((2, 40), (2, 40)),
}
ADAMW = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
ADAFACTOR = dict(
    lr=0.3, scale_parameter=True, relative_step=False, warmup_init=False, beta1=None
)


def train(make, start: dict, gradient: dict) -> dict[str, np.ndarray]:
    """Change of every parameter after all steps."""
    split, params = {}, {}
    for name, (_, matrices) in SHAPES.items():
        value = torch.tensor(start[name] / GRID, dtype=torch.float64)
        split[name] = value.reshape(matrices) if matrices else value[None]
        params[name] = [torch.nn.Parameter(one.clone()) for one in split[name]]
    optimizer = make(params)
    for step in range(len(SCALES)):
        for name, each in params.items():
            g = step_gradient(gradient[name], step).reshape(split[name].shape)
            for p, one in zip(each, g, strict=True):
                p.grad = torch.tensor(one)
        optimizer.step()
    return {
        name: (torch.stack(list(each)) - split[name])
        .detach()
        .numpy()
        .reshape(SHAPES[name][0])
        for name, each in params.items()
    }


def adamw(params: dict):
    scales = [p for name, ps in params.items() if "norm" in name for p in ps]
    others = [p for name, ps in params.items() if "norm" not in name for p in ps]
    groups = [dict(params=scales, weight_decay=0.0), dict(params=others)]
    return torch.optim.AdamW(groups, **ADAMW)  # pyright: ignore[reportArgumentType]


def adafactor(params: dict):
    return Adafactor([p for ps in params.values() for p in ps], **ADAFACTOR)


def main() -> None:
    rng = np.random.default_rng(0)
    draw = {k: rng.integers(-127, 128, s, np.int8) for k, (s, _) in SHAPES.items()}
    draw["norm/scale"][:] = 0  # below Adafactor's smallest parameter scale
    # Rows and columns of unlike size, so that factoring has something to estimate.
    gradient = {}
    for name, (shape, _) in SHAPES.items():
        size = 1.0
        for n in shape:
            size = np.multiply.outer(size, rng.uniform(0.2, 1.0, n))
        size *= rng.standard_normal(shape)
        gradient[name] = np.round(size / np.abs(size).max() * 127).astype(np.int8)
    arrays: dict[str, np.ndarray] = {f"start/{k}": v for k, v in draw.items()}
    arrays |= {f"gradient/{k}": v for k, v in gradient.items()}
    for optimizer in (adamw, adafactor):
        change = train(optimizer, draw, gradient)
        arrays |= {f"{optimizer.__name__}/{k}": v[KEPT] for k, v in change.items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    save("optim", arrays | dict(made_with=np.array(versions)))


if __name__ == "__main__":
    main()
