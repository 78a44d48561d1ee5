"""Triton kernels of the CUDA path: what a network and a row machine do between convolutions, in few memory passes.

``norm`` and ``residual`` serve the network, ``rows`` the machine. Three things hold for all of them:

- A row's bits depend on that row alone: not on how many rows there are, nor on its place, nor on its neighbours. No
  kernel uses atomics, no program reads two rows, and tiles, chunks and warps are chosen by C, H, W, groups, dtype and
  slots alone. Nor may the compiler choose by an address: what it could vectorize is aligned to 16 bytes, or copied.
- They can be captured in a CUDA graph: nothing is read back, nothing is tuned at run time, and memory comes from
  ``torch.empty``. A shape's first launch compiles and loads its kernel, so it has to come before the capture.
- They are for inference: no gradients flow.

This package can be imported without Triton; its modules need it.
"""

from __future__ import annotations

import torch


def usable(device: torch.device) -> bool:
    """Whether kernels run there: on a CUDA device of capability 7.0 or above, or interpreted on the CPU.

    Interpreted is: ``TRITON_INTERPRET=1``, set before the modules of this package are imported. That is for tests; it
    is thousands of times slower than torch.
    """
    try:
        import triton  # noqa: PLC0415 - it may be missing
    except ImportError:
        return False
    interpreted = bool(triton.knobs.runtime.interpret)
    if device.type == "cuda":
        return not interpreted and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (7, 0)
    return interpreted and device.type == "cpu"
