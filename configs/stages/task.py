"""Stage 3 of 4, task-adaptive: the text of the task's training examples, no labels.

See general.py for the commands. RESULTS"""

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
