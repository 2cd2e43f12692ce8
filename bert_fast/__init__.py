"""A fast BERT: a plain PyTorch definition, and fused Triton and C++ kernels that replace its steps."""

__version__ = "0.1.0"
