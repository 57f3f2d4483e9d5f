"""Write the parameters of a run as one .npz with readable names, beside config.json.

    python -m t5x_lite.export --workdir=runs/demo --output=runs/demo_export --verify
    python -m t5x_lite.export --workdir=runs/demo --output=out --layers=stacked

Unrolled, layer 3's query is `decoder/blocks/03/attention/query` [D, N, H]; stacked, all
layers are `decoder/blocks/attention/query` [L, D, N, H]; layers that share one block
(ALBERT) have one array either way. Read it with NumPy alone:
`numpy.load("out/params.npz")`. config.json holds the run's config and step.

--verify reads the file back with NumPy, restacks it, and compares the logits of a fixed
random batch (of all heads) with the checkpoint's: they must be equal bit for bit.
"""

import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import checkpoint, cli, parameters
from t5x_lite import config as config_lib
from t5x_lite import model as model_lib
from t5x_lite.config import ModelConfig

LAYER = re.compile(r"/blocks/(\d+)/")
LAYOUTS = ("unrolled", "stacked")


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--output", required=True, help="directory to create")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument(
        "--layers", choices=LAYOUTS, default="unrolled", help="an array a layer, or all"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the file"
    )
    parser.add_argument("--verify", action="store_true", help="read back and compare")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    flags = parser.parse_args(argv)
    output = pathlib.Path(flags.output)
    check_output(output, flags.overwrite)

    cfg, model, params, step, meta = checkpoint.load_run(flags.workdir, flags.step)
    arrays = flatten(params)
    if flags.layers == "unrolled" and not cfg.model.share_layers:
        arrays = unroll(arrays)
    arrays = {name: a.astype(flags.dtype) for name, a in arrays.items()}
    about = {
        "step": step,
        "layers": flags.layers,
        "dtype": flags.dtype,
        "config": config_lib.to_json(cfg),
        "data": meta["data"],
    }
    write(output, arrays, about)
    print(table(arrays))
    size = (output / "params.npz").stat().st_size
    print(f"wrote {output / 'params.npz'} ({size / 2**20:,.2f} MiB) of step {step}")
    if flags.verify:
        print(verify(output, model, params))


def check_output(output: pathlib.Path, overwrite: bool):
    """Refuses an output that exists, unless it is an export to be replaced."""
    if not output.exists():
        return
    ours = {"params.npz", "config.json"}
    foreign = not output.is_dir() or {p.name for p in output.iterdir()} - ours
    if foreign:
        raise ValueError(
            f"--output={output} exists and is not an export. Give a new directory."
        )
    if any(output.iterdir()) and not overwrite:
        raise ValueError(
            f"--output={output} already holds an export. Replace it with --overwrite, "
            "or give a new directory."
        )


def flatten(params: dict) -> dict[str, np.ndarray]:
    """{'decoder/blocks/attention/query': array [L, ...]}, sorted by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def unroll(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One array a layer: '.../blocks/x' [L, ...] -> '.../blocks/00/x', '01', ..."""
    flat = {}
    for name, array in stacked.items():
        stack, blocks, rest = name.partition("/blocks/")
        if not blocks:
            flat[name] = array
            continue
        for i, layer in enumerate(array):
            flat[f"{stack}/blocks/{i:02d}/{rest}"] = layer
    return dict(sorted(flat.items()))


