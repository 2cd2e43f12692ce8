"""Data: what examples of each kind of task are, files of them, text for pre-training, and masks.

No model and no training is known here; the files are read in constant memory or at once, as each reader says.
"""
