"""Records of studies that were never run, with losses from a known law."""

import json

import numpy as np

from t5x_lite.studies.fit import Points

# E, A, B, alpha, beta.
HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al. 2022, equation 10
BESIROGLU = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # Besiroglu et al. 2024
SMALL = (1.2, 30.0, 120.0, 0.32, 0.36)  # made up, for sizes of a laptop


def loss(law, N, D):
    E, A, B, alpha, beta = law
    return E + A / N**alpha + B / D**beta


def points(law, N, C) -> Points:
    """All pairs of sizes and budgets with 1 to 500 tokens a parameter; C = 6 N D."""
    N, C = (v.ravel() for v in np.meshgrid(N, C))
    D = C / (6 * N)
    keep = (D / N > 1) & (D / N < 500)
    N, D, C = N[keep], D[keep], C[keep]
    return Points(N, D, C, loss(law, N, D))


def rows(
    budgets=(1e11, 5e11, 2.5e12, 1.25e13),
    shapes=((1, 32), (2, 32), (2, 48), (3, 64), (4, 64), (4, 96), (6, 96)),
    seeds=3,
    noise=0.004,
    law=SMALL,
    structure="decoder",
) -> list[dict]:
    """Lines of a results.jsonl: each budget spent on each shape that is not far off."""
    rng = np.random.default_rng(0)
    found = []
    for C in budgets:
        for layers, width in shapes:
            body, embedding = 12 * layers * width**2, 256 * width
            N = body + embedding
            D = C / (6 * N)
            if not 3 < D / N < 700:
                continue
            steps = max(20, int(D / 1024))
            name = f"{structure}_l{layers}_d{width}_{C:.0e}".replace("+", "")
            for seed in range(seeds):
                tokens = np.linspace(D / 100, D, 100)
                curve = loss(law, N, tokens) * np.exp(0.01 * rng.normal(size=100))
                final = loss(law, N, D) * np.exp(noise * rng.normal())
                found.append(
                    _row(name, seed, C, D, (body, embedding), steps, curve, final)
                    | _config(structure, layers, width, steps, seed)
                )
    return found


def _row(name, seed, C, D, sizes, steps, curve, final) -> dict:
    at = np.linspace(steps / len(curve), steps, len(curve))
    return {
        "cell": name,
        "seed": seed,
        "labels": {},
        "revision": "0123456789ab",
        "parameters": {
            "total": sum(sizes),
            "embedding": sizes[1],
            "non_embedding": sizes[0],
        },
        "training_flops": C,
        "tokens": D,
        "curve": [[float(s), float(v)] for s, v in zip(at, curve, strict=True)],
        "heldout_loss": float(final),
        "score": "loss",
        "heldout": {"loss": float(final), "extra_loss": 2 * float(final)},
        "wall_seconds": 30.0,
        "hardware": "2 CPU cores, x86_64",
    }


def _config(structure, layers, width, steps, seed) -> dict:
    shape = {"decoder_layers": layers, "encoder_layers": layers, "d_model": width}
    return {
        "overrides": {f"model.{k}": v for k, v in shape.items()} | {"steps": steps},
        "config": {
            "model": {"structure": structure, **shape},
            "objective": {"name": "causal_lm"},
            "optim": {"learning_rate": 0.004},
            "steps": steps,
            "seed": seed,
        },
    }


def write(path, lines: list[dict]):
    """results.jsonl at `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path
