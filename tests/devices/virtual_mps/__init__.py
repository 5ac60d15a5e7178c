"""A virtual Mac: the ``mps`` device of PyTorch on any machine, as a proof that a program is right on a Mac without one.

    with VirtualMac("M1", memory_gib=8, macos="14.5", torch="2.12.0") as mac:
        x = torch.randn(2, 4, 64, 64).to("mps")         # x.device is mps:0
        with mac.measure() as counts:
            y = network.to("mps")(x)
        counts.kernel_count, counts.sync_count, counts.peak

Tensors on it say ``mps:0`` and hold real values, computed by the CPU's kernels: what is right on a Mac is equal to the
CPU bit for bit, and what a Mac would refuse or corrupt is refused or corrupted here:

* float64 and complex128, and bfloat16 where torch or macOS are too old for it, raise TypeError;
* an operator without an mps kernel in that torch release raises NotImplementedError (``kernels``);
* tensors of two devices in one operator, a generator of the wrong device, a dtype or a size too large raise as torch
  does; what fails an assertion inside Metal raises ``ProcessAborted``, which is no Exception (``rules``);
* uninitialised memory is NaN; ``non_blocking`` copies raise ``Hazard``;
* the known defects of the torch, the macOS and the chip are in effect (``defects``, ``attention``);
* ``torch.mps``, ``torch.backends.mps``, ``platform``, psutil and ``sysctl`` answer for the Mac (``answers``);
* random numbers drawn on the device are not the CPU's (``streams``).

It counts kernels, views, waits of the host, and bytes, each storage once (``account``). With ``shapes_only=True`` it
computes nothing and takes no memory, so a full-size network is measured in seconds.

How it works: ``tensor.VirtualTensor`` wraps a CPU tensor; ``operators.Operators`` sees every operator of torch's
dispatcher (``schema`` knows what kind it is, ``shapes`` works without values), ``functions.Functions`` the few Python
functions that must be met earlier; ``machine.VirtualMac`` switches all of it on and off.

What it does not do: it has no autograd, no sparse tensors and no torch.compile; a kernel's own temporary memory is
counted for attention and the decomposed GroupNorm only; it knows nothing of speed. torch's Python functions that index
or build tensors inside (``torch.unravel_index``, ``F.multi_head_attention_forward``) are not followed into.
"""

from .account import Counts
from .machine import VirtualMac
from .rules import Hazard, ProcessAborted
from .tensor import VirtualTensor

__all__ = ["Counts", "Hazard", "ProcessAborted", "VirtualMac", "VirtualTensor"]
