"""Mixtures: whose turn it is, what the batches hold, and what is refused."""

import decimal
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from t5x_lite import checkpoint, compatible, config, evaluate, run, tokenize
from t5x_lite import vocab as vocabularies
from t5x_lite.config import DataConfig
from t5x_lite.data import mixture, pipeline, rates
from t5x_lite.data.store import open_store
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[1]
VOCAB = vocabularies.load("bytes")

positive = strategies.floats(1e-6, 1e6)
some_rates = strategies.lists(
    strategies.one_of(positive, strategies.just(0.0)), min_size=1, max_size=6
).filter(any)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(some_rates)
def test_counts_follow_the_rates_at_every_example(given):
    """Against exact fractions: never far off, one example more at a time, no drift."""
    phase = rates.Phase(0, tuple(given), (0,) * len(given))
    counts_KX = phase.counts(np.arange(3000))
    steps_KX = np.diff(counts_KX, axis=1)
    assert (counts_KX[:, 0] == 0).all() and set(np.unique(steps_KX)) <= {0, 1}
    assert (steps_KX.sum(axis=0) == 1).all()
    total = sum(map(Fraction, given))
    for t in (17, 2999, 10**6, 2**40):
        exact = [Fraction(rate) / total * t for rate in given]
        counts = phase.counts(np.array([t]))[:, 0].tolist()
        assert sum(counts) == t
        off = max(abs(a - b) for a, b in zip(counts, exact, strict=True))
        assert off <= len(given) * (1 + t / 2**32)
        assert all(n == 0 for n, rate in zip(counts, given, strict=True) if not rate)


CHANGES = [(3000, "b", 3.0), (5001, "a", 0.0), (5001, "c", 2.0)]


def three(seed=0):
    return rates.Mix({"a": 5.0, "b": 1.0, "c": 0.0}, CHANGES, seed)


def test_each_source_is_read_in_its_order_without_gaps():
    mix, n = three(), 9000
    sources, numbers = mix.of(np.arange(n))
    for k in range(3):
        np.testing.assert_array_equal(
            numbers[sources == k], np.arange((sources == k).sum())
        )
    for t in (0, 1, 1024, 2048, 2999, 3000, 3001, 5000, 5001, 5002, 8999):
        assert mix.counts(t) == tuple(np.bincount(sources[:t], minlength=3))
    assert (sources[:3000] != 2).all() and (sources[5001:] != 0).all()
    shares = np.bincount(sources[:3000], minlength=3) / 3000
    np.testing.assert_allclose(shares, [5 / 6, 1 / 6, 0], atol=1e-3)
    shares = np.bincount(sources[3000:5001], minlength=3) / 2001
    np.testing.assert_allclose(shares, [5 / 8, 3 / 8, 0], atol=1e-3)


def test_any_place_of_a_mixture_is_reached_at_once():
    sources, numbers = three().of(np.arange(9000))
    for chosen in ([0], [2999, 3000], np.arange(4000, 6100), [1, 1030, 5001, 8999]):
        got = three().of(np.asarray(chosen))
        np.testing.assert_array_equal(got[0], sources[chosen])
        np.testing.assert_array_equal(got[1], numbers[chosen])
    far = 10**12 + np.arange(50)
    first, again = three().of(far), three().of(far)
    np.testing.assert_array_equal(first, again)
    assert set(first[0]) == {1, 2} and first[1].min() > 10**11
    other = three(seed=1).of(np.arange(9000))[0]
    assert (other != sources).mean() > 0.2, "the seed shuffles inside the blocks"
    runs = np.diff(np.flatnonzero(sources[:3000] == 1))
    assert len(np.unique(runs)) > 10, "no regular pattern"


# Pages (millions) and sampling share (%) of mC4's largest languages: Xue et al. 2021,
# "mT5", table 6; they sample by pages**0.3.
MT5 = dict(en=(3067, 5.67), ru=(756, 3.71), es=(416, 3.09), de=(397, 3.05))
MT5 |= dict(fr=(333, 2.89), it=(186, 2.43))


def test_temperature_gives_the_published_shares_of_mt5():
    found = rates.proportional({k: n * 10**6 for k, (n, _) in MT5.items()}, 1 / 0.3)
    for language, (_, percent) in MT5.items():
        ours = found[language] / found["en"]
        assert ours == pytest.approx(percent / MT5["en"][1], rel=0.015)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1 / 0.3, 0.1])
