"""What the administrator may say: OS parameters, cloudimage.conf, variants."""
