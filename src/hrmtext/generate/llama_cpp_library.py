"""llama.cpp's C interface by ctypes, out of the `xllamacpp` wheel, whose extension exports it.

The wheel's own Python interface is a server without the causal-attention switch that PrefixLM
needs. The structures below are those of llama.cpp build 11549; they have changed between builds,
so the library's own default parameters are checked against them before anything is called.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t
from functools import lru_cache
from pathlib import Path
from typing import Any

from hrmtext.errors import BackendError

PACKAGE = "xllamacpp"
TESTED_VERSION = "2026.10.11549"
INSTALL = "install it with `pip install 'hrm-text[gguf]'`"

F32_CACHE, F16_CACHE = 0, 1
"""ggml's numbers of the number formats of keys and values."""

logger = logging.getLogger(__name__)


class ModelParams(Structure):
    """llama_model_params"""

    _fields_ = [
        ("devices", ctypes.c_void_p), ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", c_int32), ("split_mode", c_int32), ("load_mode", c_int32),
        ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p), ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p), ("vocab_only", c_bool), ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool), ("no_host", c_bool), ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]  # fmt: skip


class ContextParams(Structure):
    """llama_context_params"""

    _fields_ = [
        ("n_ctx", c_int32), ("n_batch", c_int32), ("n_ubatch", c_int32), ("n_seq_max", c_int32),
        ("n_rs_seq", c_int32), ("n_outputs_max", c_int32), ("n_outputs_max_per_seq", c_int32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32), ("pooling_type", c_int32), ("attention_type", c_int32),
        ("flash_attn_type", c_int32), ("rope_freq_base", c_float), ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float), ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float), ("yarn_orig_ctx", c_int32), ("defrag_thold", c_float),
        ("cb_eval", ctypes.c_void_p), ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("moe_cache_size", c_size_t),
        ("abort_callback", ctypes.c_void_p), ("abort_callback_data", ctypes.c_void_p),
        ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool),
        ("op_offload", c_bool), ("swa_full", c_bool), ("kv_unified", c_bool),
        ("samplers", ctypes.c_void_p), ("n_samplers", c_size_t), ("ctx_other", ctypes.c_void_p),
    ]  # fmt: skip


class Batch(Structure):
    """llama_batch"""

    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)), ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(ctypes.c_int8)),
    ]  # fmt: skip


# Values that identify the layout: most are neither 0 nor a neighbour's value.
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0,
    "n_outputs_max": 0, "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4,
    "ctx_type": 0, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1,
    "flash_attn_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0, "yarn_orig_ctx": 0, "defrag_thold": -1.0, "cb_eval": None,
    "type_k": F16_CACHE, "type_v": F16_CACHE, "abort_callback": None, "embeddings": False,
    "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True,
    "kv_unified": False, "samplers": None, "n_samplers": 0, "ctx_other": None,
}  # fmt: skip
_MODEL_DEFAULTS = {
    "devices": None, "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "main_gpu": 0,
    "tensor_split": None, "progress_callback": None, "kv_overrides": None, "vocab_only": False,
    "check_tensors": False, "use_extra_bufts": True, "no_host": False, "no_alloc": False,
}  # fmt: skip

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int32, c_char_p, ctypes.c_void_p)
_ERROR_LEVEL = 4
# The library keeps the address of a callback: it must outlive the object that made it.
_callbacks: list[Any] = []

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [ctypes.c_void_p]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, ContextParams]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_n_ctx": (ctypes.c_uint32, [ctypes.c_void_p]),
    "llama_n_ubatch": (ctypes.c_uint32, [ctypes.c_void_p]),
    "llama_set_causal_attn": (None, [ctypes.c_void_p, c_bool]),
    "llama_decode": (c_int32, [ctypes.c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [ctypes.c_void_p, c_int32]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [ctypes.c_void_p, c_int32, c_int32, c_int32]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [ctypes.c_void_p]),
    "llama_vocab_bos": (c_int32, [ctypes.c_void_p]),
    "llama_vocab_eos": (c_int32, [ctypes.c_void_p]),
    "llama_tokenize": (
        c_int32,
        [ctypes.c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_log_set": (None, [_LOG_CALLBACK, ctypes.c_void_p]),
    "llama_print_system_info": (c_char_p, []),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int32, POINTER(c_float), ctypes.c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)],
    ),
}


class Library:
    """The loaded library; its functions are attributes, by their C names."""

    def __init__(self, path: Path) -> None:
        """Load the shared object at `path`.

        Raises:
            BackendError: it cannot be loaded, lacks a function, or has other structures.
        """
        try:
            self._handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(f"cannot load llama.cpp from {PACKAGE}: {error}") from error
        for name, (result, arguments) in _SIGNATURES.items():
            try:
                function = getattr(self._handle, name)
            except AttributeError:
                raise BackendError(f"llama.cpp in {PACKAGE} has no {name}; {_versions()}") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.problems: list[str] = []
        self._log = _LOG_CALLBACK(self._remember)
        _callbacks.append(self._log)
        self.llama_log_set(self._log, None)
        for params, expected in (
            (self.llama_context_default_params(), _CONTEXT_DEFAULTS),
            (self.llama_model_default_params(), _MODEL_DEFAULTS),
        ):
            check_layout(params, expected)
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"llama.cpp function {name} is not declared")

    def take_problems(self) -> str:
        """What llama.cpp complained of since the last call, as one line."""
        text = " ".join(" ".join(self.problems).split())
        self.problems.clear()
        return text or "no reason given"

    def _remember(self, level: int, text: bytes, _: Any) -> None:
        message = text.decode("utf-8", "replace")
        if level == _ERROR_LEVEL:
            self.problems.append(message)
        logger.debug("llama.cpp: %s", message.rstrip())


def check_layout(params: Structure, expected: dict[str, Any]) -> None:
    """BackendError where default parameters read through our structure are not the known ones."""
    found = {name: getattr(params, name) for name in expected}
    wrong = [
        f"{n} is {found[n]!r}, not {expected[n]!r}" for n in expected if found[n] != expected[n]
    ]
    if wrong:
        raise BackendError(
            f"{type(params).__doc__} of this llama.cpp is laid out differently than in the build "
            f"that hrm-text knows ({wrong[0]}); {_versions()}"
        )


@lru_cache(maxsize=1)
def library() -> Library:
    """The library, loaded once.

    Raises:
        BackendError: the package is missing, or its llama.cpp is not one that we can call.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BackendError(f"llama.cpp is needed but the package {PACKAGE} is missing; {INSTALL}")
    folder = Path(spec.origin).parent
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    for path in sorted(folder.iterdir()):
        if path.name.split(".")[0] == PACKAGE and path.name.endswith(tuple(suffixes)):
            return Library(path)
    raise BackendError(f"{PACKAGE} holds no extension module; {INSTALL} again")


def version() -> str:
    """Version of the package that llama.cpp comes from; its last number is llama.cpp's build."""
    return importlib.metadata.version(PACKAGE)


def _versions() -> str:
    return f"{PACKAGE} is {version()}, tested is {TESTED_VERSION}; {INSTALL}"
