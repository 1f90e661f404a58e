"""instance-cloudimage: a Ganeti OS provider for vendors' cloud images."""

__version__ = "0.2.0"
