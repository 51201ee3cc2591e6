"""The grid on ImageNet: what it takes on how many GPUs."""
