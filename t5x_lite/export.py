"""Write the parameters of a run to files with readable names, beside config.json.

    python -m t5x_lite.export --workdir=runs/demo --output=runs/demo_export --verify
    python -m t5x_lite.export --workdir=runs/demo --output=out --layers=stacked
    python -m t5x_lite.export --workdir=runs/demo --output=out --format=safetensors

Unrolled, layer 3's query is `decoder/blocks/03/attention/query` [D, N, H]; stacked, all
layers are `decoder/blocks/attention/query` [L, D, N, H]; layers that share one block
(ALBERT) have one array either way. config.json holds the run's config and step.

npz: `numpy.load("out/params.npz")` reads it. npy-dir: one file an array, out/params/
NAME.npy. safetensors: params.safetensors, or shards of 256 MiB with an index. bfloat16
is native in safetensors; in the others it is uint16, the upper half of the float32's
bits. Parameters are read and written one by one: it takes up to three times the memory
of the largest array in the checkpoint (all layers of a name), and that of a shard.
--verify takes several times that of the model.

LoRA's adapters are added to their weights; --lora=adapter writes these and what else
was trained by themselves (`lora/NAME/a`, `/b`: W + lora_alpha / lora_rank * a b).

--verify reads the files back, restacks them, and compares the logits of a fixed random
batch (of all heads) with the checkpoint's: they must be equal bit for bit. For models
that t5x_lite/interop/numpy_forward.py knows (T5, BERT, GPT-2, BART ...) it computes
them with NumPy alone too: within 1e-4 of the largest.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from t5x_lite import checkpoint, cli, parameters
from t5x_lite import config as config_lib
from t5x_lite import model as model_lib
from t5x_lite.arrays import DTYPES, FORMATS, Lazy, Slot, open_arrays, write_arrays
from t5x_lite.config import ModelConfig
from t5x_lite.interop import numpy_forward
from t5x_lite.stored import as_asked

LAYER = re.compile(r"/blocks/(\d+)/")
LAYOUTS = ("unrolled", "stacked")
WRITTEN = ("step", "config")  # in config.json, ELMo's too
# Of NumPy's logits and the model's: the largest difference over the largest logit.
NUMPY_TOLERANCE = 1e-4


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--output", required=True, help="directory to create")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument("--format", choices=FORMATS, default="npz", help="of the files")
    parser.add_argument(
        "--layers", choices=LAYOUTS, default="unrolled", help="an array a layer, or all"
    )
    parser.add_argument("--dtype", choices=[*DTYPES], default="float32", help="kept")
    parser.add_argument("--lora", choices=("merged", "adapter"), help="see above")
    parser.add_argument("--verify", action="store_true", help="read back and compare")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    flags = parser.parse_args(argv)
    output = pathlib.Path(flags.output)
    check_output(output, flags.overwrite)

    cfg, step, meta = checkpoint.read_run(flags.workdir, flags.step)
    cfg, arrays = as_asked(flags, cfg, step)
    if flags.layers == "unrolled" and not cfg.model.share_layers:
        arrays = unroll(arrays)
    about = {
        "step": step,
        "layers": flags.layers,
        "dtype": flags.dtype,
        "config": config_lib.to_json(cfg),
        "data": meta["data"],
    }
    write(output, arrays, about, flags.format)
    print(table(arrays, flags.dtype))
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"wrote {output} ({flags.format}, {size / 2**20:,.2f} MiB) of step {step}")
    if flags.verify:
        _, net, params, _, _ = checkpoint.load_run(flags.workdir, step)
        print(verify(output, net, params))


def check_output(output: pathlib.Path, overwrite: bool):
    """Refuses an output that exists, unless it is an export to be replaced."""
    if not output.exists():
        return
    ours = re.compile(
        r"config\.json|params|params\.npz|params(-\d+-of-\d+)?\.safetensors"
        r"|params\.safetensors\.index\.json"
    )
    names = [path.name for path in output.iterdir()] if output.is_dir() else [""]
    if names and not (all(map(ours.fullmatch, names)) and _is_export(output)):
        raise ValueError(
            f"--output={output} exists and is not an export. Give a new directory."
        )
    if names and not overwrite:
        raise ValueError(
            f"--output={output} already holds an export. Replace it with --overwrite, "
            "or give a new directory."
        )


def _is_export(output: pathlib.Path) -> bool:
    try:
        about = json.loads((output / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and {*WRITTEN} <= {*about}


def flatten(params: dict) -> dict[str, np.ndarray]:
    """{'decoder/blocks/attention/query': array [L, ...]}, sorted by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def unroll(stacked: Mapping[str, Any]) -> Lazy:
    """One array a layer: '.../blocks/x' [L, ...] -> '.../blocks/00/x', '01', ...

    The layers of a name follow each other, and are views of it: read in this order,
    each stacked array is read once, and one is held at a time.
    """
    lazy, held = Lazy.of(stacked), {}

    def layer(name: str, i: int) -> np.ndarray:
        if name not in held:
            held.clear()
            held[name] = lazy[name]
        return held[name][i]

    slots = {}
    for name, slot in lazy.slots.items():
        stack, blocks, rest = name.partition("/blocks/")
        for i in range(slot.shape[0]) if blocks else ():
            slots[f"{stack}/blocks/{i:02d}/{rest}"] = Slot(
                slot.shape[1:], slot.dtype, functools.partial(layer, name, i)
            )
        if not blocks:
            slots[name] = slot
    return Lazy(slots)


