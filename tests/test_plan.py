"""Plans: the step without data and devices is the real one; what it costs."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import jax
import pytest

from t5x_lite import (
    aot,
    cli,
    config,
    estimate,
    hardware,
    plan,
    plan_search,
    plan_tables,
)

CPU = aot.Topology.parse("cpu:8")


def load(name, **overrides):
    raw = cli.load_config(f"configs/{name}.py:smoke")
    cli.apply_overrides(raw, [f"--config.{k}={v}" for k, v in overrides.items()])
    return config.freeze(raw)


def resized(cfg, **sharding):
    sharding = dataclasses.replace(cfg.sharding, **sharding)
    return dataclasses.replace(cfg, sharding=sharding)


@pytest.mark.parametrize(
    "sizes",
    [dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)],
    ids=str,
)
def test_no_device_repeats_the_work_of_another(sizes):
    """FLOPs of the compiled step, times devices, are those of the model."""
    cfg = resized(load("t5_1_1_base"), **sizes)
    found = estimate.estimate(cfg, CPU)
    share = found["flops"] * found["devices"] / found["model_flops"]
    assert share == pytest.approx(1, abs=0.1)
    moved = {c["axes"] for c in found["collectives"]}
    used = {k for k, n in found["mesh"].items() if n > 1}
    assert used == {axis for axes in moved for axis in axes.split("+")}


def test_recomputing_everything_costs_a_third_more():
    cfg = load("t5_1_1_base", **{"sharding.fsdp": 8, "sharding.data": 1})
    full = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="full"))
    found = estimate.estimate(full, CPU)
    share = found["flops"] * found["devices"] / found["model_flops"]
    # Encoder and decoder layers run once more in the backward pass; the head does not.
    assert 1.15 < share < 1.34


# ---- topologies and errors ------------------------------------------------------


@pytest.mark.parametrize(
    "text, devices, platform",
    [
        ("v5e:16x16", 256, "tpu"),
        ("v5e:16x16*2", 512, "tpu"),
        ("v5p:4x4x8", 128, "tpu"),
        ("tpu7x:2x2x1", 8, "tpu"),
        ("h100:32x8", 256, "cuda"),
        ("a100-40:1x8", 8, "cuda"),
        ("cpu:4", 4, "cpu"),
    ],
)
def test_topologies(text, devices, platform):
    found = aot.Topology.parse(text)
    assert str(found) == text and found.platform == platform
    assert plan_search.devices(found) == devices


@pytest.mark.parametrize(
    "text, words",
    [
        ("v5x:16x16", "did you mean 'v5"),
        ("v5e", "Write CHIP:SHAPE"),
        ("v5e:4x4x4", "needs 2 sizes"),
        ("v4:4x4", "needs 3 sizes"),
        ("h100:2x8*2", "only TPUs come in slices"),
        ("v5e:0x4", "at least 1"),
    ],
)
def test_bad_topologies_are_named(text, words):
    with pytest.raises(ValueError, match=words.replace("(", "\\(")):
        aot.Topology.parse(text)


@pytest.mark.parametrize(
    "text, package", [("v5e:2x2", r"jax\[tpu\]"), ("h100:1x8", "cuda12-local")]
)
def test_a_missing_compiler_says_what_to_install(text, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=package):
        plan.main(["--config=configs/bert.py", f"--topology={text}"])


def test_running_out_of_memory_is_a_result():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (22.69G) exceeds available HBM (15.75G)."
    )
    needed, there = estimate.out_of_memory(said) or (0, 0)
    assert (needed, there) == (22.69 * 2**30, 15.75 * 2**30)
    assert estimate.out_of_memory("INTERNAL: something else") is None
    found = dict(memory=dict(peak=needed, hbm=there, fits=False))
    assert plan_tables.verdict(found) == "does not fit: needs 22.69 GiB of 15.75 GiB"


def test_devices_are_found_by_their_kind():
    kinds = {
        "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v4": "v4", "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200",
    }  # fmt: skip
    for kind, name in kinds.items():
        device = type("Device", (), dict(device_kind=kind))
        chip = hardware.of_device(device)
        assert chip is not None and chip.name == name
    assert hardware.of_device(jax.devices()[0]) is None
    assert all(name == chip.name for name, chip in hardware.CHIPS.items())


# ---- the command ----------------------------------------------------------------


def test_the_command(tmp_path):
    """In a process of its own, as users call it."""
    out = tmp_path / "plan.json"
    args = [
        *(sys.executable, "-m", "t5x_lite.plan", "--config=configs/gpt2.py:smoke"),
        *("--topology=cpu:2", "--config.sharding.fsdp=2", f"--json={out}"),
    ]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    found = json.loads(out.read_text())
    assert found["devices"] == 2 and found["mesh"]["fsdp"] == 2
    assert f"{found['parameters']:,}" in done.stdout
    assert "all-gather" in done.stdout


def test_errors_of_the_config_come_from_the_worker():
    cfg = resized(load("gpt2"), data=3)
    with pytest.raises(ValueError, match="does not fit 2 device"):
        plan_search.run_all({"plan": cfg}, aot.Topology.parse("cpu:2"))


def test_a_worker_ends_when_its_parent_is_gone(tmp_path):
    """Also if that was before it had started."""
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    asked = dict(config=config.to_json(load("gpt2")), topology="cpu:1", parent=0)
    request.write_text(json.dumps(asked))
    args = [sys.executable, "-m", "t5x_lite.estimate", str(request), str(result)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "") and not result.exists()


def fake(cfgs, topology, jobs=1, strict=True):
    """Estimates without a compiler: full remat is slow and fits."""
    found = {}
    for name, cfg in cfgs.items():
        full = cfg.model.remat == "full"
        seconds = (2.0 if full else 1.0) * cfg.sharding.tensor
        found[name] = dict(
            mesh={k: getattr(cfg.sharding, k) for k in ("data", "fsdp", "tensor")},
            microbatches=cfg.optim.microbatches,
            remat=cfg.model.remat,
            memory=dict(peak=1e9 if full else 1e12, hbm=16e9, fits=full, spare=15e9),
            roofline=dict(
                step=seconds, step_without_overlap=seconds, mfu_ceiling=0.5, bound="HBM"
            ),
        )
    return found


def test_search_ranks_those_that_fit(monkeypatch, capsys):
    monkeypatch.setattr(plan_search, "run_all", fake)
    topology = aot.Topology.parse("v5e:2x4")
    cfg = load("t5_1_1_base", **{"data.batch_size": 64})
    found = plan_search.search(cfg, topology, limit=10_000)
    fits = [f["memory"]["fits"] for f in found]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits
    steps = [f["roofline"]["step"] for f in found if f["memory"]["fits"]]
    assert steps == sorted(steps)
    for f in found:
        assert math.prod(f["mesh"].values()) == 8
        assert 64 % (f["mesh"]["data"] * f["mesh"]["fsdp"] * f["microbatches"]) == 0
        assert 4 % f["mesh"]["tensor"] == 0  # heads
    assert "--config.model.remat=full" in plan_tables.ranking(found)


def test_the_flags_of_the_best_make_that_candidate(monkeypatch):
    """Also on several slices, over what the config says of them."""
    monkeypatch.setattr(plan_search, "run_all", fake)
    given = {"data.batch_size": 64, "sharding.data": 1, "sharding.fsdp": 8}
    given |= {"sharding.sequence": -1, "sharding.dcn_data": 1, "sharding.dcn_fsdp": 2}
    cfg, topology = load("t5_1_1_base", **given), aot.Topology.parse("v5e:2x4*2")
    (found,) = plan_search.search(cfg, topology, limit=1)
    flags = [f.removeprefix("--config.").split("=") for f in found["flags"]]
    got = load("t5_1_1_base", **given | dict(flags))
    _, best = min(plan_search.candidates(cfg, topology), key=lambda c: c[0])
    assert (got.sharding, got.optim) == (best.sharding, best.optim)
    assert got.model.remat == best.model.remat


def test_search_leaves_out_what_its_state_alone_cannot_hold():
    """T5.1.1-XXL's 41.5 GiB (Adafactor) need more than two chips of 15.75 GiB."""
    raw = cli.load_config("configs/t5_1_1_xxl.py")
    cfg = config.freeze(raw)
    kept = list(plan_search.candidates(cfg, aot.Topology.parse("v5e:2x4")))
    assert kept
    for _, one in kept:
        assert one.sharding.fsdp * one.sharding.tensor >= 4
    with pytest.raises(ValueError, match="larger machine"):
        plan_search.search(cfg, aot.Topology.parse("v5e:1x2"), limit=1)


