"""Which tokens are noise: counts, random segmentations and masks, for whole batches."""

import numpy as np

from t5x_lite.objectives.draws import Draws


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Number of noise tokens and of noise spans among `length` tokens.

    As `random_spans_noise_mask` of the T5 code: float32, rounded half to even, at
    least one noise token, one other token and one span.

    Args:
        length: number of raw tokens, >= 2.
        density: share of noise tokens, in (0, 1).
        mean_span: mean length of a noise span in tokens, >= 1.

    Raises:
        ValueError: a value is out of range, or the spans cannot be kept apart.
    """
    if not 0 < density < 1:
        raise ValueError(f"density={density}: a share in (0, 1) is needed (T5: 0.15).")
    if not mean_span >= 1:
        raise ValueError(f"mean_span={mean_span}: 1 token or more is needed (T5: 3).")
    if length < 2:
        raise ValueError(f"{length} raw tokens: noise needs at least 2.")
    noise = int(np.round(np.float32(length) * np.float32(density)))
    noise = min(max(noise, 1), length - 1)
    spans = max(int(np.round(np.float32(noise) / np.float32(mean_span))), 1)
    if spans > length - noise:
        raise ValueError(
            f"density={density}, mean_span={mean_span}: {spans} spans of noise cannot "
            f"be kept apart by the {length - noise} other tokens of {length}. Use a "
            "smaller density or longer spans."
        )
    return noise, spans


def random_segments(rng: Draws, items: int, segments: int) -> np.ndarray:
    """Cuts `items` into non-empty segments; all ways to do so are equally likely.

    Returns:
        int64 [B, segments + 1]: 0, the segments - 1 cuts ascending, `items`.
    """
    bounds = np.zeros((rng.batch, segments + 1), np.int64)
    bounds[:, 1:-1] = rng.subset(items - 1, segments - 1) + 1
    bounds[:, -1] = items
    return bounds


def random_spans(
    rng: Draws, length: int, density: float, mean_span: float
) -> tuple[np.ndarray, np.ndarray]:
    """Random noise spans (T5's `random_spans_noise_mask`).

    Other tokens and noise alternate strictly; the first segment is not noise, the
    last one is.

    Returns:
        (mask_BT bool [B, length], True = noise; starts_BN int64 [B, spans], the
        position of each span's first token).
    """
    noise, spans = noise_counts(length, density, mean_span)
    noise_bounds = random_segments(rng, noise, spans)
    other_bounds = random_segments(rng, length - noise, spans)
    lengths = np.stack([np.diff(other_bounds), np.diff(noise_bounds)], axis=-1)
    is_noise = np.broadcast_to(np.array([False, True]), lengths.shape)
    mask_BT = np.repeat(is_noise.reshape(-1), lengths.reshape(-1))
    starts_BN = other_bounds[:, 1:] + noise_bounds[:, :-1]
    return mask_BT.reshape(rng.batch, length), starts_BN