def test_proportional_rates_are_the_same_on_any_machine(temperature):
    """Powers to 12 digits, as decimal arithmetic has them; C's pow differs in 17."""
    rng = np.random.default_rng(0)
    sizes = {str(i): int(n) for i, n in enumerate(rng.integers(1, 10**9, 50))}
    found = rates.proportional(sizes, temperature)
    power = decimal.Decimal(1 / temperature)
    with decimal.localcontext(prec=40):
        exact = {k: decimal.Decimal(n) ** power for k, n in sizes.items()}
    assert found == {k: float(f"{value:.12g}") for k, value in exact.items()}


def test_cap_limits_large_sources():
    """Raffel et al. 2020, section 3.5.2: r_m = min(e_m, K) / sum."""
    sizes = {"small": 1_000, "middle": 2**19, "large": 10**9}
    capped = rates.proportional(sizes, cap=2**19)
    assert capped == {"small": 1_000.0, "middle": 2.0**19, "large": 2.0**19}
    assert rates.proportional(sizes)["large"] == 10**9
    nearly = rates.proportional(sizes, temperature=1e6)
    assert max(nearly.values()) / min(nearly.values()) == pytest.approx(1, abs=1e-4)


# Batches


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    made = {}
    for name, ids, size in [("a", (97, 110), 6000), ("b", (110, 122), 3000)]:
        letters = rng.integers(*ids, size).astype(np.uint8).tobytes().decode()
        (folder / f"{name}.txt").write_text(letters)
        made[name] = text(folder / f"{name}.txt", folder)
    return made


def text(path, cache, **changes):
    store = open_store(str(path), VOCAB, cache, progress=False)
    arguments: dict[str, Any] = dict(
        objective="span_corruption",
        knobs={"density": 0.15, "mean_span": 3.0},
        structure="encoder_decoder",
        inputs_length=32,
        batch_size=1,
        seed=3,
    )
    return pipeline.Batches(store, VOCAB, **(arguments | changes))


def mixed(members, rows=None, changes=((40, "b", 4.0),), **more):
    mix = rates.Mix({"a": 3.0, "b": 1.0}, changes, seed=7)
    return mixture.MixedBatches(members, mix, batch_size=8, rows=rows, **more)


def test_a_batch_holds_the_examples_of_its_sources(members):
    batches = mixed(members)
    seen = {"a": 0, "b": 0}
    for step in range(12):
        batch = batches[step]
        for b in range(8):
            tokens = batch["encoder"]["tokens"][b]
            letters = tokens[(tokens >= 100) & (tokens < 125)]
            name = "a" if letters.mean() < 112 else "b"
            own = members[name].examples(np.array([seen[name]]))
            for stream, field in [("encoder", "tokens"), ("decoder", "targets")]:
                np.testing.assert_array_equal(
                    batch[stream][field][b], own[stream][field][0]
                )
            seen[name] += 1
    # 40 examples at 3 : 1, then 56 at 3 : 4, the last of an unfinished block.
    assert sum(seen.values()) == 96 and abs(seen["a"] - (30 + 24)) < 4
    per_epoch = {name: m.examples_per_epoch for name, m in members.items()}
    assert batches.epochs(96) == {k: seen[k] / per_epoch[k] for k in seen}
    assert batches.shares(40) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_hosts_share_the_batches_of_a_mixture(members, hosts):
    whole = mixed(members)
    of_hosts = np.array_split(np.random.default_rng(1).permutation(8), hosts)
    for step in (0, 4, 5, 10**7):
        one = whole[step]
        for rows in map(np.sort, of_hosts):
            part = mixed(members, rows=rows)[step]
            np.testing.assert_array_equal(part["fingerprint"], one["fingerprint"][rows])
            np.testing.assert_array_equal(
                part["decoder"]["targets"], one["decoder"]["targets"][rows]
            )


def test_members_that_do_not_fit_are_refused(members, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 50)
    other = text(tmp_path / "a.txt", tmp_path, inputs_length=48)
    with pytest.raises(
        ValueError, match="an example of a has .*32 cells.* of b .*48 cells"
    ):
        mixed({"a": members["a"], "b": other})
    alien = types.SimpleNamespace(
        vocab=types.SimpleNamespace(fingerprint="other"), examples_per_epoch=1
    )
    with pytest.raises(ValueError, match="b has another vocabulary than a"):
        mixed({"a": members["a"], "b": alien})


