"""Post-training quantization: formats, transforms, learned layers, rounding and block reconstruction."""
