"""Parameter-efficient fine-tuning for JAX and Flax NNX."""
