"""Segmentation: mean intersection over union of Hugging Face models on clean and corrupted pictures."""
