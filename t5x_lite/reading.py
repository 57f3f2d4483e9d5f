"""Arrays of a checkpoint, read by Orbax."""

import logging
import pathlib
import sys

import jax
import orbax.checkpoint as ocp


def arrays(directory: pathlib.Path, abstract: dict, *, partial: bool = False):
    """Arrays of the checkpoint in `directory`, placed as `abstract` says; unverified.

    Every process reads alone: one that cannot must be able to say so.

    Args:
      partial: `abstract` is a part of what is stored.
    """
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        try:
            return checkpointer.restore(
                directory / "state",
                args=ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=partial,
                ),
            )
        except Exception:
            _silence_other_reads()
            raise


def _silence_other_reads():
    """TensorStore prints a traceback for each read that outlives the first error."""
    before = sys.excepthook

    def hook(kind, error, trace):
        if "Event loop is closed" not in str(error):
            before(kind, error, trace)

    sys.excepthook = hook
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
