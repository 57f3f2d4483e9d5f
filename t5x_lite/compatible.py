"""May this config go on from that checkpoint?"""

import json

from t5x_lite import config as config_lib
from t5x_lite.vocab import Vocab

# What the stored arrays depend on, and what the sequence of batches depends on.
_STATE_KEYS = (
    *("model", "optim.name", "optim.lr_rules", "optim.unfreeze", "loss.lm_weight"),
)
_FREE_MODEL_KEYS = ("attention", "dropout", "dtype", "remat", "scan", "unpadded")
_ORDER_KEYS = (
    *("seed", "objective", "data.batch_size", "data.inputs_length"),
    *("data.train_inputs", "data.static_noise"),
)


def check_compatible(meta: dict, cfg: config_lib.Config, data: dict):
    """Refuses a checkpoint that this config cannot continue exactly.

    Raises:
      ValueError: naming every key that differs with both values.
    """
    # A key that is newer than the checkpoint had its default.
    frozen = config_lib.freeze(meta["config"])
    then, now = (json.loads(json.dumps(config_lib.to_json(c))) for c in (frozen, cfg))

    def differing(keys, a, b):
        for key in keys:
            left, right = _at(a, key), _at(b, key)
            if isinstance(left, dict) and isinstance(right, dict):
                for k in sorted({*left, *right}):
                    if left.get(k) != right.get(k):
                        yield f"config.{key}.{k}", left.get(k), right.get(k)
            elif left != right:
                yield f"config.{key}", left, right

    free = {f"config.model.{k}" for k in _FREE_MODEL_KEYS}
    # Nothing was trained yet in a workdir that was converted.
    trained = not meta.get("params_only")
    keys = _STATE_KEYS if trained else ("model",)
    found = [d for d in differing(keys, then, now) if d[0] not in free]
    if found:  # the vocabulary gives their size
        found += differing(["data.vocab"], then, now)
    way_out = "Restore these values, or train in a new --workdir."
    before = meta["data"]["vocab"] if "vocab" in meta["data"] else ""
    if not trained and before and before != data["vocab"]:
        found.append(("data vocab", before, data["vocab"]))
    if trained and not found and not cfg.checkpoint.accept_changes:
        found = [*differing(_ORDER_KEYS, then, now)]
        found += [
            (f"data {k}", meta["data"].get(k), v)
            for k, v in data.items()
            if meta["data"].get(k) != v
        ]
        way_out += (
            " To go on from here on other data all the same: "
            "--config.checkpoint.accept_changes=True."
        )
    if found:
        rows = [f"{k}: {a!r} in the checkpoint, {b!r} now" for k, a, b in found]
        raise ValueError(
            f"the checkpoint of step {meta['step']} was made with another config:\n  - "
            + "\n  - ".join(rows)
            + f"\n{way_out}"
        )


def check_vocab(meta: dict, words: Vocab):
    """Refuses a vocabulary other than the one a checkpoint was trained with."""
    trained_with = meta["data"]["vocab"]
    if not trained_with:
        raise ValueError(
            "the workdir was converted without a vocabulary: none was beside the "
            "weights, or it cannot be read here. Convert it again with --vocab=FILE."
        )
    if trained_with != words.fingerprint:
        raise ValueError(
            f"config.data.vocab={words.spec!r} is not the vocabulary of the run: its "
            f"fingerprint is {words.fingerprint}, the checkpoint of step "
            f"{meta['step']} was trained with {trained_with}. Put the original file "
            "back."
        )


def _at(tree: dict, path: str):
    for part in path.split("."):
        tree = tree[part]
    return tree
