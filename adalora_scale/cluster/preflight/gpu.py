"""ECC errors, temperature, throttling and memory of this rank's GPU, through NVML (the package nvidia-ml-py)."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch

from adalora_scale.cluster.preflight.findings import Finding
from adalora_scale.cluster.preflight.thresholds import Thresholds

# Reasons for a lowered clock that are faults; idle clocks, a power cap and fixed application clocks are not.
_FAULTS = {
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "slowed by heat (driver)",
    "HwThermalSlowdown": "slowed by heat (hardware)",
    "HwPowerBrakeSlowdown": "slowed by the power brake",
}


def gpu_health(index: int) -> dict[str, Any]:
    """Return what NVML says of this process's GPU number `index`, or `{"skipped": why}`."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return {"skipped": "NVML's Python package is not installed; pip install nvidia-ml-py (extra: gpu)"}
    try:
        nvml.nvmlInit()
        try:
            return _read(nvml, f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        return {"skipped": f"NVML: {error}"}


def _read(nvml: Any, uuid: str) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    found: dict[str, Any] = {
        "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "free_memory_share": memory.free / memory.total,
    }
    # What a model of GPU does not have is absent from the answer.
    with contextlib.suppress(nvml.NVMLError):
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        found["throttling"] = [
            text for name, text in _FAULTS.items() if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}")
        ]
    with contextlib.suppress(nvml.NVMLError):
        found["ecc"] = bool(nvml.nvmlDeviceGetEccMode(handle)[0])
    with contextlib.suppress(nvml.NVMLError):
        found["uncorrected_errors"] = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    with contextlib.suppress(nvml.NVMLError):
        _, _, pending, failure = nvml.nvmlDeviceGetRemappedRows(handle)
        found["rows_to_remap"], found["row_remapping_failed"] = bool(pending), bool(failure)
    return found


def judge_gpu(rank: int, host: str, health: dict[str, Any], limits: Thresholds) -> list[Finding]:
    """Turn one rank's answer into findings."""
    where = f"rank {rank} on {host}"
    if "skipped" in health:
        return [Finding(check="GPU health", where=where, status="skipped", text=health["skipped"])]
    problems = []
    if health.get("uncorrected_errors"):
        problems.append(f"{health['uncorrected_errors']} uncorrected ECC errors since the last reset; reset the GPU")
    if health.get("row_remapping_failed"):
        problems.append("a memory row could not be remapped; the GPU must be replaced")
    if health.get("rows_to_remap"):
        problems.append("memory rows wait to be remapped; reset the GPU")
    problems += health.get("throttling", [])
    if health["temperature_c"] > limits.gpu_temperature_max_c:
        problems.append(f"{health['temperature_c']} °C before any load (at most {limits.gpu_temperature_max_c:g})")
    if health["free_memory_share"] < limits.gpu_free_memory_min_share:
        problems.append(f"only {health['free_memory_share']:.0%} of its memory is free; is another process on it?")
    if problems:
        return [Finding(check="GPU health", where=where, status="FAIL", text=text) for text in problems]
    text = f"{health['temperature_c']} °C, ECC {'on' if health.get('ecc') else 'off'}, no errors, not throttled"
    return [Finding(check="GPU health", where=where, status="ok", text=text)]
