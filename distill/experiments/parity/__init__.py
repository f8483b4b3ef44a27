"""Sparse parity: the task, small networks trained side by side, their trajectories, and the probe that explains them."""
