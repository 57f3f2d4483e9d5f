"""Makes heads.json: what transformers' classes with a head hold.

    pip install -e '.[parity]' && python -m tests.goldens.make_heads

Of each class, of the shape of its family's golden: `config`; `head`, the name and shape
of each parameter that its body has not; `tensors` and `parameters`, how many there are
in all, tied ones once. Nothing here imports t5x_lite.
"""

import json
import pathlib

import numpy as np
import transformers

HERE = pathlib.Path(__file__).parent
# Golden -> the name in its family's classes, and which of them there are.
FOUR = ("SequenceClassification", "MultipleChoice", "TokenClassification")
FOUR += ("QuestionAnswering",)
TWO = (FOUR[0], FOUR[3])
CLASSES = {
    "bert": ("Bert", FOUR),
    "ernie": ("Ernie", FOUR),
    "roberta": ("Roberta", FOUR),
    "albert": ("Albert", FOUR),
    "electra_generator": ("Electra", FOUR[2:]),
    "xlnet": ("XLNet", (*FOUR[:3], "QuestionAnsweringSimple")),
    "gpt": ("OpenAIGPT", FOUR[:1]),
    "gpt2": ("GPT2", (FOUR[0], *FOUR[2:])),
    "bart": ("Bart", TWO),
    "mbart": ("MBart", TWO),
    "t5": ("T5", TWO),
    "mt5": ("MT5", TWO),
    "umt5": ("UMT5", TWO),
}
LABELS = 3


def config(golden: str) -> dict:
    """Their config of a golden; of T5 and mT5 that of umT5, whose keys are the same."""
    source = "umt5" if golden in ("t5", "mt5") else golden
    with np.load(HERE / f"{source}.npz", allow_pickle=False) as file:
        return json.loads(str(file["config"]))


def about(golden: str, name: str) -> dict:
    """The row of a class."""
    made, labels = config(golden), 2 if "QuestionAnswering" in name else LABELS
    cls = getattr(transformers, name)
    net = cls(cls.config_class(**made | dict(num_labels=labels)))
    body = getattr(net, net.base_model_prefix, None)
    inside = set() if body is None else {id(p) for p in body.parameters()}
    if body is not None:  # a pooler is the head's
        inside -= {id(p) for n, p in body.named_parameters() if "pooler" in n}
    named = dict(net.named_parameters())
    head = {
        n: list(p.shape)
        for n, p in named.items()
        if id(p) not in inside and not n.startswith(("shared", "encoder", "decoder"))
    }
    return dict(
        config=made | dict(model_type=net.config.model_type, num_labels=labels),
        head=head,
        tensors=len(named),
        parameters=sum(p.numel() for p in named.values()),
    )


def main():
    rows = {
        f"{start}For{end}": about(golden, f"{start}For{end}")
        for golden, (start, ends) in CLASSES.items()
        for end in ends
    }
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    (HERE / "heads.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
