"""Weights of other tools in and out: Hugging Face, T5X.

    python -m t5x_lite.convert --from=hf:DIR --to=runs/bert
    python -m t5x_lite.train --config=runs/bert/config.json --workdir=runs/bert \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl
    python -m t5x_lite.convert --from=runs/bert --to=hf:NEW_DIR --dtype=bfloat16
    python -m t5x_lite.convert --diff hf:DIR hf:NEW_DIR

hf:DIR   config.json, model.safetensors (or several with their index, or
         pytorch_model.bin where torch is installed), and tokenizer files; ELECTRA: a
         directory that holds generator/ and discriminator/
t5x:DIR  a checkpoint of T5X, legacy (one file) or a directory
peft:DIR LoRA's adapters alone, as the library peft keeps them; only for --to
WORKDIR  of a run, or to be made: a checkpoint of step 0 with the parameters,
         config.json, and the tokenizer files in WORKDIR/huggingface

A converted workdir is one of `evaluate`, `generate`, `export` and `train`, which starts
from its parameters with a fresh optimizer; another run starts from them with
--config.init_from=WORKDIR. What --to names must not exist.

A fine-tuned run with a head goes out as the class of transformers that computes it
(BertForSequenceClassification ...), and such a class comes in with its head.

--diff compares any two of these, and exports (npz, npy, safetensors): names, shapes,
dtypes and the largest difference, the worst first. It exits with 1 if a name, a shape
or a value differs.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tqdm

from t5x_lite import arrays, checkpoint, cli, export, lora, stored
from t5x_lite import config as config_lib
from t5x_lite.arrays import Lazy
from t5x_lite.interop import families, hf_config, huggingface, peft, t5x, workdirs
from t5x_lite.interop.tables import Imported

FORMATS = ("hf", "t5x", "peft")
# Flag -> where it does something: what is read, or what is written.
USED = {
    "family": ("--from=hf:", "--to=hf:", "--to=peft:"),
    **dict.fromkeys(("config", "vocab", "sentinels"), ("--from=hf:", "--from=t5x:")),
    "fresh": ("--from=hf:",),
    "dtype": ("--to=hf:", "--to=peft:"),
    "shard_size": ("--to=hf:",),
    **dict.fromkeys(("scanned", "legacy"), ("--to=t5x:",)),
    "step": ("--to=hf:", "--to=t5x:", "--to=peft:"),
}


class Spec(NamedTuple):
    """`hf:DIR` -> ("hf", DIR); a workdir, or arrays in files, has no format."""

    format: str
    path: pathlib.Path

    @classmethod
    def of(cls, text: str, flag: str) -> "Spec":
        """What `--flag=text` names.

        Raises:
          ValueError: it is none of these.
        """
        kind, colon, rest = text.partition(":")
        if not colon:
            return cls("", pathlib.Path(text))
        if kind not in FORMATS or not rest:
            raise ValueError(
                f"{flag}={text!r}: give hf:DIR, t5x:DIR or the directory of a run"
                f"{config_lib.nearest(kind, FORMATS)}"
            )
        if kind == "peft" and flag != "--to":
            raise ValueError(
                f"{flag}={text!r}: adapters of peft are written, not read. Merge them "
                "there (merge_and_unload, save_pretrained) and give hf:DIR."
            )
        return cls(kind, pathlib.Path(rest))


def main(argv: list[str] | None = None) -> int:
    """The command; 1 if --diff finds a difference, else 0."""
    parser = cli.parser(__doc__)
    parser.add_argument("--from", dest="source", help="hf:DIR, t5x:DIR or WORKDIR")
    parser.add_argument("--to", help="the same, or peft:DIR; to be made")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare two")
    known = sorted(families.FAMILIES)
    parser.add_argument(
        "--family", default="", choices=["", *known], help="default: by the config"
    )
    parser.add_argument(
        "--dtype", choices=list(arrays.DTYPES), default="float32", help="of hf: files"
    )
    parser.add_argument(
        *("--shard_size", "--shard-size"),
        type=float,
        default=5.0,
        help="most GB of one file (default 5)",
    )
    parser.add_argument(
        "--config", default="", help="of the workdir, but for its model; FILE.py[:ARG]"
    )
    parser.add_argument("--vocab", default="", help="of the workdir; see data.vocab")
    parser.add_argument("--sentinels", type=int, default=-1, help="see data.sentinels")
    parser.add_argument(
        "--fresh", action="store_true", help="draw the parameters that are missing"
    )
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument(
        "--scanned", action="store_true", help="t5x: for its scan_layers (umT5)"
    )
    parser.add_argument(
        "--legacy", action="store_true", help="t5x: DIR/checkpoint_STEP, a file"
    )
    flags = parser.parse_args(argv)
    given = [name for name in USED if getattr(flags, name) != parser.get_default(name)]
    if flags.diff:
        check_flags(given, "--diff")
        if flags.source or flags.to:
            raise ValueError("--diff A B goes without --from and --to.")
        return difference(*flags.diff)
    if not flags.source or not flags.to:
        raise ValueError("give --from and --to, or --diff A B; see --help.")
    if flags.shard_size <= 0:
        raise ValueError(f"--shard_size={flags.shard_size} must be above 0 (GB).")
    source, to = Spec.of(flags.source, "--from"), Spec.of(flags.to, "--to")
    if bool(source.format) == bool(to.format):
        raise ValueError(
            f"--from={flags.source} --to={flags.to}: one of them is the directory of a "
            "run, the other hf:DIR or t5x:DIR. From one format to another, make a "
            "workdir in between."
        )
    check_flags(
        given, f"--from={source.format}:" if source.format else f"--to={to.format}:"
    )
    with fresh_directory(to.path) as made:
        if source.format:
            import_run(source, to.path, made, flags)
        else:
            export_run(source.path, to, made, flags)
    print(f"wrote {flags.to}")
    return 0


def check_flags(given: list[str], direction: str):
    """Refuses flags that would be ignored in this direction, a prefix of USED."""
    for name in given:
        if direction not in USED[name]:
            allowed = " and ".join(USED[name])
            raise ValueError(
                f"--{name} does nothing with {direction}; it is for {allowed}. Leave "
                "it out."
            )


@contextlib.contextmanager
def fresh_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary directory that becomes `path` when all of it is written.

    Raises:
      ValueError: if `path` is there already.
      OSError: if it cannot be written; nothing is left of it then.
    """
    path = path.absolute()
    for above in path.parents:
        if above.exists() and not above.is_dir():
            raise ValueError(f"--to={path}: {above} is a file. Give a new directory.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--to={path} exists. Give a new directory.")
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.tmp-"
    made = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        made.chmod(0o755)
        yield made
        made.replace(path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def import_run(source: Spec, to: pathlib.Path, made: pathlib.Path, flags):
    """Writes a workdir into `made`, which becomes `to`."""
    if source.format == "hf":
        found = huggingface.read(source.path, family=flags.family, fresh=flags.fresh)
    else:
        found = t5x.read(source.path)
    for name in found.extras.get("fresh", ()):
        print(f"DRAWN, not in the files: {name}")
    for note in found.extras.get("notes", ()):
        print(f"note: {note}")
    raw = cli.load_config(flags.config) if flags.config else None
    chosen = dict(spec=flags.vocab, sentinels=flags.sentinels)
    run = workdirs.config_of(found, raw, to, **chosen)
    for note in run.notes:
        print(f"note: {note}")
    for note in workdirs.write(made, run):
        print(f"note: {note}")
    count = sum(math.prod(slot.shape) for slot in run.params.slots.values())
    print(
        f"{run.family}, {run.cfg.model.structure}: {count:,} parameters; "
        f"config.data.vocab={run.cfg.data.vocab!r}"
    )


def export_run(source: pathlib.Path, to: Spec, made: pathlib.Path, flags):
    """Writes a checkpoint of a workdir into `made`."""
    cfg, step, meta = checkpoint.read_run(source, flags.step, "--from")
    trained, plain = cfg.model, lora.without(cfg.model)
    cfg = dataclasses.replace(cfg, model=plain)
    if to.format == "peft":
        family = flags.family or meta.get("family", "")
        kept = stored.open_params(source, step, "kept")
        how = dict(family=family, dtype=flags.dtype)
        for note in peft.write(made, trained, kept, **how):
            print(f"note: {note}")
        return
    params = stored.open_params(source, step)
    if to.format == "t5x":
        whole = trained == plain and not flags.scanned
        opt = t5x.opt_in(source, step) if whole else None
        if flags.scanned:
            print("note: without the optimizer's state, which T5X factors otherwise")
        elif opt is None:
            print("note: without the optimizer's state, which is not Adafactor's")
        how = dict(scanned=flags.scanned, legacy=flags.legacy)
        path = made / f"checkpoint_{step}" if flags.legacy else made
        t5x.write(path, cfg.model, params, step=step, opt=opt, **how)
        return
    theirs, files = workdirs.kept(source)
    family = flags.family or meta.get("family", "")
    if theirs and family and theirs.get("model_type") != hf_config.THEIRS[family].type:
        theirs = {}
    model, notes = cfg.model, []
    rows, labels = theirs.get("vocab_size", model.vocab_size), []
    if model.head:  # its marks may be among the rows that were added
        rows, labels = model.vocab_size, workdirs.labels_of(cfg, theirs)
    if rows < model.vocab_size and files and workdirs.zeros_from(params, rows):
        notes.append(
            f"{model.vocab_size} ids, of which those from {rows} on have rows of "
            f"zeros: vocab_size={rows} was written, as it was read"
        )
        params = workdirs.with_rows(params, rows)
        model = dataclasses.replace(model, vocab_size=rows)
    elif rows < model.vocab_size:
        notes.append(
            f"vocab_size={model.vocab_size} was written, {rows} was read: the rows "
            "that were added are no longer zero, or the vocabulary is another"
        )
    if not files:
        ids, files, more = workdirs.tokenizer_of(cfg, made)
        theirs, notes = {**theirs, **ids}, [*notes, *more]
    elif model.head:
        theirs |= workdirs.pad_of(cfg)
    notes += huggingface.write(
        made,
        model,
        params,
        family=family,
        dtype=flags.dtype,
        shard_bytes=int(flags.shard_size * 1e9),
        theirs=theirs,
        files=files,
        labels=labels,
    )
    for note in notes:
        print(f"note: {note}")


def difference(a: str, b: str) -> int:
    """Prints what differs; 1 if a name, a shape or a value does."""
    left, right = open_any(a), open_any(b)
    if left.ours != right.ours:  # names of one kind
        left, right = (side if side.ours else side.as_ours() for side in (left, right))
    one, other = left.arrays, right.arrays
    if pattern := left.without or right.without:
        print(f"not compared, as a class with a head has none: {pattern}")
        one, other = (
            Lazy({k: s for k, s in x.slots.items() if not re.fullmatch(pattern, k)})
            for x in (one, other)
        )
    if left.ours and _unrolled(one) != _unrolled(other):
        one, other = (x if _unrolled(x) else export.unroll(x) for x in (one, other))
    rows = list(differences(one, other))
    for _, line in sorted(rows, key=lambda row: (-row[0], row[1])):
        print(line)
    wrong = sum(worst > 0 for worst, _ in rows)
    print(
        f"{wrong} of {len({*one, *other})} arrays differ" if wrong else "no difference"
    )
    return 1 if wrong else 0


def differences(a: Lazy, b: Lazy) -> Iterator[tuple[float, str]]:
    """(how much, a line) of each array; 0.0 = equal values, inf = of another shape."""
    for name in tqdm.tqdm(sorted({*a, *b}), unit="array", disable=None):
        one, other = a.slots.get(name), b.slots.get(name)
        if one is None or other is None:
            have, where = (one, "A") if other is None else (other, "B")
            assert have is not None
            yield np.inf, f"only in {where}  {have.shape} {have.dtype}  {name}"
        elif one.shape != other.shape:
            yield np.inf, f"shape {one.shape} in A, {other.shape} in B  {name}"
        else:
            same = one.dtype == other.dtype
            kind = f"{one.dtype}" if same else f"{one.dtype} in A, {other.dtype} in B"
            x, y = (np.asarray(s.read(), np.float64) for s in (one, other))
            worst = 0.0
            if not np.array_equal(x, y, equal_nan=True):
                worst = float(np.max(np.abs(x - y)))
                worst = np.inf if np.isnan(worst) else worst
            if worst or not same:
                yield worst, f"{worst:<10.3g} {one.shape} {kind}  {name}"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two that are compared."""

    arrays: Lazy
    ours: bool
    spec: Spec
    without: str = ""  # regex of our names that have no place in theirs

    def as_ours(self) -> "Side":
        """The same parameters by our names."""
        found: Imported = huggingface.read(self.spec.path)
        table = families.table(found.extras["family"], found.cfg)
        return Side(Lazy.of(found.params), True, self.spec, table.left)


def open_any(text: str) -> Side:
    """The arrays of hf:DIR, t5x:DIR, a workdir, an export or a file."""
    spec = Spec.of(text, "--diff")
    if spec.format == "t5x":
        return Side(Lazy.of(t5x.read(spec.path).params), True, spec)
    if spec.format == "hf":
        if all((spec.path / half).is_dir() for half in huggingface.HALVES):
            return Side(Lazy.of(huggingface.read(spec.path).params), True, spec)
        return Side(huggingface.open_weights(spec.path), False, spec)
    if (spec.path / "checkpoints").is_dir():
        _, step, _ = checkpoint.read_run(spec.path)
        return Side(stored.open_params(spec.path, step), True, spec)
    return Side(arrays.open_arrays(spec.path), True, spec)


def _unrolled(found: Mapping[str, Any]) -> bool:
    return any(export.LAYER.search(name) for name in found)


if __name__ == "__main__":
    cli.run(main)