def restack(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `unroll`; stacked arrays pass through."""
    flat, by_layer = {}, {}
    for name, array in arrays.items():
        layer = LAYER.search(name)
        if layer is None:
            flat[name] = array
        else:
            stacked = by_layer.setdefault(LAYER.sub("/blocks/", name), {})
            stacked[int(layer[1])] = array
    for name, found in by_layer.items():
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"{name} has layers {sorted(found)}: some are missing.")
        flat[name] = np.stack([found[i] for i in range(len(found))])
    return dict(sorted(flat.items()))


def write(output: pathlib.Path, arrays: dict[str, np.ndarray], about: dict):
    """params.npz and config.json, in one rename of a finished directory.

    Raises:
      OSError: if it cannot be written; nothing of it is left then.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(
        tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.tmp-")
    )
    try:
        temporary.chmod(0o755)
        np.savez(temporary / "params.npz", **arrays)  # pyright: ignore[reportArgumentType]
        (temporary / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        for path in temporary.iterdir():
            with path.open("rb") as f:
                os.fsync(f.fileno())
        if output.exists():
            # A directory cannot be replaced in one step; the old one goes last.
            old = temporary.with_name(temporary.name + "-old")
            output.rename(old)
            try:
                temporary.rename(output)
            except OSError:
                old.rename(output)
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(output: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays by name as stored, config.json) of an export, with NumPy alone.

    Raises:
      ValueError: if the file is damaged; the zip's checksums are compared.
    """
    path = pathlib.Path(output) / "params.npz"
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with path.open("rb") as f, np.load(f, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as e:
        raise ValueError(f"{path} is damaged: {e}. Export it again.") from e
    return arrays, json.loads((path.parent / "config.json").read_text())


def load(output) -> tuple[Any, dict]:
    """(model, float32 params) of an export, either layout.

    Raises:
      ValueError: if names or shapes are not those of the model in its config.json.
    """
    arrays, about = read(output)
    cfg = config_lib.freeze(about["config"])
    model = model_lib.build(cfg.model)
    flat = restack(arrays)
    expected = {n: p.get_value().shape for n, p in parameters.declared(model).items()}
    wrong = [
        f"{name}: {found} in the file, {wanted} in the model"
        for name in sorted({*flat, *expected})
        if (found := flat[name].shape if name in flat else None)
        != (wanted := expected.get(name))
    ]
    if wrong:
        raise ValueError(
            f"{output} does not fit its own config.json:\n  - " + "\n  - ".join(wrong)
        )
    split = {tuple(n.split("/")): jnp.asarray(a, "float32") for n, a in flat.items()}
    return model, parameters.nested(split)


def verify(output, model: Any, params: dict) -> str:
    """Compares the export's logits with those of `params`; a line that says equal.

    Raises:
      ValueError: if the file is damaged or any logit differs. An export in a narrower
        dtype is compared with `params` rounded to it.
    """
    again, from_file = load(output)
    dtype = read(output)[1]["dtype"]
    params = jax.tree.map(lambda p: p.astype(dtype).astype("float32"), params)
    batch = fixed_batch(model.cfg)
    want = np.asarray(logits(model.cfg, params, batch))
    got = np.asarray(logits(again.cfg, from_file, batch))
    if not np.array_equal(want, got):
        worst = np.max(np.abs(want - got))
        raise ValueError(
            f"{output} is not what the checkpoint holds: logits differ by up to "
            f"{worst:.3g}. Export it again with --overwrite."
        )
    return (
        f"verified: {got.size:,} logits of a random batch, recomputed from the file, "
        "are bit-equal to the checkpoint's"
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg: ModelConfig, params: dict, batch: dict) -> jax.Array:
    """float32 [all logits of all heads], in the compute dtype of the config."""
    cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
    bound = model_lib.bind(model_lib.build(cfg), cast)
    out = bound.outputs(batch)
    found = [bound.logits(out.cells_BKE), out.classes_BC]
    if cfg.generator_width:
        found.append(bound.scores(batch["main"], batch["main"]["tokens"]))
    return jnp.concatenate([x.ravel() for x in found if x is not None])


def fixed_batch(cfg: ModelConfig, B: int = 2) -> dict:
    """A random batch for a model that reaches all its parameters; see `example`."""
    rng = np.random.default_rng(0)
    S = min(16, cfg.max_positions - 1)  # ProphetNet looks one place ahead
    T, G = S // 2, cfg.query_streams

    def stream(length: int, causal: bool) -> dict:
        positions = np.tile(np.arange(length, dtype=np.int32), (B, 1))
        made = {
            "tokens": rng.integers(0, cfg.vocab_size, (B, length), np.int32),
            "positions": positions,
            "segments": np.ones_like(positions),
            "ranks": positions * causal,
        }
        if cfg.types:
            made["types"] = rng.integers(0, cfg.types, (B, length), np.int32)
        return made

    if cfg.structure == "encoder_decoder":
        batch = {"encoder": stream(S, False), "decoder": stream(T, True)}
    else:
        batch = {"main": stream(S, cfg.structure != "encoder")}
    if cfg.memory_length:
        batch["memory"] = stream(T, False)
    trained = batch[model_lib.trained_stream(cfg)]
    if G:
        trained["query_ranks"] = np.stack([trained["ranks"]] * G, axis=1)
        if cfg.positions != "transformer_xl":  # XLNet's query cells see no other
            cells = np.arange(trained["query_ranks"][0].size, dtype=np.int32) + 1
            groups = cells.reshape(1, G, -1)
            trained["query_groups"] = np.repeat(groups, B, axis=0)
    if cfg.structure in ("encoder", "permuted"):
        places = np.arange(0, S * max(G, 1), 2, dtype=np.int32)
        trained["places"] = np.tile(places, (B, 1))
    return batch


def table(arrays: dict[str, np.ndarray]) -> str:
    """Names, shapes and sizes, and the total."""
    width = max(map(len, arrays))

    def row(name: str, shape, count: int, size: int) -> str:
        return f"{name:{width}}  {shape!s:20} {count:>14,}  {size / 2**20:>9,.2f} MiB"

    rows = [row(name, a.shape, a.size, a.nbytes) for name, a in arrays.items()]
    count = sum(a.size for a in arrays.values())
    size = sum(a.nbytes for a in arrays.values())
    return "\n".join([*rows, row(f"{len(arrays)} arrays", "", count, size)])


if __name__ == "__main__":
    cli.run(main)
