"""What a model of transformers may be handed: by what its module declares and does with masks.

transformers hands one mask to every layer, and most models pass it on unread. Those that ask what
class it is of, or add it to scores of their own, need the tensor that they know.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import lru_cache

import torch
from transformers import PreTrainedModel

# Declare neither flag, and yet ask for an attention function as the others do: tools/sweep_transformers
# runs them beside eager, and docs/transformers-models.md has the result.
_PROVEN = frozenset({"bigbird_pegasus", "longt5", "nllb_moe", "pegasus_x", "switch_transformers"})
# As isinstance(attention_mask, BlockMask); a dictionary of masks by kind of layer is no mask.
_ASKS_CLASS = re.compile(r"isinstance\(\s*\w*mask\w*\s*,(?!\s*dict\b)")


# Known when a call is traced: the compiler need not look inside, and cannot.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def mask_form(configuration_module: str) -> str:
    """For the models of a configuration's module: ``"structured"``, ``"boolean"`` as for sdpa, or
    ``"additive"`` as for eager."""
    return _mask_form(configuration_module.replace("configuration_", "modeling_"))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_taken(modeling_module: str) -> bool:
    """Whether a layer of this module may call the attention function."""
    package = modeling_module.rpartition(".")[0].rpartition(".")[2]
    return package in _PROVEN or _declares(modeling_module)


@lru_cache(maxsize=None)
def _mask_form(name: str) -> str:
    models = _models_of(name)
    if not models or (_declares(name) and not _ASKS_CLASS.search(_source(name))):
        return "structured"
    return "boolean" if any(model._supports_sdpa for model in models) else "additive"


@lru_cache(maxsize=None)
def _declares(name: str) -> bool:
    """Whether a model of the module says that attention functions serve it. Where there is no model,
    as for a layer of the caller's own, nothing speaks against it."""
    models = _models_of(name)
    return not models or any(m._supports_sdpa or m._supports_attention_backend for m in models)


def _models_of(name: str) -> list[type[PreTrainedModel]]:
    return [
        each
        for each in vars(sys.modules.get(name, object)).values()
        if isinstance(each, type) and issubclass(each, PreTrainedModel) and each.__module__ == name
    ]


def _source(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):  # without a file: nothing is known of it
        return ""
