"""Image classification: timm models with and without vltok methods, trained side by side on the same pictures."""
