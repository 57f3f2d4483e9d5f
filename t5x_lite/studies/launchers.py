"""Cells as tasks of a cluster: a SLURM array, an indexed Kubernetes JobSet."""

import pathlib
import string


def sbatch(
    name: str, config: str, root: pathlib.Path, indices: list[int], more: list[str]
) -> list[str]:
    """The command that submits launch/study.sbatch, a task for each index."""
    return [
        "sbatch",
        f"--job-name={name}",
        f"--array={ranges(indices)}",
        *more,
        "launch/study.sbatch",
        f"--config={config}",
        f"--root={root}",
    ]


def ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5', as sbatch reads it."""
    parts: list[list[int]] = []
    for i in sorted(indices):
        if parts and i == parts[-1][-1] + 1:
            parts[-1].append(i)
        else:
            parts.append([i])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)


def jobset(
    name: str, config: str, root: pathlib.Path, indices: list[int], image: str
) -> str:
    """launch/study_jobset.yaml.template filled in: the i-th pod runs the i-th index."""
    path = pathlib.Path("launch/study_jobset.yaml.template")
    if not path.exists():
        raise FileNotFoundError(
            f"--launcher=jobset: there is no {path} here. Run it from the root of the "
            "repository."
        )
    return string.Template(path.read_text()).substitute(
        name=name.replace("_", "-").lower(),
        count=len(indices),
        indices=" ".join(map(str, indices)),
        config=config,
        root=root,
        image=image,
    )
