"""Engine and Session: an artifact opened inside a memory budget, and a conversation with it."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np

from cfmoe.runtime import _capi
from cfmoe.runtime.errors import CFMoEError
from cfmoe.runtime.size import parse_budget

_EVENT_BATCH = 65536


@dataclass(frozen=True)
class Memory:
    """Where the budget goes, in bytes; slots and total count experts. ``mapped_bytes`` lie outside the budget (io ``mmap``).

    Budgets from ``smallest_budget_bytes`` on work; more than ``largest_budget_bytes``, all experts, is of no use.
    """

    budget_bytes: int
    smallest_budget_bytes: int
    largest_budget_bytes: int
    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    pool_bytes: int
    arena_bytes: int
    mapped_bytes: int
    expert_slots: int
    expert_total: int


@dataclass(frozen=True)
class ModelInfo:
    """Facts of the model; ``context_size`` is the engine's, in tokens."""

    vocab_size: int
    context_size: int
    num_layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    prefill_chunk: int
    expert_record_bytes: int


@dataclass(frozen=True)
class PhaseMetrics:
    """Cost of one phase since the session began or was reset. ``prefetched`` counts experts read ahead; prefill has their bytes."""

    tokens: int
    seconds: float
    hits: int
    misses: int
    prefetched: int
    bytes_read: int
    stall_ms: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def chr(self) -> float:
        """Hits per access; 0 without accesses."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 0.0


@dataclass(frozen=True)
class Metrics:
    """Both phases, and the accesses of the first 32 decoded tokens."""

    prefill: PhaseMetrics
    decode: PhaseMetrics
    first_32_hits: int
    first_32_accesses: int

    @property
    def first_32_chr(self) -> float:
        return self.first_32_hits / self.first_32_accesses if self.first_32_accesses else 0.0


@dataclass(frozen=True)
class Event:
    """One access to an expert; ``layer`` is the ordinal among the MoE layers, ``position`` the token's."""

    decode: bool
    hit: bool
    layer: int
    expert: int
    position: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """What :meth:`Session.generate` made: the new tokens, without the stop token, and why it ended.

    ``finish_reason`` is ``stop`` (a stop token), ``length`` (max_new_tokens), ``context`` (no room left) or ``callback``.
    """

    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str


