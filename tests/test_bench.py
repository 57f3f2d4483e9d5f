"""The benchmark of GPUs, without one: its FLOPs, its refusals, that it runs."""

import json

import pytest

from tests.bench import compile as compile_bench
from tests.bench import gpu


def found(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"row"')]


@pytest.mark.parametrize("row", ["gpt2", "gpt2_medium"])
def test_flops_agree_with_the_formula_of_megatron(row):
    """Narayanan et al. 2021, appendix, without its recomputation; attention halved."""
    task = gpu.TASKS[row]
    cfg = task.model
    B, T, D = task.rows, task.shapes["main"][0], cfg.d_model
    L, V = cfg.decoder_layers, cfg.vocab_size
    whole = 72 * B * T * L * D**2 * (1 + T / (6 * D) + V / (12 * L * D))
    halved = whole - 72 * B * T * L * D**2 * T / (12 * D)
    assert task.flops == pytest.approx(halved, rel=1e-12)


def test_flops_of_a_prefix_count_the_pairs_that_see_each_other():
    task = gpu.TASKS["prefix_lm"]
    cfg, (T, _, _), P = task.model, task.shapes["main"], task.prefix
    ranks = task.batch()["main"]["ranks"][0]
    seen = int((ranks[None] <= ranks[:, None]).sum())
    causal = gpu.TASKS["gpt2"]
    pairs = (task.flops - causal.flops) / (3 * task.rows * cfg.decoder_layers)
    pairs = pairs / (4 * cfg.heads * cfg.head_dim) + T * T / 2
    # The formula counts half of a token's view of itself; the mask all of it.
    assert pairs == pytest.approx(seen, abs=T - P)


def test_every_row_has_a_batch_of_its_shape():
    for name, task in gpu.TASKS.items():
        tiny = task.tiny()
        batch = tiny.batch()
        trained = batch["decoder" if "decoder" in batch else "main"]
        assert trained["tokens"].shape == (2, 32), name
        assert 0 < tiny.flops < task.flops
        assert all(T % 2 == 0 for T, _, _ in task.shapes.values())  # as cuDNN needs


def test_without_a_gpu_it_says_so_and_what_to_do(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert gpu.main([]) == 2
    said = capsys.readouterr().err
    assert "no GPU: jax sees 'cpu" in said and "jax[cuda12]" in said
    assert "--smoke" in said


def test_the_smoke_run_reports_each_side_and_hides_no_failure(capsys):
    flags = ["--smoke", "--rows=gpt2", "--sides=einsum:none,cudnn:none"]
    assert gpu.main([*flags, "--rounds=2", "--steps=1"]) == 0
    ours, refused = found(capsys)
    assert ours["side"] == "einsum:none" and len(ours["seconds"]) == 2
    assert ours["tokens_per_second"] == pytest.approx(64 / ours["step_seconds"])
    assert ours["mfu"] is None and ours["loss"] > 0.0
    # On a CPU there is no cuDNN, and nothing stands in for it.
    assert "cuDNN" in refused["error"] and "seconds" not in refused


class FakeWorker:
    """Fits with at most 16 rows; a step takes a second for each."""

    def __init__(self, row, side, rows, args):
        self.rows, self.rounds = rows, []

    def answer(self):
        if self.rows > 16:
            return dict(error="RESOURCE_EXHAUSTED", too_big=True)
        return dict(ready=True, kind="NVIDIA H200")

    def round(self):
        self.rounds.append(dict(seconds=self.rows, loss=1.0, peak_bytes=2**30))

    def close(self):
        pass


def test_a_row_that_does_not_fit_is_halved_for_all_sides(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "Worker", FakeWorker)
    monkeypatch.setattr(gpu, "check_gpu", lambda: None)
    assert gpu.main(["--rows=gpt2", "--sides=einsum:none,torch:eager"]) == 0
    out = capsys.readouterr()
    assert "does not fit, now 32 rows" in out.err and "now 16 rows" in out.err
    rows = [json.loads(r) for r in out.out.splitlines() if r.startswith('{"row"')]
    assert [r["batch"] for r in rows] == [16, 16]
    assert rows[0]["mfu"] == pytest.approx(rows[0]["flops_per_step"] / 16 / 989.5e12)
    assert "FLOPs per step = 3 x forward" in out.out
    assert out.out.splitlines()[-1].split()[-1] == "1.00x"


@pytest.mark.parametrize("flag", ["--rows=gpt3"])
def test_an_unknown_row_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        gpu.main([flag])
    assert "gpt2_medium" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(compile_bench.TASKS))
def test_the_program_to_compile_does_not_grow_with_depth(name):
    """`tests.bench.compile` measures the seconds."""
    sizes = []
    for depth in (12, 96):
        jitted, inputs, in_force = compile_bench.prepared(
            compile_bench.TASKS[name], depth
        )
        with in_force:
            sizes.append(jitted.lower(*inputs).as_text().count("\n"))
    assert sizes[0] == sizes[1]
