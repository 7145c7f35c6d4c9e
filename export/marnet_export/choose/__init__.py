"""The choice of sampler, steps, samples, precision and backend."""
