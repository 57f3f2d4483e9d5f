"""The commands work for every structure: generate, export and the closing samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import (
    checkpoint,
    cli,
    config,
    export,
    generate,
    model,
    parameters,
    prompts,
    run,
    samples,
    vocab,
)
from tests.tiny import tiny_config


@functools.cache
def untrained(name: str, **changes):
    """(config, model, params) of the small version of a config; nothing is compiled."""
    raw = cli.load_config(f"configs/{name}.py:smoke")
    cli.apply_overrides(raw, [f"--config.{k}={v}" for k, v in changes.items()])
    raw.compile_cache = ""
    cfg = config.freeze(raw)
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    cfg = run.resolve_vocab_size(cfg, words)
    net = model.build(cfg.model)
    rng = np.random.default_rng(0)
    flat = {
        tuple(name.split("/")): jnp.asarray(
            rng.normal(0, 0.2, p.get_value().shape), jnp.float32
        )
        for name, p in parameters.declared(net).items()
    }
    return cfg, net, parameters.nested(flat), words


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs generate on a model as if it were in a workdir -> what it prints."""

    def call(of, *flags: str) -> str:
        cfg, net, params, words = of
        meta = {"step": 2, "data": {"vocab": words.fingerprint}}
        monkeypatch.setattr(
            checkpoint, "load_run", lambda *_: (cfg, net, params, 2, meta)
        )
        generate.main(["--workdir=run", "--max_length=6", *flags])
        return capsys.readouterr().out

    return call


MASKED = ["bert", "electra", "unilm_v2"]


@pytest.mark.parametrize("name", MASKED)
def test_encoders_fill_gaps_in_place(name, command):
    of = cfg, net, params, words = untrained(name)
    assert prompts.task_of(cfg).before == ("cls",)
    text = "It was ___ and ___ there"
    out = command(of, f"--text={text}", "--gap_tokens=3")
    begin, *_, end = prompts.GAP.split(text)
    assert out.startswith(begin + "[") and out.endswith("]" + end + "\n")

    # The most likely ordinary token of each place, by the training forward pass.
    pieces = prompts.split(text, prompts.task_of(cfg))
    ids = prompts.encode(pieces, words, prompts.task_of(cfg), 3)
    assert (ids == words.mask_id).sum() == 6
    stream = prompts.pad_rows([ids], 1, words.pad_id)
    found, _ = generate.fill_masks(net, params, words, stream, generate.Sampling())
    batch = prompts.masked_streams(stream, words, cfg.model.query_streams)
    bound = model.bind(net, params)
    logits_BKV = bound.logits(bound.outputs(batch).cells_BKE)
    best = words.ordinary[np.asarray(logits_BKV)[0][:, words.ordinary].argmax(-1)]
    np.testing.assert_array_equal(np.asarray(found)[0, :6], best[:6])


def test_a_model_with_a_head_is_not_asked_for_text():
    cfg = tiny_config(model=dict(structure="encoder", head="class", classes=2))
    with pytest.raises(ValueError, match="head='class'.*t5x_lite.evaluate"):
        prompts.task_of(cfg)


def test_masks_of_unilm_v2_are_seen_as_in_training():
    """All gaps are one block of pseudo masks that see the text and each other."""
    cfg, _, _, words = untrained("unilm_v2")
    pieces = prompts.split("a ___ b ___", prompts.task_of(cfg))
    ids = prompts.encode(pieces, words, prompts.task_of(cfg))
    stream = prompts.pad_rows([ids], 1, words.pad_id)
    batch = prompts.masked_streams(stream, words, 2)
    seen = np.asarray(model.context(cfg.model, batch["main"]).visible_BTS)[0]
    T = stream["tokens"].shape[1]
    gaps = ids == words.mask_id
    for place in np.flatnonzero(gaps):
        of_query = seen[T + place]
        np.testing.assert_array_equal(of_query[: len(ids)], ~gaps)
        np.testing.assert_array_equal(of_query[T : T + len(ids)], gaps)
        assert not of_query[2 * T :].any() and not of_query[len(ids) : T].any()


@pytest.mark.parametrize(
    "name, before, after", [("gpt3", ["eos"], []), ("prefix_lm", [], ["eos"])]
)
def test_decoders_and_prefix_lms_continue(name, before, after, command):
    of = cfg, net, params, words = untrained(name)
    out = command(of, "--text=Once upon")
    assert out.startswith("Once upon[") and out.endswith("]\n")
    prompt = words.encode("Once upon")
    eos = np.array([words.eos_id])
    want = np.concatenate([*(eos for _ in before), prompt, *(eos for _ in after)])
    task = prompts.task_of(cfg)
    ids = prompts.encode(["Once upon", ""], words, task)
    np.testing.assert_array_equal(ids, want)
    with pytest.raises(ValueError, match="has a gap.*only continues"):
        command(of, "--text=Once ___")
    with pytest.raises(ValueError, match="gap_tokens=2 is for encoders"):
        command(of, "--text=Once", "--gap_tokens=2")


