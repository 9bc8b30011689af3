"""Widehead as an attention backend of vLLM, found by its entry point once it is installed."""


def register() -> None:
    """Puts the backend under the names by which vLLM asks for one, in every process of an engine.

    CPU_ATTN: the only one that vLLM's platform for CPUs uses, whatever it is asked for; Widehead takes
    the place of vLLM's own. CUSTOM: what ``attention_backend="CUSTOM"`` chooses elsewhere.
    """
    # vLLM itself is still being imported: the backend's module must wait until it is asked for.
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM):
        register_backend(name, "widehead_vllm.backend.WideheadBackend")
