"""The README's table of families says what the code has and the tests cover."""

import pathlib

from t5x_lite.interop import families, hf_config, workdirs
from tests import hf_dirs, test_convert_runs, test_parity_convert, test_parity_heads

README = pathlib.Path(__file__).parents[1] / "README.md"
NAMES = {
    "t5": "T5, T5.1.1, FLAN-T5, ByT5",
    "mt5": "mT5",
    "umt5": "umT5",
    "bert": "BERT",
    "ernie": "ERNIE (Baidu)",
    "nezha": "NEZHA",
    "roberta": "RoBERTa",
    "albert": "ALBERT",
    "electra_discriminator": "ELECTRA, both or its discriminator",
    "electra": "ELECTRA's generator alone",
    "xlnet": "XLNet",
    "gpt": "GPT",
    "gpt2": "GPT-2",
    "bart": "BART",
    "mbart": "mBART",
    "prophetnet": "ProphetNet",
}


def rows() -> list[str]:
    """What the table should be, from the registry and the parameters of the tests."""
    golden = set(hf_dirs.FAMILIES.values())
    live = {hf_dirs.FAMILIES.get(name, name) for name in test_parity_convert.AUTO}
    live |= set(test_parity_convert.T5_AS)
    head = "| family | import | export | logits | going on | tokenizer | heads |"
    found = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for family, name in NAMES.items():
        read = family in families.FAMILIES and family in hf_config.THEIRS
        how = [
            kind for kind, of in (("golden", golden), ("live", live)) if family in of
        ]
        cells = [
            name,
            "yes" if read and family in workdirs.CONFIGS else "–",
            "yes" if read else "–",
            ", ".join(how) or "–",
            "yes" if family in test_convert_runs.CONTINUED else "–",
            f"`{file}`" if (file := test_convert_runs.TOKENIZERS.get(family)) else "–",
            ", ".join(h for f, h in test_parity_heads.CASES if f == family) or "–",
        ]
        found.append(f"| {' | '.join(cells)} |")
    return found


def test_the_table_of_weights_is_right():
    text = README.read_text()
    table = text.split("<!-- weights -->")[1].split("<!-- end -->")[0]
    assert table.strip().splitlines() == rows()


def test_the_table_has_every_family():
    # The halves of ELECTRA are one row.
    assert {*NAMES, "electra_generator"} == set(families.FAMILIES)
    assert set(families.FAMILIES) == set(hf_config.THEIRS)
