"""dtypes and precision follow the device."""

import pytest
import torch
from composer.core import Precision

from vlm_composer.training import hardware


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_where_the_device_has_it(monkeypatch, native):
    monkeypatch.setattr(hardware, "has_native_bf16", lambda device: native)
    assert hardware.storage_dtype("auto", "cpu") == (torch.bfloat16 if native else torch.float32)
    _, autocast = hardware.choose_precision("auto", "cpu")
    assert autocast == (torch.bfloat16 if native else None)


def test_amp_bf16_is_composers_on_a_gpu_and_the_models_on_a_cpu():
    assert hardware.choose_precision("amp_bf16", "gpu") == (Precision.AMP_BF16, None)
    assert hardware.choose_precision("amp_bf16", "cpu") == (Precision.FP32, torch.bfloat16)
    assert hardware.choose_precision("fp32", "cpu") == (Precision.FP32, None)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        hardware.choose_device("gpu")
    assert hardware.choose_device(None) == "cpu"


def test_the_measured_peak_is_that_of_a_matrix_product():
    peak = hardware.measure_peak_flops(torch.float32, size=256, repeats=3)
    assert 1e8 < peak < 1e14
