"""SpikeLM: transformers whose linear layers are driven by ternary spikes over T timesteps."""
