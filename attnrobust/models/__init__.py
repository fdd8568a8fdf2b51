"""Where layers come from: files, torch modules and pretrained models."""
