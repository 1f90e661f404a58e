"""The command cloudimage."""
