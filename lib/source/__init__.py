"""Where an image comes from: download, checksum lists and signatures, the cache."""
