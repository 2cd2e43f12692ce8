"""Kinds of tasks that a BERT is fine-tuned for: examples to features, the model's output to predictions and scores."""
