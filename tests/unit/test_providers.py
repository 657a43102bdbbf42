"""Which execution provider is chosen, what it falls back to, and what is refused."""

import pytest

from llm4es.bundle import ComputePrecision
from llm4es.engine.providers import (
    CPU,
    CUDA,
    OPENVINO,
    TENSORRT,
    Device,
    choose_providers,
    provider_options,
    refuse_two_runtimes,
)
from llm4es.errors import ConfigError

GPU_BUILD = (TENSORRT, CUDA, CPU)
CPU_BUILD = ("AzureExecutionProvider", CPU)


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        ("auto", CPU_BUILD, (CPU,)),
        ("auto", GPU_BUILD, (CUDA, CPU)),  # TensorRT only when it is asked for
        ("auto", (TENSORRT, CPU), (CPU,)),
        ("cpu", GPU_BUILD, (CPU,)),
        ("cuda", GPU_BUILD, (CUDA, CPU)),
        ("tensorrt", GPU_BUILD, (TENSORRT, CUDA, CPU)),
        ("tensorrt", (TENSORRT, CPU), (TENSORRT, CPU)),
        ("auto", (OPENVINO, CPU), (CPU,)),  # as fast in fp32, and in place
        ("auto", (OPENVINO,), (OPENVINO,)),
        ("auto", (*GPU_BUILD, OPENVINO), (CUDA, CPU)),
        ("openvino", (CPU, OPENVINO), (OPENVINO,)),
    ],
)
def test_the_device_decides_and_falls_back_only_to_what_is_there(
    device: Device, available: tuple[str, ...], chosen: tuple[str, ...]
) -> None:
    assert choose_providers(device, available) == chosen
    assert choose_providers(device, tuple(reversed(available))) == chosen


@pytest.mark.parametrize(
    ("device", "available", "missing"),
    [
        ("cuda", CPU_BUILD, CUDA),
        ("tensorrt", CPU_BUILD, TENSORRT),
        ("tensorrt", (CUDA, CPU), TENSORRT),
        ("cpu", ("AzureExecutionProvider",), CPU),
        ("auto", ("AzureExecutionProvider",), CPU),
    ],
)
def test_a_device_that_is_not_there_is_refused_and_never_replaced(
    device: Device, available: tuple[str, ...], missing: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_providers(device, available)
    assert caught.value.field == "device"
    assert missing in caught.value.problem
    for offered in available:
        assert offered in caught.value.problem
    assert "device: cpu" in caught.value.remedy


def test_openvino_that_is_not_installed_is_refused_with_its_extra() -> None:
    with pytest.raises(ConfigError, match="device: openvino asks for OpenVINO") as caught:
        choose_providers("openvino", CPU_BUILD)
    assert "extra `openvino`" in caught.value.remedy


@pytest.mark.parametrize(
    ("precision", "available", "chosen"),
    [
        ("fp16", (CUDA, CPU, OPENVINO), (CUDA, CPU)),
        ("fp16", (OPENVINO, CPU), (CPU,)),
        ("bf16", (CUDA, CPU, OPENVINO), (OPENVINO,)),
        ("int8", (CUDA, CPU, OPENVINO), (CPU,)),
        ("int4-weights", (CUDA, CPU, OPENVINO), (CPU,)),
    ],
)
def test_auto_takes_only_what_gives_the_manifests_precision(
    precision: ComputePrecision, available: tuple[str, ...], chosen: tuple[str, ...]
) -> None:
    assert choose_providers("auto", available, precision) == chosen


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), ("cuda", "int8"), ("openvino", "fp16"), ("tensorrt", "int8-weights")],
)
def test_a_device_that_would_round_otherwise_is_refused(
    device: Device, precision: ComputePrecision
) -> None:
    with pytest.raises(ConfigError, match=f"{device} does not compute in {precision}"):
        choose_providers(device, (TENSORRT, CUDA, CPU, OPENVINO), precision)


def test_a_precision_that_nothing_here_gives_is_refused() -> None:
    with pytest.raises(ConfigError, match="openvino asks for OpenVINO"):
        choose_providers("auto", CPU_BUILD, "bf16")


@pytest.mark.parametrize(
    "installed",
    [
        ["numpy", "onnxruntime", "onnxruntime-gpu"],
        ["onnxruntime_gpu", "ONNXRuntime"],  # names as a wheel may spell them
    ],
)
def test_two_runtimes_in_one_environment_are_refused_with_the_way_out(
    installed: list[str],
) -> None:
    with pytest.raises(ConfigError, match="share one module") as caught:
        refuse_two_runtimes(installed)
    assert "uninstall both" in caught.value.remedy


@pytest.mark.parametrize(
    "installed",
    [[], ["onnxruntime"], ["onnxruntime-gpu"], ["onnxruntime", "onnxruntime-extensions"]],
)
def test_one_runtime_or_none_is_no_reason_to_refuse(installed: list[str]) -> None:
    refuse_two_runtimes(installed)


def test_no_provider_may_round_its_sums_to_less_than_fp32() -> None:
    assert provider_options("CUDAExecutionProvider")["use_tf32"] == "0"
    assert provider_options("TensorrtExecutionProvider")["trt_fp16_enable"] == "0"
    assert provider_options("CPUExecutionProvider") == {}
