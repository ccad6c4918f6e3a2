"""TPU kernels on this machine, in Pallas' simulator of a TPU's memories, copies and semaphores."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


@contextmanager
def simulated(**options: Any) -> Iterator[None]:
    """Run the TPU kernels that are traced within this context in the simulator, and fail if two accesses raced.

    Memory that nothing has written holds NaN, or the highest integer; a read out of bounds is an error. A copy moves
    its bytes when it is waited for, at the last moment that a TPU may take.

    Args:
        options: other fields of ``pltpu.InterpretParams``.
    """
    params = pltpu.InterpretParams(**{"detect_races": True, "uninitialized_memory": "nan"} | options)
    printed = io.StringIO()  # the simulator has no other public way to tell of a race
    try:
        with pltpu.force_tpu_interpret_mode(params), redirect_stdout(printed):
            yield
            jax.effects_barrier()
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # after an error it would refuse the next kernel
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()
