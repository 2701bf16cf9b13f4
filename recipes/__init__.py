"""Runnable experiments on timm models; they use only the public names of snr_hooks."""
