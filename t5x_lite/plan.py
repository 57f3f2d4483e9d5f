"""What a config would cost on a machine that is not here: memory, network, time.

    python -m t5x_lite.plan --config=configs/t5_1_1_xxl.py --topology=v5e:16x16
    python -m t5x_lite.plan --config=configs/t5_1_1_base.py --topology=h100:4x8 \\
        --config.sharding.fsdp=8 --json=plan.json
    python -m t5x_lite.plan --config=configs/t5_1_1_xxl.py --topology=v5e:16x16 --search
    python -m t5x_lite.plan --compare configs/t5_1_1_base.py configs/bert.py \\
        --topology=v5p:4x4x4

The real train step is compiled by the real compiler for that machine; the corpus, the
vocabulary file and the devices are not needed. Topologies: v4, v5p, tpu7x:XxYxZ; v5e,
v6e:XxY; several slices: v5e:16x16*2; a100-40, a100, h100, h200, b200:HOSTSxGPUS; cpu:N
(virtual devices, no times). The compilers: `pip install 'jax[tpu]'` and `pip install
'jax[cuda12-local]'` (the extras plan-tpu and plan-gpu); CUDA itself is not needed.

Times are rooflines from the vendor's figures: no step can be faster than the slowest of
matrix products, memory traffic and network. Latency, and what the kernels and the
schedule lose, is left out, so a real step takes longer. Memory is the compiler's own
figure. Where data.vocab names no file, ids of config.model.vocab_size (0: 32,100, as
T5's) stand in.
"""

import json
import pathlib
import sys
from typing import Any

from t5x_lite import cli, config, plan_search, plan_tables
from t5x_lite.aot import Topology


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else list(argv)
    others: Any = dict(
        topology="machine, such as v5e:16x16, v5p:4x4x8*2, h100:32x8",
        json=("", "also write all figures to this file"),
        limit=("12", "--search: how many candidates are compiled"),
        jobs=("1", "--search: compilers that run at once"),
    )
    searches = "--search" in argv
    compared = _take_compared(argv)
    argv = [a for a in argv if a != "--search"]
    if compared:
        argv = [f"--config={compared[0]}", *argv]
    raw, flags = cli.parse_config(__doc__, argv, **others)
    topology = Topology.parse(flags.topology)
    topology.check_installed()
    cfg = config.freeze(raw)
    if searches:
        found: Any = plan_search.search(
            cfg, topology, int(flags.limit), int(flags.jobs)
        )
        print(plan_tables.ranking(found))
    elif compared:
        overrides = [a for a in argv if a.lstrip("-").startswith("config.")]
        second = cli.load_config(compared[1])
        cli.apply_overrides(second, overrides)
        cfgs = {compared[0]: cfg, compared[1]: config.freeze(second)}
        found = plan_search.run_all(cfgs, topology, int(flags.jobs))
        print(plan_tables.side_by_side(found))
    else:
        found = plan_search.run_all({"plan": cfg}, topology)["plan"]
        print(plan_tables.table(found))
    if flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(found, indent=2) + "\n")


def _take_compared(argv: list[str]) -> list[str]:
    """Removes `--compare A B` from the arguments."""
    if "--compare" not in argv:
        return []
    at = argv.index("--compare")
    names = argv[at + 1 : at + 3]
    if len(names) != 2 or any(n.startswith("-") for n in names):
        raise ValueError("--compare needs two config files: --compare A.py B.py.")
    if any(a.startswith("--config=") for a in argv):
        raise ValueError("--compare A.py B.py takes the place of --config. Drop one.")
    del argv[at : at + 3]
    return names


if __name__ == "__main__":
    cli.run(main)
