"""The cells of a row for targets, where the config leaves them to the tasks."""

import dataclasses

import numpy as np

from t5x_lite.config import Config
from t5x_lite.data import custom_tasks, packing, task_batches, task_readers, tasks
from t5x_lite.vocab import Vocab


def resolve(cfg: Config, words: Vocab) -> Config:
    """Fills in config.data.targets_length=0 for tasks as text.

    An encoder-decoder gets what fills its packed rows best beside inputs_length
    (`packing.targets_length`), one stream the longest targets: none is cut. A function
    of the training splits, the vocabulary and the seed, so the same in each process and
    after a restart.

    Raises:
        ValueError: a length of 1, which is EOS alone; 0 in a mixture, whose texts give
            the lengths, or without an example; tasks, model and files that do not go
            together.
    """
    data = cfg.data
    if data.targets_length == 1:
        raise ValueError(
            "config.data.targets_length=1 holds EOS alone. Allowed: 2 or more, or 0 "
            "for the length that packs best."
        )
    if data.targets_length or not data.tasks or data.task_format == "head":
        return cfg
    if data.mixture:
        raise ValueError(
            "config.data.targets_length=0 cannot be chosen in a config.data.mixture: "
            "its examples must be as long as those of the texts. Set that length."
        )
    chosen = {name: custom_tasks.find(name, data.custom_tasks) for name in data.tasks}
    task_batches.check(cfg, chosen)
    texts = [
        tasks.text_of(task, record)
        for task in chosen.values()
        for record in task_readers.read(task.source, data.task_dir, "train")
        if tasks.trains(task, record)
    ]
    if not texts:
        raise ValueError(
            f"config.data.targets_length=0 is chosen by examples, and config.data."
            f"tasks={data.tasks} have none to train on. Set a length, or look at the "
            "training files."
        )
    sides = [words.encode_batch(list(side)) for side in zip(*texts, strict=True)]
    lengths_X2 = np.array([[len(ids) + 1 for ids in side] for side in sides]).T  # EOS
    lengths_X2[:, 0] = np.minimum(lengths_X2[:, 0], data.inputs_length)
    if cfg.model.structure == "encoder_decoder":
        T = packing.targets_length(lengths_X2, data.inputs_length, seed=cfg.seed)
    else:
        T = int(lengths_X2[:, 1].max())
    return dataclasses.replace(cfg, data=dataclasses.replace(data, targets_length=T))
