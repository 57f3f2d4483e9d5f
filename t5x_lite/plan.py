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

`--search` compiles the most promising meshes, microbatches and remats (`--limit` of
them) and ranks those that fit. `--compare A.py B.py` takes the place of `--config`;
overrides go to both.

Times are rooflines from the vendor's figures: no step can be faster than the slowest of
matrix products, memory traffic and network. Latency, and what the kernels and the
schedule lose, is left out, so a real step takes longer. Memory is the compiler's own
figure. FLOPs of the model, and so MFU, are counted as `mfu` in metrics.jsonl: matrix
products forward and backward, causal attention in full, without what remat repeats.
Where data.vocab names no file, ids of config.model.vocab_size (0: 32,100, as T5's)
stand in.
"""

import json
import os
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
        jobs=("1", "--search, --compare: compilers that run at once"),
    )
    searches, compared = _take_search(argv), _take_compared(argv)
    if searches and compared:
        raise ValueError("--search takes one --config, --compare two. Drop one flag.")
    each = [[f"--config={name}", *argv] for name in compared] or [argv]
    parsed = [cli.parse_config(__doc__, one, **others) for one in each]
    flags = parsed[0][1]
    limit, jobs = _count("limit", flags.limit), _count("jobs", flags.jobs)
    out = _new_file(flags.json)
    topology = Topology.parse(flags.topology)
    topology.check_installed()
    cfgs = {flags.config: config.freeze(raw) for raw, flags in parsed}
    if searches:
        found: Any = plan_search.search(cfgs[flags.config], topology, limit, jobs)
        print(plan_tables.ranking(found))
    elif compared:
        found = plan_search.run_all(cfgs, topology, jobs)
        print(plan_tables.side_by_side(found))
    else:
        found = plan_search.run_all(cfgs, topology)[flags.config]
        print(plan_tables.table(found))
    if out:
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(json.dumps(found, indent=2) + "\n")
        os.replace(temporary, out)


def _count(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--{flag}={text!r} must be a whole number of at least 1.")
    return int(text)


def _new_file(name: str) -> pathlib.Path | None:
    path = pathlib.Path(name)
    if not path.parent.is_dir() or (name and path.is_dir()):
        raise ValueError(
            f"--json={name!r} is no file that can be written: "
            f"{'it is a folder' if path.is_dir() else 'its folder is not there'}."
        )
    return path if name else None


def _take_search(argv: list[str]) -> bool:
    """Removes `--search` from the arguments; was it there?"""
    if "--search" not in argv:
        return False
    argv[:] = [a for a in argv if a != "--search"]
    return True


def _take_compared(argv: list[str]) -> list[str]:
    """Removes `--compare A B` from the arguments."""
    if "--compare" not in argv:
        return []
    at = argv.index("--compare")
    names = argv[at + 1 : at + 3]
    if len(names) != 2 or any(n.startswith("-") for n in names):
        raise ValueError("--compare needs two config files: --compare A.py B.py.")
    if names[0] == names[1]:
        raise ValueError(
            f"--compare {names[0]} {names[1]}: both are one. Name two files, or plan "
            f"one with --config={names[0]}."
        )
    if any(a.partition("=")[0] == "--config" for a in argv):
        raise ValueError("--compare A.py B.py takes the place of --config. Drop one.")
    del argv[at : at + 3]
    return names


if __name__ == "__main__":
    cli.run(main)
