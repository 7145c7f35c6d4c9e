"""AOTInductor: programs of torch.export, compiled, and what the code multiplies."""
