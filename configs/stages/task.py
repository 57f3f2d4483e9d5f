"""Stage 3 of 4, task-adaptive: the text of the task's training examples, no labels.

See general.py for the commands. 2026-11-21, 2 CPU cores, one seed: held-out loss
5.8768; that of the domain went from 5.9888 to 5.9835, that of stage 1 from 6.0055 to
6.0527."""

from configs.stages import general


def get_config(arg=""):
    c = general.follow(general.get_config(arg), "domain", arg)
    c.data.train = "data/stages/speech_train.jsonl"
    c.data.heldout = "data/stages/speech_dev.jsonl"
    c.init_optimizer = "reset"
    c.optim.learning_rate /= 3
    if not arg:
        c.steps, c.eval_every, c.checkpoint.every = 100, 50, 50
        c.optim.warmup_steps = 20
    return c
