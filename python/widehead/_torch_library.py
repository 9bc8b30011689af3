"""PyTorch's tensors as :mod:`widehead._arrays` wants them."""

from __future__ import annotations

import torch

from widehead._arrays import Library


class Torch(Library):
    # Tensors are made by PyTorch's own allocator, through the exchange table of DLPack, which also
    # names the current stream.
    def threads(self) -> int:
        return torch.get_num_threads()
