"""Plans as text: one, two side by side, and a ranking."""

from typing import Any

Found = dict[str, Any]


def table(found: Found) -> str:
    """All figures of one plan."""
    lines = [f"{label:28}{value}" for label, value in rows(found)]
    lines += [f"note: {note}" for note in found["notes"]]
    return "\n".join([*lines, *_collectives(found), verdict(found)])


def rows(found: Found) -> list[tuple[str, str]]:
    """(label, value) of the figures, for one plan or several side by side."""
    m, chip = found["memory"], found["chip"]
    mesh = ", ".join(f"{k} {n}" for k, n in found["mesh"].items() if n > 1) or "1"
    listed = [
        ("machine", f"{found['topology']}, {found['devices']:,} x {chip}"),
        ("mesh", mesh),
        (
            "batch",
            f"{found['examples']:,} examples, {found['tokens']:,} tokens, "
            f"{found['microbatches']} microbatch(es)",
        ),
        ("remat", found["remat"]),
        ("parameters", f"{found['parameters']:,}"),
        ("vocabulary", f"{found['vocab_size']:,} rows"),
        ("state, all devices", gib(found["state_bytes_all"])),
        ("per device: state", gib(m["state"])),
        ("  activations, temporaries", gib(m.get("temporaries"))),
        ("  peak", gib(m["peak"])),
        ("  memory there is", gib(m.get("hbm"))),
    ]
    if m.get("host"):
        listed.append(("  in the host's memory", gib(m["host"])))
    listed += [
        ("model FLOPs per step", f"{found['model_flops']:.4g}"),
        ("compiled FLOPs per device", number(found.get("flops"))),
    ]
    if "flops" in found:
        share = found["flops"] * found["devices"] / found["model_flops"]
        listed.append(("  all devices / model", f"{share:.3f}"))
        listed.append(("memory traffic per device", gib(found["traffic"])))
        moved = sum(c["bytes"] for c in found["collectives"])
        listed.append(("sent per device", gib(moved)))
    if "roofline" in found:
        r = found["roofline"]
        busy = ", ".join(f"{k} {ms(s)}" for k, s in sorted(r["links"].items()))
        listed += [
            ("time: matrix products", ms(r["compute"])),
            ("  memory traffic", ms(r["hbm"])),
            ("  network", ms(r["network"]) + (f"  ({busy})" if busy else "")),
            ("step, all overlapped", f"{ms(r['step'])}, bound by {r['bound']}"),
            ("step, network not hidden", ms(r["step_without_overlap"])),
            ("MFU at most", f"{r['mfu_ceiling']:.1%}"),
            ("  network not hidden", f"{r['mfu_without_overlap']:.1%}"),
        ]
    listed.append(("compiled in", f"{found['compile_seconds']:.1f} s"))
    return listed


def _collectives(found: Found) -> list[str]:
    if not found.get("collectives"):
        return []
    lines = ["", f"{'collective':22}{'over':20}{'calls':>8}{'sent':>14}{'busy':>12}"]
    for c in found["collectives"]:
        if c["bytes"] < 1e-6 * max(x["bytes"] for x in found["collectives"]):
            continue
        busy = ms(c["seconds"]) if "roofline" in found else "-"
        lines.append(
            f"{c['kind']:22}{c['axes']:20}{c['calls']:>8,}{gib(c['bytes']):>14}"
            f"{busy:>12}"
        )
    return [*lines, ""]


def verdict(found: Found) -> str:
    m = found["memory"]
    if "fits" not in m:
        return "fits? not known for this machine"
    if m["fits"]:
        return f"fits: {gib(m['spare'])} of {gib(m['hbm'])} are left"
    return f"does not fit: needs {gib(m['peak'])} of {gib(m['hbm'])}"


def side_by_side(founds: dict[str, Found]) -> str:
    """One column for each plan, one line for each figure that any of them has."""
    columns = {name: dict(rows(found)) for name, found in founds.items()}
    labels: dict[str, None] = {}
    for found in founds.values():
        labels |= dict.fromkeys(label for label, _ in rows(found))
    wide = 2 + max(len(v.split("  (")[0]) for c in columns.values() for v in c.values())
    lines = [f"{'':28}" + "".join(f"{name:{wide}}" for name in founds)]
    for label in labels:
        cells = (c.get(label, "-").split("  (")[0] for c in columns.values())
        lines.append(f"{label:28}" + "".join(f"{cell:{wide}}" for cell in cells))
    lines.append(f"{'':28}" + "".join(f"{verdict(f):{wide}}" for f in founds.values()))
    return "\n".join(line.rstrip() for line in lines)


def ranking(founds: list[Found]) -> str:
    """Candidates of a search, best first; those that do not fit at the end."""
    if not founds:
        return "nothing was compiled"
    lines = [
        f"{'':4}{'data':>6}{'fsdp':>6}{'tensor':>8}{'micro':>7}  {'remat':15}"
        f"{'peak':>12}{'step':>11}{'not hidden':>13}{'MFU <=':>9}  bound by"
    ]
    for i, f in enumerate(founds, 1):
        mesh, r = f["mesh"], f.get("roofline")
        line = (
            f"{i:<4}{mesh['data']:>6}{mesh['fsdp']:>6}{mesh['tensor']:>8}"
            f"{f['microbatches']:>7}  {f['remat']:15}{gib(f['memory']['peak']):>12}"
        )
        if not f["memory"].get("fits", True):
            line += f"  {verdict(f)}"
        elif r:
            line += (
                f"{ms(r['step']):>11}{ms(r['step_without_overlap']):>13}"
                f"{r['mfu_ceiling']:>9.1%}  {r['bound']}"
            )
        lines.append(line)
    fitting = [f for f in founds if f["memory"].get("fits", True)]
    if fitting:
        mesh = fitting[0]["mesh"]
        sizes = " ".join(f"--config.sharding.{k}={n}" for k, n in mesh.items())
        lines.append(
            f"best: {sizes} --config.optim.microbatches={fitting[0]['microbatches']} "
            f"--config.model.remat={fitting[0]['remat']}"
        )
    return "\n".join(lines)


def gib(n: float | None) -> str:
    """Bytes for people."""
    if n is None:
        return "-"
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n:.0f} B"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def number(n: float | None) -> str:
    return "-" if n is None else f"{n:.4g}"
