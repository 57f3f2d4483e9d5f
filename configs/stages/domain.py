"""Stage 2 of 4, domain-adaptive: the same objective goes on on the domain's text.

See general.py for the commands. The optimizer's moments are those of stage 1
(init_optimizer='restore'); the schedule begins again, at a third of its rate. To replay
the general text beside it, give a mixture:

    --config.data.mixture="{'domain': {'train': 'data/stages/persuasion_train.jsonl', \\
        'heldout': 'data/stages/persuasion_heldout.jsonl'}, 'general': {'train': \\
        'data/train.jsonl', 'heldout': 'data/heldout.jsonl', 'rate': 0.5}}"

2026-11-21, 2 CPU cores, one seed: held-out loss of the domain 5.9888; that of stage 1
went from 6.0055 to 6.0143 (forgetting.json)."""

from configs.stages import general


def get_config(arg=""):
    c = general.follow(general.get_config(arg), "general", arg)
    c.data.train = "data/stages/persuasion_train.jsonl"
    c.data.heldout = "data/stages/persuasion_heldout.jsonl"
    c.init_optimizer = "restore"
    c.optim.learning_rate /= 3
    if not arg:
        c.steps, c.eval_every, c.checkpoint.every = 100, 50, 50
    return c
