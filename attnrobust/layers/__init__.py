"""Layer specifications and the adapters that read them from models."""
