"""Published, trained weights give their published outputs in our models.

Outputs of PyTorch's own files are compared by `make parity`, which installs torch.
"""

import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from t5x_lite import beam
from t5x_lite import model as model_lib
from t5x_lite.interop import fairseq, families, opennmt, torch_files
from tests import parity
from tests import parity_families as pf

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT.parent / "shared/data/weights"
# CTranslate2's own tests: tests/translator_test.cc, of the same model.
NAMES = {
    "آتزمون": "atzmon",
    "آتشيسون": "achison",
    "آرباكه": "arbake",
    "آزا": "azza",
    "آرثر": "arther",
}
TOKEN_SCORES = {  # "Scoring", to 1e-5; EOS last
    "آتزمون": (-0.106023, -0.065410, -0.056002, -0.447953, -0.230714, -0.092184)
    + (-0.063463,),
    "آتشيسون": (-0.072660, -0.300309, -0.181187, -0.395671, -0.025631, -0.123466)
    + (-0.002034, -0.012639),
    "آرباكه": (-0.103136, -0.089504, -0.063889, -0.007327, -0.452072, -0.060154)
    + (-0.016636,),
    "آرثر": (-0.076704, -0.036037, -0.029253, -0.030273, -0.149276, -0.002440)
    + (-0.003742,),
}
# "LongDecodingKeepsCachedAttentionExact": 100 letters of "آتزمون", EOS forbidden.
LONG = (
    "atzmonetenehehehennnehehehennnnnehehehehoumehehehehehehehehaumehumennehtamennnnnne"
    "'tamennneheheheheh"
)
# README of Merck/Sapiens.
ANTIBODY = (
    "**QLV*SGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMEL"
    "KSLQFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS"
)
RESIDUE_SCORES = [  # of A, C, D, E at the first five positions
    [0.003272, 0.004147, 0.004011, 0.004590],
    [0.012038, 0.003854, 0.006803, 0.008174],
    [0.003384, 0.003895, 0.003726, 0.004068],
    [0.004612, 0.005325, 0.004443, 0.004641],
    [0.005519, 0.003664, 0.003555, 0.005269],
]


def folder(name: str) -> Path:
    if not (WEIGHTS / name).exists():
        pytest.skip(f"{name} is not in ../shared/data/weights")
    return WEIGHTS / name


def logits_of(cfg, params: dict, batch: dict) -> np.ndarray:
    @jax.jit
    def forward(params):
        bound: Any = model_lib.bind(model_lib.build(cfg), params)
        return bound.logits(bound.outputs(batch).cells_BKE)

    return np.asarray(forward(params))


def stream(rows: list[list[int]], *, causal: bool = False, types: bool = False) -> dict:
    """Rows of ids, padded with 0."""
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    segments = np.array([[1] * len(r) + [0] * (width - len(r)) for r in rows], np.int32)
    places = np.tile(np.arange(width, dtype=np.int32), (len(rows), 1))
    found = dict(tokens=tokens, segments=segments, positions=places)
    found["ranks"] = places if causal else np.zeros_like(places)
    return found | (dict(types=np.zeros_like(places)) if types else {})


class Transliteration:
    """The Arabic-to-Latin model and its two vocabularies."""

    def __init__(self, path: Path):
        with np.load(path / "weights.npz", allow_pickle=False) as file:
            weights = dict(file)
        self.cfg = opennmt.config(weights, heads=8, max_positions=128)
        self.params = opennmt.from_ctranslate2(weights, self.cfg)
        # Unknown letters have the last id, which no file lists.
        self.source, target = (
            [*(path / f"{name}_vocabulary.txt").read_text("utf-8").split(), "<unk>"]
            for name in ("source", "target")
        )
        self.letters = self.source + target
        self.start, self.end = (
            len(self.source) + target.index(mark) for mark in ("<s>", "</s>")
        )

    def read(self, names) -> dict:
        return stream([[self.source.index(letter) for letter in n] for n in names])

    def search(self, names, **settings) -> list[str]:
        tokens, _ = beam.search(
            model_lib.build(self.cfg),
            self.params,
            self.read(names),
            eos_id=self.end,
            used_ids=len(self.letters),
            pad_id=self.start,
            **settings,
        )
        rows = beam.best(np.asarray(tokens), self.end)
        return ["".join(self.letters[token] for token in row) for row in rows]


@pytest.fixture(scope="module")
def arabic() -> Transliteration:
    return Transliteration(folder("aren_transliteration"))


def test_our_beam_search_writes_arabic_names_in_latin_letters(arabic):
    found = arabic.search(NAMES, max_length=12, beams=4)
    assert dict(zip(NAMES, found, strict=True)) == NAMES


