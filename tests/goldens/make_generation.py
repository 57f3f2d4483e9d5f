"""Makes generation.npz: what transformers' `generate` writes with the goldens' weights.

    pip install -e '.[parity]' && python -m tests.goldens.make_generation

T5, BART and GPT-2 of t5.npz, t5_1_1.npz, bart.npz and gpt2.npz, in float32, on rows of
different lengths. GPT-2 gets them one by one: of a batch padded on the left `generate`
counts the padding as text that n-grams must not repeat. EOS is a token that the model
writes in the middle of a text, so that texts do end. The settings: tests/generation.py.
"""

import pathlib
import tempfile

import numpy as np
import torch
import transformers

from tests import generation, hf_dirs

HERE = pathlib.Path(__file__).parent
AUTO = dict(
    t5="AutoModelForSeq2SeqLM",
    t5_1_1="AutoModelForSeq2SeqLM",
    bart="AutoModelForSeq2SeqLM",
    gpt2="AutoModelForCausalLM",
)
EARLY = {"never": "never", "false": False, "true": True}


def load(name: str, path: pathlib.Path):
    cls = getattr(transformers, AUTO[name])
    return cls.from_pretrained(path, attn_implementation="eager").eval()


def written(model, rows, name: str, eos: int | None, start: int, **more):
    """-> (ids [B, num_return, NEW], scores [B, num_return] or None)."""
    ours = generation.SETTINGS[name] | more
    prefix, many = generation.prefix_of(name), ours.get("num_return", 1)
    config = transformers.GenerationConfig(
        max_new_tokens=generation.NEW,
        min_new_tokens=ours.get("min_length", 0) or None,
        do_sample=False,
        num_beams=ours.get("beams", 1),
        num_return_sequences=many,
        length_penalty=ours.get("length_penalty", 1.0),
        early_stopping=EARLY[ours.get("early_stopping", "false")],
        no_repeat_ngram_size=ours.get("no_repeat_ngram", 0),
        eos_token_id=eos,
        pad_token_id=start,
        decoder_start_token_id=start,
        use_cache=False,  # theirs has the encoder's layers, not the decoder's
        return_dict_in_generate=True,
        output_scores=True,
    )
    model.generation_config = config
    if model.config.is_encoder_decoder:
        stream = generation.stream(rows)
        begin = torch.tensor([[start, *prefix]] * len(rows))
        batches = [(stream["tokens"], stream["segments"])]
        inputs, skip = dict(decoder_input_ids=begin), [begin.shape[1]]
    else:
        whole = [np.append(row, np.array(prefix, np.int32))[None] for row in rows]
        batches = [(ids, np.ones_like(ids)) for ids in whole]
        inputs, skip = {}, [ids.shape[1] for ids in whole]
    with torch.no_grad():
        outs = [
            model.generate(
                torch.tensor(ids, dtype=torch.long),
                attention_mask=torch.tensor(mask, dtype=torch.long),
                generation_config=config,
                **inputs,
            )
            for ids, mask in batches
        ]
    new = [out.sequences[:, n:].numpy() for out, n in zip(outs, skip, strict=True)]
    ids = np.concatenate(list(map(_padded, new))).reshape(len(rows), many, -1)
    found = generation.cut(ids, -1 if eos is None else eos)
    if not hasattr(outs[0], "sequences_scores"):
        return found, None
    scores = torch.cat([out.sequences_scores for out in outs])
    return found, scores.numpy().reshape(len(rows), many)


def _padded(ids_BT: np.ndarray) -> np.ndarray:
    return np.pad(ids_BT, ((0, 0), (0, generation.NEW - ids_BT.shape[1])))


def make(model, seed: int) -> dict[str, np.ndarray]:
    """All settings of tests/generation.py with one model."""
    rng = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    start = 2 if model.config.model_type == "bart" else 0
    rows = generation.draw_rows(rng, vocab)
    free, _ = written(model, rows, "greedy", None, start)
    eos = int(next(i for i in free[0, 0, 4:] if i not in generation.PREFIX))
    arrays = dict(
        rows=np.stack([np.pad(r, (0, 11 - len(r)), constant_values=-1) for r in rows]),
        eos=np.array(eos),
        start=np.array(start),
    )
    for name in generation.SETTINGS:
        ids, scores = written(model, rows, name, eos, start)
        arrays[f"{name}/ids"] = ids.astype(np.int32)
        if scores is not None:
            arrays[f"{name}/scores"] = scores.astype(np.float32)
    return arrays


def main() -> None:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    arrays = dict(made_with=np.array(versions))
    for seed, name in enumerate(AUTO):
        theirs, weights, _ = hf_dirs.load(name)
        with tempfile.TemporaryDirectory() as folder:
            path = hf_dirs.write(pathlib.Path(folder) / "in", theirs, weights)
            model = load(name, path)
        if name == "t5_1_1":  # transformers 5 ties lm_head whatever the config says
            head = torch.tensor(weights["lm_head.weight"])
            model.lm_head.weight = torch.nn.Parameter(head)
        arrays |= {f"{name}/{k}": v for k, v in make(model, seed).items()}
    path = HERE / "generation.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