class Engine:
    """An opened artifact. Belongs to one thread at a time.

    path: the artifact directory.
    memory_budget: ``"800MiB"``, ``"50%"`` of the experts, bytes, or None for all experts as far as memory goes.
    context_size: tokens; None for the model's, at most 4,096. threads: None for one per physical core.
    io: ``auto``, ``direct``, ``buffered`` or ``mmap``. policy: the cache policy; None for the default. log_events: keep every access.
    record_trace: keep the routing of every token, for :meth:`Session.write_trace`, in memory outside the budget; record_scores: and the
    router's scores of all experts (they are kept anyway where the policy predicts from them).
    device: ``cpu``, ``vulkan``, ``opencl``, or ``auto``: a GPU where the artifact and this machine have one that works, else the CPU with a
    warning. prefill_device, decode_device: of one phase alone; both phases share one copy of the experts and one KV cache.

    Raises CFMoEError where the artifact, the budget or an option is at fault, RuntimeFault otherwise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        memory_budget: int | str | None = None,
        context_size: int | None = None,
        threads: int | None = None,
        io: str = "auto",
        policy: str | None = None,
        log_events: bool = False,
        record_trace: bool = False,
        record_scores: bool = False,
        device: str = "cpu",
        prefill_device: str | None = None,
        decode_device: str | None = None,
    ) -> None:
        self._handle = ctypes.c_void_p()
        self._sessions: list[Session] = []
        budget = parse_budget(memory_budget)
        for option, value in (("--context-size", context_size), ("--threads", threads)):
            if value is not None and not 0 < value < 1 << 31:
                raise CFMoEError(f"{option} {value} is not allowed: use a positive number, or leave it out")
        lib = _capi.library()
        options = _capi.EngineOptions()
        lib.cfmoe_engine_options_init(ctypes.byref(options))
        options.budget_bytes = budget.bytes
        options.expert_percent = budget.percent
        options.context_size = context_size or 0
        options.threads = threads or 0
        options.io = io.encode()
        options.policy = policy.encode() if policy is not None else None
        options.log_events = int(log_events)
        options.record_trace = int(record_trace)
        options.record_scores = int(record_scores)
        options.device = device.encode()
        options.prefill_device = prefill_device.encode() if prefill_device is not None else None
        options.decode_device = decode_device.encode() if decode_device is not None else None
        error = _capi.ErrorText()
        error.check(lib.cfmoe_engine_open(os.fsencode(path), ctypes.byref(options), ctypes.byref(self._handle), *error.arguments))
        self._lib = lib

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def close(self) -> None:
        """Closes the engine and its sessions; further calls do nothing."""
        for session in list(self._sessions):
            session.close()
        if self._handle:
            self._lib.cfmoe_engine_close(self._handle)
            self._handle = ctypes.c_void_p()

    def _open_handle(self) -> ctypes.c_void_p:
        if not self._handle:
            raise CFMoEError("the engine is closed: open it again")
        return self._handle

    @property
    def memory(self) -> Memory:
        out = _capi.Memory()
        self._lib.cfmoe_engine_memory(self._open_handle(), ctypes.byref(out))
        return Memory(**_fields(out))

    def set_memory_budget(self, memory_budget: int | str | None) -> Memory:
        """Changes the budget between calls, or in ``on_token``, and returns what became of it; no token depends on it.

        memory_budget: as when opening. Raises CFMoEError where it is too small, naming the smallest that works, and while another thread's
        call runs; the budget stays as it was then.
        """
        budget = parse_budget(memory_budget)
        error = _capi.ErrorText()
        error.check(self._lib.cfmoe_engine_set_budget(self._open_handle(), budget.bytes, budget.percent, *error.arguments))
        return self.memory

    def trim(self, memory_budget: int = 0) -> None:
        """For low memory: shrinks the budget to so many bytes, or to the smallest that works if that is more; never grows it.

        From any thread. The memory goes back to the system at once, or before the next layer of a call that another thread runs.
        """
        if not 0 <= memory_budget < 1 << 64:
            raise CFMoEError(f"a memory budget of {memory_budget} bytes is not allowed: use 0 (the smallest) to 2^64 - 1")
        error = _capi.ErrorText()
        error.check(self._lib.cfmoe_engine_trim(self._open_handle(), memory_budget, *error.arguments))

    def keep_warm(self, experts: Sequence[int] | None = None) -> None:
        """From now on a session that begins or is reset finds what is in memory, not a cold cache, and free room fills between calls.

        experts: what to read ahead, ``layer * num_experts + expert``, the likeliest first (:func:`cfmoe.trace.metrics.popular_experts`);
        None for all, layer by layer; an empty list ends reading ahead. No token depends on it, and the budget holds.
        :meth:`residents` shows how far it has come, ``metrics.prefill.prefetched`` how many were read. Raises CFMoEError where an expert is
        none of the model's, or while a call runs.
        """
        model = self.model
        ids = range(model.moe_layers * model.num_experts) if experts is None else experts
        if any(not 0 <= one < 1 << 32 for one in ids):
            raise CFMoEError("an expert to keep warm has a negative number, or one above 2^32: count layer * num_experts + expert")
        error = _capi.ErrorText()
        error.check(self._lib.cfmoe_engine_keep_warm(self._open_handle(), (ctypes.c_uint32 * len(ids))(*ids), len(ids), *error.arguments))

    def residents(self) -> np.ndarray:
        """Which experts are in memory: bool [moe_layers, num_experts]. Between calls, or in ``on_token``."""
        model = self.model
        out = np.zeros((model.moe_layers, model.num_experts), dtype=np.uint8)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self._lib.cfmoe_engine_residents(self._open_handle(), pointer, out.size)
        return out.astype(bool)

    @property
    def model(self) -> ModelInfo:
        out = _capi.ModelInfo()
        self._lib.cfmoe_engine_model(self._open_handle(), ctypes.byref(out))
        return ModelInfo(**_fields(out))

    @property
    def prefill_device(self) -> str:
        """Where prefill runs: ``cpu``, ``vulkan`` or ``opencl``."""
        return self._lib.cfmoe_engine_device(self._open_handle(), 0).decode()

    @property
    def decode_device(self) -> str:
        """Where decode runs: ``cpu``, ``vulkan`` or ``opencl``."""
        return self._lib.cfmoe_engine_device(self._open_handle(), 1).decode()

    @property
    def placement(self) -> str:
        """Where both phases run; ``vulkan/cpu`` where prefill runs elsewhere than decode."""
        prefill, decode = self.prefill_device, self.decode_device
        return prefill if prefill == decode else f"{prefill}/{decode}"

    @property
    def device_name(self) -> str:
        """The GPU's name; empty where both phases run on the CPU."""
        return self._lib.cfmoe_engine_device_name(self._open_handle()).decode("utf-8", "replace")

    @property
    def io(self) -> str:
        """What ``auto`` became."""
        return self._lib.cfmoe_engine_io(self._open_handle()).decode()

    @property
    def policy(self) -> str:
        return self._lib.cfmoe_engine_policy(self._open_handle()).decode()

    @property
    def warning(self) -> str:
        """What the user should know about how the artifact was opened; empty if nothing."""
        return self._lib.cfmoe_engine_warning(self._open_handle()).decode()

    def session(self) -> Session:
        """Begins a conversation, with a cold cache unless it is kept warm. One at a time: raises CFMoEError while another is open."""
        return Session(self)


