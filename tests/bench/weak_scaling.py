"""Weak scaling on paper: a fixed batch per chip on 4 to 4,096 chips, compiled for each.

    python -m tests.bench.weak_scaling --chip=h100 --output=configs/studies/weak_scaling

Writes results.json after every compile and goes on from it; table.md and figure.png
are made anew from it. Nothing is run on these machines: see `t5x_lite.plan --help` for
what the times mean. Needs the compiler of the chip, and an hour of two cores.
"""

import argparse
import json
import pathlib

from t5x_lite import cli, config, plan_search, plan_tables
from t5x_lite.aot import Topology

SIZES = (4, 16, 64, 256, 1024, 4096)

# Name -> (config file, examples per chip, fsdp: at most so many chips, the rest data).
SERIES = {
    "T5.1.1-xxl, fsdp over all": ("configs/t5_1_1_xxl.py", 8, 4096),
    "T5.1.1-xxl, fsdp over 64": ("configs/t5_1_1_xxl.py", 8, 64),
    "BERT-large, fsdp over all": ("configs/bert_large.py", 32, 1024),
    "BERT-large, data parallel": ("configs/bert_large.py", 32, 1),
}
SHAPES = {
    "v5p": {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"}
    | {4096: "16x16x16"},
    "v5e": {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
    | {1024: "16x16*4", 4096: "16x16*16"},
}


def topology(chip: str, n: int) -> Topology:
    hosts, gpus = max(1, n // 8), min(n, 8)
    shape = SHAPES.get(chip, {}).get(n, f"{hosts}x{gpus}")
    return Topology.parse(f"{chip}:{shape}")


def of_size(series: str, n: int) -> config.Config:
    name, per_chip, most = SERIES[series]
    raw = cli.load_config(name)
    raw.data.batch_size = per_chip * n
    raw.model.remat = "full" if "xxl" in name else "dots_no_batch"
    raw.sharding.update(dict(data=-1, fsdp=min(n, most), tensor=1))
    return config.freeze(raw)


def run(chip: str, sizes: list[int], folder: pathlib.Path) -> list[dict]:
    path = folder / "results.json"
    known = json.loads(path.read_text()) if path.exists() else []
    for n in sizes:
        for series in SERIES:
            name, _, most = SERIES[series]
            asked = dict(config=name, chip=chip, chips=n, fsdp=min(n, most))
            same = [r for r in known if asked.items() <= r.items()]
            if any(r["series"] == series for r in same):
                continue
            if same:  # two series are one up to some size
                found = same[0]
            else:
                cfgs = {series: of_size(series, n)}
                found = plan_search.run_all(cfgs, topology(chip, n))[series]
            known.append(found | asked | dict(series=series))
            path.write_text(json.dumps(known, indent=1) + "\n")
    return known


def table(rows: list[dict]) -> str:
    lines = [
        "| series | chips | machine | mesh | state, temporaries per chip | sent per "
        "chip | compute | memory | network | step at least | not overlapped | MFU at "
        "most |",
        "| --- | --: | --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in sorted(rows, key=lambda r: (r["series"], r["chip"], r["chips"])):
        m, t = r["memory"], r.get("roofline")
        mesh = " x ".join(f"{k} {n}" for k, n in r["mesh"].items() if n > 1)
        held = plan_tables.gib(m["state"])
        cells = [r["series"], f"{r['chips']:,}", r["topology"], mesh]
        if t is None:
            cells += [f"{held}; {plan_tables.verdict(r)}", *["-"] * 7]
        else:
            sent = sum(c["bytes"] for c in r["collectives"])
            times = (t[k] for k in ("compute", "hbm", "network", "step"))
            cells += [
                f"{held}, {plan_tables.gib(m['temporaries'])}",
                plan_tables.gib(sent),
                *map(plan_tables.ms, times),
                plan_tables.ms(t["step_without_overlap"]),
                f"{t['mfu_ceiling']:.0%} ({t['bound']})",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: list[dict], path: pathlib.Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = ("memory per chip, GiB", "sent per chip and step, GiB", "step, seconds")
    for series in SERIES:
        mine = sorted(
            (r for r in rows if r["series"] == series and "roofline" in r),
            key=lambda r: r["chips"],
        )
        if not mine:
            continue
        chips = [r["chips"] for r in mine]
        sent = [sum(c["bytes"] for c in r["collectives"]) / 2**30 for r in mine]
        (line,) = axes[0].plot(
            chips, [r["memory"]["peak"] / 2**30 for r in mine], "o-", label=series
        )
        color = line.get_color()
        axes[1].plot(chips, sent, "o-", color=color)
        for key, style in (("step", "o-"), ("step_without_overlap", "o:")):
            axes[2].plot(chips, [r["roofline"][key] for r in mine], style, color=color)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="chips", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.set_xticks(SIZES, [f"{n:,}" for n in SIZES])
        axis.xaxis.set_minor_locator(NullLocator())
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))
    axes[0].legend(fontsize=8)
    axes[2].text(
        *(0.02, 0.4, "line: all overlapped; dots: network not hidden"),
        transform=axes[2].transAxes,
        fontsize=7,
    )
    figure.savefig(path, dpi=120)


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--chip", default="h100", help="h100, v5p or v5e")
    flags.add_argument("--output", default="configs/studies/weak_scaling")
    flags.add_argument("--sizes", default=",".join(map(str, SIZES)))
    given = flags.parse_args()
    folder = pathlib.Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = run(given.chip, [int(n) for n in given.sizes.split(",")], folder)
    (folder / "table.md").write_text(table(rows))
    figure(rows, folder / "figure.png")


if __name__ == "__main__":
    main()
