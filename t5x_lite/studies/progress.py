"""One progress view over all cells of a study, read from their files.

So it is the same whether the cells run here, in another process or on a cluster.
"""

import json
import os
import pathlib
import sys
import threading

import tqdm

from t5x_lite.studies import grid

TAIL = 4096  # bytes of a metrics.jsonl that surely hold its last line


class Progress:
    """A bar in units of training FLOPs; a thread reads how far the cells are."""

    def __init__(self, root, cells: list[grid.Cell]):
        self.root, self.cells = pathlib.Path(root), cells
        self.seconds = 1.0 if sys.stderr.isatty() else 60.0  # a log needs no motion
        costs = {cell.key: grid.cost(cell) for cell in cells}
        self.per_step = {key: c.flops_per_step for key, c in costs.items()}
        self.total = {key: c.training_flops for key, c in costs.items()}
        self.finished: set[str] = set()
        self.at_start = self.flops()
        self.running = ""
        self._stop = threading.Event()

    def flops(self) -> float:
        """Spent on all cells so far."""
        spent = 0.0
        for key, total in self.total.items():
            where = self.root / "cells" / key
            if key not in self.finished and (where / "result.json").exists():
                self.finished.add(key)
            done = total
            if key not in self.finished:
                last = last_line(where / "train" / "metrics.jsonl")
                done = min(total, self.per_step[key] * last.get("step", 0))
            spent += done
        return spent

    def __enter__(self):
        self.bar = tqdm.tqdm(
            total=sum(self.total.values()) / 1e12,
            initial=self.at_start / 1e12,
            unit="TFLOP",
            file=sys.stderr,  # what it is now: cells print into their own logs
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n:.3g}/{total:.3g} TFLOP "
            "[{elapsed}<{remaining}] {postfix}",
        )
        self.bar.set_postfix_str(f"{len(self.finished)}/{len(self.cells)} cells")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.refresh()
        self.bar.close()

    def _watch(self):
        while not self._stop.wait(self.seconds):
            self.refresh()

    def refresh(self):
        self.bar.n = self.flops() / 1e12
        text = f"{len(self.finished)}/{len(self.cells)} cells"
        if self.running:
            last = last_line(
                self.root / "cells" / self.running / "train" / "metrics.jsonl"
            )
            text += f", {self.running.rpartition('-')[0]}"
            if "loss" in last:
                text += f" step {last['step']} loss {last['loss']:.3f}"
        self.bar.set_postfix_str(text)

    def now(self, cell: grid.Cell):
        self.running = cell.key

    def done(self, cell: grid.Cell, row: dict):
        self.running = ""
        self.say(
            f"{cell.name}, seed {cell.seed}: {row['score']} "
            f"{row['heldout_loss']:.4f}, {row['wall_seconds']:.1f} s"
        )

    def say(self, text: str):
        self.bar.write(text, file=sys.stdout)


def last_line(path: pathlib.Path) -> dict:
    """The last whole line of a metrics.jsonl, {} if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
