"""Memory and speed of building a token store.   python -m tests.bench.building

Makes a corpus of documents of paragraphs drawn from the texts below --text (Debian's
documentation), builds its store with each number of processes, and samples the resident
memory of the building process and of all its children over the whole time. Prints MB/s
and CPU seconds, and SentencePiece's plain encoding of a part of the same text on one
thread. Times on a shared machine say little: compare CPU seconds.
"""

import argparse
import gzip
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import sys
from t5x_lite import vocab
from t5x_lite.data import store
made = store.open_store(sys.argv[1], vocab.load(sys.argv[2]), sys.argv[3],
    processes=int(sys.argv[4]), deduplicate=sys.argv[5] == "yes", progress=False)
print(made.n_tokens, made.statistics.documents, made.statistics.duplicates)
"""


def paragraphs(folder: str, most: int = 2**26) -> list[str]:
    """Up to `most` characters of valid UTF-8 below a folder."""
    found, size = [], 0
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        try:
            content = path.read_bytes()
            text = gzip.decompress(content) if path.suffix == ".gz" else content
            blocks = text.decode().split("\n\n")
        except (OSError, ValueError, EOFError):
            continue
        new = [b for b in blocks if 100 < len(b) < 20_000 and "\0" not in b]
        found += new
        size += sum(map(len, new))
        if size > most:
            break
    return found


def write_corpus(path: Path, size: int, folder: str, twice: float):
    """JSON lines; each document comes a second time with probability `twice`."""
    rng, pool = random.Random(0), paragraphs(folder)
    with open(path, "w") as file:
        while file.tell() < size:
            text = "\n\n".join(rng.choices(pool, k=rng.randint(1, 12)))
            line = json.dumps({"text": text}) + "\n"
            file.write(line * (2 if rng.random() < twice else 1))


def tree(pid: int) -> dict[int, float]:
    """Resident MiB of a process and of its children."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            if int(path.name) == pid or int(parent) == pid:
                pages = int((path / "statm").read_text().split()[1])
                found[int(path.name)] = pages * resource.getpagesize() / 2**20
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def measure(source: Path, vocab: str, processes: int, deduplicate: bool) -> str:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(dir=source.parent) as cache:
        flag = "yes" if deduplicate else "no"
        start = time.perf_counter()
        build = subprocess.Popen(
            [sys.executable, "-c", BUILD, source, vocab, cache, str(processes), flag],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        samples = []
        while build.poll() is None:
            samples.append((time.perf_counter() - start, tree(build.pid)))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        assert build.returncode == 0 and build.stdout
        made = build.stdout.read().split()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = source.stat().st_size / 1e6
    lines = [
        f"{processes} process(es), dedup {flag}: {size:.0f} MB in {seconds:.0f} s, "
        f"{size / seconds:.1f} MB/s; {cpu:.0f} CPU s, {size / cpu:.1f} MB per CPU s; "
        f"{made[0]} tokens, {made[1]} documents, {made[2]} duplicates"
    ]
    for name, of in (
        ("itself", lambda found: found.get(build.pid, 0.0)),
        ("largest child", lambda f: max([0.0, *(f[p] for p in f if p != build.pid)])),
    ):
        parts = []
        for tenth in range(10):
            chosen = [
                of(found)
                for at, found in samples
                if tenth <= 10 * at / seconds < tenth + 1
            ]
            parts.append(statistics.median(chosen) if chosen else 0.0)
        most = max(of(found) for _, found in samples)
        shown = " ".join(f"{part:.0f}" for part in parts)
        lines.append(f"  MiB of {name}, by tenth of the time: {shown}; most {most:.0f}")
    return "\n".join(lines)


def plain(source: Path, vocab: str, size: int = 2**25) -> str:
    import sentencepiece

    with open(source) as file:
        texts = [json.loads(line)["text"] for line in file.readlines(size)]
    model = sentencepiece.SentencePieceProcessor(model_file=vocab, num_threads=1)
    model.encode(texts[:100])
    cpu = time.process_time()
    for at in range(0, len(texts), 100):
        model.encode(texts[at : at + 100], return_type="numpy")
    cpu = time.process_time() - cpu
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return f"plain SentencePiece, one thread: {megabytes / cpu:.1f} MB per CPU s"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1100)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--text", default="/usr/share/doc")
    parser.add_argument("--vocab", default=str(ROOT / "data/vocab_4k.model"))
    parser.add_argument("--twice", type=float, default=0.1, help="share of duplicates")
    parser.add_argument("--deduplicate", action="store_true")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "corpus.jsonl"
        write_corpus(source, args.megabytes * 10**6, args.text, args.twice)
        print(f"{os.cpu_count()} cores; {plain(source, args.vocab)}", flush=True)
        for processes in args.processes:
            print(measure(source, args.vocab, processes, args.deduplicate), flush=True)


if __name__ == "__main__":
    main()