def restack(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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


def write(
    output: pathlib.Path, arrays: Mapping[str, Any], about: dict, kind: str = "npz"
):
    """The arrays and config.json, in one rename of a finished directory.

    Args:
      arrays: by name, `Lazy` or not; written in about["dtype"], if there is one.
      kind: one of FORMATS.

    Raises:
      OSError: if it cannot be written; nothing of it is left then.
    """
    output, lazy = output.absolute(), Lazy.of(arrays)
    output.parent.mkdir(parents=True, exist_ok=True)
    dtype = about.get("dtype", "")
    size = lazy.nbytes(DTYPES[dtype] if dtype else None)
    free = shutil.disk_usage(output.parent).free
    if size > free:
        raise OSError(
            f"--output={output} would take {size / 2**20:,.0f} MiB, and "
            f"{free / 2**20:,.0f} MiB are free there. Free some space, give another "
            "directory, or a narrower --dtype."
        )
    temporary = pathlib.Path(
        tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.tmp-")
    )
    try:
        temporary.chmod(0o755)
        with tqdm.tqdm(
            total=len(lazy), desc="exporting", unit=" arrays", leave=False
        ) as bar:
            write_arrays(temporary, _counted(lazy, bar), kind, dtype)
        (temporary / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        for path in temporary.rglob("*"):
            if path.is_file():
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
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(e, OSError):
            raise
        raise OSError(
            f"--output={output} cannot be written, nothing was changed: {e}. Free some "
            "space or give another directory."
        ) from e


def _counted(lazy: Lazy, bar: tqdm.tqdm) -> Lazy:
    """The same arrays; reading one moves the bar."""

    def read(slot: Slot) -> np.ndarray:
        bar.update()
        return slot.read()

    return Lazy(
        {
            name: slot._replace(read=functools.partial(read, slot))
            for name, slot in lazy.slots.items()
        }
    )


def read(output) -> tuple[Lazy, dict]:
    """(arrays by name as stored, config.json) of an export; see `open_arrays`."""
    about = json.loads((pathlib.Path(output) / "config.json").read_text())
    return open_arrays(output), about


def load(output) -> tuple[Any, dict]:
    """(model, float32 params) of an export, in any format and layout.

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
    """Compares the export's logits with those of `params`; lines that say how.

    Raises:
      ValueError: if the file is damaged or any logit differs. An export in a narrower
        dtype is compared with `params` rounded to it.
    """
    again, from_file = load(output)
    dtype = read(output)[1]["dtype"]
    params = jax.tree.map(lambda p: p.astype(dtype).astype("float32"), params)
    batch = fixed_batch(model.cfg)
    with jax.default_matmul_precision("highest"):
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
        "are bit-equal to the checkpoint's\n"
        + verify_with_numpy(output, model.cfg, params, batch)
    )


def verify_with_numpy(output, cfg: ModelConfig, params: dict, batch: dict) -> str:
    """Computes the logits of the files with NumPy alone; a line that says how near.

    Raises:
      ValueError: if they are not those of the model with `params`, in float32.
    """
    shape = dataclasses.asdict(cfg)
    if reason := numpy_forward.unsupported(shape):
        return f"not recomputed with NumPy alone, which has no {reason}"
    precise = dataclasses.replace(cfg, dtype="float32")
    with jax.default_matmul_precision("highest"):
        want = np.asarray(logits(precise, params, batch))
    found = numpy_forward.forward(dict(open_arrays(output)), shape, batch)
    got = np.concatenate([x.ravel() for x in found.values()])
    worst = float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
    if not worst <= NUMPY_TOLERANCE:
        raise ValueError(
            f"{output}: logits that NumPy computes from the files differ from the "
            f"model's by up to {worst:.3g} of the largest, allowed are "
            f"{NUMPY_TOLERANCE}. Compare t5x_lite/interop/numpy_forward.py with the "
            "model's code."
        )
    return (
        f"verified: {got.size:,} logits that NumPy alone computes from the files are "
        f"the model's (float32) within {worst:.1e} of the largest"
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
            trained["query_groups"] = np.repeat(cells.reshape(1, G, -1), B, axis=0)
    if cfg.structure in ("encoder", "permuted"):
        places = np.arange(0, S * max(G, 1), 2, dtype=np.int32)
        trained["places"] = np.tile(places, (B, 1))
    return batch


def table(arrays: Lazy, dtype: str) -> str:
    """Names, shapes and sizes in the files, and the total."""
    width, each = max(map(len, arrays)), DTYPES[dtype].itemsize

    def row(name: str, shape, count: int) -> str:
        size = count * each / 2**20
        return f"{name:{width}}  {shape!s:20} {count:>14,}  {size:>9,.2f} MiB"

    counts = {name: math.prod(slot.shape) for name, slot in arrays.slots.items()}
    rows = [row(n, arrays.slots[n].shape, counts[n]) for n in sorted(counts)]
    return "\n".join([*rows, row(f"{len(arrays)} arrays", "", sum(counts.values()))])


if __name__ == "__main__":
    cli.run(main)
