from collections.abc import Callable
from typing import Any

class Spec:
    def __init__(self, shape: list[int] | tuple[int, ...], dtype: str = ..., device: str = ...) -> None: ...

class Limits:
    def __init__(
        self,
        workspace_bytes: int | None,
        policy: str,
        fused_above: int,
        kernel: str,
        threads: int,
        precision: str,
        longest_step_us: float,
        batch_invariant: bool,
        fresh_keys: int,
    ) -> None: ...

class Ranks:
    tokens_q: list[tuple[int, int, int]]
    tokens_k: list[tuple[int, int, int]]
    key_lengths: list[int] | None
    key_starts: list[int] | None
    strategy: str
    link: tuple[float, float]
    timeout_s: float
    rank: int
    ranks: int

def sharded_sdpa(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    mask: Any,
    sinks: Any,
    return_log_sum_exp: bool,
    out: Any,
    ranks: Ranks,
    limits: Limits,
    threads: int,
    group: Any,
    allocate: Callable[[int], int],
    empty: Callable[[Any, tuple[int, ...], str], Any] | None,
    /,
) -> tuple[Any, Any, str]: ...
def sdpa(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    mask: Any,
    sinks: Any,
    key_lengths: Any,
    key_starts: Any,
    layouts: tuple[Any, ...] | None,
    return_log_sum_exp: bool,
    out: Any,
    limits: Limits,
    threads: int,
    stream: int | None,
    empty: Callable[[Any, tuple[int, ...], str], Any] | None,
    /,
) -> Any: ...
def plan(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    mask: Any,
    sinks: Any,
    key_lengths: Any,
    key_starts: Any,
    layouts: tuple[Any, ...] | None,
    return_log_sum_exp: bool,
    out: Any,
    gradients: bool,
    limits: Limits,
    threads: int,
    stream: int | None,
    /,
) -> tuple[str, str]: ...
def append(k: Any, v: Any, new_k: Any, new_v: Any, slots: Any, stream: int | None, /) -> None: ...
def backward(*arguments: Any) -> None: ...
def merge(
    parts: list[tuple[Any, Any]],
    sinks: Any,
    stream: int | None,
    empty: Callable[[Any, tuple[int, ...], str], Any] | None,
    /,
) -> tuple[Any, Any]: ...
def empty(shape: tuple[int, ...], dtype: str) -> Any: ...
def kernels(device: int) -> list[tuple[str, str]]: ...
def device_json(device: int, index: int) -> str: ...
def use_torch_threads() -> bool: ...
def version() -> str: ...
