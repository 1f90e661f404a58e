"""What understands an image: compression, archives, headers, qemu-img."""
