"""``attn_implementation="widehead"`` for the models of transformers.

>>> import widehead.transformers
>>> widehead.transformers.register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="widehead")
"""

from __future__ import annotations

from functools import partial

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from widehead._limits import DEFAULT_LIMITS, Limits
from widehead.transformers._attention import attention_forward
from widehead.transformers._mask import StructuredMask, attention_mask

__all__ = ["StructuredMask", "attention_forward", "attention_mask", "register"]


def register(name: str = "widehead", *, limits: Limits | None = None) -> None:
    """Registers the attention and the mask function under ``name``.

    Both are needed: without a mask function transformers hands over no mask at all, neither
    padding nor windows. Registering twice replaces; several names may differ in their limits.
    """
    forward = partial(attention_forward, limits=DEFAULT_LIMITS if limits is None else limits)
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, attention_mask)