def test_a_hundred_letters_of_beam_search_are_ctranslate2s(arabic):
    """CTranslate2 takes a token that may not come out of the softmax, we do not."""
    bias_V = arabic.params["output"]["bias"]
    endless = copy.copy(arabic)
    never_V = jnp.asarray(bias_V).at[arabic.end].set(-1e9)
    output = arabic.params["output"] | {"bias": never_V}
    endless.params = arabic.params | {"output": output}
    settings = dict(max_length=100, beams=4, length_penalty=1.0)
    assert endless.search(["آتزمون"], **settings) == [LONG]


def test_every_letter_scores_as_in_ctranslate2(arabic):
    first = len(arabic.source)
    targets = [
        [*(arabic.letters.index(c, first) for c in NAMES[name]), arabic.end]
        for name in TOKEN_SCORES
    ]
    decoder = stream([[arabic.start] + row[:-1] for row in targets], causal=True)
    batch = dict(encoder=arabic.read(TOKEN_SCORES), decoder=decoder)
    logits = np.float64(logits_of(arabic.cfg, arabic.params, batch))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for b, (row, wanted) in enumerate(zip(targets, TOKEN_SCORES.values(), strict=True)):
        found = logp[b, np.arange(len(row)), row]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_weights_that_do_not_fit_are_named(arabic):
    with np.load(folder("aren_transliteration") / "weights.npz") as file:
        weights = dict(file)
    weights["decoder/layer_5/ffn/linear_1/bias"] = np.zeros(31, np.float32)
    weights["encoder/more"] = np.zeros(3)
    with pytest.raises(ValueError, match="unexpected: encoder/more") as e:
        opennmt.from_ctranslate2(weights, arabic.cfg)
    assert "(31,) instead of (32,): decoder/layer_5/ffn" in str(e.value)


FAIRSEQ = (  # Hugging Face's name -> fairseq's
    (r"roberta\.embeddings\.word_embeddings", "{body}.embed_tokens"),
    (r"roberta\.embeddings\.position_embeddings", "{body}.embed_positions"),
    (r"roberta\.embeddings\.LayerNorm", "{body}.{embedded}"),
    (r"roberta\.encoder\.layer", "{body}.layers"),
    (r"attention\.self\.(query|key|value)", lambda m: f"self_attn.{m[1][0]}_proj"),
    (r"attention\.output\.dense", "self_attn.out_proj"),
    (r"attention\.output\.LayerNorm", "self_attn_layer_norm"),
    (r"intermediate\.dense", "fc1"),
    (r"output\.dense", "fc2"),
    (r"output\.LayerNorm", "final_layer_norm"),
    (r"^lm_head", "{head}.lm_head"),
)


def fairseq_names(weights: dict, new: bool) -> dict:
    side = "encoder" if new else "decoder"
    words = dict(body=f"{side}.sentence_encoder", head=side)
    words["embedded"] = "layernorm_embedding" if new else "emb_layer_norm"
    found = {}
    for name, array in weights.items():
        theirs: Any
        for pattern, theirs in FAIRSEQ:
            if isinstance(theirs, str):
                theirs = theirs.format(**words)
            name = re.sub(pattern, theirs, name)
        found[name] = array
    return found


@pytest.mark.parametrize("new", [False, True])
def test_fairseq_and_hugging_face_name_the_same_roberta(new):
    arrays = pf.load("roberta")
    theirs, cfg = pf.weights(arrays), pf.config("roberta", arrays)
    wanted = families.from_hf("roberta", theirs, cfg)
    drop = "token_type", "lm_head.decoder", "position_ids"
    kept = {k: a for k, a in theirs.items() if not any(d in k for d in drop)}
    weights = fairseq_names(kept, new)
    args = dict(activation_fn="gelu", encoder_attention_heads=cfg.heads)
    args |= dict(encoder_ffn_embed_dim=cfg.d_ff, encoder_layers=cfg.encoder_layers)
    ours = fairseq.config(args, weights)
    found = fairseq.from_fairseq(weights, ours)
    flat = traverse_util.flatten_dict(found, sep="/")
    for name, array in traverse_util.flatten_dict(wanted, sep="/").items():
        if name != "inputs/types":  # fairseq has none
            np.testing.assert_array_equal(flat.pop(name), array, err_msg=name)
    assert not flat
    same = ("max_positions", "position_offset", "activation", "head_dim", "norm_order")
    assert all(getattr(ours, key) == getattr(cfg, key) for key in same)


def test_without_torch_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        fairseq.read("checkpoint.pt")


