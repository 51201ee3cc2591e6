"""Train, score and compare sparse autoencoders on the features of vision encoders."""

__version__ = "0.1.0"