def test_a_continuation_keeps_its_space_and_ends_with_eos():
    words = vocab.load("data/vocab_4k.model", 100)
    task = prompts.Task("continue")
    ids = np.append(words.encode("a time, there was"), [words.eos_id, 77, 78])
    assert prompts.parse(ids, 1, words, task) == [" a time, there was"]
    rest = words.encode("nevertheless")[1:]  # goes on inside a word
    assert prompts.parse(rest, 1, words, task)[0][0] != " "


@pytest.mark.parametrize("structure", ["prefix_lm", "decoder"])
def test_one_stack_fills_gaps_behind_sentinels(structure, command):
    of = cfg, _, _, words = untrained("ul2", **{"model.structure": structure})
    out = command(of, "--text=It ___ so ___ ok")
    assert out.startswith("It [") and out.endswith("] ok\n")
    task = prompts.task_of(cfg)

    def read(text):
        return [int(i) for i in prompts.encode(prompts.split(text, task), words, task)]

    # UL2's mode token, and its own for a gap at the end.
    assert read("a ___ b")[0] == words.special("regular")
    assert read("a ___")[0] == words.special("sequential")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("xlnet", {}, "structure 'permuted'.*inspect"),
        ("bart", {}, "'bart', which neither"),
        ("mass", {}, "'mass', which neither"),
        ("prophetnet", {}, "'prophetnet', which neither"),
        ("ernie_gen", {}, "'span_flow', which neither"),
        ("macbert", {}, "knows no gap"),
    ],
)
def test_models_that_never_learned_it_say_so(name, changes, message, command):
    with pytest.raises(ValueError, match=message):
        command(untrained(name, **changes), "--text=Once ___")


@pytest.mark.parametrize(
    "name, text", [("bert", "___" + "b" * 300), ("gpt", "b" * 300)]
)
def test_a_text_that_is_too_long_is_refused(name, text, command):
    with pytest.raises(ValueError, match="positions; config.model.max_positions=512"):
        command(untrained(name), f"--text={text}" + "c" * 250)


EXPORTED = ["albert", "electra", "ernie_gen", "gpt3", "nezha", "prophetnet"]
EXPORTED += ["unilm_v2", "xlnet"]


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_of_every_kind_is_verified(name, tmp_path):
    cfg, net, params, _ = untrained(name)
    arrays = export.flatten(params)
    unrolled = arrays if cfg.model.share_layers else export.unroll(arrays)
    assert cfg.model.share_layers or any("/blocks/01/" in n for n in unrolled)
    about = {"dtype": "float32", "config": config.to_json(cfg)}
    export.write(tmp_path / "out", unrolled, about)
    assert "bit-equal" in export.verify(tmp_path / "out", net, params)
    # Every parameter counts: another value of any one shows.
    batch = export.fixed_batch(net.cfg)
    want = export.logits(net.cfg, params, batch)
    assert np.isfinite(want).all()
    rng = np.random.default_rng(1)
    for part in sorted(arrays):
        changed = arrays | {part: arrays[part] + rng.normal(size=arrays[part].shape)}
        split = {tuple(n.split("/")): jnp.asarray(a) for n, a in changed.items()}
        split = {n: a.astype("float32") for n, a in split.items()}
        got = export.logits(net.cfg, parameters.nested(split), batch)
        assert (got != want).any(), part


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stores"))


@pytest.mark.parametrize(
    "name, begins, mark",
    [
        ("bert", "held-out text", "[MASK→"),
        ("unilm_v2", "held-out text", "["),
        ("ernie_gen", "held-out text", "["),
        ("xlnet", "held-out text", "["),
        ("gpt", "held-out sentences", "  model  "),
        ("bart", None, ""),
    ],
)
def test_training_ends_with_samples(name, begins, mark, stores, capsys):
    cfg, _, params, _ = untrained(name)
    data = dataclasses.replace(
        cfg.data, train="data/heldout.jsonl", cache_dir=stores, batch_size=2
    )
    cfg = dataclasses.replace(cfg, data=data)
    setup = run.Setup.of(cfg, jax.devices()[:1])
    lines = samples.samples(setup, params, 2)
    if begins is None:
        assert lines == []
        return
    assert lines[0].startswith(begins) and len(lines) > 2
    assert mark in lines[2] and max(map(len, lines)) < 400


def test_samples_never_fail_a_finished_run(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("defect")

    monkeypatch.setattr(samples, "samples", broken)
    samples.print_samples(None, {})  # pyright: ignore[reportArgumentType]
    assert "no samples to show: RuntimeError: defect" in capsys.readouterr().out


def test_places_are_drawn_only_from_what_is_allowed():
    cfg, net, params, words = untrained("bert")
    ids = prompts.encode(["", ""], words, prompts.Task("masks", (), ()), 8)
    stream = prompts.pad_rows([ids], 1, words.pad_id)
    allowed_V = np.zeros(words.size, bool)
    allowed_V[[5, 9]] = True
    how = generate.Sampling(temperature=5.0)
    batch = prompts.masked_streams(stream, words)
    drawn, logp = generate.predict(
        net, params, batch, allowed_V, how, jax.random.key(0)
    )
    assert set(np.unique(drawn)) == {5, 9} and (np.asarray(logp) < 0).all()
    with pytest.raises(ValueError, match="temperature=5.0 samples: give a key"):
        generate.predict(net, params, batch, allowed_V, how)