class Evil:
    """What a pickle may ask for: here, to create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parity
def test_code_in_a_fairseq_checkpoint_is_not_run(tmp_path):
    torch = importlib.import_module("torch")
    created = tmp_path / "created"
    content = dict(args=Evil(created), model={})
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="none of it was run"):
        fairseq.read(tmp_path / "checkpoint.pt")
    assert not created.exists()
    torch.save(dict(model={}), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is no fairseq checkpoint"):
        fairseq.read(tmp_path / "checkpoint.pt")


@pytest.fixture(scope="module")
def sapiens():
    path = folder("roberta_sapiens")
    args, weights = fairseq.read(path / "checkpoint_vh.pt")
    words = ["<s>", "<pad>", "</s>", "<unk>"]
    words += (path / "dict.txt").read_text().split()[::2] + ["<mask>"]  # word count
    letters = [words.index("<mask>" if c == "*" else c) for c in ANTIBODY]
    cfg = fairseq.config(args, weights)
    tokens = [words.index("<s>"), *letters, words.index("</s>")]
    return cfg, weights, words, tokens


@pytest.mark.parity
def test_the_antibody_model_gives_its_published_scores(sapiens):
    cfg, weights, words, tokens = sapiens
    params = fairseq.from_fairseq(weights, cfg)
    batch = dict(main=stream([tokens]))
    logits = logits_of(cfg, params, batch)[0, 1:-1].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = p[:5, [words.index(letter) for letter in "ACDE"]]
    np.testing.assert_allclose(found, RESIDUE_SCORES, rtol=0, atol=6e-7)
    best = "".join(words[i] for i in np.argmax(p, axis=-1))
    filled = "".join(b if a == "*" else a for a, b in zip(ANTIBODY, best, strict=True))
    assert filled.startswith("QVQLVQSGVEVKKPG")


@pytest.mark.parity
def test_the_antibody_model_is_transformers_roberta(sapiens):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    cfg, weights, words, tokens = sapiens
    theirs = transformers.RobertaConfig(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=256,
        max_position_embeddings=146,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    net = transformers.RobertaForMaskedLM(theirs).eval()
    state = net.state_dict()
    names = fairseq_names(dict.fromkeys(state, None), new=False)
    for ours, name in zip(state, names, strict=True):
        if name in weights:
            state[ours] = torch.tensor(weights[name])
    state["roberta.embeddings.token_type_embeddings.weight"] *= 0
    state["lm_head.decoder.weight"] = state["roberta.embeddings.word_embeddings.weight"]
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    net.load_state_dict(state)
    with torch.no_grad():
        wanted = net(torch.tensor([tokens])).logits.numpy()
    params = fairseq.from_fairseq(weights, cfg)
    found = logits_of(cfg, params, dict(main=stream([tokens])))
    parity.close("logits", found, wanted)


# Reactions of textbooks: esterification, Suzuki coupling, amide, Grignard.
REACTIONS = (
    "CC(=O)O.OCC>>CC(=O)OCC",
    "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
    "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1",
    "CC(C)=O.C[Mg]Br>>CC(C)(C)O",
)
SMILES = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")  # Schwaller et al. 2018


@pytest.mark.parity
def test_the_reaction_model_is_transformers_albert_and_knows_its_molecules():
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    path = folder("albert_rxnmapper")
    theirs = json.loads((path / "config.json").read_text())
    words = (path / "vocab.txt").read_text().splitlines()
    rows = [
        [words.index(w) for w in ("[CLS]", *SMILES.findall(text), "[SEP]")]
        for text in REACTIONS
    ]
    cfg = families.model_config("albert", theirs, classes=0)
    tensors = torch_files.open_tensors([path / "pytorch_model.bin"])
    params = families.from_hf("albert", tensors, cfg)
    config = transformers.AlbertConfig(**theirs, attn_implementation="eager")
    net = transformers.AlbertForMaskedLM(config).eval()
    net.load_state_dict({k: torch.tensor(a) for k, a in tensors.items()}, strict=False)
    # Each reaction eight times, every eighth token masked.
    masked = [
        [words.index("[MASK]") if i % 8 == first else t for i, t in enumerate(row)]
        for row in rows
        for first in range(8)
    ]
    main = stream(masked, types=True)
    found = logits_of(cfg, params, dict(main=main))
    ids, mask = (torch.tensor(main[key]).long() for key in ("tokens", "segments"))
    with torch.no_grad():
        wanted = net(ids, attention_mask=mask).logits.numpy()
    seen = main["segments"] > 0
    parity.close("logits", found[seen], wanted[seen])
    hidden = main["tokens"] == words.index("[MASK]")
    truth = np.repeat(stream(rows)["tokens"], 8, axis=0)[hidden]
    inside = (truth != words.index("[CLS]")) & (truth != words.index("[SEP]"))
    right = (found[hidden].argmax(-1) == truth)[inside]
    assert len(right) == sum(len(row) - 2 for row in rows)
    assert right.mean() > 0.9, f"{right.sum()} of {len(right)}"
