"""Scaling laws recover what made the data, within the intervals they state."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from t5x_lite.studies import analysis, commands_fit, fit, powerlaws, records
from t5x_lite.studies.fit import Cost, Points
from t5x_lite.studies.powerlaws import Power
from tests import synthetic_study as made

SIX = Cost(float(np.log(6)), 1.0, 0.0)
LARGE = dict(N=np.geomspace(5e7, 1.6e10, 8), C=np.geomspace(6e18, 3e21, 6))
TINY = dict(N=np.geomspace(1e4, 1e6, 6), C=np.geomspace(1e10, 1e13, 6))
DRAWS, NEEDED = 100, 90


@pytest.mark.parametrize(
    "law, sizes, noise",
    [
        (made.HOFFMANN, LARGE, 0.005),
        (made.BESIROGLU, LARGE, 0.01),
        (made.SMALL, TINY, 0.005),
    ],
)
def test_known_coefficients_lie_in_their_intervals(law, sizes, noise):
    points = made.points(law, **sizes)
    rng = np.random.default_rng(1)
    losses = points.loss * np.exp(noise * rng.normal(size=(DRAWS, len(points.N))))
    C = 10 * points.C.max()
    theta = np.array([np.log(law[1]), np.log(law[2]), np.log(law[0]), *law[3:]])
    best = np.exp(fit.log_optimum(theta, np.log(C), SIX))
    a = law[4] / (law[3] + law[4])
    hits = {name: 0 for name in (*fit.NAMES, "a", "N_opt")}
    for found in fit.fits(points, losses, replicates=100):
        estimates = found.coefficients() | {
            "a": found.exponents(SIX)["a"],
            "N_opt": found.optimum(C, SIX)["N"],
        }
        for name, truth in zip(hits, (*law, a, best), strict=True):
            hits[name] += int(estimates[name].low <= truth <= estimates[name].high)
    assert min(hits.values()) >= NEEDED, hits


def test_without_noise_the_law_itself_is_found():
    found = fit.fit(made.points(made.HOFFMANN, **LARGE), replicates=40)
    values = [e.value for e in found.coefficients().values()]
    np.testing.assert_allclose(values, made.HOFFMANN, rtol=1e-2)


def test_the_minimum_is_no_worse_than_another_optimiser_finds():
    """SciPy's trust-region least squares with a Huber loss, from the true law."""
    law, delta = made.BESIROGLU, fit.DELTA
    points = made.points(law, **LARGE)
    x, y = np.log(points.N), np.log(points.D)
    target = np.log(points.loss) + np.random.default_rng(2).normal(0, 0.01, len(x))
    truth = np.array([np.log(law[1]), np.log(law[2]), np.log(law[0]), *law[3:]])

    def residual(z):
        return fit.log_loss(truth + z, x, y) - target

    def huber(r):
        return np.sum(np.where(abs(r) < delta, r**2 / 2, delta * (abs(r) - delta / 2)))

    other = optimize.least_squares(
        residual, np.zeros(5), loss="huber", f_scale=delta, x_scale="jac", xtol=1e-12
    )
    ours = fit.fit(dataclasses.replace(points, loss=np.exp(target)), replicates=2).theta
    value = huber(fit.log_loss(ours, x, y) - target)
    assert value <= huber(residual(other.x)) * (1 + 1e-3)


def test_every_redrawn_fit_is_at_its_minimum():
    """One by one, restarted until nothing changes: as many fits at once end there."""
    law, n_draws = made.BESIROGLU, 30
    points = made.points(law, **LARGE)
    x, y = np.log(points.N) - 21, np.log(points.D) - 24
    rng = np.random.default_rng(6)
    weights = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), n_draws).astype(
        float
    )
    target = np.log(points.loss) + rng.normal(0, 0.02, len(x))
    targets = np.tile(target, (n_draws, 1))
    start = fit._estimate(x, y, target[None], fit.DELTA)
    found, _ = fit._solve(
        np.tile(start, (n_draws, 1)), x, y, targets, weights, fit.DELTA
    )
    alone = []
    for weight in weights:
        theta = start[0]
        for delta in (1e-2, *[fit.DELTA] * 6):
            scale = fit._whiten(theta[None], x, y)[0]

            def function(z, theta=theta, scale=scale, weight=weight, delta=delta):
                point = (theta + scale @ z)[None]
                value, slope = fit._objective(point, x, y, target, weight, delta)
                return value[0], scale.T @ slope[0]

            best = optimize.minimize(function, np.zeros(5), jac=True, method="BFGS")
            theta = theta + scale @ best.x
        alone.append(theta)
    np.testing.assert_allclose(found.std(axis=0), np.std(alone, axis=0), rtol=0.1)


