"""``attn_implementation="widehead"`` for the models of transformers.

>>> import widehead.transformers
>>> widehead.transformers.register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="widehead")
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from widehead._limits import Limits, limits_of
from widehead.transformers._attention import attention_forward
from widehead.transformers._mask import StructuredMask, attention_mask

__all__ = ["StructuredMask", "attention_forward", "attention_mask", "continuous_batching", "register"]


def register(name: str = "widehead", *, limits: Limits | None = None) -> None:
    """Registers the attention and the mask function under ``name``.

    Both are needed: without a mask function transformers hands over no mask at all, neither
    padding nor windows. Registering twice replaces; several names may differ in their limits.
    """
    forward = partial(attention_forward, limits=limits_of(limits))
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, attention_mask)


def continuous_batching(model: Any, *, limits: Limits | None = None) -> AbstractContextManager[None]:
    """Within it ``model.generate_batch`` and ``model.init_continuous_batching`` attend over the pages
    of their cache where they lie: no copy of all keys for each layer and step, no dense mask.

    >>> with widehead.transformers.continuous_batching(model):
    ...     results = model.generate_batch(prompts, generation_config=...)

    Caches that are made meanwhile are made for it, in every thread: other models should not begin to
    generate in batches before it ends. It replaces insides of transformers, as they are in 5.24.
    """
    from widehead.transformers import _paged  # which older versions have not

    return _paged.continuous_batching(model, limits_of(limits))
