"""Which sampler, steps, samples, precision and backend are served."""