def test_gradient_equals_finite_differences():
    rng = np.random.default_rng(3)
    x, y, target = rng.normal(size=(3, 12))
    theta = rng.normal(size=5)

    def value(t, delta):
        return fit._objective(t[None], x, y, target, np.ones(12), delta)[0][0]

    for delta in (1e-2, 1.0):
        gradient = fit._objective(theta[None], x, y, target, np.ones(12), delta)[1][0]
        numeric = np.asarray(optimize.approx_fprime(theta, value, 1e-7, delta))
        np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [1.0, 0.8, 1.1])
def test_optimum_equals_brute_force(power):
    law, cost, C = made.HOFFMANN, Cost(float(np.log(5.0)), power, 0.0), 1e21
    theta = np.array([np.log(law[1]), np.log(law[2]), np.log(law[0]), *law[3:]])
    N = np.geomspace(1e6, 1e14, 2_000_001)
    brute = N[np.argmin(made.loss(law, N, cost.tokens(N, C)))]
    found = np.exp(fit.log_optimum(theta, np.log(C), cost))
    np.testing.assert_allclose(found, brute, rtol=1e-4)


@pytest.mark.parametrize(
    "law, published", [(made.HOFFMANN, 0.46), (made.BESIROGLU, 0.513)]
)
def test_published_exponent_of_the_frontier(law, published):
    """Hoffmann et al., table 2, approach 3; Besiroglu et al. 2024, section 3."""
    theta = np.array([np.log(law[1]), np.log(law[2]), np.log(law[0]), *law[3:]])
    one = fit.Law(theta, np.tile(theta, (40, 1)), 1.0, 0.0, 9, True, 0.95)
    assert abs(one.exponents(SIX)["a"].value - published) < 0.01


def test_flops_that_are_no_product_of_size_and_tokens():
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e6, 5), [1e6, 1e7]))
    cost = Cost.of(Points(N, D, 9 * N**0.9 * D, np.ones(10)))
    assert (round(np.exp(cost.c), 6), round(cost.power, 6)) == (9.0, 0.9)
    assert cost.spread < 1e-6
    np.testing.assert_allclose(cost.tokens(N, 9 * N**0.9 * D), D)


def test_what_lacks_says_what():
    N = np.geomspace(1e5, 1e7, 9)
    assert "together" in fit.lacking(Points(N, 20 * N, N, N))
    assert "at least 7 cells" in fit.lacking(Points(N[:4], N[:4], N[:4], N[:4]))
    with pytest.raises(ValueError, match="more or fewer tokens"):
        fit.fit(Points(N, 20 * N, N, N))


def test_replicates_without_an_optimum_open_the_interval():
    values = np.r_[np.linspace(-1, 1, 80), np.full(20, np.nan)]
    assert fit.interval(0.0, values, 0.95, 1.0) == (-np.inf, np.inf)
    low, high = fit.interval(0.0, np.linspace(-1, 1, 1001), 0.90, 2.0)
    np.testing.assert_allclose((low, high), (-1.8, 1.8))


def isoflop_points(law, noise=0.0, rng=None):
    """Five budgets, seven sizes each, at the same ratios to the best size."""
    theta = np.array([np.log(law[1]), np.log(law[2]), np.log(law[0]), *law[3:]])
    C = np.repeat(np.geomspace(1e18, 1e21, 5), 7)
    ratios = np.tile(np.geomspace(0.4, 2.5, 7), 5)
    N = ratios * np.exp(fit.log_optimum(theta, np.log(C), SIX))
    D = C / (6 * N)
    loss = made.loss(law, N, D)
    return Points(N, D, C, loss + (rng.normal(0, noise, len(N)) if rng else 0.0))


