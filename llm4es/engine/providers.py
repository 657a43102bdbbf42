"""Which of onnxruntime's execution providers runs the model, and why not another."""

from collections.abc import Collection
from typing import Literal

from llm4es.errors import ConfigError

__all__ = ["CPU", "Device", "choose_providers", "provider_options", "refuse_two_runtimes"]

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

# Each choice falls back, operator by operator, to those behind it in its row that are there.
_ROWS: dict[str, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": (CUDA, CPU),
    "tensorrt": (TENSORRT, CUDA, CPU),
}


def choose_providers(device: Device, available: Collection[str]) -> tuple[str, ...]:
    """Pick providers, most wanted first, from those onnxruntime says it can use.

    "auto" takes CUDA where it is there and the CPU otherwise; TensorRT builds an engine per
    shape at start, so it is used only when asked for. Raises ConfigError for a device that
    this machine or this installation does not have.
    """
    if device == "auto":
        return _ROWS["cuda" if CUDA in available else "cpu"]
    wanted = _ROWS[device]
    if wanted[0] not in available:
        raise ConfigError(
            "device",
            f"{device} asks for {wanted[0]}, and onnxruntime offers only {', '.join(available)}",
            "use device: cpu, or install the extra `gpu` instead of `cpu` on a machine with a GPU",
        )
    return tuple(provider for provider in wanted if provider in available)


def provider_options(provider: str) -> dict[str, str]:
    """Options of a provider: vectors are fp32, so no provider may round its sums to less."""
    if provider == CUDA:
        # TF32 keeps 10 bits of a product: a thousand times the manifest's tolerance.
        return {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    if provider == TENSORRT:
        return {"trt_fp16_enable": "0"}
    return {}


def refuse_two_runtimes(installed: Collection[str]) -> None:
    """Refuse onnxruntime beside onnxruntime-gpu: CUDA would be lost silently.

    Both distributions are one module (onnxruntime issue 26996). Raises ConfigError.
    """
    names = {name.lower().replace("_", "-") for name in installed if name}
    if {"onnxruntime", "onnxruntime-gpu"} <= names:
        raise ConfigError(
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu are both installed, and share one module",
            "uninstall both, then install the extra `cpu` or the extra `gpu`",
        )
