"""bert_fast as installed: the extension and the Triton kernels are there, and it does not shadow the PyPI `kernels`.

Usage: smoke.py FOLDER, the folder that the package must have been imported from.
"""

import sys
import warnings

warnings.simplefilter("error")

import torch  # noqa: E402

import bert_fast  # noqa: E402
import bert_fast._C  # noqa: E402
import bert_fast.kernels.attention  # noqa: E402
import kernels  # noqa: E402
from bert_fast import ops  # noqa: E402

assert bert_fast.__file__.startswith(sys.argv[1]), bert_fast.__file__
assert kernels.__file__ is not None, f"{kernels.__path__} shadows the PyPI package kernels"
x = torch.randn(7, 16)
torch.testing.assert_close(ops.bias_gelu(x, x[0]), ops.bias_gelu(x, x[0], impl="reference"))
print(f"bert_fast {bert_fast.__version__} from {bert_fast.__file__}")
