"""`t5x-lite COMMAND`: the same as `python -m t5x_lite.COMMAND`."""

import importlib
import sys

from t5x_lite import __version__

COMMANDS = {
    "train": "train the model of a config file, or resume",
    "evaluate": "held-out loss of a checkpoint",
    "generate": "fill the gaps of a text, or go on with it",
    "convert": "weights of Hugging Face and T5X, in and out",
    "export": "parameters as one .npz with readable names",
    "plan": "memory, network and time of a config on a machine that is not here",
    "verify": "are the checkpoints of a run what was saved?",
    "inspect": "print examples of a config, and who sees whom",
    "elmo": "train a small ELMo biLM on words",
    "study": "scaling studies: plan, run, fit, report, coordcheck",
    "tokenize": "build the token stores of a config and show what is in them",
    "vocab": "train or show a SentencePiece vocabulary",
}


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"t5x_lite {__version__}\n\nusage: t5x-lite COMMAND [--help]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}")
        return
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        sys.exit(f"error: t5x-lite has no command {name!r}. Commands: {known}.")
    from t5x_lite import cli

    sys.argv[0] = f"t5x-lite {name}"
    cli.run(importlib.import_module(f"t5x_lite.{name}").main)


if __name__ == "__main__":
    main()
