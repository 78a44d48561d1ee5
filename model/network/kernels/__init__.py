"""Triton kernels for the network's operations between convolutions, in few memory passes.

Three things hold for them, and for those of :mod:`model.diffusion.machine_triton`:

- A row's result is bit-identical for any number of rows, at any index, among any other rows. No kernel uses atomics, no
  program reads two rows, and tiles, chunks and warps depend on C, H, W, groups, dtype and slots alone. Nor may the
  compiler specialize on an address: what it could vectorize is aligned to 16 bytes, or copied.
- They can be captured in a CUDA graph: nothing is read back, nothing is tuned at run time, and memory comes from
  ``torch.empty``. The first launch for a shape compiles and loads the kernel, so it must precede the capture.
- They are for inference: there are no gradients.

This package can be imported without Triton; its modules need it.
"""

from __future__ import annotations

import torch


def usable(device: torch.device) -> bool:
    """Whether kernels run on this device: a CUDA device of capability 7.0 or above, or a CPU with Triton's interpreter.

    The interpreter is for tests, and thousands of times slower than torch: ``TRITON_INTERPRET=1``, set before the
    modules of this package are imported.
    """
    try:
        import triton  # noqa: PLC0415 - optional
    except ImportError:
        return False
    interpreted = bool(triton.knobs.runtime.interpret)
    if device.type == "cuda":
        return not interpreted and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (7, 0)
    return interpreted and device.type == "cpu"
