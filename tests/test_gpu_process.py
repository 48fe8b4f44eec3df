"""
Run the tests of the GPU in a process that sees it: this one does not, see conftest.py.
"""
import os, subprocess, sys

import pytest
import torch

TESTS = os.path.dirname(os.path.abspath(__file__))

def test_no_test_sees_a_gpu(request):
    """On a machine with one, tests that left device='auto' ran on it, and three failed."""
    if request.config.getoption("markexpr") == "gpu":
        pytest.skip("these tests are asked for")
    assert not torch.cuda.is_available()
    script = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False"

@pytest.mark.skipif(not os.path.exists("/dev/nvidia0"), reason="there is no CUDA device")
def test_the_gpu_tests_pass():
    environment = dict(os.environ)
    # as it was before conftest.py hid them
    del environment["CUDA_VISIBLE_DEVICES"]
    if gpus := environment.pop("GPUS_OF_THE_TESTS", ""):
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    file = os.path.join(TESTS, "test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", file]
    root = os.path.dirname(TESTS)
    options = dict(env=environment, cwd=root, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout[-4000:]
