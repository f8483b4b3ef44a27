"""`python -m distill.kernels` says which operators this installation has."""

from distill.kernels.cpu import load_problem

print(f"C++ operators: {'none; the PyTorch reference serves: ' + load_problem if load_problem else 'built'}")