def test_parabolas_find_the_exponent():
    """Sizes that grow with the best one bend all parabolas alike."""
    slices, found = powerlaws.isoflop(isoflop_points(made.HOFFMANN), 40, 0.95)
    assert isinstance(found["N"], Power) and isinstance(found["D"], Power)
    E, A, B, alpha, beta = made.HOFFMANN
    assert [s.problem for s in slices] == [""] * 5
    assert abs(found["N"].exponent.value - beta / (alpha + beta)) < 1e-3
    assert abs(found["D"].exponent.value - alpha / (alpha + beta)) < 1e-3


def test_parabolas_state_honest_intervals():
    rng, hits = np.random.default_rng(4), 0
    truth = powerlaws.isoflop(isoflop_points(made.HOFFMANN), 40, 0.95)[1]["N"]
    assert isinstance(truth, Power)
    for _ in range(DRAWS):
        points = isoflop_points(made.HOFFMANN, 0.003, rng)
        found = powerlaws.isoflop(points, 200, 0.95)[1]["N"]
        assert not isinstance(found, str)
        hits += found.exponent.low <= truth.exponent.value <= found.exponent.high
    assert hits >= NEEDED


def test_parabolas_without_a_minimum_say_so():
    points = isoflop_points(made.HOFFMANN)
    falling = dataclasses.replace(points, loss=1 / points.N)
    slices, found = powerlaws.isoflop(falling, 40, 0.95)
    assert all("beyond the sizes" in s.problem for s in slices)
    assert "there are 0 such budgets" in str(found["N"])


def test_straight_lines_agree_with_the_exact_interval():
    """Against Student's t for a least-squares slope, by scipy.stats."""
    rng, hits = np.random.default_rng(5), 0
    x = np.geomspace(1e5, 1e8, 8)
    for _ in range(DRAWS):
        y = 30 * x**-0.07 * np.exp(rng.normal(0, 0.01, 8))
        found = powerlaws.line(x, y, 400, 0.95).exponent
        hits += found.low <= -0.07 <= found.high
        exact: Any = stats.linregress(np.log(x), np.log(y))
        assert abs(found.value - exact.slope) < 1e-9
        half = stats.t.ppf(0.975, 6) * exact.stderr
        assert 0.75 < (found.high - found.low) / (2 * half) < 1.25
    assert hits >= NEEDED


def test_envelope_follows_the_optimum():
    law = made.SMALL
    N = np.geomspace(1e4, 1e6, 25)
    D = 200 * N
    share = np.geomspace(0.01, 1, 200)
    curves = [(share, made.loss(law, n, d * share)) for n, d in zip(N, D, strict=True)]
    points = Points(N, D, 6 * N * D, made.loss(law, N, D))
    way, found = powerlaws.envelope(curves, points, 100, 0.95)
    assert way is not None and not isinstance(found["N"], str)
    truth = law[4] / (law[3] + law[4])
    assert abs(found["N"].exponent.value - truth) < 0.06
    np.testing.assert_allclose(6 * way.N * way.D, way.C)
    # Brute force over all curves at one budget.
    k = len(way.C) // 2
    there = N[(12 * N**2 <= way.C[k]) & (way.C[k] <= 1200 * N**2)]
    losses = made.loss(law, there, way.C[k] / (6 * there))
    assert way.loss[k] == pytest.approx(min(losses), rel=2e-3)


def test_largest_budget_is_predicted_from_the_rest(tmp_path):
    path = made.write(tmp_path / "results.jsonl", made.rows(seeds=1, noise=0.0))
    found = analysis.analyse(records.read(path), analysis.Settings(replicates=60))
    (family,) = found.families
    left = family.leave_out
    assert left.missing == "" and left.distance == pytest.approx(5.0)
    assert {h.C for h in left.held} == {family.points.C.max()}
    assert left.used + len(left.held) == len(family.cells)
    for h in left.held:
        assert h.law is not None
        assert h.law.value == pytest.approx(h.measured, rel=2e-3)
    assert sum(h.power is not None for h in left.held) == 1


