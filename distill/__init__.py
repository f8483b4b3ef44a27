"""Progressive distillation: students that learn from the checkpoints a teacher left while it was training."""

__version__ = "0.1.0"
