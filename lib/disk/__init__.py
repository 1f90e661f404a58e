"""The instance's disks: the target, its partition table, dump and restore."""