def test_seeds_are_averaged_and_their_noise_pooled(tmp_path):
    lines = made.rows(budgets=(1e11,), shapes=((1, 32), (2, 32)), seeds=3)
    path = made.write(tmp_path / "results.jsonl", lines)
    found = analysis.analyse(records.read(path), analysis.Settings(replicates=40))
    groups = [[r["heldout_loss"] for r in lines[k : k + 3]] for k in (0, 3)]
    assert [c.mean for c in found.cells] == pytest.approx([np.mean(g) for g in groups])
    assert found.noise.free == 4
    pooled = np.sqrt(np.mean([np.var(g, ddof=1) for g in groups]))
    assert found.noise.sigma == pytest.approx(pooled)


def test_reading_forgives_a_torn_line_and_nothing_else(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(FileNotFoundError, match="study run"):
        records.read(path)
    lines = made.rows(budgets=(1e10,), shapes=((1, 32),), seeds=1)
    path.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[0])[:50])
    assert len(records.read(path)) == 1
    made.write(path, [lines[0], lines[0] | {"heldout_loss": 9.0}])
    assert [r.heldout_loss for r in records.read(path)] == [9.0]
    made.write(path, [{k: v for k, v in lines[0].items() if k != "tokens"}])
    with pytest.raises(ValueError, match="line 1, has no tokens"):
        records.read(path)
    good = json.dumps(lines[0]) + "\n"
    for bad in (good[:50], "[1]", "", '{"seed": '):
        path.write_text(good + bad + "\n" + good)
        with pytest.raises(
            ValueError, match="results.jsonl, line 2, is no JSON object"
        ):
            records.read(path)
    made.write(path, [lines[0], lines[0] | {"heldout_loss": "low"}])
    with pytest.raises(ValueError, match="jsonl, line 2: heldout_loss='low' is no num"):
        records.read(path)


def test_command_writes_numbers_with_intervals(tmp_path, capsys):
    path = made.write(tmp_path / "results.jsonl", made.rows())
    commands_fit.fit([f"--results={path}", "--replicates=60", "--budgets=1e14"])
    printed = capsys.readouterr().out
    assert "L(N, D) = E + A/N^alpha + B/D^beta" in printed
    assert "best for 1e+14 FLOPs" in printed
    told = json.loads((tmp_path / "fit.json").read_text())
    (family,) = told["families"].values()
    E = family["parametric"]["coefficients"]["E"]
    assert E["low"] <= E["value"] <= E["high"]
    assert family["leave_out"]["held"][0]["law"]["low"] is not None
    best = family["parametric"]["optimum"]["1e+14"]
    assert 6 * best["N"]["value"] * best["D"]["value"] == pytest.approx(1e14, rel=1e-3)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--loss=nonsense", "Allowed: heldout, train, extra_loss, loss"),
        ("--parameters=all", "total, embedding, non_embedding"),
        ("--level=2", "--level=2: a number above 0 and below 1"),
        ("--replicates=ten", "--replicates=ten: a number above 39"),
        (f"--output={__file__}", "is a file. Give a directory"),
    ],
)
def test_wrong_flags_name_the_way_out(tmp_path, flag, message):
    rows = made.rows(budgets=(1e10,), shapes=((1, 32),), seeds=1)
    path = made.write(tmp_path / "results.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        commands_fit.fit([f"--results={path}", flag])


def test_scores_are_losses_too(tmp_path):
    path = made.write(tmp_path / "results.jsonl", made.rows(seeds=1)[:3])
    found = records.read(path)
    assert found[0].loss("extra_loss") == pytest.approx(2 * found[0].loss())
    assert np.isnan(found[0].loss("unknown"))
    assert found[0].loss("train") == pytest.approx(found[0].loss(), rel=0.03)