class Session:
    """One conversation; positions continue over calls until :meth:`reset`. Made by :meth:`Engine.session`."""

    def __init__(self, engine: Engine) -> None:
        self._handle = ctypes.c_void_p()
        self._engine = engine
        self._lib = engine._lib
        error = _capi.ErrorText()
        error.check(self._lib.cfmoe_session_create(engine._open_handle(), ctypes.byref(self._handle), *error.arguments))
        engine._sessions.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the conversation; further calls do nothing."""
        if self._handle:
            self._lib.cfmoe_session_destroy(self._handle)
            self._handle = ctypes.c_void_p()
            self._engine._sessions.remove(self)

    def _open_handle(self) -> ctypes.c_void_p:
        if not self._handle:
            raise CFMoEError("the session is closed: begin another")
        return self._handle

    @property
    def position(self) -> int:
        """Tokens of the conversation so far, generated ones included."""
        return self._lib.cfmoe_session_position(self._open_handle())

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] | None = None,
        on_token: Callable[[int], object] | None = None,
    ) -> Generation:
        """Reads the prompt ``ids`` and generates up to ``max_new_tokens`` tokens; greedy unless ``sampling`` is given.

        stop_tokens: None for the model's own, an empty list for none. on_token gets each token before the next is computed, and ends
        generation by returning False. Ctrl-C raises KeyboardInterrupt and leaves the session usable; so does an exception of on_token.
        Raises CFMoEError where the prompt is empty, holds an unknown token or does not fit the context, and for bad sampling options.
        """
        handle = self._open_handle()
        if not 0 <= max_new_tokens < 1 << 31:
            raise CFMoEError(f"--max-new-tokens {max_new_tokens} is not allowed: use 0 or a positive number")
        chosen = sampling or Sampling()
        if not 0 <= chosen.seed < 1 << 64:
            raise CFMoEError(f"--seed {chosen.seed} is not allowed: use 0 to 2^64 - 1")
        if not -(1 << 31) <= chosen.top_k < 1 << 31:
            raise CFMoEError(f"--top-k {chosen.top_k} is not allowed: use 0 (off) or a positive number")
        options = _capi.Sampling()
        self._lib.cfmoe_sampling_init(ctypes.byref(options))
        options.temperature = chosen.temperature
        options.top_k = chosen.top_k
        options.top_p = chosen.top_p
        options.repetition_penalty = chosen.repetition_penalty
        options.seed = chosen.seed
        failure: list[BaseException] = []
        ended = False

        def callback(token: int, _user: Any) -> int:
            nonlocal ended
            try:
                ended = on_token is not None and on_token(token) is False
            except BaseException as exception:
                failure.append(exception)
                ended = True
            return int(ended)

        # A pointer, never NULL, so that an empty list means no stop tokens.
        stops = None if stop_tokens is None else (ctypes.c_int32 * (len(stop_tokens) + 1))(*stop_tokens)
        # Each round of generation can need no more than this, whatever was asked for.
        out = (ctypes.c_int32 * (min(max_new_tokens, self._engine.model.context_size + 1)))()
        count = ctypes.c_uint32()
        error = _capi.ErrorText()
        tokens = _token_array(ids)
        with self._cancel_on_interrupt() as interrupted:
            status = self._lib.cfmoe_session_generate(
                handle,
                tokens,
                len(tokens),
                len(out),
                ctypes.byref(options),
                stops,
                0 if stop_tokens is None else len(stop_tokens),
                _capi.TokenCallback(callback),
                None,
                out,
                ctypes.byref(count),
                *error.arguments,
            )
        if failure:
            raise failure[0]
        if interrupted.is_set():
            raise KeyboardInterrupt
        error.check(status)
        if ended:
            reason = "callback"
        elif count.value == max_new_tokens:
            reason = "length"
        else:
            reason = "context" if self.position > self._engine.model.context_size else "stop"
        return Generation(list(out[: count.value]), len(tokens), reason)

    def feed(self, ids: Sequence[int], decode: bool = False, logits: bool = True) -> np.ndarray:
        """Reads ``ids`` and returns the logits behind each, float32 [len(ids), vocab_size]; [0, vocab_size] with ``logits=False``.

        decode: token by token through the decode program. Raises CFMoEError as :meth:`generate` does.
        """
        handle = self._open_handle()
        tokens = _token_array(ids)
        out = np.empty((len(tokens) if logits else 0, self._engine.model.vocab_size), dtype=np.float32)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) if logits else None
        error = _capi.ErrorText()
        with self._cancel_on_interrupt() as interrupted:
            status = self._lib.cfmoe_session_feed(handle, tokens, len(tokens), int(decode), pointer, *error.arguments)
        if interrupted.is_set():
            raise KeyboardInterrupt
        error.check(status)
        return out

    @contextmanager
    def _cancel_on_interrupt(self) -> Iterator[threading.Event]:
        """Within it Ctrl-C cancels the call into the library, which holds back Python's own handler until it returns."""
        interrupted = threading.Event()
        if threading.current_thread() is not threading.main_thread():
            yield interrupted
            return

        stop = threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        # Python runs signal handlers between its own instructions only, so another thread watches for the signal's arrival.
        def watch() -> None:
            while received := os.read(reader, 64):
                if stop.is_set():
                    return
                if signal.SIGINT in received:
                    interrupted.set()
                    self.cancel()

        def handler(_number: int, _frame: FrameType | None) -> None:
            interrupted.set()
            self.cancel()

        previous = signal.signal(signal.SIGINT, handler)
        previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, name="cfmoe-interrupt", daemon=True)
        watcher.start()
        try:
            yield interrupted
        finally:
            signal.set_wakeup_fd(previous_fd)
            signal.signal(signal.SIGINT, previous if previous is not None else signal.SIG_DFL)
            stop.set()
            os.write(writer, b"\0")
            watcher.join()
            os.close(writer)
            os.close(reader)

    def cancel(self) -> None:
        """Ends the call under way, from any thread; it raises Cancelled."""
        if self._handle:
            self._lib.cfmoe_session_cancel(self._handle)

    def reset(self) -> None:
        """Forgets the conversation and its metrics, and makes the cache cold."""
        error = _capi.ErrorText()
        error.check(self._lib.cfmoe_session_reset(self._open_handle(), *error.arguments))

    def rewind(self, position: int) -> None:
        """Forgets what follows the first ``position`` tokens and keeps the experts that are in memory; 0 begins a new conversation.

        Raises CFMoEError where the conversation has fewer tokens.
        """
        if not 0 <= position < 1 << 32:
            raise CFMoEError(f"cannot go back to position {position}: name one from 0 to {self.position}")
        error = _capi.ErrorText()
        error.check(self._lib.cfmoe_session_rewind(self._open_handle(), position, *error.arguments))

    @property
    def metrics(self) -> Metrics:
        out = _capi.Metrics()
        self._lib.cfmoe_session_metrics(self._open_handle(), ctypes.byref(out))
        return Metrics(PhaseMetrics(**_fields(out.prefill)), PhaseMetrics(**_fields(out.decode)), out.first_32_hits, out.first_32_accesses)

    def events(self) -> list[Event]:
        """Takes the accesses logged since the last call, in order; empty unless the engine logs events."""
        batch = (_capi.AccessEvent * _EVENT_BATCH)()
        events: list[Event] = []
        while count := self._lib.cfmoe_session_take_events(self._open_handle(), batch, _EVENT_BATCH):
            events += [Event(bool(e.decode), bool(e.hit), e.layer, e.expert, e.position) for e in batch[:count]]
        return events

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes what the engine has run since it was opened as a routing trace, replacing the file.

        Raises CFMoEError where the engine records none, nothing has run yet, or the file cannot be written.
        """
        error = _capi.ErrorText()
        error.check(self._lib.cfmoe_session_write_trace(self._open_handle(), os.fsencode(path), *error.arguments))


def _fields(struct: ctypes.Structure) -> dict[str, Any]:
    return {name: getattr(struct, name) for name, *_ in struct._fields_}


def _token_array(ids: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    values = np.asarray(ids, dtype=np.int64).reshape(-1)
    bad = values[(values < 0) | (values >= 1 << 31)]
    if bad.size:
        raise CFMoEError(f"token {int(bad[0])} is outside the model's vocabulary: use the artifact's own tokenizer")
    return (ctypes.c_int32 * values.size).from_buffer_copy(values.astype(np.int32).tobytes()) if values.size else (ctypes.c_int32 * 0)()