# The config


SOURCES = {
    "a": dict(train="none/a.txt", heldout="none/a.txt", rate=2.0),
    "b": dict(train="none/b.txt"),
}


def data(**changes) -> dict:
    return dict(mixture=SOURCES) | changes


BY_SIZE = {name: {"train": "x", "heldout": "x"} for name in "ab"}
REFUSED = [
    (dict(mixture={}, temperature=2.0), "temperature=2.0 is of a mixture"),
    (data(mixture={"a": "path"}), "mixture.a='path' must be a dict with keys train"),
    (data(mixture={"a": dict(heldout="x")}), "mixture.a.train is missing"),
    (data(mixture={"a": dict(train="x")}), "no source has a held-out text"),
    (data(mixture={"a b": SOURCES["a"]}), "a source's name is letters"),
    (data(mixture={"a": SOURCES["a"] | dict(rates=1)}), "did you mean 'rate'"),
    (data(mixture={"a": SOURCES["a"] | dict(rate=-1.0)}), "rate=-1.0 must be a number"),
    (data(mixture={"a": SOURCES["a"] | dict(rate=True)}), "rate=True must be a number"),
    (data(mixture={"a": SOURCES["a"] | dict(field=1)}), "field=1 must be of type str"),
    (data(mixture={"a": SOURCES["a"] | dict(rate=0)}), "from step 0 on all rates"),
    (data(rate_changes=((5, "c", 1.0),)), "no such source. There are a, b"),
    (data(rate_changes=((0, "a", 1.0),)), "integer of at least 1"),
    (data(rate_changes=((5, "a"),)), r"must be \(step, name, rate\)"),
    (data(rate_changes=((5, "a", float("nan")),)), "the rate must be a number"),
    (
        data(rate_changes=((5, "a", 0), (9, "b", 0))),
        "from step 9 on all rates are 0",
    ),
    (data(rate_changes=((5, "a", 1), (5, "a", 2))), "one rate at a step"),
    (data(mixture={1: SOURCES["a"]}), "mixture.1: a source's name is letters"),
    (
        data(mixture={"a": SOURCES["a"] | dict(documents="line")}),
        "a.documents='line' is not one of blank_lines, lines, files",
    ),
    (
        data(mixture={"a": SOURCES["a"] | dict(bad_utf8="drop")}),
        "a.bad_utf8='drop' is not one of error, replace, skip",
    ),
    (dict(train=""), "config.data.train='' names no text"),
    (dict(heldout=""), "config.data.heldout='' names no text"),
    (
        data(mixture=BY_SIZE, mixing="proportional", temperature=0.05),
        "temperature=0.05 must be at least 0.1",
    ),
    (data(temperature=2.0), "temperature=2.0 needs config.data.mixing='proportional'"),
    (data(mixing="proportional"), "a.rate=2.0 needs config.data.mixing='rates'"),
    (
        data(mixture=BY_SIZE, mixing="proportional", rate_changes=((5, "a", 1.0),)),
        "rate_changes=.* needs config.data.mixing='rates'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_configs_are_refused_before_any_text_is_read(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        tiny_config(data=changes)


WRONG = {
    "nowhere.jsonl": (FileNotFoundError, "train: source .*nowhere.jsonl': no such"),
    "typo.jsonl": (ValueError, 'train: source .*line 1: no field "text".*body'),
    "cut.jsonl": (ValueError, "train: source .*line 1: not JSON"),
    "full.jsonl.d": (ValueError, "train: source .*unknown kind of file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_text_is_named_before_any_is_tokenised(name, tmp_path):
    (tmp_path / "good.jsonl").write_text('{"text": "abc"}\n' * 9)
    (tmp_path / "typo.jsonl").write_text('{"body": "abc"}\n')
    (tmp_path / "cut.jsonl").write_text('{"text": "abc"\n')
    (tmp_path / "full.jsonl.d").write_text('{"text": "abc"}\n')
    good, wrong = str(tmp_path / "good.jsonl"), str(tmp_path / name)
    texts = {"a": dict(train=good, heldout=good), "b": dict(train=wrong)}
    argv = [
        f"--config={ROOT / 'configs/demo.py'}",
        "--config.data.vocab=bytes",
        f"--config.data.cache_dir={tmp_path / 'stores'}",
        f"--config.data.mixture={texts}",
    ]
    kind, message = WRONG[name]
    with pytest.raises(kind, match=rf"^config\.data\.mixture\.b\.{message}"):
        tokenize.main(argv)
    assert not (tmp_path / "stores").exists()


def test_what_a_config_mixes():
    entry = dict(train="x.jsonl", heldout="y", field="content", bad_utf8="skip")
    cfg = tiny_config(data=dict(mixture=BY_SIZE | {"code": entry}, documents="lines"))
    found = {s.name: s for s in mixture.sources_of(cfg, "train")}
    assert list(found) == ["a", "b", "code"]
    code = found["code"]
    assert (code.key, code.spec) == ("config.data.mixture.code.train", "x.jsonl")
    options = (code.options.field, code.options.documents, code.options.bad_utf8)
    assert options == ("content", "lines", "skip")
    assert found["a"].options.field == "text"
    single = mixture.sources_of(tiny_config(), "heldout")
    assert [(s.key, s.name) for s in single] == [("config.data.heldout", "")]
    alone = mixture.with_heldout(cfg.data, "other.txt")
    kept = {name: entry.get("heldout") for name, entry in alone.mixture.items()}
    assert kept == {"a": "other.txt", "b": "", "code": ""}
    assert mixture.with_heldout(DataConfig(), "z").heldout == "z"


# A run


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for name, size in [("one", 4000), ("two", 2000), ("three", 300)]:
        letters = rng.integers(97, 122, size).astype(np.uint8).tobytes().decode()
        (folder / f"{name}.txt").write_text(letters)
    sources = {
        "big": dict(train=str(folder / "one.txt"), heldout=str(folder / "three.txt")),
        "small": dict(train=str(folder / "two.txt"), heldout=str(folder / "two.txt")),
    }
    cfg = tiny_config(
        steps=10,
        data=dict(
            mixture=sources,
            mixing="proportional",
            cache_dir=str(folder / "stores"),
            inputs_length=32,
        ),
        model=dict(vocab_size=0),
    )
    return run.Setup.of(cfg)


def test_a_run_reports_each_source(setup):
    assert "big: 4,001 tokens" in setup.headline()
    assert "epochs of small" in setup.headline()
    epochs = setup.epochs(10)
    # In proportion to size both are gone through equally often.
    assert epochs["epochs/big"] == pytest.approx(epochs["epochs/small"], rel=0.05)
    identity = setup.data_identity()
    assert {"vocab", "train/big", "train/small", "rates"} == identity.keys()
    assert setup.heldout_identity().keys() == {"heldout/big", "heldout/small"}
    assert setup.unigram_loss() == pytest.approx(np.log(25), abs=0.6)

    weight = {"big": 100.0, "small": 300.0}
    loss = {"big": 2.0, "small": 5.0}

    class Counted:
        """Stands for the model: a known loss for each set."""

        def __init__(self):
            self.sizes = {n: len(setup.heldout_steps(b)) for n, b in
                          setup.heldouts.items()}  # fmt: skip
            self.calls = 0

        def __call__(self, params, batch):
            name = "big" if self.calls < self.sizes["big"] else "small"
            self.calls += 1
            w = weight[name]
            return {"tokens": (0.0, loss[name] * w, 0.0, 0.5 * w, w)}

    found = evaluate.heldout(setup, Counted(), {})
    shares = setup.heldout_shares
    assert shares["big"] == pytest.approx(2 / 3, abs=0.02)
    mean = shares["big"] * 2.0 + shares["small"] * 5.0
    assert found[checkpoint.METRIC] == pytest.approx(mean)
    assert found["heldout_loss/big"] == 2.0 and found["heldout_loss/small"] == 5.0
    assert found["heldout_perplexity"] == pytest.approx(np.exp(mean))
    both = found["heldout_tokens/big"] + found["heldout_tokens/small"]
    assert found["heldout_tokens"] == both


def test_a_checkpoint_refuses_another_mixture(setup):
    identity = setup.data_identity()
    meta = checkpoint.make_meta(setup.cfg, 5, identity)
    compatible.check_compatible(meta, setup.cfg, identity)
    other = dict(identity, **{"train/small": "0123"})
    with pytest.raises(ValueError, match="data train/small: .* '0123' now"):
        compatible.check_compatible(meta, setup.cfg, other)
    faster = dict(identity, rates=[[0, {"big": 0.5, "small": 0.5}]])
    with pytest.raises(ValueError, match="data rates"):
        compatible.check_compatible(meta, setup.cfg, faster)