def test_compare_shows_both(monkeypatch, capsys):
    def known(cfgs, topology, jobs=1):
        one = dict(
            topology="cpu:8", chip="cpu", devices=8, notes=[], mesh=dict(data=8),
            vocab_size=384, examples=8, tokens=64, microbatches=1, remat="dots",
            state_bytes_all=2**30, memory=dict(state=2**27, peak=2**28),
            model_flops=1e9, compile_seconds=1.0,
        )  # fmt: skip
        return {n: one | dict(parameters=c.model.d_ff) for n, c in cfgs.items()}

    monkeypatch.setattr(plan_search, "run_all", known)
    names = ["configs/bert.py", "configs/gpt2.py"]
    changed = ["--config.model.d_ff", "1234"]
    plan.main(["--topology=cpu:8", "--compare", *names, *changed])
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and shown.count("1,234") == 2


@pytest.mark.parametrize(
    "given, words",
    [
        ("--compare configs/bert.py", "needs two config files"),
        ("--compare configs/bert.py configs/bert.py", "both are one"),
        ("--compare configs/bert.py configs/gpt2.py --search", "Drop one"),
        ("--compare configs/bert.py configs/gpt2.py --config configs/gpt.py", "place"),
        ("--config=configs/bert.py --search --limit=abc", "--limit='abc' must be"),
        ("--config=configs/bert.py --search --limit=0", "--limit='0' must be"),
        ("--config=configs/bert.py --jobs=-1", "--jobs='-1' must be"),
        ("--config=configs/bert.py --json=nowhere/plan.json", "folder is not there"),
    ],
)
def test_bad_flags_are_refused_before_anything_compiles(given, words, monkeypatch):
    monkeypatch.setattr(plan_search, "run_all", None)
    with pytest.raises(ValueError, match=words):
        plan.main(["--topology=cpu:8", *given.split()])


