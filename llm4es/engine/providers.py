"""Which provider runs the model, and why not another: onnxruntime's own, or OpenVINO."""

from collections.abc import Collection
from typing import Literal

from llm4es.bundle import ComputePrecision
from llm4es.errors import ConfigError

__all__ = [
    "CPU",
    "OPENVINO",
    "Device",
    "choose_providers",
    "provider_options",
    "refuse_two_runtimes",
]

Device = Literal["auto", "cpu", "openvino", "cuda", "tensorrt"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINO"  # the library itself, not a build of onnxruntime: those share one module

# Each choice falls back, operator by operator, to those behind it in its row that are there.
_ROWS: dict[str, tuple[str, ...]] = {
    "cpu": (CPU,),
    "openvino": (OPENVINO,),
    "cuda": (CUDA, CPU),
    "tensorrt": (TENSORRT, CUDA, CPU),
}
# Who gives a precision as the manifest means it, most wanted first. OpenVINO reads the graphs of
# the others too, and would round elsewhere; onnxruntime has no bf16 on a CPU.
_GIVEN_BY: dict[ComputePrecision, tuple[Device, ...]] = {
    "fp32": ("cuda", "cpu", "openvino", "tensorrt"),
    "fp16": ("cuda", "cpu"),
    "bf16": ("openvino",),
    "int8": ("cpu",),
    "int8-weights": ("cpu",),
    "int4-weights": ("cpu",),
}
_EXTRAS = {
    "cpu": "device: cpu needs the extra `cpu`",
    "openvino": "install the extra `openvino`, or use device: cpu",
    "cuda": "use device: cpu, or install the extra `gpu` instead of `cpu` on a machine with a GPU",
}


def choose_providers(
    device: Device, available: Collection[str], precision: ComputePrecision = "fp32"
) -> tuple[str, ...]:
    """Pick providers, most wanted first, from those that are here and give the precision.

    "auto" takes the first of CUDA, onnxruntime's CPU and OpenVINO that does; TensorRT builds an
    engine per shape at start, so it is used only when asked for. Raises ConfigError for a device
    that this machine or this installation does not have, or that does not give the precision.
    """
    given_by = _GIVEN_BY[precision]
    if device == "auto":
        here = [one for one in given_by if _ROWS[one][0] in available and one != "tensorrt"]
        device = here[0] if here else "cpu" if "cpu" in given_by else given_by[0]
    if device not in given_by:
        raise ConfigError(
            "device",
            f"{device} does not compute in {precision}, as the bundle's manifest says",
            f"use device: {' or '.join(given_by)}, or a bundle of another precision",
        )
    row = _ROWS[device]
    if row[0] not in available:
        raise ConfigError(
            "device",
            f"{device} asks for {row[0]}, and there is only {', '.join(available) or 'nothing'}",
            _EXTRAS.get(device, _EXTRAS["cuda"]),
        )
    return tuple(provider for provider in row if provider in available)


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
