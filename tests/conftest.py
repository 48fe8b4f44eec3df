"""
Hide GPUs from the tests, and from the processes that they start: device='auto' is the CPU on every machine.

    python -m pytest -m gpu    # the tests that need one, see tests/test_gpu.py; they see it
"""
import os

def pytest_configure(config):
    """Hide the GPUs before torch looks for them, unless the tests of the GPU are asked for."""
    if config.getoption("markexpr") == "gpu":
        return
    # for the process of test_gpu_process.py
    os.environ["GPUS_OF_THE_TESTS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
