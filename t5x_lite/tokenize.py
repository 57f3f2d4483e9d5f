"""Builds the token stores of a config ahead of a run, and says what is in them.

    python -m t5x_lite.tokenize --config=configs/t5_1_1_base.py
    python -m t5x_lite.tokenize --config=configs/t5_1_1_base.py --files=20 \\
        --config.data.build_processes=32 --config.data.deduplicate=True
    python -m t5x_lite.tokenize --config=configs/t5_1_1_base.py --verify

A run builds what is missing by itself. This is for a machine without accelerators that
shares `data.cache_dir` with those that train, and for looking at a corpus: documents,
those left out (empty, duplicate, broken) or repaired, characters, tokens, the shares of
tokens that are unknown or single bytes, and the longest document. The same is in
`statistics.json` of a store, for every file. Killed, it goes on where it was.

For a corpus beyond one machine, Apache Beam (pip install 't5x-lite[beam]') makes the
same store, bit for bit; what follows -- are Beam's own flags:

    python -m t5x_lite.tokenize --config=configs/t5_1_1_base.py --beam=gs://b/parts \\
        -- --runner=DataflowRunner --project=p --region=r --temp_location=gs://b/tmp
"""

import functools
import json
import sys
from collections.abc import Callable

from t5x_lite import cli, config, vocab
from t5x_lite.data import building, mixture
from t5x_lite.data.statistics import Statistics, table


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else list(argv)
    own, beam_flags = argv, []
    if "--" in argv:
        at = argv.index("--")
        own, beam_flags = argv[:at], argv[at + 1 :]
    raw, flags = cli.parse_config(
        __doc__,
        own,
        files=("0", "also show that many files of each source, those of most tokens"),
        verify=(False, "read every byte of the stores that are there"),
        beam=(
            "",
            "folder or URL for parts: use Apache Beam; its flags after --",
        ),
    )
    if not flags.files.isdecimal():
        raise ValueError(f"--files={flags.files}: a number of 0 or more is needed.")
    if beam_flags and not flags.beam:
        raise ValueError("flags after -- are Beam's: give --beam=FOLDER as well.")
    cfg = config.freeze(raw)
    texts = [*mixture.sources_of(cfg, "train"), *mixture.sources_of(cfg, "heldout")]
    if not texts:
        raise ValueError(
            "config.data names no text: its tasks are read as they are. Set data.train."
        )
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    mixture.look(texts)
    build = _build(flags.beam, beam_flags)
    rows: list[tuple[str, Statistics]] = []
    for text in texts:
        store = mixture.open_text(cfg, words, text, verify=flags.verify, build=build)
        print(f"{text.key}={text.spec!r}: {store.path}", flush=True)
        rows.append((text.key.removeprefix("config.data."), store.statistics))
        if int(flags.files):
            made = json.loads((store.path / "statistics.json").read_text())["files"]
            made.sort(key=lambda row: -row["tokens"])
            shown = made[: int(flags.files)]
            rows += [(f"  {row['file']}", Statistics.of(row)) for row in shown]
    print("\n" + table(rows))


def _build(parts: str, beam_flags: list[str]) -> Callable[..., building.Writer]:
    if not parts:
        return building.build
    try:
        from t5x_lite.data import beam
    except ImportError as e:
        raise ValueError(
            f"--beam={parts} needs Apache Beam: pip install 't5x-lite[beam]' ({e})."
        ) from e
    beam.check(beam_flags)
    return functools.partial(beam.build, parts=parts, flags=beam_flags)


if __name__ == "__main__":
    cli.run(main)