# ---- with the compilers of the machines -----------------------------------------

tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'jax[tpu]'",
)
cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs the CUDA plugin: pip install 'jax[cuda12-local]'",
)


def planned(name, topology, *overrides):
    name, _, arg = name.partition(":")
    raw = cli.load_config(f"configs/{name}.py:{arg}")
    cli.apply_overrides(raw, list(overrides))
    cfgs = {"plan": config.freeze(raw)}
    return plan_search.run_all(cfgs, aot.Topology.parse(topology))["plan"]


@tpu
@pytest.mark.slow
def test_t5_1_1_base_on_a_pod():
    """No replicated work, and the activations are split.

    jax 0.10.2, libtpu 0.0.42.1: 1.000 times the model's FLOPs; 4.58 GiB, of which 3.61
    are temporaries of 8 examples (remat "dots").
    """
    found = planned("t5_1_1_base", "v5e:16x16", "--config.data.batch_size=2048")
    share = found["flops"] * 256 / found["model_flops"]
    assert share == pytest.approx(1, abs=0.1)
    assert found["memory"]["peak"] < 5.5 * 2**30
    assert found["memory"]["fits"]


@tpu
@pytest.mark.slow
def test_products_that_wait_for_their_weights_in_parts():
    """On 16 chips the TPU compiler fetches weights in loops, two shards at a time.

    jax 0.10.2, libtpu 0.0.42.1: 1.000 times the model's FLOPs, 11,016 permutations.
    """
    sizes = ("--config.sharding.fsdp=16", "--config.sharding.data=1")
    found = planned("t5_1_1_base", "v5e:4x4", *sizes)
    moved = {c["kind"]: c["calls"] for c in found["collectives"]}
    assert moved["collective-permute"] > 100
    assert found["flops"] * 16 / found["model_flops"] == pytest.approx(1, abs=0.1)


@tpu
@pytest.mark.slow
def test_what_does_not_fit_is_told():
    found = planned(
        *("t5_1_1_base:smoke", "v5e:2x2", "--config.data.batch_size=1048576"),
        "--config.model.remat=none",
    )
    assert not found["memory"]["fits"]
    assert found["memory"]["peak"] > found["memory"]["hbm"]


@cuda
@pytest.mark.slow
def test_t5_1_1_base_on_gpus():
    found = planned(
        "t5_1_1_base",
        "h100:2x8",
        "--config.sharding.fsdp=16",
        "--config.sharding.data=1",
    )
    assert found["flops"] * 16 / found["model_flops"] == pytest.approx(1, abs=0.1)
    kinds = {c["kind"] for c in found["collectives"] if c["bytes"] > 1e6}
    assert {"all-gather", "reduce-scatter"} <= kinds
