"""DFlash speculative decoding, served: settings, speculation, gateway and the vLLM extensions. Knows no Ray Serve."""

__version__ = "0.1.0"
