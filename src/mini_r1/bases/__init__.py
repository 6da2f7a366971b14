"""The models to start from: the embedded bases, models taught by searches, GGUF files."""
